"""Cancelling a handler at every checkpoint in turn.

The handler is run again and again, each time afresh, and each time cancelled one moment
later, until a run ends before its moment comes. See `Watch` for what a moment is.

trio runs tasks that are ready in any order. The client acts only when all else is blocked,
which keeps it out of that. Where a handler has several tasks, the moments of one run need
not have the order of the next; so that each of its checkpoints is tried is very likely, and
certain only of a handler with one task. Nothing relies on it but what is found.

It runs on the running loop's clock, like the other ``check_…`` functions of `trio.testing`,
because handlers and clients use what fixtures have set up there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias

import trio
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from .._exceptions import is_peer_fault
from .._groups import open_ungrouped_nursery
from .._handlers import HandlerKind, handler_kind
from .._life import Life
from .._server import BaseServer, Handler
from .._sockets import Buffer
from ._memory_requests import Attendance, entered, server_for
from ._memory_sockets import (
    CLIENT_ADDRESS,
    MemoryClient,
    MemoryDatagramSocket,
    MemorySocket,
)
from ._places import place_of
from ._watching import Watch, WatchedHandler

CLEANUP_TIMEOUT: Final = BaseServer.cleanup_timeout
"""Seconds that a cancelled handler may take to unwind; what servers give its finish()."""

Client: TypeAlias = Callable[[MemoryClient], Awaitable[object]]


class _WatchedAttendance(Attendance):
    """A request whose handler is watched."""

    def __init__(self, watch: Watch, server: BaseServer, request: Any) -> None:
        super().__init__(server, request, CLIENT_ADDRESS)
        self.scope = watch.scope
        self._watch = watch

    async def attend(self) -> None:
        self._watch.begin()
        try:
            with self._watch.mercy:
                await super().attend()
        finally:
            self._watch.end()

    async def _stage(self, life: Life) -> None:
        try:
            await super()._stage(life)
            self._watch.has_returned = True
        finally:
            self._watch.unwound.set()


class _PatientClient(MemoryClient):
    """A client's end that acts when everything else is blocked."""

    async def send_all(self, data: Buffer) -> None:
        await wait_all_tasks_blocked()
        await super().send_all(data)

    async def send_eof(self) -> None:
        await wait_all_tasks_blocked()
        await super().send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await wait_all_tasks_blocked()
        return await super().receive_some(max_bytes)


async def check_cancellation(
    handler: Handler,
    client: Client | bytes,
    *,
    server: Any = None,
    cleanup_timeout: float = CLEANUP_TIMEOUT,
) -> int:
    r"""Check that a handler can be cancelled anywhere.

    ::

        async def client(stream: MemoryClient) -> None:
            await stream.send_all(b"hello\n")
            assert await stream.rfile.readline() == b"hello\n"

        async def test_echo_can_be_cancelled(autojump_clock: MockClock) -> None:
            await check_cancellation(Echo, client)

    Handler and client talk over a connection in memory, first undisturbed, then again and
    again; each time the handler is cancelled a moment later, until it ends before that
    moment comes. It is cancelled before its first step, and twice at each checkpoint that
    it or a task in its nurseries passes: as it begins to wait there, and as it goes on. A
    cancellation that comes behind a shield is raised after it. The client sees the
    connection end early then; an `Exception` that it raises after that is no failure.

    In every run, the first one included, all of this has to hold:

    * ``finish()`` runs if ``setup()`` has returned, is not cut by ``cleanup_timeout``, and
      raises nothing but a peer's faults;
    * the connection is closed at the end;
    * no task survives of those that the handler has started, in whatever nursery;
    * `trio.Cancelled` is not caught for good; nor does the handler raise an error in its
      place, other than a peer's fault;
    * the handler unwinds in ``cleanup_timeout`` seconds.

    Handler and client should do the same in each run: state that grows, or chance, may have
    a checkpoint left out.

    The running loop's clock is used. With ``MockClock(autojump_threshold=0)``, the fixture
    ``autojump_clock`` of pytest-trio, waiting takes no time; a slow one is then found too.
    It is not for handlers that wait for threads, while which that clock jumps.

    Args:
        handler: a handler class, or a coroutine function.
        client: an async function, called in each run with the client's end, which is closed
            when it returns; or bytes, and the handler is given them as a datagram.
        server: see `memory_connection`; the same in every run, and entered and closed in
            each unless it has been entered.
        cleanup_timeout: seconds that a cancelled handler may take to unwind, and then its
            ``finish()``. A server passed keeps its own ``cleanup_timeout`` for the latter.

    Returns:
        How often the handler was cancelled.

    Raises:
        AssertionError: the handler is at fault; the message names the checkpoint, by file,
            line and function, and says what was wrong.
        TypeError: the handler is a blocking one, or the server handles requests in
            processes.
        BaseException: what the client or the handler raises before it is cancelled, except,
            for the handler, a peer's faults.

    Cancellation: ends the run in progress, as a server that is cancelled.

    A handler that cancels a scope of its own inside a shield, and then returns without
    another checkpoint, is blamed wrongly: nothing tells whose cancellation was delivered.
    Nothing can end a handler that waits in a shield without a deadline, and not for its
    client. The logger ``trio_socketserver`` is told where it waits, and it is waited for.
    """
    await _was_cancelled(None, handler, client, server, cleanup_timeout)
    moment = 0
    while await _was_cancelled(moment, handler, client, server, cleanup_timeout):
        moment += 1
    return moment


