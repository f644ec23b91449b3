"""Waking threads that wait for a socket, without closing it under them.

`shutdown(SHUT_RDWR)` ends every `recv` and `send` on a connection at once. What it must
never do is to hit a stranger: a thread may close its socket at the very moment, and another
may be given the descriptor's number. So a socket that can be woken takes a lock where its
descriptor goes away, and is woken under that lock. No system call under it blocks.

A duplicate of the descriptor, taken beforehand, would do without the lock. But while it is
open the peer does not see the connection end when the handler closes it, and each request
would need two descriptors. So one is taken only when a socket gives its descriptor away,
which is what wrapping it in TLS does.
"""

from __future__ import annotations

import errno
import functools
import os
import socket
import threading
import weakref
from typing import Any

# Reentrant: under it, a collection may begin, and close what a cycle has held open.
_lock = threading.RLock()


def _renew_lock() -> None:  # pragma: no cover (in forked children)
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # In the child nobody is left who could release it.
    os.register_at_fork(after_in_child=_renew_lock)

_wakers: weakref.WeakKeyDictionary[socket.socket, Waker] = weakref.WeakKeyDictionary()
"""The wakers of the sockets that can be woken."""


class Waker:
    """Wakes the threads that wait for one connection.

    Args:
        sock: a socket of it; it stays the same object, but becomes a `_Wakeable` one.

    Attributes:
        follows: whether the connection can still be woken when a socket has given its
            descriptor away. If so, `release` has to be called.
    """

    __slots__ = ("__weakref__", "_duplicates", "_members", "follows")

    def __init__(self, sock: socket.socket) -> None:
        self.follows = True
        self._duplicates: list[socket.socket] = []
        self._members: list[weakref.ref[socket.socket]] = []
        with _lock:
            self.add(sock)

    def add(self, sock: socket.socket) -> None:
        """Add a socket of the connection, under the lock."""
        if not isinstance(sock, _Wakeable):
            theirs: Any = type(sock)
            sock.__class__ = _wakeable_class(theirs)
        _wakers[sock] = self
        self._members.append(weakref.ref(sock))

    def lose(self, sock: socket.socket, *, lives_on: bool) -> None:
        """Take note, under the lock, that a socket is about to have no descriptor."""
        self._members = [member for member in self._members if member() is not sock]
        if lives_on and self.follows and sock.fileno() != -1:
            try:
                self._duplicates.append(socket.socket(fileno=os.dup(sock.fileno())))
            except OSError as error:
                # It cannot be woken any more, but it works.
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise

    def wake(self) -> None:
        """Make every thread return that waits for the connection, in either direction."""
        with _lock:
            for member in self._members:
                sock = member()
                if sock is not None:
                    _shut_down(sock)
            for duplicate in self._duplicates:
                _shut_down(duplicate)

    def release(self) -> None:
        """Follow the connection no more, so that it can end; idempotent."""
        self.follows = False
        with _lock:
            duplicates, self._duplicates = self._duplicates, []
        for duplicate in duplicates:
            duplicate.close()


def waker_of(sock: socket.socket) -> Waker:
    """Return the waker of a connected socket, which is given one if it has none."""
    with _lock:
        waker = _wakers.get(sock)
    return waker or Waker(sock)


class _Wakeable:
    """Mixed into the class of a socket that may be woken."""

    __slots__ = ()

    def _real_close(self: Any, *args: Any) -> None:
        # Where socket.close() ends when no file made of the socket is open any more.
        with _lock:
            waker = _wakers.pop(self, None)
            if waker is not None:
                waker.lose(self, lives_on=False)
        super()._real_close(*args)  # type: ignore[misc]

    def detach(self: Any) -> int:
        """Give the descriptor away."""
        with _lock:
            waker = _wakers.pop(self, None)
            if waker is not None:
                waker.lose(self, lives_on=True)
            descriptor: int = super().detach()  # type: ignore[misc]
        return descriptor

    def dup(self: Any) -> Any:
        """Return another socket of the same connection."""
        copy = super().dup()  # type: ignore[misc]
        with _lock:
            waker = _wakers.get(self)
            if waker is not None:
                waker.add(copy)
        return copy


@functools.cache
def _wakeable_class(base: Any) -> Any:
    namespace = {"__slots__": (), "__module__": base.__module__}
    return type(base.__name__, (_Wakeable, base), namespace)


def _shut_down(sock: socket.socket) -> None:
    try:
        # Not by its own method: that of a TLS socket drops the state its thread works on.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)
    except OSError as error:
        # The peer has gone, the descriptor is another's, it is no connection.
        if error.errno not in (errno.ENOTCONN, errno.EBADF, errno.EINVAL):
            raise
