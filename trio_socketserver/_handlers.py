"""Request handlers: the three base classes, and how one is run.

A handler's life is setup → handle → finish. `run_handler` is that life, once, for whoever
runs one: ``finish()`` runs if and only if ``setup()`` has returned, in a shield so that a
cancelled handler can still say goodbye, and for a bounded time so that it cannot hold up
whoever cancels it.
"""

from __future__ import annotations

import enum
import inspect
import socket
from io import BytesIO
from typing import Any, ClassVar

import trio

from . import _files
from ._colour import check_colours, innermost, is_asynchronous
from ._draining import Drain
from ._exceptions import RequestTimeout, is_peer_fault
from ._log import log_error
from ._sockets import DatagramSocket, StreamSocket

__all__ = ["BaseRequestHandler", "DatagramRequestHandler", "StreamRequestHandler"]

PHASES = ("setup", "handle", "finish")


class BaseRequestHandler:
    """The base of asynchronous handlers: one instance handles one request.

    As in `socketserver`, override ``handle()`` and, where needed, ``setup()`` and
    ``finish()``. Two things differ. The three methods are ``async def``; a subclass that
    forgets one is refused when it is created. And the constructor only stores its
    arguments: the server awaits the three methods afterwards, since a constructor cannot
    wait for anything.

    Args:
        request: the connection, a `StreamSocket`; of a datagram server, the pair of the
            datagram's bytes and a `DatagramSocket`. The server closes it afterwards.
        client_address: where the request came from.
        server: the server. (Annotate the attribute with your server class.)

    Attributes:
        request: as given.
        client_address: as given.
        server: as given.
    """

    request: Any
    client_address: Any
    server: Any

    _handled = False
    """Whether ``handle()`` has returned normally, for ``finish()`` to look at."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_colours(cls, coroutines=PHASES, plain=())

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        self.request = request
        self.client_address = client_address
        self.server = server

    async def setup(self) -> None:
        """Prepare; called before ``handle()``. Does nothing, without a checkpoint."""

    async def handle(self) -> None:
        """Serve the request. Does nothing, without a checkpoint."""

    async def finish(self) -> None:
        """Clean up; called after ``handle()`` if ``setup()`` succeeded.

        Unlike in `socketserver` it runs shielded from cancellation, for at most the
        server's ``cleanup_timeout`` seconds. Does nothing, without a checkpoint.
        """

    def _finish_now(self) -> bool:
        """Do what ``finish()`` would do, if it is known not to wait.

        It spares the request a shielded scope: a tenth of what a short connection costs,
        and a quarter of a datagram.

        Returns:
            Whether it is done. If not, ``finish()`` is called.
        """
        return self._finishes_as(BaseRequestHandler)

    def _finishes_as(self, base: type[BaseRequestHandler]) -> bool:
        return getattr(self.finish, "__func__", None) is base.finish


class StreamRequestHandler(BaseRequestHandler):
    """A handler with ``rfile`` and ``wfile`` over the connection.

    The attributes are those of `socketserver.StreamRequestHandler`; the methods of the two
    files are awaited. See `StreamReader` and `StreamWriter`.

    Attributes:
        connection: the request, any `trio.abc.Stream`.
        rfile: the reader.
        wfile: the writer, flushed by ``finish()``.
    """

    rbufsize: ClassVar[int] = -1
    """Bytes that ``rfile`` reads ahead. -1 means 64 KiB, 0 none."""

    wbufsize: ClassVar[int] = 0
    """Bytes that ``wfile`` collects before it sends. 0 means none, -1 8 KiB."""

    timeout: ClassVar[float | None] = None
    """Seconds that each single wait for the peer may take (`RequestTimeout`)."""

    disable_nagle_algorithm: ClassVar[bool] = False
    """Whether to set ``TCP_NODELAY``."""

    max_line_size: ClassVar[int] = _files.MAX_LINE_SIZE
    """Bytes in a line of ``rfile`` at most (`LineTooLong`); socketserver has no limit."""

    connection: Any
    rfile: _files.StreamReader
    wfile: _files.StreamWriter

    async def setup(self) -> None:
        """Make ``rfile`` and ``wfile``. No checkpoint: nothing here waits."""
        self.connection = self.request
        if self.timeout is not None and hasattr(self.connection, "settimeout"):
            self.connection.settimeout(self.timeout)
        if self.disable_nagle_algorithm and _has_nagle(self.connection):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        drain = getattr(self.server, "_drain", None)
        self.rfile = _files.StreamReader(
            self.connection,
            buffer_size=self.rbufsize,
            max_line_size=self.max_line_size,
            timeout=self.timeout,
            drain=drain if isinstance(drain, Drain) else None,
        )
        self.wfile = _files.StreamWriter(
            self.connection, buffer_size=self.wbufsize, timeout=self.timeout
        )

    async def finish(self) -> None:
        """Flush ``wfile``. No checkpoint if it holds nothing.

        Raises, and is cancelled, as `StreamWriter.flush`; but servers shield it.
        """
        if self._may_hold_something():
            await self.wfile.flush()

    def _finish_now(self) -> bool:
        """Do what ``finish()`` would do, if ``wfile`` holds nothing."""
        return self._finishes_as(StreamRequestHandler) and not self._may_hold_something()

    def _may_hold_something(self) -> bool:
        # A setup() of the user's may have put another writer there, or have made none.
        wfile = getattr(self, "wfile", None)
        return wfile is not None and getattr(wfile, "pending", True)


class DatagramRequestHandler(BaseRequestHandler):
    """A handler with the datagram in ``rfile`` and the reply in ``wfile``.

    As in `socketserver` both are `io.BytesIO`, so nothing about them is awaited. Unlike
    there, a reply is sent only if ``handle()`` returned normally and wrote something; an
    empty or half-made datagram is no answer.

    Attributes:
        packet: the datagram's bytes.
        socket: the `DatagramSocket` to reply on.
    """

    packet: bytes
    socket: DatagramSocket
    rfile: BytesIO
    wfile: BytesIO

    async def setup(self) -> None:
        """Make ``rfile`` and ``wfile``. No checkpoint: nothing here waits."""
        self.packet, self.socket = self.request
        self.rfile = BytesIO(self.packet)
        self.wfile = BytesIO()

    async def finish(self) -> None:
        """Send the reply, if there is one.

        Raises, and is cancelled, as `DatagramSocket.sendto`; but servers shield it.
        """
        if self._handled and (reply := self.wfile.getvalue()):
            await self.socket.sendto(reply, self.client_address)

    def _finish_now(self) -> bool:
        """Do what ``finish()`` would do, if the reply can be sent at once."""
        if not self._finishes_as(DatagramRequestHandler):
            return False
        reply = self.wfile.getvalue() if self._handled else b""
        return not reply or self.socket.sendto_now(reply, self.client_address)


def _has_nagle(connection: Any) -> bool:
    return isinstance(connection, StreamSocket) and (
        connection.socket.family != getattr(socket, "AF_UNIX", None)
    )


class HandlerKind(enum.Enum):
    """What a ``RequestHandlerClass`` is, and so how it is run."""

    ASYNC_CLASS = enum.auto()
    ASYNC_FUNCTION = enum.auto()
    BLOCKING = enum.auto()


def handler_kind(candidate: Any) -> HandlerKind:
    """Judge the colour of a handler by what it wraps.

    Raises:
        TypeError: it cannot be called; or it is an async generator, or a class that is no
            `BaseRequestHandler` but has asynchronous phases, which nothing would run.
    """
    if is_asynchronous(candidate):
        return HandlerKind.ASYNC_FUNCTION
    wrapped = innermost(candidate)
    if inspect.isasyncgenfunction(wrapped):
        raise TypeError(
            f"{wrapped.__qualname__} is an async generator, which nothing would run: "
            "do not 'yield' in a handler"
        )
    if inspect.isclass(wrapped):
        if issubclass(wrapped, BaseRequestHandler):
            return HandlerKind.ASYNC_CLASS
        for phase in PHASES:
            method = getattr(wrapped, phase, None)
            if is_asynchronous(method) or inspect.isasyncgenfunction(method):
                raise TypeError(
                    f"{wrapped.__qualname__}.{phase} is 'async def', but the class is not "
                    "derived from trio_socketserver's BaseRequestHandler, "
                    "StreamRequestHandler or DatagramRequestHandler"
                )
        return HandlerKind.BLOCKING
    if not callable(candidate):
        raise TypeError(f"a handler must be callable, and {candidate!r} is not")
    return HandlerKind.BLOCKING


async def run_handler(handler: BaseRequestHandler, cleanup_timeout: float) -> None:
    """Take *handler* through its life.

    Args:
        handler: a fresh handler.
        cleanup_timeout: seconds that ``finish()`` may take.

    Raises:
        RequestTimeout: ``finish()`` took longer and was cut.

    Whatever ``handle()`` raises is raised. If ``finish()`` fails too, its error is logged:
    the first error is the one to look into, and a cancellation must stay one. (After an
    error, one more of the peer's is not even logged: its connection is known to be lost.)
    """
    await handler.setup()
    try:
        await handler.handle()
        handler._handled = True
    except BaseException as first:
        try:
            if not handler._finish_now():
                # It shields itself.
                await _finish(handler, cleanup_timeout)  # noqa: ASYNC102
        except Exception as error:
            if not (isinstance(first, Exception) and is_peer_fault(error)):
                log_error(error, "finish() of %r failed", type(handler).__qualname__)
        raise
    if not handler._finish_now():
        await _finish(handler, cleanup_timeout)


async def _finish(handler: BaseRequestHandler, cleanup_timeout: float) -> None:
    with trio.CancelScope(
        deadline=trio.current_time() + cleanup_timeout, shield=True
    ) as scope:
        await handler.finish()
    if scope.cancelled_caught:
        raise RequestTimeout(f"finish() took longer than {cleanup_timeout:g} s")
