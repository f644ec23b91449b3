"""A serving loop is where the table says it is, and shutdown() finds it in any state."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, Moments
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from trio_socketserver._lifecycle import TRANSITIONS, LoopEvent, LoopState, ServingLoop

FRESH, REMEMBERED, RUNNING, STOPPING, STOPPED = LoopState
ENTER, BEGIN, STOP, END, LEAVE = LoopEvent

# DESIGN: what shutdown() and the servers' methods promise, state by state.
PROMISED = {
    # async with server
    (FRESH, ENTER): FRESH,
    (REMEMBERED, ENTER): REMEMBERED,
    (STOPPED, ENTER): FRESH,
    # one loop at a time; a remembered shutdown() ends the first
    (FRESH, BEGIN): RUNNING,
    (REMEMBERED, BEGIN): STOPPING,
    (STOPPED, BEGIN): RUNNING,
    # shutdown() is legal in every state
    (FRESH, STOP): REMEMBERED,
    (REMEMBERED, STOP): REMEMBERED,
    (RUNNING, STOP): STOPPING,
    (STOPPING, STOP): STOPPING,
    (STOPPED, STOP): STOPPED,
    # the loop returns
    (RUNNING, END): STOPPED,
    (STOPPING, END): STOPPED,
    # leaving the block; what was remembered was meant for a loop inside of it
    (FRESH, LEAVE): FRESH,
    (REMEMBERED, LEAVE): FRESH,
    (STOPPING, LEAVE): STOPPING,
    (STOPPED, LEAVE): STOPPED,
}


def test_the_table_is_what_is_promised() -> None:
    assert TRANSITIONS == PROMISED


def test_every_state_can_be_reached() -> None:
    reached = {FRESH}
    for _ in LoopState:
        reached |= {new for (old, _), new in TRANSITIONS.items() if old in reached}
    assert reached == set(LoopState)


WAYS: dict[LoopState, list[str]] = {
    FRESH: [],
    REMEMBERED: ["stop"],
    RUNNING: ["begin"],
    STOPPING: ["begin", "stop"],
    STOPPED: ["begin", "stop", "end"],
}


def loop_in(state: LoopState) -> ServingLoop:
    """Return a loop that the current task has brought into *state*."""
    loop = ServingLoop()
    for step in WAYS[state]:
        getattr(loop, step)()
    assert loop.state is state
    return loop


@pytest.mark.parametrize("state", LoopState)
@pytest.mark.parametrize("event", [ENTER, BEGIN, STOP, LEAVE])
async def test_what_the_table_does_not_list_is_refused(
    state: LoopState, event: LoopEvent
) -> None:
    loop = loop_in(state)
    method = getattr(loop, event.name.lower())
    if (state, event) in PROMISED:
        method()
        assert loop.state is PROMISED[state, event]
    else:
        with pytest.raises(RuntimeError) as caught:
            method()
        # The message names what was asked, and where the loop is.
        assert event.value in str(caught.value)
        assert state.name in str(caught.value)
        assert state.value in str(caught.value)
        assert loop.state is state


@pytest.mark.parametrize("state", LoopState)
async def test_a_loop_is_active_while_it_runs_or_stops(state: LoopState) -> None:
    loop = loop_in(state)
    assert loop.active is (state in (RUNNING, STOPPING))
    loop.end()  # Idempotent: it does nothing to a loop that is not active.
    assert not loop.active
    assert loop.state is (STOPPED if state in (RUNNING, STOPPING) else state)


@pytest.mark.parametrize("state", LoopState)
async def test_a_loop_is_fresh_until_the_first_has_begun(state: LoopState) -> None:
    assert loop_in(state).fresh is (state in (FRESH, REMEMBERED))


@pytest.mark.parametrize("state", LoopState)
async def test_shutdown_may_be_repeated_in_every_state(state: LoopState) -> None:
    loop = loop_in(state)
    loop.stop()
    once = loop.state
    loop.stop()
    assert loop.state is once


# -- stopping ---------------------------------------------------------------------------


async def serve(loop: ServingLoop, log: list[str]) -> None:
    """Be a serving loop."""
    scope = loop.begin()
    try:
        with scope:
            log.append("serving")
            await trio.sleep_forever()
        log.append("stopped" if scope.cancelled_caught else "left")
    finally:
        loop.end()


async def test_stop_ends_the_loop_and_no_other() -> None:
    loop = ServingLoop()
    log: list[str] = []
    with trio.fail_after(REAL_LIMIT):
        for _ in range(3):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve, loop, log)
                await wait_all_tasks_blocked()
                assert loop.state is RUNNING
                loop.stop()
            assert loop.state is STOPPED
            loop.stop()  # Does nothing to the next.
    assert log == ["serving", "stopped"] * 3


async def test_a_stop_before_the_first_loop_is_remembered_for_that_one() -> None:
    loop = ServingLoop()
    log: list[str] = []
    loop.enter()
    loop.stop()
    with trio.fail_after(REAL_LIMIT):
        await serve(loop, log)
        assert log == ["serving", "stopped"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, loop, log)
            await wait_all_tasks_blocked()
            assert loop.state is RUNNING
            loop.stop()


async def test_entering_anew_forgets_the_loop_before() -> None:
    loop = ServingLoop()
    log: list[str] = []
    loop.stop()
    with trio.fail_after(REAL_LIMIT):
        await serve(loop, log)
        loop.enter()
        loop.stop()  # Remembered again.
        await serve(loop, log)
    assert log == ["serving", "stopped"] * 2


async def test_a_loop_that_fails_has_ended() -> None:
    loop = ServingLoop()

    def serve() -> None:
        try:
            with loop.begin():
                raise ValueError("failed")
        finally:
            loop.end()

    with pytest.raises(ValueError, match="failed"):
        serve()
    assert loop.state is STOPPED
    with trio.fail_after(REAL_LIMIT):
        await loop.wait_ended()


# -- waiting for the end ----------------------------------------------------------------


@pytest.mark.parametrize("state", [FRESH, REMEMBERED, STOPPED])
async def test_where_no_loop_is_active_nobody_waits(state: LoopState) -> None:
    with trio.fail_after(REAL_LIMIT), assert_checkpoints():
        await loop_in(state).wait_ended()


async def test_everybody_waits_until_the_loop_has_ended() -> None:
    loop = loop_in(STOPPED)  # not until some loop has ended once
    log: list[str] = []
    slow = trio.Event()

    async def serve_slowly() -> None:
        with loop.begin():
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await slow.wait()
        loop.end()
        log.append("ended")

    async def shut_down() -> None:
        loop.stop()
        await loop.wait_ended()
        log.append("shut down")

    with trio.fail_after(REAL_LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_slowly)
            await wait_all_tasks_blocked()
            for _ in range(3):
                nursery.start_soon(shut_down)
            await wait_all_tasks_blocked()
            assert loop.state is STOPPING
            assert log == []
            slow.set()
    assert log == ["ended"] + ["shut down"] * 3


async def test_who_waited_for_one_loop_does_not_wait_for_the_next() -> None:
    loop = ServingLoop()
    log: list[str] = []

    async def shut_down() -> None:
        loop.stop()
        await loop.wait_ended()
        log.append("shut down")

    with trio.fail_after(REAL_LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, loop, log)
            await wait_all_tasks_blocked()
            nursery.start_soon(shut_down)
            await wait_all_tasks_blocked()
            nursery.start_soon(serve, loop, log)
            await wait_all_tasks_blocked()
            assert log == ["serving", "stopped", "shut down", "serving"]
            loop.stop()


async def test_the_loops_own_task_cannot_wait_for_its_end() -> None:
    loop = ServingLoop()
    with trio.fail_after(REAL_LIMIT):
        scope = loop.begin()
        assert loop.is_current_task()
        with scope:
            loop.stop()
            with Moments(lambda _: None) as moments:
                await loop.wait_ended()  # It returns, though the scope is cancelled …
            assert moments.passed == 2  # … and others have had their turn …
            assert loop.state is STOPPING
            await trio.lowlevel.checkpoint()  # … and here the loop ends.
            raise AssertionError
        assert scope.cancelled_caught
        loop.end()
        assert not loop.is_current_task()


async def test_another_task_is_not_the_loops() -> None:
    loop = ServingLoop()
    log: list[str] = []
    assert not loop.is_current_task()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, loop, log)
        await wait_all_tasks_blocked()
        assert not loop.is_current_task()
        loop.stop()


async def test_a_cancelled_shutdown_stops_the_loop_all_the_same(
    autojump_clock: Any,
) -> None:
    loop = ServingLoop()

    async def serve_slowly() -> None:
        with loop.begin() as scope:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(10)
        assert scope.cancelled_caught
        loop.end()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_slowly)
        await trio.sleep(0)
        await wait_all_tasks_blocked()
        with trio.move_on_after(1) as scope:
            loop.stop()
            await loop.wait_ended()
        assert scope.cancelled_caught
        assert trio.current_time() == 1
    assert trio.current_time() == 10
    assert loop.state is STOPPED


async def test_no_sequence_of_calls_gets_lost() -> None:
    # What is legal leads where the table says; what is not changes nothing.
    source = random.Random(6)
    loop, state = ServingLoop(), FRESH
    seen = set()
    for _ in range(500):
        event = source.choice(list(LoopEvent))
        seen.add((state, event))
        if (state, event) in PROMISED:
            state = PROMISED[state, event]
            getattr(loop, event.name.lower())()
        elif event is END:
            loop.end()
        else:
            with pytest.raises(RuntimeError):
                getattr(loop, event.name.lower())()
        assert loop.state is state
    assert seen == set(itertools.product(LoopState, LoopEvent))
