"""Worker threads: what a job is promised, how threads are reused, limited and ended."""

from __future__ import annotations

import contextlib
import contextvars
import math
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import trio
from blocking_servers import ends, happens, wait_for
from blocking_world import AtHost, is_true, no_more_threads
from helpers import REAL_LIMIT, bounded
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import _workers
from trio_socketserver._workers import Job, Workers, call_trio

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


@contextlib.asynccontextmanager
async def some_workers(
    limit: float = math.inf, on_room: Callable[[], object] = lambda: None
) -> AsyncIterator[Workers]:
    """Have workers; at the end, wait until all of their threads have ended."""
    async with trio.open_nursery() as nursery:
        workers = Workers(nursery.start_soon, lambda: limit, on_room)
        try:
            yield workers
        finally:
            workers.close()


async def work(workers: Workers, function: Callable[[], object], **options: Any) -> None:
    await Job(function, name="a job of a test", **options).run(workers)


class Busy:
    """A function that returns when it is let go.

    Attributes:
        thread: where it has been called.
    """

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.let_go = threading.Event()
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        self.thread = threading.current_thread()
        self.begun.set()
        wait_for(self.let_go)


@contextlib.asynccontextmanager
async def a_task(
    function: Callable[..., Any], *args: Any
) -> AsyncIterator[trio.CancelScope]:
    """Run *function* in a task beside the block, in a scope; wait for it."""
    scope = trio.CancelScope()

    async def scoped() -> None:
        with scope:
            await function(*args)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(scoped)
        yield scope


# -- a job ---------------------------------------------------------------------------------


@bounded
async def test_a_job_runs_in_a_thread_of_its_name() -> None:
    names = []
    async with some_workers() as workers:
        await Job(
            lambda: names.append(threading.current_thread().name), name="number one"
        ).run(workers)
    assert names == ["number one"]


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
@bounded
async def test_what_a_job_raises_is_raised(error: type[BaseException]) -> None:
    def fail() -> None:
        raise error("so it is")

    async with some_workers() as workers:
        with pytest.raises(error, match="so it is"):
            await work(workers, fail)
        await work(workers, lambda: None)  # The thread is as good as ever.


@bounded
async def test_a_job_has_the_context_of_its_maker() -> None:
    seen = []
    async with some_workers() as workers:
        variable.set("mine")
        job = Job(lambda: seen.append(variable.get()), name="a job")
        variable.set("later")
        await job.run(workers)
    assert seen == ["mine"]


@bounded
async def test_trio_can_be_called() -> None:
    seen: list[object] = []

    async def double(number: int) -> int:
        await trio.lowlevel.checkpoint()
        return number * 2

    def call() -> None:
        seen.append(trio.from_thread.run(double, 21))
        seen.append(trio.from_thread.run_sync(trio.current_time))
        seen.append(call_trio(workers.token, lambda: double(4)))
        trio.from_thread.check_cancelled()

    async with some_workers() as workers:
        await work(workers, call)
    assert seen[0] == 42
    assert isinstance(seen[1], float)
    assert seen[2] == 8


@bounded
async def test_trio_can_be_called_by_any_thread() -> None:
    seen: list[object] = []

    async def current_task_is_nobodys() -> bool:
        return trio.lowlevel.current_task().parent_nursery is not None

    def call() -> None:
        seen.append(call_trio(workers.token, current_task_is_nobodys))

    async with some_workers() as workers:
        await trio.to_thread.run_sync(wait_for_thread, call)
        assert len(seen) == 1
        # A thread that was a worker once is none of these workers any more.
        with pytest.raises(trio.RunFinishedError):
            await trio.to_thread.run_sync(call_trio, dead_token(), trio.lowlevel.checkpoint)


def wait_for_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(REAL_LIMIT)


def dead_token() -> trio.lowlevel.TrioToken:
    tokens: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        tokens.append(trio.lowlevel.current_trio_token())

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    thread.join(REAL_LIMIT)
    return tokens[0]


# -- reuse ---------------------------------------------------------------------------------


