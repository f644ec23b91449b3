"""Holds TLS to what blocking handlers may do with the `ssl.SSLSocket` they get, in threads
and children: everything they do with one of `ssl`'s, and old handlers unmodified."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import math
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from blocking_servers import (
    PARKED,
    ends,
    forks_with_threads,
    happens,
    in_thread,
    park,
    wait_for,
)
from blocking_world import PATIENCE, clock, serving
from helpers import (
    REAL_LIMIT,
    bounded,
    close_with_reset,
    connect,
    connected,
    receive_until_closed,
)
from tls_world import (
    AT_A_LINE,
    AUTHORITY,
    HOST,
    ask,
    client_context,
    each_version,
    receive_rest,
    server_context,
    tls_connect,
)

from trio_socketserver import (
    ConnectionBroken,
    ForkingTCPServer,
    RequestTimeout,
    TCPServer,
    ThreadingTCPServer,
    _blocking_tls,
)
from trio_socketserver._blocking_tls import SecureSocket, secure, shake_hands

__all__ = ["clock"]  # A fixture.

pytestmark = forks_with_threads

each_server = pytest.mark.parametrize(
    "server_class", [TCPServer, ThreadingTCPServer, ForkingTCPServer]
)
in_threads = pytest.mark.parametrize("server_class", [TCPServer, ThreadingTCPServer])


def make(server_class: Any, handler: Any, **attributes: Any) -> Any:
    own_class = type(server_class.__name__, (server_class,), attributes)
    return own_class((HOST, 0), handler, ssl_context=server_context())


# -- handlers ------------------------------------------------------------------------------


def uses_two_files(request: Any, client_address: Any, server: Any) -> None:
    reader, writer = request.makefile("rb"), request.makefile("wb")
    writer.write(reader.readline().upper())
    writer.flush()
    another = request.makefile("rwb", buffering=0)
    another.write(reader.readline().upper())


def closes(request: Any, client_address: Any, server: Any) -> None:
    request.sendall(request.recv(100).upper())
    request.close()
    request.close()


def uses_with(request: Any, client_address: Any, server: Any) -> None:
    with request, request.makefile("rwb") as file:
        file.write(file.readline().upper())


def ends_it(request: Any, client_address: Any, server: Any) -> None:
    request.sendall(request.recv(100).upper())
    request.shutdown(socket.SHUT_RDWR)
    assert request.recv(100) == b""


def ends_reading(request: Any, client_address: Any, server: Any) -> None:
    data = request.recv(100)
    request.shutdown(socket.SHUT_RD)
    request.sendall(data.upper())


def calls_the_hook(request: Any, client_address: Any, server: Any) -> None:
    request.sendall(request.recv(100).upper())
    server.shutdown_request(request)


def sets_a_timeout(request: Any, client_address: Any, server: Any) -> None:
    assert request.gettimeout() is None
    request.sendall(request.recv(100).upper())
    request.settimeout(0.01)
    with pytest.raises(TimeoutError):
        request.recv(100)


def unwraps(request: Any, client_address: Any, server: Any) -> None:
    request.sendall(request.recv(100).upper())
    with contextlib.suppress(OSError):
        request.settimeout(0)
        request.unwrap()


def is_the_thing(request: Any, client_address: Any, server: Any) -> None:
    assert isinstance(request, ssl.SSLSocket)
    assert type(request).__name__ == "SSLSocket"
    assert request.getblocking()
    assert request.context is server.ssl_context
    assert request.getpeername() == client_address
    request.settimeout(REAL_LIMIT)
    request.do_handshake()
    buffer = bytearray(100)
    size = request.recv_into(buffer)
    assert request.send(buffer[:size].upper()) == size


HANDLERS = [
    closes,
    uses_with,
    ends_it,
    ends_reading,
    calls_the_hook,
    sets_a_timeout,
    unwraps,
    is_the_thing,
]


@pytest.mark.parametrize("handler", HANDLERS, ids=lambda handler: handler.__name__)
@each_version
@each_server
@bounded
async def test_whatever_it_does_the_client_gets_close_notify(
    server_class: Any, version: Any, handler: Any
) -> None:
    server = make(server_class, handler)
    async with serving(server):
        answer = await ask(server, b"hello\n", context=client_context(version))
    assert answer == b"HELLO\n"
    assert server.statistics().completed == 1


@each_server
@bounded
async def test_files_may_be_left_open(server_class: Any) -> None:
    server = make(server_class, uses_two_files)
    async with serving(server):
        assert await ask(server, b"one\n", b"two\n") == b"ONE\nTWO\n"
    assert server.statistics().completed == 1


@each_server
@bounded
async def test_after_ending_its_side_it_still_receives(server_class: Any) -> None:
    """As from any socket. That of `ssl` would receive what is encrypted."""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        assert request.recv(1) == b"?"
        request.sendall(b"last words")
        request.shutdown(socket.SHUT_WR)
        assert request.recv(100) == b"answer"

    def client() -> bytes:
        with client_context().wrap_socket(
            connect(server.server_address), server_hostname=HOST
        ) as sock:
            sock.sendall(b"?")
            received = receive_rest(sock)
            sock.sendall(b"answer")
            socket.socket.shutdown(sock, socket.SHUT_WR)
            return received

    server = make(server_class, handler)
    async with serving(server):
        assert await in_thread(client) == b"last words"
    assert server.statistics().completed == 1


def shaken(sock: socket.socket) -> tuple[ssl.SSLObject, ssl.MemoryBIO]:
    """Shake hands as a client; return what encrypts, and where to."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    engine = client_context().wrap_bio(incoming, outgoing, server_hostname=HOST)
    while True:
        try:
            engine.do_handshake()
            return engine, outgoing
        except ssl.SSLWantReadError:
            sock.sendall(outgoing.read())
            incoming.write(sock.recv(65536))


