"""What the tests of `serve_blocking` share.

Old servers are served for the length of a block, by `served`. At its end `given_back` looks
whether the caller's object is what it was before. Every wait of a handler is bounded, so a
server that stops too late makes a test fail, and never hang.
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import threading
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, connect, receive, receive_until_closed

from trio_socketserver import _stdlib_servers, serve_blocking

LOOPBACK = ("127.0.0.1", 0)

NEVER = 3600.0
"""Seconds of a poll interval that no test lives to see: what happens, needs no polling."""

PROMPTLY = REAL_LIMIT / 4
"""Seconds: much, and yet less than clients and handlers wait."""

PARKED = b"parked"
"""What a handler sends when it is about to wait for its peer."""


class Serial:
    """Stands where other servers have their mix-in."""


MIXINS: dict[str, type] = {
    "serial": Serial,
    "threading": socketserver.ThreadingMixIn,
    "forking": socketserver.ForkingMixIn,
}

each_dispatcher = pytest.mark.parametrize("mixin", MIXINS.values(), ids=MIXINS)

each_in_process = pytest.mark.parametrize(
    "mixin", [Serial, socketserver.ThreadingMixIn], ids=["serial", "threading"]
)
"""The dispatchers whose handlers share this process, so that a test can look on."""

forks_with_threads = pytest.mark.filterwarnings(
    "ignore:.*is multi-threaded, use of fork:DeprecationWarning"
)
"""That is what a forking server is, whoever serves it."""


def make(handler: Any, *bases: type, address: Any = LOOPBACK, **attributes: Any) -> Any:
    """Return a server of a class made of *bases*, TCP's if none of them brings a socket.

    Args:
        handler: its ``RequestHandlerClass``.
        *bases: of its class, the first in front.
        address: where it is bound.
        **attributes: of its class: overrides, say.
    """
    if not any(issubclass(base, socketserver.BaseServer) for base in bases):
        bases = (*bases, socketserver.TCPServer)
    return type("OldServer", bases, attributes)(address, handler)


# -- handlers ------------------------------------------------------------------------------


def echo(request: socket.socket, client_address: Any, server: Any) -> None:
    """Handle a connection by sending back what comes."""
    while data := request.recv(65536):
        request.sendall(data)


def park(request: socket.socket, client_address: Any, server: Any) -> None:
    """Handle a connection by waiting for a peer that says nothing."""
    request.sendall(PARKED)
    request.recv(1)


def wait_for(event: threading.Event) -> None:
    """Wait in a thread for *event*, which must be set some time."""
    assert event.wait(REAL_LIMIT)


# -- serving -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file has this fixture, nothing ends because `serve_blocking` gives it up."""
    monkeypatch.setattr(_stdlib_servers, "SHUTDOWN_TIMEOUT", NEVER)


@contextlib.contextmanager
def given_back(
    server: Any, *, closes: int = 1, changes: Collection[str] = ()
) -> Iterator[None]:
    """Check that the block leaves *server* as it was, and closed.

    Args:
        server: a server that has not served yet.
        closes: how often ``server_close()`` is to be called.
        changes: attributes that the server's own code changes.
    """
    own_class = type(server)
    closed = 0

    def server_close(self: Any) -> None:
        nonlocal closed
        closed += 1
        super(counting, self).server_close()

    counting = type(own_class.__name__, (own_class,), {"server_close": server_close})
    server.__class__ = counting
    before = dict(vars(server))
    stopped = server._BaseServer__is_shut_down
    if isinstance(server, socketserver.ForkingMixIn):
        changes = {*changes, "active_children"}
    yield
    assert type(server) is counting
    server.__class__ = own_class
    after = dict(vars(server))
    for name in changes:
        before.pop(name, None)
        after.pop(name, None)
    assert after.keys() == before.keys()
    changed = [name for name, value in after.items() if value is not before[name]]
    assert not changed
    assert type(stopped) is threading.Event
    assert server._BaseServer__is_shut_down is stopped
    assert stopped.is_set()
    assert server._BaseServer__shutdown_request is False
    assert closed == closes
    assert server.socket.fileno() == -1


