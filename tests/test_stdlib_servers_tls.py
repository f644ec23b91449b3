"""Holds `serve_blocking` to old servers that speak TLS: point 15 of the findings.

Their handshakes wait for the client inside ``accept()``, ``get_request()`` or the handler.
"""

from __future__ import annotations

import contextlib
import socketserver
import ssl
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trustme
from blocking_servers import (
    PARKED,
    PROMPTLY,
    client_of,
    each_dispatcher,
    each_in_process,
    echo,
    ends,
    forks_with_threads,
    happens,
    in_thread,
    make,
    no_impatience,
    park,
    served,
)
from helpers import bounded, connect, receive_until_closed

__all__ = ["no_impatience"]  # A fixture.

pytestmark = forks_with_threads

HOST = "127.0.0.1"
AUTHORITY = trustme.CA()


def server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert(HOST).configure_cert(context)
    return context


def tls_connect(address: Any) -> ssl.SSLSocket:
    """Return a plain blocking client that has shaken hands and trusts the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    return context.wrap_socket(connect(address), server_hostname=HOST)


async def ask(server: Any, question: bytes) -> bytes:
    """Be a whole client in a thread: shake hands, send, and receive one answer."""

    def client() -> bytes:
        with tls_connect(server.server_address) as sock:
            sock.sendall(question)
            return sock.recv(1000)

    return await in_thread(client)


@contextlib.asynccontextmanager
async def parked_tls_client(server: Any) -> AsyncIterator[ssl.SSLSocket]:
    """Yield a client whose handler has sent `PARKED` and waits."""
    with await in_thread(tls_connect, server.server_address) as client:
        assert await in_thread(client.recv, len(PARKED)) == PARKED
        yield client


def wrapped_listener(handler: Any, *bases: type, **attributes: Any) -> Any:
    """Return a server as the documentation of `ssl` and of http.server make it."""
    server = make(handler, *bases, **attributes)
    server.socket = server_context().wrap_socket(server.socket, server_side=True)
    return server


def silent_errors(self: Any, request: Any, client_address: Any) -> None:
    """Take the place of handle_error."""


# -- a wrapped listener --------------------------------------------------------------------


@each_dispatcher
@bounded
async def test_15_a_wrapped_listener_serves(mixin: type) -> None:
    server = wrapped_listener(echo, mixin)
    async with served(server):
        assert await ask(server, b"one") == b"one"
        assert await ask(server, b"two") == b"two"


@pytest.mark.parametrize("at_once", [True, False])
@each_in_process
@bounded
async def test_15_a_wrapped_listener_is_given_back_as_it_was(
    mixin: type, at_once: bool
) -> None:
    server = wrapped_listener(echo, mixin)
    server.socket.do_handshake_on_connect = at_once
    listener = server.socket
    async with served(server):
        assert await ask(server, b"hello") == b"hello"
    assert server.socket is listener
    assert listener.do_handshake_on_connect is at_once


@bounded
async def test_15_a_mute_client_keeps_nobody_waiting() -> None:
    server = wrapped_listener(echo, socketserver.ThreadingMixIn)
    async with served(server), client_of(server), client_of(server):
        with trio.fail_after(PROMPTLY):
            assert await ask(server, b"hello") == b"hello"


@each_dispatcher
@bounded
async def test_15_cancellation_does_not_wait_for_a_mute_client(mixin: type) -> None:
    server = wrapped_listener(echo, mixin, handle_error=silent_errors)
    async with served(server) as serving, client_of(server), client_of(server):
        if mixin is socketserver.ThreadingMixIn:
            assert await ask(server, b"hello") == b"hello"  # So they have been accepted.
        with trio.fail_after(PROMPTLY):
            await serving.stop()


@each_dispatcher
@bounded
async def test_15_a_handler_that_waits_over_tls_is_woken(mixin: type) -> None:
    server = wrapped_listener(park, mixin)
    async with served(server) as serving, parked_tls_client(server) as client:
        with trio.fail_after(PROMPTLY):
            await serving.stop()
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert await in_thread(client.recv, 1) == b""


@each_in_process
@bounded
async def test_15_who_looks_at_the_connection_first_finds_it_secured(mixin: type) -> None:
    """Whenever the handshake is: a handler need not read to know who is there."""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        assert request.getpeercert() is None  # Before the handshake, a ValueError.
        request.sendall(str(request.version()).encode())

    server = wrapped_listener(handler, mixin)
    async with served(server):
        assert await ask(server, b"?") == b"TLSv1.3"


@each_in_process
@bounded
async def test_15_who_speaks_no_tls_costs_the_server_nothing(mixin: type) -> None:
    server = wrapped_listener(echo, mixin, handle_error=silent_errors)
    async with served(server):
        async with client_of(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            with trio.fail_after(PROMPTLY):
                await in_thread(receive_until_closed, client)  # An alert, perhaps.
        assert await ask(server, b"hello") == b"hello"


# -- a handshake in get_request() ----------------------------------------------------------


class ShakingHands(socketserver.TCPServer):
    """Secures a connection when it is accepted."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.context = server_context()
        self.accepted = threading.Event()
        self.threads: list[threading.Thread] = []

    def get_request(self) -> Any:
        connection, address = super().get_request()
        self.threads.append(threading.current_thread())
        self.accepted.set()
        return self.context.wrap_socket(connection, server_side=True), address


