"""An instrument that cancels a handler at a moment, and sees what becomes of it.

Moments are seen from outside: when a task of the handler has just begun to wait (trio can
abort the wait by then, so a scope cancelled from there is raised right at that checkpoint),
and when it is about to go on (so that the next checkpoint finds it cancelled, with the
outcome of this one in its hands). So are the tasks that one of the handler's starts, in
whatever nursery, and the delivery of `Cancelled`, which makes a waiting task runnable while
it is still current, or while the scope is being cancelled.

An instrument must not raise: trio would go on without it.
"""

from __future__ import annotations

import logging
import traceback
from typing import Any, Final

import trio
from trio.lowlevel import Task, current_task

from .._exceptions import is_peer_fault
from .._handlers import BaseRequestHandler
from .._log import log
from .._server import Handler
from ._places import chain_of, is_shielded_checkpoint, place_of

DELIVERIES_LIMIT: Final = 1000
"""How often `Cancelled` may be raised in a handler until it ends.

Unwinding takes one or a few for each task, a loop that catches it any number. A thousand
pass in less than a tenth of a second.
"""


class Watch(trio.abc.Instrument):
    """What is known of one run of a handler.

    Args:
        moment: the number of the moment at which to cancel it: 0 is before its first step,
            None never.

    Attributes:
        scope: what is cancelled then; around the handler.
        mercy: a scope inside that one, to hide the cancellation again, see `relent`.
        cancelled: set when the moment has come.
        unwound: set when ``finish()`` is called; without one, when the handler has ended.
        has_finished: whether ``finish()`` has been called.
        tasks: the tasks of the handler that live.
        is_set_up: whether ``setup()`` has returned.
        has_returned: whether the handler has ended without an exception.
        cause: the exception behind the first problem, if there is one.
    """

    def __init__(self, moment: int | None) -> None:
        self.scope = trio.CancelScope()
        self.mercy = trio.CancelScope()
        self.cancelled = trio.Event()
        self.unwound = trio.Event()
        self.tasks: dict[Task, None] = {}  # An ordered set.
        self.is_set_up = self.has_finished = False
        self.has_returned = False
        self.cause: BaseException | None = None
        self._problems: list[str] = []
        self._root: Task | None = None
        self._current: Task | None = None
        self._moment = moment
        self._passed = 0
        self._deliveries = 0
        self._is_cancelling = False
        self._place = "before its first step"
        if moment == 0:
            self._cancel()

    def begin(self) -> None:
        """Take the current task as the handler's."""
        self._root = current_task()
        self.tasks[self._root] = None

    def end(self) -> None:
        """The current task is the handler's no longer."""
        self.tasks.pop(current_task(), None)

    # -- what is wrong ---------------------------------------------------------------

    def blame(self, problem: str, cause: BaseException | None = None) -> None:
        """Take note of what is wrong; not of what `relent` leads to."""
        if not self.mercy.shield:
            self._problems.append(problem)
            self.cause = self.cause or cause

    def relent(self, problem: str) -> None:
        """Hide the cancellation from a handler that does not end by it.

        Who catches it again and again may end without it. Who hides from it for ever cannot
        be helped, and keeps the run from its end: so the problem is also logged.
        """
        self.blame(problem)
        self.mercy.shield = True
        log(logging.ERROR, "check_cancellation still waits for the handler: %s", problem)

    def check(self) -> None:
        """Raise what is wrong, when the run is over.

        Raises:
            AssertionError: something is.
        """
        if self.has_returned and self._deliveries:
            self.blame("it swallowed Cancelled, and returned")
        if self.is_set_up and not self.has_finished:
            self.blame("finish() did not run, although setup() had returned")
        for task in self.tasks:
            self.blame(f"its task {task.name} survived, at {place_of(task)}")
        if self._problems:
            how = f"cancelled {self._place}" if self.cancelled.is_set() else "undisturbed"
            problems = "".join(f"\n- {problem}" for problem in self._problems)
            raise AssertionError(f"the handler, {how}{problems}") from self.cause

    # -- what trio tells -------------------------------------------------------------

    def task_spawned(self, task: Task) -> None:
        """A task has been made by the current one."""
        if self._current in self.tasks:
            self.tasks[task] = None

    def task_exited(self, task: Task) -> None:
        """A task has ended."""
        self.tasks.pop(task, None)

    def after_task_step(self, task: Task) -> None:
        """A task has begun to wait, or has ended."""
        self._current = None
        self._pass_moment(task, "at")

    def before_task_step(self, task: Task) -> None:
        """A task is about to go on."""
        self._current = task
        self._pass_moment(task, "after")

    def task_scheduled(self, task: Task) -> None:
        """A task need not wait any longer: perhaps because it is cancelled.

        Whose scope it is cannot be told. So `unwound`: finish() is shielded from ours, and
        may have scopes of its own.
        """
        if (
            self.cancelled.is_set()
            and not self.unwound.is_set()
            and (self._is_cancelling or task is self._current)
            and self._is_inside(task)
            and not is_shielded_checkpoint(task)
        ):
            self._deliveries += 1
            if self._deliveries == 1:
                self._place = f"at {place_of(task)}"
            elif self._deliveries == DELIVERIES_LIMIT:
                self.relent(
                    f"it did not end: Cancelled was raised {DELIVERIES_LIMIT} times, "
                    f"at last at {place_of(task)}"
                )

    def _pass_moment(self, task: Task, how: str) -> None:
        if self.cancelled.is_set() or not self._is_inside(task):
            return
        self._passed += 1
        if self._passed == self._moment:
            self._place = f"{how} {place_of(task)}"
            self._cancel()

    def _is_inside(self, task: Task) -> bool:
        """Tell whether a living task is the handler's, or in one of its nurseries."""
        if task not in self.tasks:
            return False
        while task is not self._root:
            nursery = task.parent_nursery
            if nursery is None:
                return False
            task = nursery.parent_task
        return True

    def _cancel(self) -> None:
        self.cancelled.set()
        self._is_cancelling = True
        self.scope.cancel()
        self._is_cancelling = False


class WatchedHandler:
    """A handler class whose instances tell of their ``setup()`` and ``finish()``.

    Args:
        handler: the class, or a partial of one.
        watch: who is told.
    """

    def __init__(self, handler: Handler, watch: Watch) -> None:
        self.__wrapped__ = handler
        self._watch = watch

    def __call__(self, request: Any, client_address: Any, server: Any) -> Any:
        handler: BaseRequestHandler = self.__wrapped__(request, client_address, server)
        watch, setup, finish = self._watch, handler.setup, handler.finish

        async def watched_setup() -> None:
            await setup()
            watch.is_set_up = True

        async def watched_finish() -> None:
            watch.has_finished = True
            watch.unwound.set()
            try:
                await finish()
            except trio.Cancelled as error:
                places = chain_of(traceback.walk_tb(error.__traceback__))
                watch.blame(f"finish() took too long, and was cut at {places[0]}")
                raise
            except Exception as error:
                if not is_peer_fault(error):
                    watch.blame(f"finish() raised {error!r}", error)
                raise

        vars(handler).update(setup=watched_setup, finish=watched_finish)
        return handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)
