"""Exception groups, where nobody has asked for one.

A nursery wraps what it raises in a group. Where the nursery is of our making, its user
sees neither it nor a reason for a group, so the group is taken off again if it holds one
exception only.
"""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType

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


class UngroupedNursery:
    """A nursery, as an async context manager, that raises a lone exception bare.

    An exception of the body leaves it as the very object that was raised.
    """

    def __init__(self) -> None:
        self._nursery: AbstractAsyncContextManager[trio.Nursery, bool | None]
        self._nursery = trio.open_nursery()

    async def __aenter__(self) -> trio.Nursery:
        return await self._nursery.__aenter__()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        try:
            return await self._nursery.__aexit__(exc_type, exc, traceback)
        except BaseException as error:
            crash = ungrouped(error, exc)
        if crash is exc:
            return False
        context = crash.__context__
        try:
            raise crash
        finally:
            # It is raised anew, not because of what is being handled here.
            crash.__context__ = context
            del crash, context, exc
