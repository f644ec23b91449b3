"""anyio's listeners, running on trio."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import anyio.abc
from anyio.streams.buffered import BufferedByteReceiveStream

from tests.benchmarks.servers import BACKLOG, CHUNK, HOST, Announce

Handler = Callable[[anyio.abc.SocketStream], Awaitable[None]]


async def echo(stream: anyio.abc.SocketStream) -> None:
    """Send back what arrives."""
    async with stream:
        try:
            while True:
                await stream.send(await stream.receive(CHUNK))
        except anyio.EndOfStream:
            return


async def echo_lines(stream: anyio.abc.SocketStream) -> None:
    """Send back each line. (`receive_until` takes the line's end off.)"""
    lines = BufferedByteReceiveStream(stream)
    async with stream:
        try:
            while True:
                line = await lines.receive_until(b"\n", CHUNK)
                await stream.send(line + b"\n")
        except (anyio.EndOfStream, anyio.IncompleteRead):
            return


def serve(announce: Announce, handler: Handler) -> None:
    """Serve with ``create_tcp_listener``."""

    async def main() -> None:
        listener = await anyio.create_tcp_listener(local_host=HOST, backlog=BACKLOG)
        announce(listener.extra(anyio.abc.SocketAttribute.local_port))
        await listener.serve(handler)

    anyio.run(main, backend="trio")


def tcp(announce: Announce) -> None:
    """Send back what arrives."""
    serve(announce, echo)


def tcp_by_lines(announce: Announce) -> None:
    """Send back lines."""
    serve(announce, echo_lines)
