"""`TLSSocket`: a `StreamSocket` that speaks TLS, as a server.

It is the plain connection, with OpenSSL between its two sides: what comes is put into one
memory buffer and what is to be sent taken out of another, so OpenSSL never waits. Each
method does, without waiting, what it can; waits for the socket as the plain one does; and
tries again. The handshake is done by the first of them that needs it.

`trio.SSLStream` does the same over any stream. It is not used, because of what handlers are
promised here whatever they speak:

* a cancelled, or timed out, send leaves a connection on which ``finish()`` can still say
  goodbye: what OpenSSL has encrypted stays queued, in order, and goes first;
* ``send_eof()`` sends close_notify, and receiving goes on;
* closing sends close_notify and does not wait for the peer's;
* an idle connection can be asked, while the server drains, whether something has come;
* a peer that has ended the connection without close_notify can be answered, as if it had;
* what went wrong is told, in OpenSSL's words, and by every method after that.

Closing says by close_notify that all has been sent. So none is sent where a send was cut
short, and nobody waits for a peer there that did not read.
"""

from __future__ import annotations

import contextlib
import errno
import socket as socketlib
import ssl
from typing import Any, Final, Self

import trio
from trio.lowlevel import (
    cancel_shielded_checkpoint,
    checkpoint,
    checkpoint_if_cancelled,
)

from ._blocking_tls import describe, secure
from ._draining import Drain
from ._exceptions import ConnectionBroken, RequestTimeout, connection_broken
from ._sockets import DONTWAIT, RECEIVE_SIZE, Buffer, StreamSocket
from ._waking import Waker

HANDSHAKE_TIMEOUT: Final = 60.0
"""Seconds that a handshake may take; asyncio and nginx give it 60 too."""

ENCRYPT_SIZE: Final = 65536
"""Bytes that are encrypted at a time, and so may be queued here when a send is cut short.

Four records of TLS. What they cost to encrypt, some 50 µs, is how long others wait.
"""

RECORD_SIZE: Final = 16384 + 2048 + 5
"""Bytes that are taken from the kernel at a time: the largest record, with its header.

OpenSSL's memory never shrinks: with 64 KiB an idle connection that once received a lot
keeps 130 KiB, with this 10. And a peer may send what takes long and says nothing, such as
new keys, 27 bytes each; between two pieces of that others have their turn.
"""

ANSWERS_LIMIT: Final = 2 * ENCRYPT_SIZE
"""Bytes that may wait for a peer that sends and does not read. OpenSSL has answers too."""

BEHIND_OUR_BACK: Final = frozenset({"read", "write", "unwrap"})
"""What an `ssl.SSLObject` does without anybody who sends and receives for it."""


