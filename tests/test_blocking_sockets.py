"""The sockets that blocking handlers hold behave as those of the standard library do."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import happens, in_thread
from blocking_world import (
    PATIENCE,
    Noting,
    calling_trio,
    clock,
    each_datagram_server,
    each_stream_server,
    is_true,
    make,
    parked,
    sequential_and_threading,
    serving,
)
from helpers import (
    REAL_LIMIT,
    assert_sums_up,
    bounded,
    connect,
    connected,
    datagram_client,
    receive,
    receive_to_end,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_socketserver import (
    RequestTimeout,
    ThreadingUDPServer,
    ThreadingUnixDatagramServer,
    UDPServer,
)
from trio_socketserver._blocking_sockets import DatagramView, lend
from trio_socketserver._sockets import DatagramSocket, StreamSocket
from trio_socketserver._workers import call_trio

__all__ = ["clock"]  # A fixture.

# -- connections ---------------------------------------------------------------------------


async def seen_by_handler(
    server_class: Any, folder: Path, look: Callable[[Any], object], **attributes: Any
) -> Any:
    """Return what *look* returns in a handler of a connection; it gets the request."""
    seen = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        seen.append(look(request))

    server = make(server_class, handler, folder, **attributes)
    async with serving(server):
        with connect(server.server_address) as client:
            client.sendall(b"some bytes")
            client.shutdown(socket.SHUT_WR)
            await receive_to_end(client)
    assert server.errors == []
    assert_sums_up(server)
    return seen[0]


@each_stream_server
@bounded
async def test_a_request_is_a_blocking_socket(server_class: Any, tmp_path: Path) -> None:
    def look(request: Any) -> Any:
        assert isinstance(request, socket.socket)
        assert type(request).__name__ == "socket"
        assert request.getblocking()
        assert request.gettimeout() is None
        assert os.get_blocking(request.fileno())
        return request.recv(100) + request.recv(100)

    assert await seen_by_handler(server_class, tmp_path, look) == b"some bytes"


@each_stream_server
@bounded
async def test_timeouts_work(server_class: Any, tmp_path: Path) -> None:
    class Impatient(Noting):
        timeout = 0.01

        def stall(self) -> None:
            with pytest.raises(TimeoutError):
                self.request.recv(1)

    server = make(server_class, Impatient, tmp_path)
    async with serving(server):
        with await parked(server) as client:
            await receive_to_end(client)
    assert server.notes == [(True, type(None)), "finished"]


@each_stream_server
@bounded
async def test_a_timeout_of_the_stream_carries_over(
    server_class: Any, tmp_path: Path
) -> None:
    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        request.settimeout(17)
        return True

    timeout = await seen_by_handler(
        server_class,
        tmp_path,
        lambda sock: sock.gettimeout(),
        verify_request=verify_request,
    )
    assert timeout == 17


@each_stream_server
@bounded
async def test_the_default_timeout_is_honoured(
    server_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = make(
        server_class, lambda request, *_: timeouts.append(request.gettimeout()), tmp_path
    )
    timeouts: list[float | None] = []
    async with serving(server):
        with connect(server.server_address) as client:
            socket.setdefaulttimeout(23)
            try:
                await receive_to_end(client)
            finally:
                socket.setdefaulttimeout(None)
    assert timeouts == [23]


@each_stream_server
@bounded
async def test_files_can_be_made_of_it(server_class: Any, tmp_path: Path) -> None:
    def look(request: socket.socket) -> str:
        with request.makefile("r", encoding="ascii") as file:
            assert isinstance(file, io.TextIOWrapper)
            return file.read()

    assert await seen_by_handler(server_class, tmp_path, look) == "some bytes"


@each_stream_server
@bounded
async def test_a_file_left_open_does_not_keep_the_connection(
    server_class: Any, tmp_path: Path
) -> None:
    files = []

    def look(request: socket.socket) -> None:
        files.append(request.makefile("rb"))
        files.append(request.makefile("rb", buffering=0))

    await seen_by_handler(server_class, tmp_path, look)
    with contextlib.suppress(OSError):  # The descriptor has gone.
        for file in files:
            file.close()


@each_stream_server
@bounded
async def test_the_peer_sees_at_once_that_the_handler_has_closed(
    server_class: Any, tmp_path: Path
) -> None:
    heard = threading.Event()

    def look(request: socket.socket) -> bool:
        request.recv(100)
        request.close()
        return heard.wait(REAL_LIMIT)

    def handler(request: socket.socket, client_address: Any, server: Any) -> None:
        server.notes.append(look(request))

    server = make(server_class, handler, tmp_path)
    async with serving(server):
        with connect(server.server_address) as client:
            client.sendall(b"some bytes")
            assert await receive(client) == b""
            assert server.statistics().active == 1
            heard.set()
    assert server.notes == [True]
    assert server.errors == []
    assert server.statistics().completed == 1


@each_stream_server
@bounded
async def test_a_handler_may_keep_the_connection(server_class: Any, tmp_path: Path) -> None:
    server = make(
        server_class, lambda request, *_: server.notes.append(request.detach()), tmp_path
    )
    async with serving(server):
        with connect(server.server_address) as client:
            await is_true(lambda: server.statistics().completed == 1)
            with socket.socket(fileno=server.notes[0]) as kept:
                kept.sendall(b"still here")
                assert await receive(client) == b"still here"


@each_stream_server
@bounded
async def test_after_the_handler_the_request_is_a_stream_again(
    server_class: Any, tmp_path: Path
) -> None:
    class Reusing(server_class):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            await super().finish_request(request, client_address)
            request.settimeout(0.01)
            with pytest.raises(RequestTimeout):
                await request.receive_some()
            await request.send_all(b"by the server")
            await super().finish_request(request, client_address)

    server = make(Reusing, lambda request, *_: request.sendall(b"handler "), tmp_path)
    async with serving(server):
        with connect(server.server_address) as client:
            assert await receive_to_end(client) == b"handler by the serverhandler "
    assert server.errors == []


@each_stream_server
@bounded
async def test_while_it_is_lent_the_stream_is_a_closed_one(
    server_class: Any, tmp_path: Path
) -> None:
    woken: list[type[BaseException]] = []

    class Watching(server_class):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            async def watch() -> None:
                try:
                    await request.receive_some()
                except trio.ClosedResourceError as error:
                    woken.append(type(error))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                await wait_all_tasks_blocked()
                await super().finish_request(request, client_address)

    server = make(Watching, lambda request, *_: request.sendall(b"x"), tmp_path)
    async with serving(server):
        with connect(server.server_address) as client:
            assert await receive_to_end(client) == b"x"
    assert woken == [trio.ClosedResourceError]


@sequential_and_threading
@bounded
async def test_a_request_of_another_kind_is_given_as_it_is(
    server_class: Any, tmp_path: Path
) -> None:
    class Wrapped:
        def __init__(self, stream: Any) -> None:
            self.aclose = stream.aclose

    class Wrapping(server_class):
        async def get_request(self) -> tuple[Any, Any]:
            request, client_address = await super().get_request()
            return Wrapped(request), client_address

    assert isinstance(await seen_by_handler(Wrapping, tmp_path, lambda r: r), Wrapped)


@bounded
async def test_what_is_neither_connection_nor_datagram() -> None:
    loan = lend("anything", calling_trio())
    assert loan.request == "anything"
    loan.wake()
    loan.end()
    loan.close()


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server and its client, by a certificate that openssl makes."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
    command += " -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    try:
        subprocess.run(
            [*command.split(), "-keyout", "key.pem", "-out", "cert.pem"],
            cwd=folder,
            check=True,
            capture_output=True,
        )
    except FileNotFoundError:
        pytest.skip("no openssl here")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return server, ssl.create_default_context(cafile=folder / "cert.pem")


@sequential_and_threading
@bounded
async def test_a_handler_may_wrap_it_in_tls(
    server_class: Any, tmp_path: Path, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    theirs, ours = tls

    class Wrapping(socketserver.StreamRequestHandler):
        def setup(self) -> None:
            self.request = theirs.wrap_socket(self.request, server_side=True)
            super().setup()

        def handle(self) -> None:
            for line in self.rfile:
                self.wfile.write(line)

        def finish(self) -> None:
            super().finish()
            self.request.close()
            self.server.finished.set()

    def client() -> bytes:
        with (
            connect(server.server_address) as plain,
            ours.wrap_socket(plain, server_hostname="localhost") as sock,
        ):
            sock.sendall(b"secret\n")
            answer = sock.recv(100)
            parked.set()
            with contextlib.suppress(OSError):
                assert sock.recv(1) == b""
            return answer

    parked = threading.Event()
    server = make(server_class, Wrapping, tmp_path, block_on_close=False)
    async with trio.open_nursery() as nursery:
        async with serving(server):

            @nursery.start_soon
            async def converse() -> None:
                assert await in_thread(client) == b"secret\n"

            await happens(parked)
        # The handler, in the midst of TLS, was woken.
        assert server.finished.is_set()
        assert server.statistics().cancelled == 1


# -- datagrams -----------------------------------------------------------------------------


@contextlib.contextmanager
def a_datagram(server: Any, folder: Path, data: bytes = b"ask") -> Iterator[socket.socket]:
    with datagram_client(server, folder) as client:
        client.send(data)
        yield client


@each_datagram_server
@bounded
async def test_a_datagram_request(server_class: Any, tmp_path: Path) -> None:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            data, sock = self.request
            assert isinstance(sock, socket.socket)
            assert sock.getsockname() == self.server.socket.getsockname()
            assert sock.fileno() != self.server.socket.fileno()
            assert sock.getblocking()
            assert sock.gettimeout() is None
            assert sock.sendto(data.upper(), self.client_address) == len(data)
            assert sock.sendto(b"by flags", 0, self.client_address) == 8

    server = make(server_class, Handler, tmp_path)
    async with serving(server):
        with a_datagram(server, tmp_path) as client:
            assert await receive(client) == b"ASK"
            assert await receive(client) == b"by flags"
    assert server.errors == []


@each_datagram_server
@bounded
async def test_the_old_handler_class(server_class: Any, tmp_path: Path) -> None:
    class Handler(socketserver.DatagramRequestHandler):
        def handle(self) -> None:
            self.wfile.write(self.rfile.read().upper())

    server = make(server_class, Handler, tmp_path)
    async with serving(server):
        with a_datagram(server, tmp_path) as client:
            assert await receive(client) == b"ASK"


@each_datagram_server
@bounded
async def test_settings_of_a_view_are_its_own(server_class: Any, tmp_path: Path) -> None:
    seen = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        _, sock = request
        for setting in (sock.setblocking, sock.settimeout):
            setting(0)
            assert (sock.gettimeout(), sock.getblocking()) == (0, False)
            with pytest.raises(BlockingIOError):
                sock.recvfrom(100, socket.MSG_PEEK)
        sock.setblocking(True)
        assert (sock.gettimeout(), sock.getblocking()) == (None, True)
        with pytest.raises(ValueError, match="out of range"):
            sock.settimeout(-1)
        sock.settimeout(2.5)
        assert (sock.gettimeout(), sock.getblocking()) == (2.5, True)
        seen.append((server.socket.gettimeout(), os.get_blocking(server.fileno())))
        sock.close()
        assert sock.fileno() == -1

    server = make(server_class, handler, tmp_path)
    async with serving(server):
        for count in (1, 2):  # The second finds nothing of what the first has set.
            with a_datagram(server, tmp_path):
                await is_true(lambda count=count: server.statistics().completed == count)
    assert server.errors == []
    assert seen == [(0.0, False)] * 2


@each_datagram_server
@bounded
async def test_the_default_timeout_of_a_view(server_class: Any, tmp_path: Path) -> None:
    server = make(
        server_class,
        lambda request, *_: server.notes.append(request[1].gettimeout()),
        tmp_path,
    )
    async with serving(server):
        with a_datagram(server, tmp_path):
            socket.setdefaulttimeout(23)
            try:
                await is_true(lambda: server.statistics().completed == 1)
            finally:
                socket.setdefaulttimeout(None)
    assert server.notes == [23]


class Conversing(socketserver.BaseRequestHandler):
    """Takes the next datagram too, while the loop of a sequential server waits."""

    def handle(self) -> None:
        data, sock = self.request
        sock.sendto(b"go on", self.client_address)
        buffer = bytearray(100)
        match data:
            case b"recv":
                answer = sock.recv(100)
            case b"recvfrom":
                answer, address = sock.recvfrom(100)
                assert address == self.client_address
            case b"recv_into":
                answer = bytes(buffer[: sock.recv_into(buffer)])
            case b"recvfrom_into":
                size, _ = sock.recvfrom_into(buffer, nbytes=100)
                answer = bytes(buffer[:size])
            case b"recvmsg":
                answer = sock.recvmsg(100)[0]
            case b"recvmsg_into":
                answer = bytes(buffer[: sock.recvmsg_into([buffer])[0]])
        sock.sendmsg([answer, b"!"], [], 0, self.client_address)


@pytest.mark.parametrize(
    "method", ["recv", "recvfrom", "recv_into", "recvfrom_into", "recvmsg", "recvmsg_into"]
)
@pytest.mark.parametrize("late", [False, True])
@bounded
async def test_receiving_waits(method: str, late: bool, tmp_path: Path) -> None:
    server = make(UDPServer, Conversing, tmp_path)
    async with serving(server):
        with a_datagram(server, tmp_path, method.encode()) as client:
            if not late:
                client.send(b"second")
            assert await receive(client) == b"go on"
            if late:
                await wait_all_tasks_blocked(0.005)
                client.send(b"second")
            assert await receive(client) == b"second!"
    assert server.errors == []


@bounded
async def test_receiving_is_bounded_by_the_timeout(tmp_path: Path) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        _, sock = request
        sock.settimeout(0.01)
        begin = time.monotonic()
        with pytest.raises(TimeoutError, match="timed out"):
            sock.recv(1)
        assert time.monotonic() - begin >= 0.01
        sock.sendto(b"done", client_address)

    server = make(UDPServer, handler, tmp_path)
    async with serving(server):
        with a_datagram(server, tmp_path) as client:
            assert await receive(client) == b"done"
    assert server.errors == []


@each_datagram_server
@pytest.mark.parametrize("way", ["block_on_close", "request_timeout"])
@bounded
async def test_a_handler_that_waits_for_a_datagram_can_be_cancelled(
    server_class: Any, way: str, tmp_path: Path, clock: MockClock
) -> None:
    parked = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        _, sock = request
        parked.set()
        try:
            while True:
                sock.recv(1)
        except BaseException as error:
            os.fstat(sock.fileno())
            server.notes.append(type(error))
            raise

    server = make(server_class, handler, tmp_path, block_on_close=False)
    if way == "request_timeout":
        server.request_timeout = PATIENCE
    async with serving(server):
        with a_datagram(server, tmp_path):
            await happens(parked)
            if way == "request_timeout":
                clock.jump(PATIENCE)
                await is_true(lambda: server.statistics().active == 0)
    assert server.notes == [trio.Cancelled]
    assert [type(error) for error in server.errors] == [RequestTimeout][
        : way == "request_timeout"
    ]
    assert_sums_up(server)


@each_datagram_server
@bounded
async def test_without_a_descriptor_only_that_datagram_fails(
    server_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dup(descriptor: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request[1].sendto(request[0], client_address)

    server = make(server_class, handler, tmp_path)
    async with serving(server):
        with monkeypatch.context() as patch, a_datagram(server, tmp_path):
            patch.setattr(os, "dup", dup)
            await is_true(lambda: server.statistics().failed == 1)
        with a_datagram(server, tmp_path) as client:
            assert await receive(client) == b"ask"
    assert [error.errno for error in server.errors] == [errno.EMFILE]


@each_stream_server
@bounded
async def test_a_stream_that_has_been_closed_before(
    server_class: Any, tmp_path: Path
) -> None:
    async def finish_request(self: Any, request: Any, client_address: Any) -> None:
        await request.aclose()
        await super(type(self), self).finish_request(request, client_address)

    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.notes.append(request.fileno())

    server = make(server_class, handler, tmp_path, finish_request=finish_request)
    async with serving(server):
        with connect(server.server_address) as client:
            await receive_to_end(client)
            await is_true(lambda: server.statistics().active == 0)
    # Whether the handler is asked to see it or not: nothing worse happens.
    assert len(server.notes) + len(server.errors) == 1
    assert_sums_up(server)


class Flooding(socketserver.BaseRequestHandler):
    """Sends until it has to wait, and then on."""

    def handle(self) -> None:
        _, sock = self.request
        self.server.finished.set()
        sent = 0
        try:
            while sent < 2000:
                sock.sendto(b"x" * 1000, self.client_address)
                sent += 1
        finally:
            self.server.notes.append((sent, type(sys.exception())))


@each_datagram_server
@bounded
async def test_a_unix_peer_that_does_not_read_is_waited_for(
    server_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if server_class.address_family != socket.AF_UNIX:
        server_class = ThreadingUnixDatagramServer
    offers = []
    sendto = DatagramSocket._sendto

    def counting(self: Any, *args: Any) -> Any:
        offers.append(args)
        return sendto(self, *args)

    monkeypatch.setattr(DatagramSocket, "_sendto", counting)
    server = make(server_class, Flooding, tmp_path, block_on_close=False)
    # The client outlives the handler, which would be told if it went.
    with datagram_client(server, tmp_path) as client:
        async with serving(server):
            client.send(b"ask")
            await is_true(lambda: len(offers) > 3)
    ((sent, error),) = server.notes
    assert 0 < sent < 2000
    assert error is trio.Cancelled
    assert len(offers) < 50  # It waits between its offers, longer and longer.
    assert server.statistics().cancelled == 1


@bounded
async def test_a_unix_peer_that_reads_late_gets_all(tmp_path: Path) -> None:
    server = make(ThreadingUnixDatagramServer, Flooding, tmp_path)
    async with serving(server):
        with datagram_client(server, tmp_path) as client:
            client.send(b"ask")
            await happens(server.finished)
            for _ in range(2000):
                assert len(await receive(client)) == 1000
    assert server.notes == [(2000, type(None))]


@bounded
async def test_sending_is_bounded_by_the_timeout_too(tmp_path: Path) -> None:
    def send_on(sock: socket.socket, address: Any) -> None:
        while True:
            sock.sendto(b"x" * 1000, address)

    def handler(request: Any, client_address: Any, server: Any) -> None:
        _, sock = request
        for timeout, error in ((0.01, TimeoutError), (0, BlockingIOError)):
            sock.settimeout(timeout)
            with pytest.raises(error):
                send_on(sock, client_address)
        server.finished.set()

    server = make(ThreadingUnixDatagramServer, handler, tmp_path)
    async with serving(server):
        with a_datagram(server, tmp_path):
            await happens(server.finished)
    assert server.errors == []


@bounded
async def test_threads_of_the_handlers_own_are_woken_too(tmp_path: Path) -> None:
    """Their waits are nobody's to cancel in trio, so the view does it."""
    ended: list[Any] = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        _, sock = request

        def receive_on() -> None:
            waiting.set()
            for _ in range(2):
                try:
                    ended.append(sock.recv(1))
                except OSError as error:
                    ended.append(type(error))

        thread = threading.Thread(target=receive_on)
        thread.start()
        thread.join(REAL_LIMIT)
        server.notes.append(thread.is_alive())

    waiting = threading.Event()
    server = make(UDPServer, handler, tmp_path, block_on_close=False)
    async with serving(server):
        with a_datagram(server, tmp_path):
            await happens(waiting)
            await wait_all_tasks_blocked(0.01)
    assert ended == [BrokenPipeError] * 2
    assert server.notes == [False]


