"""Whatever a peer sends: a reply, or a clean close and one quiet line; then the next."""

from __future__ import annotations

import array
import contextlib
import logging
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    DATAGRAM_SERVERS,
    STREAM_SERVERS,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    close_with_reset,
    connect,
    datagram_client,
    receive,
    receive_to_end,
)

from trio_socketserver import (
    DatagramRequestHandler,
    NurseryTCPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    UnixStreamServer,
)
from trio_socketserver.testing import serving

each_stream_server = pytest.mark.parametrize("server_class", STREAM_SERVERS, ids=class_name)
each_datagram_server = pytest.mark.parametrize(
    "server_class", DATAGRAM_SERVERS, ids=class_name
)


class Protocol(StreamRequestHandler):
    """Echoes lines; after ``size n``, that many bytes; and knows its clients."""

    timeout = 10
    max_line_size = 1000

    async def handle(self) -> None:
        async for line in self.rfile:
            reply = line
            if line.startswith(b"size "):
                try:
                    size = int(line[5:])
                except ValueError:
                    reply = b"error: not a number\n"
                else:
                    if size < 0:
                        reply = b"error: negative\n"
                    else:
                        reply = await self.rfile.readexactly(size)
            await self.wfile.write(reply)


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_socketserver")


async def assert_serves_a_fresh_client(server: Any) -> None:
    with connect(server.server_address) as client:
        client.sendall(b"ping\n")
        assert await receive(client) == b"ping\n"
        client.shutdown(socket.SHUT_WR)
        assert await receive_to_end(client) == b""


def assert_one_quiet_line_at_most(caplog: pytest.LogCaptureFixture, failed: int) -> None:
    """For each request that has failed there is one line, and nobody else has one."""
    assert len(caplog.records) == failed
    for record in caplog.records:
        assert record.levelname == "INFO"
        assert record.exc_info is None
        assert "\n" not in record.getMessage()
        assert len(record.getMessage()) < 300


# == Connections ==========================================================================


JUNK = [random.Random(seed).randbytes(size) for seed, size in enumerate([1, 10, 500, 5000])]

# What is sent; then the client finishes sending, and waits for the end.
BAD_STREAMS: dict[str, bytes] = {
    "nothing": b"",
    "half_a_line": b"half",
    "one_byte": b"\xff",
    "only_ends_of_lines": b"\n" * 1000,
    "only_carriage_returns": b"\r" * 900,
    "zeros": bytes(900),
    "a_line_without_end": b"x" * 3000,
    "an_endless_line": b"x" * 10_000_000,
    "many_lines": b"line\n" * 3000,
    "an_absurd_size": b"size 999999999999999999\nfew",
    "an_impossible_size": b"size 1" + b"0" * 50 + b"\n",
    "a_negative_size": b"size -1\n",
    "a_size_that_is_no_number": b"size \xff\xfe\n",
    "a_size_of_nothing": b"size 0\n",
    "a_size_that_is_too_large": b"size 10\n123",
    "invalid_utf8": b"\xc3\x28\xa0\xa1\xf0\x28\x8c\xbc\n",
    "http": b"GET /" + b"a" * 500 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "tls": bytes.fromhex("1603010200010001fc0303") + bytes(100),
    **{f"junk_of_{len(junk)}": junk for junk in JUNK},
}


async def send_all_or_be_cut(client: socket.socket, data: bytes) -> None:
    """Send from a trio task, and read what comes back meanwhile."""
    client.setblocking(False)
    view = memoryview(data)
    with contextlib.suppress(ConnectionError):
        while view:
            with contextlib.suppress(BlockingIOError):
                view = view[client.send(view) :]
                continue
            with contextlib.suppress(BlockingIOError):
                while client.recv(65536):
                    pass
            await trio.lowlevel.checkpoint()
        client.shutdown(socket.SHUT_WR)


