"""`BaseServer`: entering and leaving, the serving loop, the hooks.

It knows no socket type, no thread and no process. The rules:

* Every request is one task in the server's `RequestNursery` (but see `_shared_tasks`). The
  plain server is the limit of one: its loop waits for the task before it takes the next.
* A request is owned at every moment: by the loop from `get_request()` until
  `process_request()` has handed it on, by its task from then on. See `_life`.
* The loop waits in one place, for a due time, room and a request, and takes what has come
  in batches. Hooks run between the waits and are never cut short by the poll interval.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import selectors
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypeAlias

import trio

from ._accept import AcceptErrors
from ._blocking import BlockingWorld
from ._draining import Drain
from ._exceptions import RequestTimeout
from ._handlers import HandlerKind, handler_kind, run_handler
from ._hooks import check_server_class
from ._life import Life, Outcome, attend
from ._lifecycle import LoopState, ServingLoop
from ._log import log_error
from ._requests import RequestNursery
from ._sockets import SELECTOR
from ._statistics import Counters, ServerStatistics

__all__ = ["BaseServer"]

Handler: TypeAlias = Callable[[Any, Any, Any], Any]
"""A handler class, or a function, called with (request, client_address, server)."""

BATCH: Final = 64
"""Requests taken per wake-up at most, so that a flood cannot starve the program.

