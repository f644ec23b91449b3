"""TLS for blocking handlers: a real `ssl.SSLSocket`, which they may do anything with.

It is made where the connection is lent, so that whoever wants to wake its thread finds it,
and shakes hands in the thread. Three things differ from what `ssl` makes, none of which a
handler has to know of:

* closing it sends close_notify, if the peer has room for it, and does not wait for the
  peer's;
* ``shutdown()`` ends a direction of the connection. That of `ssl` drops TLS first, so that
  what is sent after ``shutdown(SHUT_RD)`` is sent in clear, and what is received after
  ``shutdown(SHUT_WR)`` is not decrypted;
* what goes wrong in the handshake is a fault of the peer's, with OpenSSL's reason.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import math
import re
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from ._exceptions import ConnectionBroken, RequestTimeout, connection_broken
from ._sockets import SELECTOR

PLACE_IN_SOURCE: Final = re.compile(r" \(_ssl\.c:\d+\)$")


def describe(error: ssl.SSLError, doing: str) -> str:
    """Say in one line what went wrong, with OpenSSL's reason."""
    reason = PLACE_IN_SOURCE.sub("", error.strerror or str(error))
    return f"{doing} failed: {reason}"


class SecureSocket:
    """Mixed into the class of an `ssl.SSLSocket` that has been lent to a handler.

    OpenSSL works for one thread at a time, and in the newest Pythons makes the others wait,
    for as long as a peer is silent. So no close_notify is sent while another thread is in
    it, perhaps one that a handler has left behind; what wakes that is the closing.
    """

    __slots__ = ()

    def read(self: Any, len: int = 1024, buffer: Any = None) -> Any:
        """Receive, for all methods that do."""
        with self._in_use():
            try:
                return super().read(len, buffer)  # type: ignore[misc]
            except ssl.SSLZeroReturnError:  # How it ends where both sides have.
                return b"" if buffer is None else 0

    def send(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Send, for all methods that do but `write`."""
        with self._in_use(), self._noting_cuts():
            return super().send(*args, **kwargs)  # type: ignore[misc]

    def write(self: Any, data: Any) -> Any:
        """Send, too."""
        with self._in_use(), self._noting_cuts():
            return super().write(data)  # type: ignore[misc]

    @contextlib.contextmanager
    def _noting_cuts(self: Any) -> Iterator[None]:
        # It waits for room before it encrypts, so OpenSSL knows nothing of a timeout.
        self._is_cut = True
        yield
        self._is_cut = False

    @contextlib.contextmanager
    def _in_use(self: Any) -> Iterator[None]:
        me = threading.get_ident()
        self._users.add(me)
        try:
            yield
        finally:
            self._users.discard(me)

    def shutdown(self: Any, how: int) -> None:
        """End one direction of the connection, or both.

        OpenSSL gives up on what has been sent to us before close_notify and not been
        received. So where that is the case, ``SHUT_WR`` ends the connection without one.
        """
        loses = how == socket.SHUT_WR and self._holds_data()
        if how != socket.SHUT_RD and not loses:
            self.say_goodbye(0)
        socket.socket.shutdown(self, how)

    def _holds_data(self: Any) -> bool:
        if self.fileno() == -1 or self._users:
            return False
        with SELECTOR() as selector:
            selector.register(self.fileno(), selectors.EVENT_READ)
            return bool(self.pending() or selector.select(0))

    def _real_close(self: Any, *args: Any) -> None:
        self.say_goodbye(0)
        super()._real_close(*args)  # type: ignore[misc]

    def say_goodbye(self: Any, seconds: float) -> None:
        """Send close_notify, if hands have been shaken, and wait for nothing but room.

        Args:
            seconds: how long to wait for the peer to read what comes before it.
        """
        if self.fileno() == -1 or self._users or self._is_cut or self.version() is None:
            return
        deadline = time.monotonic() + seconds
        timeout = self.gettimeout()
        with contextlib.suppress(OSError, ValueError):
            self.settimeout(0)
            try:
                while not self._sends_close_notify():
                    if not _has_room(self, deadline - time.monotonic()):
                        return
            finally:
                self.settimeout(timeout)

    def _sends_close_notify(self: Any) -> bool:
        try:
            # It looks for the peer's, too, but once only. As unwrap(), which would drop TLS
            # where it finds that, and have the handler read what comes in clear.
            self._sslobj.shutdown()
        except ssl.SSLWantReadError:
            return True
        except ssl.SSLWantWriteError:
            return False
        return True


def _has_room(sock: socket.socket, seconds: float) -> bool:
    """Wait until something can be sent, or the connection has ended."""
    with SELECTOR() as selector:
        selector.register(sock.fileno(), selectors.EVENT_WRITE)
        return bool(selector.select(max(seconds, 0)))


@functools.cache
def _secure_class(base: Any) -> Any:
    namespace = {"__slots__": (), "__module__": base.__module__}
    return type(base.__name__, (SecureSocket, base), namespace)


def secure(sock: socket.socket, context: ssl.SSLContext) -> socket.socket:
    """Make a connection one of TLS, which has not shaken hands. It takes the descriptor.

    Raises:
        ConnectionBroken: the peer has gone. The connection is closed.
    """
    try:
        made = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
    except OSError as error:
        raise _broken(error) from error
    made._users = set()  # type: ignore[attr-defined]
    made._is_cut = False  # type: ignore[attr-defined]
    theirs: Any = type(made)
    made.__class__ = _secure_class(theirs)
    return made


def shake_hands(sock: Any, seconds: float) -> None:
    """Shake hands, and leave the socket's timeout as it was.

    Raises:
        ConnectionBroken: it failed.
        RequestTimeout: it took longer.
    """
    timeout = sock.gettimeout()
    sock.settimeout(None if seconds == math.inf else seconds)
    try:
        sock.do_handshake()
    except TimeoutError as error:
        raise RequestTimeout(f"the TLS handshake took longer than {seconds:g} s") from error
    except OSError as error:
        raise _broken(error) from error
    sock.settimeout(timeout)


def _broken(error: OSError) -> ConnectionBroken:
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLSyscallError)):
        reason = "the peer has gone in the middle of the TLS handshake"
        return ConnectionBroken(errno.ECONNRESET, reason)
    if isinstance(error, ssl.SSLError):
        return ConnectionBroken(errno.EPROTO, describe(error, "TLS handshake"))
    return connection_broken(error)
