"""Promises 1 and 2: an idle server costs nothing, and leaving it joins its requests."""

from __future__ import annotations

import collections
import contextlib
import math
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    assert_sums_up,
    bind_address,
    bounded,
    connect,
    is_refused,
    receive,
    receive_to_end,
)
from promises import (
    LOCALHOST,
    do_nothing,
    each_server,
    each_stream_server,
    each_tcp_server,
    instrumented,
)
from promises import log_everything as log_everything
from trio.lowlevel import checkpoint

from trio_socketserver import (
    BaseRequestHandler,
    NurseryTCPServer,
    StreamRequestHandler,
    TCPServer,
)

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
