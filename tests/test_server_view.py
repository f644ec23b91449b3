"""The server as a blocking handler sees it: the same object, by methods that block."""

from __future__ import annotations

import abc
import functools
import inspect
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar
from unittest import mock

import pytest
import trio
from blocking_servers import PARKED, in_thread
from blocking_world import (
    calling_trio,
    each_server,
    each_stream_server,
    is_true,
    make,
    parked,
    sequential_and_threading,
    serving,
)
from helpers import (
    REAL_LIMIT,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    connect,
    pose,
    receive_to_end,
)

from trio_socketserver import BaseServer, TCPServer, ThreadingTCPServer
from trio_socketserver._server_view import view_of


async def in_handler(
    server_class: Any, folder: Path, act: Callable[[Any], object], **attributes: Any
) -> Any:
    """Return a server, one handler of which has called *act* with itself."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            act(self)

    server = make(server_class, Handler, folder, **attributes)
    async with serving(server):
        with pose(server, b"ask", folder):
            await is_true(lambda: server.statistics().active < server.statistics().accepted)
    assert server.errors == []
    assert server.statistics().completed == 1
    assert_sums_up(server)
    return server


# -- attributes ----------------------------------------------------------------------------


@each_server
@bounded
async def test_it_passes_for_the_server(server_class: Any, tmp_path: Path) -> None:
    views = []
    server = await in_handler(
        server_class, tmp_path, lambda self: views.append(self.server)
    )
    (view,) = views
    assert view is not server
    assert isinstance(view, (server_class, type(server)))
    assert view.__class__ is type(server)
    assert type(view).__name__ == type(server).__name__
    assert type(view).__module__ == type(server).__module__
    assert type(view).__qualname__ == type(server).__qualname__


@each_server
@bounded
async def test_attributes_are_the_servers(server_class: Any, tmp_path: Path) -> None:
    def act(self: Any) -> None:
        assert self.server.server_address == address(self.server)
        assert self.server.fileno() == self.server.socket.fileno()
        assert self.server.statistics().active == 1
        assert not self.server.draining.is_set()
        assert self.server.given == "by the class"
        self.server.given = "by the handler"
        assert self.server.given == "by the handler"
        self.server.timeout = 5
        del self.server.doomed
        self.server.setting = "set"
        assert self.server.setting == "set!"
        assert self.server.cached is self.server.cached

    def address(server: Any) -> Any:
        return server.socket.getsockname()

    def set_setting(self: Any, value: str) -> None:
        self.kept = value

    def cached(self: Any) -> object:
        return object()

    cached_property = functools.cached_property(cached)
    cached_property.__set_name__(None, "cached")  # type: ignore[arg-type]

    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        self.doomed = "soon"
        return True

    server = await in_handler(
        server_class,
        tmp_path,
        act,
        given="by the class",
        setting=property(lambda self: self.kept + "!", set_setting),
        cached=cached_property,
        verify_request=verify_request,
    )
    assert server.given == "by the handler"
    assert server.timeout == 5
    assert not hasattr(server, "doomed")
    assert server.kept == "set"
    assert "cached" in vars(server)


@sequential_and_threading
@bounded
async def test_slots(server_class: Any, tmp_path: Path) -> None:
    class Slotted(server_class):
        __slots__ = ("__hidden", "count")

        def hide(self) -> int:
            self.__hidden = 1
            return self.__hidden

    def act(self: Any) -> None:
        with pytest.raises(AttributeError):
            _ = self.server.count
        self.server.count = 1
        self.server.count += 1
        self.server.doomed = 1
        del self.server.doomed
        assert self.server.hide() == 1

    slots = await in_handler(Slotted, tmp_path, act, __slots__=("doomed",))
    assert slots.count == 2
    assert not hasattr(slots, "doomed")


@sequential_and_threading
@bounded
async def test_a_coroutine_method_can_be_replaced(
    server_class: Any, tmp_path: Path
) -> None:
    async def another(*args: Any) -> str:
        await trio.lowlevel.checkpoint()
        return "another"

    def act(self: Any) -> None:
        with mock.patch.object(self.server, "handle_timeout", another):
            assert "handle_timeout" in vars(self.server)
            assert self.server.handle_timeout() == "another"
        assert "handle_timeout" not in vars(self.server)
        assert self.server.handle_timeout() is None

    await in_handler(server_class, tmp_path, act)


@sequential_and_threading
@bounded
async def test_class_attributes_can_be_counted(server_class: Any, tmp_path: Path) -> None:
    def act(self: Any) -> None:
        self.server.__class__.hits += 1

    server = await in_handler(server_class, tmp_path, act, hits=0)
    assert type(server).hits == 1


@sequential_and_threading
@bounded
async def test_every_request_has_the_same_view(server_class: Any, tmp_path: Path) -> None:
    views = []
    server = make(server_class, lambda *args: views.append(args[2]), tmp_path)
    async with serving(server):
        for _ in range(3):
            await ask(server, b"")
    assert len(views) == 3
    assert views[0] is views[1] is views[2]


def test_no_class_of_the_users_hears_of_it() -> None:
    heard = []
    Item = TypeVar("Item")

    class Registering(TCPServer, Generic[Item], abc.ABC):
        def __init_subclass__(cls, *, required: str, **kwargs: Any) -> None:
            heard.append(required)
            super().__init_subclass__(**kwargs)

    class Own(Registering[int], required="it is"):
        def helper(self) -> type:
            return __class__  # type: ignore[name-defined]

    async def main() -> None:
        async with Own(("127.0.0.1", 0), lambda *_: None) as server:
            view: Any = view_of(server, calling_trio())
            assert isinstance(view, Own)
            assert view.helper() is Own

    trio.run(main)
    assert heard == ["it is"]


# -- methods -------------------------------------------------------------------------------


class WithMethods:
    """Methods of the user's, of each kind, mixed into a server class."""

    async def add(self, one: int, another: int = 1) -> int:
        """Add in trio."""
        assert trio.lowlevel.in_trio_run()
        await trio.lowlevel.checkpoint()
        # Here the server is itself.
        await trio.lowlevel.checkpoint()
        self.adder = self
        return one + another

    @staticmethod
    async def static(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return number

    @classmethod
    async def of_class(cls) -> type:
        await trio.lowlevel.checkpoint()
        return cls

    add_to_40 = functools.partialmethod(add, 40)

    async def fail(self) -> None:
        await trio.lowlevel.checkpoint()
        raise LookupError("not here")

    def thread(self) -> threading.Thread:
        """Tell where a plain method runs."""
        return threading.current_thread()


@each_stream_server
@bounded
async def test_coroutine_methods_are_plain_calls(server_class: Any, tmp_path: Path) -> None:
    class Server(WithMethods, server_class):
        pass

    def act(self: Any) -> None:
        view = self.server
        for call in (lambda f: f(), run_in_thread):
            assert call(lambda: view.add(1, another=2)) == 3
            assert call(lambda: view.static(7)) == 7
            assert call(view.of_class) is type(server())
            assert call(lambda: view.add_to_40(2)) == 42
            assert call(view.handle_timeout) is None
            with pytest.raises(LookupError, match="not here"):
                call(view.fail)
        assert view.thread() is threading.current_thread()
        assert view.add.__name__ == "add"
        assert view.add.__doc__ == "Add in trio."
        assert view.adder is server()

    def server() -> Any:
        return servers[0]

    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        servers.append(self)
        return True

    servers: list[Any] = []
    await in_handler(Server, tmp_path, act, verify_request=verify_request)


def run_in_thread(function: Callable[[], Any]) -> Any:
    """Call *function* in a plain thread, and return or raise what it does."""
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(REAL_LIMIT)
    (result,) = results
    if isinstance(result, Exception):
        raise result
    return result


@sequential_and_threading
@bounded
async def test_plain_helpers(server_class: Any, tmp_path: Path) -> None:
    class Base(server_class):
        def stop(self, reason: str) -> str:
            self.reason = reason
            self.shutdown()
            return "stopped"

    class Server(Base):
        def stop(self, reason: str) -> str:
            return super().stop(reason) + "!"

    def act(self: Any) -> None:
        assert self.server.stop("told so") == "stopped!"

    server = await in_handler(Server, tmp_path, act)
    assert server.reason == "told so"


@sequential_and_threading
@bounded
async def test_of_the_class(server_class: Any, tmp_path: Path) -> None:
    """Reached by the view's class, a method is the function that it is everywhere."""
    views = []
    server = await in_handler(
        server_class, tmp_path, lambda self: views.append(self.server)
    )
    generated = type(views[0])
    assert generated.shutdown is type(server).shutdown
    assert inspect.iscoroutinefunction(generated.serve_forever)


@sequential_and_threading
@pytest.mark.parametrize("where", ["handler", "thread", "trio"])
@bounded
async def test_shutdown(server_class: Any, where: str, tmp_path: Path) -> None:
    def act(server: Any) -> None:
        match where:
            case "handler":
                server.shutdown()
                server.shutdown()
            case "thread":
                run_in_thread(server.shutdown)
            case "trio":
                trio.from_thread.run(server.shutdown)

    def handler(request: Any, client_address: Any, server: Any) -> None:
        act(server)
        request.sendall(b"goodbye")

    server = make(server_class, handler, tmp_path)
    with connect(server.server_address) as client:
        async with server:
            await server.serve_forever()
        assert await receive_to_end(client) == b"goodbye"
    assert server.errors == []
    assert server.statistics().completed == 1


@sequential_and_threading
@bounded
async def test_server_close(server_class: Any, tmp_path: Path) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.server_close()
        trio.from_thread.run(server.draining.wait)
        request.sendall(b"goodbye")

    server = make(server_class, handler, tmp_path)
    with connect(server.server_address) as client:
        async with server:
            await server.serve_forever()
        assert await receive_to_end(client) == b"goodbye"
    assert server.socket.fileno() == -1
    assert server.errors == []


@sequential_and_threading
@bounded
async def test_serving_is_refused(server_class: Any, tmp_path: Path) -> None:
    def act(self: Any) -> None:
        for method in (self.server.serve_forever, self.server.handle_request):
            with pytest.raises(RuntimeError):
                method()

    await in_handler(server_class, tmp_path, act)


@each_stream_server
@bounded
async def test_handle_error_sees_the_error(server_class: Any, tmp_path: Path) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        try:
            raise LookupError("not here")
        except LookupError:
            server.notes.append(sys.exception())
            server.handle_error(request, client_address)
            server.notes.append(sys.exception())
        # And when there is none, there is none.
        server.handle_error(request, client_address)

    server = make(server_class, handler, tmp_path)
    async with serving(server):
        await ask(server, b"")
    before, after = server.notes
    assert isinstance(before, LookupError)
    assert before is after
    assert server.errors == [before, None]
    assert server.statistics().completed == 1


@each_stream_server
@pytest.mark.parametrize("method", ["shutdown_request", "close_request"])
@bounded
async def test_a_handler_may_close_its_request(
    server_class: Any, method: str, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        getattr(server, method)(request)
        assert request.fileno() == -1
        assert gone.wait(REAL_LIMIT)

    gone = threading.Event()
    server = make(server_class, handler, tmp_path)
    async with serving(server):
        with await parked(server) as client:
            assert await receive_to_end(client) == b""
            assert server.statistics().active == 1
            gone.set()
    assert server.errors == []
    assert server.statistics().completed == 1


@each_stream_server
@bounded
async def test_shutdown_request_ends_a_connection_that_was_copied(
    server_class: Any, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        with request.dup():
            server.shutdown_request(request)
            assert gone.wait(REAL_LIMIT)

    gone = threading.Event()
    server = make(server_class, handler, tmp_path)
    async with serving(server):
        with connect(server.server_address) as client:
            assert await receive_to_end(client) == b""
            gone.set()
    assert server.errors == []


@sequential_and_threading
@bounded
async def test_the_handler_may_be_replaced(server_class: Any, tmp_path: Path) -> None:
    def first(request: Any, client_address: Any, server: Any) -> None:
        server.RequestHandlerClass = second
        with pytest.raises(TypeError):
            server.RequestHandlerClass = "no handler"

    def second(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(b"second")

    server = make(server_class, first, tmp_path)
    async with serving(server):
        assert await ask(server, b"") == b""
        assert await ask(server, b"") == b"second"
    assert server.errors == []


@bounded
async def test_a_request_of_ones_own_from_a_handler(tmp_path: Path) -> None:
    """Code that opens connections itself hands them to its server."""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        if client_address == "mine":
            request.sendall(b"by another")
            return
        ours, theirs = socket.socketpair()
        server.process_request(theirs, "mine")
        with ours:
            request.sendall(ours.recv(100))

    server = make(ThreadingTCPServer, handler, tmp_path)
    async with serving(server):
        assert await ask(server, b"") == b"by another"
    assert server.errors == []
    assert server.statistics().completed == 2


@sequential_and_threading
@bounded
async def test_a_call_is_cancelled_with_its_handler(
    server_class: Any, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        try:
            server.wait_for_ever()
        except trio.Cancelled:
            server.notes.append("cancelled")
            raise

    async def wait_for_ever(self: Any) -> None:
        await trio.sleep_forever()

    server = make(
        server_class, handler, tmp_path, block_on_close=False, wait_for_ever=wait_for_ever
    )
    async with serving(server):
        client = await parked(server)
    client.close()
    assert server.notes == ["cancelled"]
    assert server.statistics().cancelled == 1


@bounded
async def test_in_trios_thread_it_is_asynchronous(tmp_path: Path) -> None:
    server = TCPServer(bind_address(TCPServer, tmp_path), lambda *_: None)
    view = view_of(server, calling_trio())
    await view.shutdown()
    await in_thread(view.server_close)
    assert server.fileno() == -1
    assert isinstance(view, BaseServer)
