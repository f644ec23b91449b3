"""A forked child process: what is done before it begins, in it, and when it has ended.

The child is a copy of a program in the middle of `trio.run`, which it can neither go on
with nor leave. So it touches nothing of it: it closes what is not its request's, gives
signals their first meaning again, does its one thing and goes, by `os._exit`. Where it
needs trio, it runs one of its own in another thread, where nothing remembers the parent's.

How its work ended is written to a file without a name before it goes. So nobody has to
read while it runs, nothing can fill up, and what the child leaves running holds nothing
open that somebody waits for. That it has ended, its parent learns from the system.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterable
from typing import IO, Any, Final, NoReturn

import outcome
import trio

from ._exceptions import ChildFailed
from ._groups import open_ungrouped_nursery
from ._inherited import close_inherited

TRACEBACK_LIMIT: Final = 100_000
"""Characters of a child's traceback that come home, from its end."""


DESCRIPTION_LIMIT: Final = 1000
"""Characters of a `ChildFailed` that stands for an error which cannot come home."""


class ChildTraceback(Exception):
    """The traceback of an error in a child, as text: the cause of the parent's error."""

    def __str__(self) -> str:
        return f"in the child process\n\n{self.args[0]}"


# -- in the child --------------------------------------------------------------------------


class _Apart:
    """A run of trio in a thread that does not know of the parent's."""

    def __init__(self, function: Callable[[], Awaitable[Any]]) -> None:
        self._function = function
        self.holds_main = threading.current_thread() is threading.main_thread()
        self._scope = trio.CancelScope()
        self._asked = False
        self._token: trio.lowlevel.TrioToken | None = None

    async def main(self) -> Any:
        self._token = trio.lowlevel.current_trio_token()
        if self._asked:
            self._scope.cancel()
        with self._scope:
            return await self._function()
        sys.exit(_EXIT_STATUS)

    def cancel(self) -> None:
        """Cancel it, from any thread, whether it has begun or not."""
        self._asked = True
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._scope.cancel)


_EXIT_STATUS: Final = 128 + signal.SIGTERM
"""What a shell says of a process that was ended so."""

_aparts: Final[list[_Apart]] = []


def run_apart(function: Callable[[], Awaitable[Any]]) -> Any:
    """Run *function* by a trio of its own, in a thread of its own, and wait for it.

    Raises:
        SystemExit: the child has been asked to end; *function* has been cancelled.
    """
    results: list[outcome.Outcome[Any]] = []
    apart = _Apart(function)

    def run() -> None:
        results.append(outcome.capture(trio.run, apart.main))

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    _aparts.append(apart)
    try:
        thread.start()
        thread.join()
    finally:
        _aparts.remove(apart)
    return results[0].unwrap()


def call_in_child(function: Callable[[], Awaitable[Any]]) -> Any:
    """Have *function* awaited, or return it for awaiting where trio runs already."""
    # The main thread is in the middle of the parent's trio.run, for ever.
    is_main = threading.current_thread() is threading.main_thread()
    if trio.lowlevel.in_trio_run() and not is_main:
        return function()
    return run_apart(function)


def _asked_to_end(number: int, frame: object) -> None:
    for apart in _aparts:
        apart.cancel()
    if not any(apart.holds_main for apart in _aparts):
        sys.exit(_EXIT_STATUS)


_SIGNALS: Final = tuple(signal.valid_signals())


def _reset_signals() -> None:  # pragma: no cover (in forked children)
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    # Ctrl-C goes to the whole foreground; what it means for a child, the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _asked_to_end)


def _report(result: outcome.Outcome[Any]) -> bytes:
    """Write down how the work has ended, in a form that can be read for certain."""
    if isinstance(result, outcome.Value):
        return pickle.dumps(None)
    assert isinstance(result, outcome.Error)
    text = "".join(traceback.format_exception(result.error))[-TRACEBACK_LIMIT:]
    description = "".join(traceback.format_exception_only(result.error)).strip()
    pickled = b""
    with contextlib.suppress(Exception):  # Of whatever its class does when it is pickled.
        pickled = pickle.dumps(result)
    return pickle.dumps((pickled, description[:DESCRIPTION_LIMIT], text))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # None, closed, a broken pipe, a user's own.
            stream.flush()


def _be_child(  # pragma: no cover (in forked children)
    work: Callable[[], object],
    kept: Iterable[socket.socket],
    report: IO[bytes],
    mask: set[int],
) -> NoReturn:
    status = 1
    try:
        _reset_signals()
        close_inherited(kept)

        def unmasked() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            work()

        result = outcome.capture(unmasked)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        report.write(_report(result))
        report.flush()
        _flush()
        status = 0
    except BaseException:  # noqa: ASYNC103 (nobody is left to raise it to)
        traceback.print_exc()
    finally:
        os._exit(status)


# -- in the parent -------------------------------------------------------------------------


