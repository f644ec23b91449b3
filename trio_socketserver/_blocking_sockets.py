"""The sockets that blocking handlers hold.

A request changes hands for as long as a thread handles it: `lend` takes the socket out of
the `StreamSocket` and makes it a blocking one, `Loan.end` puts it back. So nobody closes it
under the thread; whoever wants to can wake it.

A datagram server's socket is everybody's and stays non-blocking, which is a property of
the open file and not of a descriptor. A handler's view of it waits in trio instead, from
where it can be cancelled, and where a Unix peer that does not read is waited for without
spinning.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import socket
from collections.abc import Callable
from typing import Any, Final

import trio

from ._blocking_tls import shake_hands
from ._sockets import DONTWAIT, DatagramSocket, StreamSocket
from ._tls import TLSSocket
from ._workers import CallTrio

WAITING: Final = {
    "recv": 1,
    "recv_into": 2,
    "recvfrom": 1,
    "recvfrom_into": 2,
    "recvmsg": 2,
    "recvmsg_into": 2,
    "send": 1,
    "sendall": 1,
    "sendmsg": 2,
}
"""The methods of a socket that may wait, and where their flags stand.

``sendto`` is a matter of its own.
"""


class DatagramView(socket.socket):
    """A datagram server's socket, as a blocking handler sees it.

    It has a descriptor of its own, so closing it does the server no harm, and a timeout of
    its own.

    Args:
        sender: what the server replies with.
        call: what waits in trio.
    """

    __slots__ = ("_call", "_scopes", "_seconds", "_sender", "_woken")

    def __init__(self, sender: DatagramSocket, call: CallTrio) -> None:
        sock = sender.socket
        super().__init__(sock.family, sock.type, sock.proto, fileno=os.dup(sock.fileno()))
        self._sender = sender
        self._call = call
        self._seconds = socket.getdefaulttimeout()
        self._scopes: set[trio.CancelScope] = set()
        self._woken = False
        super().settimeout(0)

    def settimeout(self, value: float | None, /) -> None:
        """Bound every single wait; None for ever. Nobody else's socket is changed."""
        if value is not None and value < 0:
            raise ValueError("Timeout value out of range")
        self._seconds = value

    def gettimeout(self) -> float | None:
        """Return what `settimeout` has set."""
        return self._seconds

    @property
    def timeout(self) -> float | None:
        """What `settimeout` has set."""
        return self._seconds

    def dup(self) -> DatagramView:
        """Return another view; waking this one does not wake it."""
        return DatagramView(self._sender, self._call)

    def setblocking(self, flag: bool, /) -> None:
        """Wait for ever, or not at all. Nobody else's socket is changed."""
        self._seconds = None if flag else 0

    def getblocking(self) -> bool:
        """Tell whether operations may wait."""
        return self._seconds != 0

    def _wait(self, function: Callable[..., Any], *args: Any) -> Any:
        """Await *function* in trio, within the timeout."""
        shut_down = BrokenPipeError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN))

        async def bounded() -> Any:
            seconds = math.inf if self._seconds is None else self._seconds
            with trio.move_on_after(0 if self._woken else seconds) as scope:
                self._scopes.add(scope)
                try:
                    return await function(*args)
                finally:
                    self._scopes.discard(scope)
            raise shut_down if self._woken else TimeoutError("timed out")

        try:
            return self._call(bounded)
        except trio.RunFinishedError:
            raise shut_down from None

    def wake(self) -> None:
        """End every wait on this view, now and from now on; called in trio's thread."""
        self._woken = True
        for scope in self._scopes:
            scope.cancel()

    def sendto(self, *args: Any) -> int:
        """Send a datagram; waits as `DatagramSocket.sendto` does."""
        try:
            return super().sendto(*args)
        except BlockingIOError:
            flags = args[1] if len(args) > 2 else 0
            if self._seconds == 0 or flags & DONTWAIT:
                raise
        sent: int = self._wait(self._sender.sendto, *args)
        return sent


