"""`serve_blocking()`: a whole server of the standard library's, in a nursery.

The server's own ``serve_forever()`` runs in a worker thread (see `_stdlib_loop`), and each
request of a `socketserver.ThreadingMixIn` in one of its own: both are jobs (see `_workers`)
of tasks in a nursery, so what the standard library forgets, the nursery joins.

Cancelling ends it in steps, each of which is bounded:

1. at once, the loop and every thread that waits for a client are woken, and forked children
   are asked to end;
2. the server's own ``shutdown()`` is called, because overrides of it tell handlers to end;
3. a loop of the server's own making, which none of that reaches, has its socket closed;
4. what runs still is joined, or abandoned if the server says ``daemon_threads``.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Collection, Iterable
from typing import Any, Final

import trio

from ._groups import open_ungrouped_nursery
from ._log import log, log_error
from ._stdlib_loop import ServingThread
from ._workers import Job, Workers

__all__ = ["serve_blocking"]

SHUTDOWN_TIMEOUT: Final = 5.0
"""Seconds for the server's own ``shutdown()`` when it is cancelled, and for its children
between SIGTERM and SIGKILL; the ``cleanup_timeout`` of our own servers."""

LOOP_GRACE: Final = 0.25
"""Seconds for a loop of its own to end after ``shutdown()``; then its socket is closed."""

DAEMON_GRACE: Final = 1.0
"""Seconds for daemon threads to end after they have been woken, before they are abandoned.

Waking takes milliseconds, and what a handler does after it, flushing and closing, not much
longer. The standard library gives them none.
"""

ANSWER_GRACE: Final = 0.25
"""Seconds left, after a ``shutdown()``, for requests that nobody would wait for.

One of them may have called it, and be about to answer. The standard library lets them run
on until the program ends.
"""

_numbers = itertools.count(1)


async def serve_blocking(  # noqa: ASYNC128 (_Serving.serve() calls started())
    server: socketserver.BaseServer,
    *,
    task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run a server object of the standard library's, unmodified, until it is shut down.

    It runs in threads of the nursery's: the server's ``serve_forever()`` and all hooks of
    its loop in one, each request of a `socketserver.ThreadingMixIn` in one of its own, from
    ``process_request_thread()`` to the closing. A server without a mix-in handles its
    requests one at a time in the loop's thread, one with `socketserver.ForkingMixIn` forks
    there. `trio.from_thread` works in all of these threads. They are used again for later
    requests, so a `threading.local` may hold what an earlier one left there. Overrides are
    honoured; what they call by ``super()`` is ours.

    ``server.shutdown()`` ends it, from any thread or handler, and does not deadlock there.
    (In trio's own thread, by a signal handler say, it does not wait for the loop's end.)
    Then requests are joined; if ``block_on_close`` is false or ``daemon_threads`` true,
    they have a quarter of a second before they are cancelled, for the answer of the one
    that has called it. ``server_close()`` is called at the end.

    Args:
        server: the server, made in the main thread, bound and listening. Nothing of the
            object has changed when the call returns, except that it is closed.
        task_status: for `trio.Nursery.start`, which returns ``server_address``.

    Raises:
        TypeError: *server* is no server of the standard library's.
        RuntimeError: it is being served already.
        BaseException: what ``serve_forever()`` raises. What a request raises goes to the
            server's ``handle_error()``; a `SystemExit` ends its request and is logged.

    Cancellation: connections are shut down under the threads that wait for them, children
    are sent SIGTERM, and the server's own ``shutdown()`` is called too. That takes
    milliseconds. Threads that do not wait for a client are joined, for as long as it
    takes, or abandoned after a second if ``daemon_threads`` is true. Threads that the
    server starts itself are not in the nursery, but find their connections shut down.
    """
    if not isinstance(server, socketserver.BaseServer):
        raise TypeError(
            f"serve_blocking() serves the standard library's servers; {server!r} is none "
            "(one of trio_socketserver's own is entered with 'async with')"
        )
    serving = _Serving(server)
    with serving.thread.adopted():
        async with open_ungrouped_nursery() as nursery:
            await serving.serve(nursery, task_status)


