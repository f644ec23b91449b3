"""What the tests with real programs share: serving for a block, and clients."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, connect

import trio_socketserver

LOCAL = ("127.0.0.1", 0)

CLIENT_LIMIT = REAL_LIMIT / 2
"""Seconds that a client waits for anything: it fails before its test's own limit."""

ENDINGS = ("cancelled", "shut down")
"""How a server of `serving` ends."""

run_sync = trio.to_thread.run_sync


@contextlib.asynccontextmanager
async def serving(server: Any, ending: str = "cancelled") -> AsyncIterator[Any]:
    """Serve for the length of the block, then end as one of `ENDINGS`.

    Args:
        server: a server object, the standard library's or ours.
        ending: how to end it; a block that has ended it already may say either.

    Yields:
        The server's address.
    """
    if isinstance(server, trio_socketserver.BaseServer):
        async with _serving_ours(server, ending) as address:
            yield address
        return
    made_as = type(server)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(trio_socketserver.serve_blocking, server)
        yield address
        if ending == "cancelled":
            nursery.cancel_scope.cancel()
        else:
            await run_sync(server.shutdown)
    assert server.fileno() == -1
    assert type(server) is made_as


@contextlib.asynccontextmanager
async def _serving_ours(server: Any, ending: str) -> AsyncIterator[Any]:
    with trio.CancelScope() as scope:
        async with server, trio.open_nursery() as nursery:
            yield await nursery.start(server.serve_forever)
            if ending == "cancelled":
                scope.cancel()
            else:
                await server.shutdown()
    assert server.fileno() == -1


@contextlib.asynccontextmanager
async def clients(
    address: Any, count: int = 1, greet: Callable[[socket.socket], None] | None = None
) -> AsyncIterator[list[socket.socket]]:
    """Yield plain connections that are open until the end of the block.

    A handler that nothing has woken when the test's time is up sees them end then, so that
    the test fails instead of hanging.

    Args:
        address: whom to connect to, one after another.
        count: how many.
        greet: what each of them does first; called in a thread.
    """
    sockets: list[socket.socket] = []

    def end_all() -> None:
        for sock in sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    watchdog = threading.Timer(REAL_LIMIT, end_all)
    watchdog.start()
    try:
        for _ in range(count):
            sockets.append(await run_sync(connect, address))
            if greet is not None:
                await run_sync(greet, sockets[-1])
        yield sockets
    finally:
        watchdog.cancel()
        watchdog.join()
        for sock in sockets:
            sock.close()


@contextlib.contextmanager
def http_connection(address: Any, context: Any = None) -> Iterator[Any]:
    """Yield a connection of `http.client`, over TLS if there is a context."""
    host, port = address[:2]
    if context is None:
        connection = http.client.HTTPConnection(host, port, timeout=CLIENT_LIMIT)
    else:
        connection = http.client.HTTPSConnection(
            host, port, timeout=CLIENT_LIMIT, context=context
        )
    with contextlib.closing(connection):
        yield connection


def fetch(
    connection: Any, path: str, method: str = "GET", **headers: str
) -> tuple[int, bytes, Any]:
    """Make one request, and return its status, body and headers."""
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read(), response.headers


def get(address: Any, path: str, context: Any = None) -> bytes:
    """Fetch *path* over a connection of its own; it must be there."""
    with http_connection(address, context) as connection:
        status, body, _ = fetch(connection, path)
    assert status == http.client.OK
    return body


def needs_program(name: str) -> pytest.MarkDecorator:
    """Skip a test, visibly, where a program is not installed."""
    return pytest.mark.skipif(shutil.which(name) is None, reason=f"no {name} here")


async def program(*command: str, given: bytes = b"", check: bool = True) -> str:
    """Run a program, which must succeed unless told otherwise; return what it prints."""
    completed = await trio.run_process(
        command, stdin=given, capture_stdout=True, capture_stderr=True, check=check
    )
    return completed.stdout.decode()


async def curl(*arguments: str) -> str:
    """Run curl, and return what it prints."""
    return await program(
        "curl",
        "--disable",
        "--noproxy",
        "*",
        "--silent",
        "--show-error",
        "--max-time",
        str(CLIENT_LIMIT),
        *arguments,
    )


async def side_by_side(count: int, ask: Callable[[int], Any]) -> list[Any]:
    """Call *ask* with 0, 1, … in as many threads at once, and return what it returns."""
    answers: list[Any] = [None] * count

    async def one(number: int) -> None:
        answers[number] = await run_sync(ask, number)

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(one, number)
    return answers