At some 10 µs each that is under a millisecond; unbounded, one sender of datagrams has been
seen to hold the loop for half a second.
"""


def _is_readable(fileno: int) -> bool:
    """Ask the kernel, without waiting."""
    with SELECTOR() as selector:
        selector.register(fileno, selectors.EVENT_READ)
        return bool(selector.select(0))


class BaseServer:
    """The base of all servers.

    As in `socketserver`, a subclass brings the socket, by `fileno()` and `get_request()`,
    and users override the hooks. What differs: every hook that may wait is a coroutine, the
    server is an async context manager whose block owns the requests, and nothing polls.

    Args:
        server_address: where to serve.
        RequestHandlerClass: what is called with ``(request, client_address, server)``. An
            asynchronous handler is a subclass of `trio_socketserver.BaseRequestHandler`, or
            a coroutine function. Anything else is a blocking handler, as `socketserver` has
            them, and runs in a worker thread, unmodified.

    Raises:
        TypeError: it is no handler, or of a colour that the server does not run.
        RuntimeError: by ``async with``: the server has been entered already.

    The server closes what it has accepted, and its listening socket.

    Cancellation: around ``async with server:`` it cancels the requests. They are finished,
    closed and joined before the block is left.

    Attributes:
        server_address: as given; socket servers replace it by the address they have bound.
    """

    timeout: float | None = None
    """Seconds that `handle_request()` waits for a request to arrive; None for ever."""

    block_on_close: bool = True
    """Whether closing waits for requests; if not, it cancels them."""

    graceful_timeout: float = math.inf
    """Seconds that closing waits for requests before it cancels them."""

    request_timeout: float | None = None
    """Seconds that a whole request may take, else `RequestTimeout`; None for ever."""

    cleanup_timeout: float = 5.0
    """Seconds that a handler's ``finish()``, and closing a request, may each take."""

    _default_max_tasks: int | None = None
    _one_at_a_time = True
    _batch = BATCH

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_server_class(cls)

    def __init__(self, server_address: Any, RequestHandlerClass: Handler) -> None:
        self._set_up()
        self.server_address = server_address
        self.RequestHandlerClass = RequestHandlerClass
        self._judge_handler()

    def _set_up(self) -> None:
        """Make what the server keeps for itself. All else is what it was told to do."""
        self._judged: Handler | None = None
        self._handler_kind = HandlerKind.ASYNC_CLASS
        self._counters = Counters()
        self._loop = ServingLoop()
        self._accept_errors = AcceptErrors()
        self._drain = Drain()
        self._requests: RequestNursery | None = None
        self._blocking_world: BlockingWorld | None = None
        self._block: AbstractAsyncContextManager[Any] = contextlib.nullcontext()
        self._arriving: Life | None = None
        self._room: trio.Event | None = None
        self._turn = trio.Lock()
        self._queued = 0
        self._admitting: trio.lowlevel.Task | None = None
        self._keeps_listener = False

    # -- the handler -----------------------------------------------------------------

    @property
    def RequestHandlerClass(self) -> Handler:
        """The handler. Assigning another takes effect with the next request.

        Raises:
            TypeError: when one of the wrong colour is assigned.
        """
        return self._request_handler_class

    @RequestHandlerClass.setter
    def RequestHandlerClass(self, handler: Handler) -> None:
        self._check_handler(handler, handler_kind(handler))
        self._request_handler_class = handler

    def _check_handler(self, handler: Handler, kind: HandlerKind) -> None:
        """Refuse a handler that this server cannot run."""

    def _judge_handler(self) -> HandlerKind:
        # A subclass may have shadowed the property with an attribute of its own.
        handler = self.RequestHandlerClass
        if handler is not self._judged:
            kind = handler_kind(handler)
            self._check_handler(handler, kind)
            self._judged, self._handler_kind = handler, kind
        return self._handler_kind

    # -- entering and leaving --------------------------------------------------------

    def __enter__(self) -> NoReturn:
        raise TypeError(
            f"use 'async with' for a {type(self).__qualname__}, not 'with': "
            "leaving its block waits for the requests"
        )

    def __exit__(self, *_: object) -> None:  # pragma: no cover
        """Never called, but without it 'with' does not get to `__enter__()`."""

    async def __aenter__(self) -> Self:
        if self._requests is not None:
            raise RuntimeError("this server has been entered already")
        self._loop.enter()
        self._block = self._with_requests(keeps_listener=False)
        await self._block.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        # A nursery's exit, which bounds its own cleaning up.
        return await self._block.__aexit__(exc_type, exc, traceback)  # noqa: ASYNC102

    @asynccontextmanager
    async def _with_requests(
        self, *, keeps_listener: bool
    ) -> AsyncGenerator[RequestNursery]:
        """Have a nursery for requests for the length of the block."""
        self._drain = Drain()
        self._keeps_listener = keeps_listener
        self._requests = requests = RequestNursery()
        calls_close = not keeps_listener and self._is_overridden("server_close")
        try:
            async with requests.open(self._stop_accepting, self._patience, self._release):
                try:
                    yield requests
                except BaseException:
                    requests.cancel()
                    if calls_close:
                        # What the body raised says more than that the rest was cut short.
                        with contextlib.suppress(trio.Cancelled):
                            await self.server_close()  # noqa: ASYNC102 (not to shield)
                    raise
                if calls_close:
                    await self.server_close()
        finally:
            self._requests = self._blocking_world = None
            if not keeps_listener:
                self._loop.leave()

    @asynccontextmanager
    async def _entered(self) -> AsyncGenerator[RequestNursery]:
        """Use the server's nursery, or one of its own for the length of the block."""
        if self._requests is None:
            async with self._with_requests(keeps_listener=True) as requests:
                yield requests
        else:
            requests = self._requests
            await requests.wait_opened()
            yield requests

    async def _stop_accepting(self) -> None:
        self._drain.begin()
        try:
            if self._loop.active:
                self._loop.stop()
                with trio.CancelScope(
                    deadline=trio.current_time() + self.cleanup_timeout, shield=True
                ):
                    await self._loop.wait_ended()
        finally:
            if self._blocking_world is not None:
                self._blocking_world.close()
        if not self._keeps_listener:
            try:
                # A cancelled server drains nothing.
                if trio.current_effective_deadline() > -math.inf:
                    with trio.move_on_after(self.cleanup_timeout):
                        await self._take_backlog()
            finally:
                self._stop_listening()

    async def _take_backlog(self) -> None:
        """Accept what the kernel has accepted already; limits delay what follows."""
        assert self._requests is not None
        for number in range(self._backlog()):
            if number and number % self._batch == 0:
                await trio.lowlevel.checkpoint()  # Other processes take their share.
            try:
                request, client_address = await self.get_request()
            except BlockingIOError:
                return
            except OSError as error:
                if self.fileno() == -1:
                    return  # A hook has closed it.
                self._counters.accept_errors += 1
                self._accept_errors.failed(error)
                if self._accept_errors.delay:
                    return  # A shortage; there is no time to wait for its end.
                continue
            self._counters.accepted += 1
            self._queued += 1
            life = Life(request, client_address)
            self._requests.start_soon(
                attend, self, self._admit_in_turn, life, name="request"
            )

    def _backlog(self) -> int:
        """Return how many requests to take when closing begins."""
        return 0

    def _patience(self) -> float:
        return self.graceful_timeout if self.block_on_close else 0.0

    def _release(self) -> None:
        assert self._requests is not None
        if self._requests.crashed or not self._keeps_listener:
            self._close_listener()

    def _stop_listening(self) -> None:
        """Let no more requests come; those that are active go on. No checkpoint."""
        self._close_listener()

    def _close_listener(self) -> None:
        """Close the listening socket, if there is one. No checkpoint; idempotent."""

    async def server_close(self) -> None:
        """Stop accepting, close the listening socket, and wait for the requests.

        ``async with server:`` calls it at the end. Unlike in `socketserver` it implies
        `shutdown()`, and how long it waits is set by ``block_on_close`` and
        ``graceful_timeout``. Idempotent. Called from inside one of the server's requests,
        or from a hook of its loop, it starts all that and returns without waiting.

        Raises nothing: what has ended the server is raised where it was entered.

        Cancellation: what has been started goes on; only the waiting ends.
        """
        requests = self._requests
        if requests is None:
            self._close_listener()
            await trio.lowlevel.checkpoint()
            return
        self._keeps_listener = False
        requests.ask_to_close()
        if not self._loop.active and not self._backlog():
            self._stop_listening()
        if requests.is_current():
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await requests.wait_closed()

    @property
    def draining(self) -> trio.Event:
        """Set when closing begins; a new event each time the server is entered."""
        return self._drain.event

    # -- serving ---------------------------------------------------------------------

    async def serve_forever(  # noqa: ASYNC128 (_run_loop calls started())
        self,
        poll_interval: float | None = 0.5,
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve requests until `shutdown()`.

        Outside of ``async with server:`` the call also waits for the requests before it
        returns (see `server_close`), and leaves the listening socket open, as
        `socketserver` does.

        Args:
            poll_interval: seconds between two calls of `service_actions()` at most, if that
                is overridden; if not, an idle server does not wake up at all. None is for
                calls after requests only.
            task_status: for `trio.Nursery.start`, which returns ``server_address`` when the
                kernel queues connections.

        Raises:
            RuntimeError: another loop is running, or the server is closing.
            OSError: the listening socket is unusable.
            trio.ClosedResourceError: it has been closed, but not by `server_close()`.

        Cancellation: stops accepting. Inside ``async with server:``, requests go on.
        """
        if not self._is_overridden("service_actions"):
            interval = None
        elif poll_interval is None:
            interval = math.inf
        else:
            interval = max(poll_interval, 0)
        await self._run_loop(functools.partial(self._serve, interval), task_status)

    async def handle_request(self) -> None:
        """Wait for one request and handle it.

        As in `socketserver` it waits for at most ``timeout`` seconds for the request to
        arrive, and else calls `handle_timeout()`; servers that handle requests side by side
        return when the handling has begun (inside ``async with server:``; outside, there is
        nothing else to wait for it).

        Raises what `serve_forever` raises. `shutdown()` makes it return.

        Cancellation: as that of `serve_forever`.
        """
        await self._run_loop(self._serve_one, trio.TASK_STATUS_IGNORED)

    async def shutdown(self) -> None:
        """Stop `serve_forever()`, and wait until it accepts no more.

        Unlike in `socketserver` it may be called by anyone at any time, a handler included,
        and never deadlocks. Before the first loop has begun it is remembered for that one;
        after a loop has stopped it does nothing until the next. Raises nothing.

        Cancellation: the loop stops all the same; only the waiting ends.
        """
        self._loop.stop()
        await self._loop.wait_ended()

    async def _run_loop(
        self,
        body: Callable[[Callable[[], None]], Awaitable[None]],
        task_status: trio.TaskStatus[Any],
    ) -> None:
        if self._requests is not None and self._requests.closing:
            if not self._loop.fresh:
                raise RuntimeError("this server is closing or has been closed")
            # Closed before it began to serve: that is a stop remembered.
            task_status.started(self.server_address)
            await trio.lowlevel.checkpoint()
            return
        scope = self._loop.begin()
        try:
            async with self._entered() as requests:
                try:
                    self._accept_errors = AcceptErrors()
                    if not scope.cancel_called:
                        self._prepare_listener()
                    started = functools.partial(task_status.started, self.server_address)
                    with scope, requests.surrounding():
                        await body(started)
                finally:
                    # Before the requests are joined: shutdown() does not wait for them.
                    self._loop.end()
        finally:
            self._loop.end()
        await trio.lowlevel.checkpoint_if_cancelled()

    def _prepare_listener(self) -> None:
        """Make the listening socket ready for the loop."""

    async def _serve(
        self, poll_interval: float | None, started: Callable[[], None]
    ) -> None:
        """Serve until cancelled; call *started* first, once."""
        started()
        while True:
            if poll_interval is None:
                await self._wait_for_request()
                await self._accept_batch()
                continue
            next_tick = trio.current_time() + poll_interval
            if await self._arrives(poll_interval):
                await self._accept_batch()
                # The actions follow the requests; a sequential server's have to end first.
                with trio.move_on_at(next_tick):
                    await self._wait_for_room()
            await self.service_actions()

    async def _accept_batch(self) -> None:
        assert self._requests is not None
        if not self._is_hooked() and not self._requests.is_cancelled():
            for _ in range(self._room_in_batch()):
                if not await self._accept(self._start_unseen):
                    return
            return
        for _ in range(self._batch):
            if self._requests.is_cancelled():
                return  # Another process may serve what comes now.
            if self._is_full() or not await self._accept():
                return
            if self._loop.state is not LoopState.RUNNING:
                return  # A hook has called shutdown().

    def _is_hooked(self) -> bool:
        """Tell whether taking a request runs code of the user's.

        If not, nothing can change in between, and no request be denied. To know that spares
        a datagram a quarter of its time, a short connection a thirtieth.
        """
        return not (
            self.get_request == self._own_get_request
            and self.verify_request == self._own_verify_request
            and self.process_request == self._own_process_request
        )

    def _room_in_batch(self) -> int:
        """Return how many requests may be taken before anything else happens."""
        limit = self._limit()
        if limit is None:
            return self._batch
        return min(self._batch, limit - self._counters.active + self._queued)

    async def _serve_one(self, started: Callable[[], None]) -> None:
        started()
        timeout = math.inf if self.timeout is None else max(self.timeout, 0)
        deadline = trio.current_time() + timeout
        while True:
            if not await self._arrives(deadline - trio.current_time()):
                await self.handle_timeout()
                return
            if await self._accept():
                break
        if self._one_at_a_time:
            await self._wait_for_room()

    async def _arrives(self, seconds: float) -> bool:
        """Wait for a request for so long; at 0, see whether one is there."""
        with trio.move_on_after(max(seconds, 0)) as arrival:
            await self._wait_for_request()
        if not arrival.cancelled_caught:
            return True
        # trio cancels a scope without time before the kernel is asked; select(0) asks.
        return self._may_accept() and _is_readable(self.fileno())

    def _may_accept(self) -> bool:
        """Tell whether there is room, and no back-off under way."""
        return not self._is_full() and (
            not self._accept_errors.delay
            or trio.current_time() >= self._accept_errors.resume_at
        )

    async def _wait_for_request(self) -> None:
        """Wait until the listener is worth asking. Cancelled, it has taken nothing."""
        # The listener may be closed by now if closing could not wait for a hook.
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._accept_errors.delay:
            await trio.sleep_until(self._accept_errors.resume_at)
        await self._wait_for_room()
        await trio.lowlevel.wait_readable(self.fileno())

    def _limit(self) -> int | None:
        """Return how many requests may be active at once; None for no limit."""
        return 1

    def _is_full(self) -> bool:
        limit = self._limit()
        return limit is not None and self._counters.active - self._queued >= limit

    async def _wait_for_room(self) -> None:
        while self._is_full():
            self._room = trio.Event()
            await self._room.wait()

    async def _accept(self, start: Callable[[Life], None] | None = None) -> bool:
        """Take one request and pass it on.

        Args:
            start: begins the second stage without the first, which would do no more.

        Returns:
            Whether there was one; if not, it is time to wait again.
        """
        try:
            request, client_address = await self.get_request()
        except BlockingIOError:
            return False
        except OSError as error:
            if self._loop.state is LoopState.STOPPING:
                return False  # server_close() could not wait for us any longer.
            self._counters.accept_errors += 1
            self._accept_errors.failed(error)
            return False
        if self._accept_errors.delay:
            self._accept_errors.succeeded()
        self._counters.accepted += 1
        life = Life(request, client_address)
        if start is None:
            await attend(self, self._admit, life)
        else:
            start(life)
        return True

    # -- a request's life ------------------------------------------------------------

    async def _admit(self, life: Life) -> None:
        """The first stage, in the loop's task: from accepting to handing on."""
        if not await self.verify_request(life.request, life.client_address):
            life.end(Outcome.REJECTED)
            return
        self._arriving = life
        try:
            await self.process_request(life.request, life.client_address)
        finally:
            self._arriving = None
        life.is_settled = True

    async def _admit_in_turn(self, life: Life) -> None:
        """The first stage of what was accepted beyond the limit, in a task of its own."""
        assert self._requests is not None
        self._requests.enter_request()
        try:
            async with self._turn:
                await self._wait_for_room()
                self._admitting = trio.lowlevel.current_task()
                try:
                    await self._admit(life)
                finally:
                    self._admitting = None
        finally:
            self._queued -= 1

    def _start(self, life: Life) -> None:
        """Begin the second stage."""
        if self._requests is None:
            raise RuntimeError("process_request() needs a server that serves")
        self._requests.start_soon(attend, self, self._handle, life, name="request")

    def _start_unseen(self, life: Life) -> None:
        """Begin the second stage of a request that no code of the user's has seen."""
        self._start(life)

    def _handle(self, life: Life) -> Awaitable[None]:
        """The second stage, in the request's own task."""
        assert self._requests is not None
        self._requests.enter_request()
        return self.finish_request(life.request, life.client_address)

    def _close_at_once(self, request: Any) -> bool:
        """Do what `shutdown_request()` would do, if it is known not to wait."""
        return False

    def _abort(self, request: Any) -> None:
        """Close at once what `shutdown_request()` has left open."""

    def _count(self, life: Life) -> None:
        """Count a request that has ended; whoever waits for room looks again."""
        # Not "value", a property in Python: a hundredth of a datagram.
        counters, name = self._counters, life.outcome._value_
        setattr(counters, name, getattr(counters, name) + 1)
        if life.blames_peer:
            counters.peer_errors += 1
        self._note_room()

    def _note_room(self) -> None:
        """Let the loop look again whether there is room for a request."""
        if self._room is not None:
            self._room.set()
            self._room = None

    # -- hooks -----------------------------------------------------------------------

    def _is_overridden(self, hook: str) -> bool:
        mine = inspect.getattr_static(self, hook)
        return mine is not inspect.getattr_static(BaseServer, hook)

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when a request arrives."""
        raise NotImplementedError(f"{type(self).__qualname__} has no fileno()")

    def server_bind(self) -> None:
        """Bind the socket, as the constructor does."""

    def server_activate(self) -> None:
        """Make the server ready to accept."""

    async def get_request(self) -> tuple[Any, Any]:
        """Take one request: return the pair (request, client_address).

        The loop calls it when the listener is readable. As in `socketserver` an `OSError`
        means that there was no request after all. No checkpoint: what is taken has an owner
        at once.

        Raises:
            BlockingIOError: nothing is queued (any more).
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no get_request()")

    # What tells an override, see _is_hooked(); here, and where a class of ours has another.
    _own_get_request: Any = get_request

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        """Decide whether to handle a request; called before a byte is read. No checkpoint.

        What is denied, the server closes. An exception denies it too, by way of
        `handle_error()`.
        """
        return True

    async def process_request(self, request: Any, client_address: Any) -> None:
        """Pass a request on to where it is handled; here, to a task. No checkpoint.

        It is called in the loop's task. An override that does not call this one has taken
        the request over, and closes it.

        Raises:
            RuntimeError: the server has not been entered.
        """
        self._start(Life(request, client_address))
        arriving = self._arriving
        if arriving is not None and (
            arriving.request is request
            or self._loop.is_current_task()
            or self._admitting is trio.lowlevel.current_task()
        ):
            arriving.hand_on()
            self._arriving = None
        else:  # Somebody brings a request of their own.
            self._counters.accepted += 1

    _own_verify_request: Any = verify_request
    _own_process_request: Any = process_request

    async def finish_request(self, request: Any, client_address: Any) -> None:
        """Handle a request, by making and running a handler; in the request's task.

        The server closes the request afterwards.

        Raises:
            RequestTimeout: it took longer than ``request_timeout``.
            BaseException: whatever the handler raises.

        Cancellation: cancels the handler, whose ``finish()`` still runs, shielded.
        """
        if self.request_timeout is None:
            await self._run_handler(request, client_address)
            return
        with trio.move_on_after(self.request_timeout) as scope:
            await self._run_handler(request, client_address)
        if scope.cancelled_caught:
            raise RequestTimeout(f"the request took longer than {self.request_timeout:g} s")

    def _run_handler(self, request: Any, client_address: Any) -> Awaitable[None]:
        kind = self._judge_handler()
        if kind is HandlerKind.BLOCKING:
            return self._run_blocking(request, client_address)
        handler = self.RequestHandlerClass(request, client_address, self)
        if kind is HandlerKind.ASYNC_CLASS:
            return run_handler(handler, self.cleanup_timeout)
        awaitable: Awaitable[None] = handler
        return awaitable

    def _run_blocking(self, request: Any, client_address: Any) -> Awaitable[None]:
        requests, world = self._requests, self._blocking_world
        if requests is None:
            raise RuntimeError("a blocking handler needs a server that serves")
        if world is None:
            world = BlockingWorld(self, requests.start_soon)
            self._blocking_world = world
            if requests.closing:
                world.close()
        return world.run(self.RequestHandlerClass, request, client_address)

    def _has_daemon_threads(self) -> bool:
        """Tell whether cancelling leaves the thread of a blocking handler to itself."""
        return False

    def _note_abandoned(self) -> None:
        """Count a thread that has been left to itself."""
        self._counters.abandoned_threads += 1

    def _abandoned_threads(self) -> int:
        """Return how many of those run still."""
        return 0 if self._blocking_world is None else self._blocking_world.abandoned

    async def shutdown_request(self, request: Any) -> None:
        """Shut down and close one request. What it raises goes to `handle_error()`.

        Cancellation: the server shields the call, for ``cleanup_timeout`` seconds.
        """
        await self.close_request(request)

    async def close_request(self, request: Any) -> None:
        """Close one request. What it raises goes to `handle_error()`.

        Cancellation: as that of `shutdown_request`, which calls it.
        """

    async def handle_error(self, request: Any, client_address: Any) -> None:
        """Report the error of a request, which is `sys.exception()`. No checkpoint.

        Logs to the logger ``trio_socketserver``: a traceback for what is our fault, one
        line at level INFO for what is the peer's (a reset, a timeout, a line too long).
        What an override raises is logged. The server closes the request afterwards.
        """
        error = sys.exception()
        if isinstance(error, Exception):
            log_error(error, "exception while serving a request of %r", client_address)

    async def handle_timeout(self) -> None:
        """Called by `handle_request()` when no request came in time. No checkpoint."""

    async def service_actions(self) -> None:
        """Called by the loop after each batch, and every ``poll_interval``. No checkpoint.

        An error in it ends the server.
        """

    # -- looking ---------------------------------------------------------------------

    def _datagrams_dropped(self) -> int:
        return 0

    def statistics(self) -> ServerStatistics:
        """Return what the server has done so far."""
        return self._counters.snapshot(self._datagrams_dropped())
