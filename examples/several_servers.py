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
    DatagramRequestHandler,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    StreamSocket,
)

MAX_CHOICES, MAX_LENGTH = 1000, 100  # Who votes cannot take all the memory.
votes: Counter[str] = Counter()


def vote(line: bytes) -> None:
    choice = line[:MAX_LENGTH].decode(errors="replace").strip()
    if choice in votes or len(votes) < MAX_CHOICES:
        votes[choice] += 1


class VoteByLine(StreamRequestHandler):
    timeout = 60

    async def handle(self) -> None:
        async for line in self.rfile:
            vote(line)
            await self.wfile.write(b"thank you\n")


class VoteByDatagram(DatagramRequestHandler):
    async def handle(self) -> None:
        vote(self.packet)
        self.wfile.write(b"thank you\n")


async def show(request: StreamSocket, client_address: Any, server: Any) -> None:
    """Answer at once. (A function is a handler too.)"""
    lines = [f"{n} {choice}\n" for choice, n in votes.most_common()]
    await request.send_all("".join(lines).encode())


async def main(port: str = "9999", path: str = "/tmp/votes") -> None:
    by_line = NurseryTCPServer(("127.0.0.1", int(port)), VoteByLine)
    by_datagram = NurseryUDPServer(("127.0.0.1", int(port)), VoteByDatagram)
    result = NurseryUnixStreamServer(path, show)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with by_line, by_datagram, result, trio.open_nursery() as nursery:
            for server in (by_line, by_datagram, result):
                server.graceful_timeout = 5  # Seconds for who does not read the answers.
                nursery.start_soon(server.serve_forever)
                print(f"{type(server).__name__} {server.server_address!r}", flush=True)
            await anext(signals)
            for server in (by_line, by_datagram, result):
                nursery.start_soon(server.server_close)


if __name__ == "__main__":
    trio.run(lambda: main(*sys.argv[1:]))
