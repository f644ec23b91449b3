"""Requests that are run in a row by one task.

Beginning and ending a task takes trio some 5 µs, as much as all the rest of a datagram; and
most handlers of datagrams wait for nothing. So those that come together share a task, as
long as none of them could tell. The rules:

* A request that waits, for anything, has its task for itself: the rest of its row get a
  task each then.
* It finds the context variables of who starts it. A row ends with a request that has set
  one, or has left a nursery open.
* A row is of one batch: when its task begins, it is closed; what comes later is another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from operator import is_
from typing import Any, TypeAlias

import trio

Function: TypeAlias = Callable[..., Awaitable[object]]
Row: TypeAlias = deque[tuple[Function, tuple[Any, ...]]]
"""Functions to be run, and their arguments."""


def _holds(context: Context, values: list[Any]) -> bool:
    """Tell whether a context that had these values has them still: the very same.

    A variable of a context can be set by the code that runs in it, but not be removed.
    """
    return len(context) == len(values) and all(map(is_, context.values(), values))


class SharedTasks:
    """Tasks that run requests in rows.

    Args:
        nursery: where they live.
        name: what they are called.
    """

    def __init__(self, nursery: trio.Nursery, name: str) -> None:
        self._nursery = nursery
        self._name = name
        self._row: Row | None = None

    @trio.lowlevel.enable_ki_protection
    def start_soon(self, function: Function, *args: Any) -> None:
        """Start a request that may not have to wait for anything. No checkpoint.

        Between two calls without a checkpoint the caller sets no context variable.
        """
        if self._row is None:
            row: Row = deque()
            self._nursery.start_soon(self._run, row, name=self._name)
            self._row = row
        self._row.append((function, args))

    async def _run(self, row: Row) -> None:
        self._row = None
        if len(row) > 1:
            # Its turn comes when this task waits or has ended.
            self._nursery.start_soon(self._part, row, name=self._name)
        task, values = trio.lowlevel.current_task(), [*copy_context().values()]
        while row:
            function, args = row.popleft()
            await function(*args)
            if task.child_nurseries or not _holds(copy_context(), values):
                return

    async def _part(self, row: Row) -> None:
        """Give a task each to what a row still holds."""
        while row:
            function, args = row.popleft()
            self._nursery.start_soon(function, *args, name=self._name)
