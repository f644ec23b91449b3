r"""A service that knows its clients by their certificates, and serves some of them.

    python examples/client_certificates.py CA CERT KEY PORT [NAME ...]

CA vouches for the clients, CERT and KEY are the server's; clients of these NAMEs may come
in. Make an authority, and what it vouches for (OpenSSL 3):

    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=authority \
        -addext keyUsage=critical,keyCertSign -keyout ca.key -out ca.pem
    for name in localhost ann bob; do openssl req -x509 -newkey rsa:2048 -nodes \
        -subj /CN=$name -addext basicConstraints=critical,CA:FALSE \
        -CA ca.pem -CAkey ca.key -keyout $name.key -out $name.pem; done

Be ann, then bob, then a client without -cert and -key, of a server that knows ann:

    python examples/client_certificates.py ca.pem localhost.pem localhost.key 9999 ann &
    openssl s_client -quiet -connect 127.0.0.1:9999 -cert ann.pem -key ann.key
"""

from __future__ import annotations

import logging
import ssl
import sys
from typing import Any

from trio_socketserver import NurseryTCPServer, StreamRequestHandler, run


def common_name(certificate: dict[str, Any]) -> str:
    """Return whose certificate it is. PostgreSQL and Kubernetes go by this name too."""
    attributes = [attribute for part in certificate["subject"] for attribute in part]
    return next((value for kind, value in attributes if kind == "commonName"), "")


class ClubServer(NurseryTCPServer):
    ssl_handshake_timeout = 10
    members: frozenset[str] = frozenset()
    turned_away = 0

    def verify_member(self, name: str) -> bool:
        """Decide by the name, which verify_request() does not know yet."""
        return name in self.members


class Club(StreamRequestHandler):
    """Only reached after the handshake, which needs a certificate of our authority's."""

    server: ClubServer
    timeout = 60

    async def handle(self) -> None:
        name = common_name(self.request.getpeercert())
        if not self.server.verify_member(name):
            self.server.turned_away += 1
            await self.wfile.write(f"you may not come in, {name}\n".encode())
            return
        await self.wfile.write(f"welcome, {name}\n".encode())
        async for line in self.rfile:
            await self.wfile.write(name.encode() + b": " + line)


def make_context(ca: str, cert: str, key: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.load_cert_chain(cert, key)
    context.verify_mode = ssl.CERT_REQUIRED  # By default nobody is asked for one.
    return context


if __name__ == "__main__":
    # A client that the handshake refuses is one line, of level INFO.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    context = make_context(*sys.argv[1:4])
    server = ClubServer(("127.0.0.1", int(sys.argv[4])), Club, ssl_context=context)
    server.members = frozenset(sys.argv[5:])
    address = "{}:{}".format(*server.server_address)
    run(server, started=lambda: print(f"listening on {address}", flush=True))
    print(f"{server.statistics().completed} known, {server.turned_away} turned away")
