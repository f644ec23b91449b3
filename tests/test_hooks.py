"""Hooks: the stdlib's names, arguments and order, with the stdlib itself as the oracle.

Also what a hook of the wrong colour is told, and what becomes of a hook that fails.
"""

from __future__ import annotations

import errno
import functools
import itertools
import logging
import math
import socketserver
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    DATAGRAM_SERVERS,
    STREAM_SERVERS,
    answer,
    ask,
    assert_sums_up,
    bind_address,
    blocking_twin,
    bounded,
    class_name,
    connect,
    echo_all,
    pose,
    receive_to_end,
    reply_now,
)
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import (
    BaseRequestHandler,
    BaseServer,
    NurseryMixIn,
    NurseryTCPServer,
    NurseryUDPServer,
    RequestTimeout,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)

LOOPBACK = ("127.0.0.1", 0)
SERVERS = (*STREAM_SERVERS, *DATAGRAM_SERVERS)
SEQUENTIAL = [server for server in SERVERS if not issubclass(server, NurseryMixIn)]
all_servers = pytest.mark.parametrize("server_class", SERVERS, ids=class_name)


# -- the oracle ----------------------------------------------------------------------------
#
# What follows up to `trace` is compiled twice: as it is for our servers, and without
# "async" and "await" for the stdlib's.


class Record:
    """A list of calls, in which requests and addresses have names."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.client: Any = None
        self._requests: list[Any] = []

    def __call__(self, hook: str, *args: Any) -> None:
        self.calls.append((hook, *map(self._name, args)))

    def _name(self, arg: Any) -> str:
        if isinstance(arg, type):
            return arg.__name__
        if arg == self.client:
            return "client"
        if not any(arg is known for known in self._requests):
            self._requests.append(arg)
        number = next(i for i, known in enumerate(self._requests) if known is arg)
        return f"request {number}"


def recorded(server_class, record):
    """Record the calls of every hook of a server class, and of every override in it."""

    class Recorded(server_class):
        async def get_request(self):
            record("get_request")
            return await super().get_request()

        async def verify_request(self, request, client_address):
            record("verify_request", request, client_address)
            return await super().verify_request(request, client_address)

        async def process_request(self, request, client_address):
            record("process_request", request, client_address)
            await super().process_request(request, client_address)

        async def finish_request(self, request, client_address):
            record("finish_request", request, client_address)
            await super().finish_request(request, client_address)

        async def shutdown_request(self, request):
            record("shutdown_request", request)
            await super().shutdown_request(request)

        async def close_request(self, request):
            record("close_request", request)
            await super().close_request(request)

        async def handle_error(self, request, client_address):
            record("handle_error", request, client_address, type(sys.exception()))
            await super().handle_error(request, client_address)

        async def handle_timeout(self):
            record("handle_timeout")
            await super().handle_timeout()

        async def service_actions(self):
            record("service_actions")
            await super().service_actions()

    return Recorded


def recording(handler_class, record):
    """A handler that echoes, and records its phases."""

    class Handler(handler_class):
        async def setup(self):
            record("setup", self.request, self.client_address)

        async def handle(self):
            record("handle", self.request, self.client_address)
            if isinstance(self.request, tuple):
                data, replies = self.request
                await replies.sendto(data, self.client_address)
            else:
                data = await self.request.recv(100)
                await self.request.sendall(data)

        async def finish(self):
            record("finish", self.request, self.client_address)

    return Handler


def plain(server_class, handler, record):
    return server_class, handler


def denies(server_class, handler, record):
    class Server(server_class):
        async def verify_request(self, request, client_address):
            return False

    return Server, handler


def forgets_to_allow(server_class, handler, record):
    class Server(server_class):
        async def verify_request(self, request, client_address):
            await super().verify_request(request, client_address)

    return Server, handler


def wraps_process_request(server_class, handler, record):
    class Server(server_class):
        async def process_request(self, request, client_address):
            record("before", request, client_address)
            await super().process_request(request, client_address)

    return Server, handler


def takes_over(server_class, handler, record):
    class Server(server_class):
        async def process_request(self, request, client_address):
            record("taken over", request)
            await self.shutdown_request(request)

    return Server, handler


def finishes_inline(server_class, handler, record):
    class Server(server_class):
        async def process_request(self, request, client_address):
            await self.finish_request(request, client_address)
            await self.shutdown_request(request)

    return Server, handler


def fails_inline(server_class, handler, record):
    class Server(server_class):
        async def process_request(self, request, client_address):
            await self.finish_request(request, client_address)

        async def finish_request(self, request, client_address):
            raise LookupError("the handler's fault")

    return Server, handler


def fails_to_process(server_class, handler, record):
    class Server(server_class):
        async def process_request(self, request, client_address):
            raise LookupError("cannot")

    return Server, handler


def wraps_finish_request(server_class, handler, record):
    class Server(server_class):
        async def finish_request(self, request, client_address):
            record("before", request, client_address)
            try:
                await super().finish_request(request, client_address)
            finally:
                record("after", request, client_address)

    return Server, handler


def fails_to_finish(server_class, handler, record):
    class Server(server_class):
        async def finish_request(self, request, client_address):
            await super().finish_request(request, client_address)
            raise LookupError("too late")

    return Server, handler


def wraps_shutdown_request(server_class, handler, record):
    class Server(server_class):
        async def shutdown_request(self, request):
            record("before", request)
            await super().shutdown_request(request)
            record("after", request)

    return Server, handler


def replaces_shutdown_request(server_class, handler, record):
    class Server(server_class):
        async def shutdown_request(self, request):
            await self.close_request(request)

    return Server, handler


def wraps_close_request(server_class, handler, record):
    class Server(server_class):
        async def close_request(self, request):
            record("before", request)
            await super().close_request(request)
            record("after", request)

    return Server, handler


def wraps_the_request(server_class, handler, record):
    class Server(server_class):
        async def get_request(self):
            request, client_address = await super().get_request()
            if isinstance(request, tuple):
                data, replies = request
                return (data[::-1], replies), client_address
            return Wrapped(request), client_address

    return Server, handler


def replaces_handle_error(server_class, handler, record):
    class Server(server_class):
        async def handle_error(self, request, client_address):
            record("replaced", request, client_address)

    class Handler(handler):
        async def handle(self):
            raise LookupError("handle")

    return Server, Handler


def handler_fails_in_setup(server_class, handler, record):
    class Handler(handler):
        async def setup(self):
            await super().setup()
            raise LookupError("setup")

    return server_class, Handler


def handler_fails_in_handle(server_class, handler, record):
    class Handler(handler):
        async def handle(self):
            await super().handle()
            raise LookupError("handle")

    return server_class, Handler


def handler_fails_in_finish(server_class, handler, record):
    class Handler(handler):
        async def finish(self):
            await super().finish()
            raise LookupError("finish")

    return server_class, Handler


async def serve_one(server, joined):
    async with server:
        await server.handle_request()
        await joined()


class Wrapped:
    """A request in an object of the user's."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


