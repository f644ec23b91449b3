"""Holds `serve_blocking` to datagrams, to errors, and to threads that are not its own.

The numbers are those of the findings about servers in the wild.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import socketserver
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import (
    PARKED,
    PROMPTLY,
    ask_stream,
    client_of,
    each_dispatcher,
    each_in_process,
    echo,
    ends,
    forks_with_threads,
    given_back,
    happens,
    in_thread,
    make,
    no_impatience,
    park,
    parked_client,
    served,
    wait_for,
)
from helpers import (
    REAL_LIMIT,
    bind_address,
    bounded,
    close_with_reset,
    datagram_client,
    receive,
    receive_to_end,
)

from trio_socketserver import serve_blocking

__all__ = ["no_impatience"]  # A fixture.

pytestmark = forks_with_threads

each_datagram = pytest.mark.parametrize(
    "base",
    [socketserver.UDPServer, socketserver.UnixDatagramServer],
    ids=["udp", "unix"],
)


class Threading(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """So that what is built on it overrides something of somebody else's."""


# -- 19: datagrams -------------------------------------------------------------------------


def reply_blockingly(request: Any, client_address: Any, server: Any) -> None:
    """Handle a datagram by saying what the socket is like."""
    _, replies = request
    seen = (os.get_blocking(replies.fileno()), replies.gettimeout(), type(replies))
    replies.sendto(repr(seen).encode(), client_address)


@each_datagram
@each_dispatcher
@bounded
async def test_19_the_socket_for_replies_is_a_blocking_one(
    mixin: type, base: type, tmp_path: Path
) -> None:
    server = make(reply_blockingly, mixin, base, address=bind_address(base, tmp_path))
    expected = repr((True, None, socket.socket)).encode()
    async with served(server):
        with datagram_client(server, tmp_path) as client:
            for _ in range(3):
                client.send(b"?")
                assert await receive(client) == expected
        assert server.socket.gettimeout() is None
        assert os.get_blocking(server.socket.fileno())


@each_in_process
@bounded
async def test_19_a_reply_waits_for_a_client_that_does_not_read(
    mixin: type, tmp_path: Path
) -> None:
    """Its queue takes some ten datagrams, and the next one blocks."""
    count = 100
    begun = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        begun.set()
        for number in range(count):
            request[1].sendto(b"%d" % number, client_address)

    base = socketserver.UnixDatagramServer
    server = make(handler, mixin, base, address=bind_address(base, tmp_path))
    async with served(server):
        with datagram_client(server, tmp_path) as client:
            client.send(b"?")
            await happens(begun)
            await trio.sleep(0.05)  # For the queue to be full, whoever is slow.
            replies = [await receive(client) for _ in range(count)]
    assert replies == [b"%d" % number for number in range(count)]


