"""A server of the standard library's, in its serving thread.

For as long as it is served, the object's class is a generated one. Its bases are the class
that it had and, *behind* that, classes of ours that derive from the standard library's; so
in the method resolution order ours come after everything the user has written and before
what they replace. An override that calls ``super().serve_forever()`` reaches our loop, and
one that does not is not touched. Nothing else of the object is changed but its event "the
loop has stopped", which the base class's ``shutdown()`` waits for, however it is called:
ours also wakes the loop, and does not let the loop's own thread wait for itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import socket
import socketserver
import ssl
import threading
import time
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, ClassVar, Final

import trio

from ._accept import AcceptErrors
from ._generated import generated_class
from ._inherited import remember_server
from ._log import log, log_error
from ._sockets import DONTWAIT, SELECTOR
from ._waking import Waker, waker_of

IS_SHUT_DOWN: Final = "_BaseServer__is_shut_down"
"""The base class's event; shutdown() waits for it."""

SHUTDOWN_REQUEST: Final = "_BaseServer__shutdown_request"
"""The base class's flag, which its loop, and ours, ends by."""


FLAG_GRACE: Final = 0.025
"""Seconds for ``shutdown()`` to set what a loop of the server's own looks at."""

KNOCK_AFTER: Final = 0.1
"""Seconds that a loop which is awake may take to stop, before `ServingThread.knock`."""


