"""The sockets that handlers and servers hold.

All of them stand directly on a `socket.socket`, with one rule for every operation: try the
system call without waiting; if it would block, wait until the kernel reports the socket
ready, and try again; if it succeeded without waiting, let other tasks run once. Data that
a call has returned is never lost to a cancellation: the cancellation is looked for before
the call, and only the scheduling comes after it.

An error that the system reports for a connected socket is the peer's doing and becomes
`ConnectionBroken`, unless the socket was closed here, which is `trio.ClosedResourceError`.
"""

from __future__ import annotations

import errno
import selectors
import socket as socketlib
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self, TypeAlias, TypeVar

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
    wait_readable,
    wait_writable,
)

from ._draining import Drain, Drained
from ._exceptions import ConnectionBroken, RequestTimeout, connection_broken
from ._inherited import connections, forget, remember
from ._waking import Waker

__all__ = ["DatagramSocket", "StreamSocket"]

T = TypeVar("T")
Buffer: TypeAlias = bytes | bytearray | memoryview
Address: TypeAlias = Any
"""What the socket module uses for the address family at hand: a tuple, a path, a name."""

DONTWAIT: Final[int] = getattr(socketlib, "MSG_DONTWAIT", 0)
"""What tells a system call not to wait; Windows has no such flag."""

SELECTOR: Final[type[selectors.BaseSelector]] = getattr(
    selectors, "PollSelector", selectors.SelectSelector
)
"""Asks the kernel without a descriptor of its own, when there may be none left."""

CLOSED: Final = socketlib.socket()
"""A closed socket, for who has none."""

CLOSED.close()

RECEIVE_SIZE: Final = 65536
"""Bytes asked for when the caller names no size; trio and asyncio use 64 KiB too."""

UNIX_BACK_OFF_FIRST: Final = 0.001
"""Seconds before a datagram is offered again to a Unix peer whose queue is full."""

UNIX_BACK_OFF_LIMIT: Final = 0.050
"""Seconds between such offers at most.

Linux reports the *sender* writable while the receiver's queue is full, so there is no event
to wait for; 50 ms keeps a stuck peer at 20 system calls a second.
"""

UNREACHABLE: Final = frozenset(
    {
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.ENOENT,  # Unix: the client has removed its file
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENETDOWN,
    }
)
"""What a reply meets when its addressee, or the way there, has gone: no fault of ours."""


def close_socket(sock: socketlib.socket) -> None:
    """Close *sock* at once and wake every task that waits for it.

    Those tasks get `trio.ClosedResourceError`. Does nothing to a closed socket.
    """
    if sock.fileno() != -1:
        if trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(sock)
        sock.close()


def _forbid_waiting(sock: socketlib.socket) -> None:
    """See to it that a call on *sock* with ``DONTWAIT`` does not wait."""
    # A timeout, perhaps the default one, would have Python wait before it asks the system.
    # Elsewhere than on Linux a connection has its listener's flags, which Python hides.
    if not DONTWAIT or sys.platform != "linux" or sock.gettimeout():
        sock.setblocking(False)


def shut_down_sending(sock: socketlib.socket) -> None:
    """End the sending side of a connection for every holder of its descriptor."""
    try:
        sock.shutdown(socketlib.SHUT_WR)
    except OSError as error:
        # The peer has gone, or the handler has shut the connection down or closed it.
        if error.errno not in (errno.ENOTCONN, errno.EBADF):
            raise


class ListeningSocket(socketlib.socket):
    """A server's own socket: closing it by any means wakes the loop that waits for it.

    The kernel forgets a closed descriptor without a word to whoever polls it, so a plain
    socket closed behind the server's back would leave the server waiting for ever.
    """

    __slots__ = ()

    def accept(self) -> tuple[socketlib.socket, Address]:
        """Accept a connection.

        As `socket.socket.accept` does it, but without making enums of family and type on
        the way, which is a fortieth of a short connection.
        """
        base: Any = super(socketlib.socket, self)
        descriptor, address = base._accept()
        connection = socketlib.socket(base.family, base.type, base.proto, fileno=descriptor)
        return connection, address

    def close(self) -> None:
        """Close the socket; a task that waits for it gets `trio.ClosedResourceError`."""
        if self.fileno() != -1 and trio.lowlevel.in_trio_run():
            trio.lowlevel.notify_closing(self)
        super().close()


