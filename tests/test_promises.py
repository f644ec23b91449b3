"""The promises about cancellation, closing and errors, numbered as in the design.

Promises 4 and 5 are about threads and child processes and have files of their own.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import itertools
import logging
import math
import os
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    DATAGRAM_SERVERS,
    REAL_LIMIT,
    STREAM_SERVERS,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    close_with_reset,
    connect,
    datagram_client,
    is_refused,
    receive,
    receive_to_end,
)
from trio.lowlevel import checkpoint

from trio_socketserver import (
    BaseRequestHandler,
    DatagramRequestHandler,
    IncompleteRead,
    LineTooLong,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)

LOCALHOST = ("127.0.0.1", 0)
ALL_SERVERS = STREAM_SERVERS + DATAGRAM_SERVERS

each_server = pytest.mark.parametrize("server_class", ALL_SERVERS, ids=class_name)
each_stream_server = pytest.mark.parametrize("server_class", STREAM_SERVERS, ids=class_name)
each_tcp_server = pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer], ids=class_name
)


async def do_nothing(request: Any, client_address: Any, server: Any) -> None:
    """A handler."""


async def echo_lines(request: Any, client_address: Any, server: Any) -> None:
    """A handler that sends back what it gets."""
    while data := await request.receive_some():
        await request.send_all(data)


@contextlib.contextmanager
def instrumented(instrument: trio.abc.Instrument) -> Iterator[None]:
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


def records(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What has been logged: level and first line."""
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_socketserver")


# == 1. Idle shutdown takes milliseconds; an idle server makes no wake-ups ================


class Steps(trio.abc.Instrument):
    """Counts the steps of each task, and the times the run has waited for events."""

    def __init__(self) -> None:
        self.of: collections.Counter[trio.lowlevel.Task] = collections.Counter()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.of[task] += 1


