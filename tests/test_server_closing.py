"""server_close() and leaving the block close everything, waiting as long as promised."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import (
    STREAM_SERVERS,
    answer,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    echo_all,
    is_refused,
    pose,
    receive_to_end,
    reply_now,
)
from lifecycles import (
    LOOP_HOOKS,
    LOOPBACK,
    REQUEST_HOOKS,
    SERVERS,
    Gate,
    all_servers,
    calling,
    entered_or_not,
    entering,
    serving,
    some_servers,
    stuck,
    tcp_servers,
)
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import NurseryMixIn, NurseryTCPServer, TCPServer

CONCURRENT = [server for server in SERVERS if issubclass(server, NurseryMixIn)]
stream_servers = pytest.mark.parametrize("server_class", STREAM_SERVERS, ids=class_name)


@all_servers
@bounded
async def test_server_close_without_entering(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    for _ in range(3):
        await server.server_close()
        assert server.fileno() == -1
    assert list(tmp_path.iterdir()) == []


@all_servers
@entered_or_not
@bounded
async def test_server_close_while_serving(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with entering(server, entered), trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping", tmp_path) == b"ping"
        for _ in range(3):
            await server.server_close()
            assert server.fileno() == -1
            assert server.draining.is_set()
    await server.server_close()


@stream_servers
@entered_or_not
@bounded
async def test_server_close_waits_for_the_requests(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    gate = Gate()
    server = server_class(bind_address(server_class, tmp_path), gate)
    closed = []

    async def close() -> None:
        await server.server_close()
        closed.append(trio.current_time())

    with pose(server, b"ping") as client:
        async with entering(server, entered), trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            nursery.start_soon(close)
            nursery.start_soon(close)
            await trio.sleep(10)
            assert not closed
            assert server.fileno() == -1
            assert is_refused(server.server_address)
            gate.opened.set()
        assert await answer(client) == b"ping"
    assert closed == [10, 10]


@pytest.mark.parametrize("server_class", CONCURRENT, ids=class_name)
@bounded
async def test_replies_are_sent_while_closing(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    """What closing waits for is worth waiting for, datagrams included."""
    gate = Gate()
    server = server_class(bind_address(server_class, tmp_path), gate)
    with pose(server, b"ping", tmp_path) as client:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            nursery.start_soon(server.server_close)
            await wait_all_tasks_blocked()
            gate.opened.set()
        assert reply_now(client) == b"ping"
    assert server.fileno() == -1
    assert server.statistics().completed == 1


@tcp_servers
@bounded
async def test_server_close_closes_even_while_a_loop_alone_waits_for_its_requests(
    autojump_clock: Any, server_class: Any
) -> None:
    gate = Gate()
    server = server_class(LOOPBACK, gate)
    with pose(server, b"ping") as client:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            await server.shutdown()
            assert server.fileno() != -1
            nursery.start_soon(server.server_close)
            await wait_all_tasks_blocked()
            assert server.fileno() == -1
            gate.opened.set()
        assert await answer(client) == b"ping"
    assert server.fileno() == -1


@all_servers
@entered_or_not
@bounded
async def test_server_close_by_a_handler(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    async def last(request: Any, client_address: Any, server: Any) -> None:
        for _ in range(3):
            await server.server_close()
        log.append("returned")
        await trio.sleep(10)
        log.append("awake")

    log: list[str] = []
    server = server_class(bind_address(server_class, tmp_path), last)
    with pose(server, b"ping", tmp_path):
        async with entering(server, entered):
            await server.serve_forever()
    assert log == ["returned", "awake"]
    assert server.fileno() == -1
    assert server.statistics().completed == 1


@bounded
async def test_server_close_by_a_task_that_a_request_has_started(
    autojump_clock: Any,
) -> None:
    async def close(server: Any, how: str) -> None:
        await server.server_close()
        log.append(how)

    async def last(request: Any, client_address: Any, server: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close, server, "in the request's nursery")
        outside.start_soon(close, server, "in another nursery")
        await trio.sleep(10)
        log.append("request")

    log: list[str] = []
    server = NurseryTCPServer(LOOPBACK, last)
    with pose(server, b"ping"):
        async with trio.open_nursery() as outside, server:
            await server.serve_forever()
    assert log == ["in the request's nursery", "in another nursery", "request"]
    assert server.fileno() == -1


@bounded
async def test_server_close_of_another_server_by_a_request_waits(
    autojump_clock: Any,
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(10)

    async def close_other(request: Any, client_address: Any, server: Any) -> None:
        await other.server_close()
        await request.sendall(b"%d" % trio.current_time())

    other = NurseryTCPServer(LOOPBACK, slow)
    server = NurseryTCPServer(LOOPBACK, close_other)
    with pose(other, b""):
        async with serving(other), serving(server):
            await wait_all_tasks_blocked()
            assert await ask(server, b"") == b"10"


@some_servers
@entered_or_not
@pytest.mark.parametrize("hook", [*LOOP_HOOKS, *REQUEST_HOOKS])
@bounded
async def test_server_close_by_a_hook(
    autojump_clock: Any, server_class: Any, hook: str, entered: bool, tmp_path: Path
) -> None:
    async def fail(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError

    log: list[str] = []
    server_class = calling(server_class, hook, "server_close", log)
    handler = fail if hook == "handle_error" else echo_all
    server = server_class(bind_address(server_class, tmp_path), handler)
    with pose(server, b"ping", tmp_path), pose(server, b"late", tmp_path):
        async with entering(server, entered):
            await server.serve_forever()
    assert log.count("called") == log.count("returned") > 0
    assert server.fileno() == -1
    assert server.statistics().cancelled == 0
    assert_sums_up(server)


@entered_or_not
@bounded
async def test_a_cancelled_server_close_closes_all_the_same(
    autojump_clock: Any, entered: bool
) -> None:
    gate = Gate()
    server = NurseryTCPServer(LOOPBACK, gate)
    with pose(server, b"ping") as client:
        async with entering(server, entered), trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                scope.cancel()
                await server.server_close()
            assert scope.cancelled_caught
            await wait_all_tasks_blocked()
            assert server.fileno() == -1
            assert server.statistics().active == 1
            gate.opened.set()
        assert await answer(client) == b"ping"


@bounded
async def test_a_cancelled_server_close_of_an_idle_server(autojump_clock: Any) -> None:
    server = NurseryTCPServer(LOOPBACK, echo_all)
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.server_close()
    assert server.fileno() == -1


@entered_or_not
@bounded
async def test_server_close_before_the_first_loop(
    autojump_clock: Any, entered: bool
) -> None:
    """It implies shutdown(), which is remembered: the loop says started() and returns."""
    server = TCPServer(LOOPBACK, echo_all)
    if entered:
        async with server, trio.open_nursery() as nursery:
            await server.server_close()
            assert await nursery.start(server.serve_forever) == server.server_address
    else:
        await server.server_close()
        with pytest.raises(trio.ClosedResourceError):
            await server.serve_forever()


@bounded
async def test_no_loop_after_server_close(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        await server.server_close()
        for loop in (server.serve_forever, server.handle_request):
            with pytest.raises(RuntimeError, match="clos"):
                await loop()


@pytest.mark.parametrize("ending", ["leave", "server_close"])
@bounded
async def test_block_on_close_false_cancels_the_requests(
    autojump_clock: Any, ending: str
) -> None:
    for server_class in (TCPServer, NurseryTCPServer):
        server = server_class(LOOPBACK, stuck)
        server.block_on_close = False
        with connect(server.server_address) as client:
            async with server, trio.open_nursery() as nursery:
                await nursery.start(server.serve_forever)
                await wait_all_tasks_blocked()
                assert server.statistics().active == 1
                await (server.shutdown() if ending == "leave" else server.server_close())
            assert await receive_to_end(client) == b""
        assert server.statistics().cancelled == 1
    assert trio.current_time() == 0


@pytest.mark.parametrize("graceful_timeout", [0, 7, math.inf])
@bounded
async def test_graceful_timeout_bounds_the_waiting(
    autojump_clock: Any, graceful_timeout: float
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(int(await request.recv(10)))
        await request.sendall(b"done")

    server = NurseryTCPServer(LOOPBACK, slow)
    with pose(server, b"5") as quick, pose(server, b"100") as long:
        async with serving(server):
            await wait_all_tasks_blocked()
            server.graceful_timeout = graceful_timeout  # It is read when closing begins.
        assert trio.current_time() == min(graceful_timeout, 100)
        assert reply_now(quick) == (b"done" if graceful_timeout >= 5 else b"")
        assert reply_now(long) == (b"done" if graceful_timeout >= 100 else b"")


@bounded
async def test_neither_closing_option_touches_the_body(autojump_clock: Any) -> None:
    for option, value in (("block_on_close", False), ("graceful_timeout", 1)):
        server = NurseryTCPServer(LOOPBACK, stuck)
        setattr(server, option, value)
        with connect(server.server_address):
            async with server:
                await server.handle_request()
                await server.server_close()
                await trio.sleep(10)
                assert server.statistics().cancelled == 1


@bounded
async def test_closing_waits_for_a_stuck_hook_as_long_as_for_any_cleanup(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        cleanup_timeout = 3

        async def verify_request(self, request: Any, client_address: Any) -> bool:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            return True

    for leave_first in (False, True):
        server = Server(LOOPBACK, echo_all)
        began = trio.current_time()
        with connect(server.server_address) as client:
            async with trio.open_nursery() as nursery:
                async with server:
                    await nursery.start(server.serve_forever)
                    await wait_all_tasks_blocked()
                    if not leave_first:
                        await server.server_close()
                        assert trio.current_time() == began + 3
                        assert server.fileno() == -1
                assert trio.current_time() == began + 3
                assert server.fileno() == -1
                if leave_first:
                    with pytest.raises(RuntimeError):
                        async with server:
                            pytest.fail("the old loop is still there")
            assert trio.current_time() == began + 10
            # It was accepted too late to be handled, but it was not forgotten.
            assert await receive_to_end(client) == b""
        assert_sums_up(server)


@bounded
async def test_leaving_while_get_request_is_stuck(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        cleanup_timeout = 3

        async def get_request(self) -> tuple[Any, Any]:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            return await super().get_request()

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address):
        async with serving(server):
            await wait_all_tasks_blocked()
            await server.server_close()
            assert trio.current_time() == 3
    assert trio.current_time() == 10
    assert server.statistics().accept_errors == 0
