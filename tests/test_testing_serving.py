"""`serving` and `serving_in_thread` serve for the length of a block, however it ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prefork_servers
import pytest
import trio
from helpers import (
    DATAGRAM_SERVERS,
    REAL_LIMIT,
    STREAM_SERVERS,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    echo_all,
    is_refused,
    receive_until_closed,
)

import trio_socketserver
from trio_socketserver import (
    ForkingTCPServer,
    NurseryTCPServer,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
)
from trio_socketserver.testing import _serving, serving, serving_in_thread

LOCAL = ("127.0.0.1", 0)
SERVERS = (*STREAM_SERVERS, *DATAGRAM_SERVERS, ThreadingTCPServer, ForkingTCPServer)


class Oops(Exception):
    """What a test raises."""


class Waiting(StreamRequestHandler):
    """Waits for ever, and notes how it ended."""

    begun: threading.Event
    ends: list[str]

    async def handle(self) -> None:
        self.begun.set()
        try:
            await trio.sleep_forever()
        except trio.Cancelled:
            self.ends.append("cancelled")
            raise

    async def finish(self) -> None:
        self.ends.append("finished")


@pytest.fixture
def waiting() -> type[Waiting]:
    return type("Fresh", (Waiting,), {"begun": threading.Event(), "ends": []})


class FailingServer(NurseryTCPServer):
    """A server that fails as soon as a request has come."""

    async def get_request(self) -> tuple[Any, Any]:
        request, _ = await super().get_request()
        request.close_now()
        raise Oops("the server")


class NeverStarting(NurseryTCPServer):
    """A server whose loop cannot begin."""

    async def serve_forever(self, *args: Any, **kwargs: Any) -> None:
        raise Oops("no loop")


def prefork_server() -> Any:
    return prefork_servers.Tasks(LOCAL, prefork_servers.evaluate)


# -- serving -------------------------------------------------------------------------------


@pytest.mark.parametrize("server_class", SERVERS, ids=class_name)
@bounded
async def test_serves_and_closes(server_class: Any, tmp_path: Path) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with serving(server) as address:
        assert address == server.server_address
        for question in (b"one", b"two"):
            assert await ask(server, question, tmp_path) == question
    assert server.fileno() == -1
    assert_sums_up(server)
    assert server.statistics().completed == 2


@bounded
async def test_serves_with_workers() -> None:
    server = prefork_server()
    async with serving(server):
        assert (await ask(server, b"6 * 7")).endswith(b"\n42")
    assert server.fileno() == -1
    assert server.statistics().completed == 1


@bounded
async def test_a_server_can_be_entered_once_at_a_time() -> None:
    async with serving(NurseryTCPServer(LOCAL, echo_all)) as address:
        server = NurseryTCPServer.from_socket(socket.create_server(LOCAL), echo_all)
        async with server:
            with pytest.raises(RuntimeError, match="entered already"):
                async with serving(server):
                    raise AssertionError("not reached")
        assert not is_refused(address)


@bounded
async def test_the_end_waits_for_requests() -> None:
    class Slow(StreamRequestHandler):
        async def handle(self) -> None:
            begun.set()
            await release.wait()
            await self.wfile.write(b"done")

    begun, release = trio.Event(), trio.Event()
    server = NurseryTCPServer(LOCAL, Slow)
    with connect(server.server_address) as client:
        async with trio.open_nursery() as nursery:
            async with serving(server):
                await begun.wait()
                draining = server.draining

                async def release_when_draining() -> None:
                    await draining.wait()
                    release.set()

                nursery.start_soon(release_when_draining)
            assert client.recv(9) == b"done"
    assert server.statistics().completed == 1


@bounded
async def test_what_the_body_raises_leaves_as_it_was(waiting: type[Waiting]) -> None:
    server = NurseryTCPServer(LOCAL, waiting)
    error = Oops("the body")

    async def fail() -> None:
        async with serving(server):
            await trio.to_thread.run_sync(waiting.begun.wait, REAL_LIMIT)
            raise error

    with connect(server.server_address), pytest.raises(Oops) as caught:
        await fail()
    assert caught.value is error
    assert error.__cause__ is None
    assert waiting.ends == ["cancelled", "finished"]
    assert server.fileno() == -1


@bounded
async def test_a_group_of_the_body_leaves_as_it_was() -> None:
    group = ExceptionGroup("the body's", [Oops()])
    with pytest.raises(ExceptionGroup) as caught:
        async with serving(NurseryTCPServer(LOCAL, echo_all)):
            raise group
    assert caught.value is group


@bounded
async def test_an_error_of_the_server_cancels_the_body_and_is_bare() -> None:
    server = FailingServer(LOCAL, echo_all)

    async def wait() -> None:
        async with serving(server) as address:
            with connect(address):
                await trio.sleep_forever()

    with pytest.raises(Oops, match="the server"):
        await wait()
    assert server.fileno() == -1


@bounded
async def test_a_server_that_cannot_begin_is_closed() -> None:
    server = NeverStarting(LOCAL, echo_all)
    with pytest.raises(Oops, match="no loop"):
        async with serving(server):
            raise AssertionError("not reached")
    assert server.fileno() == -1


@bounded
async def test_a_server_that_has_ended_leaves_the_body_alone() -> None:
    async def ending(request: Any, client_address: Any, server: Any) -> None:
        await server.shutdown()

    server = NurseryTCPServer(LOCAL, ending)
    async with serving(server):
        assert await ask(server, b"") == b""
        await trio.testing.wait_all_tasks_blocked()
    assert server.fileno() == -1


@bounded
async def test_cancellation_closes_the_server(waiting: type[Waiting]) -> None:
    server = NurseryTCPServer(LOCAL, waiting)
    with connect(server.server_address), trio.CancelScope() as scope:
        async with serving(server):
            await trio.to_thread.run_sync(waiting.begun.wait, REAL_LIMIT)
            scope.cancel()
    assert scope.cancelled_caught
    assert waiting.ends == ["cancelled", "finished"]
    assert server.fileno() == -1


# -- serving_in_thread ---------------------------------------------------------------------


def exchange(address: Any, data: bytes) -> bytes:
    with connect(address) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return receive_until_closed(client)


def in_main_thread(function: Callable[[], None]) -> None:
    function()


def in_other_thread(function: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(REAL_LIMIT)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def in_trio_task(function: Callable[[], None]) -> None:
    async def main() -> None:
        function()

    trio.run(main)


def press_ctrl_c() -> None:
    """Send the main thread a real signal, which wakes it wherever it waits."""
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGINT)


CALLERS = pytest.mark.parametrize(
    "caller", [in_main_thread, in_other_thread, in_trio_task], ids=lambda f: f.__name__
)


@CALLERS
def test_thread_serves_and_closes(caller: Any) -> None:
    server = NurseryTCPServer(LOCAL, echo_all)

    def body() -> None:
        with serving_in_thread(server) as address:
            assert address == server.server_address
            assert exchange(address, b"hello") == b"hello"
        assert is_refused(address)

    caller(body)
    assert server.statistics().completed == 1


@pytest.mark.parametrize("server_class", [TCPServer, ThreadingTCPServer], ids=class_name)
def test_thread_serves_blocking_handlers(server_class: Any) -> None:
    def upper(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(request.recv(99).upper())

    with serving_in_thread(server_class(LOCAL, upper)) as address:
        assert exchange(address, b"hello") == b"HELLO"


def test_thread_serves_with_workers() -> None:
    with serving_in_thread(prefork_server()) as address:
        assert exchange(address, b"6 * 7").endswith(b"\n42")


@CALLERS
def test_thread_what_the_body_raises_leaves_as_it_was(
    caller: Any, waiting: type[Waiting]
) -> None:
    server = NurseryTCPServer(LOCAL, waiting)
    error = Oops("the body")

    def body() -> None:
        with serving_in_thread(server) as address, connect(address):
            assert waiting.begun.wait(REAL_LIMIT)
            raise error

    with pytest.raises(Oops) as caught:
        caller(body)
    assert caught.value is error
    assert waiting.ends == ["cancelled", "finished"]
    assert server.fileno() == -1


@CALLERS
def test_thread_an_error_of_the_server_is_raised_at_the_end(caller: Any) -> None:
    server = FailingServer(LOCAL, echo_all)

    def body() -> None:
        with serving_in_thread(server) as address:
            assert exchange(address, b"") == b""

    with pytest.raises(Oops, match="the server"):
        caller(body)
    assert server.fileno() == -1


def test_thread_two_errors_leave_as_a_group() -> None:
    def fail() -> None:
        with serving_in_thread(FailingServer(LOCAL, echo_all)) as address:
            assert exchange(address, b"") == b""
            raise Oops("the body")

    with pytest.raises(ExceptionGroup) as caught:
        fail()
    assert [str(error) for error in caught.value.exceptions] == ["the body", "the server"]


def test_thread_a_server_that_cannot_begin_is_closed() -> None:
    server = NeverStarting(LOCAL, echo_all)
    with pytest.raises(Oops, match="no loop"), serving_in_thread(server):
        raise AssertionError("not reached")
    assert server.fileno() == -1


def test_thread_keyboard_interrupt_ends_the_body(waiting: type[Waiting]) -> None:
    server = NurseryTCPServer(LOCAL, waiting)

    def be_interrupted() -> None:
        with serving_in_thread(server) as address, connect(address):
            assert waiting.begun.wait(REAL_LIMIT)
            press_ctrl_c()
            threading.Event().wait(REAL_LIMIT)

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()
    assert waiting.ends == ["cancelled", "finished"]
    assert server.fileno() == -1


def test_thread_keyboard_interrupt_ends_the_waiting(waiting: type[Waiting]) -> None:
    """The block's end waits for a request that does not end: Ctrl-C cancels it."""

    class Server(NurseryTCPServer):
        async def shutdown(self) -> None:
            await super().shutdown()
            press_ctrl_c()

    server = Server(LOCAL, waiting)
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(KeyboardInterrupt))
        client = stack.enter_context(socket.socket())
        with serving_in_thread(server) as address:
            client.connect(address)
            assert waiting.begun.wait(REAL_LIMIT)
    assert waiting.ends == ["cancelled", "finished"]
    assert server.fileno() == -1