@each_server
async def test_promise_1_an_idle_server_makes_no_wake_ups(
    server_class: type[Any], tmp_path: Path, mock_clock: trio.testing.MockClock
) -> None:
    async with (
        server_class(bind_address(server_class, tmp_path), do_nothing) as server,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(server.serve_forever)
        await trio.testing.wait_all_tasks_blocked()
        # Nothing is due, ever; so only a client, or a call of ours, can wake the server.
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
        steps = Steps()
        with instrumented(steps):
            mock_clock.jump(1_000_000)
            for _ in range(10):
                await checkpoint()
        assert set(steps.of) == {trio.lowlevel.current_task()}
        await server.shutdown()


async def test_promise_1_idle_connections_make_no_wake_ups(
    mock_clock: trio.testing.MockClock,
) -> None:
    class Lines(StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.rfile:
                await self.wfile.write(line)

    async with (
        NurseryTCPServer(LOCALHOST, Lines) as server,
        trio.open_nursery() as nursery,
    ):
        await nursery.start(server.serve_forever)
        with connect(server.server_address) as client:
            client.send(b"line\n")
            assert await receive(client) == b"line\n"
            await trio.testing.wait_all_tasks_blocked()
            assert trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
            steps = Steps()
            with instrumented(steps):
                mock_clock.jump(1_000_000)
                for _ in range(10):
                    await checkpoint()
            assert set(steps.of) == {trio.lowlevel.current_task()}
            await server.shutdown()


@each_server
@bounded
async def test_promise_1_idle_shutdown_waits_for_no_clock(
    server_class: type[Any], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with (
        server_class(bind_address(server_class, tmp_path), do_nothing) as server,
        trio.open_nursery() as nursery,
    ):
        for _ in range(3):
            await nursery.start(server.serve_forever)
            await trio.testing.wait_all_tasks_blocked()
            before = trio.current_time()
            steps = Steps()
            with trio.fail_after(60), instrumented(steps):
                await server.shutdown()
            assert trio.current_time() == before
            assert steps.of.total() < 10
    assert trio.current_time() == before


@pytest.mark.parametrize("poll_interval", [0.5, 2.0])
@bounded
async def test_promise_1_only_an_overridden_service_actions_ticks(
    poll_interval: float, autojump_clock: trio.testing.MockClock
) -> None:
    class Ticking(TCPServer):
        async def service_actions(self) -> None:
            ticks.append(trio.current_time() - start)

    ticks: list[float] = []
    start = trio.current_time()
    async with Ticking(LOCALHOST, do_nothing) as server:
        with trio.move_on_after(poll_interval * 4.5):
            await server.serve_forever(poll_interval)
    assert ticks == pytest.approx([poll_interval * n for n in (1, 2, 3, 4)])


# == 2. Leaving the block joins the requests ==============================================


class Sleeper(BaseRequestHandler):
    """Takes 100 s, and notes how it has ended."""

    async def handle(self) -> None:
        try:
            await trio.sleep(100)
        finally:
            self.server.ended_at = trio.current_time()


async def serve(server: Any) -> None:
    """Enter the server, and serve until something ends it."""
    async with server:
        await server.serve_forever()


@contextlib.asynccontextmanager
async def serving(server: Any) -> AsyncIterator[None]:
    """Enter the server, serve in a task beside the block, and shut down after it."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield
        await server.shutdown()


@contextlib.asynccontextmanager
async def one_request_running(
    server: Any, nursery: trio.Nursery
) -> AsyncIterator[socket.socket]:
    """Serve, and have one client connected whose request has begun."""
    await nursery.start(server.serve_forever)
    with connect(server.server_address) as client:
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().active == 1
        yield client


@each_tcp_server
@pytest.mark.parametrize(
    ("attributes", "lasts", "outcome"),
    [
        ({}, 100, "completed"),
        ({"block_on_close": False}, 0, "cancelled"),
        ({"graceful_timeout": 30}, 30, "cancelled"),
        ({"graceful_timeout": 0}, 0, "cancelled"),
        ({"graceful_timeout": 1000}, 100, "completed"),
        ({"graceful_timeout": 30, "block_on_close": False}, 0, "cancelled"),
    ],
)
@bounded
async def test_promise_2_leaving_joins_cancels_or_bounds(
    server_class: type[Any],
    tmp_path: Path,
    attributes: dict[str, Any],
    lasts: float,
    outcome: str,
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Sleeper)
    vars(server).update(attributes)
    async with trio.open_nursery() as nursery:
        async with server, one_request_running(server, nursery):
            left_at = trio.current_time()
            await server.shutdown()
            assert server.statistics().active == 1
        assert trio.current_time() - left_at == pytest.approx(lasts)
    assert server.ended_at - left_at == pytest.approx(lasts)
    assert getattr(server.statistics(), outcome) == 1
    assert_sums_up(server)


@each_tcp_server
@pytest.mark.parametrize(
    "attributes", [{}, {"block_on_close": False}, {"graceful_timeout": 30}], ids=str
)
@bounded
async def test_promise_2_closing_never_touches_the_body(
    server_class: type[Any],
    tmp_path: Path,
    attributes: dict[str, Any],
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Sleeper)
    vars(server).update(attributes)
    async with (
        trio.open_nursery() as nursery,
        server,
        one_request_running(server, nursery) as client,
    ):
        await server.server_close()
        assert server.statistics().active == 0
        closed_at = trio.current_time()
        assert await receive_to_end(client) == b""
        # The request has ended, by itself or by force; the body is free to go on.
        await trio.sleep(5)
        assert trio.current_time() == closed_at + 5
    assert_sums_up(server)


@each_stream_server
@bounded
async def test_promise_2_nobody_is_accepted_while_requests_are_joined(
    server_class: type[Any], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Sleeper)
    async with (
        trio.open_nursery() as nursery,
        server,
        one_request_running(server, nursery),
    ):
        nursery.start_soon(server.server_close)
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().active == 1
        assert server.fileno() == -1
        assert is_refused(server.server_address)


@each_stream_server
@bounded
async def test_promise_2_a_crash_inside_cancels_the_body(
    server_class: type[Any], tmp_path: Path
) -> None:
    async def crash(request: Any, client_address: Any, server: Any) -> None:
        raise error

    async def body() -> None:
        async with server:
            await server.handle_request()
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                body_was_cancelled.set()
                raise

    error = SystemExit("crash")
    body_was_cancelled = trio.Event()
    server = server_class(bind_address(server_class, tmp_path), crash)
    with (
        connect(server.server_address),
        pytest.raises(SystemExit) as caught,
    ):
        await body()
    assert caught.value is error
    assert body_was_cancelled.is_set()
    assert_sums_up(server)


# == 3. Whatever ends a request, it is finished, closed and counted =======================


class AtStep(trio.abc.Instrument):
    """Calls *action* before the step that follows *count* steps of the tasks watched."""

    def __init__(self, count: int, action: Callable[[], None], server: Any) -> None:
        self.count = count
        self.action = action
        self.server = server
        self.fired = False
        self.unwatched: set[trio.lowlevel.Task] = set()
        self.seen_active: set[int] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.seen_active.add(self.server.statistics().active)
        if self.fired or task in self.unwatched:
            return
        if not self.count:
            self.fired = True
            self.action()
        self.count -= 1


class VerifyWaits:
    async def verify_request(self, request: Any, client_address: Any) -> bool:
        await checkpoint()
        verdict = await super().verify_request(request, client_address)  # type: ignore[misc]
        await checkpoint()
        return verdict


class VerifyRefuses:
    async def verify_request(self, request: Any, client_address: Any) -> bool:
        await checkpoint()
        return False


class GetRequestWaits:
    async def get_request(self) -> tuple[Any, Any]:
        await checkpoint()
        return await super().get_request()  # type: ignore[misc]


class GetRequestWraps:
    async def get_request(self) -> tuple[Any, Any]:
        request, client_address = await super().get_request()  # type: ignore[misc]
        return trio.StapledStream(request, request), client_address


class ProcessWaits:
    async def process_request(self, request: Any, client_address: Any) -> None:
        await checkpoint()
        await super().process_request(request, client_address)  # type: ignore[misc]
        await checkpoint()


class FinishWaits:
    async def finish_request(self, request: Any, client_address: Any) -> None:
        await checkpoint()
        await super().finish_request(request, client_address)  # type: ignore[misc]
        await checkpoint()


class ShutdownWaits:
    async def shutdown_request(self, request: Any) -> None:
        await checkpoint()
        await super().shutdown_request(request)  # type: ignore[misc]
        await checkpoint()


class CloseWaits:
    async def close_request(self, request: Any) -> None:
        await checkpoint()
        await super().close_request(request)  # type: ignore[misc]
        await checkpoint()


class CloseFails:
    async def shutdown_request(self, request: Any) -> None:
        await checkpoint()
        raise ValueError("not closed")

    async def handle_error(self, request: Any, client_address: Any) -> None:
        await checkpoint()


class HandleErrorWaits:
    async def finish_request(self, request: Any, client_address: Any) -> None:
        await super().finish_request(request, client_address)  # type: ignore[misc]
        raise ValueError("a fault of ours")

    async def handle_error(self, request: Any, client_address: Any) -> None:
        await checkpoint()
        assert isinstance(sys.exception(), ValueError)
        await checkpoint()


class TimesOut:
    request_timeout = 1000.0


HOOKS: dict[str, tuple[type, ...]] = {
    "no_hook": (),
    "verify_request": (VerifyWaits,),
    "verify_request_refuses": (VerifyRefuses,),
    "get_request": (GetRequestWaits,),
    "get_request_wraps": (GetRequestWraps,),
    "process_request": (ProcessWaits,),
    "finish_request": (FinishWaits,),
    "shutdown_request": (ShutdownWaits,),
    "shutdown_request_fails": (CloseFails,),
    "close_request": (CloseWaits,),
    "handle_error": (HandleErrorWaits,),
    "request_timeout": (TimesOut,),
    "all_at_once": (
        TimesOut,
        VerifyWaits,
        GetRequestWaits,
        GetRequestWraps,
        ProcessWaits,
        FinishWaits,
        ShutdownWaits,
        CloseWaits,
        HandleErrorWaits,
    ),
}


def with_hooks(server_class: type[Any], hooks: str) -> type[Any]:
    mix_ins = HOOKS[hooks]
    if issubclass(server_class, UDPServer):
        mix_ins = tuple(hook for hook in mix_ins if hook is not GetRequestWraps)
    return type(f"With_{hooks}", (*mix_ins, server_class), {})


def noting_handler(base: type[Any], log: list[str]) -> type[Any]:
    """Make a handler with something to wait for in each phase, which notes them."""

    class Handler(base):  # type: ignore[misc]
        async def setup(self) -> None:
            await checkpoint()
            await super().setup()
            await checkpoint()
            log.append("set up")

        async def handle(self) -> None:
            if base is DatagramRequestHandler:
                self.wfile.write(self.rfile.read())
            else:
                async for line in self.rfile:
                    await self.wfile.write(line)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(checkpoint)
                nursery.start_soon(checkpoint)
            log.append("handled")

        async def finish(self) -> None:
            log.append("finish begins")
            await checkpoint()
            await super().finish()
            await checkpoint()
            log.append("finished")

    return Handler


async def converse(
    client: socket.socket,
    task_status: trio.TaskStatus[trio.lowlevel.Task] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Send two lines, each after the answer to the one before; then wait for the end."""
    task_status.started(trio.lowlevel.current_task())
    with contextlib.suppress(ConnectionError):
        for line in (b"one\n", b"two\n"):
            client.sendall(line)
            if await receive(client) != line:
                break
        else:
            client.shutdown(socket.SHUT_WR)
            await receive_to_end(client)
            return
    await receive_to_end(client)


async def talk_datagrams(
    client: socket.socket,
    task_status: trio.TaskStatus[trio.lowlevel.Task] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Send one datagram."""
    task_status.started(trio.lowlevel.current_task())
    client.sendall(b"one")


def open_files() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{number}")
        for number in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{number}")
    }


async def interrupted_at_step(
    count: int, server_class: type[Any], folder: Path, handler_log: list[str], how: str
) -> tuple[Any, bool]:
    """Take one request through its life, and interrupt it after *count* steps.

    Returns:
        The server, and whether the interruption came before the end.
    """
    datagrams = issubclass(server_class, UDPServer)
    handler = noting_handler(
        DatagramRequestHandler if datagrams else StreamRequestHandler, handler_log
    )
    open_before = open_files()
    tasks_before = trio.lowlevel.current_statistics().tasks_living
    server = server_class(bind_address(server_class, folder), handler)
    with datagram_client(server) if datagrams else connect(server.server_address) as client:
        async with trio.open_nursery() as clients:
            hard, soft = trio.CancelScope(), trio.CancelScope()
            at_step = AtStep(count, (hard if how == "hard" else soft).cancel, server)
            with instrumented(at_step):
                # Not itself interrupted: it waits for what the server owes a client,
                # which is at least the end of the connection.
                talk = talk_datagrams if datagrams else converse
                at_step.unwatched.add(await clients.start(talk, client))
                with hard:
                    async with server:
                        with soft:
                            await server.handle_request()
    assert server.fileno() == -1
    assert trio.lowlevel.current_statistics().tasks_living == tasks_before
    assert open_files() <= open_before
    assert at_step.seen_active <= {0, 1}
    return server, at_step.fired


# Every server with no hook and with all; each hook with one server of each kind.
SWEEPS = [
    (server_class, hooks)
    for hooks in HOOKS
    for server_class in (
        ALL_SERVERS
        if hooks in ("no_hook", "all_at_once")
        else (TCPServer, NurseryUnixStreamServer)
    )
]


@pytest.mark.parametrize(
    ("server_class", "hooks"),
    SWEEPS,
    ids=lambda it: it if isinstance(it, str) else it.__name__,
)
@bounded
async def test_promise_3_cancelled_at_every_step_of_a_request(
    server_class: type[Any], hooks: str, tmp_path: Path
) -> None:
    interrupted = True
    count = 0
    ways: set[tuple[str, ...]] = set()
    while interrupted:
        log: list[str] = []
        server, interrupted = await interrupted_at_step(
            count, with_hooks(server_class, hooks), tmp_path, log, "hard"
        )
        statistics = server.statistics()
        assert_sums_up(server)
        # finish() has run, to its end, if and only if setup() succeeded.
        assert log.count("finished") == log.count("finish begins") == log.count("set up")
        if statistics.completed:
            assert "handled" in log
        ways.add(tuple(log))
        count += 1
        assert count < 500
    assert count > 5
    assert () in ways
    if hooks == "verify_request_refuses":
        assert ways == {()}
        assert statistics.rejected == 1
        return
    # The last went through unharmed; the others have been stopped in each phase.
    assert log == ["set up", "handled", "finish begins", "finished"]
    assert ("set up", "finish begins", "finished") in ways
    fails = hooks in ("handle_error", "shutdown_request_fails", "all_at_once")
    assert (statistics.failed if fails else statistics.completed) == 1


@each_server
@bounded
async def test_promise_3_cancelled_accepting_harms_no_request(
    server_class: type[Any], tmp_path: Path
) -> None:
    interrupted = True
    count = 0
    accepted = set()
    while interrupted:
        log: list[str] = []
        server, interrupted = await interrupted_at_step(
            count, server_class, tmp_path, log, "soft"
        )
        statistics = server.statistics()
        assert statistics.completed == statistics.accepted
        assert (
            log == ["set up", "handled", "finish begins", "finished"] * statistics.accepted
        )
        accepted.add(statistics.accepted)
        count += 1
        assert count < 500
    assert accepted == {0, 1}


@each_stream_server
@bounded
async def test_promise_3_finish_is_shielded_and_can_say_goodbye(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Handler(StreamRequestHandler):
        async def handle(self) -> None:
            await self.wfile.write(b"hello ")
            await self.rfile.readline()

        async def finish(self) -> None:
            await checkpoint()
            await self.wfile.write(b"goodbye")
            await super().finish()

    server = server_class(bind_address(server_class, tmp_path), Handler)
    with connect(server.server_address) as client:
        with trio.CancelScope() as hard:
            async with serving(server):
                await receive(client, 6)
                hard.cancel()
                await trio.sleep_forever()
        assert await receive_to_end(client) == b"goodbye"
    assert server.statistics().cancelled == 1
    assert_sums_up(server)


@each_stream_server
@pytest.mark.parametrize("cancelled", [False, True], ids=["returned", "cancelled"])
@bounded
async def test_promise_3_finish_is_cut_after_cleanup_timeout(
    server_class: type[Any],
    cancelled: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Handler(BaseRequestHandler):
        async def handle(self) -> None:
            if cancelled:
                hard.cancel()
                await trio.sleep_forever()

        async def finish(self) -> None:
            await trio.sleep(1000)

    server = server_class(bind_address(server_class, tmp_path), Handler)
    server.cleanup_timeout = 7
    start = trio.current_time()
    with connect(server.server_address) as client:
        with trio.CancelScope() as hard:
            async with server:
                await server.handle_request()
        assert await receive_to_end(client) == b""
    assert trio.current_time() - start == pytest.approx(7)
    assert (server.statistics().cancelled, server.statistics().failed) == (
        (1, 0) if cancelled else (0, 1)
    )
    [(_, message)] = records(caplog)
    assert "finish() took longer than 7 s" in message


@each_stream_server
@bounded
async def test_promise_3_closing_is_cut_after_cleanup_timeout(
    server_class: type[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Hanging(server_class):  # type: ignore[misc]
        cleanup_timeout = 7

        async def shutdown_request(self, request: Any) -> None:
            await trio.sleep(1000)

    server = Hanging(bind_address(server_class, tmp_path), do_nothing)
    start = trio.current_time()
    with connect(server.server_address) as client:
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b""
    assert trio.current_time() - start == pytest.approx(7)
    assert server.statistics().failed == 1
    [(_, message)] = records(caplog)
    assert "closing took longer than 7 s" in message


@each_stream_server
@bounded
async def test_promise_3_a_failed_setup_is_not_finished_but_closed(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Handler(BaseRequestHandler):
        async def setup(self) -> None:
            raise ValueError("not set up")

        async def handle(self) -> None:
            called.append("handle")

        async def finish(self) -> None:
            called.append("finish")

    called: list[str] = []
    server = server_class(bind_address(server_class, tmp_path), Handler)
    with connect(server.server_address) as client:
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b""
    assert not called
    assert server.statistics().failed == 1


# == 6. Errors go to handle_error(), and interrupts end the server ========================

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


class Faulty:
    """A server that raises ``error``, once, at one place of a request's life."""

    error: BaseException | None = None
    seen: list[BaseException | None]
    finished = 0

    def __init__(self, place: str, server_address: Any = LOCALHOST) -> None:
        super().__init__(server_address, FaultyHandler)  # type: ignore[call-arg]
        self.place = place
        self.seen = []

    def reach(self, place: str) -> None:
        if place == self.place and self.error is not None:
            error, self.error = self.error, None
            raise error

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        self.reach("verify_request")
        return True

    async def process_request(self, request: Any, client_address: Any) -> None:
        self.reach("process_request")
        await super().process_request(request, client_address)  # type: ignore[misc]

    async def finish_request(self, request: Any, client_address: Any) -> None:
        self.reach("finish_request")
        await super().finish_request(request, client_address)  # type: ignore[misc]

    async def shutdown_request(self, request: Any) -> None:
        self.reach("shutdown_request")
        await super().shutdown_request(request)  # type: ignore[misc]

    async def close_request(self, request: Any) -> None:
        self.reach("close_request")
        await super().close_request(request)  # type: ignore[misc]

    async def handle_error(self, request: Any, client_address: Any) -> None:
        self.seen.append(sys.exception())
        self.reach("handle_error")


class FaultyTicking(Faulty):
    async def service_actions(self) -> None:
        self.reach("service_actions")


class FaultyHandler(StreamRequestHandler):
    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        super().__init__(request, client_address, server)
        server.reach("constructor")

    async def setup(self) -> None:
        await super().setup()
        self.server.reach("setup")

    async def handle(self) -> None:
        while line := await self.rfile.readline():
            await self.wfile.write(line)
            self.server.reach("handle")
            if line == b"fail\n":
                raise LookupError("the client has asked for it")

    async def finish(self) -> None:
        await super().finish()
        self.server.finished += 1
        self.server.reach("finish")


class FaultySequential(FaultyTicking, TCPServer):
    pass


class FaultyConcurrent(FaultyTicking, NurseryTCPServer):
    pass


each_faulty_server = pytest.mark.parametrize(
    "server_class", [FaultySequential, FaultyConcurrent], ids=class_name
)


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


class RaisingFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        self.asked = True
        raise ValueError("logging is broken")


@pytest.fixture
def broken_logging() -> Iterator[RaisingFilter]:
    logger = logging.getLogger("trio_socketserver")
    broken = RaisingFilter()
    logger.addFilter(broken)
    yield broken
    logger.removeFilter(broken)


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


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from leaves(member)
    else:
        yield error


# == 7. What the default handle_error() logs ==============================================


async def assert_still_serves(server: Any) -> None:
    """A fresh client is accepted, and let go again."""
    before = server.statistics()
    with connect(server.server_address) as client:
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().accepted == before.accepted + 1
        client.shutdown(socket.SHUT_WR)
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics().peer_errors == before.peer_errors


class ReadLine(StreamRequestHandler):
    async def handle(self) -> None:
        if line := await self.rfile.readline():
            self.server.got = line


class ReadLineInTime(ReadLine):
    timeout = 10


class ReadExactly(StreamRequestHandler):
    async def handle(self) -> None:
        if await self.rfile.peek():
            await self.rfile.readexactly(10)


class WriteMuch(StreamRequestHandler):
    async def handle(self) -> None:
        if await self.rfile.readline():
            await self.wfile.write(bytes(20_000_000))


class WriteMuchInTime(WriteMuch):
    timeout = 10


class WriteAtTheEnd(StreamRequestHandler):
    wbufsize = -1

    async def handle(self) -> None:
        if await self.rfile.readline():
            await self.wfile.write(b"answer")
            await self.server.client_has_gone.wait()


class WriteAndRead(StreamRequestHandler):
    """Both ``handle()`` and ``finish()`` meet the peer's reset."""

    wbufsize = -1

    async def handle(self) -> None:
        await self.wfile.write(b"answer")
        await self.rfile.readline()


class InNursery(StreamRequestHandler):
    """Reads and writes side by side, so that a reset comes as a group."""

    async def read(self) -> None:
        with trio.CancelScope(shield=True):
            await self.rfile.readline()

    async def write(self) -> None:
        with trio.CancelScope(shield=True):
            await self.wfile.write(bytes(20_000_000))

    async def handle(self) -> None:
        if await self.rfile.readline():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.read)
                nursery.start_soon(self.write)


async def reset_at_once(client: socket.socket) -> None:
    close_with_reset(client)


async def reset_mid_line(client: socket.socket) -> None:
    client.sendall(b"half")
    await trio.testing.wait_all_tasks_blocked()
    close_with_reset(client)


async def reset_after_line(client: socket.socket) -> None:
    client.sendall(b"line\n")
    await trio.testing.wait_all_tasks_blocked()
    close_with_reset(client)


async def send_half_and_finish(client: socket.socket) -> None:
    client.sendall(b"half")
    client.shutdown(socket.SHUT_WR)
    await receive_to_end(client)


async def send_half_and_stay(client: socket.socket) -> None:
    client.sendall(b"half")
    await receive_to_end(client)


async def send_line_and_never_read(client: socket.socket) -> None:
    client.sendall(b"line\n")
    await trio.sleep(1000)


async def send_a_long_line(client: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        client.sendall(bytes(200_000))
    await receive_to_end(client)


PEER_FAULTS: dict[
    str, tuple[type[Any], Callable[..., Awaitable[None]], dict[str, Any], str]
]
PEER_FAULTS = {
    "reset_before_the_first_byte": (ReadLine, reset_at_once, {}, "ConnectionBroken"),
    "reset_mid_line": (ReadLine, reset_mid_line, {}, "ConnectionBroken"),
    "reset_while_we_write": (WriteMuch, reset_after_line, {}, "ConnectionBroken"),
    "reset_while_we_read_and_write": (
        InNursery,
        reset_after_line,
        {},
        "ConnectionBroken",
    ),
    "reset_while_we_flush": (WriteAtTheEnd, reset_after_line, {}, "ConnectionBroken"),
    "reset_mid_line_and_flush": (WriteAndRead, reset_mid_line, {}, "ConnectionBroken"),
    "short_read": (ReadExactly, send_half_and_finish, {}, "IncompleteRead"),
    "silence": (ReadLineInTime, send_half_and_stay, {}, "RequestTimeout"),
    "does_not_read": (WriteMuchInTime, send_line_and_never_read, {}, "RequestTimeout"),
    "takes_too_long": (
        ReadLine,
        send_half_and_stay,
        {"request_timeout": 20},
        "RequestTimeout",
    ),
    "long_line": (ReadLine, send_a_long_line, {"max_line_size": 1000}, "LineTooLong"),
}


@each_tcp_server
@pytest.mark.parametrize("fault", PEER_FAULTS)
@bounded
async def test_promise_7_a_fault_of_the_peer_is_one_quiet_line(
    server_class: type[Any],
    fault: str,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    base, behave, attributes, name = PEER_FAULTS[fault]
    handler = type(base.__name__, (base,), {"max_line_size": 100_000})
    if "max_line_size" in attributes:
        handler.max_line_size = attributes["max_line_size"]
    server = server_class(LOCALHOST, handler)
    vars(server).update(attributes)
    server.client_has_gone = trio.Event()
    async with serving(server):
        with connect(server.server_address) as client:
            address = client.getsockname()
            await behave(client)
        server.client_has_gone.set()
        await trio.testing.wait_all_tasks_blocked()
        [(level, message)] = records(caplog)
        assert level == "INFO"
        assert f"{address!r}: {name}: " in message
        assert "\n" not in message
        assert caplog.records[0].exc_info is None
        statistics = server.statistics()
        assert (statistics.failed, statistics.peer_errors) == (1, 1)
        await assert_still_serves(server)
    assert_sums_up(server)


@each_tcp_server
@bounded
async def test_promise_7_a_reset_that_nobody_notices_is_no_line(
    server_class: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        await request.receive_some()
        close_with_reset(client)

    server = server_class(LOCALHOST, handler)
    async with server:
        client = connect(server.server_address)
        client.sendall(b"x")
        await server.handle_request()
    assert not caplog.records
    assert server.statistics().completed == 1


@each_stream_server
@bounded
async def test_promise_7_a_half_close_is_no_fault(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_class(bind_address(server_class, tmp_path), ReadLine)
    async with serving(server):
        with connect(server.server_address) as client:
            await send_half_and_finish(client)
    assert server.got == b"half"
    assert not caplog.records
    assert server.statistics().completed == 1


PEER, OURS = ConnectionResetError("gone"), ValueError("ours")


@pytest.mark.parametrize(
    ("error", "quiet"),
    [
        (PEER, True),
        (BrokenPipeError(), True),
        (ConnectionAbortedError(), True),
        (TimeoutError("slow"), True),
        (trio.TooSlowError(), False),
        (trio.BrokenResourceError("broken"), True),
        (LineTooLong("long"), True),
        (IncompleteRead("short", b""), True),
        (ExceptionGroup("peers", [PEER, ExceptionGroup("inner", [TimeoutError()])]), True),
        (ExceptionGroup("both", [PEER, ExceptionGroup("inner", [OURS])]), False),
        (OURS, False),
        (EOFError(), False),
        (OSError(errno.ENOENT, "no such file"), False),
        # A backend of the handler's is not the peer.
        (ConnectionRefusedError(), False),
    ],
    ids=repr,
)
@bounded
async def test_promise_7_whose_fault_it_is(
    error: Exception, quiet: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        raise error

    server = NurseryTCPServer(LOCALHOST, handler)
    with connect(server.server_address):
        async with server:
            await server.handle_request()
    [record] = caplog.records
    if quiet:
        assert record.levelname == "INFO"
        assert record.exc_info is None
    else:
        assert record.levelname == "ERROR"
        assert record.exc_info is not None
        assert record.exc_info[1] is error
    assert server.statistics().peer_errors == quiet
    assert server.statistics().failed == 1


@bounded
async def test_promise_7_a_peer_is_blamed_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Server(NurseryTCPServer):
        async def shutdown_request(self, request: Any) -> None:
            await trio.sleep(1000)

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError

    server = Server(LOCALHOST, handler)
    with connect(server.server_address):
        async with server:
            await server.handle_request()
    statistics = server.statistics()
    assert (statistics.failed, statistics.peer_errors) == (1, 1)


# == 8. Errors of the server itself, and of the body ======================================


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


# == 9. Errors of accept() ================================================================


class Flaky:
    """A server whose next attempts to accept fail with ``errors``."""

    def __init__(self, server_address: Any, handler: Any) -> None:
        super().__init__(server_address, handler)  # type: ignore[call-arg]
        self.errors: collections.deque[OSError] = collections.deque()
        self.attempts: list[float] = []

    async def get_request(self) -> tuple[Any, Any]:
        self.attempts.append(trio.current_time())
        if self.errors:
            raise self.errors.popleft()
        return await super().get_request()  # type: ignore[misc]


def flaky(server_class: type[Any]) -> type[Any]:
    return type(f"Flaky{server_class.__name__}", (Flaky, server_class), {})


def system_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def knock(server: Any, client: socket.socket | None = None) -> socket.socket:
    """Make the server's socket readable, for one request."""
    if not issubclass(type(server), UDPServer):
        return connect(server.server_address)
    if client is None:
        client = datagram_client(server)
    client.send(b"x")
    return client


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EIO"])
@bounded
async def test_promise_9_a_shortage_backs_off_and_recovers(
    server_class: type[Any],
    name: str,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = flaky(server_class)(LOCALHOST, do_nothing)
    delays = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1]
    async with serving(server):
        server.errors.extend([system_error(name)] * len(delays))
        with knock(server):
            await trio.sleep(60)
        assert gaps(server.attempts)[: len(delays)] == pytest.approx(delays)
        # Afterwards nothing is tried until a client comes.
        assert server.attempts[-1] - server.attempts[len(delays)] < 0.01
        assert server.statistics().completed == 1
        assert server.statistics().accept_errors == len(delays)
        assert len(caplog.records) == 1
        # Success has ended the episode: the next begins small, and is told again.
        server.attempts.clear()
        server.errors.extend([system_error(name)] * 2)
        with knock(server):
            await trio.sleep(60)
        assert gaps(server.attempts)[:2] == pytest.approx([0.01, 0.02])
    assert server.statistics().completed == 2
    assert server.statistics().accept_errors == len(delays) + 2
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert os.strerror(getattr(errno, name)) in caplog.records[0].getMessage()
    assert caplog.records[0].exc_info is None


@bounded
async def test_promise_9_an_error_of_one_connection_does_not_end_an_episode(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    server = flaky(NurseryTCPServer)(LOCALHOST, do_nothing)
    names = ["EMFILE", "EMFILE", "ECONNABORTED", "EMFILE"]
    server.errors.extend(map(system_error, names))
    async with serving(server):
        with knock(server):
            await trio.sleep(60)
    assert [delay for delay in gaps(server.attempts) if delay > 0.001] == pytest.approx(
        [0.01, 0.02, 0.04]
    )
    assert len(caplog.records) == 1


@bounded
async def test_promise_9_broken_logging_does_not_end_the_server(
    broken_logging: RaisingFilter, autojump_clock: trio.testing.MockClock
) -> None:
    server = flaky(NurseryTCPServer)(LOCALHOST, do_nothing)
    server.errors.extend([system_error("EMFILE")] * 3)
    async with serving(server):
        with knock(server):
            await trio.sleep(60)
    assert broken_logging.asked
    assert server.statistics().completed == 1
    assert gaps(server.attempts)[:3] == pytest.approx([0.01, 0.02, 0.04])


@bounded
async def test_promise_9_shutdown_does_not_wait_for_the_back_off(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = flaky(NurseryTCPServer)(LOCALHOST, do_nothing)
    server.errors.extend([system_error("EMFILE")] * 100)
    async with serving(server):
        with knock(server):
            await trio.sleep(60)
            before = trio.current_time()
            await server.shutdown()
            assert trio.current_time() == before


@bounded
async def test_promise_9_handle_request_backs_off_within_its_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Server(flaky(TCPServer)):  # type: ignore[misc]
        timeout = 5

        async def handle_timeout(self) -> None:
            timed_out.append(trio.current_time())

    timed_out: list[float] = []
    start = trio.current_time()
    async with Server(LOCALHOST, do_nothing) as server:
        server.errors.extend([system_error("EMFILE")] * 100)
        with knock(server):
            await server.handle_request()
            assert timed_out == pytest.approx([start + 5])
            server.errors.clear()
            await server.handle_request()
    assert server.statistics().completed == 1


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@bounded
async def test_promise_9_an_error_of_one_connection_is_passed_over(
    server_class: type[Any],
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    names = (
        "ECONNABORTED ECONNRESET EPERM EPROTO ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET "
        "EHOSTUNREACH ENETUNREACH ETIMEDOUT ECONNREFUSED EMSGSIZE EINTR"
    )
    errors = [
        *map(system_error, names.split()),
        ConnectionError("of an override"),
        TimeoutError("of an override"),
        ssl.SSLError(errno.EMFILE, "whose errno is a code of its own"),
    ]
    server = flaky(server_class)(LOCALHOST, do_nothing)
    server.errors.extend(errors)
    async with serving(server):
        start = trio.current_time()
        with knock(server):
            await trio.testing.wait_all_tasks_blocked()
            assert trio.current_time() - start < 0.001
            assert server.statistics().completed == 1
            assert server.statistics().accept_errors == len(errors)
    assert not caplog.records


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@pytest.mark.parametrize("name", ["EBADF", "EINVAL", "ENOTSOCK", "EOPNOTSUPP", "EFAULT"])
@bounded
async def test_promise_9_an_unusable_listener_propagates(
    server_class: type[Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = flaky(server_class)(LOCALHOST, do_nothing)
    error = system_error(name)
    server.errors.append(error)
    with (
        knock(server),
        pytest.raises(OSError, match=os.strerror(getattr(errno, name))) as caught,
    ):
        await serve(server)
    assert caught.value is error
    assert server.fileno() == -1
    assert server.statistics().accept_errors == 1
    assert not caplog.records


@bounded
async def test_promise_9_a_socket_that_does_not_listen_is_unusable() -> None:
    # The kernel reports such a socket as readable ("hung up").
    with socket.socket() as sock:
        sock.bind(LOCALHOST)
        server = TCPServer.from_socket(sock, do_nothing)
        with (
            pytest.raises(OSError, match="Invalid argument") as caught,
        ):
            await serve(server)
    assert caught.value.errno == errno.EINVAL


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Lower this process's limit to the descriptors that are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "server_class", [NurseryTCPServer, NurseryUnixStreamServer], ids=class_name
)
@bounded
async def test_promise_9_really_out_of_descriptors(
    server_class: type[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_lines)
    gc.collect()  # What it would close now and then, must not give a descriptor back.
    async with serving(server):
        with (
            connect(server.server_address) as served_already,
            socket.socket(server_class.address_family) as unlucky,
        ):
            served_already.sendall(b"before")
            assert await receive(served_already) == b"before"
            with no_descriptors_left():
                unlucky.connect(server.server_address)
                unlucky.sendall(b"let me in")
                for _ in range(10):
                    await trio.sleep(1)
                    # The one that is here does not notice.
                    served_already.sendall(b"meanwhile")
                    assert await receive(served_already) == b"meanwhile"
                assert server.statistics().accepted == 1
                # 10 ms to 640 ms, then once a second.
                assert 12 <= server.statistics().accept_errors <= 17
                assert len(caplog.records) == 1
            await trio.sleep(1)
            unlucky.setblocking(False)
            assert unlucky.recv(100) == b"let me in"
    [(level, message)] = records(caplog)
    assert level == "ERROR"
    assert "Too many open files" in message
    assert_sums_up(server)


# == 10. Nothing accepted is ownerless, and no loop starves the program ===================


class LoopSteps(trio.abc.Instrument):
    """Counts, for each step of the loop's task, the requests that it takes.

    Attributes:
        batches: those counts.
        others: the tasks that have run before each of those steps, since the one before.
    """

    def __init__(self) -> None:
        self.loop: trio.lowlevel.Task | None = None
        self.batches: list[int] = []
        self.others: list[set[trio.lowlevel.Task]] = []
        self._others: set[trio.lowlevel.Task] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.loop:
            self.batches.append(0)
            self.others.append(self._others)
            self._others = set()
        else:
            self._others.add(task)


async def metronome(task_status: trio.TaskStatus[trio.lowlevel.Task]) -> None:
    """Run whenever the loop lets other tasks run."""
    task_status.started(trio.lowlevel.current_task())
    while True:
        await checkpoint()


@pytest.mark.parametrize(
    "server_class",
    [NurseryTCPServer, NurseryUnixStreamServer, NurseryUDPServer],
    ids=class_name,
)
@pytest.mark.parametrize("verdict", [True, False], ids=["handled", "rejected"])
@bounded
async def test_promise_10_at_most_64_requests_per_wake_up(
    server_class: type[Any], verdict: bool, tmp_path: Path
) -> None:
    class Server(server_class):  # type: ignore[misc]
        request_queue_size = 200

        async def get_request(self) -> tuple[Any, Any]:
            steps.loop = trio.lowlevel.current_task()
            if not steps.batches:
                steps.batches.append(0)
            taken = await super().get_request()
            steps.batches[-1] += 1
            return taken

        async def verify_request(self, request: Any, client_address: Any) -> bool:
            return verdict

    steps = LoopSteps()
    server = Server(bind_address(server_class, tmp_path), do_nothing)
    with contextlib.ExitStack() as clients:
        if issubclass(server_class, UDPServer):
            client = clients.enter_context(datagram_client(server))
            for _ in range(150):
                client.send(b"x")
        else:
            for _ in range(150):
                clients.enter_context(connect(server.server_address))
        with instrumented(steps):
            async with trio.open_nursery() as nursery:
                beat = await nursery.start(metronome)
                async with serving(server):
                    while server.statistics().accepted < 150:
                        await checkpoint()
                nursery.cancel_scope.cancel()
    assert [batch for batch in steps.batches if batch] == [64, 64, 22]
    # Between them every task that could run has had its turn. (trio shuffles each round of
    # tasks, so that it may come first in one and last in the next.)
    assert len(steps.others) >= 3
    for others, more in itertools.pairwise(steps.others):
        assert beat in others | more
    assert server.statistics().active == 0
    assert server.statistics().rejected == (0 if verdict else 150)
    assert_sums_up(server)


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@bounded
async def test_promise_10_endless_errors_do_not_starve_the_program(
    server_class: type[Any],
) -> None:
    class Server(server_class):  # type: ignore[misc]
        async def get_request(self) -> tuple[Any, Any]:
            raise system_error("ECONNABORTED")

    server = Server(LOCALHOST, do_nothing)
    with knock(server):
        async with serving(server):
            while server.statistics().accept_errors < 200:
                before = server.statistics().accept_errors
                await checkpoint()
                assert server.statistics().accept_errors - before <= 64


@pytest.mark.parametrize("how", ["shutdown", "server_close"])
@each_server
@bounded
async def test_promise_10_stopped_at_every_step_nothing_accepted_is_lost(
    server_class: type[Any], how: str, tmp_path: Path
) -> None:
    async def be_client() -> None:
        await (talk_datagrams if datagrams else converse)(client)
        await trio.testing.wait_all_tasks_blocked()
        now.set()

    async def stop() -> None:
        await now.wait()
        await getattr(server, how)()

    datagrams = issubclass(server_class, UDPServer)
    base = DatagramRequestHandler if datagrams else StreamRequestHandler
    accepted = set()
    count = 0
    stopped = True
    while stopped:
        log: list[str] = []
        address = bind_address(server_class, tmp_path)
        server = server_class(address, noting_handler(base, log))
        now = trio.Event()
        at_step = AtStep(count, now.set, server)
        with (
            (
                datagram_client(server) if datagrams else connect(server.server_address)
            ) as client,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(be_client)
                with instrumented(at_step):
                    async with server:
                        nursery.start_soon(stop)
                        await server.serve_forever()
        stopped = at_step.fired
        statistics = server.statistics()
        assert statistics.completed == statistics.accepted
        assert (
            log == ["set up", "handled", "finish begins", "finished"] * statistics.accepted
        )
        accepted.add(statistics.accepted)
        count += 1
        assert count < 500
    assert count > 5
    assert 1 in accepted