@bounded
async def test_one_thread_does_one_job_after_another() -> None:
    seen: list[threading.Thread] = []
    async with some_workers() as workers:
        for _ in range(5):
            await work(workers, lambda: seen.append(threading.current_thread()))
    assert len(set(seen)) == 1


@bounded
async def test_jobs_side_by_side_have_a_thread_each() -> None:
    barrier = threading.Barrier(5)
    async with some_workers() as workers, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(work, workers, lambda: barrier.wait(REAL_LIMIT))
    assert not barrier.broken


@bounded
async def test_nothing_of_a_job_outlives_it() -> None:
    class Precious:
        def __call__(self) -> None:
            pass

        def __del__(self) -> None:
            gone.set()

    gone = threading.Event()
    async with some_workers() as workers:
        await work(workers, Precious())
        await happens(gone)


@bounded
async def test_an_idle_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_workers, "IDLE_SECONDS", 0.001)
    ended: list[str] = []

    async def host(function: Any, *args: Any) -> None:
        await function(*args)
        ended.append("a worker")

    async with trio.open_nursery() as nursery:

        def start_soon(function: Any, *args: Any, name: str) -> None:
            nursery.start_soon(host, function, *args, name=name)

        workers = Workers(start_soon)
        await work(workers, lambda: None)
        await is_true(lambda: bool(ended))
        # The limit has room for another.
        await work(workers, lambda: None)
        await is_true(lambda: len(ended) == 2)


@bounded
async def test_a_job_under_way_to_an_idle_thread_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_workers, "IDLE_SECONDS", 0.001)
    seen = []
    async with some_workers() as workers:
        for number in range(10):
            await work(workers, lambda number=number: seen.append(number))
            # Now the thread gives up, and trio's does not hear of it before the next job.
            time.sleep(0.005)  # noqa: ASYNC251
    assert seen == list(range(10))


@bounded
async def test_closing_ends_idle_threads_and_lets_the_others_finish() -> None:
    busy = Busy()
    async with some_workers() as workers, a_task(work, workers, busy):
        await happens(busy.begun)
        await work(workers, lambda: None)
        workers.close()
        workers.close()
        # Who comes late is served.
        await work(workers, lambda: None)
        busy.let_go.set()


@bounded
async def test_daemonic_and_other_jobs_have_different_threads() -> None:
    seen = []
    async with some_workers(1) as workers:
        for daemon in (False, True, False, True):
            await work(
                workers, lambda: seen.append(threading.current_thread()), daemon=daemon
            )
    assert seen[0] is not seen[1]


# -- limits --------------------------------------------------------------------------------


@bounded
async def test_jobs_beyond_the_limit_wait_for_their_turn() -> None:
    order = []
    busy = Busy()
    async with some_workers(1) as workers, a_task(work, workers, busy):
        await happens(busy.begun)
        async with a_task(work, workers, lambda: order.append("second")):
            await wait_all_tasks_blocked()
            async with a_task(work, workers, lambda: order.append("third")):
                await wait_all_tasks_blocked()
                assert order == []
                busy.let_go.set()
    assert order == ["second", "third"]


@bounded
async def test_who_waits_for_a_turn_can_be_cancelled() -> None:
    ran, woken = [], []
    busy = Busy()
    async with some_workers(1) as workers, a_task(work, workers, busy):
        await happens(busy.begun)
        job = Job(lambda: ran.append("never"), name="", wake=lambda: woken.append("never"))
        async with a_task(job.run, workers) as scope:
            await wait_all_tasks_blocked()
            scope.cancel()
        assert scope.cancelled_caught
        async with a_task(work, workers, lambda: ran.append("next")):
            await wait_all_tasks_blocked()
            busy.let_go.set()
    assert ran == ["next"]
    assert woken == []


# -- cancellation --------------------------------------------------------------------------


