"""The two ends of a connection in memory, and what a datagram handler replies on.

The client's end is a stream, with the two files that a handler has. The handler's end
answers to the names that `StreamSocket` has, and fails as that one does.
"""

from __future__ import annotations

import io
import math
import socket as socketlib
from collections.abc import Awaitable
from typing import Any, Final, TypeAlias

import trio
from trio.testing import MemoryReceiveStream, MemorySendStream

from .._exceptions import ConnectionBroken, RequestTimeout
from .._files import StreamReader, StreamWriter
from .._sockets import CLOSED, RECEIVE_SIZE, Address, Buffer, DatagramSocket

MemoryStream: TypeAlias = trio.StapledStream[MemorySendStream, MemoryReceiveStream]

SERVER_ADDRESS: Final = ("192.0.2.1", 9999)
CLIENT_ADDRESS: Final = ("192.0.2.2", 40000)
"""Addresses of the block that RFC 5737 keeps for documentation: nobody's."""


def close_now(stream: MemoryStream) -> None:
    """Close both directions of a stream in memory, without a checkpoint."""
    stream.send_stream.close()
    stream.receive_stream.close()


class MemoryClient(trio.abc.HalfCloseableStream):
    """The client's end of a `memory_connection`.

    It is a stream; and it has the two files that a handler has, with the same methods. What
    ``rfile`` has read ahead, ``receive_some()`` does not see: use one of them. The end of
    the `memory_connection` closes it, and so may the test.

    Each method is a checkpoint, but for `close`. Cancellation: what has not been received
    can be received later, and what has not been sent never will be; `aclose` closes anyway.

    Attributes:
        rfile: a reader, as in `StreamRequestHandler`.
        wfile: a writer without a buffer.
        server: the server that the handler sees.
        client_address: the address that the handler sees.
        is_closed: whether this end has been closed.
    """

    def __init__(self, stream: MemoryStream, server: Any, client_address: Any) -> None:
        self._stream = stream
        self.server = server
        self.client_address = client_address
        self.is_closed: bool = False
        self.rfile: StreamReader = StreamReader(self)
        self.wfile: StreamWriter = StreamWriter(self)

    async def send_all(self, data: Buffer) -> None:
        """Send *data*; there is always room for it.

        Raises:
            trio.BrokenResourceError: the handler's end has been closed.
            trio.ClosedResourceError: this end has, or `send_eof` has been called.
            trio.BusyResourceError: another task is sending.

        Cancellation: nothing has been sent.
        """
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Return at the next checkpoint. Raises, and is cancelled, as `send_all`."""
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        """Tell the handler that nothing more will be sent; receiving goes on.

        Raises:
            trio.ClosedResourceError: this end has been closed.

        Cancellation: nothing has been told.
        """
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive what the handler has written, or wait for something.

        Returns:
            The bytes; ``b""`` when the handler has finished sending.

        Raises:
            trio.ClosedResourceError: this end has been closed.
            trio.BusyResourceError: another task is receiving.

        Cancellation: nothing has been taken.
        """
        return bytes(await self._stream.receive_some(max_bytes))

    def close(self) -> None:
        """Close the connection, as a client that leaves. No checkpoint; idempotent."""
        self.is_closed = True
        close_now(self._stream)

    async def aclose(self) -> None:
        """Close the connection, then pass a checkpoint. Raises nothing.

        Cancellation: it is closed all the same.
        """
        self.close()
        await trio.lowlevel.checkpoint()


class MemorySocket(trio.abc.HalfCloseableStream):
    """The handler's end: a stream with the methods of `StreamSocket`.

    Attributes:
        is_closed: whether it has been closed.
    """

    def __init__(self, stream: MemoryStream, client_address: Address) -> None:
        self._stream = stream
        self._client_address = client_address
        self._timeout: float | None = None
        self._options: dict[tuple[int, int], Any] = {}
        self.is_closed = False

    async def _bounded(self, operation: Awaitable[Any]) -> Any:
        timeout = math.inf if self._timeout is None else self._timeout
        try:
            with trio.move_on_after(timeout):
                return await operation
        except trio.BrokenResourceError as error:
            raise ConnectionBroken(str(error)) from error
        raise RequestTimeout(f"the peer kept us waiting for {timeout:g} s")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        receiving = self._stream.receive_some(max_bytes or RECEIVE_SIZE)
        return bytes(await self._bounded(receiving))

    async def recv(self, bufsize: int, flags: int = 0) -> bytes:
        if flags:
            raise ValueError("a connection in memory knows no flags")
        return await self.receive_some(bufsize)

    async def recv_into(
        self, buffer: bytearray | memoryview, nbytes: int = 0, flags: int = 0
    ) -> int:
        with memoryview(buffer).cast("B") as view:
            data = await self.recv(nbytes or len(view), flags)
            view[: len(data)] = data
        return len(data)

    async def send_all(self, data: Buffer) -> None:
        await self._bounded(self._stream.send_all(data))

    async def sendall(self, data: Buffer, flags: int = 0) -> None:
        await self.send(data, flags)

    async def send(self, data: Buffer, flags: int = 0) -> int:
        if flags:
            raise ValueError("a connection in memory knows no flags")
        await self.send_all(data)
        return memoryview(data).nbytes

    async def wait_send_all_might_not_block(self) -> None:
        await self._bounded(self._stream.wait_send_all_might_not_block())

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def shutdown(self, how: int) -> None:
        if how != socketlib.SHUT_WR:
            self._stream.receive_stream.put_eof()
        if how != socketlib.SHUT_RD:
            await self._stream.send_eof()
        else:
            await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        self.is_closed = True
        close_now(self._stream)
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        await self.aclose()

    def settimeout(self, timeout: float | None) -> None:
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        return self._timeout

    def getpeername(self) -> Address:
        return self._client_address

    def getsockname(self) -> Address:
        return SERVER_ADDRESS

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> Any:
        return self._options.get((level, option), 0)

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self._options[level, option] = value

    def fileno(self) -> int:
        raise io.UnsupportedOperation("a connection in memory has no descriptor")


class MemoryDatagramSocket(DatagramSocket):
    """The sending side of a datagram server, which keeps what is sent.

    Attributes:
        sent: pairs of a datagram and its address, in order.
    """

    __slots__ = ("sent",)

    def __init__(self) -> None:
        super().__init__(CLOSED)
        self.sent: list[tuple[bytes, Any]] = []

    def getsockname(self) -> Address:
        return SERVER_ADDRESS

    def _sendto(self, data: Buffer, *args: Any) -> int:
        address = args[-1] if args else None
        if not address:
            super()._sendto(data, address)  # Which says so.
        self.sent.append((bytes(data), address))
        return memoryview(data).nbytes
