"""`ForkingMixIn`: a child process for each request.

In the parent a request is a task like any other, which waits for its child; so joining,
limits, cancelling and counting are what they are everywhere. All hooks run there. Only the
handler runs in the child, with a copy of everything, a blocking one in the child's main
thread, an asynchronous one in a trio of the child's own.

What a child says to its server, by ``shutdown()`` or ``server_close()``, goes to the
parent, over a socket. A task reads it from the first child on until closing has begun and
the last child has ended; one for each busy time was a twentieth of a lone request.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import socket
from collections.abc import Awaitable
from typing import Any, Final

import trio

from ._blocking import exits_contained, run_blocking
from ._blocking_sockets import give
from ._children import call_in_child, fork, run_apart
from ._handlers import HandlerKind, run_handler
from ._life import Life
from ._server import BaseServer
from ._server_view import stand_in, view_of
from ._sockets import DatagramSocket, StreamSocket
from ._tls import TLSSocket

__all__ = ["ForkingMixIn"]

BATCH: Final = 4
"""Requests taken per wake-up at most: each is a fork, and that stops the event loop.

By 0.5 ms in a process of 30 MB and 4 ms in one of 240 MB, and twice that where children
want the same core. With thirty clients at once a larger batch stopped it for six times as
long; a smaller one has more pages copied, because what is done between two forks is done
on the same pages.
"""

SHUTDOWN: Final = b"s"
SERVER_CLOSE: Final = b"c"


_accepted: contextvars.ContextVar[Any] = contextvars.ContextVar(
    "trio_socketserver_accepted", default=None
)
"""What the server has accepted for the request that the current task is a part of."""


def _accepted_or(request: Any) -> list[Any]:
    """Return a request, and what it was made of if a hook has wrapped what was accepted."""
    accepted = _accepted.get()
    return [request] if request is accepted else [request, accepted]


class _Messages:
    """What a server's children say to it; one byte each.

    Attributes:
        child_end: where they say it.
    """

    def __init__(self) -> None:
        self._parent_end, self.child_end = socket.socketpair()
        self._parent_end.setblocking(False)
        self._scope = trio.CancelScope()

    async def hear(self, server: ForkingMixIn) -> None:
        """Do what the children say, until `end`."""
        with self._parent_end, self.child_end:
            with self._scope:
                while True:
                    await trio.lowlevel.wait_readable(self._parent_end)
                    self._obey(server)
            with contextlib.suppress(BlockingIOError):
                self._obey(server)  # The last words of the last child.

    def _obey(self, server: ForkingMixIn) -> None:
        for byte in self._parent_end.recv(4096):
            server._obey_child(bytes([byte]))

    def end(self) -> None:
        """Hear no more, and close the sockets."""
        self._scope.cancel()


class ForkingMixIn(BaseServer):
    """Handle each request in a child process of its own.

    As `socketserver.ForkingMixIn`; put it in front of a server class. Unlike there the loop
    goes on at ``max_children``, only the server's own children are waited for, and they
    close the sockets that they have inherited. What a handler raises in its child reaches
    `handle_error()` in the parent, with the child's traceback; a child that fails otherwise
    is `ChildFailed`. Handlers of either colour work, but what they change is the child's.

    A blocking handler runs in the child's main thread, where it gets signals, and where
    `trio.run` does not work, because the parent's has not ended there: use a thread for it.

    Cancellation: a child is sent SIGTERM, which cancels an asynchronous handler and is
    `SystemExit` in a blocking one, and after ``cleanup_timeout`` SIGKILL.
    """

    timeout: float | None = 300
    """Seconds that `handle_request()` waits for a request to arrive; None for ever."""

    max_children: int = 40
    """Children at once; at the limit the server stops accepting."""

    active_children: set[int] | None = None
    """The process ids of the children; None before the first."""

    _batch = BATCH
    _one_at_a_time = False

    def _set_up(self) -> None:
        super()._set_up()
        self.active_children = None
        self._messages: _Messages | None = None
        self._in_child: _InChild | None = None
        self._child_ended: trio.Event | None = None

    def _limit(self) -> int | None:
        return self.max_children

    async def collect_children(self, *, blocking: bool = False) -> None:
        """Wait for the children that there are, if *blocking*.

        Otherwise there is nothing to do: each child is waited for by its request. Raises
        nothing.

        Cancellation: only the waiting ends.
        """
        await trio.lowlevel.checkpoint()
        while blocking and self.active_children:
            self._child_ended = self._child_ended or trio.Event()
            await self._child_ended.wait()

    def _run_handler(self, request: Any, client_address: Any) -> Awaitable[None]:
        return self._run_in_child(self._judge_handler(), request, client_address)

    def _handle(self, life: Life) -> Awaitable[None]:
        _accepted.set(life.request)
        return super()._handle(life)

    # A KeyboardInterrupt must not get between a child and the task that owns it.
    @trio.lowlevel.enable_ki_protection
    async def _run_in_child(
        self, kind: HandlerKind, request: Any, client_address: Any
    ) -> None:
        messages = self._listen_to_children()
        if self._in_child is None:
            self._in_child = _InChild(self)
        work = functools.partial(self._in_child.serve, kind, request, client_address)
        kept = [messages.child_end]
        for each in _accepted_or(request):
            kept += _sockets_of(each)
        try:
            child = fork(work, kept)
        except BaseException:
            self._lose_child(None)
            raise
        for each in _accepted_or(request):
            if isinstance(each, TLSSocket):
                each.leave()
        assert self.active_children is not None
        self.active_children.add(child.pid)
        try:
            with exits_contained(client_address):
                await child.run(self.cleanup_timeout)
        finally:
            self._lose_child(child.pid)

    def _listen_to_children(self) -> _Messages:
        if self._requests is None:
            raise RuntimeError("a child process needs a server that serves")
        if self.active_children is None:
            self.active_children = set()
        if self._messages is None:
            self._messages = _Messages()
            self._requests.start_soon(self._messages.hear, self, name="children's messages")
        return self._messages

    def _lose_child(self, pid: int | None) -> None:
        assert self.active_children is not None
        if pid is not None:
            self.active_children.discard(pid)
        if self._requests is None or self._requests.closing:
            self._stop_listening_to_children()
        if self._child_ended is not None:
            self._child_ended.set()
            self._child_ended = None

    async def _stop_accepting(self) -> None:
        try:
            await super()._stop_accepting()
        finally:
            self._stop_listening_to_children()

    def _stop_listening_to_children(self) -> None:
        """Hear no more, if there are no children; for a late one it begins again."""
        if self._messages is not None and not self.active_children:
            self._messages.end()
            self._messages = None

    def _obey_child(self, message: bytes) -> None:
        assert self._requests is not None
        hook = self.shutdown if message == SHUTDOWN else self.server_close
        self._requests.start_soon(hook, name="asked for by a child")


# -- in the child --------------------------------------------------------------------------


def _sockets_of(request: Any) -> list[socket.socket]:
    match request:
        case StreamSocket():
            return request.held()
        case (_, DatagramSocket() as sender):
            return [sender.socket]
        case socket.socket():
            return [request]
        case _:
            return []


class _InChild:
    """What a child works with; made beforehand, because its making takes half a fork.

    Attributes:
        server: the child's copy of the server, which tells the parent what ends it.
    """

    def __init__(self, server: ForkingMixIn) -> None:
        tells = {"shutdown": _tell(SHUTDOWN), "server_close": _tell(SERVER_CLOSE)}
        self.server = stand_in(server, tells)
        self._view = view_of(self.server, call_in_child)

    def serve(  # pragma: no cover (in forked children)
        self, kind: HandlerKind, request: Any, client_address: Any
    ) -> None:
        """Run the handler, in the child."""
        if kind is HandlerKind.BLOCKING:
            handler = self.server.RequestHandlerClass
            loan = give(request, call_in_child)
            try:
                run_blocking(handler, loan, client_address, self._view)
            finally:
                if isinstance(request, tuple):  # A view of the socket, made for it.
                    loan.end()
        else:
            run_apart(functools.partial(self._await, kind, request, client_address))

    async def _await(  # pragma: no cover (in forked children)
        self, kind: HandlerKind, request: Any, client_address: Any
    ) -> None:
        if isinstance(request, tuple) and isinstance(request[1], DatagramSocket):
            # Some task of the parent's may hold the lock of this one for ever.
            request = (request[0], DatagramSocket(request[1].socket))
        tls = [each for each in _accepted_or(request) if isinstance(each, TLSSocket)]
        if request in tls:
            await request.do_handshake()
        handler = self.server.RequestHandlerClass(request, client_address, self.server)
        try:
            if kind is HandlerKind.ASYNC_CLASS:
                await run_handler(handler, self.server.cleanup_timeout)
            else:
                await handler
        finally:
            with trio.CancelScope(shield=True):  # It has a deadline of its own.
                for each in tls:
                    await each.say_goodbye()


def _tell(message: bytes) -> Any:
    """Return a method that has the parent call its own."""

    async def tell(self: ForkingMixIn) -> None:  # pragma: no cover (in forked children)
        assert self._messages is not None
        self._messages.child_end.send(message)
        await trio.lowlevel.checkpoint()

    return tell
