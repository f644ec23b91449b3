r"""An echo served by several processes: each line comes back with who has answered it.

    python examples/preforked_echo.py [PORT] [WORKERS]

Try it from another terminal, with as many of them as you like:

    python -c "from socket import *; s = create_connection(('127.0.0.1', 9999)); \
        s.send(b'hello\n'); print(s.recv(99))"

``PreforkingMixIn`` stands in front of the server that it multiplies. The workers share one
listening socket. Kill one of them, and it is replaced. SIGTERM or Ctrl-C ends them all:
idle clients are sent away at once, the others get their answer first.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from trio_socketserver import NurseryTCPServer, PreforkingMixIn, StreamRequestHandler, run


class Echo(StreamRequestHandler):
    """One client. It stays with the worker that has accepted it."""

    timeout = 60

    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(b"%d: %b" % (self.server.pid, line))


class EchoServer(PreforkingMixIn, NurseryTCPServer):
    pid = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A worker's copy is made by this. ``__init__`` ran once, in the program.
        super().__setstate__(state)
        self.pid = os.getpid()


# A worker runs this module too, under another name, for the sake of the classes.
if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9999
    server = EchoServer(("127.0.0.1", port), Echo)
    if len(sys.argv) > 2:
        server.workers = int(sys.argv[2])
    host, port = server.server_address
    run(server, started=lambda: print(f"echoing on {host}:{port}", flush=True))
    print(f"{server.statistics().accepted} clients served")
