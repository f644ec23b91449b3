"""Promise 6: errors go to handle_error(), and interrupts end the server."""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Any

import pytest
import trio
import trio.testing
from helpers import assert_sums_up, bounded, connect, is_refused, receive, receive_to_end
from promises import (
    LOCALHOST,
    Faulty,
    FaultyConcurrent,
    RaisingFilter,
    each_faulty_server,
    each_tcp_server,
    leaves,
    serve,
    serving,
)
from promises import broken_logging as broken_logging
from promises import log_everything as log_everything

from trio_socketserver import BaseRequestHandler, NurseryTCPServer

REQUEST_PLACES = (
    "constructor",
    "setup",
    "handle",
    "finish",
    "finish_request",
    "shutdown_request",
    "close_request",
    "handle_error",
)
LOOP_PLACES = ("verify_request", "process_request")


async def served(server: Any, line: bytes = b"ping\n") -> bytes:
    """Be a client: send a line, finish sending, and return all that comes back."""
    with connect(server.server_address) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(line)
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_WR)
        return await receive_to_end(client)


@each_faulty_server
@pytest.mark.parametrize("place", REQUEST_PLACES + LOOP_PLACES)
@bounded
async def test_promise_6_an_exception_anywhere_goes_to_handle_error(
    server_class: type[Any], place: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_class(place)
    error = ValueError(place)
    async with serving(server):
        server.error = error
        await served(server, b"fail\n" if place == "handle_error" else b"ping\n")
        # The loop has survived it, and the server is as good as new.
        assert await served(server) == b"ping\n"
    if place == "handle_error":
        [first] = server.seen
        assert isinstance(first, LookupError)
        [record] = caplog.records
        assert "handle_error() failed" in record.getMessage()
        assert record.exc_info is not None
        assert record.exc_info[1] is error
    else:
        assert len(server.seen) == 1
        assert server.seen[0] is error
        assert not caplog.records
    assert server.finished == (
        1 if place in ("constructor", "setup", "finish_request", *LOOP_PLACES) else 2
    )
    assert (server.statistics().completed, server.statistics().failed) == (1, 1)
    assert_sums_up(server)


@bounded
async def test_promise_6_an_exception_of_a_handler_function_goes_to_handle_error() -> None:
    class Server(NurseryTCPServer):
        async def handle_error(self, request: Any, client_address: Any) -> None:
            seen.append((sys.exception(), request, client_address))

    async def fail(request: Any, client_address: Any, server: Any) -> None:
        requests.append((error, request, client_address))
        raise error

    error = ValueError("a fault")
    seen: list[Any] = []
    requests: list[Any] = []
    server = Server(LOCALHOST, fail)
    async with serving(server):
        assert await served(server, b"") == b""
    assert seen == requests
    assert len(seen) == 1


@each_faulty_server
@pytest.mark.parametrize("place", REQUEST_PLACES + LOOP_PLACES)
@bounded
async def test_promise_6_broken_logging_never_stops_the_loop(
    server_class: type[Any], place: str, broken_logging: RaisingFilter
) -> None:
    class Logging(server_class):  # type: ignore[misc]
        async def handle_error(self, request: Any, client_address: Any) -> None:
            await super(Faulty, self).handle_error(request, client_address)  # type: ignore[misc]

    server = Logging(place)
    async with serving(server):
        server.error = ValueError(place)
        await served(server, b"fail\n" if place == "handle_error" else b"ping\n")
        server.error = None
        assert await served(server) == b"ping\n"
    assert broken_logging.asked
    assert (server.statistics().completed, server.statistics().failed) == (1, 1)


@bounded
async def test_promise_6_broken_logging_does_not_replace_an_interrupt(
    broken_logging: RaisingFilter,
) -> None:
    class Handler(BaseRequestHandler):
        async def handle(self) -> None:
            raise interrupt

        async def finish(self) -> None:
            raise ValueError("second")

    interrupt = KeyboardInterrupt()
    server = NurseryTCPServer(LOCALHOST, Handler)
    with (
        connect(server.server_address),
        pytest.raises(KeyboardInterrupt) as caught,
    ):
        await serve(server)
    assert caught.value is interrupt
    assert broken_logging.asked


@each_faulty_server
@pytest.mark.parametrize("place", [*REQUEST_PLACES, *LOOP_PLACES, "service_actions"])
@bounded
async def test_promise_6_an_interrupt_anywhere_ends_the_server(
    server_class: type[Any], place: str
) -> None:
    error_type = KeyboardInterrupt if place in ("setup", "handle_error") else SystemExit

    async def be_clients() -> None:
        with connect(server.server_address) as other:
            if server_class is FaultyConcurrent:
                other.sendall(b"ping\n")
                assert await receive(other) == b"ping\n"
            else:
                other.shutdown(socket.SHUT_WR)
                assert await receive_to_end(other) == b""
            server.error = error
            await served(server, b"fail\n" if place == "handle_error" else b"ping\n")
            assert await receive_to_end(other) == b""
            ended.append("other")

    server = server_class(place)
    error = error_type("interrupt")
    ended: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_clients)
        with pytest.raises(error_type) as caught:
            await serve(server)
        # At once: the others have been cancelled, finished and closed.
        assert server.finished >= 1
        assert server.statistics().active == 0
        assert server.fileno() == -1
        assert is_refused(server.server_address)
    # Bare, and it never was an error of a request.
    assert caught.value is error
    assert error.__cause__ is None
    assert all(isinstance(seen, LookupError) for seen in server.seen)
    assert ended == ["other"]
    assert_sums_up(server)


