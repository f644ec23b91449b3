"""Tasks that run one request after another.

Beginning and ending a task takes trio some 5 µs: a tenth of a short connection, half of a
datagram. So a task that has run a request stays for the next. The rules:

* A request has a task for itself for as long as it lasts. Only those that wait for nothing
  at all, as many a datagram does, are run in a row (`start_in_line`).
* It finds the context variables of who starts it, as in a task of its own. A task whose
  request has changed them ends with it.
* What is spare waits for no event, so it never wakes up by itself; and it ends when the
  server closes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from typing import Any, Final, TypeAlias

import outcome
import trio

Work: TypeAlias = tuple[Callable[..., Awaitable[object]], tuple[Any, ...]]
"""A function and its arguments: a request to be run."""

SPARE_TASKS: Final = 64
"""Tasks kept for later requests at most: as many as begin in one batch. Each takes 3 KB."""


def _same(one: Context, other: Context) -> bool:
    """Tell whether a request would find the same in both."""
    try:
        return one == other
    except Exception:
        return False  # Not everything that a variable may hold can be compared.


class SpareTasks:
    """The tasks that run requests, those at work and those that wait for work.

    Args:
        nursery: where they live.
        name: what they are called.
    """

    def __init__(self, nursery: trio.Nursery, name: str) -> None:
        self._nursery = nursery
        self._name = name
        self._spare: list[trio.lowlevel.Task] = []
        self._line: deque[Work] | None = None
        self._line_context = copy_context()
        self._limit = SPARE_TASKS

    def start(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run a request in a spare task, or in a new one. No checkpoint."""
        work = function, args
        if self._spare and _same(self._spare[-1].context, copy_context()):
            trio.lowlevel.reschedule(self._spare.pop(), outcome.Value(work))
        else:
            self._nursery.start_soon(self._run, work, name=self._name)

    def start_in_line(self, function: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Run a request that perhaps waits for nothing. No checkpoint.

        Those that come together share a task until one of them waits after all; the others
        then get a task each.
        """
        context = copy_context()
        if self._line is None or not _same(context, self._line_context):
            self._line, self._line_context = deque(), context
            self.start(self._run_line, self._line)
        self._line.append((function, args))

    def dismiss(self) -> None:
        """End the tasks that are spare, and from now on those that become so."""
        self._limit = 0
        while self._spare:
            trio.lowlevel.reschedule(self._spare.pop(), outcome.Value(None))

    async def _run(self, work: Work | None) -> None:
        task, context = trio.lowlevel.current_task(), copy_context()

        def abort(_: Callable[[], Any]) -> trio.lowlevel.Abort:
            self._forget(task)
            return trio.lowlevel.Abort.SUCCEEDED

        while work is not None:
            function, args = work
            await function(*args)
            if len(self._spare) >= self._limit or not _same(context, copy_context()):
                return
            del function, args, work  # The request is to live no longer than it has to.
            try:
                self._spare.append(task)
                work = await trio.lowlevel.wait_task_rescheduled(abort)
            except BaseException:
                self._forget(task)  # A KeyboardInterrupt comes anywhere.
                raise

    def _forget(self, task: trio.lowlevel.Task) -> None:
        if task in self._spare:
            self._spare.remove(task)

    async def _run_line(self, line: deque[Work]) -> None:
        """Run the requests of a line while that is nothing to them."""
        if self._line is line:
            self._line = None  # What comes from now on is another line.
        if len(line) > 1:
            self.start(self._dissolve, line)
        context = copy_context()
        while line:
            function, args = line.popleft()
            await function(*args)
            if not _same(context, copy_context()):
                return

    async def _dissolve(self, line: deque[Work]) -> None:
        """Give a task each to what is still in a line when it is this task's turn."""
        while line:
            function, args = line.popleft()
            self.start(function, *args)