@bounded
async def test_a_thread_that_outlives_its_handler_is_woken(tmp_path: Path) -> None:
    """The view is closed at the handler's end; a stale wait on it would harm others."""
    ended: list[Any] = []
    threads = []
    waiting = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        _, sock = request

        def receive_on() -> None:
            waiting.set()
            try:
                ended.append(sock.recv(1))
            except Exception as error:
                ended.append(error)

        threads.append(threading.Thread(target=receive_on))
        threads[0].start()
        trio.from_thread.run(wait_all_tasks_blocked, 0.01)

    server = make(ThreadingUDPServer, handler, tmp_path)
    async with serving(server):
        with a_datagram(server, tmp_path):
            await happens(waiting)
            await in_thread(threads[0].join, 5)
    assert [isinstance(error, OSError) for error in ended] == [True]


@bounded
async def test_a_view_in_trio(tmp_path: Path) -> None:
    """A view is made in trio's thread, and closing the server leaves it alone."""
    server = make(ThreadingUDPServer, Conversing, tmp_path)
    async with server:
        sender = DatagramSocket(server.socket)
        view = DatagramView(sender, calling_trio())
        with view, datagram_client(server) as client:
            server.socket.close()
            client.send(b"there")
            assert await in_thread(view.recv, 100) == b"there"
            with pytest.raises(OSError, match="Destination address required"):
                view.send(b"x")


