"""What the tests of faults share: the worlds that a handler runs in, and broken parts.

A *world* is a dispatcher with a handler of one colour. In each of them the handler greets
with `GREETING` and echoes lines, so that one test text serves all of them. After each fault
comes `assert_serves`: a fresh client, that is served at once.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, assert_sums_up, connect, receive, receive_to_end

from trio_socketserver import (
    DatagramRequestHandler,
    ForkingTCPServer,
    ForkingUDPServer,
    NurseryTCPServer,
    NurseryUDPServer,
    StreamRequestHandler,
    ThreadingTCPServer,
    ThreadingUDPServer,
)
from trio_socketserver._sockets import ListeningSocket

LOCALHOST = ("127.0.0.1", 0)

forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
"""For a whole module: a forking server has the threads of trio beside it."""

GREETING = b"hello\n"

MUCH = bytes(20_000_000)
"""More than the buffers of both ends hold."""

PLACES_OF_HANDLERS = ("constructor", "setup", "handle", "finish")


# -- handlers that greet and echo lines ----------------------------------------------------
#
# Where the server has a `reach()`, they tell it where they are, and it may raise.


class AsyncStream(StreamRequestHandler):
    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        super().__init__(request, client_address, server)
        server.reach("constructor")

    async def setup(self) -> None:
        await super().setup()
        self.server.reach("setup")

    async def handle(self) -> None:
        await self.wfile.write(GREETING)
        async for line in self.rfile:
            await self.wfile.write(MUCH if line == b"much\n" else line)
            self.server.reach("handle")

    async def finish(self) -> None:
        await super().finish()
        self.server.reach("finish")


class BlockingStream(socketserver.StreamRequestHandler):
    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        server.reach("constructor")
        super().__init__(request, client_address, server)

    def setup(self) -> None:
        super().setup()
        self.server.reach("setup")  # type: ignore[attr-defined]

    def handle(self) -> None:
        self.wfile.write(GREETING)
        for line in self.rfile:
            self.wfile.write(MUCH if line == b"much\n" else line)
            self.server.reach("handle")  # type: ignore[attr-defined]

    def finish(self) -> None:
        super().finish()
        self.server.reach("finish")  # type: ignore[attr-defined]


class AsyncDatagram(DatagramRequestHandler):
    async def handle(self) -> None:
        self.wfile.write(reply_to(self.packet))


class BlockingDatagram(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(reply_to(self.packet))


def reply_to(packet: bytes) -> bytes:
    """Return what the datagram handlers reply: the packet, or too much."""
    return bytes(65_536) if packet == b"much" else packet


# -- worlds --------------------------------------------------------------------------------


class Reached:
    """Mixed into a server: it raises ``error`` at ``place``, once in each process."""

    place = ""
    error: BaseException | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.errors: list[BaseException | None] = []

    def reach(self, place: str) -> None:
        if place == self.place and self.error is not None:
            error, self.error = self.error, None
            raise error

    async def handle_error(self, request: Any, client_address: Any) -> None:
        self.errors.append(sys.exception())
        await super().handle_error(request, client_address)  # type: ignore[misc]


@dataclass(frozen=True)
class World:
    """A dispatcher, and a handler of one colour."""

    name: str
    server_class: Any
    handler: Any

    @property
    def is_blocking(self) -> bool:
        return self.name.endswith("blocking")

    @property
    def forks(self) -> bool:
        return self.name.startswith("forking")

    def make(self, *mixins: type, address: Any = LOCALHOST, **attributes: Any) -> Any:
        """Return a server whose class has *attributes*."""
        bases = (*mixins, Reached, self.server_class)
        own_class: Any = type(self.server_class.__name__, bases, attributes)
        return own_class(address, self.handler)


STREAM_WORLDS = (
    World("nursery", NurseryTCPServer, AsyncStream),
    World("threading-async", ThreadingTCPServer, AsyncStream),
    World("threading-blocking", ThreadingTCPServer, BlockingStream),
    World("forking-async", ForkingTCPServer, AsyncStream),
    World("forking-blocking", ForkingTCPServer, BlockingStream),
)
DATAGRAM_WORLDS = (
    World("nursery", NurseryUDPServer, AsyncDatagram),
    World("threading-async", ThreadingUDPServer, AsyncDatagram),
    World("threading-blocking", ThreadingUDPServer, BlockingDatagram),
    World("forking-async", ForkingUDPServer, AsyncDatagram),
    World("forking-blocking", ForkingUDPServer, BlockingDatagram),
)


def name_of(world: World) -> str:
    """Name the parameter of a test."""
    return world.name


def each(worlds: Iterable[World]) -> Any:
    """Run a test in each of *worlds*."""
    return pytest.mark.parametrize("world", list(worlds), ids=name_of)


in_each_world = each(STREAM_WORLDS)
in_each_datagram_world = each(DATAGRAM_WORLDS)


@contextlib.asynccontextmanager
async def within_real_time() -> AsyncIterator[None]:
    """Fail a block that hangs, whatever clock trio has."""
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        timer = threading.Timer(REAL_LIMIT, token.run_sync_soon, [scope.cancel])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
    assert not scope.cancelled_caught, "it hangs"


# -- clients -------------------------------------------------------------------------------


async def greeted(server: Any) -> socket.socket:
    """Return a plain client that has been greeted."""
    client = connect(server.server_address)
    try:
        assert await receive_exactly(client, len(GREETING)) == GREETING
    except BaseException:
        client.close()
        raise
    return client


async def receive_exactly(client: socket.socket, size: int) -> bytes:
    """Receive *size* bytes, or fewer if the peer closes before."""
    received = b""
    while len(received) < size and (chunk := await receive(client, size - len(received))):
        received += chunk
    return received


async def assert_echoes(client: socket.socket, line: bytes = b"ping\n") -> None:
    """The client's handler is there and well."""
    client.sendall(line)
    assert await receive_exactly(client, len(line)) == line