@each_stream_server
@pytest.mark.parametrize("bad", BAD_STREAMS)
@bounded
async def test_any_bytes_get_a_reply_or_a_clean_close(
    server_class: type[Any], bad: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        with connect(server.server_address) as client:
            await send_all_or_be_cut(client, BAD_STREAMS[bad])
            await receive_to_end(client)
        await assert_serves_a_fresh_client(server)
    assert_one_quiet_line_at_most(caplog, server.statistics().failed)
    assert server.statistics().peer_errors == server.statistics().failed
    assert server.statistics().accepted == 2
    assert_sums_up(server)


@each_stream_server
@pytest.mark.parametrize("bad", BAD_STREAMS)
@bounded
async def test_any_bytes_and_then_nobody(
    server_class: type[Any], bad: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client has gone before anything is read, by reset where there is such a thing."""
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    client = connect(server.server_address)
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        client.send(BAD_STREAMS[bad])
    close_with_reset(client)
    async with serving(server):
        await assert_serves_a_fresh_client(server)
    assert_one_quiet_line_at_most(caplog, server.statistics().failed)
    assert server.statistics().accepted == 2
    assert_sums_up(server)


@each_stream_server
@bounded
async def test_an_endless_line_is_not_buffered_without_end(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Patient(StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.rfile:
                await self.wfile.write(line)

    assert Patient.max_line_size == 1024 * 1024
    server = server_class(bind_address(server_class, tmp_path), Patient)
    sent = 0
    async with serving(server):
        with connect(server.server_address) as client:
            client.setblocking(False)
            with contextlib.suppress(ConnectionError):
                while sent < 100_000_000:
                    with contextlib.suppress(BlockingIOError):
                        sent += client.send(bytes(65536))
                    await trio.lowlevel.checkpoint()
        await assert_serves_a_fresh_client(server)
    # The limit, and what the kernel's buffers hold.
    assert 1024 * 1024 <= sent < 20_000_000
    assert_one_quiet_line_at_most(caplog, 1)
    assert "LineTooLong" in caplog.records[0].getMessage()


@each_stream_server
@bounded
async def test_byte_by_byte(
    server_class: type[Any], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        with connect(server.server_address) as client:
            for _ in range(3):
                for byte in b"slowly\n":
                    await trio.sleep(9)
                    client.send(bytes([byte]))
                assert await receive(client) == b"slowly\n"
            client.shutdown(socket.SHUT_WR)
            assert await receive_to_end(client) == b""
    assert server.statistics().completed == 1


@each_stream_server
@bounded
async def test_byte_by_byte_without_end(
    server_class: type[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Each byte comes within ``timeout``; what ends the game is ``request_timeout``."""
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    server.request_timeout = 100
    start = trio.current_time()
    async with serving(server):
        with connect(server.server_address) as client:
            with contextlib.suppress(ConnectionError):
                while True:
                    client.send(b"x")
                    await trio.sleep(9)
            assert 100 <= trio.current_time() - start < 120
        await assert_serves_a_fresh_client(server)
    assert_one_quiet_line_at_most(caplog, 1)
    assert "RequestTimeout" in caplog.records[0].getMessage()


@each_stream_server
@bounded
async def test_a_client_that_says_nothing(
    server_class: type[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        with connect(server.server_address) as client:
            start = trio.current_time()
            assert await receive_to_end(client) == b""
            assert trio.current_time() - start == pytest.approx(10)
        await assert_serves_a_fresh_client(server)
    assert_one_quiet_line_at_most(caplog, 1)


@each_stream_server
@bounded
async def test_a_client_that_never_reads(
    server_class: type[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        with connect(server.server_address) as client:
            client.setblocking(False)
            with contextlib.suppress(ConnectionError):
                while not server.statistics().failed:
                    with contextlib.suppress(BlockingIOError):
                        client.send((b"x" * 998 + b"\n") * 100)
                    await trio.sleep(0.1)
        await assert_serves_a_fresh_client(server)
    assert_one_quiet_line_at_most(caplog, 1)


@each_stream_server
@bounded
async def test_more_than_a_thousand_clients_that_only_come_and_go(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        for number in range(1200):
            client = connect(server.server_address)
            if number % 3 == 0:
                client.send(b"half")
            if number % 2:
                close_with_reset(client)
            else:
                client.close()
            if number % 100 == 99:  # The queue holds 128.
                await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().accepted == 1200
        assert server.statistics().active == 0
        await assert_serves_a_fresh_client(server)
    assert_one_quiet_line_at_most(caplog, server.statistics().failed)
    assert_sums_up(server)


@pytest.mark.parametrize("server_class", [TCPServer, NurseryTCPServer], ids=class_name)
@bounded
async def test_urgent_data(server_class: type[Any]) -> None:
    server = server_class(("127.0.0.1", 0), Protocol)
    async with serving(server):
        with connect(server.server_address) as client:
            client.send(b"be")
            client.send(b"!", socket.MSG_OOB)
            client.send(b"fore\n")
            assert await receive(client) == b"before\n"


@pytest.mark.parametrize(
    "server_class", [UnixStreamServer, NurseryUnixStreamServer], ids=class_name
)
@bounded
async def test_descriptors_that_nobody_has_asked_for(
    server_class: type[Any], tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        with connect(server.server_address) as client:
            for _ in range(10):
                socket.send_fds(client, [b"line\n"], [client.fileno()] * 3)
                assert await receive(client) == b"line\n"
    # That they have been closed is for the leak fixture to see.


@pytest.mark.parametrize(
    "server_class", [UnixStreamServer, NurseryUnixStreamServer], ids=class_name
)
@bounded
async def test_a_peer_whose_name_has_several_lines(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        with socket.socket(socket.AF_UNIX) as client:
            client.bind(str(tmp_path / "c\nERROR we have been hacked"))
            client.connect(server.server_address)
            client.sendall(b"size 10\n123")
            client.shutdown(socket.SHUT_WR)
            await receive_to_end(client)
    assert_one_quiet_line_at_most(caplog, 1)


# == Datagrams ============================================================================


class DatagramProtocol(DatagramRequestHandler):
    """Echoes one line, and does not trust its length."""

    async def handle(self) -> None:
        self.wfile.write(self.rfile.readline(100))


BAD_DATAGRAMS: dict[str, bytes] = {
    "empty": b"",
    "one_byte": b"\x00",
    "as_long_as_it_may_be": bytes(8192),
    "a_byte_too_long": bytes(8193),
    "as_long_as_udp_allows": bytes(65507),
    "only_ends_of_lines": b"\n" * 500,
    "invalid_utf8": b"\xc3\x28\xa0\xa1\xf0\x28\x8c\xbc\n",
    **{f"junk_of_{len(junk)}": junk for junk in JUNK},
}


@each_datagram_server
@pytest.mark.parametrize("bad", BAD_DATAGRAMS)
@bounded
async def test_any_datagram_gets_a_reply_or_none(
    server_class: type[Any], bad: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datagram = BAD_DATAGRAMS[bad]
    server = server_class(bind_address(server_class, tmp_path), DatagramProtocol)
    async with serving(server):
        with datagram_client(server, tmp_path) as client:
            for _ in range(3):
                client.send(datagram)
                if datagram:
                    line = datagram[:8192].partition(b"\n")
                    assert await receive(client) == (line[0] + line[1])[:100]
            client.send(b"ping\n")
            assert await receive(client) == b"ping\n"
    assert not caplog.records
    assert server.statistics().completed == 4
    assert server.statistics().truncated_datagrams == (3 if len(datagram) > 8192 else 0)


@each_datagram_server
@bounded
async def test_datagrams_of_clients_that_have_gone(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = server_class(bind_address(server_class, tmp_path), DatagramProtocol)
    async with serving(server):
        for _ in range(100):
            with datagram_client(server, tmp_path) as client:
                client.send(b"junk")
            await trio.testing.wait_all_tasks_blocked()
        with datagram_client(server, tmp_path) as client:
            client.send(b"ping\n")
            assert await receive(client) == b"ping\n"
    assert_one_quiet_line_at_most(caplog, server.statistics().failed)
    assert server.statistics().accepted == 101
    assert_sums_up(server)


@pytest.mark.parametrize(
    "server_class",
    [server for server in DATAGRAM_SERVERS if server.address_family == socket.AF_UNIX],
    ids=class_name,
)
@bounded
async def test_datagrams_with_descriptors(server_class: type[Any], tmp_path: Path) -> None:
    server = server_class(bind_address(server_class, tmp_path), DatagramProtocol)
    async with serving(server):
        with datagram_client(server, tmp_path) as client:
            rights = array.array("i", [client.fileno()] * 3)
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
            for _ in range(10):
                client.sendmsg([b"line\n"], control)
                assert await receive(client) == b"line\n"


# == Both =================================================================================


@pytest.mark.parametrize("server_class", [NurseryTCPServer, NurseryUnixStreamServer])
@bounded
async def test_a_crowd_of_bad_clients_does_not_harm_a_good_one(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def be_bad(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            with connect(server.server_address) as client:
                client.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    for _ in range(rng.randrange(4)):
                        client.send(rng.choice(list(BAD_STREAMS.values()))[:50_000])
                        await trio.lowlevel.checkpoint()
                endings: list[Callable[[], None]] = [
                    client.close,
                    lambda client=client: client.shutdown(socket.SHUT_WR),  # type: ignore[misc]
                    lambda client=client: close_with_reset(client),  # type: ignore[misc]
                ]
                with contextlib.suppress(OSError):  # The server may have been first.
                    rng.choice(endings)()
                await trio.lowlevel.checkpoint()

    server = server_class(bind_address(server_class, tmp_path), Protocol)
    async with serving(server):
        with connect(server.server_address) as good:
            async with trio.open_nursery() as crowd:
                for seed in range(10):
                    crowd.start_soon(be_bad, seed)
                for number in range(200):
                    good.sendall(b"%d\n" % number)
                    assert await receive(good) == b"%d\n" % number
        await assert_serves_a_fresh_client(server)
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().active == 0
    assert_one_quiet_line_at_most(caplog, server.statistics().failed)
    assert server.statistics().accepted == 202
    assert_sums_up(server)