def client_whose_end_is_followed_by_clear_text(address: Any) -> None:
    with connect(address) as sock:
        engine, outgoing = shaken(sock)
        engine.write(b"hello")
        with contextlib.suppress(ssl.SSLError):
            engine.unwrap()
        sock.sendall(outgoing.read())
        while sock.recv(65536):
            pass  # Until the handler has ended its side.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(b"injected")


@each_server
@bounded
async def test_nothing_in_clear_is_received_after_the_end(server_class: Any) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        assert request.recv(100) == b"hello"
        assert request.recv(100) == b""
        request.shutdown(socket.SHUT_WR)
        time.sleep(0.05)  # For what would be injected; too short is too lenient.
        assert request.recv(100) == b""
        assert request.recv_into(bytearray(9)) == 0

    server = make(server_class, handler)
    async with serving(server):
        await in_thread(client_whose_end_is_followed_by_clear_text, server.server_address)
    assert server.statistics().completed == 1


@each_server
@bounded
async def test_ending_its_side_loses_nothing_that_has_come(server_class: Any) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        assert request.recv(5) == b"first"
        request.shutdown(socket.SHUT_WR)
        assert request.recv(100) == b", and more"

    server = make(server_class, handler)
    async with serving(server):
        with contextlib.suppress(ssl.SSLEOFError):
            await ask(server, b"first, and more")
    assert server.statistics().completed == 1


@each_server
@bounded
async def test_a_thread_of_its_own_may_wait_still(server_class: Any) -> None:
    ended = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        def receive() -> None:
            with contextlib.suppress(OSError, ValueError):
                request.recv(100)
            ended.set()

        threading.Thread(target=receive, daemon=True).start()
        while not request._users:
            time.sleep(0.001)

    server = make(server_class, handler)
    async with serving(server):
        with contextlib.suppress(ssl.SSLEOFError):
            await ask(server)
        if server_class is not ForkingTCPServer:
            await happens(ended)
    assert server.statistics().completed == 1


@each_server
@bounded
async def test_an_error_of_its_own_is_reported(server_class: Any) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(b"so far")
        raise ZeroDivisionError

    server = make(server_class, handler)
    async with serving(server):
        assert await ask(server) == b"so far"
    assert server.statistics().failed == 1
    assert server.statistics().peer_errors == 0


