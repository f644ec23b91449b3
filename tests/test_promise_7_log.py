"""Promise 7: what the default handle_error() logs."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    assert_sums_up,
    bind_address,
    bounded,
    close_with_reset,
    connect,
    receive_to_end,
)
from promises import LOCALHOST, each_stream_server, each_tcp_server, records, serving
from promises import log_everything as log_everything

from trio_socketserver import (
    IncompleteRead,
    LineTooLong,
    NurseryTCPServer,
    StreamRequestHandler,
)


async def assert_still_serves(server: Any) -> None:
    """A fresh client is accepted, and let go again."""
    before = server.statistics()
    with connect(server.server_address) as client:
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().accepted == before.accepted + 1
        client.shutdown(socket.SHUT_WR)
        await trio.testing.wait_all_tasks_blocked()
    assert server.statistics().peer_errors == before.peer_errors


class ReadLine(StreamRequestHandler):
    async def handle(self) -> None:
        if line := await self.rfile.readline():
            self.server.got = line


class ReadLineInTime(ReadLine):
    timeout = 10


class ReadExactly(StreamRequestHandler):
    async def handle(self) -> None:
        if await self.rfile.peek():
            await self.rfile.readexactly(10)


class WriteMuch(StreamRequestHandler):
    async def handle(self) -> None:
        if await self.rfile.readline():
            await self.wfile.write(bytes(20_000_000))


class WriteMuchInTime(WriteMuch):
    timeout = 10


class WriteAtTheEnd(StreamRequestHandler):
    wbufsize = -1

    async def handle(self) -> None:
        if await self.rfile.readline():
            await self.wfile.write(b"answer")
            await self.server.client_has_gone.wait()


class WriteAndRead(StreamRequestHandler):
    """Both ``handle()`` and ``finish()`` meet the peer's reset."""

    wbufsize = -1

    async def handle(self) -> None:
        await self.wfile.write(b"answer")
        await self.rfile.readline()


class InNursery(StreamRequestHandler):
    """Reads and writes side by side, so that a reset comes as a group."""

    async def read(self) -> None:
        with trio.CancelScope(shield=True):
            await self.rfile.readline()

    async def write(self) -> None:
        with trio.CancelScope(shield=True):
            await self.wfile.write(bytes(20_000_000))

    async def handle(self) -> None:
        if await self.rfile.readline():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.read)
                nursery.start_soon(self.write)


async def reset_at_once(client: socket.socket) -> None:
    close_with_reset(client)


async def reset_mid_line(client: socket.socket) -> None:
    client.sendall(b"half")
    await trio.testing.wait_all_tasks_blocked()
    close_with_reset(client)


async def reset_after_line(client: socket.socket) -> None:
    client.sendall(b"line\n")
    await trio.testing.wait_all_tasks_blocked()
    close_with_reset(client)


async def send_half_and_finish(client: socket.socket) -> None:
    client.sendall(b"half")
    client.shutdown(socket.SHUT_WR)
    await receive_to_end(client)


async def send_half_and_stay(client: socket.socket) -> None:
    client.sendall(b"half")
    await receive_to_end(client)


async def send_line_and_never_read(client: socket.socket) -> None:
    client.sendall(b"line\n")
    await trio.sleep(1000)


async def send_a_long_line(client: socket.socket) -> None:
    with contextlib.suppress(ConnectionError):
        client.sendall(bytes(200_000))
    await receive_to_end(client)


PEER_FAULTS: dict[
    str, tuple[type[Any], Callable[..., Awaitable[None]], dict[str, Any], str]
]
PEER_FAULTS = {
    "reset_before_the_first_byte": (ReadLine, reset_at_once, {}, "ConnectionBroken"),
    "reset_mid_line": (ReadLine, reset_mid_line, {}, "ConnectionBroken"),
    "reset_while_we_write": (WriteMuch, reset_after_line, {}, "ConnectionBroken"),
    "reset_while_we_read_and_write": (
        InNursery,
        reset_after_line,
        {},
        "ConnectionBroken",
    ),
    "reset_while_we_flush": (WriteAtTheEnd, reset_after_line, {}, "ConnectionBroken"),
    "reset_mid_line_and_flush": (WriteAndRead, reset_mid_line, {}, "ConnectionBroken"),
    "short_read": (ReadExactly, send_half_and_finish, {}, "IncompleteRead"),
    "silence": (ReadLineInTime, send_half_and_stay, {}, "RequestTimeout"),
    "does_not_read": (WriteMuchInTime, send_line_and_never_read, {}, "RequestTimeout"),
    "takes_too_long": (
        ReadLine,
        send_half_and_stay,
        {"request_timeout": 20},
        "RequestTimeout",
    ),
    "long_line": (ReadLine, send_a_long_line, {"max_line_size": 1000}, "LineTooLong"),
}


