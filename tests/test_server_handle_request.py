"""handle_request() handles one request, or gives up when its time is over."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import ExitStack
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
    connect,
    echo_all,
    pose,
    reply_now,
)
from lifecycles import LOOPBACK, Gate, all_servers, entered_or_not, entering, tcp_servers
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import NurseryTCPServer, TCPServer


@all_servers
@entered_or_not
@bounded
async def test_handle_request_handles_one(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    with pose(server, b"one", tmp_path) as one, pose(server, b"two", tmp_path) as two:
        async with entering(server, entered):
            await server.handle_request()
            assert await answer(one) == b"one"
            assert server.statistics().accepted == 1
            await server.handle_request()
            assert await answer(two) == b"two"
    await server.server_close()
    assert server.statistics().completed == 2


@all_servers
@bounded
async def test_handle_request_waits_for_a_request(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(server.handle_request)
        await trio.sleep(1000)
        assert await ask(server, b"ping", tmp_path) == b"ping"


def counting_timeouts(server_class: Any) -> Any:
    class Server(server_class):
        timeouts = 0

        async def handle_timeout(self) -> None:
            self.timeouts += 1

    return Server


@all_servers
@entered_or_not
@bounded
async def test_handle_request_times_out(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server_class = counting_timeouts(server_class)
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with entering(server, entered):
        server.timeout = 5
        await server.handle_request()
        assert trio.current_time() == 5
        server.timeout = 2
        await server.handle_request()
        assert trio.current_time() == 7
        assert server.timeouts == 2
        with pose(server, b"ping", tmp_path) as client:
            await server.handle_request()
            assert await answer(client) == b"ping"
        assert server.timeouts == 2
    await server.server_close()


@all_servers
@entered_or_not
@bounded
async def test_handle_request_without_patience_takes_what_is_there(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    # As select(0) does: it reports what is ready, and does not wait.
    server_class = counting_timeouts(server_class)
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    server.timeout = 0
    async with entering(server, entered):
        await server.handle_request()
        assert server.timeouts == 1
        with pose(server, b"ping", tmp_path) as client:
            await server.handle_request()
            assert await answer(client) == b"ping"
        assert server.timeouts == 1
    await server.server_close()
    assert trio.current_time() == 0


@tcp_servers
@bounded
async def test_the_timeout_is_for_the_arrival_only(
    autojump_clock: Any, server_class: Any
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(100)
        await echo_all(request, client_address, server)

    server = server_class(LOOPBACK, slow)
    server.timeout = 5
    with pose(server, b"ping") as client:
        await server.handle_request()
        assert trio.current_time() == 100
        assert reply_now(client) == b"ping"
    await server.server_close()


@bounded
async def test_handle_request_of_a_sequential_server_waits_for_the_handler(
    autojump_clock: Any,
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(100)

    server = TCPServer(LOOPBACK, slow)
    with pose(server, b""):
        async with server:
            await server.handle_request()
            assert trio.current_time() == 100
            assert server.statistics().completed == 1


@pytest.mark.parametrize("max_tasks", [None, 1, 2])
@bounded
async def test_handle_request_of_a_concurrent_server_returns_when_handling_has_begun(
    autojump_clock: Any, max_tasks: int | None
) -> None:
    gate = Gate()
    server = NurseryTCPServer(LOOPBACK, gate)
    server.max_tasks = max_tasks
    with pose(server, b"ping") as client:
        async with server:
            await server.handle_request()
            await wait_all_tasks_blocked()
            assert server.statistics().active == gate.waiting == 1
            assert trio.current_time() == 0
            gate.opened.set()
        assert await answer(client) == b"ping"


@bounded
async def test_handle_request_waits_for_room(autojump_clock: Any) -> None:
    server_class = counting_timeouts(NurseryTCPServer)
    gate = Gate()
    server = server_class(LOOPBACK, gate)
    server.max_tasks = 1
    with pose(server, b"one") as one, pose(server, b"two") as two:
        async with server, trio.open_nursery() as nursery:
            await server.handle_request()
            server.timeout = 5
            await server.handle_request()
            assert server.timeouts == 1
            server.timeout = None
            nursery.start_soon(server.handle_request)
            await trio.sleep(10)
            assert server.statistics().accepted == 1
            gate.opened.set()
            assert await answer(one) == b"one"
        assert await answer(two) == b"two"


@tcp_servers
@bounded
async def test_handle_request_sees_through_spurious_readiness(
    autojump_clock: Any, server_class: Any
) -> None:
    class Server(counting_timeouts(server_class)):
        spurious = 3

        async def get_request(self) -> tuple[Any, Any]:
            if self.spurious:
                self.spurious -= 1
                raise BlockingIOError(errno.EAGAIN, "somebody else was faster")
            return await super().get_request()

    server = Server(LOOPBACK, echo_all)
    server.timeout = 60
    with pose(server, b"ping") as client:
        async with server:
            await server.handle_request()
            assert await answer(client) == b"ping"
    seen = server.statistics()
    assert (seen.accepted, seen.accept_errors, server.timeouts) == (1, 0, 0)
    assert trio.current_time() == 0


@bounded
async def test_handle_request_without_patience_nor_descriptors(autojump_clock: Any) -> None:
    server = counting_timeouts(TCPServer)(LOOPBACK, echo_all)
    server.timeout = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pose(server, b"ping") as client:
        async with server:
            with ExitStack() as stack:
                while True:  # Until every number below the limit is taken.
                    number = os.open(os.devnull, os.O_RDONLY)
                    stack.callback(os.close, number)
                    if number > max(client.fileno(), server.fileno()):
                        break
                stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
                resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
                await server.handle_request()
                assert server.timeouts == 1
                assert server.statistics().accept_errors == 1
            await trio.sleep(1)
            await server.handle_request()
            assert await answer(client) == b"ping"


@bounded
async def test_a_client_that_gives_up_does_not_prolong_the_timeout(
    autojump_clock: Any,
) -> None:
    class Server(counting_timeouts(TCPServer)):
        async def get_request(self) -> tuple[Any, Any]:
            request, _ = await super().get_request()
            request.close_now()
            raise BlockingIOError(errno.EAGAIN, "it has gone again")

    server = Server(LOOPBACK, echo_all)
    server.timeout = 5
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(server.handle_request)
        await trio.sleep(4)
        with connect(server.server_address):
            await trio.sleep(0.5)
    assert trio.current_time() == 5
    assert server.timeouts == 1


@all_servers
@bounded
async def test_handle_request_returns_after_a_request_that_was_denied(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Server(server_class):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            return False

    server = Server(bind_address(Server, tmp_path), echo_all)
    with pose(server, b"ping", tmp_path):
        async with server:
            await server.handle_request()
    assert server.statistics().rejected == 1
    assert_sums_up(server)


@entered_or_not
@bounded
async def test_shutdown_ends_handle_request(autojump_clock: Any, entered: bool) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with entering(server, entered), trio.open_nursery() as nursery:
        nursery.start_soon(server.handle_request)
        await wait_all_tasks_blocked()
        await server.shutdown()
    await server.server_close()
