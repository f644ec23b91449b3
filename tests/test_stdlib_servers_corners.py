"""What `serve_blocking` does in corners: no socket, no thread, no child, no time."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from typing import Any

import pytest
import trio
import trio.testing
from blocking_servers import (
    client_of,
    happens,
    in_thread,
    make,
    no_impatience,
    served,
)
from helpers import REAL_LIMIT, bounded, receive

from trio_socketserver import _stdlib_loop, _stdlib_servers, serve_blocking
from trio_socketserver._workers import Workers

__all__ = ["no_impatience"]  # A fixture.


def echo(request: Any, client_address: Any, server: Any) -> None:
    request.sendall(request.recv(64))


@bounded
async def test_a_server_need_not_have_a_socket() -> None:
    lines: list[bytes] = []

    class Server(socketserver.BaseServer):
        def fileno(self) -> int:
            return reader

        def get_request(self) -> Any:
            return os.read(reader, 64), "the pipe"

    def keep(request: bytes, client_address: str, server: Any) -> None:
        lines.append(request)
        server.shutdown()

    reader, writer = os.pipe()
    try:
        os.write(writer, b"hello")
        await serve_blocking(Server("nowhere", keep))
    finally:
        os.close(reader)
        os.close(writer)
    assert lines == [b"hello"]


@bounded
async def test_a_loop_without_a_socket_ends_by_closing() -> None:
    begun, closed = threading.Event(), threading.Event()

    class Server(socketserver.BaseServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            begun.set()
            assert closed.wait(REAL_LIMIT)

        def shutdown(self) -> None:
            """Tell nobody."""

        def server_close(self) -> None:
            closed.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(serve_blocking, Server("nowhere", echo))
        await happens(begun)
        nursery.cancel_scope.cancel()
    assert closed.is_set()


@bounded
async def test_waiting_for_the_loop_may_have_an_end() -> None:
    server = make(echo)
    thread = _stdlib_loop.ServingThread(server, lambda *_: None, lambda: None, lambda: None)
    with thread.adopted():
        stopped = server._BaseServer__is_shut_down
        assert stopped.wait()
        await in_thread(stopped.clear)
        assert not stopped.is_set()
        assert not stopped.wait(0.01)
        stopped.set()
        assert stopped.wait(0.01)
    server.server_close()


def test_a_connection_that_comes_while_stopping_is_woken() -> None:
    server = make(echo)
    thread = _stdlib_loop.ServingThread(server, lambda *_: None, lambda: None, lambda: None)
    late, peer = socket.socketpair()
    with thread.adopted(), late, peer:
        thread.stop()
        thread.waker(late)
        assert peer.recv(1) == b""
    server.server_close()


@bounded
async def test_no_thread_for_a_request_costs_that_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(_stdlib_servers.Job):
        async def run(self, workers: Any) -> None:
            if " request " in self.name:
                raise RuntimeError("can't start new thread")
            await super().run(workers)

    server = make(echo, socketserver.ThreadingMixIn)
    async with served(server):
        monkeypatch.setattr(_stdlib_servers, "Job", Refusing)
        async with client_of(server) as client:
            assert await receive(client) == b""
        monkeypatch.undo()
        async with client_of(server) as client:
            client.sendall(b"ping")
            assert await receive(client) == b"ping"
    assert "can't start new thread" in caplog.text


@bounded
async def test_no_thread_for_a_datagram_costs_that_datagram(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Refusing(_stdlib_servers.Job):
        async def run(self, workers: Any) -> None:
            if " request " in self.name:
                refused.set()
                raise RuntimeError("can't start new thread")
            await super().run(workers)

    refused = trio.Event()
    server = make(echo, socketserver.ThreadingMixIn, socketserver.UDPServer)
    async with served(server):
        monkeypatch.setattr(_stdlib_servers, "Job", Refusing)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"ping", server.server_address)
            await refused.wait()
        monkeypatch.undo()
    assert "can't start new thread" in caplog.text


@bounded
async def test_a_child_that_has_gone_is_not_signalled() -> None:
    server = make(echo, socketserver.ForkingMixIn)
    serving = _stdlib_servers._Serving(server)
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    server.active_children = {child}
    serving._signal_children("SIGTERM")
    with serving.thread.adopted():
        server.server_close()


@bounded
async def test_a_request_may_wrap_what_was_accepted() -> None:
    """Such as another TLS library's connection, which is no socket."""
    parked = threading.Event()

    class Wrapper:
        def __init__(self, connection: socket.socket) -> None:
            self.connection = connection

        def shutdown(self, how: int) -> None:
            self.connection.shutdown(how)

        def close(self) -> None:
            self.connection.close()

    class Server(socketserver.TCPServer):
        def get_request(self) -> Any:
            connection, address = super().get_request()
            return Wrapper(connection), address

    def park(request: Wrapper, client_address: Any, server: Any) -> None:
        parked.set()
        request.connection.recv(1)

    server = make(park, Server)
    async with served(server) as serving, client_of(server):
        await in_thread(parked.wait)
        await serving.stop()