class Stopped:
    """The base class's event "no loop runs"; it has what is used of a `threading.Event`.

    It is made in trio's thread.

    Args:
        wake_loop: makes the loop look whether it is to stop.
        knock: makes it return from ``accept()``.
    """

    def __init__(
        self, wake_loop: Callable[[], object], knock: Callable[[], object]
    ) -> None:
        self._wake_loop = wake_loop
        self._knock = knock
        self._trio_thread = threading.get_ident()
        self._changed = threading.Condition()
        self._running_in: int | None = None
        self._ended = 0

    def clear(self) -> None:
        """Begin a loop, in the calling thread."""
        with self._changed:
            self._running_in = threading.get_ident()

    def set(self) -> None:
        """End it."""
        with self._changed:
            self._running_in = None
            self._ended += 1
            self._changed.notify_all()

    def is_set(self) -> bool:
        """Tell whether no loop runs."""
        return self._running_in is None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the loop that runs has ended, unless it is what calls.

        In trio's thread, where a signal handler may call ``shutdown()``, the loop is only
        told to end: what handles a request may wait for trio.

        Returns:
            Whether it has. (The next may have begun at once.)
        """
        with self._changed:
            if self._running_in in (None, threading.get_ident()):
                return self._running_in is None
            before = self._ended
            self._wake_loop()
            if timeout is not None:
                return self._changed.wait_for(lambda: self._ended > before, timeout)
            if threading.get_ident() == self._trio_thread:
                self._knock()
                return False
            if not self._changed.wait_for(lambda: self._ended > before, KNOCK_AFTER):
                self._knock()
            return self._changed.wait_for(lambda: self._ended > before)


class ServingThread:
    """What the serving thread and its hooks work with.

    Args:
        server: the server.
        start_request: hands a request on to a thread of its own; called in any thread.
        join_requests: waits for those threads; called in any thread.
        note_idle: called in the serving thread, while stopping, when ``handling`` ends.

    Attributes:
        stopping: whether the server has been told to stop, by cancellation.
        handling: whether the serving thread handles a request itself.
        accepting: whether it is about to accept a connection.
        has_asked: whether it takes a request that a select() of ours, or of a loop that
            calls ours, has found.
        told: set when the server's own ``shutdown()`` has returned.
        closed: set when its ``server_close()`` has.
    """

    def __init__(
        self,
        server: Any,
        start_request: Callable[[Any, Any], object],
        join_requests: Callable[[], object],
        note_idle: Callable[[], object],
    ) -> None:
        self._server = server
        self.start_request = start_request
        self.join_requests = join_requests
        self.note_idle = note_idle
        # Alive as long as a socket of theirs.
        self._wakers: weakref.WeakSet[Waker] = weakref.WeakSet()
        self._wakers_lock = threading.Lock()
        self._accepted: list[Waker] = []
        self._errors = AcceptErrors(time.monotonic)
        self._defers = False
        self._waker, self._alarm = socket.socketpair()
        self._waker.setblocking(False)
        self._alarm.setblocking(False)
        self.stopping = False
        self.handling = False
        self.accepting = False
        self.has_asked = False
        self.told = threading.Event()
        self.closed = threading.Event()

    # -- called in trio's thread -----------------------------------------------------

    @contextmanager
    def adopted(self) -> Generator[None]:
        """Make the server's class ours for the length of the block, and no longer."""
        server, theirs = self._server, type(self._server)
        is_shut_down = getattr(server, IS_SHUT_DOWN)
        with self._waker, self._alarm, self._listener_adopted():
            if _Loop in theirs.__mro__:
                raise RuntimeError(f"{server!r} is being served already")
            remember_server(server)
            ours = _adopting_class(theirs, self)
            try:
                setattr(server, IS_SHUT_DOWN, Stopped(self.wake_loop, self.knock))
                server.__class__ = ours
                yield
            finally:
                server.__class__ = theirs
                setattr(server, IS_SHUT_DOWN, is_shut_down)
                setattr(server, SHUTDOWN_REQUEST, False)
                # Whoever has waited since before we came.
                is_shut_down.set()

    @contextmanager
    def _listener_adopted(self) -> Generator[None]:
        listener: Any = getattr(self._server, "socket", None)
        if not isinstance(listener, socket.socket):
            yield
            return
        tls: Any = listener if isinstance(listener, ssl.SSLSocket) else None
        self._defers = defers = tls is not None and self._can_defer()
        theirs = type(listener)
        listener.__class__ = _listener_class(theirs, self)
        if defers:
            handshakes = tls.do_handshake_on_connect
            tls.do_handshake_on_connect = False
        try:
            yield
        finally:
            listener.__class__ = theirs
            if defers:
                tls.do_handshake_on_connect = handshakes

    def _can_defer(self) -> bool:
        """Tell whether a TLS handshake can be left to the request's own thread.

        Then a client that is silent keeps only itself waiting. But ``verify_request()`` may
        want to know who the client is.
        """
        theirs, base = type(self._server), socketserver.BaseServer
        return (
            theirs.process_request is not base.process_request
            and theirs.verify_request is base.verify_request
        )

    def wake_loop(self) -> None:
        """Make the loop look whether it is to stop; callable in any thread."""
        with contextlib.suppress(OSError):  # Full: it is awake. Closed: there is none.
            self._alarm.send(b"\0")

    def stop(self) -> None:
        """Make the loop, and every thread that waits for a client, return."""
        self.stopping = True
        setattr(self._server, SHUTDOWN_REQUEST, True)
        self.wake_loop()
        self.wake_sockets()

    def wake_sockets(self) -> None:
        """Make every thread return that waits for a client."""
        with self._wakers_lock:
            wakers = list(self._wakers)
        for waker in wakers:
            waker.wake()

    def knock(self) -> None:
        """End an accept() that waits, because another process has been faster than it.

        A connection is all that it returns for. (Closing the socket would not wake it, and
        making it non-blocking would do so for the other process too.)
        """
        if self.accepting:
            self.knock_at_once()

    def knock_at_once(self) -> None:
        """Do the same for a loop of its own, which may wait in a select() of its own.

        That one closing does not wake either. What comes round to take the visitor waits
        for the closing, see `wait_closed`.
        """
        listener = getattr(self._server, "socket", None)
        if not isinstance(listener, socket.socket):
            return
        with (
            # It is closed already; or there is nothing to knock with, and closing goes on.
            contextlib.suppress(OSError),
            socket.socket(listener.family, listener.type) as visitor,
        ):
            visitor.setblocking(False)
            visitor.connect_ex(listener.getsockname())
            if listener.type == socket.SOCK_DGRAM:
                visitor.send(b"")

    # -- called in the serving thread ------------------------------------------------

    def waker_of_request(self, request: object) -> Waker | None:
        """Return what wakes a request, if it is a connection."""
        if isinstance(request, socket.socket) and request.type == socket.SOCK_STREAM:
            return self.waker(request)
        return None

    def waker(self, connection: socket.socket) -> Waker:
        """Take note of a connection that a handler may wait for; return what wakes it."""
        waker = waker_of(connection)
        with self._wakers_lock:
            self._wakers.add(waker)
        if self.stopping:
            waker.wake()
        return waker

    def wait_closed(self) -> bool:
        """Where nothing is to be taken any more, wait until nothing can be.

        A loop that goes on after ``shutdown()`` would else be waiting for a request again
        when the socket is closed, which does not wake it.

        Returns:
            Whether that is so.
        """
        return self.stopping and self.told.is_set() and self.closed.wait()

    def accepted(self, connection: socket.socket) -> None:
        """Take note of what the listening socket has accepted, if get_request() waits."""
        self._accepted.append(self.waker(connection))

    def loop(self, poll_interval: float | None) -> None:
        """Do what the base class's `serve_forever()` does, but wake up when told."""
        server = self._server
        getattr(server, IS_SHUT_DOWN).clear()
        try:
            with SELECTOR() as selector:
                selector.register(server, selectors.EVENT_READ)
                selector.register(self._waker, selectors.EVENT_READ)
                while not self._is_to_stop():
                    ready = self._select(selector, poll_interval)
                    if self._is_to_stop():
                        break
                    if server in ready:
                        server._handle_request_noblock()
                        self._back_off()
                    server.service_actions()
        finally:
            setattr(server, SHUTDOWN_REQUEST, False)
            getattr(server, IS_SHUT_DOWN).set()

    def _select(self, selector: selectors.BaseSelector, timeout: float | None) -> list[Any]:
        ready: list[Any] = [key.fileobj for key, _ in selector.select(timeout)]
        if self._waker in ready and not self.stopping:
            # Several threads may be here. Who stops wakes them all, so that stays.
            with contextlib.suppress(BlockingIOError):
                self._waker.recv(4096)
        return ready

    def _is_to_stop(self) -> bool:
        return self.stopping or getattr(self._server, SHUTDOWN_REQUEST)

    def _back_off(self) -> None:
        """Pause after a shortage of descriptors, unless it is time to stop."""
        if self._errors.delay:
            with SELECTOR() as selector:
                selector.register(self._waker, selectors.EVENT_READ)
                self._select(selector, self._errors.delay)

    def handle_request(self) -> None:
        """Do what the base class's `handle_request()` does, but wake up when told."""
        server = self._server
        if self.stopping and not self.told.is_set():
            # The loop may have looked at its flag just before shutdown() sets it.
            self.told.wait(FLAG_GRACE)
            return
        if self.stopping:
            # A loop of its own that shutdown() does not stop; closing the socket will.
            self.closed.wait()
        timeout = server.socket.gettimeout()
        if timeout is None:
            timeout = server.timeout
        elif server.timeout is not None:
            timeout = min(timeout, server.timeout)
        with SELECTOR() as selector:
            selector.register(server, selectors.EVENT_READ)
            selector.register(self._waker, selectors.EVENT_READ)
            ready = self._select(selector, timeout)
        if self.stopping:
            # For the flag that shutdown() sets, if it does; it may wait for us to return.
            self.told.wait(FLAG_GRACE)
        elif server in ready:
            server._handle_request_noblock()
            self._back_off()
        elif not ready:
            server.handle_timeout()

    def secures(self, connection: object) -> bool:
        """Make up for a TLS handshake that was put off; in the request's own thread.

        Returns:
            Whether to go on. If not, the connection is closed.
        """
        if not (self._defers and isinstance(connection, ssl.SSLSocket)):
            return True
        try:
            connection.do_handshake()
        except OSError:
            # As in accept(), where it was, the server does not hear of it.
            self._server.shutdown_request(connection)
            return False
        return True

    def handle_one(self) -> None:
        """Take one request and pass it on to the server's hooks.

        In the base class an exception of ``verify_request()``, and one that is no
        `Exception`, ends the server and leaves the connection open.
        """
        server = self._server
        self.has_asked = True
        try:
            request, client_address = server.get_request()
        except OSError as error:
            self._release_accepted()
            if server.fileno() != -1 or not self._is_to_stop():
                self._errors.failed(error)
            return
        except BaseException:
            self._release_accepted()
            raise
        finally:
            self.has_asked = False
        self._errors.succeeded()
        waker = self._claim(request)
        self.handling = True
        try:
            with self.contained(client_address):
                handed_on = False
                try:
                    if server.verify_request(request, client_address):
                        server.process_request(request, client_address)
                        handed_on = True
                except Exception:
                    server.handle_error(request, client_address)
                finally:
                    if not handed_on:
                        server.shutdown_request(request)
        finally:
            self.handling = False
            if self.stopping:
                self.note_idle()
            if waker is not None and self._is_serial():
                waker.release()

    def _release_accepted(self) -> None:
        accepted, self._accepted = self._accepted, []
        for waker in accepted:
            waker.release()

    def _claim(self, request: object) -> Waker | None:
        """Return what wakes the request; it may be, or wrap, what has been accepted."""
        accepted, self._accepted = self._accepted, []
        waker = self.waker_of_request(request)
        for other in accepted:
            if waker is None:
                waker = other
            elif other is not waker:
                other.release()
        if waker is not None:
            # Where we do not learn of a request's end, nothing of ours may put it off.
            waker.follows = self._is_serial()
        return waker

    def _is_serial(self) -> bool:
        base = socketserver.BaseServer.process_request
        return bool(type(self._server).process_request is base)

    @contextmanager
    def contained(self, client_address: Any) -> Generator[None]:
        """Let an exception end one request, and not the server."""
        try:
            yield
        except trio.Cancelled:
            raise
        except Exception as error:
            log_error(error, "exception while serving a request of %r", client_address)
        except BaseException as error:
            message = "%s(%s) has ended a request of %r"
            log(logging.WARNING, message, type(error).__name__, error, client_address)