class TLSSocket(StreamSocket):
    """A connection that speaks TLS: a `StreamSocket` with the same methods.

    It is the ``request`` of stream servers that have an ``ssl_context``. Receiving and
    sending shake hands first, if that has not been done, for at most the server's
    ``ssl_handshake_timeout`` (`RequestTimeout`). What goes wrong with TLS raises
    `ConnectionBroken`, with OpenSSL's reason.

    The names of `ssl.SSLObject` are here too, and read as on the `ssl.SSLSocket` that a
    blocking handler gets: ``getpeercert()``, ``selected_alpn_protocol()``, ``version()``,
    ``cipher()``, ``session_reused``, and what an ``sni_callback`` has set on the object
    that it was given.

    As with `ssl.SSLSocket`, ``recv()`` and ``send()`` take no flags, and a connection that
    ends without close_notify reads as one that ends with it.
    """

    __slots__ = (
        "_broken",
        "_closing_timeout",
        "_context",
        "_decrypted",
        "_established",
        "_handshake_timeout",
        "_handshaking",
        "_incoming",
        "_is_at_end",
        "_is_cut",
        "_leaves",
        "_object",
        "_outgoing",
        "_tickets",
        "_unsent",
    )

    _context: ssl.SSLContext
    _handshake_timeout: float
    _closing_timeout: float

    @classmethod
    def secured(
        cls,
        sock: socketlib.socket,
        context: ssl.SSLContext,
        handshake_timeout: float,
        closing_timeout: float,
    ) -> Self:
        """Make one of what a listening socket has accepted.

        Args:
            sock: the connection, on which nothing has been read.
            context: the server's.
            handshake_timeout: seconds for the handshake.
            closing_timeout: seconds for a close_notify to leave.
        """
        self = cls.accepted(sock)
        self._context = context
        self._handshake_timeout = handshake_timeout
        self._closing_timeout = closing_timeout
        return self

    def _own(self, sock: socketlib.socket) -> None:
        super()._own(sock)
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object: ssl.SSLObject | None = None
        self._handshaking: trio.Lock | None = None
        self._established = False
        self._broken: str | None = None
        self._is_at_end = False
        self._leaves = False
        # What has been decrypted before it was asked for, see send_eof().
        self._decrypted = b""
        # Session tickets come after the handshake, unasked. A client that never reads
        # might be gone, and reset what it has sent; so they wait for something to go with.
        self._tickets = b""
        self._unsent = b""
        # Whether the last send was cut short, or is under way.
        self._is_cut = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in BEHIND_OUR_BACK:
            raise AttributeError(
                f"{type(self).__name__!r} object has no attribute {name!r}"
            )
        return getattr(self._engine(), name)

    def __dir__(self) -> list[str]:
        names = set(dir(self._object)) - BEHIND_OUR_BACK
        return [*super().__dir__(), *(name for name in names if not name.startswith("_"))]

    # -- OpenSSL ---------------------------------------------------------------------

    def _engine(self) -> ssl.SSLObject:
        if self._object is None:
            self._object = self._context.wrap_bio(
                self._incoming, self._outgoing, server_side=True
            )
        return self._object

    def _check(self) -> None:
        """Refuse to work on what is closed or broken."""
        if self._sock.fileno() == -1:
            raise trio.ClosedResourceError("this socket is closed")
        if self._leaves:
            raise trio.ClosedResourceError("this socket's TLS has ended")
        if self._broken is not None:
            raise ConnectionBroken(errno.EPROTO, self._broken)

    def _failure(self, error: OSError) -> trio.ClosedResourceError | ConnectionBroken:
        if self._sock.fileno() == -1:
            return trio.ClosedResourceError("this socket is closed")
        # Also where the sending side is closed: only TLS's is, until the socket is.
        broken = connection_broken(error)
        if error.errno == errno.ECONNRESET:
            self._broken = broken.strerror  # The kernel tells it once.
        return broken

    def _break(self, error: ssl.SSLError, doing: str = "TLS") -> ConnectionBroken:
        """Take note of an error of OpenSSL's, and let the peer know."""
        self._broken = describe(error, doing)
        self._flush_or_fail_quietly()
        return ConnectionBroken(errno.EPROTO, self._broken)

    def _fill_now(self) -> bool:
        """Pass on to OpenSSL what has come; tell whether that was something."""
        try:
            data = self._sock.recv(RECORD_SIZE, DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._failure(error) from error
        if data:
            self._incoming.write(data)
        else:
            # OpenSSL is not told: it would refuse to send from then on.
            self._is_at_end = True
        return True

    def _flush_now(self) -> bool:
        """Send what OpenSSL has put out, or a part; tell whether nothing is left."""
        while True:
            if self._outgoing.pending:
                self._unsent += self._tickets + self._outgoing.read()
                self._tickets = b""
            if not self._unsent:
                return True
            try:
                sent = self._sock.send(self._unsent, DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                raise self._failure(error) from error
            self._unsent = self._unsent[sent:]

    def _flush_or_fail_quietly(self) -> bool:
        """Do the same where it is not known whether the peer is still there."""
        try:
            return self._flush_now()
        except trio.BrokenResourceError:
            return True

    async def _flush(self) -> None:
        while not self._flush_now():
            await self._wait_writable()

    # -- the handshake ---------------------------------------------------------------

    async def do_handshake(self, drain: Drain | None = None) -> None:
        """Shake hands, unless that has been done. Receiving and sending do it too.

        Args:
            drain: the server's draining, which leaves a client that has not come so far
                little time.

        Raises:
            ConnectionBroken: it failed.
            RequestTimeout: it took longer than ``ssl_handshake_timeout``, or than a server
                that drains waits.

        Cancellation: the next call goes on with it.
        """
        await checkpoint_if_cancelled()
        if self._handshaking is None:
            self._handshaking = trio.Lock()
        async with self._handshaking:
            self._check()
            if not self._established:
                await self._shake_hands_within(
                    _HandshakeBounds(self._handshake_timeout, drain)
                )

    async def _shake_hands_within(self, bounds: _HandshakeBounds) -> None:
        with bounds:
            await self._shake_hands()
        if bounds.scope.cancelled_caught:
            self._broken = bounds.explanation()
            raise RequestTimeout(self._broken)

    async def _shake_hands(self) -> None:
        engine = self._engine()
        while True:
            try:
                engine.do_handshake()
                break
            except ssl.SSLWantReadError:
                await self._flush()
            except ssl.SSLError as error:
                raise self._break(error, "TLS handshake") from error
            if not self._fill_now():
                await self._wait_readable()
            elif self._is_at_end:
                self._broken = "the peer has gone in the middle of the TLS handshake"
                raise ConnectionBroken(errno.ECONNRESET, self._broken)
        if engine.version() == "TLSv1.3":
            self._tickets += self._outgoing.read()
        else:
            await self._flush()
        self._established = True

    # -- receiving -------------------------------------------------------------------

    def _read_now(self, size: int) -> bytes | None:
        """Decrypt something; return nothing at the end, None if it is time to wait."""
        if self._decrypted:
            data, self._decrypted = self._decrypted[:size], self._decrypted[size:]
            return data
        assert self._object is not None
        has_filled = False
        while True:
            try:
                return self._object.read(size)
            except ssl.SSLWantReadError:
                if self._is_at_end:
                    return b""
            except ssl.SSLZeroReturnError:
                return b""
            except ssl.SSLError as error:
                raise self._break(error) from error
            if self._outgoing.pending:
                self._flush_or_fail_quietly()  # An answer of OpenSSL's own.
                if len(self._unsent) > ANSWERS_LIMIT:
                    self._broken = "the peer does not read"
                    raise ConnectionBroken(errno.ENOBUFS, self._broken)
            if has_filled or not self._fill_now():
                return None
            has_filled = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive whatever has arrived, or wait for something.

        Args:
            max_bytes: take no more than so many bytes; 64 KiB if None.

        Returns:
            The bytes; ``b""`` when the peer has finished sending, by close_notify or not.

        Raises as `StreamSocket.receive_some` and `do_handshake` do.

        Cancellation: nothing has been taken.
        """
        if max_bytes is None:
            max_bytes = RECEIVE_SIZE
        elif max_bytes < 1:
            raise ValueError("max_bytes must be at least 1")
        return await self._receive(max_bytes)

    async def _receive(self, size: int) -> bytes:
        if not self._established:
            await self.do_handshake()
        await checkpoint_if_cancelled()
        self._check()
        waited = False
        while (data := self._read_now(size)) is None:
            await self._wait_readable()
            waited = True
        if not waited:
            await cancel_shielded_checkpoint()
        return data

    async def recv(self, bufsize: int, flags: int = 0) -> bytes:
        """`ssl.SSLSocket.recv`, awaited. Raises, and is cancelled, as `receive_some`.

        Args:
            bufsize: bytes at most.
            flags: must be 0.
        """
        if flags:
            raise ValueError("recv() takes no flags over TLS")
        if bufsize < 0:
            raise ValueError("bufsize must not be negative")
        return await self._receive(bufsize)

    async def recv_into(
        self, buffer: bytearray | memoryview, nbytes: int = 0, flags: int = 0
    ) -> int:
        """`ssl.SSLSocket.recv_into`, awaited.

        Raises, and is cancelled, as `receive_some`; and `TypeError` for a buffer that
        cannot be written to.
        """
        with memoryview(buffer).cast("B") as view:
            if view.readonly:
                raise TypeError("recv_into() needs a buffer that can be written to")
            data = await self.recv(min(nbytes or len(view), len(view)), flags)
            view[: len(data)] = data
        return len(data)

    async def receive_idle(self, max_bytes: int, drain: Drain, *, served: bool) -> bytes:
        """Receive like `receive_some`, but leave when the server drains.

        See `StreamSocket.receive_idle`.
        """
        if not self._established:
            await self.do_handshake(drain)
        self._check()
        while (data := self._read_now(max_bytes)) is None:
            await self._wait_idle(drain, served=served)
        return data

    # -- sending ---------------------------------------------------------------------

    async def send_all(self, data: Buffer) -> None:
        """Send all of *data*, waiting for the peer to take it where necessary.

        Raises as `StreamSocket.send_all` and `do_handshake` do.

        Cancellation: a part may have been sent, never all, and another be sent before what
        is sent next; each byte once, and in order.
        """
        self._start_sending()
        self._sending = True
        try:
            if not self._established:
                await self.do_handshake()
            await checkpoint_if_cancelled()
            self._check()
            # First what an earlier send has left: else each that is cut short adds to it.
            await self._flush()
            with memoryview(data).cast("B") as view:
                for start in range(0, len(view), ENCRYPT_SIZE):
                    if start:
                        await checkpoint()
                    self._is_cut = True
                    self._encrypt(view[start : start + ENCRYPT_SIZE])
                    if not self._flush_now():
                        await self._flush()
                if view:
                    self._is_cut = False
            # What has been sent as a whole is not to look like a send that was cut.
            await cancel_shielded_checkpoint()
        finally:
            self._sending = False

    def _encrypt(self, data: memoryview) -> None:
        assert self._object is not None
        with data:
            try:
                # It takes all, since memory never blocks.
                self._object.write(data)
            except ssl.SSLError as error:
                raise self._break(error) from error

    async def send(self, data: Buffer, flags: int = 0) -> int:
        """`ssl.SSLSocket.send`, awaited: send at least one byte, and say how many.

        Raises, and is cancelled, as `send_all`; and `ValueError` for flags.
        """
        if flags:
            raise ValueError("send() takes no flags over TLS")
        with memoryview(data).cast("B") as view, view[:ENCRYPT_SIZE] as part:
            await self.send_all(part)
            return len(part)

    async def send_eof(self) -> None:
        """Send close_notify: nothing more will be sent; receiving goes on.

        Raises as `send_all` does. Calling it again does nothing.

        Cancellation: close_notify may not have left. Closing sends it then.
        """
        await checkpoint()
        if self._sending:
            raise trio.BusyResourceError("another task is sending on this socket")
        if self._eof_sent and self._sock.fileno() != -1:
            return
        self._sending = True
        try:
            await self.do_handshake()
            # OpenSSL would take what it finds now for sent too late, and give up.
            while not self._is_at_end and (data := self._read_more()):
                self._decrypted += data
            self._put_close_notify()
            await self._flush()
        finally:
            self._sending = False

    def _read_more(self) -> bytes | None:
        """Decrypt what OpenSSL holds, without asking the socket for more."""
        assert self._object is not None
        try:
            return self._object.read(RECEIVE_SIZE)
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            return None
        except ssl.SSLError as error:
            raise self._break(error) from error

    def _put_close_notify(self) -> None:
        assert self._object is not None
        self._eof_sent = True
        # It has put out close_notify, and looks for the peer's, for which we do not wait.
        with contextlib.suppress(ssl.SSLError):
            self._object.unwrap()

    async def shutdown(self, how: int) -> None:
        """`socket.socket.shutdown`, awaited, with close_notify where sending ends.

        Args:
            how: ``socket.SHUT_WR`` does what `send_eof` does; ``SHUT_RDWR`` ends the
                connection; after ``SHUT_RD`` nothing more is received.

        Raises, and is cancelled, as `send_eof`.
        """
        if how == socketlib.SHUT_WR:
            await self.send_eof()
            return
        if how == socketlib.SHUT_RDWR:
            await self.say_goodbye()
        await super().shutdown(how)

    # -- lending ---------------------------------------------------------------------

    def lend(self) -> tuple[socketlib.socket, Waker]:
        """Give the connection, as an `ssl.SSLSocket`, and what wakes it, to a thread.

        The thread shakes hands. No checkpoint.

        Raises:
            RuntimeError: hands have been shaken here.
            ConnectionBroken: the peer has gone.
            trio.ClosedResourceError: it has been closed.
        """
        self._check()
        if self._handshaking is not None:
            raise RuntimeError(
                "a blocking handler cannot take over a TLS connection that has been used "
                "asynchronously"
            )
        self._leaves = True
        self._sock = secure(self._sock, self._context)
        return super().lend()

    def leave(self) -> None:
        """Leave TLS to a child process: nothing is encrypted here any more.

        Two that encrypt with one state would give its secrets away.
        """
        self._leaves = True

    @property
    def handshake_timeout(self) -> float:
        """Seconds for the handshake."""
        return self._handshake_timeout

    @property
    def closing_timeout(self) -> float:
        """Seconds for a close_notify to leave."""
        return self._closing_timeout

    # -- closing ---------------------------------------------------------------------

    def say_goodbye_now(self) -> bool:
        """Send close_notify if there is a TLS connection to end. No checkpoint.

        Returns:
            Whether nothing of it is left to be sent.
        """
        if (
            not self._established
            or self._leaves
            or self._broken is not None
            or self._sending
            or self._sock.fileno() == -1
        ):
            return True
        if not self._eof_sent:
            if self._is_cut:
                return True
            self._put_close_notify()
        return self._flush_or_fail_quietly()

    async def say_goodbye(self) -> None:
        """Send close_notify, if the peer takes it in time; its own is not waited for.

        No checkpoint if it can be sent at once.
        """
        with (
            # Two tasks may be closing.
            contextlib.suppress(
                RequestTimeout, trio.BusyResourceError, trio.ClosedResourceError
            ),
            trio.move_on_after(self._closing_timeout),
        ):
            while not self.say_goodbye_now():
                await self._wait_writable()

    def shutdown_now(self) -> None:
        """End the sending side, with close_notify if that leaves at once."""
        self.say_goodbye_now()
        super().shutdown_now()

    def close_now(self) -> None:
        """Close without a checkpoint, with close_notify if that leaves at once."""
        self.say_goodbye_now()
        if self._eof_sent:
            # The peer's close_notify may be here too. Closed with it unread, the kernel
            # would drop what the peer has not received.
            with contextlib.suppress(OSError):
                self._sock.recv(RECORD_SIZE, DONTWAIT)
        super().close_now()

    async def aclose(self) -> None:
        """Send close_notify and close the socket; idempotent. Raises nothing.

        It is waited for until the peer has room for it, for at most the server's
        ``cleanup_timeout``, and not for the peer's answer.

        Cancellation: the socket is closed all the same, at once.
        """
        try:
            await self.say_goodbye()
        finally:
            self.close_now()
        await checkpoint()


class _HandshakeBounds:
    """The time that a handshake may take, which may become shorter."""

    def __init__(self, timeout: float, drain: Drain | None) -> None:
        self._timeout = timeout
        self._drain = drain
        self.scope = trio.CancelScope()

    def __enter__(self) -> None:
        self.scope.deadline = trio.current_time() + self._timeout
        if self._drain is not None:
            self._drain.waiting.add(self)
            self.interrupt()
        self.scope.__enter__()

    def __exit__(self, *exc_info: Any) -> bool | None:
        if self._drain is not None:
            self._drain.waiting.discard(self)
        return self.scope.__exit__(*exc_info)

    def interrupt(self) -> None:
        """Take note that the server drains."""
        assert self._drain is not None
        deadline = self._drain.deadline(served=False)
        self.scope.deadline = min(self.scope.deadline, deadline)

    def explanation(self) -> str:
        if self._drain is not None and self._drain.event.is_set():
            return "the server closed before the TLS handshake was done"
        return f"the TLS handshake took longer than {self._timeout:g} s"