SCENARIOS = (
    plain,
    denies,
    forgets_to_allow,
    wraps_process_request,
    takes_over,
    finishes_inline,
    fails_inline,
    fails_to_process,
    wraps_finish_request,
    fails_to_finish,
    wraps_shutdown_request,
    replaces_shutdown_request,
    wraps_close_request,
    wraps_the_request,
    replaces_handle_error,
    handler_fails_in_setup,
    handler_fails_in_handle,
    handler_fails_in_finish,
)


def stdlib_class(server_class: type) -> Any:
    """The stdlib's class for one of ours."""
    return getattr(socketserver, server_class.__name__.replace("Nursery", "Threading"))


def build_ours(scenario: Any, server_class: Any, record: Record, folder: Path) -> Any:
    handler = recording(BaseRequestHandler, record)
    server_class, handler = scenario(server_class, handler, record)
    server = recorded(server_class, record)(bind_address(server_class, folder), handler)
    server.timeout = 5
    return server


def build_stdlib(scenario: Any, server_class: Any, record: Record, folder: Path) -> Any:
    handler = blocking_twin(recording)(socketserver.BaseRequestHandler, record)
    server_class, handler = blocking_twin(scenario)(
        stdlib_class(server_class), handler, record
    )
    server_class = blocking_twin(recorded)(server_class, record)
    server = server_class(bind_address(server_class, folder), handler)
    server.timeout = 5
    # Leaving the block waits for the threads as well, but closes their socket before.
    server.joined = lambda: hasattr(server, "_threads") and server._threads.join()
    return server


@all_servers
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
@bounded
async def test_hooks_are_called_as_by_the_stdlib(
    autojump_clock: Any, scenario: Any, server_class: Any, tmp_path: Path
) -> None:
    expected = Record()
    oracle = build_stdlib(scenario, server_class, expected, tmp_path)
    with pose(oracle, b"ping", tmp_path) as client:
        expected.client = client.getsockname()
        blocking_twin(serve_one)(oracle, oracle.joined)
        expected_reply = reply_now(client)

    record = Record()
    server = build_ours(scenario, server_class, record, tmp_path)
    with pose(server, b"ping", tmp_path) as client:
        record.client = client.getsockname()
        await serve_one(server, wait_all_tasks_blocked)
        reply = reply_now(client)

    assert record.calls == expected.calls
    assert reply == expected_reply
    assert_sums_up(server)


def stops_after_service(server_class, handler, record):
    class Server(server_class):
        async def service_actions(self):
            await self.stop()

    return Server, handler