class _Serving:
    """One call of `serve_blocking`."""

    def __init__(self, server: Any) -> None:
        self._server = server
        self._token = trio.lowlevel.current_trio_token()
        self.thread = ServingThread(
            server,
            self._hand_on,
            self._join_from_thread,
            self._note_idle,
        )
        self._request_threads: set[int] = set()
        self._jobs: set[Job] = set()
        self._requests: dict[trio.CancelScope, Job | None] = {}
        self._cancels_requests = False
        self._progress = trio.Event()
        self._stopping = False
        self._calls_shutdown = False
        self._loop_ended = False
        self._close_called = False
        self._ended = False

    async def serve(self, nursery: trio.Nursery, task_status: trio.TaskStatus[Any]) -> None:
        """Serve, and close."""
        self._nursery = nursery
        self._workers = Workers(nursery.start_soon)
        try:
            task_status.started(self._server.server_address)
            try:
                await self._do(self._job(self._server.serve_forever, "serve_forever"))
            except BaseException:
                self._cancel_requests()
                raise
            finally:
                self._loop_ended = True
                self._note_progress()
                if self._stopping:
                    # As everywhere, server_close() comes after shutdown().
                    with trio.CancelScope(shield=True):  # It is bounded there.
                        await self._wait_until(self.thread.told.is_set, math.inf)
                try:
                    await self._close()  # noqa: ASYNC102 (it ends with its thread)
                finally:
                    await self._join_requests()  # noqa: ASYNC102 (and they with theirs)
        finally:
            self._ended = True
            self._note_progress()
            self._workers.close()

    # -- threads ---------------------------------------------------------------------

    def _job(
        self, function: Callable[[], object], name: str, *, must_run: bool = False
    ) -> Job:
        """Make a job of which cancelling stops the whole server."""
        return Job(
            function,
            name=f"{type(self._server).__name__} {name}",
            wake=self._stop,
            daemon=self._has_daemon_threads(),
            must_run=must_run,
        )

    async def _do(self, job: Job) -> None:
        self._jobs.add(job)
        try:
            await job.run(self._workers)
        finally:
            self._jobs.discard(job)
            if job.abandoned:
                log(logging.WARNING, "abandoned a thread: %s", job.name)

    def _has_daemon_threads(self) -> bool:
        return bool(getattr(self._server, "daemon_threads", False))

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = trio.Event()

    async def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        with trio.move_on_after(seconds):
            while not condition():
                await self._progress.wait()

    # -- requests --------------------------------------------------------------------

    def _hand_on(self, request: Any, client_address: Any) -> None:
        """Have a request handled in a thread of its own; called in any thread."""
        self._token.run_sync_soon(self._begin, request, client_address)

    def _begin(self, request: Any, client_address: Any) -> None:
        if self._ended:  # A thread of the server's own is late.
            if isinstance(request, socket.socket):
                request.close()
            return
        # From here on the request is known, and may be cancelled and joined.
        scope = trio.CancelScope()
        if self._cancels_requests:
            scope.cancel()
        self._requests[scope] = None
        self._nursery.start_soon(
            self._handle, scope, request, client_address, name="request"
        )

    async def _handle(
        self, scope: trio.CancelScope, request: Any, client_address: Any
    ) -> None:
        def process() -> None:
            self._request_threads.add(threading.get_ident())
            try:
                with self.thread.contained(client_address):
                    if self.thread.secures(request):
                        self._server.process_request_thread(request, client_address)
            finally:
                self._request_threads.discard(threading.get_ident())

        waker = None
        try:
            waker = self.thread.waker_of_request(request)
            if waker is not None:
                waker.follows = True
            job = self._job(process, f"request {next(_numbers)}", must_run=True)
            self._requests[scope] = job
            with scope:
                await self._do(job)
        except Exception as error:  # The thread could not be started, for example.
            log_error(error, "cannot serve a request of %r", client_address)
            if isinstance(request, socket.socket):
                request.close()
        finally:
            if waker is not None:
                waker.release()
            del self._requests[scope]
            self._note_progress()

    def _cancel_requests(self) -> None:
        self._cancels_requests = True
        for scope in self._requests:
            scope.cancel()

    def _join_from_thread(self) -> None:
        """Wait for the requests; called in any thread.

        In that of a request, which calls `server_close()`, it would wait for itself. The
        standard library's does not wait there either, or fails.
        """
        if threading.get_ident() not in self._request_threads:
            trio.from_thread.run(self._join_requests, trio_token=self._token)

    async def _join_requests(self) -> None:
        """Wait until no request is left; those that nobody would wait for are cancelled."""
        with trio.CancelScope(shield=True):  # They are cancelled by scopes of their own.
            if self._has_daemon_threads() or not getattr(
                self._server, "block_on_close", True
            ):
                await self._wait_until(lambda: not self._requests, ANSWER_GRACE)
                self._cancel_requests()
            await self._wait_until(lambda: not self._requests, math.inf)

    # -- stopping --------------------------------------------------------------------

    async def _close(self) -> None:
        """Call the server's `server_close()`, once."""
        if not self._close_called:
            self._close_called = True
            try:
                job = self._job(self._server.server_close, "server_close", must_run=True)
                await self._do(job)
            finally:
                self.thread.closed.set()

    def _stop(self) -> None:
        """Begin to stop; called by the scheduler when one of our tasks is cancelled."""
        if not self._stopping:
            self._stopping = True
            self._calls_shutdown = not self._loop_ended
            self.thread.stop()
            # Later: while trio cancels, no task may be started.
            self._token.run_sync_soon(self._nursery.start_soon, self._go_on_stopping)

    async def _go_on_stopping(self) -> None:
        with trio.CancelScope(shield=True):  # Each step of it is bounded.
            try:
                self._signal_children("SIGTERM")
                if self._calls_shutdown:
                    with trio.move_on_after(SHUTDOWN_TIMEOUT):
                        await self._call_shutdown()
            finally:
                # Whatever has failed: others wait for it.
                self.thread.told.set()
                self._note_progress()
            await self._wait_until(lambda: self._loop_ended, LOOP_GRACE)
            self._signal_children("SIGTERM")  # The loop may have been about to fork.
            self._nursery.start_soon(self._end_own_loop)
            if self._has_daemon_threads():
                await self._wait_until(lambda: not self._requests, DAEMON_GRACE)
                self._abandon(self._requests.values())
                # Others may have waited for those.
                await self._wait_until(lambda: self._ended, DAEMON_GRACE)
                self._abandon(self._jobs)
            await self._wait_until(lambda: self._ended, SHUTDOWN_TIMEOUT)
            self._signal_children("SIGKILL")

    async def _end_own_loop(self) -> None:
        """Close the socket of a loop that goes on, when it handles no request."""
        with trio.CancelScope(shield=True):  # Until the loop's thread comes round, or ends.
            await self._wait_until(
                lambda: self._loop_ended or not self.thread.handling, math.inf
            )
            if not self._loop_ended:
                self.thread.knock_at_once()
                await self._close()

    def _note_idle(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._note_progress)

    def _abandon(self, jobs: Iterable[Job | None]) -> None:
        for job in list(jobs):
            if job is not None:
                job.abandon()

    async def _call_shutdown(self) -> None:
        job = Job(
            self._server.shutdown,
            name=f"{type(self._server).__name__} shutdown",
            daemon=True,
            abandon_at_once=True,
        )
        try:
            await job.run(self._workers)
        except Exception as error:
            log_error(error, "shutdown() of %r failed", self._server)

    def _signal_children(self, name: str) -> None:
        children = getattr(self._server, "active_children", None)
        # Who derives from no ForkingMixIn may mean anything by this name.
        for pid in list(children) if isinstance(children, Collection) else ():
            if not isinstance(pid, int):
                continue
            try:
                # Ours still, running or not yet waited for, so the number is no other's.
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.kill(pid, getattr(signal, name))
            except (ChildProcessError, ProcessLookupError):
                continue  # The server has waited for it meanwhile.
