"""The package itself, through its public names, with handlers as the README shows them."""

from __future__ import annotations

import time

import trio

from tests.benchmarks.servers import HOST, Announce
from tests.benchmarks.servers.with_socketserver import EchoLines as BlockingEchoLines
from trio_socketserver import (
    DatagramRequestHandler,
    ForkingTCPServer,
    NurseryTCPServer,
    NurseryUDPServer,
    PreforkingMixIn,
    StreamRequestHandler,
    ThreadingTCPServer,
)

COMPUTING_SECONDS = 0.002


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
    """Serve with ``ThreadingTCPServer``, and a handler of ``socketserver``'s."""

    async def main() -> None:
        async with ThreadingTCPServer((HOST, 0), BlockingEchoLines) as server:
            announce(server.server_address[1])
            await server.serve_forever()

    trio.run(main)


def tcp_forking(announce: Announce) -> None:
    """Serve with ``ForkingTCPServer``, and a handler of ``socketserver``'s."""

    async def main() -> None:
        async with ForkingTCPServer((HOST, 0), BlockingEchoLines) as server:
            announce(server.server_address[1])
            await server.serve_forever()

    trio.run(main)


class Compute(StreamRequestHandler):
    """Computes before it sends a line back."""

    async def handle(self) -> None:
        line = await self.rfile.readline()
        end = time.process_time() + COMPUTING_SECONDS
        while time.process_time() < end:
            continue
        await self.wfile.write(line)


class Workers(PreforkingMixIn, NurseryTCPServer):
    """Serves in worker processes."""


def _serve_in_workers(workers: int, announce: Announce) -> None:
    async def main() -> None:
        server = Workers((HOST, 0), Compute)
        server.workers = workers
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            announce(server.server_address[1])

    trio.run(main)


def one_worker(announce: Announce) -> None:
    """Compute in one worker process."""
    _serve_in_workers(1, announce)


def two_workers(announce: Announce) -> None:
    """Compute in two worker processes."""
    _serve_in_workers(2, announce)


def udp(announce: Announce) -> None:
    """Serve datagrams with a task per datagram."""

    async def main() -> None:
        async with NurseryUDPServer((HOST, 0), EchoDatagram) as server:
            announce(server.server_address[1])
            await server.serve_forever()

    trio.run(main)
