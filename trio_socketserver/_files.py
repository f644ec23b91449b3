"""``rfile`` and ``wfile``: the file objects of a stream handler, awaited.

The reader keeps what it has received but not handed out in one buffer. Its methods ask the
stream for more only when they must, and take nothing out before the answer is complete, so
neither a cancellation nor an error loses a byte. A chunk that comes into an empty buffer
and is just the answer, as a line or a block usually is, is handed out as it came.

They work over any `trio.abc.Stream`. A `StreamSocket` bounds its waits itself and can be
interrupted when the server drains; other streams are wrapped in scopes for the same.
"""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator, Awaitable, Iterable
from typing import Final

import trio
from trio.lowlevel import checkpoint, checkpoint_if_cancelled

from ._draining import Drain, Drained
from ._exceptions import IncompleteRead, LineTooLong, RequestTimeout
from ._sockets import RECEIVE_SIZE, Buffer, StreamSocket

MAX_LINE_SIZE: Final = 1024 * 1024
"""Bytes in a line at most, unless the handler says otherwise.

socketserver has no limit. http.server takes 64 KiB per header line; 1 MiB leaves room for
line-based protocols with data in the line, and 1,000 such peers still fit in memory.
"""

WRITE_BUFFER_SIZE: Final = 8192
"""Bytes that a buffered ``wfile`` collects when ``wbufsize`` is negative, as in `io`."""

LINES_IN_A_ROW: Final = 16
"""Lines that iteration hands out, at most, before it lets other tasks run.

Each of them is a point of cancellation, but a line that is here already costs no trip
through the scheduler unless it is the 16th: a handler that answers makes that trip when it
writes. This is a sixth of a ping-pong. 16 lines of work bound what others wait.
"""

DRAIN_GLANCE: Final = 0.05
"""Seconds that a draining stream which cannot be asked what it holds is given to say so."""


def _writable(buffer: bytearray | memoryview) -> memoryview:
    """Return a view of bytes; refuse a constant one before anything is read for it."""
    view = memoryview(buffer).cast("B")
    if view.readonly:
        raise TypeError("the buffer to read into must be writable")
    return view


def _ends_first_with(chunk: bytes, separator: bytes) -> bool:
    """Tell whether *chunk* holds *separator* at its end and nowhere before."""
    return 0 <= chunk.find(separator) == len(chunk) - len(separator)


class _BoundedStream:
    """A stream that is not a `StreamSocket`, with the same bounds on its waits."""

    __slots__ = ("_stream", "_timeout")

    def __init__(self, stream: trio.abc.Stream, timeout: float | None) -> None:
        self._stream = stream
        self._timeout = math.inf if timeout is None else timeout

    async def receive_some(self, max_bytes: int) -> bytes:
        with trio.move_on_after(self._timeout):
            return bytes(await self._stream.receive_some(max_bytes))
        raise RequestTimeout(f"the peer sent nothing for {self._timeout:g} s")

    async def receive_idle(self, max_bytes: int, drain: Drain, *, served: bool) -> bytes:
        if not drain.event.is_set():
            wait = _ScopedWait()
            drain.waiting.add(wait)
            try:
                with wait.scope:
                    return await self.receive_some(max_bytes)
            finally:
                drain.waiting.discard(wait)
        glance = trio.current_time() + DRAIN_GLANCE
        with trio.move_on_at(max(drain.deadline(served=served), glance)):
            return await self.receive_some(max_bytes)
        raise Drained

    async def send_all(self, data: Buffer) -> None:
        with trio.move_on_after(self._timeout) as scope:
            await self._stream.send_all(data)
        if scope.cancelled_caught:
            raise RequestTimeout(f"the peer took nothing for {self._timeout:g} s")


class _ScopedWait:
    """An idle wait that is interrupted by cancelling its scope."""

    __slots__ = ("scope",)

    def __init__(self) -> None:
        self.scope = trio.CancelScope()

    def interrupt(self) -> None:
        self.scope.cancel()


def _bounded(
    stream: trio.abc.Stream, timeout: float | None
) -> StreamSocket | _BoundedStream:
    return stream if isinstance(stream, StreamSocket) else _BoundedStream(stream, timeout)


