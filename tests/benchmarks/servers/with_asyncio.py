"""asyncio: streams and a datagram protocol, on its own event loop and on uvloop's."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tests.benchmarks.servers import BACKLOG, CHUNK, HOST, Announce

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
LoopFactory = Callable[[], asyncio.AbstractEventLoop] | None


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The echo handler of asyncio's documentation, for more than one message."""
    while chunk := await reader.read(CHUNK):
        writer.write(chunk)
        await writer.drain()
    writer.close()


async def echo_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back each line."""
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


class EchoDatagrams(asyncio.DatagramProtocol):
    """The echo protocol of asyncio's documentation."""

    def connection_made(self, transport: Any) -> None:
        self.transport: asyncio.DatagramTransport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)


def serve_tcp(announce: Announce, handler: Handler, loop_factory: LoopFactory) -> None:
    """Serve with ``asyncio.start_server``."""

    async def main() -> None:
        server = await asyncio.start_server(handler, HOST, 0, backlog=BACKLOG)
        announce(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def serve_udp(announce: Announce, loop_factory: LoopFactory) -> None:
    """Serve with ``create_datagram_endpoint``."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(
            EchoDatagrams, local_addr=(HOST, 0)
        )
        announce(transport.get_extra_info("sockname")[1])
        await asyncio.Event().wait()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(main())


def tcp(announce: Announce) -> None:
    """Streams on asyncio's own event loop."""
    serve_tcp(announce, echo, None)


def tcp_by_lines(announce: Announce) -> None:
    """Streams on asyncio's own event loop, read by lines."""
    serve_tcp(announce, echo_lines, None)


def udp(announce: Announce) -> None:
    """A datagram protocol on asyncio's own event loop."""
    serve_udp(announce, None)


def tcp_uvloop(announce: Announce) -> None:
    """Streams on uvloop."""
    import uvloop

    serve_tcp(announce, echo, uvloop.new_event_loop)


def tcp_uvloop_by_lines(announce: Announce) -> None:
    """Streams on uvloop, read by lines."""
    import uvloop

    serve_tcp(announce, echo_lines, uvloop.new_event_loop)


def udp_uvloop(announce: Announce) -> None:
    """A datagram protocol on uvloop."""
    import uvloop

    serve_udp(announce, uvloop.new_event_loop)
