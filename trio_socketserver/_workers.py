"""Worker threads for blocking code.

The rules:

* A worker is a thread and the task that hosts it by `trio.to_thread`, so `trio.from_thread`
  works inside. It does one job after another: handing a job to a thread that waits for one
  takes 0.6 of the time that a fresh `threading.Thread`, or a `to_thread.run_sync`, takes.
* A job is awaited by the task that brings it, and cancelled with that task, by whatever
  scope that may be: its ``wake`` is called at once, from the scheduler, and `from_thread`
  raises in it. So nothing has to watch, and a job that is not cancelled pays nothing.
* The host is shielded and cancelled by nothing else, so that the job is never cancelled
  unless its task is. What ends the shield is the end of the thread.
* Workers, idle or not, are in one place: all lists here belong to trio's thread, and the
  other threads only send messages there.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import functools
import math
import queue
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import outcome
import trio

IDLE_SECONDS: Final = 10.0
"""How long a thread waits for its next job before it ends; trio keeps its own as long."""

T = TypeVar("T")

CallTrio: TypeAlias = Callable[[Callable[[], Awaitable[Any]]], Any]
"""Has a coroutine function awaited, and waits for it; such as `call_trio` with a token."""

_this_thread = threading.local()


def call_trio(token: trio.lowlevel.TrioToken, function: Callable[[], Awaitable[T]]) -> Any:
    """Have trio await *function*, and wait for what it returns; from any thread.

    In a worker it is cancelled with the worker's job. Any other thread's call is nobody's
    to cancel. In trio's own thread, where nothing may wait, it is returned for awaiting.

    Args:
        token: the trio run, for a thread that is no worker.
        function: a coroutine function.
    """
    if trio.lowlevel.in_trio_run():
        return function()
    if getattr(_this_thread, "token", None) is token:
        return trio.from_thread.run(function)
    return trio.from_thread.run(function, trio_token=token)


def _nothing() -> None:
    pass


class StartSoon(Protocol):
    """What starts a task, as `trio.Nursery.start_soon` does."""

    def __call__(
        self, function: Callable[..., Awaitable[object]], /, *args: Any, name: str
    ) -> object:
        """Start a task."""


class Job:
    """A call that blocks, to be made in a worker thread.

    Args:
        function: what to call there.
        name: the thread's name meanwhile.
        wake: called in trio's thread when the job is cancelled; makes the function return.
        daemon: whether it may be abandoned. That has its price: in such a job
            `trio.from_thread.run` runs in a system task, which nothing cancels, and
            `trio.from_thread.check_cancelled` raises only when it has been abandoned.
        abandon_at_once: whether cancelling abandons it.
        must_run: whether it is to be called even if it is cancelled before that.
        release: called, if the job has been abandoned, in the thread when it has ended.

    Attributes:
        abandoned: whether nobody waits for the job any more.
    """

    __slots__ = (
        "_abandon_at_once",
        "_begun",
        "_cancelled",
        "_context",
        "_function",
        "_must_run",
        "_outcome",
        "_raise_cancel",
        "_task",
        "_wake",
        "_worker",
        "abandoned",
        "daemon",
        "name",
        "release",
    )

    def __init__(
        self,
        function: Callable[[], object],
        *,
        name: str,
        wake: Callable[[], object] = _nothing,
        daemon: bool = False,
        abandon_at_once: bool = False,
        must_run: bool = False,
        release: Callable[[], object] = _nothing,
    ) -> None:
        self._function = function
        self.name = name
        self._wake = wake
        self.daemon = daemon
        self._abandon_at_once = abandon_at_once
        self._must_run = must_run
        self.release = release
        self.abandoned = False
        self._begun = False
        self._cancelled = False
        self._raise_cancel: Callable[[], Any] | None = None
        self._outcome: outcome.Outcome[object] | None = None
        self._worker: _WorkerThread | None = None
        self._context = contextvars.copy_context()
        self._task: trio.lowlevel.Task | None = None

    # -- in trio's thread ------------------------------------------------------------

    # A KeyboardInterrupt must not get between a thread and the task that owns it.
    @trio.lowlevel.enable_ki_protection
    async def run(self, workers: Workers) -> None:
        """Have a worker do the job, when there may be one more, and wait for it; once only.

        Raises:
            BaseException: what the function raises, unless the job has been cancelled.
            RuntimeError: no thread could be started.
        """
        if not self._must_run:
            await trio.lowlevel.checkpoint_if_cancelled()
        self._task = trio.lowlevel.current_task()
        workers.assign(self)
        await trio.lowlevel.wait_task_rescheduled(self._abort)
        result, self._outcome = self._outcome, None
        try:
            if self._raise_cancel is not None:
                self._raise_cancel()
            assert result is not None
            result.unwrap()
        finally:
            del result  # An error's traceback holds this frame, and the job.

    def _abort(self, raise_cancel: Callable[[], Any]) -> trio.lowlevel.Abort:
        self._cancelled = True
        if self._worker is None:  # It waits for its turn.
            self._task = None
            return trio.lowlevel.Abort.SUCCEEDED
        if not self.daemon and (self._begun or not self._must_run):
            self._worker.scope.cancel()
        self._wake()
        if self._abandon_at_once:
            self._task = None
            self._leave()
            return trio.lowlevel.Abort.SUCCEEDED
        self._raise_cancel = raise_cancel
        return trio.lowlevel.Abort.FAILED

    def abandon(self) -> None:
        """Leave a job to itself if it has been cancelled and runs still."""
        if self._cancelled and self._task is not None and self._worker is not None:
            self._leave()
            self.end()

    def _leave(self) -> None:
        assert self._worker is not None
        self.abandoned = True
        self._worker.scope.cancel()
        self._worker.pool.abandon()

    @property
    def waits_for_turn(self) -> bool:
        """Whether the job still wants a worker."""
        return not self._cancelled

    def start(self, worker: _WorkerThread) -> None:
        """Hand the job to a worker."""
        self._worker = worker
        worker.calls.put(self._call)

    def finished(self) -> None:
        """Go on, in trio's thread, when the function has returned."""
        assert self._worker is not None
        self._worker.finished(self)

    def fail(self, error: Exception) -> None:
        """Set what the job, which has not begun, is to raise."""
        self._outcome = outcome.Error(error)

    def end(self) -> None:
        """Let the task that waits for the job go on."""
        task, self._task = self._task, None
        assert task is not None
        trio.lowlevel.reschedule(task)

    # -- in the worker's thread ------------------------------------------------------

    def _call(self) -> None:
        worker = self._worker
        assert worker is not None
        if not self._cancelled or self._must_run:
            self._begun = True
            if self._cancelled and not self.daemon:
                # That was too early for a thread that did not run yet.
                worker.pool.token.run_sync_soon(worker.scope.cancel)
            thread = threading.current_thread()
            thread.name, its_own = self.name, thread.name
            self._outcome = self._context.run(outcome.capture, self._function)
            thread.name = its_own
        worker.pool.tell_finished(self)

    def outlive(self) -> None:
        """End, when trio has ended before."""
        assert self._worker is not None
        self.release()
        self._worker.calls.put(None)


