"""What an error from accept() or recvfrom() means for the loop that called it.

Three answers, by errno:

* one connection failed before we got it: take the next;
* the process or the system is out of something: nothing will come until some is given
  back, and the kernel keeps reporting "readable", so a loop that tries again at once burns
  a core (the stdlib's does; asyncio pauses for one second; trio leaves it to its caller,
  whose helper sleeps 100 ms): back off;
* the listener itself is unusable: no later call can succeed, so the error is the caller's.

What no table knows is treated like a shortage: a wrong guess then costs a little latency
and never a spinning loop.
"""

from __future__ import annotations

import errno
import logging
import math
import ssl
from collections.abc import Callable

import trio

from ._log import log


def _errnos(*names: str) -> frozenset[int]:
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


THIS_CONNECTION = _errnos(
    # Reset or closed while it was queued: BSDs, some Linux drivers, the TCP stack itself.
    "ECONNABORTED",
    "ECONNRESET",
    "EPROTO",
    # Linux: a firewall rule refused it.
    "EPERM",
    # Linux hands over the new connection's pending network errors; accept(2) says to treat
    # them like "try again".
    "ENETDOWN",
    "ENOPROTOOPT",
    "EHOSTDOWN",
    "ENONET",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "ETIMEDOUT",
    # Datagram sockets: an earlier reply could not be delivered (ICMP).
    "ECONNREFUSED",
    "EMSGSIZE",
    "EINTR",
)

LISTENER = _errnos(
    "EBADF",  # closed, by us or behind our back
    "EINVAL",  # not listening
    "ENOTSOCK",
    # accept(2) lists it among the network errors too, but from a socket that cannot
    # accept it comes every time, and trying again would spin.
    "EOPNOTSUPP",
    "EFAULT",
)

SHORTAGE = _errnos("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")

BACK_OFF_FIRST = 0.010
"""Seconds before the first new attempt: a short peak of descriptors is over by then."""

BACK_OFF_LIMIT = 1.0
"""Seconds between attempts at most: recovery is noticed within this time."""


class AcceptErrors:
    """The errors of one serving loop, with its back-off.

    An *episode* is a run of shortages without a success in between. It is logged once.

    Args:
        clock: tells the time, in seconds.

    Attributes:
        delay: seconds between the last attempt and the next; 0 outside an episode.
        resume_at: when the next attempt is due, on that clock.
    """

    __slots__ = ("_clock", "delay", "resume_at")

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self._clock = clock
        self.delay = 0.0
        self.resume_at = -math.inf

    def failed(self, error: OSError) -> None:
        """Take note of *error*; in an episode, set when to try again.

        Raises:
            OSError: *error* itself, when it says that the listener is unusable.
        """
        if isinstance(error, (ssl.SSLError, ConnectionError, TimeoutError)):
            return  # Of an overridden get_request(); its errno may be a TLS reason code.
        if error.errno in LISTENER:
            raise error
        if error.errno is None or error.errno in THIS_CONNECTION:
            return  # Without an errno it is not the system's but an override's.
        if not self.delay:
            log(
                logging.ERROR,
                "cannot accept (%s); trying again after %g ms, then up to every %g s",
                error,
                BACK_OFF_FIRST * 1000,
                BACK_OFF_LIMIT,
            )
        self.delay = min(self.delay * 2 or BACK_OFF_FIRST, BACK_OFF_LIMIT)
        self.resume_at = self._clock() + self.delay

    def succeeded(self) -> None:
        """End the episode."""
        self.delay = 0.0
