"""Several servers in one nursery: vote by TCP or UDP, see the result on a Unix socket.

    python examples/several_servers.py [PORT] [SOCKET]

Vote, and look at the result (``-N`` is for OpenBSD's ``nc``; others need none):

    echo tea | nc -N 127.0.0.1 9999
    echo coffee | nc -u -w 1 127.0.0.1 9999
    nc -U /tmp/votes

They are tasks of one program, so what they share is a plain object without a lock.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter
from typing import Any

import trio

from trio_socketserver import (
    BaseServer,
    DatagramRequestHandler,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    StreamSocket,
)

votes: Counter[str] = Counter()


class VoteByLine(StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.rfile:
            votes[line.decode(errors="replace").strip()] += 1
            await self.wfile.write(b"thank you\n")


class VoteByDatagram(DatagramRequestHandler):
    async def handle(self) -> None:
        votes[self.packet.decode(errors="replace").strip()] += 1
        self.wfile.write(b"thank you\n")


async def show(request: StreamSocket, client_address: Any, server: BaseServer) -> None:
    """Answer at once. (A function is a handler too.)"""
    lines = [f"{n} {choice}\n" for choice, n in votes.most_common()]
    await request.send_all("".join(lines).encode())


async def serve(server: BaseServer, task_status: trio.TaskStatus[Any]) -> None:
    async with server:
        task_status.started(server.server_address)
        await server.serve_forever()


async def main(port: int, path: str) -> None:
    servers = [
        NurseryTCPServer(("127.0.0.1", port), VoteByLine),
        NurseryUDPServer(("127.0.0.1", port), VoteByDatagram),
        NurseryUnixStreamServer(path, show),
    ]
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            for server in servers:
                address = await nursery.start(serve, server)
                print(f"{type(server).__name__} {address!r}", flush=True)
            await anext(signals)
            for server in servers:
                nursery.start_soon(server.server_close)


if __name__ == "__main__":
    port, path = [*sys.argv[1:], *["9999", "/tmp/votes"][len(sys.argv) - 1 :]]
    trio.run(main, int(port), path)
