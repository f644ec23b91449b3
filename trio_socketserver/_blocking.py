"""Blocking handlers: how one is run, in a worker thread, by a server of ours.

The handler is called with what the standard library's servers call it with: a blocking
socket (see `_blocking_sockets`) and a server whose methods block (see `_server_view`). It
is a job of the request's task (see `_workers`), which is cancelled by waking it; how it
ends after that is no error.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import logging
import math
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import trio

from ._blocking_sockets import Loan, lend
from ._handlers import BaseRequestHandler
from ._log import log
from ._server_view import view_of
from ._workers import Job, StartSoon, Workers, call_trio

_numbers = itertools.count(1)


class Host(Protocol):
    """What the blocking world needs of its server."""

    def _limit(self) -> int | None:
        """Return how many requests may be active at once."""

    def _has_daemon_threads(self) -> bool:
        """Tell whether cancelling abandons a thread."""

    def _note_abandoned(self) -> None:
        """Count a thread that has been abandoned."""

    def _note_room(self) -> None:
        """Look again whether there is room for a request."""


class BlockingWorld:
    """What a server's blocking handlers live in, from entering to closing.

    Args:
        server: the server.
        start_soon: starts a task where the server's requests live.
    """

    def __init__(self, server: Host, start_soon: StartSoon) -> None:
        self._server = server
        self._workers = Workers(start_soon, self._limit, server._note_room)
        self._call = functools.partial(call_trio, trio.lowlevel.current_trio_token())
        self._view = view_of(server, self._call)

    @property
    def abandoned(self) -> int:
        """Threads that have been abandoned and run still."""
        return self._workers.abandoned

    def _limit(self) -> float:
        limit = self._server._limit()
        return math.inf if limit is None else limit

    def close(self) -> None:
        """End every thread as soon as it has no handler to run."""
        self._workers.close()

    async def run(
        self, handler: Callable[..., object], request: Any, client_address: Any
    ) -> None:
        """Run a handler in a thread.

        Raises:
            TypeError: it has returned something to await.
            RuntimeError: no thread can be started.

        Cancellation: wakes the thread where it waits for the peer, and waits for its end.
        """
        server = self._server
        daemon = server._has_daemon_threads()
        name = f"{type(server).__name__} request {next(_numbers)}"
        loan = lend(request, self._call)
        job = Job(
            functools.partial(run_blocking, handler, loan, client_address, self._view),
            name=name,
            wake=loan.wake,
            daemon=daemon,
            abandon_at_once=daemon,
            release=loan.close,
        )
        try:
            with exits_contained(client_address):
                await job.run(self._workers)
        finally:
            if job.abandoned:
                server._note_abandoned()
                message = "abandoned a thread that serves a request of %r"
                log(logging.WARNING, message, client_address)
            else:
                loan.end()


def run_blocking(
    handler: Callable[..., object], loan: Loan, client_address: Any, server: Any
) -> None:
    """Run a blocking handler, where it may block.

    Raises:
        TypeError: it has returned something to await.
        ConnectionBroken: the peer would not shake hands.
        RequestTimeout: the peer took too long for that.
    """
    loan.begin()
    try:
        result = handler(loan.request, client_address, server)
    finally:
        loan.finish()
    if not (_is_awaitable(result) or isinstance(result, BaseRequestHandler)):
        return
    if inspect.iscoroutine(result):
        result.close()
    raise TypeError(
        f"{handler!r} looks like a blocking handler, but has returned {result!r}, which is "
        "for awaiting: write 'async def handler(request, client_address, server)'"
    )


def _is_awaitable(result: object) -> bool:
    """As `inspect.isawaitable`, which asks an abstract class.

    That does not know the class of the handler yet in a forked child, where its way to find
    out is a thirtieth of a request.
    """
    if isinstance(result, types.GeneratorType):
        return inspect.isawaitable(result)
    return hasattr(type(result), "__await__")


@contextlib.contextmanager
def exits_contained(client_address: Any) -> Iterator[None]:
    """Log what ends a handler's thread or process, and no more than that.

    It is `SystemExit`, or what a library derives from `BaseException` for itself, such as
    `asyncio.CancelledError`; socketserver's threads end with it.
    """
    message = "%r has ended a request of %r"
    try:
        yield
    except BaseExceptionGroup as group:
        exits, rest = group.split(_is_exit)
        if exits is None:
            raise
        log(logging.WARNING, message, exits, client_address)
        if rest is not None:
            raise rest from None
    except BaseException as error:  # noqa: ASYNC103 (an exit is contained)
        if not _is_exit(error):
            raise
        log(logging.WARNING, message, error, client_address)


def _is_exit(error: BaseException) -> bool:
    others = (Exception, KeyboardInterrupt, trio.Cancelled, BaseExceptionGroup)
    return not isinstance(error, others)
