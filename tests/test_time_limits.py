"""Every limit of time cuts who it is there for: on the virtual clock for tasks, for real in
threads and children; and then a fresh client is served.

test_bad_input and test_promise_7_log have peers that meet a limit, test_handlers what
bounds ``finish()``, test_blocking_cancellation what threads are woken from.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from blocking_servers import happens
from blocking_world import PATIENCE, clock
from faults import (
    STREAM_WORLDS,
    World,
    all_ended,
    assert_serves,
    comes_true,
    each,
    forks,
    greeted,
)
from helpers import REAL_LIMIT, bounded, connect, is_refused, receive_to_end
from promises import serving

from trio_socketserver import NurseryUDPServer, RequestTimeout, ThreadingUDPServer

__all__ = ["clock"]  # A fixture.

pytestmark = forks

TASKS = [world for world in STREAM_WORLDS if not (world.is_blocking or world.forks)]
CHILDREN = [world for world in STREAM_WORLDS if world.forks]
NO_TASKS = [world for world in STREAM_WORLDS if world not in TASKS]

in_tasks = each(TASKS)
in_threads_and_children = each(NO_TASKS)
in_children = each(CHILDREN)

LIMIT = 0.1
"""Seconds of a limit that is waited for in real time."""

NEVER = 3 * REAL_LIMIT
"""Seconds that nothing here takes; but a limit that fails must not hang the tests."""


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_socketserver")


# -- peers ---------------------------------------------------------------------------------


async def say_nothing(client: socket.socket, pause: float) -> None:
    await receive_to_end(client)


async def drip(client: socket.socket, pause: float) -> None:
    """Send a line that never ends: a slow loris."""
    with contextlib.suppress(ConnectionError):
        while True:
            client.send(b"x")
            await trio.sleep(pause)


async def never_read(client: socket.socket, pause: float) -> None:
    """Ask for much, and take nothing of it until the server has given up."""
    client.sendall(b"much\n")
    with contextlib.suppress(ConnectionError):
        while True:
            await trio.sleep(pause)
            client.send(b"x")  # Fails when the connection has ended.


Peer = Callable[[socket.socket, float], Awaitable[None]]

each_peer = pytest.mark.parametrize("peer", [say_nothing, drip, never_read])


def with_timeout(world: World, seconds: float) -> Any:
    """Return the world's handler, with a limit for each of its waits."""
    return type(world.handler.__name__, (world.handler,), {"timeout": seconds})


def assert_one_quiet_line(caplog: pytest.LogCaptureFixture) -> None:
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert record.exc_info is None


# -- tasks, on the virtual clock -----------------------------------------------------------