class _PlainNames:
    """The names of `socket.socket` that never wait, and so need no ``await``."""

    __slots__ = ("_sock",)
    _sock: socketlib.socket

    @property
    def socket(self) -> socketlib.socket:
        """The underlying non-blocking socket; not for waiting or closing."""
        return self._sock

    def fileno(self) -> int:
        """Return the file descriptor, or -1 when the socket is closed."""
        return self._sock.fileno()

    def getpeername(self) -> Address:
        """Return the peer's address."""
        return self._sock.getpeername()

    def getsockname(self) -> Address:
        """Return the socket's own address."""
        return self._sock.getsockname()

    def getsockopt(self, *args: Any) -> Any:
        """Return a socket option; see `socket.socket.getsockopt`."""
        return self._sock.getsockopt(*args)

    def setsockopt(self, *args: Any) -> None:
        """Set a socket option; see `socket.socket.setsockopt`."""
        self._sock.setsockopt(*args)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._sock!r}>"


class StreamSocket(_PlainNames, trio.abc.HalfCloseableStream):
    """A connected stream socket: a trio stream that answers to a socket's names too.

    It is what a stream server's handler gets as ``request``, in the place of the blocking
    `socket.socket` that `socketserver` hands out. Trio code uses it as a
    `trio.abc.HalfCloseableStream`; ported code keeps its ``recv`` and ``sendall`` and adds
    ``await``.

    One task may send and another receive at the same time; two senders, or two receivers,
    are a `trio.BusyResourceError`.

    Args:
        sock: a connected, non-blocking socket. The `StreamSocket` owns it from now on.

    Raises:
        ValueError: if *sock* is something else.

    Cancellation: a cancelled receive has taken nothing; a cancelled send may have sent a
    part. Closing always closes, cancelled or not.
    """

    __slots__ = ("__weakref__", "_eof_sent", "_lent", "_sending", "_timeout", "_waiting")

    def __init__(self, sock: socketlib.socket) -> None:
        # The class above Python's knows the type without making an enum of it.
        kind = super(socketlib.socket, sock).type
        if kind != socketlib.SOCK_STREAM or sock.gettimeout() != 0:
            raise ValueError(f"not a non-blocking stream socket: {sock!r}")
        self._own(sock)

    @classmethod
    def accepted(cls, sock: socketlib.socket) -> Self:
        """Make one of what a listening socket has accepted, and leave it as it is.

        It owns the socket from now on. Where the system can be told with each call not to
        wait, the socket need not be told beforehand. For a blocking handler that saves a
        fourth of a short connection: in each system call trio's thread may have to wait for
        its turn to run Python.
        """
        _forbid_waiting(sock)
        self = cls.__new__(cls)
        self._own(sock)
        remember(connections, self)
        return self

    def _own(self, sock: socketlib.socket) -> None:
        self._sock = sock
        self._sending = False
        self._eof_sent = False
        self._timeout: float | None = None
        self._waiting = 0
        self._lent: tuple[socketlib.socket, Waker] | None = None

    @property
    def socket(self) -> socketlib.socket:
        """The underlying non-blocking socket; not for waiting or closing."""
        if self._sock.fileno() != -1:
            self._sock.setblocking(False)
        return self._sock

    # -- waiting ---------------------------------------------------------------------

    def settimeout(self, timeout: float | None) -> None:
        """Bound every single wait for the peer.

        Args:
            timeout: seconds, or None for no bound. A wait that takes longer raises
                `RequestTimeout`. A blocking socket's ``sendall`` is bounded as a whole;
                here each wait of it is.

        Raises:
            ValueError: *timeout* is negative.
        """
        if timeout is not None and not timeout >= 0:
            raise ValueError("a timeout must be a number that is not negative")
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        """Return the bound that `settimeout` has set, in seconds."""
        return self._timeout

    def interrupt(self) -> None:
        """Make every task that waits for this socket look again.

        The connection takes no harm. Used when the server begins to drain.
        """
        trio.lowlevel.notify_closing(self._sock)

    async def _wait(self, ready: Callable[[socketlib.socket], Awaitable[None]]) -> None:
        """Wait for the peer within the timeout; may return early, so try again after it."""
        self._waiting += 1
        try:
            if self._timeout is None:
                await ready(self._sock)
                return
            with trio.move_on_after(self._timeout) as scope:
                await ready(self._sock)
        except trio.ClosedResourceError:
            if self._sock.fileno() == -1:
                raise
            return  # interrupt()
        finally:
            self._waiting -= 1
        if scope.cancelled_caught:
            raise RequestTimeout(f"the peer kept us waiting for {self._timeout:g} s")

    def _failure(self, error: OSError) -> trio.ClosedResourceError | ConnectionBroken:
        if self._sock.fileno() == -1:
            return trio.ClosedResourceError("this socket is closed")
        if self._eof_sent and error.errno == errno.EPIPE:
            return trio.ClosedResourceError("this socket's sending side is closed")
        return connection_broken(error)

    async def _call(
        self,
        wait: Callable[[], Awaitable[None]],
        operation: Callable[..., T],
        *args: Any,
    ) -> T:
        """Call *operation* as soon as it does not block."""
        await checkpoint_if_cancelled()
        waited = False
        while True:
            try:
                result = operation(*args)
            except BlockingIOError:
                await wait()
                waited = True
            except OSError as error:
                raise self._failure(error) from error
            else:
                if not waited:
                    await cancel_shielded_checkpoint()
                return result

    async def _wait_readable(self) -> None:
        await self._wait(wait_readable)

    async def _wait_writable(self) -> None:
        await self._wait(wait_writable)

    def getpeername(self) -> Address:
        """Return the peer's address.

        Raises:
            ConnectionBroken: the peer has gone.
            trio.ClosedResourceError: the socket is closed.
        """
        try:
            return super().getpeername()
        except OSError as error:
            raise self._failure(error) from error

    # -- receiving -------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive whatever has arrived, or wait for something.

        Args:
            max_bytes: take no more than so many bytes; 64 KiB if None.

        Returns:
            The bytes; ``b""`` when the peer has finished sending.

        Raises:
            ConnectionBroken: the peer or the network broke the connection.
            RequestTimeout: nothing came within the socket's timeout.
            trio.ClosedResourceError: the socket is or was closed on this side.
            trio.BusyResourceError: another task is receiving.
            ValueError: *max_bytes* is less than 1.

        Cancellation: nothing has been taken.
        """
        if max_bytes is None:
            max_bytes = RECEIVE_SIZE
        elif max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        return await self._call(self._wait_readable, self._sock.recv, max_bytes, DONTWAIT)

    async def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """`socket.socket.recv`, awaited. Raises, and is cancelled, as `receive_some`.

        Args:
            bufsize: bytes at most.
            flags: as there, except ``MSG_WAITALL``: what has come is returned. To wait for
                a number of bytes use ``rfile.readexactly()``.
        """
        flags |= DONTWAIT
        return await self._call(self._wait_readable, self._sock.recv, bufsize, flags)

    async def recv_into(
        self, buffer: bytearray | memoryview, nbytes: int = 0, flags: int = 0
    ) -> int:
        """`socket.socket.recv_into`, awaited.

        Raises, and is cancelled, as `receive_some`.
        """
        return await self._call(
            self._wait_readable, self._sock.recv_into, buffer, nbytes, flags | DONTWAIT
        )

    async def receive_idle(self, max_bytes: int, drain: Drain, *, served: bool) -> bytes:
        """Receive like `receive_some`, but leave when the server drains.

        What the kernel holds already is always returned first, and without a checkpoint,
        which is left to the caller.

        Args:
            max_bytes: take no more than so many bytes.
            drain: the server's draining.
            served: whether this connection has had a request line already, and begun no
                other; if not, it is given some time still, see `Drain.deadline`.

        Raises:
            Drained: the server is draining and nothing has come.
        """
        # Not by _call(): two coroutines less are a tenth of a ping-pong.
        while True:
            try:
                return self._sock.recv(max_bytes, DONTWAIT)
            except BlockingIOError:
                await self._wait_idle(drain, served=served)
            except OSError as error:
                raise self._failure(error) from error

    async def _wait_idle(self, drain: Drain, *, served: bool) -> None:
        if drain.event.is_set():
            with trio.move_on_at(drain.deadline(served=served)) as scope:
                await self._wait(wait_readable)
            if scope.cancelled_caught:
                raise Drained
            return
        if self in drain.waiting:
            raise trio.BusyResourceError("another task is receiving on this socket")
        drain.waiting.add(self)
        try:
            await self._wait(wait_readable)
        finally:
            drain.waiting.discard(self)

    # -- sending ---------------------------------------------------------------------

    def _start_sending(self) -> None:
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this socket")
        if self._eof_sent and self._sock.fileno() != -1:
            raise trio.ClosedResourceError("this socket's sending side is closed")

    async def send_all(self, data: Buffer) -> None:
        """Send all of *data*, waiting for the peer to take it where necessary.

        Args:
            data: the bytes to send.

        Raises:
            ConnectionBroken: the peer or the network broke the connection.
            RequestTimeout: the peer took nothing for as long as the socket's timeout.
            trio.ClosedResourceError: the socket, or its sending side, is closed.
            trio.BusyResourceError: another task is sending.

        Cancellation: nothing, or a part of it, has been sent; never all.
        """
        if self._sending or self._eof_sent:
            self._start_sending()
        await checkpoint_if_cancelled()
        if not isinstance(data, bytes):
            data = memoryview(data).cast("B")
        try:
            sent = self._sock.send(data, DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise self._failure(error) from error
        if sent == len(data):
            await cancel_shielded_checkpoint()
            return
        self._sending = True
        try:
            with memoryview(data) as rest:
                while sent < len(rest):
                    await self._wait(wait_writable)
                    try:
                        sent += self._sock.send(rest[sent:], DONTWAIT)
                    except BlockingIOError:
                        continue
                    except OSError as error:
                        raise self._failure(error) from error
        finally:
            self._sending = False

    async def sendall(self, data: Buffer, flags: int = 0) -> None:
        """`socket.socket.sendall`, awaited: the ported name of `send_all`.

        Raises, and is cancelled, as `send_all`; and `ValueError` for flags.

        Args:
            data: the bytes to send.
            flags: must be 0.
        """
        if flags:
            raise ValueError("sendall() takes no flags here: use send()")
        await self.send_all(data)

    async def send(self, data: Buffer, flags: int = 0) -> int:
        """`socket.socket.send`, awaited: send at least one byte, and say how many.

        Raises as `send_all` does.

        Cancellation: nothing has been sent.
        """
        self._start_sending()
        self._sending = True
        try:
            flags |= DONTWAIT
            return await self._call(self._wait_writable, self._sock.send, data, flags)
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket's send buffer has room.

        Raises, and is cancelled, as `send`.
        """
        self._start_sending()
        if self._sock.fileno() == -1:
            raise trio.ClosedResourceError("this socket is closed")
        self._sending = True
        try:
            await self._wait(wait_writable)
        finally:
            self._sending = False

    async def send_eof(self) -> None:
        """Tell the peer that nothing more will be sent; receiving goes on.

        Raises as `send_all` does. Calling it again does nothing.

        Cancellation: nothing has been done.
        """
        await checkpoint()
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this socket")
        if self._sock.fileno() != -1 and self._eof_sent:
            return
        self._shutdown(socketlib.SHUT_WR)

    async def shutdown(self, how: int) -> None:
        """`socket.socket.shutdown`, awaited.

        Args:
            how: ``socket.SHUT_RD``, ``SHUT_WR`` or ``SHUT_RDWR``.

        Raises:
            ConnectionBroken: the peer has gone.
            trio.ClosedResourceError: the socket is closed.

        Cancellation: nothing has been done.
        """
        await checkpoint()
        self._shutdown(how)

    def _shutdown(self, how: int) -> None:
        try:
            self._sock.shutdown(how)
        except OSError as error:
            raise self._failure(error) from error
        if how != socketlib.SHUT_RD:
            self._eof_sent = True

    # -- lending ---------------------------------------------------------------------

    def lend(self) -> tuple[socketlib.socket, Waker]:
        """Give the socket, and what wakes it, to a thread. No checkpoint.

        Until `take_back` this object is a closed one, and closing it wakes that thread.
        """
        if self._waiting:
            trio.lowlevel.notify_closing(self._sock)
        self._lent = self._sock, Waker(self._sock)
        self._sock = CLOSED
        self._waiting += 1
        return self._lent

    def take_back(self) -> None:
        """Have back what was lent, if the thread has not closed it. No checkpoint."""
        assert self._lent is not None
        self._sock, waker = self._lent
        waker.release()
        self._lent = None
        self._waiting -= 1
        if self._sock.fileno() != -1:
            _forbid_waiting(self._sock)

    # -- closing ---------------------------------------------------------------------

    def shutdown_now(self) -> None:
        """End the sending side for every holder of the descriptor, without a checkpoint."""
        shut_down_sending(self._sock)

    def close_now(self) -> None:
        """Close without a checkpoint; idempotent. What is lent out is woken instead."""
        if self._waiting:
            if self._lent is not None:
                self._lent[1].wake()
            close_socket(self._sock)
        else:
            self._sock.close()  # Nobody to wake: 2 µs less.
        if self._sock.fileno() != -1:
            # A blocking handler has left files open that were made of the socket, perhaps
            # in a thread of its own, which is woken.
            waker = Waker(self._sock)
            waker.follows = False
            waker.wake()
            socketlib.close(self._sock.detach())
        forget(connections, self)

    def held(self) -> list[socketlib.socket]:
        """Return the sockets that stand on the connection's descriptor."""
        return [self._sock] if self._lent is None else [self._lent[0]]

    async def aclose(self) -> None:
        """Close the socket; idempotent. Raises nothing.

        Tasks that wait for the socket get `trio.ClosedResourceError`.

        Cancellation: it is closed all the same.
        """
        self.close_now()
        await checkpoint()

    async def close(self) -> None:
        """`socket.socket.close`, awaited: the ported name of `aclose`.

        Raises, and is cancelled, as `aclose`.
        """
        await self.aclose()


