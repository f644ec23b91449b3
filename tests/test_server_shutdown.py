"""shutdown() stops the loop of a server from wherever and whenever it is called."""

from __future__ import annotations

import functools
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import (
    answer,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    echo_all,
    pose,
    reply_now,
)
from lifecycles import (
    LOOP_HOOKS,
    LOOPBACK,
    REQUEST_HOOKS,
    all_servers,
    calling,
    entered_or_not,
    entering,
    serving,
    some_servers,
    tcp_servers,
)
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import NurseryTCPServer, TCPServer


@all_servers
@bounded
async def test_shutdown_waits_until_nothing_more_is_accepted(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping", tmp_path) == b"ping"
        await server.shutdown()
        with pose(server, b"late", tmp_path):
            await trio.sleep(10)
            assert server.statistics().accepted == 1
        nursery.start_soon(server.shutdown)  # After the stop it does nothing.
        await server.shutdown()


@entered_or_not
@pytest.mark.parametrize("times", [1, 3])
@bounded
async def test_shutdown_before_the_first_loop_is_remembered(
    autojump_clock: Any, entered: bool, times: int
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    with pose(server, b""):
        async with entering(server, entered):
            for _ in range(times):
                await server.shutdown()
            async with trio.open_nursery() as nursery:
                assert await nursery.start(server.serve_forever) == server.server_address
            assert server.statistics().accepted == 0
            # It was for that loop only.
            with trio.move_on_after(1) as served:
                await server.serve_forever()
            assert served.cancelled_caught
            assert server.statistics().accepted == 1
    await server.server_close()


@bounded
async def test_shutdown_before_entering_is_remembered(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    await server.shutdown()
    async with server:
        await server.serve_forever()
    assert trio.current_time() == 0


@bounded
async def test_shutdown_is_remembered_at_each_entering(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with serving(server):
        assert await ask(server, b"ping") == b"ping"
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    async with server:
        await server.shutdown()
        await server.serve_forever()
    assert trio.current_time() == 0


@entered_or_not
@bounded
async def test_a_remembered_shutdown_asks_nothing_of_the_listener(
    autojump_clock: Any, entered: bool
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    await server.shutdown()
    server.socket.close()
    async with entering(server, entered):
        await server.serve_forever()
        with pytest.raises(trio.ClosedResourceError):
            await server.serve_forever()


@bounded
async def test_shutdown_is_remembered_until_the_server_is_left(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with server:
        await server.shutdown()
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    async with serving(server):
        assert await ask(server, b"ping") == b"ping"


@bounded
async def test_shutdown_is_remembered_for_handle_request_too(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    with pose(server, b"ping") as client:
        async with server:
            await server.shutdown()
            await server.handle_request()
            assert server.statistics().accepted == 0
            await server.handle_request()
        assert reply_now(client) == b"ping"


@bounded
async def test_shutdown_is_not_remembered_after_a_loop_has_stopped(
    autojump_clock: Any,
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with serving(server):
        pass
    for _ in range(2):
        await server.shutdown()
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping") == b"ping"
        await server.server_close()


@bounded
async def test_a_cancelled_start_does_not_stop_the_next_loop(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    for entered in (False, False):
        with trio.move_on_after(0) as given_up:
            async with entering(server, entered):
                await server.serve_forever()
        assert given_up.cancelled_caught
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping") == b"ping"
        await server.server_close()


@all_servers
@entered_or_not
@bounded
async def test_shutdown_by_a_handler(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    async def last(request: Any, client_address: Any, server: Any) -> None:
        await server.shutdown()
        await server.shutdown()
        await echo_all(request, client_address, server)

    server = server_class(bind_address(server_class, tmp_path), last)
    with pose(server, b"ping", tmp_path) as client:
        async with entering(server, entered):
            await server.serve_forever()
            assert await answer(client) == b"ping"
    await server.server_close()
    assert server.statistics().completed == 1
    assert trio.current_time() == 0


@some_servers
@entered_or_not
@pytest.mark.parametrize("hook", [*LOOP_HOOKS, *REQUEST_HOOKS])
@bounded
async def test_shutdown_by_a_hook(
    autojump_clock: Any, server_class: Any, hook: str, entered: bool, tmp_path: Path
) -> None:
    async def fail(request: Any, client_address: Any, server: Any) -> None:
        await echo_all(request, client_address, server)
        raise ConnectionResetError

    log: list[str] = []
    server_class = calling(server_class, hook, "shutdown", log)
    handler = fail if hook == "handle_error" else echo_all
    server = server_class(bind_address(server_class, tmp_path), handler)
    with pose(server, b"ping", tmp_path) as client, pose(server, b"late", tmp_path) as late:
        async with entering(server, entered):
            await server.serve_forever()
            # Shutting down costs the request at hand nothing.
            assert await answer(client) == b"ping"
            accepted = server.statistics().accepted
            if hook in LOOP_HOOKS and hook != "service_actions":
                assert accepted == 1, "nothing is accepted once shutdown() has returned"
            await wait_all_tasks_blocked()
        if accepted == 1:
            await server.server_close()
            assert reply_now(late) == b""
    await server.server_close()
    assert log.count("called") == log.count("returned") > 0
    assert server.statistics().cancelled == 0
    assert_sums_up(server)


@bounded
async def test_shutdown_by_handle_timeout(autojump_clock: Any) -> None:
    log: list[str] = []
    server = calling(TCPServer, "handle_timeout", "shutdown", log)(LOOPBACK, echo_all)
    server.timeout = 3
    async with server:
        await server.handle_request()
    assert log == ["called", "returned"]
    assert trio.current_time() == 3


@tcp_servers
@bounded
async def test_shutdown_by_several_tasks_at_once(
    autojump_clock: Any, server_class: Any
) -> None:
    ended = []

    async def end(server: Any) -> None:
        await server.shutdown()
        ended.append(looping.is_set())

    async def loop(server: Any, task_status: Any) -> None:
        await server.serve_forever(task_status=task_status)
        looping.set()

    looping = trio.Event()
    server = server_class(LOOPBACK, echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: loop(server, task_status))
        for _ in range(10):
            nursery.start_soon(end, server)
    assert len(ended) == 10


@bounded
async def test_shutdown_waits_for_a_hook_that_cannot_be_cancelled(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            return True

    server = Server(LOOPBACK, echo_all)
    with pose(server, b""), pose(server, b""):
        async with serving(server):
            await wait_all_tasks_blocked()
            await server.shutdown()
            assert trio.current_time() == 10
            assert server.statistics().accepted == 1
            await trio.sleep(100)
            assert server.statistics().accepted == 1


@entered_or_not
@bounded
async def test_a_cancelled_shutdown_stops_the_loop_all_the_same(
    autojump_clock: Any, entered: bool
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with entering(server, entered), trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.shutdown()
        assert scope.cancelled_caught
    # The nursery has ended, so the loop has.
    await server.server_close()


@bounded
async def test_shutdown_by_a_worker_thread() -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        await trio.to_thread.run_sync(trio.from_thread.run, server.shutdown)
        await trio.to_thread.run_sync(
            functools.partial(trio.from_thread.run, server.server_close),
            abandon_on_cancel=True,
        )
        await request.sendall(b"closed")

    class Server(NurseryTCPServer):
        async def service_actions(self) -> None:
            if self.statistics().completed == 1:
                await trio.to_thread.run_sync(trio.from_thread.run, self.shutdown)

    for server_class in (TCPServer, NurseryTCPServer):
        server = server_class(LOOPBACK, handler)
        with pose(server, b"") as client:
            async with server:
                await server.serve_forever()
            assert await answer(client) == b"closed"
    server = Server(LOOPBACK, echo_all)
    with pose(server, b"ping") as client:
        async with server:
            await server.serve_forever(poll_interval=0.01)
        assert await answer(client) == b"ping"


@bounded
async def test_shutdown_by_a_foreign_thread() -> None:
    server = NurseryTCPServer(LOOPBACK, echo_all)
    token = trio.lowlevel.current_trio_token()
    thread = threading.Thread(
        target=lambda: trio.from_thread.run(server.shutdown, trio_token=token)
    )
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        thread.start()
    thread.join()
