"""Draining: telling idle connections that the server is about to close.

A connection is idle while its handler waits for the *next request line*. When draining
begins, every idle wait is woken once; each waiter then takes what the kernel still holds
for it and decides by itself whether to leave (see `Drain.deadline`). Waiters register an
object with an ``interrupt()`` method for the length of their wait, which costs two set
operations instead of a cancel scope per wait.
"""

from __future__ import annotations

import math
from typing import Protocol

import trio

FIRST_LINE_GRACE = 1.0
"""Seconds, from when draining began, for a first line, and for the rest of any line.

Who has sent none may have connected a moment ago; who has sent a part may have the rest on
the way. One second covers a retransmitted packet (Linux: 200 ms at least) and any usual
round trip, and nobody who sends byte by byte holds the server up for longer.
"""


class Interruptible(Protocol):
    """Something that waits for a peer and can be asked to look again."""

    def interrupt(self) -> None:
        """End the wait in progress, without harm to the connection."""


class Drained(Exception):
    """Raised out of an idle wait: the server is draining and nothing has arrived."""


class Drain:
    """One server's draining, from entering to closing.

    Attributes:
        event: set when draining begins.
        waiting: the idle waits in progress.
    """

    __slots__ = ("_began", "event", "waiting")

    def __init__(self) -> None:
        self.event: trio.Event = trio.Event()
        self.waiting: set[Interruptible] = set()
        self._began = math.inf

    def begin(self) -> None:
        """Set the event and wake every idle wait; later calls do nothing."""
        if self.event.is_set():
            return
        self._began = trio.current_time()
        self.event.set()
        for waiter in list(self.waiting):
            waiter.interrupt()

    def deadline(self, *, served: bool) -> float:
        """Return until when a connection may still wait for a line, on trio's clock.

        Args:
            served: whether the connection has had a line already, and begun no other.
        """
        return self._began + (0 if served else FIRST_LINE_GRACE)
