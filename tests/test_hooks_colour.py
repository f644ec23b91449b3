"""What a hook or a handler of the wrong colour is told."""

from __future__ import annotations

import functools
import socketserver
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import answer, ask, bind_address, bounded, class_name, echo_all, pose
from hooks import LOOPBACK, all_servers, errors_reported, serve_one
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import (
    BaseRequestHandler,
    BaseServer,
    NurseryMixIn,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixDatagramServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)

COROUTINE_HOOKS = (
    "serve_forever",
    "handle_request",
    "shutdown",
    "server_close",
    "get_request",
    "verify_request",
    "process_request",
    "finish_request",
    "shutdown_request",
    "close_request",
    "handle_error",
    "handle_timeout",
    "service_actions",
    "collect_children",
)
PLAIN_HOOKS = ("fileno", "server_bind", "server_activate")


def plain_function(self: Any, *args: Any) -> bool:
    return True


async def coroutine_function(self: Any, *args: Any) -> bool:
    return True


@pytest.mark.parametrize("base", [BaseServer, TCPServer, NurseryUDPServer], ids=class_name)
def test_a_coroutine_hook_as_a_plain_method_is_refused(base: type) -> None:
    for hook in COROUTINE_HOOKS:
        with pytest.raises(TypeError) as refused:
            type("Forgetful", (base,), {hook: plain_function})
        message = str(refused.value)
        assert f"Forgetful.{hook} " in message
        assert f"write 'async def {hook}(…)'" in message
        type("Careful", (base,), {hook: coroutine_function})


@pytest.mark.parametrize("base", [BaseServer, TCPServer, NurseryUDPServer], ids=class_name)
def test_a_plain_hook_as_a_coroutine_is_refused(base: type) -> None:
    for hook in PLAIN_HOOKS:
        with pytest.raises(TypeError) as refused:
            type("Eager", (base,), {hook: coroutine_function})
        message = str(refused.value)
        assert f"Eager.{hook} " in message
        assert f"write 'def {hook}(…)'" in message
        type("Calm", (base,), {hook: plain_function})


@pytest.mark.parametrize("mixin_first", [True, False])
def test_a_plain_mixin_counts_where_it_comes_first(mixin_first: bool) -> None:
    class Firewall:
        def verify_request(self, request: Any, client_address: Any) -> bool:
            return False

    if mixin_first:
        with pytest.raises(TypeError) as refused:
            type("Server", (Firewall, TCPServer), {})
        assert "Server.verify_request" in str(refused.value)
        assert "inherits from" in str(refused.value)
        assert "Firewall" in str(refused.value)
    else:
        type("Server", (TCPServer, Firewall), {})