class Serving:
    """A server that is being served.

    Attributes:
        server: the server.
        address: what `serve_blocking` has said to `trio.Nursery.start`.
        ended: set when `serve_blocking` has ended.
        cancelled: whether it has ended by cancellation.
    """

    def __init__(self, server: Any) -> None:
        self.server = server
        self.address: Any = None
        self.ended = trio.Event()
        self.cancelled = False
        self._scope = trio.CancelScope()

    async def run(self, *, task_status: trio.TaskStatus[Any]) -> None:
        with self._scope:
            await serve_blocking(self.server, task_status=task_status)
        self.cancelled = self._scope.cancelled_caught
        self.ended.set()

    def cancel(self) -> None:
        self._scope.cancel()

    async def stop(self) -> float:
        """Cancel `serve_blocking`, wait for its end, and return the seconds it took."""
        begin = trio.current_time()
        self.cancel()
        await self.ended.wait()
        assert self.cancelled
        return trio.current_time() - begin

    async def has_stopped(self) -> bool:
        """Cancel `serve_blocking`, and tell whether it ends by and by."""
        self.cancel()
        with trio.move_on_after(PROMPTLY):
            await self.ended.wait()
        return self.ended.is_set()

    async def shut_down(self) -> None:
        """Call the server's ``shutdown()`` in a thread, and wait for the end."""
        await in_thread(self.server.shutdown)
        await self.ended.wait()
        assert not self.cancelled


@contextlib.asynccontextmanager
async def served(
    server: Any, *, closes: int = 1, changes: Collection[str] = ()
) -> AsyncIterator[Serving]:
    """Serve *server* for the length of the block, then cancel it and see `given_back`."""
    serving = Serving(server)
    with given_back(server, closes=closes, changes=changes):
        async with trio.open_nursery() as nursery:
            serving.address = await nursery.start(serving.run)
            try:
                yield serving
            finally:
                serving.cancel()


# -- clients -------------------------------------------------------------------------------

_OUTSIDE = trio.CapacityLimiter(400)  # So that the program's own limiter is left alone.


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Run blocking code of a test's in a thread; being cancelled, leave it there."""
    return await trio.to_thread.run_sync(
        function, *args, abandon_on_cancel=True, limiter=_OUTSIDE
    )


async def happens(event: threading.Event) -> None:
    """Wait for an event that is set in a thread."""
    await in_thread(wait_for, event)


async def ends(*threads: threading.Thread) -> None:
    """Wait for threads that have been abandoned, which nothing tells of.

    Those of trio's get their idle name back, and stay for a while.
    """
    while any(
        thread.is_alive() and not thread.name.startswith("Trio thread")
        for thread in threads
    ):
        await trio.sleep(0.001)


@contextlib.asynccontextmanager
async def client_of(server: Any) -> AsyncIterator[socket.socket]:
    """Yield a plain socket that is connected to *server*."""
    with await in_thread(connect, server.server_address) as client:
        yield client


@contextlib.asynccontextmanager
async def parked_client(server: Any) -> AsyncIterator[socket.socket]:
    """Yield a plain socket whose handler has sent `PARKED`."""
    async with client_of(server) as client:
        assert await receive_exactly(client, len(PARKED)) == PARKED
        yield client


async def receive_exactly(client: socket.socket, size: int) -> bytes:
    """Receive *size* bytes, or fewer if the peer closes before."""
    received = b""
    while len(received) < size and (chunk := await receive(client, size - len(received))):
        received += chunk
    return received


async def ask_stream(server: Any, question: bytes = b"") -> bytes:
    """Be a whole blocking client in a thread: send, end, and receive to the end."""

    def client() -> bytes:
        with connect(server.server_address) as sock:
            sock.sendall(question)
            with contextlib.suppress(OSError):  # Who is refused may be so before.
                sock.shutdown(socket.SHUT_WR)
            return receive_until_closed(sock)

    return await in_thread(client)


def process_exists(pid: int) -> bool:
    """Tell whether there is a process *pid*, a zombie included."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
