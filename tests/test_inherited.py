"""What a child closes of what it has inherited, and what it leaves alone."""

from __future__ import annotations

import gc
import os
import socket
import socketserver
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from helpers import bounded

from trio_socketserver import TCPServer, UDPServer
from trio_socketserver._children import fork
from trio_socketserver._inherited import close_inherited, connections, forget
from trio_socketserver._sockets import StreamSocket

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def handler(request: Any, client_address: Any, server: Any) -> None:
    """Do nothing."""


async def check_in_child(kept: list[socket.socket], *expected: tuple[int, bool]) -> None:
    """Fail if descriptors are not open, or not closed, in a child as they should be."""

    def check() -> None:
        found = [(descriptor, is_open(descriptor)) for descriptor, _ in expected]
        if found != list(expected):
            raise AssertionError(found)

    await fork(check, kept).run(5)


@pytest.fixture
def connection() -> Iterator[StreamSocket]:
    """A connection, as a server has accepted it."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream = StreamSocket.accepted(ours)
    with theirs:
        yield stream
        if stream.fileno() != -1:
            stream.socket.close()
        forget(connections, stream)


@bounded
async def test_servers_and_connections_are_closed(connection: StreamSocket) -> None:
    with socket.socket() as strangers:
        servers = [TCPServer(("127.0.0.1", 0), handler), UDPServer(("", 0), handler)]
        await check_in_child(
            [],
            *((server.fileno(), False) for server in servers),
            (connection.fileno(), False),
            (strangers.fileno(), True),
        )
        for server in servers:  # Here nothing has changed.
            assert is_open(server.fileno())
            await server.server_close()
        assert is_open(connection.fileno())


@dataclass
class Comparable(TCPServer):
    """Servers that are equal, and so cannot be hashed."""

    def __post_init__(self) -> None:
        super().__init__(("127.0.0.1", 0), handler)


@bounded
async def test_servers_that_are_equal_are_closed_each() -> None:
    servers = [Comparable(), Comparable()]
    assert servers[0] == servers[1]
    await check_in_child([], *((server.fileno(), False) for server in servers))
    for server in servers:
        await server.server_close()


@bounded
async def test_what_is_kept(connection: StreamSocket) -> None:
    server = TCPServer(("127.0.0.1", 0), handler)
    await check_in_child(
        [connection.socket], (connection.fileno(), True), (server.fileno(), False)
    )
    await check_in_child(
        [server.socket], (connection.fileno(), False), (server.fileno(), True)
    )
    await server.server_close()


@bounded
async def test_a_connection_that_a_thread_has(connection: StreamSocket) -> None:
    """It stands on the same descriptor, wherever it is."""
    descriptor = connection.fileno()
    connection.lend()
    await check_in_child([], (descriptor, False))
    await check_in_child(connection.held(), (descriptor, True))
    connection.take_back()


@bounded
async def test_closed_ones_and_servers_without_a_socket(connection: StreamSocket) -> None:
    server = TCPServer(("127.0.0.1", 0), handler)
    closed = TCPServer(("127.0.0.1", 0), handler)
    await closed.server_close()
    sock = server.socket
    del server.socket
    await check_in_child([], (sock.fileno(), True), (connection.fileno(), False))
    server.socket = sock
    await server.server_close()


@bounded
async def test_a_socket_of_the_users_own_class_is_closed_below_its_methods() -> None:
    class Loud(socket.socket):
        def close(self) -> None:
            raise AssertionError

        def detach(self) -> int:
            raise AssertionError

    sock = Loud()
    sock.bind(("127.0.0.1", 0))
    server = TCPServer.from_socket(sock, handler)
    await check_in_child([], (sock.fileno(), False))
    server.socket = socket.socket()
    await server.server_close()
    socket.socket.close(sock)


def test_a_connection_is_forgotten_when_it_is_closed() -> None:
    before = set(connections)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stream = StreamSocket.accepted(ours)
    assert {found() for found in connections - before} == {stream}
    stream.close_now()
    assert connections == before
    theirs.close()


def test_a_connection_that_is_dropped_is_forgotten() -> None:
    """Nobody has closed it; knowing of it does not keep it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        stream = StreamSocket.accepted(ours)
        assert len(connections) == 1
        del stream
        gc.collect()
        assert not connections


def test_nothing_inherited_is_nothing_to_do() -> None:
    assert not connections
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as s:
        close_inherited([])  # What is no server of this package's stays.
        assert is_open(s.fileno())
