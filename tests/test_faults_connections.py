"""Peers that reset, threads and processes that cannot start, siblings that crash.

Each under every dispatcher, and each followed by a fresh client. test_promise_7_log has
more about resets met by tasks; test_blocking_limits and test_forking about starting.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
from blocking_world import no_more_threads
from faults import (
    STREAM_WORLDS,
    World,
    all_ended,
    assert_echoes,
    assert_says_goodbye,
    assert_serves,
    comes_true,
    each,
    forks,
    greeted,
    in_each_world,
    reset,
)
from helpers import (
    assert_sums_up,
    bounded,
    connect,
    is_refused,
    receive,
    receive_to_end,
)
from promises import serving

pytestmark = forks


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_socketserver")


# -- resets, in each phase of a connection -------------------------------------------------


async def reset_before_the_first_byte(server: Any) -> None:
    with await greeted(server) as client:
        reset(client)


async def reset_mid_line(server: Any) -> None:
    with await greeted(server) as client:
        client.sendall(b"half")
        reset(client)


async def reset_while_the_server_writes(server: Any) -> None:
    with await greeted(server) as client:
        client.sendall(b"much\n")
        assert await receive(client, 1) == b"\0"
        reset(client)


async def reset_between_lines(server: Any) -> None:
    with await greeted(server) as client:
        await assert_echoes(client)
        reset(client)


@pytest.mark.parametrize(
    "misbehave",
    [
        reset_before_the_first_byte,
        reset_mid_line,
        reset_while_the_server_writes,
        reset_between_lines,
    ],
    ids=lambda function: function.__name__.removeprefix("reset_"),
)
@in_each_world
@bounded
async def test_a_reset_costs_its_own_request_and_one_quiet_line(
    world: World,
    misbehave: Callable[[Any], Awaitable[None]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = world.make()
    async with serving(server):
        with await greeted(server) as served_already:
            await misbehave(server)
            await comes_true(lambda: server.statistics().failed == 1)
            await assert_serves(server)
            await assert_echoes(served_already)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    [record] = caplog.records
    assert record.levelname == "INFO"
    assert record.exc_info is None
    assert "\n" not in record.getMessage()
    seen = server.statistics()
    assert (seen.completed, seen.failed, seen.peer_errors) == (2, 1, 1)


@in_each_world
@bounded
async def test_a_reset_before_accept(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make()
    with contextlib.ExitStack() as clients:
        for _ in range(20):
            reset(clients.enter_context(connect(server.server_address)))
        async with serving(server):
            await assert_serves(server)
            await all_ended(server)
    # The kernel hands them over all the same; what meets the reset is the handler.
    seen = server.statistics()
    assert seen.accepted == 21
    assert seen.completed >= 1
    assert seen.failed == seen.peer_errors == len(caplog.records)
    assert {record.levelname for record in caplog.records} <= {"INFO"}


@in_each_world
@bounded
async def test_a_reset_after_the_handler_has_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def shutdown_request(self: Any, request: Any) -> None:
        if client.fileno() != -1:
            reset(client)
        await super(type(self), self).shutdown_request(request)

    server = world.make(shutdown_request=shutdown_request)
    async with serving(server):
        with await greeted(server) as client:
            client.shutdown(socket.SHUT_WR)
            await comes_true(lambda: server.statistics().completed == 1)
        await assert_serves(server)
        await all_ended(server)
    assert not caplog.records


# -- no thread, no process -----------------------------------------------------------------


@each(world for world in STREAM_WORLDS if world.name == "threading-blocking")
@bounded
async def test_without_a_thread_others_are_served(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make()
    async with serving(server):
        with await greeted(server) as served_already:
            async with no_more_threads(monkeypatch):
                for _ in range(3):
                    with connect(server.server_address) as unlucky:
                        assert await receive_to_end(unlucky) == b""
                await assert_echoes(served_already)
            await assert_serves(server)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    assert [str(error) for error in server.errors] == ["can't start new thread"] * 3
    # It is a fault of ours: a traceback each.
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert server.statistics().failed == 3
    assert server.statistics().completed == 2


@pytest.mark.parametrize("name", ["EAGAIN", "ENOMEM"])
@each(world for world in STREAM_WORLDS if world.forks)
@bounded
async def test_without_a_process_others_are_served(
    world: World,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fork() -> int:
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))

    server = world.make()
    async with serving(server):
        with await greeted(server) as served_already:
            with monkeypatch.context() as patch:
                patch.setattr(os, "fork", fork)
                for _ in range(3):
                    with connect(server.server_address) as unlucky:
                        assert await receive_to_end(unlucky) == b""
                await assert_echoes(served_already)
            await assert_serves(server)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    assert [error.errno for error in server.errors] == [getattr(errno, name)] * 3
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 3
    assert server.statistics().failed == 3
    assert not server.active_children


@each(world for world in STREAM_WORLDS if world.forks)
@bounded
async def test_a_killed_child_costs_its_own_request(world: World) -> None:
    server = world.make()
    async with serving(server):
        with await greeted(server) as served_already:
            [survivor] = server.active_children
            with await greeted(server) as victim:
                for pid in server.active_children - {survivor}:
                    os.kill(pid, signal.SIGKILL)
                assert await receive_to_end(victim) == b""
            await assert_serves(server)
            await assert_echoes(served_already)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    assert "SIGKILL" in str(server.errors[0])
    assert server.statistics().failed == 1


# -- a sibling that crashes ----------------------------------------------------------------


class Crash(Exception):
    """A sibling's."""


@contextlib.contextmanager
def crashing() -> Iterator[None]:
    """The block must end by a group of a sibling's crash, and nothing else."""
    with pytest.raises(ExceptionGroup) as caught:
        yield
    [error] = caught.value.exceptions
    assert type(error) is Crash


@in_each_world
@bounded
async def test_a_sibling_that_crashes_ends_the_server_and_is_all_that_is_raised(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def crash_when_served() -> None:
        client = await greeted(server)
        clients.append(client)
        await assert_echoes(client)
        raise Crash

    server = world.make()
    clients: list[socket.socket] = []
    with crashing():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash_when_served)
            async with server:
                await server.serve_forever()
    with clients[0] as client:
        # The handler has been cancelled, which is no error of its own.
        assert await receive_to_end(client) == b""
    assert not server.errors
    assert not caplog.records
    assert server.statistics().cancelled == 1
    assert_sums_up(server)
    assert is_refused(server.server_address)
    server = world.make(address=server.server_address)
    async with serving(server):
        await assert_serves(server)
        await all_ended(server)


@in_each_world
@bounded
async def test_a_sibling_outside_of_the_servers_block_is_the_programs_business(
    world: World,
) -> None:
    async def crash() -> None:
        raise Crash

    server = world.make()
    async with serving(server):
        with await greeted(server) as served_already:
            with crashing():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(crash)
            # The server is in another nursery, and does not notice.
            await assert_echoes(served_already)
            await assert_serves(server)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    assert server.statistics().completed == 2