class StreamReader:
    """``rfile``: the methods of `io.BufferedReader`, awaited, over a stream.

    What `io.BufferedReader` has not: iteration asks for the next *request line* and ends
    when the server drains; `readexactly` and `readuntil`; a bound on the length of a line.

    Every method may wait for the peer, and raises what the stream's ``receive_some`` raises
    (`ConnectionBroken`, `RequestTimeout`).

    Cancellation: nothing has been taken. What has arrived stays in the buffer, for the next
    call. (`readlines` loses the lines that it has read.)

    Args:
        stream: where the bytes come from. Closing it is not the reader's business.
        buffer_size: bytes to ask the stream for at a time. Negative means 64 KiB; 0 means
            never to read ahead, so that the stream can be handed on after any call (lines
            are then received byte by byte, as from an unbuffered file).
        max_line_size: the longest line, in bytes with its end.
        timeout: seconds that each wait may take, for streams that are not a
            `StreamSocket` (which has a timeout of its own).
        drain: the server's draining, which ends iteration; None to iterate to the end.
    """

    __slots__ = ("_buffer", "_drain", "_limit", "_row", "_served", "_size", "_stream")

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        buffer_size: int = -1,
        max_line_size: int = MAX_LINE_SIZE,
        timeout: float | None = None,
        drain: Drain | None = None,
    ) -> None:
        self._stream = _bounded(stream, timeout)
        self._size = RECEIVE_SIZE if buffer_size < 0 else buffer_size
        self._limit = max_line_size
        self._drain = drain
        self._buffer = bytearray()
        self._served = False
        self._row = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    # -- the buffer ------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        """Hand out up to *size* buffered bytes."""
        if size >= len(self._buffer):
            taken = bytes(self._buffer)
            self._buffer.clear()
        else:
            taken = bytes(self._buffer[:size])
            del self._buffer[:size]
        return taken

    def _receive(self, wanted: int, *, idle: bool = False) -> Awaitable[bytes]:
        """Receive one chunk, which the caller puts into the buffer or hands out.

        Args:
            wanted: bytes that are missing; an unbuffered reader asks for no more.
            idle: whether the wait may end because the server drains.
        """
        size = max(self._size, wanted) if self._size else wanted
        if idle and self._drain is not None:
            # A line that has begun is waited for like a first one.
            served = self._served and not self._buffer
            return self._stream.receive_idle(size, self._drain, served=served)
        return self._stream.receive_some(size)

    # -- reading by size -------------------------------------------------------------

    async def _gather(self, size: int) -> bytes:
        """Take *size* bytes, or what there is at the end of the stream."""
        buffer = self._buffer
        if len(buffer) >= size:
            await checkpoint()
            return self._take(size)
        while (missing := size - len(buffer)) > 0:
            chunk = await self._receive(min(missing, RECEIVE_SIZE))
            if not chunk:
                break
            if len(chunk) == size and not buffer:
                return chunk
            buffer += chunk
        return self._take(size)

    async def read(self, size: int | None = -1) -> bytes:
        """Read *size* bytes, or fewer if the stream ends before.

        Args:
            size: how many bytes. Negative or None reads to the end of the stream
                **without any bound**: a peer can fill the memory.
        """
        return await self._gather(sys.maxsize if size is None or size < 0 else size)

    async def read1(self, size: int = -1) -> bytes:
        """Read up to *size* bytes with at most one call to the stream.

        Args:
            size: how many bytes at most; negative for whatever there is.
        """
        if size < 0:
            size = RECEIVE_SIZE
        if self._buffer or not size:
            await checkpoint()
            return self._take(size)
        chunk = await self._receive(size)
        if len(chunk) <= size:
            return chunk
        self._buffer += chunk
        return self._take(size)

    async def readinto(self, buffer: bytearray | memoryview) -> int:
        """Fill *buffer*, or as much of it as the stream still gives.

        Returns:
            The number of bytes written to it.

        Raises:
            TypeError: it cannot be written to.
        """
        with _writable(buffer) as view:
            data = await self._gather(len(view))
            view[: len(data)] = data
        return len(data)

    async def readinto1(self, buffer: bytearray | memoryview) -> int:
        """Read into *buffer* with at most one call to the stream.

        Returns:
            The number of bytes written to it.

        Raises:
            TypeError: it cannot be written to.
        """
        with _writable(buffer) as view:
            data = await self.read1(len(view))
            view[: len(data)] = data
        return len(data)

    async def readexactly(self, size: int) -> bytes:
        """Read exactly *size* bytes.

        Raises:
            IncompleteRead: the stream ended before; ``partial`` holds what came.
            ValueError: *size* is negative.
        """
        if size < 0:
            raise ValueError("readexactly() needs a size that is not negative")
        data = await self._gather(size)
        if len(data) < size:
            raise IncompleteRead(
                f"the stream ended after {len(data)} of {size} bytes", data
            )
        return data

    async def peek(self, size: int = 0) -> bytes:
        """Return what is buffered, without taking it.

        Args:
            size: ignored, as by `io.BufferedReader`; if nothing is buffered, one chunk is
                received first. An unbuffered reader receives one byte.
        """
        if self._buffer:
            await checkpoint()
        else:
            self._buffer += await self._receive(1)
        return bytes(self._buffer)

    # -- reading by line -------------------------------------------------------------

    async def _until(
        self, separator: bytes, limit: int, *, strict: bool, idle: bool = False
    ) -> bytes:
        """Take everything up to and with *separator*, or what there is at the end.

        Args:
            separator: what to look for.
            limit: bytes to look through.
            strict: whether the lack of a separator within them is an error; if not, they
                are returned.
            idle: see `_receive`.
        """
        buffer = self._buffer
        received = False
        searched = 0
        while (start := buffer.find(separator, searched)) < 0 and len(buffer) < limit:
            if received and idle:
                # receive_idle() leaves checkpoints to us; a line in many pieces needs some.
                await checkpoint()
            chunk = await self._receive(1, idle=idle)
            received = True
            if not buffer and len(chunk) <= limit and _ends_first_with(chunk, separator):
                return chunk
            if not chunk:
                return self._take(len(buffer))
            searched = max(0, len(buffer) - len(separator) + 1)
            buffer += chunk
        if not received and not idle:
            await checkpoint()
        end = start + len(separator)
        if start < 0 or end > limit:
            if strict:
                raise LineTooLong(f"no end of line within {limit} bytes")
            end = limit
        return self._take(end)

    async def readline(self, size: int | None = -1) -> bytes:
        """Read one line, with its end; at the end of the stream, what is left.

        Args:
            size: return no more than so many bytes, and a part of a line rather than an
                error. Negative or None for a whole line.

        Raises:
            LineTooLong: no line end within ``max_line_size`` bytes. Nothing is consumed.
        """
        if size is None or size < 0:
            line = await self._until(b"\n", self._limit, strict=True)
        else:
            line = await self._until(b"\n", size, strict=False)
        self._served = self._served or bool(line)
        return line

    async def readlines(self, hint: int | None = -1) -> list[bytes]:
        """Read lines to the end of the stream; **unbounded** unless *hint* says otherwise.

        Args:
            hint: stop after the line with which more bytes than that have been read.

        Raises as `readline` does.

        Cancellation: the lines that have been read are lost.
        """
        bound = math.inf if hint is None or hint <= 0 else hint
        lines = []
        total = 0
        while total <= bound and (line := await self.readline()):
            lines.append(line)
            total += len(line)
        return lines

    async def readuntil(self, separator: bytes = b"\n") -> bytes:
        """Read up to and including *separator*.

        Args:
            separator: one byte or several.

        Raises:
            IncompleteRead: the stream ended before; ``partial`` holds what came.
            LineTooLong: no separator within ``max_line_size`` bytes. Nothing is consumed.
            ValueError: *separator* is empty.
        """
        if not separator:
            raise ValueError("readuntil() needs a separator")
        data = await self._until(separator, self._limit, strict=True)
        if not data.endswith(separator):
            raise IncompleteRead(
                f"the stream ended before {separator!r}, after {len(data)} bytes", data
            )
        self._served = True
        return data

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        """Return the next request line; end with the stream, or when the server drains."""
        self._row += 1
        if self._row >= LINES_IN_A_ROW:
            self._row = 0
            await checkpoint()
        else:
            await checkpoint_if_cancelled()
        try:
            if not self._buffer:
                # What _until() would do, with fewer calls: a twelfth of a ping-pong.
                line = await (
                    self._receive(1)
                    if self._drain is None
                    else self._stream.receive_idle(
                        self._size or 1, self._drain, served=self._served
                    )
                )
                if 0 <= line.find(b"\n") == len(line) - 1 < self._limit:
                    self._served = True
                    return line
                if not line:
                    raise StopAsyncIteration
                self._buffer += line
            line = await self._until(b"\n", self._limit, strict=True, idle=True)
        except Drained:
            raise StopAsyncIteration from None
        self._served = True
        return line


