"""An echo server: each client gets its lines back, many clients at a time.

    python examples/echo_server.py [PORT]

Try it from another terminal, with as many of them as you like:

    python -c "from socket import *; s = create_connection(('127.0.0.1', 9999)); \
        s.send(b'hello\\n'); print(s.recv(99))"

Ctrl-C ends it: idle clients are sent away at once, the others get their answer first.
"""

from __future__ import annotations

import sys

from trio_socketserver import NurseryTCPServer, StreamRequestHandler, run


class Echo(StreamRequestHandler):
    """One client. It is dismissed after a minute of silence."""

    timeout = 60

    async def handle(self) -> None:
        # Asking for the next line by iteration is what makes a waiting client "idle".
        async for line in self.rfile:
            await self.wfile.write(line)


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9999
    server = NurseryTCPServer(("127.0.0.1", port), Echo)
    host, port = server.server_address
    run(server, started=lambda: print(f"echoing on {host}:{port}", flush=True))
    print(f"{server.statistics().accepted} clients served")


if __name__ == "__main__":
    main()
