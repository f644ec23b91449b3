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
from typing import Any, TypeAlias

import trio

Function: TypeAlias = Callable[..., Awaitable[object]]
Row: TypeAlias = deque[tuple[Function, tuple[Any, ...]]]
"""Functions to be run, and their arguments."""


def _is_same(one: Context, other: Context) -> bool:
    """Tell whether two contexts hold the very same; equal values will not do."""
    if len(one) != len(other):
        return False
    # A loop takes half the time of all(): a fortieth of a datagram.
    for variable, value in one.items():  # noqa: SIM110
        if other.get(variable, one) is not value:
            return False
    return True


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
        if self._row is row:
            self._row = None
        if len(row) > 1:
            # Its turn comes when this task waits or has ended.
            self._nursery.start_soon(self._part, row, name=self._name)
        task, context = trio.lowlevel.current_task(), copy_context()
        while row:
            function, args = row.popleft()
            await function(*args)
            if task.child_nurseries or not _is_same(context, copy_context()):
                return

    async def _part(self, row: Row) -> None:
        """Give a task each to what a row still holds."""
        while row:
            function, args = row.popleft()
            self._nursery.start_soon(function, *args, name=self._name)