@bounded
async def test_a_cancelled_call_to_trio_ends_a_serial_handler() -> None:
    def sleep(request: Any, client_address: Any, server: Any) -> None:
        try:
            trio.from_thread.run(sleeping)
        except trio.Cancelled:
            cancelled.set()
            raise

    async def sleeping() -> None:
        begun.set()
        await trio.sleep_forever()

    begun, cancelled = trio.Event(), threading.Event()
    server = make(sleep)
    async with served(server) as serving, client_of(server):
        await begun.wait()
        await serving.stop()
    assert cancelled.is_set()


@bounded
async def test_the_shorter_of_two_timeouts_is_that_of_handle_request() -> None:
    ended: list[str] = []

    class Server(socketserver.TCPServer):
        timeout = 0.01

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            self.socket.settimeout(60)
            self.handle_request()

        def handle_timeout(self) -> None:
            ended.append("timeout")

    await serve_blocking(make(echo, Server))
    assert ended == ["timeout"]


@bounded
async def test_a_hook_may_close_the_server_and_fail() -> None:
    class Server(socketserver.TCPServer):
        def get_request(self) -> Any:
            self.shutdown()
            self.socket.close()
            raise OSError("closed")

    server = make(echo, Server)
    # Connected before it serves: what closes a listener resets who is connecting.
    async with client_of(server):
        await serve_blocking(server)


