"""Errors of accept() under every dispatcher: who is served stays served, the next comes.

test_promise_9_10_accepting has the back-off itself, and every errno, for tasks.
"""

from __future__ import annotations

import itertools
import os
import socket

import pytest
import trio
import trio.testing
from faults import (
    DATAGRAM_WORLDS,
    GREETING,
    STREAM_WORLDS,
    World,
    all_ended,
    assert_answers,
    assert_echoes,
    assert_says_goodbye,
    assert_serves,
    each,
    failing,
    forks,
    greeted,
    in_each_datagram_world,
    in_each_world,
    receive_exactly,
    within_real_time,
)
from helpers import connect, is_refused, receive_to_end
from promises import serve, serving, system_error
from trio.testing import MockClock

from trio_socketserver._accept import BACK_OFF_LIMIT

pytestmark = forks

SHORTAGES = ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")
ONE_CONNECTION = ("ECONNABORTED", "EPERM", "EPROTO")
UNUSABLE = ("EINVAL", "EBADF", "ENOTSOCK")


@pytest.fixture
def clock() -> MockClock:
    """A clock that stands still until it is moved on; threads and children take no time."""
    return MockClock()


@pytest.mark.parametrize("name", SHORTAGES)
@in_each_world
async def test_a_shortage_costs_a_few_calls_and_one_line(
    world: World, name: str, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make()
    fault = failing(server)
    async with within_real_time(), serving(server):
        with await greeted(server) as served_already:
            await trio.testing.wait_all_tasks_blocked()
            fault.attempts.clear()
            fault.errors.extend([system_error(name)] * 10_000)
            with connect(server.server_address) as waiting:
                # A hundred seconds, in steps so small that no attempt is missed.
                for _ in range(1000):
                    await trio.testing.wait_all_tasks_blocked()
                    clock.jump(0.1)
                await assert_echoes(served_already)
                # 10 ms doubling to a second is 7 calls in the first; then one a second.
                assert 95 <= len(fault.attempts) <= 110
                assert len(caplog.records) == 1
                fault.errors.clear()
                clock.jump(BACK_OFF_LIMIT)
                assert await receive_exactly(waiting, len(GREETING)) == GREETING
                await assert_echoes(waiting)
                await assert_says_goodbye(waiting)
            # The episode is over: the next client waits for no clock.
            await assert_serves(server)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert os.strerror(fault_number(name)) in record.getMessage()
    assert server.statistics().completed == 3


def fault_number(name: str) -> int:
    number = system_error(name).errno
    assert number is not None
    return number


@in_each_datagram_world
async def test_a_shortage_of_a_datagram_server(
    world: World, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make()
    fault = failing(server)
    async with within_real_time(), serving(server):
        fault.errors.extend([system_error("ENOBUFS")] * 3)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(server.server_address)
            client.send(b"x")
            for _ in range(10):
                await trio.testing.wait_all_tasks_blocked()
                clock.jump(0.01)
        assert not fault.errors
        await assert_answers(server)
        await all_ended(server)
    assert len(caplog.records) == 1
    assert server.statistics().accept_errors == 3


@pytest.mark.parametrize("name", ONE_CONNECTION)
@each(STREAM_WORLDS[1:] + DATAGRAM_WORLDS[1:])
async def test_an_error_of_one_connection_is_passed_over(
    world: World, name: str, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make()
    fault = failing(server)
    is_stream = server.socket_type == socket.SOCK_STREAM
    async with within_real_time(), serving(server):
        for _ in range(3):
            fault.errors.extend([system_error(name)] * 5)
            await (assert_serves if is_stream else assert_answers)(server)
        assert set(fault.attempts) == {trio.current_time()}
        await all_ended(server)
    assert not caplog.records
    assert server.statistics().accept_errors == 15
    assert server.statistics().completed == 3


@pytest.mark.parametrize("name", UNUSABLE)
@each(STREAM_WORLDS[1:])
async def test_an_unusable_listener_is_loud_and_ends_everything(
    world: World, name: str, clock: MockClock
) -> None:
    async def be_served() -> None:
        with await greeted(server) as client:
            await trio.testing.wait_all_tasks_blocked()
            fault.errors.extend([error] * 100)
            with connect(server.server_address) as late:
                # Nobody is kept waiting by a server that is gone.
                assert await receive_to_end(client) == b""
                assert await receive_to_end(late) == b""
                ended.append("clients")

    server = world.make()
    fault = failing(server)
    error = system_error(name)
    ended: list[str] = []
    async with within_real_time(), trio.open_nursery() as nursery:
        nursery.start_soon(be_served)
        with pytest.raises(OSError, match=os.strerror(fault_number(name))) as caught:
            await serve(server)
        assert is_refused(server.server_address)
    assert caught.value is error
    # It did not try again.
    assert len(fault.errors) == 99
    assert ended == ["clients"]
    assert server.fileno() == -1
    assert server.statistics().accept_errors == 1
    # Whoever starts anew, has the port at once.
    async with within_real_time():
        server = world.make(address=server.server_address)
        async with serving(server):
            await assert_serves(server)
            await all_ended(server)


def test_the_worlds_are_all_there() -> None:
    assert len(STREAM_WORLDS) == len(DATAGRAM_WORLDS) == 5
    for one, other in itertools.combinations(STREAM_WORLDS + DATAGRAM_WORLDS, 2):
        assert (one.server_class, one.handler) != (other.server_class, other.handler)
