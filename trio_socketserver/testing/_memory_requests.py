"""The life of a request in memory, which is that of every request.

It lives in an entered server: a small one made for it, or the caller's. So closing,
draining, time limits and counting are the real ones, and only accepting is not.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import trio

from .._datagram_servers import UDPServer
from .._exceptions import ConnectionBroken
from .._groups import open_ungrouped_nursery
from .._handlers import HandlerKind, handler_kind, run_handler
from .._life import Life, Outcome, attend
from .._server import BaseServer, Handler
from .._stream_servers import TCPServer
from ._memory_sockets import SERVER_ADDRESS, MemorySocket


class MemoryServer(BaseServer):
    """The server of a request in memory: a real one that nothing can connect to.

    Args:
        handler: the handler.
        seen: what the handler gets as its server; None for this one.
    """

    def __init__(self, handler: Handler, seen: Any = None) -> None:
        super().__init__(SERVER_ADDRESS, handler)
        self.seen = self if seen is None else seen

    def _run_handler(self, request: Any, client_address: Any) -> Coroutine[Any, Any, None]:
        handler = self.RequestHandlerClass(request, client_address, self.seen)
        if self._judge_handler() is HandlerKind.ASYNC_CLASS:
            return run_handler(handler, self.cleanup_timeout)
        coroutine: Coroutine[Any, Any, None] = handler
        return coroutine

    async def shutdown_request(self, request: Any) -> None:
        if isinstance(request, MemorySocket):
            await request.aclose()

    async def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing; the error is raised where the request was made."""


def server_for(handler: Handler, server: Any, *, datagram: bool) -> BaseServer:
    """Return the server in which a request of *handler* is to live.

    Raises:
        TypeError: the handler needs a thread or a process, or is none; or the server
            serves connections where this is a datagram, or the other way round.
    """
    if handler_kind(handler) is HandlerKind.BLOCKING:
        raise TypeError(
            f"{handler!r} is a blocking handler, which needs a real socket and a thread: "
            "use serving(ThreadingTCPServer(('127.0.0.1', 0), handler)) and a real client, "
            "or serving_in_thread() in a program without trio"
        )
    if not isinstance(server, BaseServer):
        return MemoryServer(handler, server)
    if "ForkingMixIn" in (base.__name__ for base in type(server).__mro__):
        raise TypeError(
            f"{type(server).__qualname__} handles requests in child processes, which "
            "nothing in memory reaches: use serving() and a real client"
        )
    if isinstance(server, TCPServer) and isinstance(server, UDPServer) is not datagram:
        name, kind, other = type(server).__qualname__, "datagrams", "datagram_replies()"
        if datagram:
            kind, other = "connections", "memory_connection() or converse()"
        raise TypeError(f"{name} serves {kind}: use {other}")
    return server


@dataclass
class _Lent:
    """A server that has another handler for the time of some requests in memory."""

    handler: Handler
    before: Handler
    requests: int = 0


_lent: Final[dict[int, _Lent]] = {}
"""By `id()`, since a server need not be hashable."""


class Attendance:
    """A request in memory, and the server that it lives in.

    To `attend` it passes for the server, so that it hears of errors and of the end.

    Args:
        server: where it lives, entered.
        request: the request.
        client_address: where it is said to come from.

    Attributes:
        scope: cancels the request, and nothing else.
        ended: set when the request has been handled and closed.
        error: what it has raised, if that is an `Exception`.
        is_alone: whether the client has left because the test is over.
    """

    _nursery: trio.Nursery

    def __init__(self, server: BaseServer, request: Any, client_address: Any) -> None:
        self.scope = trio.CancelScope()
        self.ended = trio.Event()
        self.error: Exception | None = None
        self.is_alone = False
        self.cleanup_timeout = server.cleanup_timeout
        self.shutdown_request = server.shutdown_request
        self._close_at_once = server._close_at_once
        self._abort = server._abort
        self._count = server._count
        self._server = server
        self._life = Life(request, client_address)

    def start(self) -> None:
        """Begin to handle the request, as one that the server has accepted."""
        assert self._server._requests is not None
        self._server._counters.accepted += 1
        self._server._requests.start_soon(self._run, name="request")

    async def _run(self) -> None:
        try:
            with self.scope:
                await self.attend()
        finally:
            self.ended.set()

    def attend(self) -> Coroutine[Any, Any, None]:
        """Take the request through its life."""
        return attend(self, self._stage, self._life)

    async def _stage(self, life: Life) -> None:
        server = self._server
        assert server._requests is not None
        server._requests.enter_request()
        if await server.verify_request(life.request, life.client_address):
            await server.finish_request(life.request, life.client_address)
        else:
            life.end(Outcome.REJECTED)

    async def cancel(self) -> None:
        """Cancel the request, and wait for its end; shielded."""
        self.scope.cancel()
        with trio.CancelScope(shield=True):
            await self.ended.wait()

    def cancels(self, nursery: trio.Nursery) -> None:
        """Have *nursery* cancelled as soon as the handler has raised an error."""
        self._nursery = nursery

    async def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep the error; whoever is in the block must not see the connection end first."""
        error = sys.exception()
        assert isinstance(error, Exception)
        self.error = error
        self._nursery.cancel_scope.cancel()
        await self._server.handle_error(request, client_address)

    @asynccontextmanager
    async def surrounding(self) -> AsyncGenerator[None]:
        """Have the request handled beside the block, and wait for its end.

        What it raises cancels the block, and is raised; the block's end in any other way
        than by an exception leaves the request alone.
        """
        async with open_ungrouped_nursery() as nursery:
            self.cancels(nursery)
            self.start()
            nursery.start_soon(self._join)
            yield

    async def _join(self) -> None:
        try:
            await self.ended.wait()
        finally:
            # Bounded by what the handler itself shields.
            await self.cancel()  # noqa: ASYNC102
            # That nobody was there any more to say goodbye to is the test's own doing.
            forgiven = self.is_alone and isinstance(self.error, ConnectionBroken)
            if self.error is not None and not forgiven:
                raise self.error


@asynccontextmanager
async def entered(server: BaseServer, handler: Handler) -> AsyncGenerator[None]:
    """Have *server* entered, with this handler, for the length of the block.

    Raises:
        RuntimeError: it has another handler at the moment, for another request in memory.
    """
    lent = _lent.get(id(server))
    if lent is None:
        lent = _Lent(handler, server.RequestHandlerClass)
        server.RequestHandlerClass = handler
        _lent[id(server)] = lent
    elif lent.handler is not handler:
        raise RuntimeError(
            f"this server has another handler in memory at the moment, {lent.handler!r}: "
            "make one server for each handler"
        )
    lent.requests += 1
    try:
        if server._requests is not None:
            yield
        else:
            async with server:
                yield
    finally:
        lent.requests -= 1
        if not lent.requests:
            server.RequestHandlerClass = lent.before
            del _lent[id(server)]