@bounded
async def test_a_loop_of_requests_looks_again_when_shutdown_is_called() -> None:
    returned = threading.Event()

    class Server(socketserver.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            self.handle_request()
            returned.set()

    server = make(echo, Server)
    serving = _stdlib_servers._Serving(server)
    async with trio.open_nursery() as nursery:
        with serving.thread.adopted():
            nursery.start_soon(in_thread, server.serve_forever)
            serving.thread.wake_loop()
            await in_thread(returned.wait)
    server.server_close()


@bounded
async def test_a_loop_of_its_own_ends_when_its_handler_has() -> None:
    """Not while it handles a request: the handler may need what server_close() closes."""
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    class Server(socketserver.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while True:
                self.handle_request()

        def server_close(self) -> None:
            assert ended.is_set()
            super().server_close()

    def busy(request: Any, client_address: Any, server: Any) -> None:
        begun.set()
        may_end.wait()
        ended.set()

    server = make(busy, Server)
    async with served(server) as serving, client_of(server):
        await in_thread(begun.wait)
        serving.cancel()
        # Longer than a loop is given to end by itself.
        await trio.sleep(_stdlib_servers.LOOP_GRACE * 1.2)
        may_end.set()
        await serving.ended.wait()


@bounded
async def test_shutdown_may_wait_for_a_loop_of_its_own() -> None:
    class Server(socketserver.TCPServer):
        quits = False
        done: threading.Event

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            self.done = threading.Event()
            while not self.quits:
                self.handle_request()
            self.done.set()

        def shutdown(self) -> None:
            self.quits = True
            self.done.wait()

    server = make(echo, Server)
    async with served(server, changes=("quits", "done")) as serving:
        async with client_of(server) as client:
            client.sendall(b"ping")
            assert await receive(client) == b"ping"
        await serving.stop()


@bounded
async def test_shutdown_may_wait_for_a_loop_that_has_just_looked_at_its_flag() -> None:
    between, told, done = threading.Event(), threading.Event(), threading.Event()

    class Server(socketserver.TCPServer):
        quits = False

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while not self.quits:
                between.set()
                told.wait()
                self.handle_request()
            done.set()

        def shutdown(self) -> None:
            self.quits = True
            told.set()
            done.wait()

    server = make(echo, Server)
    async with served(server, changes=["quits"]) as serving:
        await in_thread(between.wait)
        await serving.stop()


@bounded
async def test_a_request_just_handed_on_is_cancelled_when_the_loop_fails() -> None:
    class Server(socketserver.ThreadingTCPServer):
        handed_on = False

        def process_request(self, request: Any, client_address: Any) -> None:
            super().process_request(request, client_address)
            self.handed_on = True

        def service_actions(self) -> None:
            if self.handed_on:
                raise ZeroDivisionError

    def wait(request: Any, client_address: Any, server: Any) -> None:
        request.recv(1)

    for _ in range(10):  # Trio takes tasks of a batch in any order.
        server = make(wait, Server)
        with socket.socket() as client:
            client.connect(server.server_address)
            with pytest.raises(ZeroDivisionError):
                await serve_blocking(server)


@bounded
async def test_a_loop_after_the_loop_is_not_awake_for_ever() -> None:
    timeouts: list[float] = []

    class Server(socketserver.TCPServer):
        timeout = 0.02

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            super().serve_forever(poll_interval)
            self.handle_request()

        def handle_timeout(self) -> None:
            timeouts.append(self.timeout)

    server = make(echo, Server)
    async with served(server) as serving:
        await serving.shut_down()
    assert timeouts


@bounded
async def test_a_request_that_cannot_even_be_begun_is_no_hang() -> None:
    class Server(socketserver.ThreadingTCPServer):
        asked = 0

        @property
        def daemon_threads(self) -> bool:  # type: ignore[override]
            self.asked += 1
            if self.asked == 2:  # The loop's thread was asked for first.
                raise LookupError("no answer")
            return False

    server = make(echo, Server)
    async with served(server, changes=("asked",)), client_of(server) as client:
        assert await receive(client) == b""


@bounded
async def test_what_get_request_raises_holds_no_connection_open() -> None:
    class Server(socketserver.TCPServer):
        def get_request(self) -> Any:
            connection, _ = super().get_request()
            os.close(connection.detach())
            raise LookupError

    server = make(echo, Server)
    serving = _stdlib_servers._Serving(server)
    client = socket.create_connection(server.server_address, timeout=REAL_LIMIT)
    with client, serving.thread.adopted():
        with pytest.raises(LookupError):
            server._handle_request_noblock()
        assert await in_thread(client.recv, 1) == b""
    server.server_close()


@bounded
async def test_a_request_that_comes_too_late_is_closed() -> None:
    server = make(echo, socketserver.ThreadingMixIn)
    serving = _stdlib_servers._Serving(server)
    serving._ended = True
    late, peer = socket.socketpair()
    with serving.thread.adopted(), peer:
        server.process_request(late, "nowhere")
        server.process_request((b"data", None), "nowhere")
        await trio.testing.wait_all_tasks_blocked()
        assert peer.recv(1) == b""
    server.server_close()


@bounded
async def test_the_servers_own_socket_may_be_the_request() -> None:
    class Server(socketserver.UDPServer):
        def get_request(self) -> Any:
            data, address = self.socket.recvfrom(64)
            self.data = data
            return self.socket, address

    received = threading.Event()

    def handle(request: socket.socket, client_address: Any, server: Any) -> None:
        request.sendto(server.data, client_address)
        received.set()

    server = make(handle, Server)
    async with served(server, changes=("data",)):
        for _ in range(2):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.settimeout(REAL_LIMIT)
                client.sendto(b"ping", server.server_address)
                assert await in_thread(client.recv, 64) == b"ping"
    assert received.is_set()


@bounded
async def test_a_request_handed_on_after_the_loop_has_failed_is_cancelled() -> None:
    """By a thread of the server's own."""
    server = make(lambda request, *_: request.recv(1), socketserver.ThreadingMixIn)
    serving = _stdlib_servers._Serving(server)
    late, peer = socket.socketpair()
    with serving.thread.adopted(), peer:
        async with trio.open_nursery() as nursery:
            serving._nursery = nursery
            serving._workers = workers = Workers(nursery.start_soon)
            serving._cancel_requests()
            server.process_request(late, "nowhere")
            await trio.testing.wait_all_tasks_blocked()
            serving._abandon(serving._requests.values())  # It is no daemon's.
            serving._abandon([None])  # Nor is what has no thread yet.
            assert peer.recv(1) == b""
            await serving._join_requests()
            serving._loop_ended = serving._ended = True
            serving._note_progress()
            workers.close()
    server.server_close()
