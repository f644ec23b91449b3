r"""A folder over HTTP: the standard library's handler, as it is, under a server of ours.

    python examples/static_files.py [PORT] [FOLDER]

Open http://127.0.0.1:9999/ in a browser, or:

    python -c "from urllib.request import urlopen; \
        print(urlopen('http://127.0.0.1:9999/').status)"

``SimpleHTTPRequestHandler`` blocks, so each connection has a thread; the 33rd waits in the
kernel until a thread is free. Ctrl-C stops accepting and gives the downloads that run five
seconds to end. A client that keeps its connection and is silent does not hold that up for
longer: its thread is woken.
"""

from __future__ import annotations

import functools
import http.server
import sys
from typing import Any

from trio_socketserver import ThreadingTCPServer, run


class Files(http.server.SimpleHTTPRequestHandler):
    """Nothing new but HTTP/1.1, where a connection is kept for the next request."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # Seconds of silence, as for any handler of http.server's.

    def log_message(self, format: str, *args: Any) -> None:
        # As ASCII: a client's control characters are nothing for a terminal.
        print(ascii(format % args)[1:-1], flush=True)


class FileServer(ThreadingTCPServer):
    max_threads = 32
    graceful_timeout = 5


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9999
    folder = sys.argv[2] if len(sys.argv) > 2 else "."
    # Anything that makes a handler is one: a partial is looked through.
    server = FileServer(("127.0.0.1", port), functools.partial(Files, directory=folder))
    address = "{}:{}".format(*server.server_address)
    run(server, started=lambda: print(f"serving files on {address}", flush=True))
    print(f"{server.statistics().accepted} connections served")


if __name__ == "__main__":
    main()
