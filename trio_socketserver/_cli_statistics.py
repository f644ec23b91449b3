"""SIGUSR1: the command prints its statistics, and goes on.

The signal's handler only asks the event loop to do it, in between two tasks' steps. There
the numbers are consistent, and the handler cannot find stdout in the middle of a write.

Service managers send a signal to every process of a service, and shells to the group of
processes. SIGUSR1 ends who has made no provision for it, so its children ignore it: forked
ones from the start, workers from the moment that their interpreter runs Python code (see
`_fresh_interpreter`; before that they serve nothing, and the crew starts another). What
these execute takes that over, as it does with SIGINT.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import TracebackType
from typing import Any, Final

import trio

from ._cli_output import numbers_of, say

SIGUSR1: Final[int | None] = getattr(signal, "SIGUSR1", None)
"""The signal; None where there is none (Windows)."""


class StatisticsOnSignal:
    """Listens for SIGUSR1, unless somebody else does; a context manager.

    Before `show_those_of`, and when the event loop has ended, the signal does nothing.
    """

    def __init__(self) -> None:
        self._server: Any = None
        self._token: trio.lowlevel.TrioToken | None = None

    def __enter__(self) -> StatisticsOnSignal:
        """Begin to listen."""
        if SIGUSR1 is not None and signal.getsignal(SIGUSR1) is signal.SIG_DFL:
            signal.signal(SIGUSR1, self._hear)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Listen no more."""
        if SIGUSR1 is not None and signal.getsignal(SIGUSR1) == self._hear:
            signal.signal(SIGUSR1, signal.SIG_DFL)

    def show_those_of(self, server: Any) -> None:
        """Have a signal show what *server* has done; to be called in trio's thread."""
        self._token = trio.lowlevel.current_trio_token()
        self._server = server

    def _hear(self, number: int, frame: object) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._show, idempotent=True)

    def _show(self) -> None:
        say(numbers_of(self._server))


def _ignore_in_child() -> None:  # pragma: no cover (in forked children)
    if isinstance(SIGUSR1, int):
        heard_by = getattr(signal.getsignal(SIGUSR1), "__self__", None)
        if isinstance(heard_by, StatisticsOnSignal):
            signal.signal(SIGUSR1, signal.SIG_IGN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_ignore_in_child)
