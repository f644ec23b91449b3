"""How many blocking requests there are at a time, and what happens beyond."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import PARKED, happens, in_thread, wait_for
from blocking_world import (
    PATIENCE,
    Release,
    Sleeping,
    clock,
    each_server,
    each_stream_server,
    each_threading_server,
    is_true,
    make,
    no_more_threads,
    parked,
    sequential_and_threading,
    serving,
)
from helpers import (
    answer,
    assert_sums_up,
    bounded,
    connect,
    pose,
    receive,
    receive_to_end,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_socketserver import TCPServer, ThreadingTCPServer, ThreadingUDPServer

__all__ = ["clock"]  # A fixture.


@contextlib.contextmanager
def several(server: Any, count: int, folder: Path) -> Iterator[list[Any]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(pose(server, b"%d" % number, folder))
            for number in range(count)
        ]


def echo_later(request: Any, client_address: Any, server: Any) -> None:
    """Handle a request, of a connection or a datagram, when the server is awake."""
    server.notes.append("begun")
    wait_for(server.awake)
    if isinstance(request, tuple):
        request[1].sendto(request[0], client_address)
    else:
        request.sendall(request.recv(100))


@each_threading_server
@bounded
async def test_at_the_limit_the_kernel_queues(server_class: Any, tmp_path: Path) -> None:
    server = make(server_class, echo_later, tmp_path, max_threads=2)
    with Release(server) as awake:
        async with serving(server):
            with several(server, 5, tmp_path) as clients:
                await is_true(lambda: len(server.notes) == 2)
                await wait_all_tasks_blocked(0.01)
                assert server.statistics().accepted == 2
                assert len(server.notes) == 2
                awake.set()
                for number, client in enumerate(clients):
                    assert await answer(client) == b"%d" % number
    assert server.statistics().completed == 5
    assert_sums_up(server)


@bounded
async def test_asynchronous_requests_count_too(tmp_path: Path) -> None:
    async def wait(request: Any, client_address: Any, server: Any) -> None:
        await opened.wait()

    opened = trio.Event()
    server = make(ThreadingTCPServer, wait, tmp_path, max_threads=2)
    async with serving(server):
        with several(server, 3, tmp_path):
            await is_true(lambda: server.statistics().accepted == 2)
            await wait_all_tasks_blocked(0.01)
            assert server.statistics().accepted == 2
            opened.set()
            await is_true(lambda: server.statistics().completed == 3)


@bounded
async def test_max_threads_is_read_when_it_is_used(tmp_path: Path) -> None:
    server = make(ThreadingTCPServer, Sleeping, tmp_path)
    with Release(server) as awake:
        async with serving(server):
            with several(server, 4, tmp_path) as clients:
                for client in clients:
                    assert await receive(client) == PARKED
                server.max_threads = 2
                awake.set()
                for client in clients:
                    assert await receive_to_end(client) == b""
                awake.clear()
                with several(server, 3, tmp_path):
                    await is_true(lambda: server.statistics().accepted == 6)
                    await wait_all_tasks_blocked(0.01)
                    assert server.statistics().accepted == 6
                    awake.set()
                    await is_true(lambda: server.statistics().completed == 7)


@bounded
async def test_it_takes_nothing_from_trios_own_limiter(tmp_path: Path) -> None:
    """More handlers wait than trio has threads for; the rest of the program goes on."""
    total = trio.to_thread.current_default_thread_limiter().total_tokens
    count = int(total) + 10
    server = make(ThreadingTCPServer, Sleeping, tmp_path)
    with Release(server) as awake:
        async with serving(server):
            with several(server, count, tmp_path) as clients:
                for client in clients:
                    assert await receive(client) == PARKED
                assert await trio.to_thread.run_sync(int, "42") == 42
                assert await trio.socket.getaddrinfo("localhost", 80)
                assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
                awake.set()
                for client in clients:
                    await receive_to_end(client)
    assert server.statistics().completed == count


@sequential_and_threading
@bounded
async def test_idle_threads_are_used_before_new_ones(
    server_class: Any, tmp_path: Path
) -> None:
    threads = set()
    server = make(
        server_class, lambda *_: threads.add(threading.current_thread()), tmp_path
    )
    async with serving(server):
        for _ in range(10):
            with connect(server.server_address) as client:
                await receive_to_end(client)
    assert len(threads) == 1


# -- requests of one's own -----------------------------------------------------------------


@sequential_and_threading
@bounded
async def test_a_request_of_ones_own_waits_its_turn(
    server_class: Any, tmp_path: Path
) -> None:
    seen = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        if client_address == "mine":
            seen.append(request)
        else:
            echo_later(request, client_address, server)

    async def shutdown_request(self: Any, request: Any) -> None:
        if isinstance(request, str):
            return
        await super(type(self), self).shutdown_request(request)

    server = make(
        server_class, handler, tmp_path, max_threads=1, shutdown_request=shutdown_request
    )
    with Release(server) as awake:
        async with serving(server):
            with pose(server, b"first") as client:
                await is_true(lambda: bool(server.notes))
                for request in ("second", "third"):
                    await server.process_request(request, "mine")
                    await wait_all_tasks_blocked()
                assert server.statistics().active == 3
                assert seen == []
                awake.set()
                assert await answer(client) == b"first"
                await is_true(lambda: server.statistics().completed == 3)
    assert seen == ["second", "third"]


@pytest.mark.parametrize("server_class", [TCPServer, ThreadingTCPServer])
@bounded
async def test_who_waits_for_a_turn_can_be_cancelled(
    server_class: Any, tmp_path: Path, clock: MockClock
) -> None:
    server = make(
        server_class,
        echo_later,
        tmp_path,
        max_threads=1,
        request_timeout=PATIENCE,
    )
    with Release(server) as awake:
        async with serving(server):
            with connect(server.server_address) as client:
                client.sendall(b"first")
                await is_true(lambda: bool(server.notes))
                ours, theirs = trio.socket.socketpair()
                with ours, theirs:
                    request = trio.SocketStream(theirs)
                    await server.process_request(request, "mine")
                    await wait_all_tasks_blocked()
                    clock.jump(PATIENCE)
                    # It ends, while the first one does not.
                    await is_true(lambda: server.statistics().failed == 1)
                    assert await ours.recv(1) == b""
                    assert server.statistics().active == 1
                awake.set()
                await is_true(lambda: server.statistics().active == 0)
    assert server.notes == ["begun"]
    assert server.statistics().failed == 2
    assert [type(error).__name__ for error in server.errors] == ["RequestTimeout"] * 2


# -- no thread -----------------------------------------------------------------------------


@each_stream_server
@bounded
async def test_without_a_thread_only_that_request_fails(
    server_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make(server_class, Sleeping, tmp_path)
    with Release(server) as awake:
        awake.set()
        async with serving(server):
            async with no_more_threads(monkeypatch):
                for _ in range(2):
                    with connect(server.server_address) as client:
                        assert await receive_to_end(client) == b""
            assert server.statistics().failed == 2
            with await parked(server) as client:
                assert await receive_to_end(client) == b""
    assert [str(error) for error in server.errors] == ["can't start new thread"] * 2
    assert [type(error) for error in server.errors] == [RuntimeError] * 2
    assert server.statistics().completed == 1
    assert server.notes == [(True, type(None)), "finished"]


@bounded
async def test_without_a_thread_for_a_datagram(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make(ThreadingUDPServer, echo_later, tmp_path)
    with Release(server) as awake:
        awake.set()
        async with serving(server):
            async with no_more_threads(monkeypatch):
                with pose(server, b"nobody"):
                    await is_true(lambda: server.statistics().failed == 1)
            with pose(server, b"somebody") as client:
                assert await answer(client) == b"somebody"


@each_server
@bounded
async def test_many_requests_in_a_row(server_class: Any, tmp_path: Path) -> None:
    server = make(server_class, echo_later, tmp_path, max_threads=4)
    with Release(server) as awake:
        awake.set()
        async with serving(server):
            for _ in range(5):
                with several(server, 10, tmp_path) as clients:
                    for number, client in enumerate(clients):
                        assert await answer(client) == b"%d" % number
    assert server.statistics().completed == 50
    assert server.errors == []


@sequential_and_threading
@bounded
async def test_the_program_can_wait_for_a_handler(
    server_class: Any, tmp_path: Path
) -> None:
    """Its own threads and a server's do not wait for each other."""
    met = threading.Event()
    server = make(server_class, lambda *_: met.set(), tmp_path)
    async with serving(server):
        with connect(server.server_address):
            await in_thread(wait_for, met)
            await happens(met)