@bounded
async def test_no_handler_where_there_was_no_handshake() -> None:
    called = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        called.set()

    server = make(ThreadingTCPServer, handler)
    async with serving(server):
        with connect(server.server_address) as client:
            await in_thread(client.sendall, b"HELO\r\n")
            await in_thread(receive_until_closed, client)
    assert server.statistics().peer_errors == 1
    assert not called.is_set()


@in_threads
@bounded
async def test_what_has_been_used_is_not_for_threads(server_class: Any) -> None:
    errors: list[BaseException] = []

    class Mixed(server_class):  # type: ignore[misc]
        async def finish_request(self, request: Any, client_address: Any) -> None:
            await request.send_all(b"hello")
            try:
                await super().finish_request(request, client_address)
            except RuntimeError as error:
                errors.append(error)

    server = make(Mixed, park)
    async with serving(server):
        assert await ask(server) == b"hello"
    assert "used asynchronously" in str(errors[0])


@bounded
async def test_a_context_with_sockets_of_its_own() -> None:
    class Counting(ssl.SSLSocket):
        count = 0

        def sendall(self, data: Any, flags: int = 0) -> None:
            type(self).count += 1
            super().sendall(data, flags)

    def handler(request: Any, client_address: Any, server: Any) -> None:
        assert isinstance(request, Counting)
        request.sendall(b"hello")

    server = make(ThreadingTCPServer, handler)
    server.ssl_context.sslsocket_class = Counting
    async with serving(server):
        assert await ask(server) == b"hello"


# -- waking --------------------------------------------------------------------------------


@in_threads
@bounded
async def test_a_handler_that_waits_is_woken(server_class: Any) -> None:
    server = make(server_class, park)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with await in_thread(tls_connect, server.server_address) as client:
            assert await in_thread(client.recv, 100) == PARKED
            server._requests.cancel()
            nursery.cancel_scope.cancel()
    assert server.statistics().cancelled == 1


@in_threads
@bounded
async def test_a_handler_that_sends_is_woken(server_class: Any) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        request.sendall(bytes(10**8))

    server = make(server_class, handler)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with await in_thread(tls_connect, server.server_address) as client:
            assert await in_thread(client.recv, len(PARKED)) == PARKED
            server._requests.cancel()
            nursery.cancel_scope.cancel()
    assert server.statistics().cancelled == 1


@bounded
async def test_an_abandoned_thread_closes_its_connection() -> None:
    woken = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        threads.append(threading.current_thread())
        wait_for(woken)

    threads: list[threading.Thread] = []
    server = make(ThreadingTCPServer, handler, daemon_threads=True)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with await in_thread(tls_connect, server.server_address) as client:
            assert await in_thread(client.recv, 100) == PARKED
            server._requests.cancel()
            nursery.cancel_scope.cancel()
    assert server.statistics().abandoned_threads == 1
    woken.set()
    await ends(*threads)


@each_server
@bounded
async def test_request_timeout_ends_it(
    server_class: Any, clock: trio.testing.MockClock
) -> None:
    server = make(server_class, park, request_timeout=PATIENCE)
    async with serving(server):
        with await in_thread(tls_connect, server.server_address) as client:
            assert await in_thread(client.recv, 100) == PARKED
            clock.jump(PATIENCE)
            with contextlib.suppress(OSError):
                assert await in_thread(client.recv, 100) == b""
    assert server.statistics().failed == 1


# -- the socket itself ---------------------------------------------------------------------


@contextlib.contextmanager
def two_blocking_ends(kind: str = "unix") -> Any:
    """Yield a socket as a handler gets it, and a client of `ssl`'s; no hands are shaken."""
    with connected(kind, small_buffers=True) as (theirs, ours):
        ours.setblocking(True)
        theirs.settimeout(REAL_LIMIT)
        server: Any = secure(ours, server_context())
        client = client_context().wrap_socket(
            theirs,
            server_hostname=HOST,
            do_handshake_on_connect=False,
            suppress_ragged_eofs=False,
        )
        with server, client:
            yield server, client


@contextlib.contextmanager
def established() -> Any:
    with two_blocking_ends() as (server, client):
        thread = threading.Thread(target=client.do_handshake)
        thread.start()
        shake_hands(server, math.inf)
        thread.join()
        yield server, client