class _WorkerThread:
    """A thread that does jobs, and its host in trio."""

    __slots__ = ("_first", "calls", "daemon", "pool", "scope")

    def __init__(self, pool: Workers, first: Job) -> None:
        self.pool = pool
        self._first: Job | None = first
        self.daemon = first.daemon
        self.calls: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self.scope = trio.CancelScope(shield=True)

    async def host(self) -> None:
        """Have a thread and wait for its end, which comes at once if none can be had."""
        # Past its first step `to_thread` looks for a cancellation in the thread only.
        if not self.scope.cancel_called:
            try:
                with self.scope:
                    await trio.to_thread.run_sync(
                        self._work,
                        thread_name="trio_socketserver worker",
                        abandon_on_cancel=self.daemon,
                        limiter=self.pool.limiter,
                    )
            except Exception as error:  # The thread could not be started.
                assert self._first is not None
                self._first.fail(error)
            else:
                return
        first, self._first = self._first, None
        assert first is not None
        if first.abandoned:
            first.release()
            self.pool.abandoned_has_ended()
        else:
            self.pool.lose()
            first.end()

    def _work(self) -> None:
        _this_thread.token = self.pool.token
        self._first = None
        try:
            while True:
                try:
                    call = self.calls.get(timeout=IDLE_SECONDS)
                except queue.Empty:
                    # Perhaps there is a job under way to us: trio's thread knows.
                    self.pool.token.run_sync_soon(self.pool.retire, self)
                    call = self.calls.get()
                if call is None:
                    return
                call()
                del call  # Nothing of a request outlives it while we wait.
        finally:
            del _this_thread.token

    def finished(self, job: Job) -> None:
        """Go on, in trio's thread, when a job has ended in ours."""
        if job.abandoned:
            self.calls.put(job.release)
            self.calls.put(None)
            self.pool.abandoned_has_ended()
            return
        if self.scope.cancel_called:
            self.calls.put(None)
            self.pool.lose()
        else:
            self.pool.take_back(self)
        job.end()


