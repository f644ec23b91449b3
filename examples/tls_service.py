r"""TLS, with certificates of clients, and a certificate of its own that can be renewed.

    python examples/tls_service.py CERT KEY CLIENT_CA [PORT]

CERT and KEY are the server's, CLIENT_CA vouches for its clients. One file can be all of it:

    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=me -keyout KEY -out CERT \
        -addext subjectAltName=DNS:me
    python examples/tls_service.py CERT KEY CERT &
    openssl s_client -quiet -connect 127.0.0.1:9999 -cert CERT -key KEY

It says whose lines they are. SIGHUP loads a certificate that has been renewed: new clients
are shown it, nobody is interrupted. A client without one is one line in the log.
"""

from __future__ import annotations

import functools
import logging
import signal
import ssl
import sys
from collections.abc import Callable
from typing import Any

import trio

from trio_socketserver import NurseryTCPServer, StreamRequestHandler


class WhoAmI(StreamRequestHandler):
    timeout = 60

    async def handle(self) -> None:
        certificate = self.request.getpeercert()
        names = ", ".join(name for _, name in certificate.get("subjectAltName", ()))
        async for line in self.rfile:
            answer = f"{names} says {line.decode(errors='replace').strip()}\n"
            await self.wfile.write(answer.encode())


async def obey(signals: Any, server: NurseryTCPServer, load: Callable[[], Any]) -> None:
    """Load the certificate at SIGHUP; close the server at the others."""
    async for number in signals:
        if number != signal.SIGHUP:
            break
        try:
            # Not into the context in use: half of a renewal would leave that unusable.
            server.ssl_context = load()
            print("certificate loaded", flush=True)
        except OSError as error:
            print(f"certificate not loaded: {error}", flush=True)
    await server.server_close()


def make_context(cert: str, key: str, client_ca: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca)
    context.load_cert_chain(cert, key)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def main(files: list[str], port: int) -> None:
    load = functools.partial(make_context, *files)
    server = NurseryTCPServer(("127.0.0.1", port), WhoAmI, ssl_context=load())
    server.ssl_handshake_timeout = server.graceful_timeout = 10
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    with trio.open_signal_receiver(*numbers) as signals:
        async with trio.open_nursery() as nursery, server:
            nursery.start_soon(obey, signals, server, load)
            print("listening on {}:{}".format(*server.server_address), flush=True)
            await server.serve_forever()
    print(f"{server.statistics().completed} clients served")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    port = int(sys.argv[4]) if len(sys.argv) > 4 else 9999
    trio.run(main, sys.argv[1:4], port)
