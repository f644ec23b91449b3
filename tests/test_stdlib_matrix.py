"""The matrix of CPython's own tests of socketserver, and socketserver itself as the oracle.

Each handler here is one text. Without the words ``async`` and ``await`` it is a handler of
socketserver; a client must not be able to tell the two apart by a single byte.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import random
import re
import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
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
    connect,
    datagram_client,
    receive_to_end,
)

import trio_socketserver
from trio_socketserver import (
    BaseRequestHandler,
    DatagramRequestHandler,
    NurseryMixIn,
    NurseryTCPServer,
    StreamRequestHandler,
    TCPServer,
)

ALL_SERVERS = STREAM_SERVERS + DATAGRAM_SERVERS
LOCALHOST = ("127.0.0.1", 0)
TEXT = b"hello, world\n"

ORACLES: dict[type[Any], type[Any]] = {
    ours: getattr(socketserver, ours.__name__.replace("Nursery", "Threading"))
    for ours in ALL_SERVERS
}
"""For each server, the one of socketserver that it takes the place of."""

each_server = pytest.mark.parametrize("server_class", ALL_SERVERS, ids=class_name)
each_stream_server = pytest.mark.parametrize("server_class", STREAM_SERVERS, ids=class_name)
each_datagram_server = pytest.mark.parametrize(
    "server_class", DATAGRAM_SERVERS, ids=class_name
)


@contextlib.asynccontextmanager
async def serving(server: Any) -> Any:
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield
        await server.shutdown()


def new_client(server: Any, folder: Path) -> socket.socket:
    if issubclass(type(server), trio_socketserver.UDPServer):
        return datagram_client(server, folder)
    return connect(server.server_address)


# == The matrix ===========================================================================


@each_server
@bounded
async def test_each_server_serves_several_clients(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    datagrams = server_class in DATAGRAM_SERVERS
    base: Any = DatagramRequestHandler if datagrams else StreamRequestHandler

    class Handler(base):  # type: ignore[misc]
        async def handle(self) -> None:
            if datagrams:
                self.wfile.write(self.rfile.readline())
            else:
                await self.wfile.write(await self.rfile.readline())

    def be_client() -> bytes:
        with new_client(server, tmp_path) as client:
            client.sendall(TEXT)
            received = b""
            while b"\n" not in received and (chunk := client.recv(100)):
                received += chunk
            return received

    server = server_class(bind_address(server_class, tmp_path), Handler)
    assert server.server_address == server.socket.getsockname()
    async with serving(server):
        for _ in range(3):
            assert await trio.to_thread.run_sync(be_client) == TEXT
        await trio.testing.wait_all_tasks_blocked()
        assert server.statistics().completed == 3
    assert server.socket.fileno() == -1
    assert not caplog.records


@each_server
@bounded
async def test_one_at_a_time_or_all_at_once(
    server_class: type[Any], tmp_path: Path
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        began.append(len(began))
        if len(began) == 1:
            await first_may_end.wait()

    began: list[int] = []
    first_may_end = trio.Event()
    server = server_class(bind_address(server_class, tmp_path), handler)
    with contextlib.ExitStack() as clients:
        async with serving(server):
            for _ in range(5):
                client = clients.enter_context(new_client(server, tmp_path))
                client.sendall(TEXT)
            await trio.testing.wait_all_tasks_blocked()
            assert len(began) == (5 if issubclass(server_class, NurseryMixIn) else 1)
            first_may_end.set()
            await trio.testing.wait_all_tasks_blocked()
            assert len(began) == 5
    assert server.statistics().completed == 5


@bounded
async def test_shutdown_of_many_servers_that_have_hardly_begun() -> None:
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            server = TCPServer(LOCALHOST, BaseRequestHandler)
            nursery.start_soon(server.serve_forever)
            await server.shutdown()
            await server.server_close()
            assert server.fileno() == -1


@each_server
@bounded
async def test_close_immediately(server_class: type[Any], tmp_path: Path) -> None:
    server = server_class(bind_address(server_class, tmp_path), BaseRequestHandler)
    await server.server_close()
    assert server.fileno() == -1


def test_a_failed_bind_leaks_nothing() -> None:
    # More often than the process may have descriptors, were they to leak.
    before = os.listdir("/proc/self/fd")
    for _ in range(1024):
        with pytest.raises(OverflowError):
            TCPServer(("127.0.0.1", -1), BaseRequestHandler)
    assert len(os.listdir("/proc/self/fd")) == len(before)


@each_server
@bounded
async def test_the_context_manager_closes(server_class: type[Any], tmp_path: Path) -> None:
    address = bind_address(server_class, tmp_path)
    async with server_class(address, BaseRequestHandler) as server:
        assert server.fileno() > 0
    assert server.fileno() == -1


@each_server
@pytest.mark.parametrize("error_type", [ValueError, SystemExit])
@bounded
async def test_what_goes_to_handle_error_and_what_does_not(
    server_class: type[Any], error_type: type[BaseException], tmp_path: Path
) -> None:
    class Server(server_class):  # type: ignore[misc]
        async def handle_error(self, request: Any, client_address: Any) -> None:
            called.append(type(sys.exception()))

    class Handler(BaseRequestHandler):
        async def handle(self) -> None:
            called.append("handle")
            raise error_type("test")

    called: list[Any] = []
    server = Server(bind_address(server_class, tmp_path), Handler)
    handled = error_type is ValueError
    with new_client(server, tmp_path) as client:
        client.sendall(TEXT)
        with contextlib.nullcontext() if handled else pytest.raises(SystemExit):
            async with server:
                await server.handle_request()
    assert called == ["handle", *[ValueError] * handled]


@each_server
@bounded
async def test_a_refused_request_is_shut_down(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Server(server_class):  # type: ignore[misc]
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            return False

        async def shutdown_request(self, request: Any) -> None:
            shut_down.append(request)
            await super().shutdown_request(request)

    shut_down: list[Any] = []
    server = Server(bind_address(server_class, tmp_path), BaseRequestHandler)
    with new_client(server, tmp_path) as client:
        client.sendall(TEXT)
        async with server:
            await server.handle_request()
        if server_class in STREAM_SERVERS:
            assert await receive_to_end(client) == b""
    assert len(shut_down) == 1
    assert server.statistics().rejected == 1


@bounded
async def test_a_large_write_is_not_cut() -> None:
    class Handler(StreamRequestHandler):
        async def handle(self) -> None:
            written.append(await self.wfile.write(data))

    data = random.Random(1).randbytes(20_000_000)
    written: list[int] = []
    server = NurseryTCPServer(LOCALHOST, Handler)
    async with serving(server):
        with connect(server.server_address) as client:
            await trio.testing.wait_all_tasks_blocked()
            assert not written
            assert await receive_to_end(client) == data
    assert written == [len(data)]


def dispatched_elsewhere(name: str) -> bool:
    """Tell the names that have a thread or a process per request."""
    return name.startswith(("Threading", "Forking"))


def test_every_name_of_socketserver_is_here() -> None:
    theirs = {name for name in socketserver.__all__ if not dispatched_elsewhere(name)}
    assert theirs <= set(trio_socketserver.__all__)
    for name in trio_socketserver.__all__:
        assert hasattr(trio_socketserver, name)


@pytest.mark.parametrize(
    "name", [name for name in socketserver.__all__ if not dispatched_elsewhere(name)]
)
def test_the_inheritance_is_that_of_socketserver(name: str) -> None:
    def bases(module: Any) -> list[str]:
        family = (base.__name__ for base in getattr(module, name).__mro__)
        return [base for base in family if base in socketserver.__all__]

    assert bases(trio_socketserver) == bases(socketserver)


# == socketserver as the oracle ===========================================================

HALF_CLOSE = "half-close"
END = "receive to the end"
Script = tuple[bytes | int | str, ...]
"""What a client does: send bytes, receive so many bytes, half-close, receive to the end."""


class EchoLines(StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(line)


class EchoWhileReadline(StreamRequestHandler):
    async def handle(self) -> None:
        while line := await self.rfile.readline():
            await self.wfile.write(b"%d:" % len(line) + line)


class OneLine(StreamRequestHandler):
    async def handle(self) -> None:
        self.data = (await self.rfile.readline()).strip()
        await self.wfile.write(self.data.upper())


class ShortLines(StreamRequestHandler):
    async def handle(self) -> None:
        while piece := await self.rfile.readline(5):
            await self.wfile.write(piece + b"|")


class Frames(StreamRequestHandler):
    async def handle(self) -> None:
        while header := await self.rfile.read(2):
            size = int.from_bytes(header, "big")
            body = await self.rfile.read(size)
            await self.wfile.write(header + bytes(reversed(body)))


class Peeking(StreamRequestHandler):
    async def handle(self) -> None:
        while first := (await self.rfile.peek(1))[:1]:
            if first == b"B":
                buffer = bytearray(4)
                count = await self.rfile.readinto(buffer)
                await self.wfile.write(b"block %d " % count + buffer[:count])
            else:
                await self.wfile.write(b"line " + await self.rfile.readline())


class Everything(StreamRequestHandler):
    async def handle(self) -> None:
        data = await self.rfile.read()
        await self.wfile.write(b"%d " % len(data))
        await self.wfile.write(data)


class AllLines(StreamRequestHandler):
    async def handle(self) -> None:
        lines = await self.rfile.readlines()
        await self.wfile.writelines(sorted(lines))


class Unbuffered(StreamRequestHandler):
    rbufsize = 0

    async def handle(self) -> None:
        await self.wfile.write(await self.rfile.readline())
        await self.wfile.write(await self.request.recv(1))


class Greeting(StreamRequestHandler):
    async def setup(self) -> None:
        await super().setup()
        await self.wfile.write(b"220 ready\r\n")

    async def handle(self) -> None:
        while True:
            line = await self.rfile.readline()
            command = line.strip().lower()
            if not line or command == b"quit":
                break
            await self.wfile.write(b"250 " + command + b"\r\n")

    async def finish(self) -> None:
        await self.wfile.write(b"221 bye\r\n")
        await super().finish()


class Buffered(StreamRequestHandler):
    wbufsize = -1

    async def handle(self) -> None:
        for number in range(5_000):
            await self.wfile.write(b"%d\n" % number)
        await self.wfile.flush()
        line = await self.rfile.readline()
        await self.wfile.write(b"left in the buffer " + line)


class FailsHalfway(StreamRequestHandler):
    wbufsize = -1

    async def handle(self) -> None:
        await self.wfile.write(await self.rfile.readline())
        raise RuntimeError("a fault of ours")


class FailsInSetup(StreamRequestHandler):
    async def setup(self) -> None:
        await super().setup()
        raise RuntimeError("a fault of ours")

    async def finish(self) -> None:
        await self.wfile.write(b"must not be sent")


class Raw(BaseRequestHandler):
    async def handle(self) -> None:
        while data := await self.request.recv(1000):
            await self.request.sendall(data.swapcase())


class HalfClosing(BaseRequestHandler):
    async def handle(self) -> None:
        await self.request.sendall(b"your turn")
        await self.request.shutdown(socket.SHUT_WR)
        heard = b""
        while data := await self.request.recv(1000):
            heard += data
        self.server.heard = heard


class Large(StreamRequestHandler):
    async def handle(self) -> None:
        count = int(await self.rfile.readline())
        await self.wfile.write(bytes(range(256)) * count)


async def function(request: Any, client_address: Any, server: Any) -> None:
    while data := await request.recv(5):
        await request.sendall(data)


LINES = b"one\n", b"\n", b"three " * 30 + b"\n", b"\x00\xff\r\n", b"no end"
BINARY = random.Random(2).randbytes(3000)

STREAM_SCRIPTS: dict[str, tuple[Any, list[Script]]] = {
    "echo_lines": (
        EchoLines,
        [
            (*LINES, HALF_CLOSE, END),
            (LINES[0], 4, LINES[2], len(LINES[2]), HALF_CLOSE, END),
            (HALF_CLOSE, END),
            (BINARY, HALF_CLOSE, END),
        ],
    ),
    "echo_while_readline": (EchoWhileReadline, [(*LINES, HALF_CLOSE, END)]),
    "one_line": (OneLine, [(b"hello\n", END), (b"hello", HALF_CLOSE, END)]),
    "short_lines": (
        ShortLines,
        [(*LINES, HALF_CLOSE, END), (b"12345", 6, b"\n", 2, HALF_CLOSE, END)],
    ),
    "frames": (
        Frames,
        [
            (b"\x00\x05hello\x00\x00\x00\x01x", 7, HALF_CLOSE, END),
            (b"\x00\x05hel", HALF_CLOSE, END),
            (b"\x00", HALF_CLOSE, END),
            (len(BINARY).to_bytes(2, "big") + BINARY, 2 + len(BINARY), HALF_CLOSE, END),
        ],
    ),
    "peeking": (Peeking, [(b"a line\nBxyzline\nB1", HALF_CLOSE, END)]),
    "everything": (Everything, [(*LINES, BINARY, HALF_CLOSE, END), (HALF_CLOSE, END)]),
    "all_lines": (AllLines, [(*LINES, HALF_CLOSE, END)]),
    "unbuffered": (Unbuffered, [(b"line\n1", END)]),
    "greeting": (
        Greeting,
        [
            (11, b"NOOP\r\n", 10, b"QUIT\r\n", END),
            (b"HELO\r\nNOOP\r\nQUIT\r\n", END),
            (11, HALF_CLOSE, END),
        ],
    ),
    "buffered": (Buffered, [(100, b"go\n", END)]),
    "fails_halfway": (FailsHalfway, [(b"line\n", END)]),
    "fails_in_setup": (FailsInSetup, [(END,)]),
    "raw": (Raw, [(b"Hello", 5, b"World", 5, HALF_CLOSE, END), (BINARY, HALF_CLOSE, END)]),
    "half_closing": (HalfClosing, [(9, END, b"and now?", HALF_CLOSE)]),
    "large": (Large, [(b"8000\n", END)]),
    "function": (function, [(b"Hello, world", 12, HALF_CLOSE, END)]),
}


class EchoDatagram(DatagramRequestHandler):
    async def handle(self) -> None:
        self.wfile.write(self.rfile.read())


class DatagramLines(DatagramRequestHandler):
    async def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(b"%d:" % len(line))
            self.wfile.write(line)
        self.wfile.write(b"%d" % len(self.packet))


class SeveralReplies(BaseRequestHandler):
    async def handle(self) -> None:
        data, sock = self.request
        for word in data.split():
            await sock.sendto(word, self.client_address)


class OwnSocket(DatagramRequestHandler):
    async def handle(self) -> None:
        self.wfile.write(b"second")
        await self.socket.sendto(b"first", self.client_address)


async def datagram_function(request: Any, client_address: Any, server: Any) -> None:
    data, sock = request
    await sock.sendto(data[::-1], client_address)


DATAGRAM_SCRIPTS: dict[str, tuple[Any, list[list[bytes | int]]]] = {
    # Of each script, what is sent, and how many datagrams come back.
    "echo": (EchoDatagram, [[b"one", 1, b"two\n", 1, bytes(8192), 1]]),
    "cut": (EchoDatagram, [[bytes(8193), 1, b"next", 1, bytes(20_000), 1]]),
    "lines": (DatagramLines, [[b"one\ntwo\n\nthree", 1, b"\n", 1, b"", 1]]),
    "several_replies": (SeveralReplies, [[b"one two three", 3, b"four", 1]]),
    "own_socket": (OwnSocket, [[b"x", 2, b"", 2]]),
    "function": (datagram_function, [[b"abc", 1, b"de", 1]]),
}


def blocking_text(handler: Any) -> Any:
    """Return the same handler, without ``async`` and ``await``, for socketserver."""
    source = re.sub(r"\b(?:async|await) ", "", inspect.getsource(handler))
    namespace = {
        **globals(),
        **{name: getattr(socketserver, name) for name in socketserver.__all__},
    }
    exec(compile(source, f"<{handler.__name__} for socketserver>", "exec"), namespace)
    return namespace[handler.__name__]


@contextlib.contextmanager
def oracle_serving(oracle_class: type[Any], address: Any, handler: Any) -> Iterator[Any]:
    """Run a server of socketserver in a thread."""

    class Oracle(oracle_class):  # type: ignore[misc]
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Print nothing."""

    with Oracle(address, handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.005,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def receive_exactly(client: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size and (chunk := client.recv(min(size - len(received), 65536))):
        received += chunk
    return received


def pieces(data: bytes, rng: random.Random | None) -> Iterator[bytes]:
    """Cut *data* where the generator says, if there is one."""
    while rng is not None and len(data) > 1:
        size = min(rng.choice((1, 2, 3, 10, 1000)), len(data))
        yield data[:size]
        data = data[size:]
    if data:
        yield data


def perform(address: Any, script: Script, rng: random.Random | None) -> list[bytes]:
    """Be a client that follows *script*, and return what came for each of its steps."""
    transcript = []
    with connect(address) as client:
        for step in script:
            if isinstance(step, bytes):
                for piece in pieces(step, rng):
                    client.sendall(piece)
            elif isinstance(step, int):
                transcript.append(receive_exactly(client, step))
            elif step == HALF_CLOSE:
                client.shutdown(socket.SHUT_WR)
            else:
                transcript.append(receive_exactly(client, sys.maxsize))
    return transcript


def perform_all(address: Any, scripts: list[Script]) -> list[list[bytes]]:
    """Follow each script thrice: sent in whole pieces, and cut in two random ways."""
    return [
        perform(address, script, rng)
        for script in scripts
        for rng in (None, random.Random(3), random.Random(4))
    ]


def exchange(
    make_client: Callable[[], socket.socket], scripts: list[list[bytes | int]]
) -> list[list[bytes]]:
    """The same for datagrams."""
    transcripts = []
    for script in scripts:
        with make_client() as client:
            transcript = []
            for step in script:
                if isinstance(step, bytes):
                    client.send(step)
                else:
                    transcript += [client.recv(65536) for _ in range(step)]
            transcripts.append(transcript)
    return transcripts


@each_stream_server
@pytest.mark.parametrize("name", STREAM_SCRIPTS)
@bounded
async def test_a_stream_handler_does_what_it_does_in_socketserver(
    server_class: type[Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, logger="trio_socketserver")
    handler, scripts = STREAM_SCRIPTS[name]
    address = bind_address(server_class, tmp_path)
    with oracle_serving(ORACLES[server_class], address, blocking_text(handler)) as oracle:
        expected = await trio.to_thread.run_sync(
            perform_all, oracle.server_address, scripts
        )
    server = server_class(bind_address(server_class, tmp_path), handler)
    async with serving(server):
        seen = await trio.to_thread.run_sync(perform_all, server.server_address, scripts)
    assert seen == expected
    assert getattr(server, "heard", None) == getattr(oracle, "heard", None)
    assert server.statistics().accepted == 3 * len(scripts)
    assert_sums_up(server)
    # The oracle has been asked something.
    assert any(map(len, expected))


@each_datagram_server
@pytest.mark.parametrize("name", DATAGRAM_SCRIPTS)
@bounded
async def test_a_datagram_handler_does_what_it_does_in_socketserver(
    server_class: type[Any], name: str, tmp_path: Path
) -> None:
    handler, scripts = DATAGRAM_SCRIPTS[name]
    address = bind_address(server_class, tmp_path)
    with oracle_serving(ORACLES[server_class], address, blocking_text(handler)) as oracle:
        make_client = functools.partial(datagram_client, oracle, tmp_path)
        expected = await trio.to_thread.run_sync(exchange, make_client, scripts)
    server = server_class(bind_address(server_class, tmp_path), handler)
    async with serving(server):
        make_client = functools.partial(datagram_client, server, tmp_path)
        seen = await trio.to_thread.run_sync(exchange, make_client, scripts)
    assert seen == expected
    assert_sums_up(server)
    assert any(map(len, expected[0]))


# == Where the oracle is not followed =====================================================


class NoReply(DatagramRequestHandler):
    async def handle(self) -> None:
        if self.packet != b"be silent":
            self.wfile.write(b"reply")
        if self.packet == b"fail":
            raise RuntimeError("a fault of ours")


@bounded
async def test_no_reply_is_sent_where_none_was_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """socketserver answers with an empty datagram, or with half of a reply."""
    caplog.set_level(logging.CRITICAL, logger="trio_socketserver")
    script: list[bytes | int] = [b"be silent", b"fail", b"speak", 1]
    server_class = trio_socketserver.UDPServer
    with (
        oracle_serving(socketserver.UDPServer, LOCALHOST, blocking_text(NoReply)) as oracle,
        datagram_client(oracle) as client,
    ):
        for datagram in (b"be silent", b"fail", b"speak"):
            client.send(datagram)
        theirs = [await trio.to_thread.run_sync(client.recv, 100) for _ in range(3)]
    assert theirs == [b"", b"reply", b"reply"]
    server = server_class(LOCALHOST, NoReply)
    async with serving(server):
        make_client = functools.partial(datagram_client, server, tmp_path)
        seen = await trio.to_thread.run_sync(exchange, make_client, [script])
        with datagram_client(server) as client:
            client.send(b"be silent")
            client.send(b"fail")
            await trio.testing.wait_all_tasks_blocked()
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.recv(100)
    assert seen == [[b"reply"]]
    assert server.statistics().failed == 2


@bounded
async def test_a_burst_of_six_needs_no_retried_syn() -> None:
    """socketserver's queue of 5 makes the seventh client wait a second."""

    def burst(address: Any, count: int) -> int:
        """Return how many of so many clients connect without waiting."""
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket()) for _ in range(count)]
            for client in clients:
                client.setblocking(False)
                client.connect_ex(address)
            return sum(map(is_connected, clients))

    def is_connected(client: socket.socket) -> bool:
        try:
            return bool(client.getpeername())
        except OSError:
            return False

    with socketserver.TCPServer(LOCALHOST, socketserver.BaseRequestHandler) as oracle:
        assert burst(oracle.server_address, 100) < 10
    async with TCPServer(LOCALHOST, BaseRequestHandler) as server:
        assert burst(server.server_address, 100) == 100