def _waiting(name: str, place: int) -> Callable[..., Any]:
    method = getattr(socket.socket, name)
    ready = "wait_readable" if name.startswith("recv") else "wait_writable"

    @functools.wraps(method)
    def call(self: DatagramView, /, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return method(self, *args, **kwargs)
            except BlockingIOError:
                flags = args[place] if len(args) > place else kwargs.get("flags", 0)
                if self._seconds == 0 or flags & DONTWAIT:
                    raise
            self._wait(getattr(trio.lowlevel, ready), self)

    return call


for _name, _place in WAITING.items():
    if hasattr(socket.socket, _name):
        setattr(DatagramView, _name, _waiting(_name, _place))


class Loan:
    """A request in the hands of a blocking handler.

    Attributes:
        request: what the handler gets.
    """

    __slots__ = ("request",)

    request: Any

    def __init__(self, request: Any) -> None:
        self.request = request

    def begin(self) -> None:
        """Do what comes before the handler, in its thread, and may block."""

    def finish(self) -> None:
        """Do what comes after the handler, in its thread, and may block."""

    def wake(self) -> None:
        """Make a thread return that waits for the peer."""

    def end(self) -> None:
        """Take the request back from a handler that has ended."""

    def close(self) -> None:
        """Close, after the end of a handler that was abandoned with the request."""


def _make_blocking(sock: socket.socket, seconds: float | None) -> None:
    if seconds is None:
        seconds = socket.getdefaulttimeout()
    if sock.gettimeout() != seconds:  # A system call spared, see StreamSocket.
        sock.settimeout(seconds)


class _StreamLoan(Loan):
    __slots__ = ("_stream", "_waker")

    def __init__(self, stream: StreamSocket) -> None:
        self._stream = stream
        self.request, self._waker = stream.lend()
        _make_blocking(self.request, stream.gettimeout())

    def wake(self) -> None:
        self._waker.wake()

    def end(self) -> None:
        self._stream.take_back()

    def close(self) -> None:
        self._waker.release()
        self.request.close()
        if self.request.fileno() != -1:  # A file of the handler's, left open, keeps it.
            socket.close(self.request.detach())


class _TLSLoan(_StreamLoan):
    __slots__ = ()
    _stream: TLSSocket

    def begin(self) -> None:
        shake_hands(self.request, self._stream.handshake_timeout)

    def finish(self) -> None:
        self.request.say_goodbye(self._stream.closing_timeout)


class _DatagramLoan(Loan):
    __slots__ = ("_call", "_view")

    def __init__(self, data: bytes, sender: DatagramSocket, call: CallTrio) -> None:
        self._call = call
        self._view = DatagramView(sender, call)
        self.request = (data, self._view)

    def wake(self) -> None:
        self._view.wake()

    def end(self) -> None:
        # A thread of the handler's own may wait still, and trio with it.
        self._view.wake()
        self._view.close()

    def close(self) -> None:
        async def end() -> None:  # noqa: ASYNC124 (trio awaits it)
            self.end()

        if trio.lowlevel.in_trio_run():  # There was no thread yet.
            self.end()
            return
        try:
            self._call(end)
        except trio.RunFinishedError:
            self._view.close()


def lend(request: Any, call: CallTrio) -> Loan:
    """Give a request to a blocking handler, in the form it knows.

    Args:
        request: what is neither a connection nor a datagram is given as it is.
        call: what waits in trio, where a handler has to.
    """
    match request:
        case StreamSocket():
            kind = _TLSLoan if isinstance(request, TLSSocket) else _StreamLoan
            return kind(request)
        case (data, DatagramSocket() as sender):
            return _DatagramLoan(data, sender, call)
        case _:
            return Loan(request)


def give(  # pragma: no cover (in forked children)
    request: Any, call: CallTrio
) -> Loan:
    """Give a request to a blocking handler for good, in the form it knows.

    For a handler in a process of its own, which nobody has to wake: making a connection one
    that can be woken would be a twentieth of a request.
    """
    if not isinstance(request, StreamSocket) or isinstance(request, TLSSocket):
        return lend(request, call)
    [sock] = request.held()
    _make_blocking(sock, request.gettimeout())
    return Loan(sock)
