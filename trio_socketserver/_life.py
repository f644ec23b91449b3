"""A request's life, after it has been accepted.

It has two stages, and an owner in each: the loop, until `process_request()` has handed the
request on, and then a task of its own. `attend` runs a stage for its owner. Whatever ends
the stage, `attend` reports it, closes the request and counts it, once; unless the request
was handed on, because then all that is the next owner's.

Errors go to `handle_error()`, groups are split, and what is no `Exception` goes on up.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from ._exceptions import RequestTimeout, is_peer_fault
from ._groups import only_cancelled, ungrouped
from ._log import log_error


class Outcome(enum.Enum):
    """How a stage of a request's life has ended; the value is the counter's name."""

    HANDED_ON = ""
    COMPLETED = "completed"
    FAILED = "failed"
    REJECTED = "rejected"
    CANCELLED = "cancelled"


class Life:
    """A request in a stage of its life.

    Attributes:
        request: the request.
        client_address: where it came from.
        outcome: how the stage has ended.
        is_settled: whether somebody has seen to the closing already.
        blames_peer: whether an error of it was the peer's.
    """

    __slots__ = ("blames_peer", "client_address", "is_settled", "outcome", "request")

    def __init__(self, request: Any, client_address: Any) -> None:
        self.request = request
        self.client_address = client_address
        self.outcome = Outcome.COMPLETED
        self.is_settled = False
        self.blames_peer = False

    def hand_on(self) -> None:
        """Somebody else answers for the request from now on, whatever happens here."""
        self.outcome = Outcome.HANDED_ON

    def end(self, outcome: Outcome) -> None:
        """Set how the stage has ended."""
        if self.outcome is not Outcome.HANDED_ON:
            self.outcome = outcome


class Host(Protocol):
    """What a request's life needs of its server."""

    cleanup_timeout: float

    async def shutdown_request(self, request: Any) -> None:
        """Close a request."""

    async def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error."""

    def _close_at_once(self, request: Any) -> bool:
        """Do what `shutdown_request()` would do, if it is known not to wait.

        It spares the request a shielded scope.

        Returns:
            Whether it is done. If not, `shutdown_request()` is called.
        """

    def _abort(self, request: Any) -> None:
        """Close at once what `shutdown_request()` has left open."""

    def _count(self, life: Life) -> None:
        """Take note of how a request has ended."""


async def attend(
    server: Host, stage: Callable[[Life], Awaitable[None]], life: Life
) -> None:
    """Run a stage; then, unless the request was handed on, close it and count it."""
    try:
        await stage(life)
    except trio.Cancelled:
        life.end(Outcome.CANCELLED)
        raise
    except Exception as error:
        life.end(Outcome.FAILED)
        await _report(server, life, error)
    except BaseExceptionGroup as group:
        cancelled = only_cancelled(group)
        life.end(Outcome.CANCELLED if cancelled else Outcome.FAILED)
        await _report_group(server, life, group)
    except BaseException:
        life.end(Outcome.FAILED)
        raise
    finally:
        if life.outcome is not Outcome.HANDED_ON:
            try:
                # It shields itself, where it waits.
                await _close(server, life)  # noqa: ASYNC102
            finally:
                server._count(life)


async def _close(server: Host, life: Life) -> None:
    """Close the request, within ``cleanup_timeout`` and whatever is cancelled."""
    if life.is_settled:
        return
    closed = False
    try:
        if not server._close_at_once(life.request):
            deadline = trio.current_time() + server.cleanup_timeout
            with trio.CancelScope(deadline=deadline, shield=True) as scope:
                await server.shutdown_request(life.request)
            if scope.cancelled_caught:
                raise RequestTimeout(
                    f"closing took longer than {server.cleanup_timeout:g} s"
                )
        closed = True
    except Exception as error:
        life.end(Outcome.FAILED)
        await _report(server, life, error)
    except BaseExceptionGroup as group:
        life.end(Outcome.FAILED)
        await _report_group(server, life, group)
    finally:
        if not closed:
            server._abort(life.request)


async def _report(server: Host, life: Life, error: Exception) -> None:
    """Give an error, which is being handled, to `handle_error()`."""
    life.blames_peer = life.blames_peer or is_peer_fault(error)
    failure = "handle_error() failed for the request of %r"
    try:
        await server.handle_error(life.request, life.client_address)
    except Exception as another:
        log_error(another, failure, life.client_address)
    except BaseExceptionGroup as group:
        errors, rest = group.split(Exception)
        if errors is not None:
            log_error(errors, failure, life.client_address)
        if rest is not None:
            raise ungrouped(rest) from None


async def _report_group(
    server: Host, life: Life, group: BaseExceptionGroup[BaseException]
) -> None:
    """Report the part of a group that is an error, and raise the rest."""
    errors, rest = group.split(Exception)
    if errors is not None:
        try:
            raise errors
        except ExceptionGroup:
            await _report(server, life, errors)
    if rest is not None:
        raise ungrouped(rest) from None
