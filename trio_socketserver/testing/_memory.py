"""A handler on a connection, or a datagram, that exists in memory only."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import memory_stream_pair

from .._server import Handler
from .._sockets import Buffer
from ._memory_requests import Attendance, entered, server_for
from ._memory_sockets import (
    CLIENT_ADDRESS,
    MemoryClient,
    MemoryDatagramSocket,
    MemorySocket,
)


@asynccontextmanager
async def memory_connection(
    handler: Handler, *, server: Any = None, client_address: Any = CLIENT_ADDRESS
) -> AsyncGenerator[MemoryClient]:
    r"""Have a handler at work on a connection in memory for the length of the block.

    ::

        async with memory_connection(Echo) as client:
            await client.send_all(b"hello\n")
            assert await client.rfile.readline() == b"hello\n"

    No socket is made, and nothing waits for a kernel: with `trio.testing.MockClock` time
    limits take no time. The handler's request has the methods of `StreamSocket`, except
    those that need a descriptor.

    When the block is left the client's end is closed, and the handler is waited for. If it
    still wants to write, that is no error, unless the block itself has closed the client.

    Args:
        handler: a handler class, or a coroutine function.
        server: what the handler gets as its server. None makes a small one: a `BaseServer`
            that listens nowhere. A `BaseServer` is entered, unless it has been, and handles
            the request as one that it has accepted, by its hooks ``verify_request()``,
            ``finish_request()``, ``handle_error()`` and ``shutdown_request()``. (Make it
            with ``bind_and_activate=False``.) Its ``ssl_context`` is not used. Anything
            else is only handed to the handler.
        client_address: what the handler gets as its client's address.

    Yields:
        The client's end; its ``server`` is what the handler got.

    Raises:
        TypeError: the handler is a blocking one, or the server handles requests in
            processes, or serves datagrams.
        RuntimeError: the server has another handler in memory at the moment.
        BaseException: what the handler raises, bare, the faults of a peer included; the
            block is cancelled. What the block raises leaves it unchanged, and cancels the
            handler. If both fail, the two leave as a group.

    Cancellation: cancels the handler, and waits for its ``finish()``.
    """
    home = server_for(handler, server, datagram=False)
    ours, theirs = memory_stream_pair()
    seen = home if server is None else server
    client = MemoryClient(theirs, seen, client_address)
    request = MemorySocket(ours, client_address)
    attendance = Attendance(home, request, client_address)
    async with entered(home, handler), attendance.surrounding():
        try:
            yield client
            attendance.is_alone = not client.is_closed
        finally:
            client.close()


async def converse(
    handler: Handler,
    data: Buffer,
    *,
    server: Any = None,
    client_address: Any = CLIENT_ADDRESS,
) -> bytes:
    r"""Give *data* and the end of the stream to a handler; return all that it writes.

    ::

        assert await converse(Upper, b"one\ntwo\n") == b"ONE\nTWO\n"

    Args:
        handler: see `memory_connection`.
        data: what the client sends.
        server: see `memory_connection`; whoever has entered it closes it.
        client_address: see `memory_connection`.

    Returns:
        What the handler has written, when it has ended. That it did not read everything is
        no error.

    Raises:
        BaseException: what the handler raises.

    Cancellation: cancels the handler, and waits for its ``finish()``.
    """
    async with memory_connection(
        handler, server=server, client_address=client_address
    ) as client:
        with contextlib.suppress(trio.BrokenResourceError):
            await client.send_all(data)
            await client.send_eof()
        return await client.rfile.read()


async def datagram_replies(
    handler: Handler,
    data: bytes,
    *,
    server: Any = None,
    client_address: Any = CLIENT_ADDRESS,
) -> list[tuple[bytes, Any]]:
    """Give one datagram to a handler; return what it sends.

    ::

        assert await datagram_replies(Upper, b"hello") == [(b"HELLO", ("192.0.2.2", 40000))]

    Args:
        handler: see `memory_connection`. Its request is the pair of *data* and a
            `DatagramSocket`.
        data: the datagram.
        server: see `memory_connection`; whoever has entered it closes it.
        client_address: what the handler gets as its client's address.

    Returns:
        A pair of datagram and address for each one sent, in order, when the handler has
        ended.

    Raises:
        BaseException: what the handler raises.

    Cancellation: cancels the handler, and waits for its ``finish()``.
    """
    home = server_for(handler, server, datagram=True)
    replies = MemoryDatagramSocket()
    async with (
        entered(home, handler),
        Attendance(home, (data, replies), client_address).surrounding(),
    ):
        pass
    return replies.sent