@each_faulty_server
@pytest.mark.parametrize("place", REQUEST_PLACES)
@bounded
async def test_promise_6_an_interrupt_is_bare_without_entering_too(
    server_class: type[Any], place: str
) -> None:
    method = "handle_request" if place == "handle" else "serve_forever"
    server = server_class(place)
    server.error = error = KeyboardInterrupt()
    with connect(server.server_address) as client:
        client.sendall(b"fail\n" if place == "handle_error" else b"ping\n")
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(KeyboardInterrupt) as caught:
            await getattr(server, method)()
        await receive_to_end(client)
    assert caught.value is error
    assert server.fileno() == -1
    assert_sums_up(server)


@each_faulty_server
@pytest.mark.parametrize(
    "place", [place for place in REQUEST_PLACES + LOOP_PLACES if place != "handle_error"]
)
@bounded
async def test_promise_6_groups_are_split(server_class: type[Any], place: str) -> None:
    ours, interrupt = ValueError("ours"), KeyboardInterrupt()
    server = server_class(place)
    server.error = BaseExceptionGroup(
        "outer", [ours, BaseExceptionGroup("inner", [interrupt])]
    )
    with connect(server.server_address) as client:
        client.sendall(b"ping\n")
        client.shutdown(socket.SHUT_WR)
        with pytest.raises(KeyboardInterrupt) as caught:
            await serve(server)
        await receive_to_end(client)
    assert caught.value is interrupt
    [seen] = server.seen
    assert type(seen) is ExceptionGroup
    assert seen.exceptions == (ours,)
    assert server.statistics().failed == 1
    assert_sums_up(server)


@each_faulty_server
@bounded
async def test_promise_6_a_group_of_handle_error_is_split_too(
    server_class: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    ours, interrupt = ValueError("ours"), KeyboardInterrupt()
    server = server_class("handle_error")
    server.error = BaseExceptionGroup("both", [ours, interrupt])
    with connect(server.server_address) as client:
        client.sendall(b"fail\n")
        with pytest.raises(KeyboardInterrupt) as caught:
            await serve(server)
        await receive_to_end(client)
    assert caught.value is interrupt
    [record] = caplog.records
    assert "handle_error() failed" in record.getMessage()


@each_faulty_server
@pytest.mark.parametrize("place", ["setup", "handle", "verify_request", "shutdown_request"])
@bounded
async def test_promise_6_a_group_of_exceptions_is_not_taken_apart(
    server_class: type[Any], place: str
) -> None:
    server = server_class(place)
    group = ExceptionGroup("both", [ValueError(), ExceptionGroup("one", [LookupError()])])
    async with serving(server):
        server.error = group
        await served(server)
        assert await served(server) == b"ping\n"
    assert len(server.seen) == 1
    assert server.seen[0] is group
    assert (server.statistics().completed, server.statistics().failed) == (1, 1)


@each_tcp_server
@pytest.mark.parametrize("fails", [True, False], ids=["error_too", "only_cancelled"])
@bounded
async def test_promise_6_a_nursery_in_a_handler_that_is_cancelled(
    server_class: type[Any], fails: bool
) -> None:
    class Server(server_class):  # type: ignore[misc]
        async def handle_error(self, request: Any, client_address: Any) -> None:
            seen.append(sys.exception())

    async def child() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if fails:
                raise error

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
            nursery.start_soon(trio.sleep_forever)
            await trio.testing.wait_all_tasks_blocked()
            hard.cancel()

    error = ValueError("while being cancelled")
    seen: list[Any] = []
    server = Server(LOCALHOST, handler)
    with connect(server.server_address) as client:
        with trio.CancelScope() as hard:
            await serve(server)
        assert hard.cancelled_caught
        assert await receive_to_end(client) == b""
    if fails:
        [group] = seen
        assert type(group) is ExceptionGroup
        assert group.exceptions == (error,)
        assert server.statistics().failed == 1
    else:
        assert not seen
        assert server.statistics().cancelled == 1
    assert_sums_up(server)


@bounded
async def test_promise_6_several_interrupts_are_a_group() -> None:
    async def interrupt(request: Any, client_address: Any, server: Any) -> None:
        active.append(request)
        try:
            if len(active) == 1:
                await trio.sleep_forever()
        finally:
            raise errors.pop()

    active: list[Any] = []
    errors: list[BaseException] = [KeyboardInterrupt(), SystemExit()]
    expected = set(errors)
    server = NurseryTCPServer(LOCALHOST, interrupt)
    with (
        connect(server.server_address),
        connect(server.server_address),
        pytest.raises(BaseExceptionGroup) as caught,
    ):
        await serve(server)
    assert set(leaves(caught.value)) == expected
