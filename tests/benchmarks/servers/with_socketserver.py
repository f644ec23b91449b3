"""The standard library's ``socketserver``: a thread, or a process, per request."""

from __future__ import annotations

import socketserver
from importlib import import_module

from tests.benchmarks.servers import BACKLOG, CHUNK, HOST, Announce


class Echo(socketserver.StreamRequestHandler):
    """Sends back what arrives."""

    def handle(self) -> None:
        while chunk := self.request.recv(CHUNK):
            self.request.sendall(chunk)


class EchoLines(socketserver.StreamRequestHandler):
    """Sends every line back."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


class EchoDatagram(socketserver.DatagramRequestHandler):
    """Sends the datagram back."""

    def handle(self) -> None:
        self.wfile.write(self.packet)


class ThreadingServer(socketserver.ThreadingTCPServer):
    """A thread per connection."""

    request_queue_size = BACKLOG
    daemon_threads = True


class ForkingServer(socketserver.ForkingTCPServer):
    """A process per connection."""

    request_queue_size = BACKLOG


class ThreadingDatagramServer(socketserver.ThreadingUDPServer):
    """A thread per datagram."""

    daemon_threads = True


def serve(server: socketserver.TCPServer, announce: Announce) -> None:
    """Announce the port and serve."""
    announce(server.socket.getsockname()[1])
    server.serve_forever()


def tcp_threading(announce: Announce) -> None:
    """Serve with ``ThreadingTCPServer``."""
    serve(ThreadingServer((HOST, 0), Echo), announce)


def tcp_threading_by_lines(announce: Announce) -> None:
    """Serve lines with ``ThreadingTCPServer``."""
    serve(ThreadingServer((HOST, 0), EchoLines), announce)


def tcp_forking(announce: Announce) -> None:
    """Serve with ``ForkingTCPServer``."""
    serve(ForkingServer((HOST, 0), Echo), announce)


def tcp_forking_of_our_size(announce: Announce) -> None:
    """The same in a process that has imported as much as ours: forking copies it."""
    import_module("trio_socketserver")
    serve(ForkingServer((HOST, 0), EchoLines), announce)


def udp_threading(announce: Announce) -> None:
    """Serve with ``ThreadingUDPServer``."""
    serve(ThreadingDatagramServer((HOST, 0), EchoDatagram), announce)
