"""Blocking handlers, unmodified, under our servers: which they are and where they run."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import socket
import socketserver
import threading
import types
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import happens, wait_for
from blocking_world import (
    THREADING_DATAGRAM,
    THREADING_STREAM,
    each_plain_server,
    each_server,
    each_stream_server,
    each_threading_server,
    is_true,
    make,
    sequential_and_threading,
    serving,
)
from helpers import (
    REAL_LIMIT,
    answer,
    ask,
    assert_sums_up,
    bounded,
    class_name,
    connect,
    pose,
    receive_to_end,
)
from trio.testing import wait_all_tasks_blocked

import trio_socketserver
from trio_socketserver import (
    BaseServer,
    NurseryMixIn,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixDatagramServer,
    NurseryUnixStreamServer,
    TCPServer,
    ThreadingMixIn,
    ThreadingTCPServer,
    UDPServer,
    _blocking,
)

# -- the handlers --------------------------------------------------------------------------


def shout(request: Any, client_address: Any, server: Any) -> None:
    """Answer in capitals, as a function."""
    if isinstance(request, tuple):
        data, sock = request
        sock.sendto(data.upper(), client_address)
        return
    while data := request.recv(65536):
        request.sendall(data.upper())


class OldHandler(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        shout(self.request, self.client_address, self.server)


class OldStreamHandler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line.upper())


class OldDatagramHandler(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(self.packet.upper())


class OwnArguments(OldHandler):
    def __init__(self, argument: str, *args: Any, option: str) -> None:
        assert (argument, option) == ("an argument", "an option")
        super().__init__(*args)


class Shouting:
    def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        shout(request, client_address, server)

    method = __call__


HANDLERS = {
    "class": OldHandler,
    "partial": functools.partial(OwnArguments, "an argument", option="an option"),
    "function": shout,
    "method": Shouting().method,
    "object": Shouting(),
}

each_handler = pytest.mark.parametrize("handler", HANDLERS.values(), ids=HANDLERS)


@each_server
@each_handler
@bounded
async def test_every_kind_of_blocking_handler(
    server_class: Any, handler: Any, tmp_path: Path
) -> None:
    server = make(server_class, handler, tmp_path)
    async with serving(server):
        for _ in range(2):
            assert await ask(server, b"quiet\n", tmp_path) == b"QUIET\n"
    assert server.errors == []
    assert server.statistics().completed == 2
    assert_sums_up(server)


@each_server
@bounded
async def test_the_old_classes_with_files(server_class: Any, tmp_path: Path) -> None:
    datagrams = issubclass(server_class, UDPServer)
    handler = OldDatagramHandler if datagrams else OldStreamHandler
    server = make(server_class, handler, tmp_path)
    async with serving(server):
        assert await ask(server, b"quiet\n", tmp_path) == b"QUIET\n"
    assert server.errors == []


# -- where they run ------------------------------------------------------------------------


@each_server
@bounded
async def test_the_event_loop_goes_on(server_class: Any, tmp_path: Path) -> None:
    """The handler waits, without trio, for what a task of this test does."""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        threads.append(threading.current_thread())
        begun.set()
        wait_for(done)
        shout(request, client_address, server)

    begun, done = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []
    server = make(server_class, handler, tmp_path)
    async with serving(server):
        with pose(server, b"quiet", tmp_path) as client:
            await happens(begun)
            await trio.sleep(0)
            done.set()
            assert await answer(client) == b"QUIET"
    assert threads[0] is not threading.current_thread()


@each_plain_server
@bounded
async def test_plain_servers_handle_one_at_a_time(
    server_class: Any, tmp_path: Path
) -> None:
    at_once: list[int] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        at_once.append(1)
        assert sum(at_once) == 1
        trio.from_thread.run(wait_all_tasks_blocked)
        shout(request, client_address, server)
        at_once.append(-1)

    server = make(server_class, handler, tmp_path)
    async with serving(server):
        clients = [pose(server, b"%d" % number, tmp_path) for number in range(5)]
        for number, client in enumerate(clients):
            with client:
                assert await answer(client) == b"%d" % number
    assert server.errors == []
    assert len(at_once) == 10


@each_threading_server
@bounded
async def test_threading_servers_handle_side_by_side(
    server_class: Any, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        names.add(threading.current_thread().name)
        barrier.wait(REAL_LIMIT)
        shout(request, client_address, server)

    barrier = threading.Barrier(8)
    names: set[str] = set()
    server = make(server_class, handler, tmp_path)
    async with serving(server):
        clients = [pose(server, b"quiet", tmp_path) for _ in range(8)]
        for client in clients:
            with client:
                assert await answer(client) == b"QUIET"
    assert server.errors == []
    assert len(names) == 8
    assert all(name.startswith(f"{class_name(server_class)} request ") for name in names)


@sequential_and_threading
@bounded
async def test_each_request_has_a_name_of_its_own(
    server_class: Any, tmp_path: Path
) -> None:
    names = []
    server = make(
        server_class, lambda *_: names.append(threading.current_thread().name), tmp_path
    )
    async with serving(server):
        for _ in range(3):
            with connect(server.server_address) as client:
                await receive_to_end(client)
    assert len(set(names)) == 3


@each_threading_server
@pytest.mark.parametrize("kind", ["class", "function"])
@bounded
async def test_asynchronous_handlers_run_as_tasks(
    server_class: Any, kind: str, tmp_path: Path
) -> None:
    threads = set()

    async def shout_async(request: Any, client_address: Any, server: Any) -> None:
        threads.add(threading.current_thread())
        both.append(1)
        if len(both) == 2:
            met.set()
        await met.wait()
        if isinstance(request, tuple):
            await request[1].sendto(request[0].upper(), client_address)
        else:
            await request.sendall((await request.recv(100)).upper())

    class Handler(trio_socketserver.BaseRequestHandler):
        async def handle(self) -> None:
            await shout_async(self.request, self.client_address, self.server)

    met, both = trio.Event(), []
    before = threading.active_count()
    server = make(server_class, Handler if kind == "class" else shout_async, tmp_path)
    async with serving(server):
        clients = [pose(server, b"quiet", tmp_path) for _ in range(2)]
        for client in clients:
            with client:
                assert await answer(client) == b"QUIET"
        assert threading.active_count() == before
    assert threads == {threading.current_thread()}
    assert server.errors == []


@each_threading_server
@bounded
async def test_the_colour_is_judged_again(server_class: Any, tmp_path: Path) -> None:
    async def whisper(request: Any, client_address: Any, server: Any) -> None:
        if isinstance(request, tuple):
            await request[1].sendto(request[0].lower(), client_address)
        else:
            await request.sendall((await request.recv(100)).lower())

    server = make(server_class, shout, tmp_path)
    async with serving(server):
        for handler, reply in ((shout, b"ABC"), (whisper, b"abc")) * 2:
            server.RequestHandlerClass = handler
            assert await ask(server, b"aBc", tmp_path) == reply
    assert server.errors == []


@bounded
async def test_trio_goes_on_inside(tmp_path: Path) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            trio.from_thread.check_cancelled()
            assert trio.from_thread.run(self.double, 21) == 42
            assert trio.from_thread.run_sync(int, "7") == 7
            assert trio.from_thread.run_sync(threading.current_thread) is main
            self.wfile.write(b"well")

        async def double(self, number: int) -> int:
            await trio.lowlevel.checkpoint()
            return number * 2

    main = threading.current_thread()
    server = make(ThreadingTCPServer, Handler, tmp_path)
    async with serving(server):
        assert await ask(server, b"") == b"well"
    assert server.errors == []


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@each_stream_server
@bounded
async def test_context_variables_travel(server_class: Any, tmp_path: Path) -> None:
    async def look() -> str:
        return variable.get()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.notes.append(variable.get())
        variable.set("by the handler")
        server.notes.append(trio.from_thread.run(look))
        server.notes.append(trio.from_thread.run_sync(variable.get))

    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        variable.set("by a hook")
        return True

    server = make(server_class, handler, tmp_path, verify_request=verify_request)
    async with serving(server):
        assert await ask(server, b"") == b""
    assert server.notes == ["by a hook", "by the handler", "by the handler"]
    assert variable.get() == "unset"


# -- who is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "server_class",
    [
        NurseryTCPServer,
        NurseryUDPServer,
        NurseryUnixStreamServer,
        NurseryUnixDatagramServer,
        type("Own", (NurseryMixIn, TCPServer), {}),
    ],
    ids=class_name,
)
@each_handler
@bounded
async def test_nurseries_refuse_blocking_handlers(
    server_class: Any, handler: Any, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="ThreadingMixIn"):
        make(server_class, handler, tmp_path)

    async def asynchronous(request: Any, client_address: Any, server: Any) -> None:
        """Do nothing."""

    server = make(server_class, asynchronous, tmp_path)
    with pytest.raises(TypeError, match="ThreadingMixIn"):
        server.RequestHandlerClass = handler
    assert server.RequestHandlerClass is asynchronous
    await server.server_close()


def test_the_mix_in_is_the_old_one() -> None:
    for server_class in (*THREADING_STREAM, *THREADING_DATAGRAM):
        names = [base.__name__ for base in server_class.__mro__]
        old = getattr(socketserver, server_class.__name__)
        assert names[0] == old.__name__
        assert [base.__name__ for base in server_class.__bases__] == [
            base.__name__ for base in old.__bases__
        ]
        assert server_class.daemon_threads is old.daemon_threads is False
        assert server_class.max_threads == 256
        assert issubclass(server_class, ThreadingMixIn)
        assert issubclass(server_class, BaseServer)


class Future:
    """Something to await that is no coroutine."""

    def __await__(self) -> Any:
        raise AssertionError("nobody should wait")


class AsyncHandler(trio_socketserver.BaseRequestHandler):
    async def handle(self) -> None:
        raise AssertionError("nobody should call")


async def never() -> None:
    raise AssertionError("nobody should await")


MISTAKES = {
    "coroutine": lambda *args: never(),
    "awaitable": lambda *args: Future(),
    "handler": lambda *args: AsyncHandler(*args),
    "future": lambda *args: FUTURES.pop(),
}
FUTURES: list[Any] = []


@each_server
@pytest.mark.parametrize("kind", MISTAKES)
@bounded
async def test_what_only_looks_blocking(
    server_class: Any, kind: str, tmp_path: Path
) -> None:
    loop = asyncio.new_event_loop()
    FUTURES[:] = [loop.create_future()]
    loop.close()
    server = make(server_class, MISTAKES[kind], tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        async with serving(server):
            with pose(server, b"ask", tmp_path) as client:
                await is_true(lambda: server.statistics().failed == 1)
                if client.type == socket.SOCK_STREAM:
                    assert await receive_to_end(client) == b""
            server.RequestHandlerClass = shout
            assert await ask(server, b"then", tmp_path) == b"THEN"
    (error,) = server.errors
    assert type(error) is TypeError
    assert "async def handler" in str(error)
    assert server.statistics().failed == 1
    assert_sums_up(server)


@each_server
@pytest.mark.parametrize("result", [None, 0, "text", iter(())], ids=repr)
@bounded
async def test_what_a_handler_returns_is_nobodys_business(
    server_class: Any, result: Any, tmp_path: Path
) -> None:
    server = make(server_class, lambda *_: result, tmp_path)
    async with serving(server):
        with pose(server, b"ask", tmp_path):
            await is_true(lambda: server.statistics().completed == 1)
    assert server.errors == []


# -- how they end --------------------------------------------------------------------------


@each_stream_server
@bounded
async def test_an_error_goes_to_handle_error(server_class: Any, tmp_path: Path) -> None:
    class Failing(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            raise LookupError("not here")

        def finish(self) -> None:
            self.server.notes.append("finished")
            super().finish()

    server = make(server_class, Failing, tmp_path)
    async with serving(server):
        for _ in range(2):
            assert await ask(server, b"") == b""
    assert [str(error) for error in server.errors] == ["not here"] * 2
    assert server.notes == ["finished"] * 2
    assert server.statistics().failed == 2


@each_server
@bounded
@pytest.mark.parametrize("exit_", [SystemExit("enough"), asyncio.CancelledError("enough")])
async def test_an_exit_ends_that_request_only(
    server_class: Any,
    exit_: BaseException,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        raise exit_

    server = make(server_class, handler, tmp_path)
    async with serving(server):
        with pose(server, b"ask", tmp_path) as client:
            await is_true(lambda: server.statistics().active == 0 and bool(caplog.records))
            if client.type == socket.SOCK_STREAM:
                assert await receive_to_end(client) == b""
        server.RequestHandlerClass = shout
        assert await ask(server, b"then", tmp_path) == b"THEN"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert repr(exit_) in record.getMessage()
    assert server.errors == []


@each_server
@bounded
async def test_keyboard_interrupt_ends_the_server(
    server_class: Any, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        raise KeyboardInterrupt("enough")

    async def serve_one_client() -> None:
        async with server:
            with pose(server, b"ask", tmp_path):
                await server.serve_forever()

    server = make(server_class, handler, tmp_path)
    with pytest.raises(KeyboardInterrupt, match="enough"):
        await serve_one_client()
    assert server.socket.fileno() == -1
    assert server.errors == []
    assert_sums_up(server)


@sequential_and_threading
@bounded
async def test_a_request_belongs_to_a_server_that_serves(
    server_class: Any, tmp_path: Path
) -> None:
    server = make(server_class, shout, tmp_path)
    with pytest.raises(RuntimeError, match="needs a server that serves"):
        await server.finish_request("request", "address")
    await server.server_close()


@sequential_and_threading
@bounded
async def test_the_first_blocking_request_while_closing(
    server_class: Any, tmp_path: Path
) -> None:
    async def finish_request(self: Any, request: Any, client_address: Any) -> None:
        begun.set()
        await self.draining.wait()
        await wait_all_tasks_blocked()
        assert self.socket.fileno() == -1
        await super(type(self), self).finish_request(request, client_address)

    begun = trio.Event()
    server = make(server_class, shout, tmp_path, finish_request=finish_request)
    async with serving(server):
        client = pose(server, b"late")
        await begun.wait()
    with client:
        assert await answer(client) == b"LATE"
    assert server.errors == []


@sequential_and_threading
@bounded
async def test_handle_request_and_entering_again(server_class: Any, tmp_path: Path) -> None:
    server = make(server_class, shout, tmp_path)
    for number in range(3):
        client = pose(server, b"%d" % number)
        await server.handle_request()
        with client:
            assert await answer(client) == b"%d" % number
    await server.server_close()
    assert server.statistics().completed == 3


def test_in_one_run_after_another(tmp_path: Path) -> None:
    async def main() -> None:
        with trio.fail_after(REAL_LIMIT):
            client = pose(server, b"quiet")
            await server.handle_request()
            with client:
                assert await answer(client) == b"QUIET"

    server = make(ThreadingTCPServer, shout, tmp_path)
    trio.run(main)
    trio.run(main)
    trio.run(server.server_close)


@bounded
async def test_the_default_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(1) == b"t":
                raise TimeoutError("the peer is slow")
            raise LookupError("not here")

    caplog.set_level("DEBUG", "trio_socketserver")
    server = ThreadingTCPServer(("127.0.0.1", 0), Failing)
    async with serving(server):
        await ask(server, b"t")
        await ask(server, b"l")
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
    assert server.statistics().peer_errors == 1


@bounded
async def test_nothing_of_a_failed_request_waits_for_the_collector() -> None:
    class Fails(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            handlers.append(weakref.ref(self))
            raise ZeroDivisionError

    class Server(ThreadingTCPServer):
        async def handle_error(self, request: Any, client_address: Any) -> None:
            failed.set()

    handlers: list[weakref.ref[Fails]] = []
    failed = trio.Event()
    gc.disable()
    try:
        async with (
            Server(("127.0.0.1", 0), Fails) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(server.serve_forever)
            with socket.create_connection(server.server_address):
                await failed.wait()
            await server.shutdown()
        assert [handler() for handler in handlers] == [None]
    finally:
        gc.enable()


def generator() -> Iterator[None]:
    yield


@types.coroutine
def old_style() -> Iterator[None]:
    yield


class Awaitable:
    def __await__(self) -> Iterator[None]:
        return old_style()


@pytest.mark.parametrize("make_one", [generator, old_style, Awaitable, object])
def test_awaitable_is_what_inspect_says(make_one: Any) -> None:
    result = make_one()
    assert _blocking._is_awaitable(result) == inspect.isawaitable(result)


@pytest.mark.parametrize("others", [[], [LookupError()], [KeyboardInterrupt()]])
def test_exits_in_a_group(
    others: list[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    """A handler that runs loops of its own may raise groups."""
    found: BaseException | None = None
    try:
        with _blocking.exits_contained("somebody"):
            raise BaseExceptionGroup("several", [SystemExit("enough"), *others])
    except BaseExceptionGroup as group:
        found = group
    assert [*getattr(found, "exceptions", [])] == others
    assert "enough" in caplog.text


def test_a_group_without_an_exit() -> None:
    group = BaseExceptionGroup("two", [KeyboardInterrupt()])
    with pytest.raises(BaseExceptionGroup) as raised, _blocking.exits_contained("somebody"):
        raise group
    assert raised.value is group
