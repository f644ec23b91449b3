r"""A whole ``ThreadingHTTPServer`` in a nursery, with another task, ended by cancellation.

    python examples/whole_server.py [PORT] [SECONDS]

It serves for so many seconds (without them, until Ctrl-C), and reports meanwhile. Try it:

    python -c "from urllib.request import urlopen; \
        print(urlopen('http://127.0.0.1:9999/').read())"

The server object and its handler are those of the standard library. Left to itself it would
poll twice a second, need a thread to be shut down from, and leave the threads of silent
clients behind. Here the end of the scope ends all of that, whatever the clients do.
"""

from __future__ import annotations

import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import trio

from trio_socketserver import serve_blocking

PERIOD = 10  # Seconds between two reports.


class Counter(BaseHTTPRequestHandler):
    server: CountingServer

    def do_GET(self) -> None:
        # From one of many threads into trio's, so the counter needs no lock.
        number = trio.from_thread.run_sync(self.server.count)
        body = f"you are number {number}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class CountingServer(ThreadingHTTPServer):
    counted = 0

    def count(self) -> int:
        self.counted += 1
        return self.counted


async def report(server: CountingServer) -> None:
    while True:
        await trio.sleep(PERIOD)
        print(f"{server.counted} requests so far", flush=True)


async def main(port: int, seconds: float) -> None:
    server = CountingServer(("127.0.0.1", port), Counter)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        with trio.move_on_after(seconds):
            async with trio.open_nursery() as nursery:
                host, number = await nursery.start(serve_blocking, server)
                print(f"counting on {host}:{number}", flush=True)
                nursery.start_soon(report, server)
                await anext(signals)
                nursery.cancel_scope.cancel()
    print(f"{server.counted} requests served")


if __name__ == "__main__":
    port, seconds = [*sys.argv[1:], *["9999", "inf"][len(sys.argv) - 1 :]]
    trio.run(main, int(port), float(seconds))