async def assert_says_goodbye(client: socket.socket) -> None:
    """The client's handler ends when its client has nothing more to say.

    Closing would not tell it: a child of this process may hold the client's socket too.
    """
    client.shutdown(socket.SHUT_WR)
    assert await receive_to_end(client) == b""


async def assert_serves(server: Any) -> None:
    """A fresh client is served, from greeting to goodbye."""
    with await greeted(server) as client:
        await assert_echoes(client)
        await assert_says_goodbye(client)


async def assert_answers(server: Any) -> None:
    """A fresh client of a datagram server is answered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(server.server_address)
        client.send(b"ping")
        assert await receive(client) == b"ping"


async def comes_true(condition: Callable[[], object]) -> None:
    """Wait for what a thread or a child is about to do, on whatever clock trio has."""
    while not condition():
        await trio.to_thread.run_sync(time.sleep, 0.001)


async def all_ended(server: Any) -> None:
    """Wait until no request is active."""
    await comes_true(lambda: server.statistics().active == 0)
    assert_sums_up(server)


_libc = ctypes.CDLL(None, use_errno=True)


def reset(client: socket.socket) -> None:
    """Reset a TCP connection now, even if another process holds its socket too."""
    # connect() to the family AF_UNSPEC; Python has no address for it.
    if _libc.connect(client.fileno(), bytes(16), 16):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# -- broken parts --------------------------------------------------------------------------


class Fault:
    """What `failing` makes the server's socket do.

    Attributes:
        errors: what accept() or recvfrom() raises next.
        attempts: when it was called, on trio's clock.
    """

    def __init__(self) -> None:
        self.errors: collections.deque[BaseException] = collections.deque()
        self.attempts: list[float] = []

    def take(self) -> None:
        self.attempts.append(trio.current_time())
        if self.errors:
            raise self.errors.popleft()


def failing(server: Any) -> Fault:
    """Make the system calls of *server*'s socket fail, as told by what is returned."""

    class Failing(ListeningSocket):
        __slots__ = ()

        def accept(self) -> Any:
            fault.take()
            return super().accept()

        def recvfrom(self, *arguments: Any) -> Any:
            fault.take()
            return super().recvfrom(*arguments)

    fault = Fault()
    server.socket.__class__ = Failing
    return fault


@contextlib.contextmanager
def sendto_fails(error: OSError) -> Iterator[None]:
    """Let every sendto() of this process, and of children made meanwhile, fail."""

    def sendto(sock: Any, *arguments: Any) -> int:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "sendto", sendto, raising=False)
        yield