def wrapping(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return function(*args)

    return wrapper


def test_a_hook_is_judged_by_what_it_wraps() -> None:
    for wrapped in (
        wrapping,
        lambda function: wrapping(wrapping(function)),
        functools.partialmethod,
        staticmethod,
        classmethod,
    ):
        type("Server", (TCPServer,), {"verify_request": wrapped(coroutine_function)})
        with pytest.raises(TypeError, match=r"Server\.verify_request"):
            type("Server", (TCPServer,), {"verify_request": wrapped(plain_function)})
        with pytest.raises(TypeError, match=r"Server\.fileno"):
            type("Server", (TCPServer,), {"fileno": wrapped(coroutine_function)})


def test_a_hook_that_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Server\.verify_request"):
        type("Server", (TCPServer,), {"verify_request": None})


def test_process_request_thread_would_never_be_called() -> None:
    class Old:
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            """What a subclass of ThreadingMixIn overrides."""

    for bases, body in (
        ((NurseryTCPServer,), {"process_request_thread": plain_function}),
        ((NurseryTCPServer,), {"process_request_thread": coroutine_function}),
        ((Old, NurseryTCPServer), {}),
        ((NurseryTCPServer, Old), {}),
    ):
        with pytest.raises(TypeError) as refused:
            type("Server", bases, body)
        assert "Server.process_request_thread" in str(refused.value)
        assert "finish_request" in str(refused.value)


@pytest.mark.parametrize(
    ("bases", "named"),
    [
        ((NurseryMixIn, socketserver.TCPServer), "TCPServer"),
        ((NurseryMixIn, socketserver.UnixDatagramServer), "UnixDatagramServer"),
        ((NurseryMixIn, socketserver.ThreadingTCPServer), "ThreadingTCPServer"),
        ((socketserver.TCPServer, NurseryMixIn), "TCPServer"),
        ((socketserver.ThreadingMixIn, TCPServer), "ThreadingMixIn"),
        ((TCPServer, socketserver.ThreadingMixIn), "ThreadingMixIn"),
        ((socketserver.ForkingMixIn, UDPServer), "ForkingMixIn"),
        ((socketserver.BaseServer, TCPServer), "BaseServer"),
    ],
    ids=lambda value: (
        "-".join(map(class_name, value)) if isinstance(value, tuple) else value
    ),
)
def test_the_two_packages_do_not_mix(bases: tuple[type, ...], named: str) -> None:
    with pytest.raises(TypeError) as refused:
        type("Mixture", bases, {})
    assert "Mixture" in str(refused.value)
    assert f"socketserver.{named}" in str(refused.value)
    assert f"trio_socketserver.{named}" in str(refused.value)


class StdlibHandler(socketserver.StreamRequestHandler):
    """A handler as it was."""


class AsyncHandler(BaseRequestHandler):
    """A handler as it is now."""


def blocking_function(request: Any, client_address: Any, server: Any) -> None:
    """A function as it was."""


class BlockingCallable:
    def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        """Block."""

    def method(self, request: Any, client_address: Any, server: Any) -> None:
        """Block."""


class AsyncCallable:
    async def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        await echo_all(request, client_address, server)

    async def method(self, request: Any, client_address: Any, server: Any) -> None:
        await echo_all(request, client_address, server)


BLOCKING_HANDLERS = (
    StdlibHandler,
    functools.partial(StdlibHandler),
    blocking_function,
    functools.partial(blocking_function),
    BlockingCallable(),
    BlockingCallable().method,
    lambda *args: AsyncHandler(*args),
)
ASYNC_HANDLERS = (
    echo_all,
    functools.partial(echo_all),
    wrapping(echo_all),
    AsyncCallable(),
    AsyncCallable().method,
)


@pytest.mark.parametrize(
    "server_class",
    [
        NurseryTCPServer,
        NurseryUDPServer,
        NurseryUnixStreamServer,
        NurseryUnixDatagramServer,
    ],
    ids=class_name,
)
def test_a_blocking_handler_is_refused(server_class: Any, tmp_path: Path) -> None:
    for handler in BLOCKING_HANDLERS:
        with pytest.raises(TypeError) as refused:
            server_class(bind_address(server_class, tmp_path), handler)
        message = str(refused.value)
        assert repr(handler) in message
        assert server_class.__name__ in message
        assert "ThreadingMixIn" in message
    assert not list(tmp_path.iterdir()), "it was refused before anything was bound"


@pytest.mark.parametrize(
    "handler", BLOCKING_HANDLERS, ids=lambda handler: type(handler).__name__
)
@bounded
async def test_a_blocking_handler_is_refused_when_it_is_assigned(
    autojump_clock: Any, handler: Any
) -> None:
    server = NurseryTCPServer(LOOPBACK, echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pytest.raises(TypeError, match="ThreadingMixIn"):
            server.RequestHandlerClass = handler
        assert server.RequestHandlerClass is echo_all
        assert await ask(server, b"ping") == b"ping"
        await server.shutdown()


@pytest.mark.parametrize(
    "handler", ASYNC_HANDLERS, ids=lambda handler: type(handler).__name__
)
@bounded
async def test_an_asynchronous_handler_is_judged_by_what_it_wraps(
    autojump_clock: Any, handler: Any
) -> None:
    server = TCPServer(LOOPBACK, handler)
    with pose(server, b"ping") as client:
        await serve_one(server, wait_all_tasks_blocked)
        assert await answer(client) == b"ping"


@all_servers
@bounded
async def test_a_handler_assigned_while_serving_takes_effect(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Shout(BaseRequestHandler):
        async def handle(self) -> None:
            if isinstance(self.request, tuple):
                await self.request[1].sendto(b"SHOUT", self.client_address)
            else:
                await self.request.sendall(b"SHOUT")

    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping", tmp_path) == b"ping"
        server.RequestHandlerClass = Shout
        assert await ask(server, b"ping", tmp_path) == b"SHOUT"
        server.RequestHandlerClass = functools.partial(Shout)
        assert await ask(server, b"ping", tmp_path) == b"SHOUT"
        server.RequestHandlerClass = echo_all
        assert await ask(server, b"ping", tmp_path) == b"ping"
        await server.shutdown()


@bounded
async def test_a_handler_as_a_class_attribute_is_judged_too(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        RequestHandlerClass = AsyncHandler

    with pytest.raises(TypeError, match="ThreadingMixIn"):
        Server(LOOPBACK, StdlibHandler)
    with errors_reported(Server) as reported:
        server = Server(LOOPBACK, echo_all)
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await ask(server, b"ping") == b"ping"
            server.RequestHandlerClass = StdlibHandler
            assert await ask(server, b"ping") == b""
            server.RequestHandlerClass = echo_all
            assert await ask(server, b"ping") == b"ping"
            await server.shutdown()
    assert [type(error) for error in reported] == [TypeError]


def test_a_handler_must_be_callable() -> None:
    with pytest.raises(TypeError, match="callable"):
        TCPServer(LOOPBACK, None)  # type: ignore[arg-type]


def test_a_stream_handler_class_is_asynchronous() -> None:
    TCPServer(LOOPBACK, StreamRequestHandler).socket.close()
