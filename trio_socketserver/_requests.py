"""The nursery in which requests live, and how it is closed.

The rules:

* Requests live in an *inner* nursery, hosted by a task of its own in an *outer* one whose
  body is the caller's ``async with`` block. So requests can be cancelled, or given a
  deadline, without touching the body; and a request that crashes still cancels the body.
* Closing happens in one place, the end of the host task, whoever asks for it and whatever
  forces it: first stop accepting, then join. Asking is setting an event, so it can be done
  from anywhere, a request included.
* What the block raises leaves as it was raised, see `open_ungrouped_nursery`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any

import trio

from ._groups import only_cancelled, open_ungrouped_nursery
from ._shared_tasks import Function, SharedTasks

_surrounding: ContextVar[tuple[RequestNursery, ...]] = ContextVar(
    "trio_socketserver_requests", default=()
)
"""The nurseries whose requests the current task is a part of, outermost first."""


class RequestNursery:
    """A server's requests, from entering to closing.

    Attributes:
        crashed: whether a request has ended the server, by raising what is no `Exception`.
    """

    def __init__(self) -> None:
        self._opened = trio.Event()
        self._close_asked = trio.Event()
        self._closed = trio.Event()
        self._inner: trio.Nursery | None = None
        self._shared: SharedTasks | None = None
        self.crashed = False

    @asynccontextmanager
    async def open(
        self,
        stop_accepting: Callable[[], Awaitable[None]],
        patience: Callable[[], float],
        release: Callable[[], None],
    ) -> AsyncGenerator[None]:
        """Have the nursery for the length of the block; once only.

        Args:
            stop_accepting: called once when closing begins, perhaps in a cancelled scope;
                when it has returned, no new request may come.
            patience: called next; the seconds for which requests may go on before they are
                cancelled.
            release: called last, when no request is left.
        """
        try:
            async with open_ungrouped_nursery() as outer:
                await outer.start(self._host, stop_accepting, patience, release)
                try:
                    yield
                finally:
                    self.ask_to_close()
        finally:
            self.ask_to_close()
            self._opened.set()

    async def _host(
        self,
        stop_accepting: Callable[[], Awaitable[None]],
        patience: Callable[[], float],
        release: Callable[[], None],
        task_status: trio.TaskStatus[None],
    ) -> None:
        """Hold the nursery open until closing is asked for, then close it."""
        try:
            async with trio.open_nursery() as self._inner:
                self._shared = SharedTasks(self._inner, name="request")
                self._opened.set()
                try:
                    task_status.started()
                    await self._close_asked.wait()
                finally:
                    self._close_asked.set()
                    # Bounded by its own shield.
                    await stop_accepting()  # noqa: ASYNC102
                self._inner.cancel_scope.deadline = trio.current_time() + patience()
        except BaseException as error:
            self.crashed = not only_cancelled(error)
            raise
        finally:
            try:
                release()
            finally:
                self._closed.set()

    @property
    def closing(self) -> bool:
        """Whether closing has been asked for, or forced."""
        return self._close_asked.is_set()

    async def wait_opened(self) -> None:
        """Wait until requests can be started, or never will be."""
        await self._opened.wait()

    def start_soon(self, function: Function, *args: Any, name: str) -> None:
        """Start a task of a request, or beside the requests. No checkpoint."""
        if self._inner is None:
            raise RuntimeError("the server has not been entered")
        self._inner.start_soon(function, *args, name=name)

    def start_shared(self, function: Function, *args: Any) -> None:
        """Start a request in a task that others may share, see `SharedTasks.start_soon`."""
        assert self._shared is not None
        self._shared.start_soon(function, *args)

    def enter_request(self) -> None:
        """Mark the current task, and those it starts, as a part of a request."""
        surrounding = _surrounding.get()
        if self not in surrounding:
            _surrounding.set((*surrounding, self))

    @contextmanager
    def surrounding(self) -> Generator[None]:
        """Mark the current task for the length of the block, and those it starts.

        For the loop: its requests' tasks inherit the mark, and need not set it each.
        """
        token = _surrounding.set((*_surrounding.get(), self))
        try:
            yield
        finally:
            _surrounding.reset(token)

    def is_current(self) -> bool:
        """Tell whether the caller is a part of one of these requests."""
        return self in _surrounding.get()

    def is_cancelled(self) -> bool:
        """Tell whether the requests have been cancelled, all at once."""
        return self._inner is not None and self._inner.cancel_scope.cancel_called

    def ask_to_close(self) -> None:
        """Start closing; later calls do nothing."""
        self._close_asked.set()

    def cancel(self) -> None:
        """Start closing, and cancel the requests."""
        self._close_asked.set()
        if self._inner is not None:
            self._inner.cancel_scope.cancel()

    async def wait_closed(self) -> None:
        """Wait until the last request has ended."""
        await self._closed.wait()