def test_thread_keyboard_interrupt_while_starting() -> None:
    class Server(NurseryTCPServer):
        async def serve_forever(self, *args: Any, **kwargs: Any) -> None:
            press_ctrl_c()
            await trio.sleep_forever()

    server = Server(LOCAL, echo_all)
    with pytest.raises(KeyboardInterrupt), serving_in_thread(server):
        raise AssertionError("not reached")
    assert server.fileno() == -1


@pytest.mark.parametrize("error", [RuntimeError("no thread"), KeyboardInterrupt()])
def test_thread_that_never_begins(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should it begin after all, it does nothing."""

    def start(thread: threading.Thread) -> None:
        late.append(thread)
        raise error

    late: list[threading.Thread] = []
    server = NurseryTCPServer(LOCAL, echo_all)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(type(error)) as caught, serving_in_thread(server):
        raise AssertionError("not reached")
    assert caught.value is error
    assert server.fileno() == -1
    late[0].run()


def test_thread_keyboard_interrupt_before_trio_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real_start, real_run = threading.Thread.start, trio.run
    real_cancel = _serving._Remote.cancel
    begun, told = threading.Event(), threading.Event()

    def start(thread: threading.Thread) -> None:
        real_start(thread)
        assert begun.wait(REAL_LIMIT)
        raise KeyboardInterrupt

    def run(function: Any) -> None:
        begun.set()
        assert told.wait(REAL_LIMIT)
        real_run(function)

    def cancel(remote: Any) -> None:
        real_cancel(remote)
        told.set()

    server = NurseryTCPServer(LOCAL, echo_all)
    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(trio, "run", run)
    monkeypatch.setattr(_serving._Remote, "cancel", cancel)
    with pytest.raises(KeyboardInterrupt), serving_in_thread(server):
        raise AssertionError("not reached")
    assert server.fileno() == -1


def test_public_names() -> None:
    assert trio_socketserver.testing.__all__ == sorted(trio_socketserver.testing.__all__)
    for name in trio_socketserver.testing.__all__:
        assert getattr(trio_socketserver.testing, name).__doc__
