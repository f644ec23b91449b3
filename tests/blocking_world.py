"""What the tests of blocking handlers under servers of ours share."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import socket
import socketserver
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import PARKED, in_thread, receive_exactly, wait_for
from helpers import REAL_LIMIT, bind_address, class_name, connect
from trio.testing import MockClock

from trio_socketserver import (
    TCPServer,
    ThreadingTCPServer,
    ThreadingUDPServer,
    ThreadingUnixDatagramServer,
    ThreadingUnixStreamServer,
    UDPServer,
    UnixDatagramServer,
    UnixStreamServer,
)
from trio_socketserver._workers import call_trio

PLAIN_STREAM = (TCPServer, UnixStreamServer)
PLAIN_DATAGRAM = (UDPServer, UnixDatagramServer)
THREADING_STREAM = (ThreadingTCPServer, ThreadingUnixStreamServer)
THREADING_DATAGRAM = (ThreadingUDPServer, ThreadingUnixDatagramServer)


def _each(*server_classes: type) -> Any:
    return pytest.mark.parametrize("server_class", server_classes, ids=class_name)


each_plain_server = _each(*PLAIN_STREAM, *PLAIN_DATAGRAM)
each_threading_server = _each(*THREADING_STREAM, *THREADING_DATAGRAM)
each_server = _each(*PLAIN_STREAM, *PLAIN_DATAGRAM, *THREADING_STREAM, *THREADING_DATAGRAM)
each_stream_server = _each(*PLAIN_STREAM, *THREADING_STREAM)
each_datagram_server = _each(*PLAIN_DATAGRAM, *THREADING_DATAGRAM)
sequential_and_threading = _each(TCPServer, ThreadingTCPServer)

PATIENCE = REAL_LIMIT / 4
"""Seconds that servers here are patient for, on a clock that is moved on by a test."""


@pytest.fixture
def clock() -> MockClock:
    """A clock that runs as real ones do, and can be moved on."""
    return MockClock(rate=1.0)


def make(server_class: Any, handler: Any, folder: Path, **attributes: Any) -> Any:
    """Return a server of a subclass of *server_class*.

    It has `errors`, of what `handle_error` has seen, and `notes` and `finished` for its
    handlers.
    """

    async def handle_error(self: Any, request: Any, client_address: Any) -> None:
        self.errors.append(sys.exception())

    namespace = {"handle_error": handle_error, **attributes}
    own_class = type(server_class.__name__, (server_class,), namespace)
    server: Any = own_class(bind_address(server_class, folder), handler)
    server.errors = []
    server.notes = []
    server.finished = threading.Event()
    return server


@contextlib.asynccontextmanager
async def serving(server: Any) -> AsyncIterator[trio.Nursery]:
    """Have *server* entered and serving for the length of the block, then shut it down."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield nursery
        await server.shutdown()


async def parked(server: Any) -> socket.socket:
    """Return a plain socket whose handler has sent `PARKED`."""
    client = connect(server.server_address)
    assert await receive_exactly(client, len(PARKED)) == PARKED
    return client


async def converse(server: Any, *words: bytes) -> list[bytes]:
    """Be a whole blocking client in a thread: say each word, and hear the answer to it."""

    def client() -> list[bytes]:
        answers = []
        with connect(server.server_address) as sock:
            for word in words:
                sock.sendall(word)
                answers.append(sock.recv(65536))
        return answers

    answers: list[bytes] = await in_thread(client)
    return answers


async def is_true(condition: Callable[[], bool]) -> None:
    """Wait for what a thread is about to do, and nothing tells of."""
    while not condition():
        await trio.sleep(0.001)


def identity(sock: socket.socket) -> tuple[int, int]:
    """Tell what the descriptor of *sock* stands for."""
    status = os.fstat(sock.fileno())
    return status.st_dev, status.st_ino


class Noting(socketserver.StreamRequestHandler):
    """Sends `PARKED`, then does what a subclass does in ``stall()``; notes how it ends."""

    def handle(self) -> None:
        before = identity(self.request)
        self.wfile.write(PARKED)
        try:
            self.stall()
        finally:
            note = identity(self.request) == before, type(sys.exception())
            self.server.notes.append(note)

    def stall(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        self.server.notes.append("finished")
        self.server.finished.set()
        super().finish()


class Sleeping(Noting):
    """A handler that does not wait for its peer, and so is not woken."""

    def stall(self) -> None:
        wait_for(self.server.awake)


class Release:
    """An event for `Sleeping`, in a block that sets it whatever happens."""

    def __init__(self, server: Any) -> None:
        server.awake = self.event = threading.Event()

    def __enter__(self) -> threading.Event:
        return self.event

    def __exit__(self, *exc_info: object) -> None:
        self.event.set()


@contextlib.asynccontextmanager
async def no_more_threads(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Let no thread start; also use up those that trio keeps for its next call."""
    let_go = threading.Event()

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    limiter = trio.CapacityLimiter(math.inf)
    refused = trio.Event()

    async def keep() -> None:
        try:
            await trio.to_thread.run_sync(wait_for, let_go, limiter=limiter)
        except RuntimeError:
            refused.set()

    async with trio.open_nursery() as nursery:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            while not refused.is_set():
                nursery.start_soon(keep)
                await trio.lowlevel.checkpoint()
            try:
                yield
            finally:
                let_go.set()


class AtHost(trio.abc.Instrument):
    """Calls *action* before the first step of a worker's host."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if self.action and task.name == "worker thread":
            action, self.action = self.action, None
            action()

    def __enter__(self) -> None:
        trio.lowlevel.add_instrument(self)

    def __exit__(self, *exc_info: object) -> None:
        trio.lowlevel.remove_instrument(self)


def calling_trio() -> Callable[..., Any]:
    """Return what calls the current trio run from any thread."""
    return functools.partial(call_trio, trio.lowlevel.current_trio_token())
