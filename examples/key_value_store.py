"""A key-value store of lines: one store, over TLS and on a Unix socket at the same time.

    python examples/key_value_store.py CERT KEY [PORT] [SOCKET]

CERT and KEY are files with a certificate and its key: the first command makes some. Type
GET, SET, DEL and KEYS into the others; each is answered by one line, OK or ERROR.

    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -out CERT -keyout KEY
    openssl s_client -quiet -connect 127.0.0.1:9999
    socat - UNIX-CONNECT:/tmp/store
"""

from __future__ import annotations

import signal
import ssl
import sys

import trio

from trio_socketserver import (
    LineTooLong,
    NurseryTCPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
)

MAX_KEYS = 10_000  # A line has an end too, so clients cannot take all the memory.
store: dict[bytes, bytes] = {}  # It needs no lock: answer() does not await.


def answer(line: bytes) -> bytes:
    match line.strip().split(maxsplit=2):
        case [b"GET", key]:
            return b"OK " + store[key] if key in store else b"ERROR no such key"
        case [b"SET", key, value]:
            if key not in store and len(store) == MAX_KEYS:
                return b"ERROR there are too many keys"
            store[key] = value
            return b"OK"
        case [b"DEL", key]:
            return b"ERROR no such key" if store.pop(key, None) is None else b"OK"
        case [b"KEYS"]:
            return b" ".join([b"OK", *sorted(store)])
    return b"ERROR write GET key, SET key value, DEL key or KEYS"


class Session(StreamRequestHandler):
    max_line_size = 1000
    timeout = 300

    async def handle(self) -> None:
        try:
            async for line in self.rfile:
                if line.endswith(b"\n"):  # Else the client was cut off, and meant more.
                    await self.wfile.write(answer(line) + b"\n")
        except LineTooLong:
            await self.wfile.write(b"ERROR the line is too long\n")


async def main(cert: str, key: str, port: str = "9999", path: str = "/tmp/store") -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(cert, key)
    remote = NurseryTCPServer(("127.0.0.1", int(port)), Session, ssl_context=tls)
    local = NurseryUnixStreamServer(path, Session)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with remote, local, trio.open_nursery() as nursery:
            for server in (remote, local):
                server.graceful_timeout = 10
                nursery.start_soon(server.serve_forever)
                print(f"listening on {server.server_address!r}", flush=True)
            await anext(signals)
            # Both at once: idle clients are sent away, the others get their answer first.
            for server in (remote, local):
                nursery.start_soon(server.server_close)


if __name__ == "__main__":
    trio.run(lambda: main(*sys.argv[1:]))