def clog_below(sock: Any) -> None:
    """Send zeros in clear until the kernel takes no more."""
    sock.settimeout(0)
    for size in (512, 1, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                super(ssl.SSLSocket, sock).send(bytes(size))
    sock.settimeout(None)


def test_the_handshake_leaves_the_timeout_as_it_was() -> None:
    with two_blocking_ends() as (server, client):
        server.settimeout(17)
        thread = threading.Thread(target=client.do_handshake)
        thread.start()
        shake_hands(server, 60)
        thread.join()
        assert server.gettimeout() == 17


def test_the_handshake_takes_no_longer_than_it_may() -> None:
    message = r"handshake took longer than 0\.01 s"
    with (
        two_blocking_ends() as (server, _),
        pytest.raises(RequestTimeout, match=message),
    ):
        shake_hands(server, 0.01)


def test_a_reset_in_the_handshake() -> None:
    with two_blocking_ends("tcp") as (server, client):
        close_with_reset(client)
        with pytest.raises(ConnectionBroken):
            shake_hands(server, 60)


def test_a_connection_that_has_gone_cannot_be_secured() -> None:
    with connected("tcp") as (theirs, ours):
        theirs.send(b"hello")
        close_with_reset(theirs)
        with pytest.raises(ConnectionBroken):
            secure(ours, server_context())
        assert ours.fileno() == -1


def test_close_notify_waits_for_room_and_no_longer() -> None:
    with established() as (server, _):
        clog_below(server)
        start = time.monotonic()
        server.say_goodbye(0.2)
        assert time.monotonic() - start >= 0.2
        assert server.gettimeout() is None


def test_close_notify_comes_when_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = threading.Event()

    def has_room(sock: socket.socket, seconds: float) -> bool:
        waits.set()
        return really_has_room(sock, seconds)

    really_has_room = _blocking_tls._has_room
    monkeypatch.setattr(_blocking_tls, "_has_room", has_room)
    with established() as (server, client):
        clog_below(server)
        thread = threading.Thread(target=server.say_goodbye, args=(REAL_LIMIT,))
        thread.start()
        wait_for(waits)
        received = b""
        while not (record := received.rpartition(bytes(512))[2].lstrip(b"\0")):
            received += super(ssl.SSLSocket, client).recv(65536)
        assert record[:1] == b"\x17"  # In this version it looks like data.
        thread.join()


def test_a_send_that_was_cut_short_has_no_close_notify() -> None:
    with established() as (server, client):
        server.settimeout(0)
        with pytest.raises(ssl.SSLWantWriteError):
            server.sendall(bytes(10**8))
        server.say_goodbye(0)
        server.close()
        with pytest.raises(ssl.SSLEOFError):
            receive_rest(client)


def test_who_is_in_openssl_is_not_disturbed() -> None:
    with established() as (server, client):
        ended = threading.Event()

        def receive() -> None:
            with contextlib.suppress(OSError):
                server.recv(1)
            ended.set()

        thread = threading.Thread(target=receive)
        thread.start()
        while not server._users:
            time.sleep(0.001)
        server.say_goodbye(REAL_LIMIT)
        server.shutdown(socket.SHUT_RDWR)
        wait_for(ended)
        thread.join()
        with pytest.raises(ssl.SSLEOFError):
            receive_rest(client)


def test_nothing_is_said_before_the_handshake_or_after_closing() -> None:
    with two_blocking_ends() as (server, client):
        server.say_goodbye(0)
        server.close()
        server.say_goodbye(0)
        assert socket.socket.recv(client, 100) == b""


def test_it_is_what_it_was() -> None:
    with two_blocking_ends() as (server, _):
        assert isinstance(server, SecureSocket)
        assert type(server).__module__ == "ssl"


# -- old handlers --------------------------------------------------------------------------


class Page(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[::-1])


@each_server
@bounded
async def test_http_server(server_class: Any, tmp_path: Path, monkeypatch: Any) -> None:
    content = bytes(range(256)) * 4000
    (tmp_path / "file").write_bytes(content)
    monkeypatch.chdir(tmp_path)

    def client() -> None:
        context = client_context()
        connection = http.client.HTTPSConnection(
            *server.server_address, context=context, timeout=REAL_LIMIT
        )
        with contextlib.closing(connection):
            for _ in range(2):
                connection.request("GET", "/file")
                assert connection.getresponse().read() == content
            connection.request("POST", "/", body=b"abc" * 1000)
            assert connection.getresponse().read() == b"cba" * 1000
            connection.request("GET", "/none", headers={"Connection": "close"})
            assert connection.getresponse().status == 404

    server = make(server_class, Page)
    async with serving(server):
        await in_thread(client)
    assert server.statistics().completed == 1


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
@each_server
@bounded
async def test_curl(server_class: Any, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_bytes(b"a file\n")
    monkeypatch.chdir(tmp_path)
    authority = tmp_path / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(authority)

    def client() -> bytes:
        host, port = server.server_address
        url = f"https://{host}:{port}/file"
        options = ("-sS", "--max-time", "20", "--cacert", str(authority))
        command = [*AT_A_LINE, "curl", *options, url, url]
        return subprocess.run(command, input=b"\n", capture_output=True, check=True).stdout

    server = make(server_class, Page)
    async with serving(server):
        assert await in_thread(client) == b"a file\n" * 2


class OldEcho(socketserver.StreamRequestHandler):
    timeout = 0.1

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(line)


@each_server
@bounded
async def test_the_timeout_of_a_handler(server_class: Any) -> None:
    server = make(server_class, OldEcho)
    async with serving(server):
        assert await ask(server, b"hello\n") == b"hello\n"
    seen = server.statistics()
    assert (seen.failed, seen.peer_errors) == (1, 1)


async def meets_a_cut(handler: Any, timed_out: threading.Event) -> None:
    """Have a client read what a handler has sent until it timed out."""

    def client() -> None:
        with tls_connect(server.server_address) as sock:
            wait_for(timed_out)
            with pytest.raises(ssl.SSLEOFError):
                receive_rest(sock)

    server = make(ThreadingTCPServer, handler)
    async with serving(server):
        await in_thread(client)


@bounded
async def test_a_send_that_timed_out_between_two_records_is_cut() -> None:
    """OpenSSL holds nothing then: Python waits for room before it encrypts."""
    timed_out = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.settimeout(0.05)
        try:
            while True:
                request.sendall(bytes(8192))
        except TimeoutError:
            timed_out.set()

    await meets_a_cut(handler, timed_out)


SIZE = 4_000_000


class Much:
    """A handler that answers when its client has ended its side."""

    def __init__(self) -> None:
        self.asked, self.may_answer = threading.Event(), threading.Event()

    def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        request.recv(100)
        self.asked.set()
        wait_for(self.may_answer)
        request.sendall(bytes(SIZE))


class MuchAsync(Much):
    async def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        await request.recv(100)
        self.asked.set()
        await happens(self.may_answer)
        await request.sendall(bytes(SIZE))


@pytest.mark.parametrize("handler_class", [Much, MuchAsync])
@bounded
async def test_a_client_that_ends_its_side_gets_the_whole_answer(
    handler_class: Any,
) -> None:
    """Its close_notify is unread where the server closes, which would reset."""
    handler = handler_class()

    def client() -> int:
        received = 0
        with connect(server.server_address) as sock:
            engine, outgoing = shaken(sock)
            engine.write(b"all, please")
            sock.sendall(outgoing.read())
            wait_for(handler.asked)
            with contextlib.suppress(ssl.SSLError):
                engine.unwrap()
            sock.sendall(outgoing.read())
            sock.shutdown(socket.SHUT_WR)
            handler.may_answer.set()
            while chunk := sock.recv(20_000):
                received += len(chunk)  # Encrypted, and so a little more.
                time.sleep(0.001)  # So that the server closes meanwhile.
        return received

    server = make(ThreadingTCPServer, handler)
    async with serving(server):
        assert await in_thread(client) > SIZE


@bounded
async def test_what_is_written_below_send_is_cut_too() -> None:
    timed_out = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.settimeout(0.05)
        assert request.write(b"all of it") == 9
        assert not request._is_cut
        try:
            while True:
                request.write(bytes(8192))
        except TimeoutError:
            timed_out.set()

    await meets_a_cut(handler, timed_out)
