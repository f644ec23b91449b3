"""gevent's two servers: a greenlet per connection, and per datagram."""

# mypy: disable-error-code="import-not-found, import-untyped"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gevent.server import DatagramServer, StreamServer

from tests.benchmarks.servers import BACKLOG, CHUNK, HOST, Announce


def echo(connection: Any, address: Any) -> None:
    """Send back what arrives. The server closes the connection afterwards."""
    while chunk := connection.recv(CHUNK):
        connection.sendall(chunk)


def echo_lines(connection: Any, address: Any) -> None:
    """Send back each line, as in the examples of gevent: lines of a file, ``sendall()``."""
    with connection.makefile("rb") as lines:
        for line in lines:
            connection.sendall(line)


def serve(announce: Announce, handler: Callable[[Any, Any], None]) -> None:
    """Serve with ``StreamServer``."""
    server: Any = StreamServer((HOST, 0), handler, backlog=BACKLOG)
    server.start()
    announce(server.server_port)
    server.serve_forever()


def tcp(announce: Announce) -> None:
    """Send back what arrives."""
    serve(announce, echo)


def tcp_by_lines(announce: Announce) -> None:
    """Send back lines."""
    serve(announce, echo_lines)


def udp(announce: Announce) -> None:
    """Serve with ``DatagramServer``."""

    def echo_datagram(data: bytes, address: Any) -> None:
        server.socket.sendto(data, address)

    server: Any = DatagramServer((HOST, 0), echo_datagram)
    server.start()
    announce(server.server_port)
    server.serve_forever()
