"""Promise 8: errors of the server itself, and of the body."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    REAL_LIMIT,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    receive_to_end,
)
from promises import (
    LOCALHOST,
    do_nothing,
    each_faulty_server,
    each_server,
    each_stream_server,
    knock,
    leaves,
    serve,
)
from promises import log_everything as log_everything
from trio.lowlevel import checkpoint

from trio_socketserver import (
    BaseRequestHandler,
    NurseryTCPServer,
    NurseryUnixStreamServer,
    TCPServer,
)


@each_faulty_server
@bounded
async def test_promise_8_an_error_of_service_actions_propagates(
    server_class: type[Any],
) -> None:
    server = server_class("service_actions")
    server.error = error = ValueError("service")
    with connect(server.server_address) as client:
        with pytest.raises(ValueError, match="service") as caught:
            async with server:
                await server.serve_forever(0.01)
        assert await receive_to_end(client) == b""
    assert caught.value is error
    assert server.fileno() == -1
    assert not server.seen


@each_server
@bounded
async def test_promise_8_an_error_of_handle_timeout_propagates(
    server_class: type[Any], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Server(server_class):  # type: ignore[misc]
        timeout = 3

        async def handle_timeout(self) -> None:
            raise error

    error = ValueError("timed out")
    start = trio.current_time()
    with pytest.raises(ValueError, match="timed out") as caught:
        async with Server(bind_address(server_class, tmp_path), do_nothing) as server:
            await server.handle_request()
    assert caught.value is error
    assert trio.current_time() - start == pytest.approx(3)


@each_stream_server
@pytest.mark.parametrize(
    "error", [ValueError("no"), trio.ClosedResourceError(), KeyboardInterrupt()], ids=repr
)
@bounded
async def test_promise_8_an_error_of_get_request_that_is_no_oserror_propagates(
    server_class: type[Any], error: BaseException, tmp_path: Path
) -> None:
    class Server(server_class):  # type: ignore[misc]
        async def get_request(self) -> tuple[Any, Any]:
            raise error

    server = Server(bind_address(server_class, tmp_path), do_nothing)
    with (
        connect(server.server_address),
        pytest.raises(type(error)) as caught,
    ):
        await serve(server)
    assert caught.value is error
    assert server.fileno() == -1
    assert server.statistics().accept_errors == 0


@each_server
@pytest.mark.parametrize("how", ["constructor", "from_socket", "assigned"])
@bounded
async def test_promise_8_a_listener_closed_behind_its_back_propagates(
    server_class: type[Any], how: str, tmp_path: Path
) -> None:
    method = "handle_request" if how == "assigned" else "serve_forever"

    async def close_it() -> None:
        await trio.testing.wait_all_tasks_blocked()
        server.socket.close()

    address = bind_address(server_class, tmp_path)
    if how == "constructor":
        server = server_class(address, do_nothing)
    else:
        listener = socket.socket(server_class.address_family, server_class.socket_type)
        listener.bind(address)
        if server_class.socket_type == socket.SOCK_STREAM:
            listener.listen()
        if how == "from_socket":
            server = server_class.from_socket(listener, do_nothing)
        else:
            server = server_class(address, do_nothing, bind_and_activate=False)
            server.socket.close()
            server.socket = listener
    with trio.move_on_after(REAL_LIMIT) as limit:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close_it)
            with pytest.raises(trio.ClosedResourceError):
                async with server:
                    await getattr(server, method)()
    server.socket.close()
    assert not limit.cancelled_caught


@each_server
@bounded
async def test_promise_8_a_listener_closed_by_server_close_is_no_error(
    server_class: type[Any], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Slow(server_class):  # type: ignore[misc]
        cleanup_timeout = 1

        async def get_request(self) -> tuple[Any, Any]:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            return await super().get_request()

    server = Slow(bind_address(server_class, tmp_path), do_nothing)
    start = trio.current_time()
    with knock(server):
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_forever)
            await trio.testing.wait_all_tasks_blocked()
            await server.server_close()
            assert trio.current_time() - start == pytest.approx(1)
            assert server.fileno() == -1
    assert trio.current_time() - start == pytest.approx(10)
    assert server.statistics().accepted == server.statistics().accept_errors == 0


def body_errors() -> list[BaseException]:
    caused, in_context = ValueError("caused"), ValueError("in context")
    caused.__cause__ = LookupError("cause")
    in_context.__context__ = LookupError("context")
    return [
        ValueError("plain"),
        caused,
        in_context,
        KeyboardInterrupt(),
        SystemExit(3),
        ExceptionGroup("one", [ValueError()]),
        ExceptionGroup("two", [ValueError(), LookupError()]),
        ExceptionGroup("nested", [ExceptionGroup("one", [ValueError()])]),
        BaseExceptionGroup("base", [KeyboardInterrupt()]),
        StopAsyncIteration(),
        trio.ClosedResourceError(),
    ]


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryUnixStreamServer], ids=class_name
)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
@bounded
async def test_promise_8_an_exception_of_the_body_leaves_unchanged(
    server_class: type[Any], busy: bool, tmp_path: Path
) -> None:
    class Handler(BaseRequestHandler):
        async def handle(self) -> None:
            await trio.sleep_forever()

        async def finish(self) -> None:
            await checkpoint()
            finished.append(self)

    for error in body_errors():
        finished: list[Any] = []
        before = error.__cause__, error.__context__, error.__suppress_context__, error.args
        server = server_class(bind_address(server_class, tmp_path), Handler)
        caught: BaseException | None = None
        with connect(server.server_address) as client:
            async with trio.open_nursery() as nursery:
                try:
                    async with server:
                        if busy:
                            nursery.start_soon(server.serve_forever)
                            await trio.testing.wait_all_tasks_blocked()
                            assert server.statistics().active == 1
                        raise error
                except BaseException as raised:
                    caught = raised
                nursery.cancel_scope.cancel()
            assert await receive_to_end(client) == b""
        assert caught is error
        after = error.__cause__, error.__context__, error.__suppress_context__, error.args
        assert after == before
        assert len(finished) == server.statistics().cancelled == busy
        assert server.fileno() == -1
        assert_sums_up(server)


@bounded
async def test_promise_8_the_body_of_an_except_clause_keeps_its_context() -> None:
    async def body() -> None:
        async with NurseryTCPServer(LOCALHOST, do_nothing):
            try:
                raise first
            except LookupError:
                raise ValueError("second")  # noqa: B904

    first = LookupError("first")
    with pytest.raises(ValueError, match="second") as caught:
        await body()
    assert caught.value.__context__ is first


@bounded
async def test_promise_8_several_errors_are_a_group() -> None:
    async def crash(request: Any, client_address: Any, server: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise inside

    async def body() -> None:
        async with server:
            nursery.start_soon(server.serve_forever)
            await trio.testing.wait_all_tasks_blocked()
            raise outside

    inside, outside = SystemExit("inside"), ValueError("outside")
    server = NurseryTCPServer(LOCALHOST, crash)
    with connect(server.server_address):
        async with trio.open_nursery() as nursery:
            with pytest.raises(BaseExceptionGroup) as caught:
                await body()
    assert set(leaves(caught.value)) == {inside, outside}


@bounded
async def test_promise_8_a_surrounding_cancellation_passes_through() -> None:
    with trio.CancelScope() as hard:
        async with NurseryTCPServer(LOCALHOST, do_nothing):
            hard.cancel()
            await trio.sleep_forever()
    assert hard.cancelled_caught
