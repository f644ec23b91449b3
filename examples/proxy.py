"""A TCP proxy: each connection is passed on to another server, bytes and ends alike.

    python examples/proxy.py UPSTREAM_HOST UPSTREAM_PORT [PORT]

Try it with a server behind it, of pages for example, and ask in another terminal:

    python -m http.server -b 127.0.0.1 8000 & python examples/proxy.py 127.0.0.1 8000
    curl http://127.0.0.1:9999/

Each direction ends by itself: whoever has said all may still be answered. But an error
in one ends both, by a reset: a stream that was cut must not look like a complete one.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections import Counter

import trio
from trio.abc import HalfCloseableStream as Stream

from trio_socketserver import BaseRequestHandler, NurseryTCPServer, RequestTimeout, run

CONNECT_TIMEOUT = 10  # Seconds.
IDLE_TIMEOUT = 3600  # Seconds in which nothing moves, either way.
RESET_ON_CLOSE = socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)


class ProxyServer(NurseryTCPServer):
    graceful_timeout = 10

    upstream: tuple[str, int]
    counted: Counter[str]


class Tunnel(BaseRequestHandler):
    async def handle(self) -> None:
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                upstream = await trio.open_tcp_stream(*self.server.upstream)
        except (OSError, trio.TooSlowError) as error:
            print(f"no upstream: {error!r}", flush=True)
            self.server.counted["unanswered"] += 1
            return
        async with upstream, self.request:
            try:
                await self.pass_on(upstream)
            except BaseException:
                for stream in (upstream, self.request):
                    stream.setsockopt(*RESET_ON_CLOSE)
                raise

    async def pass_on(self, upstream: trio.SocketStream) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        with trio.move_on_after(IDLE_TIMEOUT) as self.idle:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.pump, "bytes up", self.request, upstream)
                nursery.start_soon(self.pump, "bytes down", upstream, self.request)
        if self.idle.cancelled_caught:
            raise RequestTimeout("nothing has moved, either way")

    async def pump(self, way: str, source: Stream, sink: Stream) -> None:
        """Pass on one direction, no faster than it is read, and its end."""
        async for chunk in source:
            await sink.send_all(chunk)
            self.server.counted[way] += len(chunk)
            self.idle.deadline = trio.current_time() + IDLE_TIMEOUT
        await sink.send_eof()


if __name__ == "__main__":
    server = ProxyServer(("127.0.0.1", int([*sys.argv, "9999"][3])), Tunnel)
    server.upstream, server.counted = (sys.argv[1], int(sys.argv[2])), Counter()
    address = "{}:{}".format(*server.server_address)
    run(server, started=lambda: print(f"passing on {address}", flush=True))
    print(server.statistics(), dict(server.counted), sep="\n")
