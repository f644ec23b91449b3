"""anyio's listeners, running on trio."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import anyio
import anyio.abc

from tests.benchmarks.servers import BACKLOG, CHUNK, HOST, Announce


async def echo(stream: anyio.abc.SocketStream) -> None:
    """Send back what arrives."""
    async with stream:
        try:
            while True:
                await stream.send(await stream.receive(CHUNK))
        except anyio.EndOfStream:
            return


def tcp(announce: Announce) -> None:
    """Serve with ``create_tcp_listener``."""

    async def main() -> None:
        listener = await anyio.create_tcp_listener(local_host=HOST, backlog=BACKLOG)
        announce(listener.extra(anyio.abc.SocketAttribute.local_port))
        await listener.serve(echo)

    anyio.run(main, backend="trio")
