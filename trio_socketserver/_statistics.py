"""Counting requests: every one accepted is in exactly one place.

`Counters` are what a server increments; a `ServerStatistics` is what it shows. How many
requests are active is never counted, only derived, so the sum cannot be wrong.
"""

from __future__ import annotations

import dataclasses

__all__ = ["ServerStatistics"]


@dataclasses.dataclass(frozen=True, slots=True)
class ServerStatistics:
    """What a server has done so far.

    At every moment ``accepted == active + completed + failed + rejected + cancelled``.
    """

    accepted: int
    """Requests taken from the listening socket."""
    active: int
    """Requests that are being handled now."""
    completed: int
    """Requests whose handler returned."""
    failed: int
    """Requests that ended with an error, ours or the peer's."""
    rejected: int
    """Requests that ``verify_request()`` turned away."""
    cancelled: int
    """Requests that were cancelled."""
    peer_errors: int
    """Those of the failed whose error was the peer's."""
    accept_errors: int
    """Errors of accepting (no request came of those, so they are in no other number)."""
    abandoned_threads: int
    """Worker threads that were left to themselves (``daemon_threads``)."""
    truncated_datagrams: int
    """Datagrams longer than ``max_packet_size``, delivered cut."""
    datagrams_dropped: int
    """Datagrams that the kernel dropped because its queue was full (Linux; else 0)."""


class Counters:
    """The numbers behind `ServerStatistics`."""

    __slots__ = (
        "abandoned_threads",
        "accept_errors",
        "accepted",
        "cancelled",
        "completed",
        "failed",
        "peer_errors",
        "rejected",
        "truncated_datagrams",
    )

    def __init__(self) -> None:
        self.accepted = 0
        self.completed = 0
        self.failed = 0
        self.rejected = 0
        self.cancelled = 0
        self.peer_errors = 0
        self.accept_errors = 0
        self.abandoned_threads = 0
        self.truncated_datagrams = 0

    @property
    def active(self) -> int:
        """Requests that have not ended."""
        return self.accepted - self.completed - self.failed - self.rejected - self.cancelled

    def snapshot(self, datagrams_dropped: int) -> ServerStatistics:
        """Return the numbers as they are now."""
        return ServerStatistics(
            active=self.active,
            datagrams_dropped=datagrams_dropped,
            **{name: getattr(self, name) for name in self.__slots__},
        )
