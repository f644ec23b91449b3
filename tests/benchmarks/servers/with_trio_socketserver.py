"""The package itself, through its public names, with handlers as the README shows them."""

from __future__ import annotations

import trio

from tests.benchmarks.servers import HOST, Announce
from tests.benchmarks.servers.with_socketserver import Echo
from trio_socketserver import (
    DatagramRequestHandler,
    ForkingTCPServer,
    NurseryTCPServer,
    NurseryUDPServer,
    StreamRequestHandler,
    ThreadingTCPServer,
)


class EchoLines(StreamRequestHandler):
    """Sends every line back."""

    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(line)


class EchoDatagram(DatagramRequestHandler):
    """Sends the datagram back."""

    async def handle(self) -> None:
        self.wfile.write(self.packet)


def tcp(announce: Announce) -> None:
    """Serve lines with a task per connection."""

    async def main() -> None:
        async with NurseryTCPServer((HOST, 0), EchoLines) as server:
            announce(server.server_address[1])
            await server.serve_forever()

    trio.run(main)


def tcp_threading(announce: Announce) -> None:
    """Serve with ``ThreadingTCPServer``, and socketserver's own handler."""

    async def main() -> None:
        async with ThreadingTCPServer((HOST, 0), Echo) as server:
            announce(server.server_address[1])
            await server.serve_forever()

    trio.run(main)


def tcp_forking(announce: Announce) -> None:
    """Serve with ``ForkingTCPServer``, and socketserver's own handler."""

    async def main() -> None:
        async with ForkingTCPServer((HOST, 0), Echo) as server:
            announce(server.server_address[1])
            await server.serve_forever()

    trio.run(main)


def udp(announce: Announce) -> None:
    """Serve datagrams with a task per datagram."""

    async def main() -> None:
        async with NurseryUDPServer((HOST, 0), EchoDatagram) as server:
            announce(server.server_address[1])
            await server.serve_forever()

    trio.run(main)