@each_dispatcher
@bounded
async def test_15_get_request_may_shake_hands(mixin: type) -> None:
    server = make(echo, mixin, ShakingHands)
    async with served(server):
        assert await ask(server, b"one") == b"one"
        assert await ask(server, b"two") == b"two"


@each_dispatcher
@bounded
async def test_15_a_handler_after_get_request_s_handshake_is_woken(mixin: type) -> None:
    server = make(park, mixin, ShakingHands)
    async with served(server) as serving, parked_tls_client(server):
        with trio.fail_after(PROMPTLY):
            await serving.stop()


@each_in_process
@bounded
async def test_15_cancellation_leaves_get_request_s_handshake_alone(mixin: type) -> None:
    server = make(echo, mixin, ShakingHands)
    async with client_of(server), served(server) as serving:
        await happens(server.accepted)
        with trio.fail_after(PROMPTLY):
            await serving.stop()
    await ends(*server.threads)  # At the latest when the client has gone.


@each_in_process
@bounded
async def test_15_a_handshake_that_fails_in_get_request_is_the_client_s(
    mixin: type,
) -> None:
    server = make(echo, mixin, ShakingHands)
    async with served(server):
        async with client_of(server) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            await in_thread(receive_until_closed, client)
        assert await ask(server, b"hello") == b"hello"


# -- a handshake in the handler ------------------------------------------------------------


class Securing(socketserver.BaseRequestHandler):
    """Secures its connection itself, which detaches the socket that the server knows."""

    def setup(self) -> None:
        self.server.begun.set()  # type: ignore[attr-defined]
        self.request = self.server.context.wrap_socket(  # type: ignore[attr-defined]
            self.request, server_side=True
        )

    def handle(self) -> None:
        park(self.request, self.client_address, self.server)

    def finish(self) -> None:
        self.request.close()


def securing_server(mixin: type) -> Any:
    server = make(Securing, mixin, handle_error=silent_errors)
    server.context = server_context()
    server.begun = threading.Event()
    return server


@each_dispatcher
@bounded
async def test_15_a_handler_that_has_secured_its_connection_is_woken(mixin: type) -> None:
    server = securing_server(mixin)
    async with served(server) as serving, parked_tls_client(server):
        with trio.fail_after(PROMPTLY):
            await serving.stop()


@each_in_process
@bounded
async def test_15_a_handler_that_shakes_hands_is_woken(mixin: type) -> None:
    server = securing_server(mixin)
    async with served(server) as serving, client_of(server):
        await happens(server.begun)
        with trio.fail_after(PROMPTLY):
            await serving.stop()


# -- a handshake in finish_request() -------------------------------------------------------


@bounded
async def test_15_finish_request_may_shake_hands_while_others_are_mute() -> None:
    class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
        def finish_request(self, request: Any, client_address: Any) -> None:
            with self.context.wrap_socket(request, server_side=True) as secured:
                self.RequestHandlerClass(secured, client_address, self)

    server = make(echo, Server, context=server_context(), handle_error=silent_errors)
    async with served(server) as serving, client_of(server), client_of(server):
        assert await ask(server, b"hello") == b"hello"
        with trio.fail_after(PROMPTLY):
            await serving.stop()
