"""trio's own means: ``serve_tcp``, and a socket with a task per datagram."""

from __future__ import annotations

from functools import partial

import trio

from tests.benchmarks.servers import BACKLOG, CHUNK, HOST, Announce


async def echo(stream: trio.SocketStream) -> None:
    """The echo handler of trio's tutorial."""
    async for chunk in stream:
        await stream.send_all(chunk)


def tcp(announce: Announce) -> None:
    """Serve with ``trio.serve_tcp``."""

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners: list[trio.SocketListener] = await nursery.start(
                partial(trio.serve_tcp, echo, 0, host=HOST, backlog=BACKLOG)
            )
            announce(listeners[0].socket.getsockname()[1])

    trio.run(main)


def udp(announce: Announce) -> None:
    """Serve with ``trio.socket`` and a task per datagram."""

    async def main() -> None:
        with trio.socket.socket(type=trio.socket.SOCK_DGRAM) as sock:
            await sock.bind((HOST, 0))
            announce(sock.getsockname()[1])
            async with trio.open_nursery() as nursery:
                while True:
                    packet, address = await sock.recvfrom(CHUNK)
                    nursery.start_soon(sock.sendto, packet, address)

    trio.run(main)
