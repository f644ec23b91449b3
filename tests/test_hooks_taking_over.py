"""A hook may take a request over: process it later, elsewhere, wrapped or twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import answer, assert_sums_up, bind_address, bounded, echo_all, pose, reply_now
from hooks import LOOPBACK, Wrapped, all_servers, errors_reported, serve_one
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import NurseryTCPServer


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