async def _was_cancelled(
    moment: int | None,
    handler: Handler,
    client: Client | bytes,
    server: Any,
    cleanup_timeout: float,
) -> bool:
    """Run the handler once, and check it; return whether the moment has come."""
    is_datagram = isinstance(client, bytes)
    home = server_for(handler, server, datagram=is_datagram)
    if home is not server:
        home.cleanup_timeout = cleanup_timeout
    watch = Watch(moment)
    if handler_kind(handler) is HandlerKind.ASYNC_CLASS:
        handler = WatchedHandler(handler, watch)
    ours, theirs = memory_stream_pair()
    stream = _PatientClient(theirs, home if server is None else server, CLIENT_ADDRESS)
    connection = MemorySocket(ours, CLIENT_ADDRESS)
    request = (client, MemoryDatagramSocket()) if is_datagram else connection
    attendance = _WatchedAttendance(watch, home, request)
    trio.lowlevel.add_instrument(watch)
    try:
        async with entered(home, handler), open_ungrouped_nursery() as nursery:
            attendance.cancels(nursery)
            nursery.start_soon(_limit_unwinding, watch, stream, cleanup_timeout)
            attendance.start()
            try:
                if isinstance(client, bytes):
                    await attendance.ended.wait()
                else:
                    await _talk(client, stream, watch, attendance)
            finally:
                await attendance.cancel()  # noqa: ASYNC102 (it ends with the handler)
            nursery.cancel_scope.cancel()
        error = attendance.error
        if error is not None and not is_peer_fault(error):
            if not watch.cancelled.is_set():
                raise error
            if error is not watch.cause:
                watch.blame(f"it raised {error!r}", error)
        if not (is_datagram or connection.is_closed):
            watch.blame("the connection stayed open")
        watch.check()
    finally:
        trio.lowlevel.remove_instrument(watch)
    return watch.cancelled.is_set()


async def _talk(
    client: Client, stream: MemoryClient, watch: Watch, attendance: Attendance
) -> None:
    """Have the client talk until it or a cancelled handler ends, and wait for that one."""
    async with open_ungrouped_nursery() as nursery:

        async def end_with_cancelled_handler() -> None:
            await watch.cancelled.wait()
            await attendance.ended.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(end_with_cancelled_handler)
        try:
            await client(stream)
        except Exception:
            if not watch.cancelled.is_set():
                raise
        finally:
            stream.close()
        await attendance.ended.wait()
        nursery.cancel_scope.cancel()


async def _limit_unwinding(watch: Watch, stream: MemoryClient, seconds: float) -> None:
    """Blame a cancelled handler that takes too long; help it to its end if possible."""
    await watch.cancelled.wait()
    with trio.move_on_after(seconds):
        await watch.unwound.wait()
        return
    places = "; ".join(place_of(task) for task in watch.tasks)
    watch.relent(f"it had not ended {seconds:g} s after that, and was at {places}")
    # It may be its client that it waits for, behind a shield that nobody else can remove.
    stream.close()
