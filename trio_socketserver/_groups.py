"""Exception groups, where nobody has asked for one.

A nursery wraps what it raises in a group. Where the nursery is of our making, its user
sees neither it nor a reason for a group, so the group is taken off again if it holds one
exception only.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio


def only_cancelled(error: BaseException) -> bool:
    """Tell whether *error* is nothing but cancellation."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(only_cancelled, error.exceptions))
    return isinstance(error, trio.Cancelled)


def _holds_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(trio.Cancelled) is not None
    return isinstance(error, trio.Cancelled)


def ungrouped(error: BaseException, levels: float = math.inf) -> BaseException:
    """Take the groups off *error* that hold one exception only.

    A `trio.Cancelled` beside it does not count: the exception says more than it.

    Args:
        error: what a nursery raised.
        levels: how many groups may be taken off.
    """
    while isinstance(error, BaseExceptionGroup) and levels > 0:
        levels -= 1
        members = [member for member in error.exceptions if not only_cancelled(member)]
        if len(members) != 1:
            break
        error = members[0]
    return error


@asynccontextmanager
async def open_ungrouped_nursery() -> AsyncGenerator[trio.Nursery]:
    """Open a nursery that raises a lone exception bare.

    An exception of the body leaves it as the very object that was raised, group or not;
    together with one of a task, the two leave as a group.
    """
    raised: BaseException | None = None
    crash: BaseException | None = None
    levels = math.inf
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:  # noqa: ASYNC103 (raised below)
                if _holds_cancelled(error):
                    # Perhaps the nursery's own, which only the nursery can absorb. A group
                    # in which the body says more than that stays one.
                    levels = math.inf if only_cancelled(error) else 1
                    raise
                # Kept from the nursery, which would make another group of a group.
                raised = error
                nursery.cancel_scope.cancel()
    except BaseException as error:  # noqa: ASYNC103 (raised below)
        crash = error
    if crash is None or (raised is not None and only_cancelled(crash)):
        outcome = raised
    elif raised is None:
        outcome = ungrouped(crash, levels)
    else:
        both = [raised, ungrouped(crash)]
        outcome = BaseExceptionGroup("both the body and a task failed", both)
    if outcome is None:
        return
    context = outcome.__context__
    try:
        raise outcome
    finally:
        # It is raised anew, not because of what was being handled here.
        outcome.__context__ = context
        del context, crash, outcome, raised
