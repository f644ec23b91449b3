"""What becomes of a hook that fails, and of what it was called for."""

from __future__ import annotations

import errno
import itertools
import logging
import socketserver
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    answer,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    connect,
    echo_all,
    pose,
    receive_to_end,
    reply_now,
)
from hooks import LOOPBACK, all_servers, errors_reported, serve_one
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import NurseryTCPServer, RequestTimeout, TCPServer


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