def fork(work: Callable[[], object], kept: Iterable[socket.socket]) -> Child:
    """Start a child that calls *work*. No checkpoint.

    Args:
        work: what to call. Its return value is ignored.
        kept: the sockets of this package's that the child needs; it closes all others.

    Raises:
        OSError: the system has no room for a process, or a descriptor.
    """
    _flush()  # Or what is buffered would be written by the child too.
    report = nameless_file()
    # A signal must not meet the parent's handlers in the child.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        pid = os.fork()
        if pid == 0:  # pragma: no cover (in forked children)
            _be_child(work, kept, report, mask)
    except BaseException:
        report.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Child(pid, report)


def nameless_file() -> IO[bytes]:
    """Return a new file that no path leads to."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("trio_socketserver"), "w+b")
    return tempfile.TemporaryFile()


class Child:
    """A child process of ours, from its fork to its end.

    Attributes:
        pid: its number, which is nobody else's until `run` has returned.
    """

    def __init__(self, pid: int, report: IO[bytes]) -> None:
        self.pid = pid
        self._report = report
        self._has_ended = False
        self._status: os.waitid_result | None = None

    async def run(self, cleanup_timeout: float) -> None:
        """Wait for the end of the child.

        Args:
            cleanup_timeout: seconds between SIGTERM and SIGKILL when that is cancelled.

        Raises:
            BaseException: what its work has raised.
            ChildFailed: that cannot be told, or it ended by something else.
        """
        try:
            pidfd = _open_pidfd(self.pid)
            if pidfd is None:
                await self._wait_by_thread(cleanup_timeout)
            else:
                ended = functools.partial(trio.lowlevel.wait_readable, pidfd)
                try:
                    await self._wait_to_end(pidfd, ended, cleanup_timeout)
                finally:
                    os.close(pidfd)
            self._unwrap()
        finally:
            self._report.close()

    async def _wait_by_thread(self, cleanup_timeout: float) -> None:
        ended = trio.Event()
        wait = functools.partial(os.waitid, os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

        async def watch() -> None:
            until_it_ends = trio.CancelScope(shield=True)
            try:
                with until_it_ends, contextlib.suppress(ChildProcessError):
                    await trio.to_thread.run_sync(wait, limiter=trio.CapacityLimiter(1))
            except Exception:  # No thread to wait in: it has to end now.
                self._signal(None, signal.SIGKILL)
                raise
            finally:
                ended.set()

        async with open_ungrouped_nursery() as nursery:
            nursery.start_soon(watch)
            await self._wait_to_end(None, ended.wait, cleanup_timeout)

    async def _wait_to_end(
        self,
        pidfd: int | None,
        ended: Callable[[], Awaitable[object]],
        cleanup_timeout: float,
    ) -> None:
        """Wait until the child has ended; cancelled, end it."""
        try:
            await self._take(ended)
        except BaseException:
            with trio.CancelScope(shield=True):  # SIGKILL ends it.
                self._signal(pidfd, signal.SIGTERM)
                with trio.move_on_after(cleanup_timeout):
                    await self._take(ended)
                if not self._has_ended:
                    self._signal(pidfd, signal.SIGKILL)
                    await self._take(ended)
            raise

    async def _take(self, ended: Callable[[], Awaitable[object]]) -> None:
        """Wait until the child has ended, and take its exit status."""
        await ended()
        self._has_ended = True
        with contextlib.suppress(ChildProcessError):  # Somebody else has taken it.
            self._status = os.waitid(  # noqa: ASYNC222 (it does not wait any more)
                os.P_PID, self.pid, os.WEXITED
            )

    def _signal(self, pidfd: int | None, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if pidfd is None:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(pidfd, number)

    def _unwrap(self) -> None:
        """Raise what the child has reported."""
        self._report.seek(0)
        report = self._report.read()
        if not report:  # It has not come so far.
            if self._status is None or self._status.si_status:
                raise ChildFailed(self._describe_end())
            return
        found = pickle.loads(report)
        if found is None:
            return
        pickled, description, text = found
        try:
            result = pickle.loads(pickled)
        except Exception:  # Or its class is the child's, or not what it was there.
            result = outcome.Error(ChildFailed(description))
        result.error.__cause__ = ChildTraceback(text)
        result.unwrap()

    def _describe_end(self) -> str:
        status = self._status
        if status is None:
            return f"child process {self.pid} has ended in a way that is not known"
        exited = status.si_code == os.CLD_EXITED
        return f"child process {self.pid} " + describe_end(
            status.si_status if exited else -status.si_status
        )


def describe_end(status: int) -> str:
    """Say how a process has ended.

    Args:
        status: its exit status; if a signal has ended it, minus that (as in `subprocess`).
    """
    if status >= 0:
        return f"has exited with status {status}"
    with contextlib.suppress(ValueError):  # A real-time signal has no name.
        return f"has been ended by {signal.Signals(-status).name}"
    return f"has been ended by signal {-status}"


def _open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends, if the system can."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