@each_tcp_server
@pytest.mark.parametrize("fault", PEER_FAULTS)
@bounded
async def test_promise_7_a_fault_of_the_peer_is_one_quiet_line(
    server_class: type[Any],
    fault: str,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    base, behave, attributes, name = PEER_FAULTS[fault]
    handler = type(base.__name__, (base,), {"max_line_size": 100_000})
    if "max_line_size" in attributes:
        handler.max_line_size = attributes["max_line_size"]
    server = server_class(LOCALHOST, handler)
    vars(server).update(attributes)
    server.client_has_gone = trio.Event()
    async with serving(server):
        with connect(server.server_address) as client:
            address = client.getsockname()
            await behave(client)
        server.client_has_gone.set()
        await trio.testing.wait_all_tasks_blocked()
        [(level, message)] = records(caplog)
        assert level == "INFO"
        assert f"{address!r}: {name}: " in message
        assert "\n" not in message
        assert caplog.records[0].exc_info is None
        statistics = server.statistics()
        assert (statistics.failed, statistics.peer_errors) == (1, 1)
        await assert_still_serves(server)
    assert_sums_up(server)


@each_tcp_server
@bounded
async def test_promise_7_a_reset_that_nobody_notices_is_no_line(
    server_class: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        await request.receive_some()
        close_with_reset(client)

    server = server_class(LOCALHOST, handler)
    async with server:
        client = connect(server.server_address)
        client.sendall(b"x")
        await server.handle_request()
    assert not caplog.records
    assert server.statistics().completed == 1


@each_stream_server
@bounded
async def test_promise_7_a_half_close_is_no_fault(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_class(bind_address(server_class, tmp_path), ReadLine)
    async with serving(server):
        with connect(server.server_address) as client:
            await send_half_and_finish(client)
    assert server.got == b"half"
    assert not caplog.records
    assert server.statistics().completed == 1


PEER, OURS = ConnectionResetError("gone"), ValueError("ours")


@pytest.mark.parametrize(
    ("error", "quiet"),
    [
        (PEER, True),
        (BrokenPipeError(), True),
        (ConnectionAbortedError(), True),
        (TimeoutError("slow"), True),
        (trio.TooSlowError(), False),
        (trio.BrokenResourceError("broken"), True),
        (LineTooLong("long"), True),
        (IncompleteRead("short", b""), True),
        (ExceptionGroup("peers", [PEER, ExceptionGroup("inner", [TimeoutError()])]), True),
        (ExceptionGroup("both", [PEER, ExceptionGroup("inner", [OURS])]), False),
        (OURS, False),
        (EOFError(), False),
        (OSError(errno.ENOENT, "no such file"), False),
        # A backend of the handler's is not the peer.
        (ConnectionRefusedError(), False),
    ],
    ids=repr,
)
@bounded
async def test_promise_7_whose_fault_it_is(
    error: Exception, quiet: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        raise error

    server = NurseryTCPServer(LOCALHOST, handler)
    with connect(server.server_address):
        async with server:
            await server.handle_request()
    [record] = caplog.records
    if quiet:
        assert record.levelname == "INFO"
        assert record.exc_info is None
    else:
        assert record.levelname == "ERROR"
        assert record.exc_info is not None
        assert record.exc_info[1] is error
    assert server.statistics().peer_errors == quiet
    assert server.statistics().failed == 1


@bounded
async def test_promise_7_a_peer_is_blamed_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Server(NurseryTCPServer):
        async def shutdown_request(self, request: Any) -> None:
            await trio.sleep(1000)

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError

    server = Server(LOCALHOST, handler)
    with connect(server.server_address):
        async with server:
            await server.handle_request()
    statistics = server.statistics()
    assert (statistics.failed, statistics.peer_errors) == (1, 1)
