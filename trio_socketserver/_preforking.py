"""`PreforkingMixIn`: a server in several processes.

The server that the program has made serves nothing itself. Its loop keeps a crew of
workers: fresh interpreters (see `_fresh_interpreter`), each with a copy of the server,
pickled, and with the one listening socket, from which the kernel gives each request to
whoever asks first. A worker's process is a task in the server's request nursery, like a
request elsewhere, so joining, the graceful timeout and cancelling are the shared ones.

* The loop ends when no worker accepts any more; closing has them drain and end.
* A worker that ends unasked is replaced, after a pause that grows if that happens often.
  One that ends before it serves is another matter: a few of those in a row end the server.
"""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import socket as socketlib
import ssl
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

import trio

from ._crew import Crew
from ._fresh_interpreter import MainModule, is_of_main, is_running_main_again
from ._groups import open_ungrouped_nursery
from ._log import log
from ._server import BaseServer
from ._statistics import Counters, ServerStatistics
from ._worker_link import News, WorkerLink

__all__ = ["PreforkingMixIn"]


means_copy: ContextVar[bool] = ContextVar("trio_socketserver_means_copy", default=False)
"""Whether the caller is a worker itself, which shuts down and closes its own copy.

All others in a worker mean the program's server: handlers, hooks, and threads they start.
"""


class _Cores:
    """The default of ``workers``."""

    def __get__(self, server: object, owner: type) -> int:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1


def pickled(server: BaseServer) -> bytes:
    """Return the server as workers get it.

    Raises:
        TypeError: something of it does not pickle; the message says what, and why.
    """
    name = type(server).__qualname__
    try:
        data = pickle.dumps(server)
    except Exception as error:
        what, reason = _culprit(server, error)
        raise TypeError(
            f"{name} cannot be taken to worker processes, because {what} does not pickle: "
            f"{reason}. Classes and functions have to be at the top level of a module. "
            "What a worker is to make for itself, take out of what "
            "super().__getstate__() returns, and make in __setstate__(), after "
            "super().__setstate__(state)"
        ) from error
    if is_of_main(data) and MainModule.of_this_process() is None:
        raise TypeError(
            f"{name} cannot be taken to worker processes: some of it is defined in the "
            "main module, which is no file that could be run again (an interactive "
            "session, or python -c). Put it into a module"
        )
    return data


def _culprit(server: BaseServer, error: Exception) -> tuple[str, Exception]:
    """Find what does not pickle, for a message."""
    try:
        pickle.dumps(type(server))
    except Exception as reason:
        return "its class", reason
    try:
        state = server.__getstate__()
    except Exception as reason:
        return "its state", reason
    for name, value in state.items() if isinstance(state, dict) else ():
        try:
            pickle.dumps(value)
        except Exception as reason:
            if isinstance(value, ssl.SSLContext):
                reason = TypeError(f"{reason}; give a callable that makes it")
            public = {"_request_handler_class": "RequestHandlerClass"}
            return f"its attribute {public.get(name, name)!r}", reason
    return "it", error


def _is_slot(server_class: type, name: str) -> bool:
    found = inspect.getattr_static(server_class, name, None)
    return isinstance(found, types.MemberDescriptorType)