@bounded
async def test_a_cancelled_job_is_woken_and_waited_for() -> None:
    woken = []
    busy = Busy()

    def wake() -> None:
        woken.append(trio.lowlevel.in_trio_run())
        busy.let_go.set()

    async with some_workers(1) as workers:
        job = Job(busy, name="", wake=wake)
        async with a_task(job.run, workers) as scope:
            await happens(busy.begun)
            scope.cancel()
        assert scope.cancelled_caught
        assert busy.let_go.is_set()
        assert woken == [True]
        assert not job.abandoned
        # Its thread, which trio takes for a cancelled one, does no other job.
        threads = []
        await work(workers, lambda: threads.append(threading.current_thread().ident))
        async with a_task(work, workers, lambda: trio.from_thread.check_cancelled()):
            pass


@bounded
async def test_a_cancelled_worker_is_not_used_again() -> None:
    async with some_workers(1) as workers:
        busy = Busy()
        job = Job(busy, name="", wake=busy.let_go.set)
        async with a_task(job.run, workers) as scope:
            await happens(busy.begun)
            scope.cancel()
        assert workers._idle == []
        seen = []
        await work(workers, lambda: seen.append(trio.from_thread.run(trio.sleep, 0)))
        assert seen == [None]
        assert len(workers._idle) == 1


@bounded
async def test_a_job_cancelled_before_it_is_brought_never_runs() -> None:
    ran: list[str] = []
    async with some_workers() as workers:
        with trio.CancelScope() as scope:
            scope.cancel()
            await work(workers, lambda: ran.append("never"))
        assert scope.cancelled_caught
        with trio.CancelScope() as scope:
            scope.cancel()
            await work(workers, lambda: ran.append("all the same"), must_run=True)
        assert scope.cancelled_caught
    assert ran == ["all the same"]


@pytest.mark.parametrize("must_run", [False, True])
@bounded
async def test_a_job_cancelled_before_its_host_has_begun(must_run: bool) -> None:
    ran, woken = [], []
    async with some_workers(1) as workers:
        with trio.CancelScope() as scope, AtHost(scope.cancel):
            await work(
                workers,
                lambda: ran.append("it"),
                must_run=must_run,
                wake=lambda: woken.append("it"),
            )
        assert scope.cancelled_caught
        assert workers._count == 0
        await work(workers, lambda: ran.append("another"))
    assert ran == ["it", "another"][not must_run :]
    assert woken == ["it"]


@bounded
async def test_a_job_that_must_run_knows_that_it_is_cancelled() -> None:
    seen = []

    def check() -> None:
        # By a message to trio's thread, so not at once.
        try:
            trio.from_thread.run(trio.sleep_forever)
        except trio.Cancelled:
            seen.append("cancelled")
            raise

    async with some_workers() as workers:
        with trio.CancelScope() as scope:
            scope.cancel()
            await work(workers, check, must_run=True)
        assert scope.cancelled_caught
    assert seen == ["cancelled"]


@bounded
async def test_a_job_that_has_not_begun_in_its_idle_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = threading.Event()

    class Held(Job):
        __slots__ = ()

        def _call(self) -> None:
            wait_for(held)
            super()._call()

    ran: list[str] = []
    async with some_workers(1) as workers:
        await work(workers, lambda: None)
        job = Held(lambda: ran.append("never"), name="")
        async with a_task(job.run, workers) as scope:
            await wait_all_tasks_blocked()
            scope.cancel()
            held.set()
        assert scope.cancelled_caught
    assert ran == []


# -- abandoning ----------------------------------------------------------------------------


@bounded
async def test_a_job_can_be_abandoned_at_once() -> None:
    room: list[int] = []
    released: list[threading.Thread] = []
    busy = Busy()
    async with some_workers(1, on_room=lambda: room.append(workers.abandoned)) as workers:
        job = Job(
            busy,
            name="",
            daemon=True,
            abandon_at_once=True,
            release=lambda: released.append(threading.current_thread()),
        )
        async with a_task(job.run, workers) as scope:
            await happens(busy.begun)
            scope.cancel()
        assert scope.cancelled_caught
        assert job.abandoned
        assert workers.abandoned == 1
        assert (room, released) == ([], [])
        await work(workers, lambda: None)
        busy.let_go.set()
        await is_true(lambda: room == [0] and bool(released))
        assert released == [busy.thread]
        assert workers.abandoned == 0
        await ends(busy.thread)


