r"""One replica: it answers each line with its process id and the line.

    python examples/rolling_restart/service.py HOST PORT

restart.py starts two of them. SIGTERM drains: what has connected is served, busy clients
are told to go on elsewhere, and the program ends when they have gone.

A server that just closes idle connections cannot know whether a request is on its way. So
this one says ``bye`` first, and closes when the client has: what crosses the ``bye`` is
still answered, after it.
"""

from __future__ import annotations

import os
import sys

import trio

from trio_socketserver import NurseryTCPServer, StreamRequestHandler, run

WORK = 0.02
"""Seconds that a request takes, so that some are under way at any time."""

LAST_WORD = 10
"""Seconds that a client has, after ``bye``, to send a line or to leave."""


class Session(StreamRequestHandler):
    timeout = 60

    async def handle(self) -> None:
        async for line in self.rfile:
            await self.answer(line)
        if self.server.draining.is_set():
            await self.wfile.write(b"bye\n")
            self.request.settimeout(LAST_WORD)
            # Other than iteration, readline() goes on while the server drains.
            while line := await self.rfile.readline():
                await self.answer(line)

    async def answer(self, line: bytes) -> None:
        await trio.sleep(WORK)
        await self.wfile.write(b"%d %b" % (os.getpid(), line))


class Replica(NurseryTCPServer):
    drain_backlog = True


if __name__ == "__main__":
    server = Replica((sys.argv[1], int(sys.argv[2])), Session)
    run(server, started=lambda: print("serving", flush=True))
    print(f"{server.statistics().completed} clients served")