class _Loop(socketserver.BaseServer):
    """What replaces the base class's loop."""

    _serving: ClassVar[ServingThread]

    def serve_forever(self, poll_interval: float | None = 0.5) -> None:
        self._serving.loop(poll_interval)

    def handle_request(self) -> None:
        self._serving.handle_request()

    def _handle_request_noblock(self) -> None:
        self._serving.handle_one()

    def handle_error(self, request: Any, client_address: Any) -> None:
        # How a thread ends that we have woken is no error.
        if not self._serving.stopping:
            super().handle_error(request, client_address)


class _Threads(socketserver.ThreadingMixIn):
    """What replaces the mix-in's threads."""

    _serving: ClassVar[ServingThread]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._serving.start_request(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        # Here, because an override may close after it what handlers use.
        self._serving.join_requests()


class _Datagrams(socketserver.UDPServer):
    """What replaces the datagram servers' receiving."""

    _serving: ClassVar[ServingThread]

    def get_request(self) -> Any:
        size, serving = self.max_packet_size, self._serving
        if serving.has_asked:
            serving.wait_closed()
            # What made the socket readable may be gone: taken by who shares it, or damaged.
            data, client_address = self.socket.recvfrom(size, DONTWAIT)
            return (data, self.socket), client_address
        # A loop of its own waits here.
        data, client_address = self.socket.recvfrom(size)
        if serving.wait_closed():
            data, client_address = self.socket.recvfrom(size)  # Which is an error now.
        return (data, self.socket), client_address


_SHIMS: list[type] = [_Threads, _Datagrams, _Loop]

if hasattr(os, "fork"):

    class _Children(socketserver.ForkingMixIn):
        """What the mix-in's children do first."""

        _serving: ClassVar[ServingThread]

        def finish_request(  # pragma: no cover (in forked children)
            self, request: Any, client_address: Any
        ) -> None:
            # The parent's handlers would have the child wait for a trio that is not there.
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._serving.secures(request):
                super().finish_request(request, client_address)  # type: ignore[misc]

    _SHIMS.insert(0, _Children)


def _adopting_class(theirs: type, serving: ServingThread) -> Any:
    ours = [shim for shim in _SHIMS if issubclass(theirs, shim.__bases__)]
    return generated_class(theirs, {"_serving": serving}, tuple(ours))


def _listener_class(theirs: type[socket.socket], serving: ServingThread) -> type:
    """Return a class whose ``accept()`` tells of every connection at once."""

    class Accepting(socket.socket):
        __slots__ = ()

        def accept(self) -> tuple[socket.socket, Any]:
            if self.gettimeout() is None:  # Else it comes round by itself.
                serving.wait_closed()
            serving.accepting = True
            try:
                connection, address = super().accept()
            finally:
                serving.accepting = False
            serving.accepted(connection)
            return connection, address

    # Behind theirs: a TLS socket's accept() calls this one, and then shakes hands.
    namespace = {"__slots__": (), "__module__": theirs.__module__}
    bases = (Accepting,) if theirs is socket.socket else (theirs, Accepting)
    return type(theirs.__name__, bases, namespace)
