"""Hooks: the stdlib's names, arguments and order, with the stdlib itself as the oracle."""

from __future__ import annotations

import socketserver
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    assert_sums_up,
    bind_address,
    blocking_twin,
    bounded,
    class_name,
    pose,
    reply_now,
)
from hooks import SERVERS, Wrapped, all_servers, serve_one
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import BaseRequestHandler, NurseryMixIn

SEQUENTIAL = [server for server in SERVERS if not issubclass(server, NurseryMixIn)]


# The scenarios below are compiled twice: as they are for our servers, and without
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