@pytest.mark.parametrize("server_class", SEQUENTIAL, ids=class_name)
@bounded
async def test_service_actions_come_when_the_request_is_over(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    expected = Record()
    oracle = build_stdlib(stops_after_service, server_class, expected, tmp_path)
    oracle.stop = lambda: setattr(oracle, "_BaseServer__shutdown_request", True)
    with pose(oracle, b"ping", tmp_path) as client:
        expected.client = client.getsockname()
        with oracle:
            oracle.serve_forever(poll_interval=3600)

    record = Record()
    server = build_ours(stops_after_service, server_class, record, tmp_path)
    server.stop = server.shutdown
    started = trio.current_time()
    with pose(server, b"ping", tmp_path) as client:
        record.client = client.getsockname()
        async with server:
            await server.serve_forever(poll_interval=3600)

    assert expected.calls[-2:] == [("close_request", "request 0"), ("service_actions",)]
    assert record.calls == expected.calls
    assert trio.current_time() == started


def lets_one_go(server_class, handler, record):
    class Server(server_class):
        failed = False

        async def get_request(self):
            if not self.failed:
                self.failed = True
                raise ConnectionAbortedError("gone before it was accepted")
            return await super().get_request()

    return Server, handler


@all_servers
@bounded
async def test_an_oserror_of_get_request_means_that_there_was_no_request(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    expected = Record()
    oracle = build_stdlib(lets_one_go, server_class, expected, tmp_path)
    with pose(oracle, b"ping", tmp_path) as client, oracle:
        expected.client = client.getsockname()
        oracle.handle_request()
        oracle.handle_request()
        oracle.joined()

    record = Record()
    server = build_ours(lets_one_go, server_class, record, tmp_path)
    with pose(server, b"ping", tmp_path) as client:
        record.client = client.getsockname()
        await serve_one(server, wait_all_tasks_blocked)

    assert record.calls == expected.calls
    assert server.statistics().accept_errors == 1
    assert server.statistics().accepted == 1


@all_servers
@bounded
async def test_handle_timeout_is_called_as_by_the_stdlib(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    expected = Record()
    oracle = build_stdlib(plain, server_class, expected, tmp_path)
    oracle.timeout = 0.001
    blocking_twin(serve_one)(oracle, oracle.joined)

    record = Record()
    server = build_ours(plain, server_class, record, tmp_path)
    await serve_one(server, wait_all_tasks_blocked)

    assert record.calls == expected.calls == [("handle_timeout",)]
    assert trio.current_time() == 5


def overrides_server_close(server_class, handler, record):
    class Server(server_class):
        async def server_close(self):
            record("before")
            await super().server_close()
            record("after")

    return Server, handler


@all_servers
@bounded
async def test_leaving_the_block_calls_server_close(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    expected = Record()
    oracle = build_stdlib(overrides_server_close, server_class, expected, tmp_path)
    with pose(oracle, b"ping", tmp_path) as client:
        expected.client = client.getsockname()
        blocking_twin(serve_one)(oracle, oracle.joined)

    record = Record()
    server = build_ours(overrides_server_close, server_class, record, tmp_path)
    with pose(server, b"ping", tmp_path) as client:
        record.client = client.getsockname()
        await serve_one(server, wait_all_tasks_blocked)

    assert record.calls == expected.calls
    assert record.calls[-2:] == [("before",), ("after",)]


# -- server_close, overridden --------------------------------------------------------------


@bounded
async def test_an_exception_of_the_body_calls_server_close_too(autojump_clock: Any) -> None:
    calls = []

    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            calls.append("before")
            try:
                await super().server_close()
            finally:
                calls.append("after")

    async def use(server: Any) -> None:
        async with server:
            await server.handle_request()
            raise LookupError("the body's")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address), pytest.raises(LookupError, match="the body's"):
        await use(server)
    assert calls == ["before", "after"]
    assert server.fileno() == -1
    # The client never ends its request: only a cancellation can have ended it.
    assert server.statistics().cancelled == 1
    assert trio.current_time() == 0


@bounded
async def test_cancelling_the_body_calls_server_close_too(autojump_clock: Any) -> None:
    calls = []

    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            calls.append("called")
            await super().server_close()

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address), trio.move_on_after(1) as hard:
        async with server:
            await server.serve_forever()
    assert hard.cancelled_caught
    assert calls == ["called"]
    assert server.fileno() == -1
    assert server.statistics().cancelled == 1


@bounded
async def test_what_the_body_raises_counts_more_than_a_cancelled_server_close(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            await super().server_close()

    async def use(server: Any) -> None:
        with trio.CancelScope() as hard:
            async with server:
                hard.cancel()
                raise LookupError("the body's")

    server = Server(LOOPBACK, echo_all)
    with pytest.raises(LookupError, match="the body's"):
        await use(server)
    assert server.fileno() == -1


@bounded
async def test_a_server_close_that_fails_leaves_nothing_open(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            raise LookupError("not even super")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address) as client:
        with pytest.raises(LookupError, match="not even super"):
            async with server:
                await server.handle_request()
        assert await receive_to_end(client) == b""
    assert server.fileno() == -1
    assert_sums_up(server)


@bounded
async def test_serving_alone_does_not_call_server_close(autojump_clock: Any) -> None:
    calls = []

    class Server(TCPServer):
        async def server_close(self) -> None:
            calls.append("called")
            await super().server_close()

    server = Server(LOOPBACK, echo_all)
    with trio.move_on_after(1):
        await server.serve_forever()
    server.timeout = 1
    await server.handle_request()
    assert calls == []
    await server.server_close()
    assert calls == ["called"]


# -- hooks that fail -----------------------------------------------------------------------


@contextmanager
def errors_reported(server_class: Any) -> Iterator[list[BaseException | None]]:
    """Collect what goes to `handle_error` of a server class; keep the log quiet."""
    reported: list[BaseException | None] = []

    async def handle_error(self: Any, request: Any, client_address: Any) -> None:
        reported.append(sys.exception())

    server_class.handle_error = handle_error
    yield reported


@all_servers
@bounded
async def test_a_verify_request_that_raises_denies(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    closed = []

    class Server(server_class):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            if not closed:
                raise LookupError("no such user")
            return True

        async def shutdown_request(self, request: Any) -> None:
            await super().shutdown_request(request)
            closed.append(request)

    with errors_reported(Server) as reported:
        server = Server(bind_address(Server, tmp_path), echo_all)
        with pose(server, b"denied", tmp_path) as denied:
            async with server, trio.open_nursery() as nursery:
                await nursery.start(server.serve_forever)
                await wait_all_tasks_blocked()
                assert reply_now(denied) == b""
                assert await ask(server, b"allowed", tmp_path) == b"allowed"
                await server.shutdown()
    assert [type(error) for error in reported] == [LookupError]
    assert len(closed) == 2
    seen = server.statistics()
    assert (seen.accepted, seen.failed, seen.completed, seen.rejected) == (2, 1, 1, 0)


def test_the_stdlib_dies_of_such_a_verify_request() -> None:
    class Server(socketserver.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            self.shutdown_request(request)
            raise LookupError("no such user")

    with (
        Server(LOOPBACK, socketserver.BaseRequestHandler) as server,
        connect(server.server_address),
        pytest.raises(LookupError),
    ):
        server.serve_forever()


@bounded
async def test_a_plain_verify_request_assigned_to_the_instance_denies(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for verdict in (True, False):
        server = NurseryTCPServer(LOOPBACK, echo_all)
        server.verify_request = lambda request, address, verdict=verdict: verdict
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            with pose(server, b"let me in") as client:
                assert await answer(client) == b""
            nursery.cancel_scope.cancel()
        assert server.statistics().failed == 1
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [
        TypeError,
        TypeError,
    ]


@all_servers
@bounded
async def test_process_request_that_fails_after_super_does_not_end_the_request(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Server(server_class):
        async def process_request(self, request: Any, client_address: Any) -> None:
            await super().process_request(request, client_address)
            raise ConnectionResetError("afterwards")

    with errors_reported(Server) as reported:
        server = Server(bind_address(Server, tmp_path), echo_all)
        with pose(server, b"ping", tmp_path) as client:
            await serve_one(server, wait_all_tasks_blocked)
            assert reply_now(client) == b"ping"
    assert [str(error) for error in reported] == ["afterwards"]
    seen = server.statistics()
    assert (seen.accepted, seen.completed, seen.failed, seen.peer_errors) == (1, 1, 0, 0)


@all_servers
@pytest.mark.parametrize("hook", ["shutdown_request", "close_request"])
@bounded
async def test_a_request_is_closed_even_if_its_closing_fails(
    autojump_clock: Any, server_class: Any, hook: str, tmp_path: Path
) -> None:
    async def fail(self: Any, request: Any) -> None:
        raise LookupError(hook)

    server_class = type("Server", (server_class,), {hook: fail})
    with errors_reported(server_class) as reported:
        server = server_class(bind_address(server_class, tmp_path), echo_all)
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await ask(server, b"one", tmp_path) == b"one"
            assert await ask(server, b"two", tmp_path) == b"two"
            nursery.cancel_scope.cancel()
    assert [error.args for error in reported if error] == [(hook,), (hook,)]
    assert server.statistics().failed == 2
    assert_sums_up(server)


@all_servers
@pytest.mark.parametrize("hook", ["shutdown_request", "close_request"])
@bounded
async def test_a_closing_that_hangs_is_cut(
    autojump_clock: Any, server_class: Any, hook: str, tmp_path: Path
) -> None:
    async def hang(self: Any, request: Any) -> None:
        await trio.sleep_forever()

    server_class = type("Server", (server_class,), {hook: hang})
    with errors_reported(server_class) as reported:
        server = server_class(bind_address(server_class, tmp_path), echo_all)
        server.cleanup_timeout = 7
        with pose(server, b"ping", tmp_path) as client:
            await serve_one(server, wait_all_tasks_blocked)
            assert trio.current_time() == 7
            assert reply_now(client) == b"ping"
    assert [type(error) for error in reported] == [RequestTimeout]
    assert "7 s" in str(reported[0])
    assert server.statistics().failed == 1


@bounded
async def test_a_closing_runs_in_a_shield(autojump_clock: Any) -> None:
    done = []

    class Server(NurseryTCPServer):
        async def shutdown_request(self, request: Any) -> None:
            await trio.sleep(3)
            await super().shutdown_request(request)
            done.append(trio.current_time())

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address) as client:
        with trio.move_on_after(1):
            async with server:
                await server.serve_forever()
        assert await receive_to_end(client) == b""
    assert done == [4]
    assert server.statistics().cancelled == 1


@pytest.mark.parametrize("hook", ["shutdown_request", "close_request", "handle_error"])
@bounded
async def test_a_keyboard_interrupt_in_a_hook_of_a_request_ends_the_server(
    autojump_clock: Any, hook: str
) -> None:
    interrupted = []

    async def interrupt(self: Any, *args: Any) -> None:
        if not interrupted:
            interrupted.append(args)
            raise KeyboardInterrupt(hook)
        await getattr(NurseryTCPServer, hook)(self, *args)

    async def fail(request: Any, client_address: Any, server: Any) -> None:
        await request.receive_some()
        raise LookupError

    server = type("Server", (NurseryTCPServer,), {hook: interrupt})(LOOPBACK, fail)
    with connect(server.server_address) as other, pose(server, b"ping") as client:
        with pytest.raises(KeyboardInterrupt, match=hook):
            async with server:
                await server.serve_forever()
        assert await receive_to_end(client) == b""
        assert await receive_to_end(other) == b""
    assert interrupted
    assert server.fileno() == -1
    assert_sums_up(server)


@all_servers
@bounded
async def test_handle_error_that_fails_stops_nothing(
    autojump_clock: Any,
    server_class: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Server(server_class):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            await super().finish_request(request, client_address)
            raise LookupError("finish_request")

        async def handle_error(self, request: Any, client_address: Any) -> None:
            raise ZeroDivisionError("handle_error")

    server = Server(bind_address(Server, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"one", tmp_path) == b"one"
        assert await ask(server, b"two", tmp_path) == b"two"
        nursery.cancel_scope.cancel()
    logged = [record for record in caplog.records if record.name == "trio_socketserver"]
    assert ["handle_error() failed" in record.message for record in logged] == [True, True]
    for record in logged:
        assert record.exc_info
        error = record.exc_info[1]
        assert isinstance(error, ZeroDivisionError)
        assert isinstance(error.__context__, LookupError)
    assert server.statistics().failed == 2


@bounded
async def test_not_even_a_log_that_fails_stops_anything(autojump_clock: Any) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError("the log is full")

    async def crash(request: Any, client_address: Any, server: Any) -> None:
        await echo_all(request, client_address, server)
        raise LookupError

    logger = logging.getLogger("trio_socketserver")
    logger.addFilter(fail)
    try:
        server = NurseryTCPServer(LOOPBACK, crash)
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await ask(server, b"one") == b"one"
            assert await ask(server, b"two") == b"two"
            nursery.cancel_scope.cancel()
    finally:
        logger.removeFilter(fail)
    assert server.statistics().failed == 2


@all_servers
@bounded
async def test_the_error_is_sys_exception_in_handle_error(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    seen = []

    class Server(server_class):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            raise LookupError("this one")

        async def handle_error(self, request: Any, client_address: Any) -> None:
            seen.append(sys.exception())
            await trio.sleep(1)
            seen.append(sys.exception())

    server = Server(bind_address(Server, tmp_path), echo_all)
    with pose(server, b"ping", tmp_path):
        await serve_one(server, wait_all_tasks_blocked)
    assert [repr(error) for error in seen] == ["LookupError('this one')"] * 2
    assert seen[0] is seen[1]


@bounded
async def test_handle_error_sees_the_errors_of_a_group(autojump_clock: Any) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            raise LookupError("one of several")

    class Server(NurseryTCPServer):
        pass

    with errors_reported(Server) as reported:
        server = Server(LOOPBACK, handler)
        with pose(server, b""):
            await serve_one(server, wait_all_tasks_blocked)
    [group] = reported
    assert isinstance(group, ExceptionGroup)
    assert repr(group.exceptions) == "(LookupError('one of several'),)"
    assert server.statistics().failed == 1


@bounded
async def test_a_group_is_split_between_handle_error_and_the_server(
    autojump_clock: Any,
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        raise BaseExceptionGroup("both", [LookupError(), KeyboardInterrupt()])

    class Server(NurseryTCPServer):
        pass

    with errors_reported(Server) as reported:
        server = Server(LOOPBACK, handler)
        with pose(server, b""), pytest.raises(KeyboardInterrupt):
            async with server:
                await server.serve_forever()
    [group] = reported
    assert isinstance(group, ExceptionGroup)
    assert [type(error) for error in group.exceptions] == [LookupError]
    assert server.statistics().failed == 1


class Several(BaseExceptionGroup[Any]):
    """A group that is no `ExceptionGroup`, whatever it holds."""


@pytest.mark.parametrize("hook", ["finish_request", "shutdown_request", "handle_error"])
@bounded
async def test_groups_are_split_whichever_hook_raises_them(
    autojump_clock: Any, hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def raise_group(self: Any, *args: Any) -> None:
        if hook != "handle_error":
            await getattr(NurseryTCPServer, hook)(self, *args)
        raise groups.pop()

    async def fail(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError

    server_class = type("Server", (NurseryTCPServer,), {hook: raise_group})
    server = server_class(LOOPBACK, fail if hook == "handle_error" else echo_all)
    groups = [
        BaseExceptionGroup("both", [LookupError(), KeyboardInterrupt("at last")]),
        Several("harmless", [LookupError()]),
    ]

    async def use() -> None:
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_forever)
            assert await ask(server, b"") == b""
            with pose(server, b""):
                await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt, match="at last"):
        await use()
    assert not groups
    logged = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [type(error) for error in logged] == [ExceptionGroup, ExceptionGroup]
    for error in logged:
        assert isinstance(error, ExceptionGroup)
        assert [type(leaf) for leaf in error.exceptions] == [LookupError]
    assert server.statistics().failed == 2


@bounded
async def test_a_handle_error_that_is_cancelled_is_no_failure(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Server(NurseryTCPServer):
        async def handle_error(self, request: Any, client_address: Any) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(trio.sleep_forever)

        async def finish_request(self, request: Any, client_address: Any) -> None:
            raise LookupError

    server = Server(LOOPBACK, echo_all)
    with pose(server, b"") as client:
        with trio.move_on_after(1) as hard:
            async with server:
                await server.serve_forever()
        assert hard.cancelled_caught
        assert await answer(client) == b""
    assert caplog.records == []
    assert server.statistics().failed == 1


@bounded
async def test_handle_error_without_an_error_has_nothing_to_say(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def complain(request: Any, client_address: Any, server: Any) -> None:
        await server.handle_error(request, client_address)
        await echo_all(request, client_address, server)

    server = TCPServer(LOOPBACK, complain)
    with pose(server, b"ping") as client:
        await serve_one(server, wait_all_tasks_blocked)
        assert reply_now(client) == b"ping"
    assert caplog.records == []


@bounded
async def test_a_group_of_cancellations_is_a_cancellation(autojump_clock: Any) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    class Server(NurseryTCPServer):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            try:
                await super().finish_request(request, client_address)
            except trio.Cancelled as cancelled:
                raise BaseExceptionGroup("several", [cancelled]) from None

    with errors_reported(Server) as reported:
        server = Server(LOOPBACK, handler)
        with pose(server, b""), trio.move_on_after(1) as hard:
            async with server:
                await server.serve_forever()
    assert hard.cancelled_caught
    assert reported == []
    assert server.statistics().cancelled == 1


@all_servers
@bounded
async def test_get_request_that_raises_something_else_ends_the_server(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Server(server_class):
        async def get_request(self) -> tuple[Any, Any]:
            raise LookupError("not an OSError")

    server = Server(bind_address(Server, tmp_path), echo_all)
    with pose(server, b"ping", tmp_path):
        with pytest.raises(LookupError, match="not an OSError"):
            await server.serve_forever()
        with pytest.raises(LookupError, match="not an OSError"):
            async with server:
                await server.serve_forever()
    assert server.fileno() == -1
    assert server.statistics().accepted == 0


@bounded
async def test_get_request_that_reports_a_shortage_makes_the_loop_back_off(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    class Server(NurseryTCPServer):
        async def get_request(self) -> tuple[Any, Any]:
            attempts.append(trio.current_time())
            if len(attempts) <= 9:
                raise OSError(errno.EMFILE, "out of descriptors")
            return await super().get_request()

    server = Server(LOOPBACK, echo_all)
    with pose(server, b"ping") as client:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await answer(client) == b"ping"
            nursery.cancel_scope.cancel()
    waits = [later - earlier for earlier, later in itertools.pairwise(attempts[:10])]
    assert waits == pytest.approx([0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1])
    assert server.statistics().accept_errors == 9
    assert len(caplog.records) == 1


@bounded
async def test_a_success_ends_the_back_off(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    class Server(TCPServer):
        async def get_request(self) -> tuple[Any, Any]:
            attempts.append(trio.current_time())
            if len(attempts) in (1, 2, 3, 5, 6):
                raise OSError(errno.EMFILE, "out of descriptors")
            return await super().get_request()

    server = Server(LOOPBACK, echo_all)
    with pose(server, b"one") as one, pose(server, b"two") as two:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await answer(one) == b"one"
            assert await answer(two) == b"two"
            await server.shutdown()
    waits = [later - earlier for earlier, later in itertools.pairwise(attempts[:7])]
    assert waits == pytest.approx([0.01, 0.02, 0.04, 0, 0.01, 0.02])
    assert len(caplog.records) == 2, "one line per episode"


# -- service_actions -----------------------------------------------------------------------


class Steps(trio.abc.Instrument):
    """Count the steps of all tasks."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken.append(task.name)


@all_servers
@bounded
async def test_an_idle_server_does_not_wake_up(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        await wait_all_tasks_blocked()
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(24 * 3600)
        trio.lowlevel.remove_instrument(steps)
        assert not [name for name in steps.taken if "serve_forever" in name]
        assert len(steps.taken) == 1, "only this task has slept and woken up"
        await server.shutdown()


def ticking(server_class: Any) -> Any:
    class Ticking(server_class):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.ticks: list[float] = []

        async def service_actions(self) -> None:
            self.ticks.append(trio.current_time())

    return Ticking


@all_servers
@bounded
async def test_service_actions_every_poll_interval(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = ticking(server_class)(bind_address(server_class, tmp_path), echo_all)
    async with server:
        with trio.move_on_after(2.25):
            await server.serve_forever()
        assert server.ticks == [0.5, 1, 1.5, 2]
        server.ticks.clear()
        with trio.move_on_after(15):
            await server.serve_forever(poll_interval=6)
        assert server.ticks == [8.25, 14.25]


@all_servers
@bounded
async def test_service_actions_after_each_request(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = ticking(server_class)(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(functools.partial(server.serve_forever, poll_interval=math.inf))
        for number in range(3):
            assert await ask(server, b"ping", tmp_path) == b"ping"
            await wait_all_tasks_blocked()
            assert len(server.ticks) == number + 1
        await server.shutdown()


@pytest.mark.parametrize("server_class", [TCPServer, UDPServer], ids=class_name)
@bounded
async def test_service_actions_while_the_server_is_full(
    autojump_clock: Any, server_class: Any
) -> None:
    async def park(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(2.25)

    server = ticking(server_class)(LOOPBACK, park)
    with pose(server, b"first"), pose(server, b"second"):
        async with server:
            with trio.move_on_after(2):
                await server.serve_forever()
    assert server.ticks == [0.5, 1, 1.5]
    assert server.statistics().accepted == 1


@pytest.mark.parametrize("server_class", [TCPServer, UDPServer], ids=class_name)
@bounded
async def test_a_request_does_not_delay_service_actions(
    autojump_clock: Any, server_class: Any
) -> None:
    async def park(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(1)

    server = ticking(server_class)(LOOPBACK, park)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        await trio.sleep(0.75)
        with pose(server, b"in between"):
            await trio.sleep(1.5)
            await server.shutdown()
    assert server.ticks == [0.5, 1, 1.5, 2]


@bounded
async def test_service_actions_while_the_loop_backs_off(autojump_clock: Any) -> None:
    class Server(ticking(NurseryTCPServer)):
        async def get_request(self) -> tuple[Any, Any]:
            raise OSError(errno.ENFILE, "out of descriptors")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address):
        async with server:
            with trio.move_on_after(60):
                await server.serve_forever()
    gaps = [later - earlier for earlier, later in itertools.pairwise(server.ticks)]
    assert max(gaps) <= 0.5
    # Once the delay has reached its limit there is one attempt per second.
    assert 60 <= server.statistics().accept_errors <= 70


@bounded
async def test_service_actions_with_no_interval_still_serves(autojump_clock: Any) -> None:
    # As select(0) does: it reports what is ready, and does not wait.
    class Server(TCPServer):
        async def service_actions(self) -> None:
            await trio.sleep(1)

    for server_class in (Server, type("Concurrent", (NurseryMixIn, Server), {})):
        server = server_class(LOOPBACK, echo_all)
        async with server, trio.open_nursery() as nursery:
            await nursery.start(functools.partial(server.serve_forever, poll_interval=0))
            with trio.fail_after(10):
                assert await ask(server, b"ping") == b"ping"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("entered", [True, False])
@bounded
async def test_service_actions_that_fail_end_the_server(
    autojump_clock: Any, entered: bool
) -> None:
    class Server(NurseryTCPServer):
        async def service_actions(self) -> None:
            if self.statistics().active:
                raise LookupError("service_actions")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address) as client:
        with pytest.raises(LookupError, match="service_actions"):
            async with server if entered else nullcontext():
                await server.serve_forever()
        assert await receive_to_end(client) == b""
    assert server.statistics().cancelled == 1
    await server.server_close()


@bounded
async def test_service_actions_assigned_to_the_instance(autojump_clock: Any) -> None:
    ticks = []

    async def service_actions() -> None:
        ticks.append(trio.current_time())

    server = TCPServer(LOOPBACK, echo_all)
    server.service_actions = service_actions
    async with server:
        with trio.move_on_after(1.25):
            await server.serve_forever()
    assert ticks == [0.5, 1]


@pytest.mark.parametrize("hook", ["get_request", "verify_request", "process_request"])
@bounded
async def test_hooks_are_not_cut_short_by_any_interval(
    autojump_clock: Any, hook: str
) -> None:
    async def slow(self: Any, *args: Any) -> Any:
        await trio.sleep(10)
        return await getattr(NurseryTCPServer, hook)(self, *args)

    for server_class in (ticking(NurseryTCPServer), NurseryTCPServer):
        server = type("Server", (server_class,), {hook: slow})(LOOPBACK, echo_all)
        server.timeout = 1
        began = trio.current_time()
        with pose(server, b"ping") as client:
            async with server, trio.open_nursery() as nursery:
                if server_class is NurseryTCPServer:
                    await server.handle_request()
                else:
                    await nursery.start(server.serve_forever)
                assert await answer(client) == b"ping"
                assert trio.current_time() == began + 10
                nursery.cancel_scope.cancel()


# -- taking requests over ------------------------------------------------------------------


@all_servers
@bounded
async def test_a_request_may_be_processed_later_by_another_task(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    send, held = trio.open_memory_channel[Any](10)

    class Server(server_class):
        async def process_request(self, *request: Any) -> None:
            send.send_nowait((super().process_request, request))

    server = Server(bind_address(Server, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"one", tmp_path) as one, pose(server, b"two", tmp_path) as two:
            for _ in range(2):
                process_request, request = await held.receive()
                await trio.sleep(10)
                await process_request(*request)
            assert await answer(one) == b"one"
            assert await answer(two) == b"two"
        await server.shutdown()
    send.close()
    held.close()
    assert_sums_up(server)


@bounded
async def test_processing_one_request_does_not_hand_on_another(autojump_clock: Any) -> None:
    taken: list[Any] = []

    class Server(NurseryTCPServer):
        async def process_request(self, *request: Any) -> None:
            taken.append(request)
            if len(taken) == 2:
                await trio.sleep_forever()  # Until the loop is stopped.

        async def process_later(self, *request: Any) -> None:
            await super().process_request(*request)

    server = Server(LOOPBACK, echo_all)
    with pose(server, b"one") as one, pose(server, b"two") as two:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            await server.process_later(*taken[0])
            assert server.statistics().active == 2
            assert await answer(one) == b"one"
            assert server.statistics().active == 1
            await server.shutdown()
            # The loop still owned the second one.
            assert await answer(two) == b""
            assert server.statistics().cancelled == 1
    assert_sums_up(server)


@bounded
async def test_a_request_processed_twice_is_counted_twice(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        async def process_request(self, *request: Any) -> None:
            await super().process_request(*request)
            await super().process_request(*request)

    server = Server(LOOPBACK, echo_all)
    with errors_reported(Server), pose(server, b""):
        async with server:
            await server.handle_request()
            assert server.statistics().active == 2
    assert server.statistics().accepted == 2
    assert_sums_up(server)


@bounded
async def test_a_wrapped_request_can_be_processed(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        async def process_request(self, request: Any, client_address: Any) -> None:
            await super().process_request(Wrapped(request), client_address)

    server = Server(LOOPBACK, echo_all)
    with pose(server, b"ping") as client:
        await serve_one(server, wait_all_tasks_blocked)
        assert await answer(client) == b"ping"
    seen = server.statistics()
    assert (seen.accepted, seen.completed) == (1, 1)


@bounded
async def test_a_request_may_be_processed_by_a_task_of_its_hook(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        async def process_request(self, request: Any, client_address: Any) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(super().process_request, request, client_address)

    server = Server(LOOPBACK, echo_all)
    with pose(server, b"ping") as client:
        await serve_one(server, wait_all_tasks_blocked)
        assert await answer(client) == b"ping"
    seen = server.statistics()
    assert (seen.accepted, seen.completed) == (1, 1)


@bounded
async def test_process_request_needs_a_server_that_serves(autojump_clock: Any) -> None:
    server = NurseryTCPServer(LOOPBACK, echo_all)
    with pytest.raises(RuntimeError, match="process_request"):
        await server.process_request(None, None)
    async with server:
        await server.server_close()
        with pytest.raises(RuntimeError):
            await server.process_request(None, None)
    assert server.statistics().accepted == 0


@all_servers
@bounded
async def test_a_hook_of_the_loop_that_is_cancelled_drops_its_request(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Server(server_class):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            await trio.sleep_forever()
            return True

    server = Server(bind_address(Server, tmp_path), echo_all)
    with pose(server, b"ping", tmp_path) as client:
        async with server:
            with trio.move_on_after(1):
                await server.serve_forever()
            assert reply_now(client) == b""
    seen = server.statistics()
    assert (seen.accepted, seen.cancelled) == (1, 1)


# -- colour --------------------------------------------------------------------------------

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


@all_servers
def test_a_blocking_handler_is_refused(server_class: Any, tmp_path: Path) -> None:
    for handler in BLOCKING_HANDLERS:
        with pytest.raises(TypeError) as refused:
            server_class(bind_address(server_class, tmp_path), handler)
        message = str(refused.value)
        assert repr(handler) in message
        assert server_class.__name__ in message
        assert "ThreadingMixIn" in message
    assert not list(tmp_path.iterdir()), "it was refused before anything was bound"


@pytest.mark.parametrize("handler", BLOCKING_HANDLERS, ids=repr)
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


@pytest.mark.parametrize("handler", ASYNC_HANDLERS, ids=repr)
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