@bounded
async def test_a_view_is_a_socket_in_small_things_too() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        call = functools.partial(call_trio, trio.lowlevel.current_trio_token())
        with DatagramView(DatagramSocket(sock), call) as view:
            assert view.timeout is None
            view.settimeout(3)
            assert view.timeout == view.gettimeout() == 3
            for receive_now in (
                lambda: view.recvfrom(9, socket.MSG_DONTWAIT),
                lambda: view.recv_into(bytearray(9), 9, socket.MSG_DONTWAIT),
                lambda: view.recv_into(bytearray(9), flags=socket.MSG_DONTWAIT),
            ):
                with pytest.raises(BlockingIOError):
                    receive_now()
            with view.dup() as copy:
                assert copy.fileno() not in (view.fileno(), sock.fileno())
                assert copy.getsockname() == sock.getsockname()
        assert sock.gettimeout() == 0


@bounded
async def test_a_view_outlives_trio_as_a_socket_that_is_shut_down() -> None:
    def finished(function: Any) -> Any:
        raise trio.RunFinishedError

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.setblocking(False)
        view = DatagramView(DatagramSocket(sock), finished)
        with view, pytest.raises(BrokenPipeError):
            view.recv(1)


@bounded
async def test_what_an_abandoned_handler_leaves_open_is_closed() -> None:
    """A file of the connection's, for example, that its finish() did not come to."""
    with connected("tcp") as (client, ours):
        loan = lend(StreamSocket(ours), call_trio)
        file = loan.request.makefile("rb")
        loan.close()
        assert loan.request.fileno() == -1
        assert await receive(client) == b""
        del file