@each_datagram
@each_dispatcher
@bounded
async def test_19_a_burst_of_datagrams_is_answered(
    mixin: type, base: type, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request[1].sendto(request[0], client_address)

    server = make(handler, mixin, base, address=bind_address(base, tmp_path))
    questions = {b"%d" % number for number in range(8)} | {b""}
    async with served(server):
        with datagram_client(server, tmp_path) as client:
            for question in questions:
                client.send(question)
            answers = [await receive(client) for _ in questions]
    assert len(answers) == len(questions)
    assert set(answers) == questions


@each_datagram
@each_dispatcher
@bounded
async def test_19_a_server_of_datagrams_stops_while_nothing_comes(
    mixin: type, base: type, tmp_path: Path
) -> None:
    def serve_forever(self: Any, poll_interval: float = 0.5) -> None:
        socketserver.TCPServer.serve_forever(self, poll_interval)

    for end in ("stop", "shut_down"):
        server = make(reply_blockingly, mixin, base, address=bind_address(base, tmp_path))
        async with served(server) as serving:
            with trio.fail_after(PROMPTLY):
                await getattr(serving, end)()


@bounded
async def test_19_a_datagram_that_others_have_taken_does_not_keep_the_server() -> None:
    """Nor one whose checksum is wrong, which Linux finds when it is received only."""
    reached = threading.Event()
    threads = []

    class Server(socketserver.UDPServer):
        def get_request(self) -> Any:
            self.socket.recv(100)
            threads.append(threading.current_thread())
            reached.set()
            return super().get_request()

    server = make(reply_blockingly, Server)
    # The duplicate keeps the address, so that there is somebody to send to.
    with datagram_client(server) as client, server.socket.dup():
        async with served(server) as serving:
            client.send(b"lost")
            await happens(reached)
            with trio.move_on_after(PROMPTLY):
                await serving.stop()
            in_time = serving.ended.is_set()
            client.send(b"for the thread, should it still wait")
            await serving.ended.wait()
        await ends(*threads)
        assert in_time


@bounded
async def test_19_others_that_have_the_socket_go_on_receiving() -> None:
    server = make(reply_blockingly, socketserver.UDPServer)
    with server.socket.dup() as others, datagram_client(server) as client:
        async with served(server):
            client.send(b"?")
            assert await receive(client)
        client.send(b"still there?")
        others.settimeout(REAL_LIMIT)
        assert others.recv(100) == b"still there?"


# -- 20: errors ----------------------------------------------------------------------------


class Reporting:
    """A mix-in: sends what handle_error gets to its client."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        request.sendall(repr(sys.exception()).encode())


def fail(*args: Any) -> Any:
    """Fail, as a handler or as a hook."""
    raise LookupError("mine")


@each_dispatcher
@bounded
async def test_20_what_a_handler_raises_is_given_to_handle_error(mixin: type) -> None:
    server = make(fail, Reporting, mixin)
    async with served(server):
        for _ in range(2):
            assert await ask_stream(server) == b"LookupError('mine')"


@each_in_process
@bounded
async def test_20_what_process_request_raises_is_given_to_handle_error(mixin: type) -> None:
    server = make(echo, Reporting, mixin, process_request=fail)
    async with served(server):
        for _ in range(2):
            assert await ask_stream(server) == b"LookupError('mine')"


@each_dispatcher
@bounded
async def test_20_what_verify_request_raises_is_given_to_handle_error(mixin: type) -> None:
    """socketserver lets it end the server."""
    server = make(echo, Reporting, mixin, verify_request=fail)
    async with served(server):
        for _ in range(2):
            assert await ask_stream(server) == b"LookupError('mine')"


@each_dispatcher
@bounded
async def test_20_what_verify_request_refuses_is_closed(mixin: type) -> None:
    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        return client_address[1] != refused.getsockname()[1]

    server = make(park, mixin, verify_request=verify_request)
    with socket.socket() as refused:
        refused.bind(("127.0.0.1", 0))
        async with served(server):
            await in_thread(refused.connect, server.server_address)
            assert await receive(refused) == b""
            async with parked_client(server):
                pass


@each_dispatcher
@bounded
async def test_20_handle_error_may_fail(
    mixin: type, caplog: pytest.LogCaptureFixture
) -> None:
    server = make(
        lambda request, *_: request.sendall(b"bad") or fail(), mixin, handle_error=fail
    )
    async with served(server):
        for _ in range(2):
            assert await ask_stream(server) == b"bad"
    if mixin is not socketserver.ForkingMixIn:  # Its children keep what they log.
        logged = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert {record.name for record in logged} == {"trio_socketserver"}
        assert len(logged) == 2


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
@each_dispatcher
@bounded
async def test_20_what_is_no_exception_ends_the_request_and_is_logged(
    mixin: type, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    reported = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(b"bye")
        raise error(3)

    server = make(handler, mixin, handle_error=lambda *args: reported.append(args))
    async with served(server) as serving:
        for _ in range(2):
            assert await ask_stream(server) == b"bye"
        assert not serving.ended.is_set()
    assert reported == []
    if mixin is not socketserver.ForkingMixIn:
        assert [record.name for record in caplog.records] == ["trio_socketserver"] * 2
        for record in caplog.records:
            assert error.__name__ in record.getMessage() + caplog.text


@pytest.mark.parametrize("hook", ["shutdown_request", "close_request"])
@each_in_process
@bounded
async def test_20_closing_a_request_may_fail(
    mixin: type, hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    def closing(self: Any, request: Any) -> None:
        getattr(super(Server, self), hook)(request)
        raise LookupError("while closing")

    Server = type("Server", (mixin, socketserver.TCPServer), {hook: closing})  # noqa: N806
    server = make(echo, Server, handle_error=lambda *args: None)
    async with served(server):
        for _ in range(2):
            assert await ask_stream(server, b"hello") == b"hello"


@bounded
async def test_20_an_oserror_of_get_request_is_one_connection_s() -> None:
    class Server(Threading):
        failures = 2

        def get_request(self) -> Any:
            request, address = super().get_request()
            if self.failures:
                self.failures -= 1
                request.close()
                raise ConnectionAbortedError("mine")
            return request, address

    server = make(echo, Server)
    async with served(server, changes=["failures"]):
        assert await ask_stream(server) == b""
        assert await ask_stream(server) == b""
        assert await ask_stream(server, b"hello") == b"hello"


@bounded
async def test_20_another_error_of_get_request_is_the_server_s() -> None:
    server = make(echo, Threading, get_request=fail)
    with given_back(server):
        # Connected before it serves: what closes a listener resets who is connecting.
        async with client_of(server) as client:
            with pytest.raises(LookupError, match="mine"):
                await serve_blocking(server)
            await receive_to_end(client)


@each_in_process
@bounded
async def test_20_a_client_that_has_gone_already_costs_nothing(mixin: type) -> None:
    server = make(echo, mixin, handle_error=lambda *args: None)
    async with served(server):
        for _ in range(3):
            async with client_of(server) as client:
                close_with_reset(client)
        assert await ask_stream(server, b"hello") == b"hello"


@bounded
async def test_a_server_need_not_be_hashable() -> None:
    server = make(echo, Threading, __eq__=lambda self, other: True)
    with pytest.raises(TypeError, match="unhashable"):
        hash(server)
    async with served(server):
        assert await ask_stream(server, b"hello") == b"hello"


@bounded
async def test_a_class_that_cannot_be_derived_from_is_left_as_it_was() -> None:
    class Final(type):
        def __new__(cls, name: str, bases: tuple[type, ...], namespace: Any) -> Any:
            if any(isinstance(base, Final) for base in bases):
                raise TypeError("final")
            return super().__new__(cls, name, bases, namespace)

    class Server(socketserver.TCPServer, metaclass=Final):
        pass

    with Server(("127.0.0.1", 0), echo) as server:
        before = dict(vars(server))
        with pytest.raises(TypeError, match="final"):
            await serve_blocking(server)
        assert vars(server) == before


# -- 21: threads that are not ours ---------------------------------------------------------


class Pool(socketserver.TCPServer):
    """Handles requests in threads that nobody else knows of."""

    def process_request(self, request: Any, client_address: Any) -> None:
        self.pool.submit(self.handle_there, request, client_address)  # type: ignore[attr-defined]

    def handle_there(self, request: Any, client_address: Any) -> None:
        self.finish_request(request, client_address)
        self.shutdown_request(request)


@each_in_process
@bounded
async def test_21_cancellation_wakes_threads_that_a_program_has_started(
    mixin: type,
) -> None:
    with ThreadPoolExecutor(3) as pool:
        server = make(park, Pool, mixin, pool=pool)
        async with served(server) as serving, contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                client = await stack.enter_async_context(parked_client(server))
            await serving.stop()
            assert await receive(client) == b""
            await in_thread(pool.shutdown)


@bounded
async def test_21_such_threads_are_not_waited_for() -> None:
    go_on = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        wait_for(go_on)

    with ThreadPoolExecutor(1) as pool:
        try:
            server = make(handler, Pool, pool=pool)
            async with served(server) as serving, parked_client(server) as client:
                with trio.fail_after(PROMPTLY):
                    await serving.stop()
                assert await receive(client) == b""
        finally:
            go_on.set()


@bounded
async def test_21_a_connection_closed_by_such_a_thread_is_closed() -> None:
    """Though nothing of the server's is called."""
    handed_on = queue.SimpleQueue[Any]()

    class Server(socketserver.TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            handed_on.put(request)

    server = make(None, Server)
    async with served(server), client_of(server) as client:
        request = await in_thread(handed_on.get, True, REAL_LIMIT)
        request.sendall(b"bye")
        request.close()
        with trio.fail_after(PROMPTLY):
            assert await receive_to_end(client) == b"bye"


@bounded
async def test_21_what_such_a_thread_opened_itself_is_its_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        connected = threading.Event()

        def tunnel() -> None:
            with socket.create_connection(elsewhere.getsockname()) as sock:
                connected.set()
                sock.settimeout(REAL_LIMIT)
                assert sock.recv(100) == b"go"

        thread = threading.Thread(target=tunnel)
        server = make(lambda *args: thread.start(), Threading)
        async with served(server) as serving:
            assert await ask_stream(server) == b""
            await happens(connected)
            await serving.stop()
            assert thread.is_alive()
        with elsewhere.accept()[0] as peer:
            peer.sendall(b"go")
            await in_thread(thread.join, REAL_LIMIT)
        assert not thread.is_alive()