@bounded
async def test_abandoned_before_its_host_has_begun() -> None:
    ran, released, room = [], [], []
    async with some_workers(on_room=lambda: room.append("there")) as workers:
        job = Job(
            lambda: ran.append("it"),
            name="",
            daemon=True,
            abandon_at_once=True,
            release=lambda: released.append("it"),
        )
        with trio.CancelScope() as scope, AtHost(scope.cancel):
            await job.run(workers)
        assert scope.cancelled_caught
        assert job.abandoned
        await is_true(lambda: bool(room) and bool(released))
        assert workers.abandoned == 0
    assert ran == []
    assert released == ["it"]


@bounded
async def test_a_cancelled_job_can_be_abandoned_later() -> None:
    busy = Busy()
    async with some_workers(1) as workers:
        job = Job(busy, name="", daemon=True)
        async with a_task(job.run, workers) as scope:
            await happens(busy.begun)
            scope.cancel()
            await wait_all_tasks_blocked()
            assert not job.abandoned
            job.abandon()
        assert scope.cancelled_caught
        assert job.abandoned
        assert workers.abandoned == 1
        job.abandon()  # Too late: it is already.
        assert workers.abandoned == 1
        busy.let_go.set()
        await is_true(lambda: workers.abandoned == 0)
        await ends(busy.thread)


@bounded
async def test_who_has_ended_cannot_be_abandoned() -> None:
    async with some_workers() as workers:
        job = Job(lambda: None, name="", daemon=True)
        job.abandon()
        await job.run(workers)
        job.abandon()
        assert not job.abandoned
        assert workers.abandoned == 0


@bounded
async def test_abandoning_makes_room_for_who_waits() -> None:
    ran = []
    busy = Busy()
    async with some_workers(1) as workers:
        job = Job(busy, name="", daemon=True, abandon_at_once=True)
        async with a_task(job.run, workers) as scope:
            await happens(busy.begun)
            async with a_task(work, workers, lambda: ran.append("next")):
                await wait_all_tasks_blocked()
                scope.cancel()
        assert ran == ["next"]
        busy.let_go.set()
        await is_true(lambda: workers.abandoned == 0)
        await ends(busy.thread)


def test_an_abandoned_job_outlives_the_run() -> None:
    released = threading.Event()
    busy = Busy()

    async def main() -> None:
        with trio.fail_after(REAL_LIMIT):
            async with some_workers(1) as workers:
                job = Job(
                    busy,
                    name="",
                    daemon=True,
                    abandon_at_once=True,
                    release=released.set,
                )
                async with a_task(job.run, workers) as scope:
                    await happens(busy.begun)
                    scope.cancel()

    trio.run(main)
    assert not released.is_set()
    busy.let_go.set()
    assert released.wait(REAL_LIMIT)
    assert busy.thread
    while not busy.thread.name.startswith("Trio thread") and busy.thread.is_alive():
        time.sleep(0.001)


# -- no thread -----------------------------------------------------------------------------


@pytest.mark.parametrize("daemon", [False, True])
@bounded
async def test_a_thread_that_cannot_be_started(
    monkeypatch: pytest.MonkeyPatch, daemon: bool
) -> None:
    async with some_workers(1) as workers:
        async with no_more_threads(monkeypatch):
            for _ in range(2):
                with pytest.raises(RuntimeError, match="can't start new thread"):
                    await work(workers, lambda: None, daemon=daemon)
        await work(workers, lambda: None)


@bounded
async def test_who_waits_for_a_turn_has_it_when_no_thread_can_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    failed = []

    async def fail() -> None:
        try:
            await work(workers, lambda: None)
        except RuntimeError:
            failed.append("one")

    async with (
        some_workers(1) as workers,
        no_more_threads(monkeypatch),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(fail)
        nursery.start_soon(fail)
    assert failed == ["one", "one"]
