"""A forked child process: what is done before it begins, in it, and when it has ended.

The child is a copy of a program in the middle of `trio.run`, which it can neither go on
with nor leave. So it touches nothing of it: it closes what is not its request's, gives
signals their first meaning again, does its one thing and goes, by `os._exit`. Where it
needs trio, it runs one of its own in another thread, where nothing remembers the parent's.

The child shares its memory with the parent until one of them writes to it, and using an
object means to write to it, its reference count. Then a page has to be copied, which takes
some 2 µs. So in what follows a call that touches little is better than a fast one: the
functions of `signal` that are written in Python, a file object or a context manager are
measurable parts of a request here.

How its work ended is written to a file without a name before it goes. So nobody has to
read while it runs, nothing can fill up, and what the child leaves running holds nothing
open that somebody waits for. That it has ended, its parent learns from the system.
"""

from __future__ import annotations

# `signal` wraps these functions to make enums of numbers. Of the 64 handlers that a child
# looks at, that would be a fiftieth of a request.
import _signal  # type: ignore[import-not-found]
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
from typing import Any, Final, NoReturn

import outcome
import trio

from ._exceptions import ChildFailed
from ._groups import open_ungrouped_nursery
from ._inherited import close_inherited

TRACEBACK_LIMIT: Final = 100_000
"""Characters of a child's traceback that come home, from its end."""


DESCRIPTION_LIMIT: Final = 1000
"""Characters of a `ChildFailed` that stands for an error which cannot come home."""


WELL: Final = b"."
"""The report of a child whose work has returned; any other is a pickle."""


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


_OTHER_SIGNALS: Final = tuple(
    int(number)
    for number in signal.valid_signals()
    if number not in (signal.SIGINT, signal.SIGTERM)
)


def _reset_signals() -> None:  # pragma: no cover (in forked children)
    _signal.set_wakeup_fd(-1)
    # Ctrl-C goes to the whole foreground; what it means for a child, the parent decides.
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)
    _signal.signal(_signal.SIGTERM, _asked_to_end)
    for number in _OTHER_SIGNALS:
        if callable(_signal.getsignal(number)):
            _signal.signal(number, _signal.SIG_DFL)


def _describe(error: BaseException) -> bytes:
    """Write down an error in a form that can be read for certain."""
    text = "".join(traceback.format_exception(error))[-TRACEBACK_LIMIT:]
    description = "".join(traceback.format_exception_only(error)).strip()
    pickled = b""
    with contextlib.suppress(Exception):  # Of whatever its class does when it is pickled.
        pickled = pickle.dumps(outcome.Error(error))
    return pickle.dumps((pickled, description[:DESCRIPTION_LIMIT], text))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:  # None, closed, a broken pipe, a user's own.
            continue


def _ignore_sigterm() -> None:  # pragma: no cover (in forked children)
    """Take no more notice of being asked to end: this is the end."""
    while True:
        try:
            _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
            return
        except SystemExit:
            continue  # It was asked just now, and its handler has run before the call.


def _be_child(  # pragma: no cover (in forked children)
    work: Callable[[], object],
    kept: Iterable[socket.socket],
    report: int,
    mask: set[int],
) -> NoReturn:
    status = 1
    try:
        _reset_signals()
        close_inherited(kept)
        said = WELL
        try:
            _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
            work()
        except BaseException as error:  # noqa: ASYNC103 (the parent raises it)
            _ignore_sigterm()
            said = _describe(error)
        else:
            _ignore_sigterm()
        while said:
            said = said[os.write(report, said) :]
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
    mask = _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGTERM, _signal.SIGINT))
    try:
        pid = os.fork()
        if pid == 0:  # pragma: no cover (in forked children)
            _be_child(work, kept, report, mask)
    except BaseException:
        os.close(report)
        raise
    finally:
        _signal.pthread_sigmask(_signal.SIG_SETMASK, mask)
    return Child(pid, report)


def nameless_file() -> int:
    """Return a descriptor of a new file that no path leads to."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("trio_socketserver")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class Child:
    """A child process of ours, from its fork to its end.

    Attributes:
        pid: its number, which is nobody else's until `run` has returned.
    """

    def __init__(self, pid: int, report: int) -> None:
        self.pid = pid
        self._report = report
        self._status: os.waitid_result | None = None

    async def run(self, cleanup_timeout: float) -> None:
        """Wait for the end of the child.

        Args:
            cleanup_timeout: seconds between SIGTERM and SIGKILL when that is cancelled.

        Raises:
            BaseException: what its work has raised.
            ChildFailed: that cannot be told, or it ended by something else.
        """
        pidfd = None
        try:
            pidfd = open_pidfd(self.pid)
            if pidfd is None:
                await self._wait_by_thread(cleanup_timeout)
            else:
                ended = functools.partial(trio.lowlevel.wait_readable, pidfd)
                await self._wait_to_end(pidfd, ended, cleanup_timeout)
            if os.pread(self._report, len(WELL), 0) != WELL:
                self._raise_report()
        finally:
            os.close(self._report)
            if pidfd is not None:
                os.close(pidfd)

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
        """Wait until the child has ended, and take its exit status; cancelled, end it."""
        try:
            await ended()
        except BaseException:
            with trio.CancelScope(shield=True):  # SIGKILL ends it.
                self._signal(pidfd, signal.SIGTERM)
                with trio.move_on_after(cleanup_timeout) as patience:
                    await ended()
                if patience.cancelled_caught:
                    self._signal(pidfd, signal.SIGKILL)
                    await ended()
            self._take_status()
            raise
        self._take_status()

    def _take_status(self) -> None:
        try:
            self._status = os.waitid(os.P_PID, self.pid, os.WEXITED)
        except ChildProcessError:  # Somebody else has taken it.
            self._status = None

    def _signal(self, pidfd: int | None, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if pidfd is None:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(pidfd, number)

    def _raise_report(self) -> None:
        """Raise what the child has reported, if it is not that all is well."""
        with open(self._report, "rb", closefd=False) as file:
            file.seek(0)
            report = file.read()
        if not report:  # It has not come so far.
            if self._status is None or self._status.si_status:
                raise ChildFailed(self._describe_end())
            return
        pickled, description, text = pickle.loads(report)
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


def open_pidfd(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends, if the system can."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