@each_peer
@in_tasks
@bounded
async def test_request_timeout_of_a_task(
    world: World,
    peer: Peer,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = world.make(request_timeout=100)
    async with serving(server):
        with await greeted(server) as client:
            begin = trio.current_time()
            await peer(client, 9)
            # To the moment; a client that polls sees it a step or two later.
            assert (
                100 <= trio.current_time() - begin <= 100 + (peer is not say_nothing) * 18
            )
        await assert_serves(server)
        await all_ended(server)
    [error] = server.errors
    assert type(error) is RequestTimeout
    assert server.statistics().peer_errors == 1
    assert_one_quiet_line(caplog)


@pytest.mark.parametrize("peer", [say_nothing, never_read])
@in_tasks
@bounded
async def test_timeout_of_a_tasks_handler(
    world: World,
    peer: Peer,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = world.make()
    server.RequestHandlerClass = with_timeout(world, 10)
    async with serving(server):
        with await greeted(server) as client:
            begin = trio.current_time()
            await peer(client, 9)
            assert 10 <= trio.current_time() - begin <= 10 + (peer is not say_nothing) * 18
        await assert_serves(server)
        await all_ended(server)
    assert [type(error) for error in server.errors] == [RequestTimeout]
    assert_one_quiet_line(caplog)


@in_tasks
@bounded
async def test_each_byte_begins_a_new_wait_so_a_slow_loris_needs_request_timeout(
    world: World, autojump_clock: trio.testing.MockClock
) -> None:
    server = world.make(request_timeout=1000)
    server.RequestHandlerClass = with_timeout(world, 10)
    async with serving(server):
        with await greeted(server) as client:
            begin = trio.current_time()
            await drip(client, 9)
            assert 1000 <= trio.current_time() - begin <= 1018
        await assert_serves(server)
        await all_ended(server)
    [error] = server.errors
    assert "1000 s" in str(error)


@pytest.mark.parametrize("handling", ["ends", "times out"])
@in_tasks
@bounded
async def test_a_stuck_finish_of_a_task(
    world: World, handling: str, autojump_clock: trio.testing.MockClock
) -> None:
    class Stuck(world.handler):  # type: ignore[misc]
        async def finish(self) -> None:
            await trio.sleep(10_000)

    server = world.make(request_timeout=100, cleanup_timeout=7)
    server.RequestHandlerClass = Stuck
    async with serving(server):
        with await greeted(server) as client:
            begin = trio.current_time()
            if handling == "ends":
                client.shutdown(socket.SHUT_WR)
            assert await receive_to_end(client) == b""
            took = trio.current_time() - begin
        assert took == pytest.approx(7 if handling == "ends" else 107)
        server.RequestHandlerClass = world.handler
        await assert_serves(server)
        await all_ended(server)
    [error] = server.errors
    assert type(error) is RequestTimeout
    assert server.statistics().failed == 1


@pytest.mark.parametrize("server_class", [NurseryUDPServer, ThreadingUDPServer])
@bounded
async def test_request_timeout_of_a_datagram(
    server_class: Any, autojump_clock: trio.testing.MockClock
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        data, replies = request
        if data == b"hang":
            await trio.sleep_forever()
        await replies.sendto(data, client_address)

    server = server_class(("127.0.0.1", 0), handler)
    server.request_timeout = 100
    async with serving(server):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(server.server_address)
            client.send(b"hang")
            await trio.sleep(99)
            assert server.statistics().active == 1
            client.send(b"ping")
            await trio.sleep(2)
            client.setblocking(False)
            assert client.recv(100) == b"ping"
    assert (server.statistics().failed, server.statistics().completed) == (1, 1)


# -- threads and children, for real --------------------------------------------------------


@each_peer
@in_threads_and_children
@bounded
async def test_request_timeout_of_a_thread_or_child(
    world: World, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make(request_timeout=LIMIT)
    async with serving(server):
        begin = time.monotonic()
        # It may be cut before it is greeted, where everything is slow.
        with connect(server.server_address) as client:
            await peer(client, LIMIT / 10)
        await comes_true(lambda: server.statistics().failed == 1)
        assert time.monotonic() - begin >= LIMIT
        server.request_timeout = None
        await assert_serves(server)
        await all_ended(server)
    assert [type(error) for error in server.errors] == [RequestTimeout]
    assert server.statistics().peer_errors == 1
    assert_one_quiet_line(caplog)


@pytest.mark.parametrize("peer", [say_nothing, never_read])
@in_threads_and_children
@bounded
async def test_timeout_of_a_handler_in_a_thread_or_child(
    world: World, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make()
    server.RequestHandlerClass = with_timeout(world, LIMIT)
    async with serving(server):
        begin = time.monotonic()
        with connect(server.server_address) as client:
            await peer(client, LIMIT / 10)
        await comes_true(lambda: server.statistics().failed == 1)
        assert time.monotonic() - begin >= LIMIT
        server.RequestHandlerClass = world.handler
        await assert_serves(server)
        await all_ended(server)
    [error] = server.errors
    # A blocking handler has what its socket raises.
    assert type(error) is (TimeoutError if world.is_blocking else RequestTimeout)
    assert_one_quiet_line(caplog)


@bounded
async def test_a_finish_in_a_thread_that_waits_for_its_peer_is_woken(
    clock: trio.testing.MockClock,
) -> None:
    world = next(world for world in STREAM_WORLDS if world.name == "threading-blocking")
    finishes = threading.Event()
    woken = []

    class Stuck(world.handler):  # type: ignore[misc]
        def finish(self) -> None:
            finishes.set()
            woken.append(self.request.recv(1))

    server = world.make(request_timeout=PATIENCE)
    server.RequestHandlerClass = Stuck
    async with serving(server):
        with connect(server.server_address) as client:
            client.sendall(b"ping\n")
            client.shutdown(socket.SHUT_WR)  # handle() ends here.
            await happens(finishes)
            clock.jump(PATIENCE)
            await receive_to_end(client)
        await comes_true(lambda: server.statistics().active == 0)
        server.request_timeout, server.RequestHandlerClass = None, world.handler
        await assert_serves(server)
        await all_ended(server)
    assert woken == [b""]


def stubborn_sleep() -> None:
    """Sleep, whatever asks the process to end."""
    while True:
        with contextlib.suppress(SystemExit):
            time.sleep(NEVER)


async def sleep_in_task(handler: Any) -> None:
    await trio.sleep(NEVER)


def sleep_in_main_thread(handler: Any) -> None:
    time.sleep(NEVER)


async def sleep_stubbornly_in_task(handler: Any) -> None:
    stubborn_sleep()


def sleep_stubbornly(handler: Any) -> None:
    stubborn_sleep()


def finishing_by(world: World, finish: Callable[[Any], Any]) -> Any:
    """Return the world's handler, with another ``finish()``."""
    return type(world.handler.__name__, (world.handler,), {"finish": finish})


@in_children
@bounded
async def test_a_stuck_finish_of_a_child(world: World) -> None:
    server = world.make()
    if world.is_blocking:
        # SIGTERM is SystemExit in it, wherever it is.
        server.request_timeout, server.cleanup_timeout = LIMIT, NEVER
        server.RequestHandlerClass = finishing_by(world, sleep_in_main_thread)
    else:
        # The child has the cleanup_timeout of its server, and keeps to it.
        server.cleanup_timeout = LIMIT
        server.RequestHandlerClass = finishing_by(world, sleep_in_task)
    await cut_and_served_again(server, world)


@pytest.mark.parametrize("handling", ["ends", "times out"])
@in_children
@bounded
async def test_a_stubborn_finish_of_a_child_is_killed(world: World, handling: str) -> None:
    server = world.make(request_timeout=LIMIT, cleanup_timeout=LIMIT)
    finish = sleep_stubbornly if world.is_blocking else sleep_stubbornly_in_task
    server.RequestHandlerClass = finishing_by(world, finish)
    await cut_and_served_again(server, world, goes=handling == "ends")


async def cut_and_served_again(server: Any, world: World, goes: bool = True) -> None:
    """A client meets a `finish()` that is cut; the next client meets nothing of it."""
    async with serving(server):
        begin = time.monotonic()
        with connect(server.server_address) as client:
            if goes:
                client.shutdown(socket.SHUT_WR)
            await receive_to_end(client)
        await comes_true(lambda: server.statistics().failed == 1)
        assert time.monotonic() - begin >= LIMIT
        server.request_timeout, server.RequestHandlerClass = None, world.handler
        await assert_serves(server)
        await all_ended(server)
    assert [type(error) for error in server.errors] == [RequestTimeout]
    assert not server.active_children


@pytest.mark.parametrize("hook", ["shutdown_request", "close_request"])
@in_threads_and_children
@bounded
async def test_a_stuck_closing_after_a_thread_or_child(world: World, hook: str) -> None:
    async def stuck(self: Any, request: Any) -> None:
        if not self.errors:
            await trio.sleep(NEVER)
        await getattr(super(type(self), self), hook)(request)

    server = world.make(cleanup_timeout=LIMIT, **{hook: stuck})
    async with serving(server):
        with connect(server.server_address) as client:
            client.shutdown(socket.SHUT_WR)
            await receive_to_end(client)
        await comes_true(lambda: server.statistics().failed == 1)
        server.cleanup_timeout = 60
        await assert_serves(server)
        await all_ended(server)
    assert [type(error) for error in server.errors] == [RequestTimeout]


# -- closing -------------------------------------------------------------------------------


@each_peer
@in_tasks
@bounded
async def test_graceful_timeout_ends_bad_peers_of_tasks(
    world: World, peer: Peer, autojump_clock: trio.testing.MockClock
) -> None:
    async def misbehave(task_status: trio.TaskStatus[None]) -> None:
        with await greeted(server) as client:
            task_status.started()
            await peer(client, 9)

    server = world.make(graceful_timeout=50)
    async with trio.open_nursery() as peers:
        async with serving(server):
            await peers.start(misbehave)
            begin = trio.current_time()
        # Who has said nothing yet has a second from when draining began.
        assert trio.current_time() - begin <= 50 + 1
    assert is_refused(server.server_address)
    assert not server.errors
    await all_ended(server)


@each_peer
@in_threads_and_children
@bounded
async def test_graceful_timeout_ends_bad_peers_of_threads_and_children(
    world: World, peer: Peer
) -> None:
    async def misbehave(task_status: trio.TaskStatus[None]) -> None:
        with await greeted(server) as client:
            task_status.started()
            await peer(client, LIMIT / 10)

    server = world.make(graceful_timeout=LIMIT)
    async with trio.open_nursery() as peers, serving(server):
        await peers.start(misbehave)
    assert is_refused(server.server_address)
    assert not server.errors
    await all_ended(server)
    seen = server.statistics()
    assert seen.cancelled + seen.completed == 1