class DatagramSocket(_PlainNames):
    """The sending side of a datagram server's socket: the second half of a request.

    `socketserver` hands out the server's socket itself. Here handlers run side by side, so
    they get an object on which many may reply at once, and on which a Unix peer that does
    not read delays its own reply only. (Unless that peer has connected its socket to the
    server's: then Linux charges what it has not read to the server's send buffer, and all
    replies wait for it, for as long as ``request_timeout`` lets them.) Receiving is the
    server's business.

    Args:
        sock: the server's bound, non-blocking datagram socket, which the server closes.
    """

    __slots__ = ("__weakref__", "_turn")

    def __init__(self, sock: socketlib.socket) -> None:
        self._sock = sock
        self._turn = trio.Lock()

    async def sendto(self, data: Buffer, *flags_and_address: Any) -> int:
        """`socket.socket.sendto`, awaited: ``sendto(data, address)``.

        Args:
            data: one datagram.
            *flags_and_address: the address, or flags and the address.

        Returns:
            The number of bytes sent.

        Raises:
            ConnectionBroken: the peer cannot be replied to: it has no address (a Unix
                client that did not bind), its socket is gone, or no way leads there.
            OSError: anything else that the system says, for example that the datagram is
                too long.
            trio.ClosedResourceError: the server has closed the socket.

        Cancellation: a cancelled call has sent nothing.
        """
        await checkpoint_if_cancelled()
        delay = UNIX_BACK_OFF_FIRST
        while (sent := self._sendto(data, *flags_and_address)) is None:
            if self._sock.family == getattr(socketlib, "AF_UNIX", None):
                await trio.sleep(delay)
                delay = min(delay * 2, UNIX_BACK_OFF_LIMIT)
            else:
                async with self._turn:
                    if self._sock.fileno() != -1:
                        await wait_writable(self._sock)
        await cancel_shielded_checkpoint()
        return sent

    def sendto_now(self, data: Buffer, address: Address) -> bool:
        """Send a datagram if that does not block. No checkpoint; raises as `sendto` does.

        Returns:
            Whether it was sent.
        """
        return self._sendto(data, address) is not None

    def _sendto(self, data: Buffer, *args: Any) -> int | None:
        if args and not args[-1]:
            raise ConnectionBroken(
                errno.EDESTADDRREQ, "the sender has no address to reply to"
            )
        try:
            return self._sock.sendto(data, *args)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in UNREACHABLE:
                raise connection_broken(error) from error
            if self._sock.fileno() == -1:
                raise trio.ClosedResourceError("the server has closed") from error
            raise