class PreforkingMixIn(BaseServer):
    """Serve in several long-lived worker processes.

    There is nothing like it in `socketserver`. Put it in front of everything else:
    ``class Server(PreforkingMixIn, NurseryMixIn, TCPServer)``. `serve_forever()` starts the
    workers and waits until all of them serve; the server in the program's own process only
    looks after them. Each worker is a fresh Python interpreter with a copy of the server:
    the same class, with the attributes that the server has when the loop begins. All hooks
    and handlers run there, in the colour and place that the other bases say.

    A copy is made by `pickle`. Its ``__init__`` is not called; what does not pickle, or has
    to be made anew in each worker, take out of what ``super().__getstate__()`` returns, and
    make in ``__setstate__()``. The program's main module runs once more in each worker if
    the server's or the handler's class is defined there; so it needs ``if __name__ ==
    "__main__":``. What workers log is logged by the program, unless they import a module
    that configures logging.

    Called in a worker's handler or hook, `shutdown()` and `server_close()` reach the
    program's server, and return at once. `handle_request()` handles the request in the
    program itself.

    Raises:
        TypeError: by `serve_forever()`, before any worker has started: the server, or a
            part of it, does not pickle.
        ValueError: by `serve_forever()`: ``workers`` is less than 1.
        ChildFailed: by `serve_forever()`: several workers in a row have ended before they
            could serve; the traceback of the last one is the cause.

    A worker is started in one of the threads of `trio.to_thread`, by its default limiter;
    while others have those in use for good, none can be.

    Cancellation: workers are cancelled, as the server would be without them, and killed if
    that takes longer than twice ``cleanup_timeout`` and a second. A worker also ends when
    the program does, even by SIGKILL. (But if a worker itself is killed so, the children of
    its requests go on, where `ForkingMixIn` is among the bases.)
    """

    workers: int = cast("int", _Cores())
    """Processes that serve; the default is the number of cores that this one may use."""

    socket: socketlib.socket

    def _set_up(self) -> None:
        if is_running_main_again():
            raise RuntimeError(
                "a worker process, which runs the program's main module once more, has "
                "come upon a server being made there: what only the program itself is to "
                "do belongs under \"if __name__ == '__main__':\""
            )
        super()._set_up()
        self._crews: list[Crew] = []
        self._link: WorkerLink | None = None
        self._idle: trio.Event | None = None
        self._retires = False

    # -- in a copy -------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return what the server was told to do, for a worker's copy of it."""
        blank = object.__new__(type(self))
        blank._set_up()
        own = {"socket", *vars(blank)}
        found: Any = object.__getstate__(self)
        everything, slots = found if isinstance(found, tuple) else (found, {})
        state = everything | slots
        return {name: value for name, value in state.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make a copy."""
        self._set_up()
        for name, value in state.items():
            if _is_slot(type(self), name):
                object.__setattr__(self, name, value)
            else:
                vars(self)[name] = value

    async def shutdown(self) -> None:
        """Stop `serve_forever()`, and wait until no worker accepts any more.

        In a worker it is the program's server that is stopped. Raises, and is cancelled, as
        `BaseServer.shutdown`.
        """
        if not await self._has_told(News.SHUTDOWN):
            await super().shutdown()

    async def server_close(self) -> None:
        """Stop accepting, have the workers wait for their requests, and wait for them.

        In a worker it is the program's server that is closed. Raises, and is cancelled, as
        `BaseServer.server_close`.
        """
        if not await self._has_told(News.SERVER_CLOSE):
            await super().server_close()

    async def _has_told(self, news: News) -> bool:
        """Pass on to the program's server what a worker's handler or hook calls."""
        in_request = self._requests is not None and self._requests.is_current()
        if self._link is None or (means_copy.get() and not in_request):
            return False
        self._link.say(news)
        await trio.lowlevel.checkpoint()
        return True

    async def _wait_idle(self) -> None:
        """Wait until there is no request."""
        while self._counters.active:
            self._idle = trio.Event()
            await self._idle.wait()

    def _note_room(self) -> None:
        super()._note_room()
        if self._idle is not None and not self._counters.active:
            self._idle.set()

    # -- in the program --------------------------------------------------------------

    async def _serve(
        self, poll_interval: float | None, started: Callable[[], None]
    ) -> None:
        if self._link is None:
            await self._serve_by_crew(poll_interval, started)
        else:
            self._link.say(News.READY)
            await super()._serve(poll_interval, started)

    async def _serve_by_crew(
        self, poll_interval: float | None, started: Callable[[], None]
    ) -> None:
        assert self._requests is not None
        if self.workers < 1:
            raise ValueError(f"workers must be 1 or more, not {self.workers}")
        crew = Crew(self, pickled(self), poll_interval)
        for earlier in self._crews:  # It may have requests still.
            earlier.retire()
        self._crews = [crew, *filter(Crew.has_workers, self._crews)]
        try:
            async with open_ungrouped_nursery() as nursery:
                nursery.start_soon(crew.raise_failure)
                try:
                    await trio.lowlevel.checkpoint_if_cancelled()
                    crew.begin(self.workers, self._requests.start_soon)
                    await crew.wait_ready()
                except trio.Cancelled:
                    if not crew.has_failed:  # But shutdown() came first.
                        started()
                    raise
                started()
        finally:
            crew.stop()
            deadline = trio.current_time() + self.cleanup_timeout
            with trio.CancelScope(deadline=deadline, shield=True) as waiting:
                await crew.wait_stopped()
            if waiting.cancelled_caught:
                message = "a worker process has not stopped within %g s"
                log(logging.WARNING, message, self.cleanup_timeout)

    async def _stop_accepting(self) -> None:
        try:
            await super()._stop_accepting()
        finally:
            for crew in self._crews:
                crew.close()

    def _backlog(self) -> int:
        # It is for the workers, who hear of the closing only now; but not for those that
        # have successors.
        return 0 if self._crews or self._retires else super()._backlog()

    def _obey_worker(self, news: News) -> None:
        """Do what a worker's handler has called."""
        assert self._requests is not None
        hook = self.shutdown if news is News.SHUTDOWN else self.server_close
        self._requests.start_soon(hook, name="asked for by a worker")

    def statistics(self) -> ServerStatistics:
        """Return what the server has done so far, in all of its workers.

        In a worker: what that one has done.
        """
        counters = Counters()
        counters.add(self._counters)
        for crew in self._crews:
            crew.add_to(counters)
        return counters.snapshot(self._datagrams_dropped())
