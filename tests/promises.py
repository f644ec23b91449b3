"""What several of the promise tests need; the promises are numbered as in the design.

Promise 4 is about threads, see test_blocking_cancellation; 5 about child processes, which
come in a later release.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    DATAGRAM_SERVERS,
    STREAM_SERVERS,
    class_name,
    connect,
    datagram_client,
    receive,
    receive_to_end,
)
from trio.lowlevel import checkpoint

from trio_socketserver import (
    DatagramRequestHandler,
    NurseryTCPServer,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)

LOCALHOST = ("127.0.0.1", 0)
ALL_SERVERS = STREAM_SERVERS + DATAGRAM_SERVERS


each_server = pytest.mark.parametrize("server_class", ALL_SERVERS, ids=class_name)
each_stream_server = pytest.mark.parametrize("server_class", STREAM_SERVERS, ids=class_name)
each_tcp_server = pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer], ids=class_name
)


async def do_nothing(request: Any, client_address: Any, server: Any) -> None:
    """A handler."""


@contextlib.contextmanager
def instrumented(instrument: trio.abc.Instrument) -> Iterator[None]:
    trio.lowlevel.add_instrument(instrument)
    try:
        yield
    finally:
        trio.lowlevel.remove_instrument(instrument)


def records(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """What has been logged: level and first line."""
    return [(record.levelname, record.getMessage()) for record in caplog.records]


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_socketserver")


async def serve(server: Any) -> None:
    """Enter the server, and serve until something ends it."""
    async with server:
        await server.serve_forever()


@contextlib.asynccontextmanager
async def serving(server: Any) -> AsyncIterator[None]:
    """Enter the server, serve in a task beside the block, and shut down after it."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield
        await server.shutdown()


class AtStep(trio.abc.Instrument):
    """Calls *action* before the step that follows *count* steps of the tasks watched."""

    def __init__(self, count: int, action: Callable[[], None], server: Any) -> None:
        self.count = count
        self.action = action
        self.server = server
        self.fired = False
        self.unwatched: set[trio.lowlevel.Task] = set()
        self.seen_active: set[int] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.seen_active.add(self.server.statistics().active)
        if self.fired or task in self.unwatched:
            return
        if not self.count:
            self.fired = True
            self.action()
        self.count -= 1


def noting_handler(base: type[Any], log: list[str]) -> type[Any]:
    """Make a handler with something to wait for in each phase, which notes them."""

    class Handler(base):  # type: ignore[misc]
        async def setup(self) -> None:
            await checkpoint()
            await super().setup()
            await checkpoint()
            log.append("set up")

        async def handle(self) -> None:
            if base is DatagramRequestHandler:
                self.wfile.write(self.rfile.read())
            else:
                async for line in self.rfile:
                    await self.wfile.write(line)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(checkpoint)
                nursery.start_soon(checkpoint)
            log.append("handled")

        async def finish(self) -> None:
            log.append("finish begins")
            await checkpoint()
            await super().finish()
            await checkpoint()
            log.append("finished")

    return Handler


async def converse(
    client: socket.socket,
    task_status: trio.TaskStatus[trio.lowlevel.Task] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Send two lines, each after the answer to the one before; then wait for the end."""
    task_status.started(trio.lowlevel.current_task())
    with contextlib.suppress(ConnectionError):
        for line in (b"one\n", b"two\n"):
            client.sendall(line)
            if await receive(client) != line:
                break
        else:
            client.shutdown(socket.SHUT_WR)
            await receive_to_end(client)
            return
    await receive_to_end(client)


async def talk_datagrams(
    client: socket.socket,
    task_status: trio.TaskStatus[trio.lowlevel.Task] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Send one datagram."""
    task_status.started(trio.lowlevel.current_task())
    client.sendall(b"one")


class Faulty:
    """A server that raises ``error``, once, at one place of a request's life."""

    error: BaseException | None = None
    seen: list[BaseException | None]
    finished = 0

    def __init__(self, place: str, server_address: Any = LOCALHOST) -> None:
        super().__init__(server_address, FaultyHandler)  # type: ignore[call-arg]
        self.place = place
        self.seen = []

    def reach(self, place: str) -> None:
        if place == self.place and self.error is not None:
            error, self.error = self.error, None
            raise error

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        self.reach("verify_request")
        return True

    async def process_request(self, request: Any, client_address: Any) -> None:
        self.reach("process_request")
        await super().process_request(request, client_address)  # type: ignore[misc]

    async def finish_request(self, request: Any, client_address: Any) -> None:
        self.reach("finish_request")
        await super().finish_request(request, client_address)  # type: ignore[misc]

    async def shutdown_request(self, request: Any) -> None:
        self.reach("shutdown_request")
        await super().shutdown_request(request)  # type: ignore[misc]

    async def close_request(self, request: Any) -> None:
        self.reach("close_request")
        await super().close_request(request)  # type: ignore[misc]

    async def handle_error(self, request: Any, client_address: Any) -> None:
        self.seen.append(sys.exception())
        self.reach("handle_error")


class FaultyTicking(Faulty):
    async def service_actions(self) -> None:
        self.reach("service_actions")


class FaultyHandler(StreamRequestHandler):
    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        super().__init__(request, client_address, server)
        server.reach("constructor")

    async def setup(self) -> None:
        await super().setup()
        self.server.reach("setup")

    async def handle(self) -> None:
        while line := await self.rfile.readline():
            await self.wfile.write(line)
            self.server.reach("handle")
            if line == b"fail\n":
                raise LookupError("the client has asked for it")

    async def finish(self) -> None:
        await super().finish()
        self.server.finished += 1
        self.server.reach("finish")


class FaultySequential(FaultyTicking, TCPServer):
    pass


class FaultyConcurrent(FaultyTicking, NurseryTCPServer):
    pass


each_faulty_server = pytest.mark.parametrize(
    "server_class", [FaultySequential, FaultyConcurrent], ids=class_name
)


class RaisingFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        self.asked = True
        raise ValueError("logging is broken")


@pytest.fixture
def broken_logging() -> Iterator[RaisingFilter]:
    logger = logging.getLogger("trio_socketserver")
    broken = RaisingFilter()
    logger.addFilter(broken)
    yield broken
    logger.removeFilter(broken)


def leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from leaves(member)
    else:
        yield error


def system_error(name: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def knock(server: Any, client: socket.socket | None = None) -> socket.socket:
    """Make the server's socket readable, for one request."""
    if not issubclass(type(server), UDPServer):
        return connect(server.server_address)
    if client is None:
        client = datagram_client(server)
    client.send(b"x")
    return client