class StreamWriter:
    """``wfile``: the methods of a binary file open for writing, awaited, over a stream.

    Every method that writes raises what the stream's ``send_all`` raises
    (`ConnectionBroken`, `RequestTimeout`).

    Cancellation: nothing, a part, or all may have been sent. What has only been collected
    is still sent by the next `flush`.

    Args:
        stream: where the bytes go. Closing it is not the writer's business.
        buffer_size: bytes to collect before sending; 0 sends each write at once, negative
            means 8 KiB.
        timeout: as for `StreamReader`.
    """

    __slots__ = ("_pending", "_size", "_stream")

    def __init__(
        self,
        stream: trio.abc.Stream,
        *,
        buffer_size: int = 0,
        timeout: float | None = None,
    ) -> None:
        self._stream = _bounded(stream, timeout)
        self._size = WRITE_BUFFER_SIZE if buffer_size < 0 else buffer_size
        self._pending = bytearray()

    def writable(self) -> bool:
        """Return True."""
        return True

    @property
    def pending(self) -> int:
        """How many bytes `flush` would send."""
        return len(self._pending)

    async def write(self, data: Buffer) -> int:
        """Write all of *data*.

        Returns:
            Its length in bytes.
        """
        if not self._size:
            await self._stream.send_all(data)
            return len(data) if isinstance(data, bytes) else memoryview(data).nbytes
        size = memoryview(data).nbytes
        self._pending += data
        if len(self._pending) >= self._size:
            await self.flush()
        else:
            await checkpoint()
        return size

    async def writelines(self, lines: Iterable[Buffer]) -> None:
        """Write each of *lines*, in one piece; no line ends are added."""
        await self.write(b"".join(lines))

    async def flush(self) -> None:
        """Send what has been collected.

        What a flush held that has failed, or was cancelled, is dropped.
        """
        if not self._pending:
            await checkpoint()
            return
        data, self._pending = self._pending, bytearray()
        await self._stream.send_all(data)
