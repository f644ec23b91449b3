"""What can go wrong with a request, and whose fault it is.

Each exception has two parents: the one that code written for `socketserver` catches
(an `OSError`, `EOFError` or `ValueError`) and, where trio has one, the one that trio code
catches. `is_peer_fault` decides between a traceback and one quiet line in the log.
"""

from __future__ import annotations

import errno
import os
import ssl

import trio

__all__ = [
    "ChildFailed",
    "ConnectionBroken",
    "IncompleteRead",
    "LineTooLong",
    "RequestTimeout",
]


class ConnectionBroken(trio.BrokenResourceError, ConnectionError):
    """The peer, or the network on its behalf, ended a connection.

    Unlike `socketserver`, where each way of losing a peer is a subclass of `OSError` of
    its own, all of them are this one class, so that one ``except`` covers them: it is a
    `ConnectionError` for ported code and a `trio.BrokenResourceError` for trio code.
    ``errno`` and ``strerror`` say which it was.
    """


class RequestTimeout(TimeoutError, trio.TooSlowError):
    """A wait for the peer, or the whole request, took longer than allowed.

    It is the `TimeoutError` that blocking handlers know from `socket.socket.settimeout`
    and the `trio.TooSlowError` of `trio.fail_after`.
    """

    def __init__(self, message: str) -> None:
        super().__init__(errno.ETIMEDOUT, message)

    def __reduce__(self) -> tuple[type[RequestTimeout], tuple[str | None]]:
        return type(self), (self.strerror,)


class LineTooLong(ValueError):
    """A line or record exceeded the handler's ``max_line_size``.

    Nothing is consumed: what has arrived is still in the buffer. `socketserver` has no
    such limit, so there a peer that sends no newline fills the server's memory.
    """


class ChildFailed(RuntimeError):
    """A child process has failed in a way that is no exception of its handler's.

    It was ended by a signal, or has exited with a status; or its handler's exception could
    not be pickled, which the message then describes. `socketserver` tells nobody.
    """


class IncompleteRead(EOFError):
    """The stream ended before the requested bytes had arrived.

    Attributes:
        partial: the bytes that did arrive.
    """

    def __init__(self, message: str, partial: bytes) -> None:
        super().__init__(message)
        self.partial = partial

    def __reduce__(self) -> tuple[type[IncompleteRead], tuple[str, bytes]]:
        return type(self), (str(self), self.partial)


_PEER_FAULTS: tuple[type[BaseException], ...] = (
    ConnectionBroken,
    RequestTimeout,
    LineTooLong,
    IncompleteRead,
    # The same events met below our classes: in-memory and TLS streams, other sockets.
    trio.BrokenResourceError,
    BrokenPipeError,
    ConnectionAbortedError,
    ConnectionResetError,
    TimeoutError,
    ssl.SSLError,
)
"""Exceptions that a well-written handler cannot prevent.

`ConnectionRefusedError` is missing on purpose: a handler gets it from a backend of its own,
which is a fault of ours. asyncio and gevent print tracebacks for most of these.
"""


def is_peer_fault(error: BaseException) -> bool:
    """Tell whether the peer alone is to blame; of a group, for each of its leaves."""
    if isinstance(error, BaseExceptionGroup):
        return all(is_peer_fault(leaf) for leaf in error.exceptions)
    return isinstance(error, _PEER_FAULTS)


def connection_broken(error: OSError) -> ConnectionBroken:
    """Translate what a system call on a connected socket reported."""
    if error.errno is None:
        return ConnectionBroken(str(error))
    return ConnectionBroken(error.errno, os.strerror(error.errno))
