"""Exception groups, where nobody has asked for one.

A nursery wraps what it raises in a group. Where the nursery is of our making, its user
sees neither it nor a reason for a group, so the group is taken off again if it holds one
exception only.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import trio


def only_cancelled(error: BaseException) -> bool:
    """Tell whether *error* is nothing but cancellation."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(only_cancelled, error.exceptions))
    return isinstance(error, trio.Cancelled)


def ungrouped(error: BaseException, raised: BaseException | None) -> BaseException:
    """Take the groups off *error* that hold one exception only.

    A `trio.Cancelled` beside it does not count: the exception says more than it.

    Args:
        error: what a nursery raised.
        raised: what went into the nursery, which is left alone even if it is a group.
    """
    while isinstance(error, BaseExceptionGroup) and error is not raised:
        members = [member for member in error.exceptions if not only_cancelled(member)]
        if len(members) != 1:
            break
        error = members[0]
    return error


@asynccontextmanager
async def open_ungrouped_nursery() -> AsyncGenerator[trio.Nursery]:
    """Open a nursery that raises a lone exception bare.

    An exception of the body leaves it as the very object that was raised.
    """
    raised: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            except BaseException as error:
                raised = error
                raise
        return
    except BaseException as error:  # noqa: ASYNC103 (what is not raised here is below)
        crash = ungrouped(error, raised)
        if crash is error:
            raise
    context = crash.__context__
    try:
        raise crash
    finally:
        # It is raised anew, not because of what was being handled here.
        crash.__context__ = context
        del crash, context, raised
