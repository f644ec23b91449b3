"""What the tests of TLS share: an authority, contexts of both sides, and plain peers."""

from __future__ import annotations

import contextlib
import math
import socketserver
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trustme
from blocking_servers import in_thread
from helpers import REAL_LIMIT, class_name, connect, connected

from trio_socketserver import (
    ForkingTCPServer,
    NurseryTCPServer,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
)
from trio_socketserver._tls import TLSSocket

HOST = "127.0.0.1"
AUTHORITY = trustme.CA()
CERTIFICATE = AUTHORITY.issue_cert(HOST, "one.example", "two.example")
STRANGERS = trustme.CA()
"""An authority that nobody trusts."""

VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}

each_version = pytest.mark.parametrize("version", VERSIONS.values(), ids=VERSIONS)


def server_context(certificate: trustme.LeafCert = CERTIFICATE) -> ssl.SSLContext:
    """Return a context of a server's, whose SNI callback tells the handler the name."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)

    def note(ssl_object: Any, name: str | None, context: ssl.SSLContext) -> None:
        ssl_object.sni = name

    context.sni_callback = note
    return context


def client_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


def tls_connect(
    address: Any, context: ssl.SSLContext | None = None, name: str = HOST
) -> ssl.SSLSocket:
    """Return a plain blocking client that has shaken hands.

    It takes an end without close_notify for an error, unlike what `ssl` does by itself.
    """
    sock = (context or client_context()).wrap_socket(
        connect(address), server_hostname=name, suppress_ragged_eofs=False
    )
    sock.settimeout(REAL_LIMIT)
    return sock


def receive_rest(sock: ssl.SSLSocket) -> bytes:
    """Receive up to close_notify, which must come."""
    received = b""
    while chunk := sock.recv(65536):
        received += chunk
    return received


async def ask(server: Any, *words: bytes, context: ssl.SSLContext | None = None) -> bytes:
    """Be a whole client in a thread: say each word, and return all up to close_notify."""

    def client() -> bytes:
        with tls_connect(server.server_address, context) as sock:
            for word in words:
                sock.sendall(word)
            return receive_rest(sock)

    answer: bytes = await in_thread(client)
    return answer


# -- handlers of both colours, and who runs them -------------------------------------------


class AsyncEcho(StreamRequestHandler):
    """Send each line back, to the line ``bye``."""

    async def handle(self) -> None:
        while line := await self.rfile.readline():
            await self.wfile.write(line)
            if line == b"bye\n":
                return


class BlockingEcho(socketserver.StreamRequestHandler):
    """Send each line back, to the line ``bye``."""

    def handle(self) -> None:
        while line := self.rfile.readline():
            self.wfile.write(line)
            if line == b"bye\n":
                return


FACTS = (
    "version",
    "selected_alpn_protocol",
    "cipher",
    "compression",
    "getpeercert",
    "sni",
    "server_side",
    "session_reused",
    "pending",
)


def facts_of(request: Any) -> bytes:
    """Tell what a handler of either colour can read of its request."""
    facts = {name: getattr(request, name) for name in FACTS}
    return repr(
        {name: fact() if callable(fact) else fact for name, fact in facts.items()}
    ).encode()


class AsyncFacts(StreamRequestHandler):
    async def handle(self) -> None:
        await self.wfile.write(facts_of(self.request))


class BlockingFacts(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(facts_of(self.request))


PLACES = {
    "plain": (TCPServer, AsyncEcho, AsyncFacts),
    "plain-blocking": (TCPServer, BlockingEcho, BlockingFacts),
    "nursery": (NurseryTCPServer, AsyncEcho, AsyncFacts),
    "threading-async": (ThreadingTCPServer, AsyncEcho, AsyncFacts),
    "threading": (ThreadingTCPServer, BlockingEcho, BlockingFacts),
    "forking-async": (ForkingTCPServer, AsyncEcho, AsyncFacts),
    "forking": (ForkingTCPServer, BlockingEcho, BlockingFacts),
}
"""A server class, and handlers of one colour, that it runs."""


def each_place(*without: str) -> Any:
    """Run a test for each place but some; it takes ``place``."""
    places = {name: place for name, place in PLACES.items() if name not in without}
    return pytest.mark.parametrize("place", places.values(), ids=places)


each_async_server = pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, ThreadingTCPServer], ids=class_name
)


# -- programs ------------------------------------------------------------------------------

AT_A_LINE = ("sh", "-c", 'read _ && exec "$@"', "sh")
"""In front of a command: it begins when it is given a line.

That is when `subprocess` has started it. A child that is forked for it before would have
a copy of the pipe that `subprocess` waits for, and both would wait for ever.
"""


# -- two ends of one connection ------------------------------------------------------------


class ClientSide(TLSSocket):
    """The other end, made of the same machine."""

    __slots__ = ()

    def _engine(self) -> ssl.SSLObject:
        if self._object is None:
            self._object = self._context.wrap_bio(
                self._incoming, self._outgoing, server_hostname=HOST
            )
        return self._object

    async def _shake_hands(self) -> None:
        await super()._shake_hands()
        # What a server holds back is the client's last word.
        self._unsent += self._tickets
        self._tickets = b""
        await self._flush()


@contextlib.contextmanager
def two_ends(
    version: ssl.TLSVersion | None = None,
    *,
    kind: str = "tcp",
    small_buffers: bool = False,
) -> Iterator[tuple[TLSSocket, ClientSide]]:
    """Yield the two ends of a connection, which have not shaken hands."""
    with connected(kind, small_buffers=small_buffers) as (theirs, ours):
        client = ClientSide.secured(theirs, client_context(version), math.inf, 5.0)
        server = TLSSocket.secured(ours, server_context(), math.inf, 5.0)
        yield server, client


async def both(server: TLSSocket, client: TLSSocket) -> None:
    """Have both ends shake hands."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.do_handshake)
        nursery.start_soon(client.do_handshake)