class Workers:
    """The workers of one server.

    Args:
        start_soon: starts the tasks that host the threads, in a nursery that is left after
            `close` only.
        limit: tells how many jobs may be done at once; the others wait for their turn.
        on_room: called when an abandoned thread has ended after all.

    Attributes:
        abandoned: threads that have been abandoned and run still.
    """

    def __init__(
        self,
        start_soon: StartSoon,
        limit: Callable[[], float] = lambda: math.inf,
        on_room: Callable[[], object] = _nothing,
    ) -> None:
        self._start_soon = start_soon
        self._limit = limit
        self._on_room = on_room
        self._idle: list[_WorkerThread] = []
        self._waiting: collections.deque[Job] = collections.deque()
        self._finished: collections.deque[Job] = collections.deque()
        self._told = False
        self._count = 0
        self._closed = False
        self.abandoned = 0
        self.token = trio.lowlevel.current_trio_token()
        # The jobs are limited, not the threads: an idle one must not keep a job waiting.
        self.limiter = trio.CapacityLimiter(math.inf)

    def tell_finished(self, job: Job) -> None:
        """Tell trio's thread that a job has ended; called in the worker's."""
        self._finished.append(job)
        # Told already? Then the job is there in time: trio's thread first takes note that
        # it has been told, and looks for jobs after that.
        if not self._told:
            self._told = True
            try:
                self.token.run_sync_soon(self._take_finished)
            except trio.RunFinishedError:
                # Abandoned by a program that has long gone on; others may be, too.
                self._told = False
                with contextlib.suppress(IndexError):
                    while True:
                        self._finished.popleft().outlive()

    def _take_finished(self) -> None:
        self._told = False
        while self._finished:
            self._finished.popleft().finished()

    def assign(self, job: Job) -> None:
        """Have a job done, now or when it is its turn."""
        self._waiting.append(job)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._waiting:
            job = self._waiting[0]
            if job.waits_for_turn:
                if self._idle and self._idle[-1].daemon is job.daemon:
                    job.start(self._idle.pop())
                elif self._count - len(self._idle) < self._limit():
                    worker = _WorkerThread(self, job)
                    job.start(worker)
                    self._count += 1
                    # Its context is nobody's: each job brings its own.
                    start = functools.partial(self._start_soon, name="worker thread")
                    contextvars.Context().run(start, worker.host)
                else:
                    return
            self._waiting.popleft()

    def take_back(self, worker: _WorkerThread) -> None:
        """Keep a worker that has no job for the next."""
        self._idle.append(worker)
        self._dispatch()
        if self._closed:
            self.retire(worker)

    def retire(self, worker: _WorkerThread) -> None:
        """End a worker, unless it has a job."""
        if worker in self._idle:
            self._idle.remove(worker)
            worker.calls.put(None)
            self.lose()

    def lose(self) -> None:
        """Take note that a worker does no more jobs."""
        self._count -= 1
        self._dispatch()

    def abandon(self) -> None:
        """Take note that a worker's thread is on its own."""
        self.abandoned += 1
        self._count -= 1
        # Later: while trio cancels, no task may be started.
        self.token.run_sync_soon(self._dispatch)

    def abandoned_has_ended(self) -> None:
        """Take note that such a thread has ended."""
        self.abandoned -= 1
        self._on_room()
        self._dispatch()

    def close(self) -> None:
        """End the idle workers, and the others when they have no job; idempotent."""
        self._closed = True
        for worker in list(self._idle):
            self.retire(worker)
