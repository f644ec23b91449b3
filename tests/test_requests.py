"""The nursery of requests: who may close it, in which order, and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from helpers import bounded
from trio.testing import wait_all_tasks_blocked

from trio_socketserver._requests import RequestNursery


class Closing:
    """What a server does when its requests are closed, on record."""

    def __init__(self, patience: float = math.inf) -> None:
        self.calls: list[str] = []
        self.seconds = patience
        self.requests = RequestNursery()

    @asynccontextmanager
    async def opened(self) -> AsyncGenerator[RequestNursery]:
        """Open the nursery."""
        opening = self.requests.open(self.stop_accepting, self.patience, self.release)
        async with opening:
            yield self.requests

    async def stop_accepting(self) -> None:
        self.calls.append("stop accepting")
        with trio.CancelScope(shield=True):
            await trio.sleep(1)
        self.calls.append("stopped")

    def patience(self) -> float:
        self.calls.append("patience")
        return self.seconds

    def release(self) -> None:
        self.calls.append("release")

    async def request(self, seconds: float = math.inf) -> None:
        """Be a request."""
        self.requests.enter_request()
        try:
            await trio.sleep(seconds)
            self.calls.append("request done")
        except trio.Cancelled:
            self.calls.append("request cancelled")
            raise


GRACEFUL = ["stop accepting", "stopped", "patience", "request done", "release"]
CUT = ["stop accepting", "stopped", "patience", "request cancelled", "release"]


@bounded
async def test_leaving_the_block_closes_in_order(autojump_clock: Any) -> None:
    closing = Closing()
    async with closing.opened() as requests:
        requests.start_soon(closing.request, 10, name="request")
        assert not requests.closing
    assert requests.closing
    assert closing.calls == GRACEFUL
    assert not requests.crashed
    assert trio.current_time() == 10
    await requests.wait_closed()


@pytest.mark.parametrize(
    ("patience", "calls", "ended"),
    [(math.inf, GRACEFUL, 10), (9.5, GRACEFUL, 10), (8, CUT, 9), (0, CUT, 1), (-1, CUT, 1)],
)
@bounded
async def test_patience_bounds_the_requests(
    autojump_clock: Any, patience: float, calls: list[str], ended: float
) -> None:
    closing = Closing(patience)
    async with closing.opened() as requests:
        requests.start_soon(closing.request, 10, name="request")
    # It counts from when accepting has stopped, which took a second.
    assert closing.calls == calls
    assert trio.current_time() == ended
    assert not requests.crashed


@bounded
async def test_asking_to_close_leaves_the_body_alone(autojump_clock: Any) -> None:
    closing = Closing(patience=0)
    async with closing.opened() as requests:
        requests.start_soon(closing.request, 10, name="request")
        for _ in range(3):
            requests.ask_to_close()
            assert requests.closing
        await requests.wait_closed()
        assert closing.calls == CUT
        await trio.sleep(100)
        with pytest.raises(RuntimeError):
            requests.start_soon(closing.request, 10, name="too late")
    assert closing.calls == CUT


@bounded
async def test_a_request_may_ask_to_close(autojump_clock: Any) -> None:
    closing = Closing()

    async def last_request() -> None:
        closing.requests.ask_to_close()
        await closing.request(10)

    async with closing.opened() as requests:
        requests.start_soon(last_request, name="request")
        await requests.wait_closed()
    assert closing.calls == GRACEFUL


@bounded
async def test_requests_that_come_while_closing_are_joined_too(autojump_clock: Any) -> None:
    closing = Closing()
    async with closing.opened() as requests:
        requests.start_soon(closing.request, 10, name="request")
        requests.ask_to_close()
        await trio.sleep(5)
        requests.start_soon(closing.request, 10, name="request")
    assert trio.current_time() == 15
    assert closing.calls.count("request done") == 2
    assert closing.calls[-1] == "release"


@bounded
async def test_cancelling_from_outside_stops_accepting_first(autojump_clock: Any) -> None:
    closing = Closing()
    with trio.move_on_after(5) as hard:
        async with closing.opened() as requests:
            requests.start_soon(closing.request, name="request")
            await trio.sleep_forever()
    assert hard.cancelled_caught
    assert closing.calls[-1] == "release"
    assert sorted(closing.calls) == sorted(
        ["stop accepting", "stopped", "request cancelled", "release"]
    )
    assert requests.closing
    assert not requests.crashed
    await requests.wait_closed()


@bounded
async def test_cancel_ends_the_requests_and_not_the_body(autojump_clock: Any) -> None:
    closing = Closing()
    async with closing.opened() as requests:
        requests.start_soon(closing.request, name="request")
        await wait_all_tasks_blocked()
        requests.cancel()
        assert requests.closing
        await requests.wait_closed()
        await trio.sleep(100)
    assert "request cancelled" in closing.calls
    assert closing.calls[-1] == "release"
    assert not requests.crashed


@bounded
async def test_cancel_before_opening(autojump_clock: Any) -> None:
    closing = Closing()
    closing.requests.cancel()
    async with closing.opened() as requests:
        assert requests.closing
        await requests.wait_closed()
    assert closing.calls == ["stop accepting", "stopped", "patience", "release"]


@bounded
async def test_a_request_that_crashes_cancels_the_body(autojump_clock: Any) -> None:
    async def crash() -> None:
        await trio.sleep(5)
        raise KeyboardInterrupt("from a request")

    async def use() -> None:
        async with closing.opened() as requests:
            requests.start_soon(closing.request, name="request")
            requests.start_soon(crash, name="request")
            await trio.sleep_forever()

    closing = Closing()
    with pytest.raises(KeyboardInterrupt, match="from a request") as raised:
        await use()
    assert raised.value.__cause__ is None
    assert closing.requests.crashed
    assert closing.calls[-1] == "release"
    assert "request cancelled" in closing.calls
    assert "stopped" in closing.calls
    await closing.requests.wait_closed()


@bounded
async def test_several_crashes_are_a_group(autojump_clock: Any) -> None:
    async def crash(error: BaseException) -> None:
        try:
            await trio.sleep(5)
        finally:
            raise error

    async def use() -> None:
        async with closing.opened() as requests:
            requests.start_soon(crash, KeyboardInterrupt(), name="request")
            requests.start_soon(crash, SystemExit(), name="request")

    closing = Closing()
    with pytest.raises(BaseExceptionGroup) as raised:
        await use()
    assert {type(error) for error in raised.value.exceptions} == {
        KeyboardInterrupt,
        SystemExit,
    }
    assert closing.requests.crashed


@bounded
async def test_an_exception_of_the_body_cancels_the_requests(autojump_clock: Any) -> None:
    async def use() -> None:
        async with closing.opened() as requests:
            requests.start_soon(closing.request, name="request")
            await wait_all_tasks_blocked()
            raise error

    closing = Closing()
    error = LookupError("the body's")
    with pytest.raises(LookupError) as raised:
        await use()
    assert raised.value is error
    assert "request cancelled" in closing.calls
    assert closing.calls[-1] == "release"
    assert not closing.requests.crashed
    await closing.requests.wait_closed()


@pytest.mark.parametrize("failing", ["stop_accepting", "patience", "release"])
@bounded
async def test_closing_survives_what_fails_in_it(autojump_clock: Any, failing: str) -> None:
    def fail() -> float:
        raise LookupError(failing)

    async def fail_later() -> None:
        await trio.sleep(1)
        raise LookupError(failing)

    async def wait_outside() -> None:
        await closing.requests.wait_closed()
        closing.calls.append("waited")

    async def use() -> None:
        async with closing.opened() as requests:
            requests.start_soon(closing.request, 10, name="request")

    closing = Closing()
    setattr(closing, failing, fail_later if failing == "stop_accepting" else fail)
    async with trio.open_nursery() as outside:
        outside.start_soon(wait_outside)
        with pytest.raises(LookupError, match=failing):
            await use()
    done = "request done" if failing == "release" else "request cancelled"
    assert done in closing.calls
    assert ("release" in closing.calls) is (failing != "release")
    assert closing.calls[-1] == "waited"


@bounded
async def test_requests_need_an_open_nursery(autojump_clock: Any) -> None:
    closing = Closing()
    with pytest.raises(RuntimeError, match="entered"):
        closing.requests.start_soon(closing.request, name="too early")
    async with closing.opened():
        pass
    with pytest.raises(RuntimeError):
        closing.requests.start_soon(closing.request, name="too late")


@pytest.mark.parametrize("moment", range(6))
@bounded
async def test_opening_may_be_cancelled_at_any_moment(
    autojump_clock: Any, moment: int
) -> None:
    async def watch() -> None:
        await closing.requests.wait_opened()
        await closing.requests.wait_closed()

    async def open_and_stay() -> None:
        async with closing.opened():
            await trio.sleep_forever()

    closing = Closing()
    async with trio.open_nursery() as outside:
        outside.start_soon(watch)
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(open_and_stay)
                for _ in range(moment):
                    await trio.lowlevel.checkpoint()
                scope.cancel()
    assert closing.requests.closing
    assert closing.calls == ["stop accepting", "stopped", "release"]


# -- who is a part of a request ------------------------------------------------------------


@bounded
async def test_a_request_and_what_it_starts_are_known() -> None:
    ours, other = Closing(), Closing()
    seen: dict[str, tuple[bool, bool]] = {}

    def look(who: str) -> None:
        seen[who] = ours.requests.is_current(), other.requests.is_current()

    async def look_later(who: str) -> None:
        await trio.lowlevel.checkpoint()
        look(who)

    async def request() -> None:
        look("before it has said so")
        ours.requests.enter_request()
        ours.requests.enter_request()
        look("request")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(look_later, "its child")
            nursery.start_soon(look_later, "another child")
        outside.start_soon(look_later, "its child elsewhere")
        await trio.to_thread.run_sync(trio.from_thread.run_sync, look, "its thread")
        # A request of one server inside one of another is a part of both.
        other.requests.start_soon(inner_request, name="inner")
        requested.set()

    async def inner_request() -> None:
        other.requests.enter_request()
        await look_later("inner request")

    async def sibling() -> None:
        await requested.wait()
        look("sibling")

    requested = trio.Event()
    async with trio.open_nursery() as outside, ours.opened(), other.opened():
        ours.requests.start_soon(request, name="request")
        ours.requests.start_soon(sibling, name="sibling")
        await requested.wait()
        look("body")
    assert seen == {
        "before it has said so": (False, False),
        "request": (True, False),
        "its child": (True, False),
        "another child": (True, False),
        "its child elsewhere": (True, False),
        "its thread": (True, False),
        "inner request": (True, True),
        "sibling": (False, False),
        "body": (False, False),
    }


@bounded
async def test_a_loop_marks_what_it_starts_while_it_runs(autojump_clock: Any) -> None:
    ours, other = Closing(), Closing()
    seen: list[tuple[bool, bool]] = []

    async def look() -> None:
        await trio.lowlevel.checkpoint()
        seen.append((ours.requests.is_current(), other.requests.is_current()))

    async with trio.open_nursery() as nursery:
        with ours.requests.surrounding():
            nursery.start_soon(look)
            with other.requests.surrounding():
                await look()
            await look()
        await look()
    assert sorted(seen) == [(False, False), (True, False), (True, False), (True, True)]


@bounded
async def test_the_tasks_of_requests_have_a_name(autojump_clock: Any) -> None:
    names = []

    async def request() -> None:
        names.append(trio.lowlevel.current_task().name)

    closing = Closing()
    async with closing.opened() as requests:
        requests.start_soon(request, name="request")
    assert names == ["request"]


@bounded
async def test_asking_in_every_order(autojump_clock: Any) -> None:
    """Leaving, asking, cancelling and crashing, two at a time and some steps apart."""

    async def crash() -> None:
        await crashing.wait()
        raise KeyboardInterrupt

    async def act(what: Callable[[], object], steps: int) -> None:
        for _ in range(steps):
            await trio.lowlevel.checkpoint()
        what()

    async def use(*acts: tuple[Callable[[], object], int]) -> None:
        async with trio.open_nursery() as outside:
            try:
                with hard:
                    async with closing.opened() as requests:
                        requests.start_soon(closing.request, 10, name="request")
                        requests.start_soon(crash, name="request")
                        for what, steps in acts:
                            outside.start_soon(act, what, steps)
                        await leaving.wait()
            except KeyboardInterrupt:
                assert crashing.is_set()

    endings: list[Callable[[], Callable[[], object]]] = [
        lambda: leaving.set,
        lambda: closing.requests.ask_to_close,
        lambda: closing.requests.cancel,
        lambda: hard.cancel,
        lambda: crashing.set,
    ]
    for first in endings:
        for second in endings:
            for steps in range(8):
                closing = Closing(patience=5)
                crashing, leaving, hard = trio.Event(), trio.Event(), trio.CancelScope()
                await use((first(), 2), (second(), steps), (leaving.set, 20))
                assert closing.calls.count("stop accepting") == 1
                assert closing.calls[-1] == "release"
                assert closing.requests.closing
                assert {"request done", "request cancelled"} & set(closing.calls)
                await closing.requests.wait_closed()
