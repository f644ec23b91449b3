"""UDP and Unix datagram servers: what is received, what is cut, dropped, and replied to."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    DATAGRAM_SERVERS,
    REAL_LIMIT,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    datagram_client,
    needs_ipv6,
    read_all,
    receive,
)

from trio_socketserver import (
    BaseRequestHandler,
    DatagramRequestHandler,
    DatagramSocket,
    NurseryMixIn,
    NurseryUDPServer,
    NurseryUnixDatagramServer,
    UDPServer,
    UnixDatagramServer,
)
from trio_socketserver.testing import serving

LOCALHOST = ("127.0.0.1", 0)

each_server = pytest.mark.parametrize("server_class", DATAGRAM_SERVERS, ids=class_name)
each_unix_server = pytest.mark.parametrize(
    "server_class", [UnixDatagramServer, NurseryUnixDatagramServer], ids=class_name
)


class Echo(DatagramRequestHandler):
    async def handle(self) -> None:
        self.wfile.write(self.packet)


class Collect(BaseRequestHandler):
    """Keeps the datagrams in ``server.received``."""

    async def handle(self) -> None:
        data, _ = self.request
        self.server.received.append(data)


def collecting(server_class: type[Any], folder: Path) -> Any:
    server = server_class(bind_address(server_class, folder), Collect)
    server.received = []
    return server


def arrived(client: socket.socket) -> bool:
    """Tell whether a datagram, even an empty one, waits for *client*."""
    client.setblocking(False)
    try:
        client.recv(65536, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


# == Construction =========================================================================


def test_the_attributes_have_their_documented_defaults() -> None:
    assert UDPServer.address_family == socket.AF_INET
    assert UDPServer.socket_type == socket.SOCK_DGRAM
    assert UDPServer.max_packet_size == 8192
    assert UDPServer.allow_reuse_address is False
    assert UDPServer.allow_reuse_port is False
    assert NurseryUDPServer.max_tasks == 1000
    assert NurseryUnixDatagramServer.max_tasks == 1000
    assert UnixDatagramServer.address_family == socket.AF_UNIX


@each_server
def test_the_constructor_binds_before_any_trio_run(
    server_class: type[Any], tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Echo)
    assert server.server_address == server.socket.getsockname()
    with datagram_client(server, tmp_path) as client:
        client.send(b"early")

        async def serve_one() -> bytes:
            with trio.fail_after(REAL_LIMIT):
                async with server:
                    await server.handle_request()
                return await receive(client)

        assert trio.run(serve_one) == b"early"
    assert server.fileno() == -1


@each_server
def test_an_address_in_use_is_an_error_of_the_constructor(
    server_class: type[Any], tmp_path: Path
) -> None:
    first = server_class(bind_address(server_class, tmp_path), Echo)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="in use"):
        server_class(first.server_address, Echo)
    assert os.listdir("/proc/self/fd") == before
    first.socket.close()


@each_server
def test_what_is_no_handler_leaks_nothing(server_class: type[Any], tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(TypeError, match="callable"):
        server_class(bind_address(server_class, tmp_path), None)
    assert os.listdir("/proc/self/fd") == before
    assert not os.listdir(tmp_path)


@each_server
@bounded
async def test_binding_can_be_left_to_the_caller(
    server_class: type[Any], tmp_path: Path
) -> None:
    address = bind_address(server_class, tmp_path)
    server = server_class(address, Echo, bind_and_activate=False)
    assert server.server_address == address
    server.server_bind()
    server.server_activate()
    async with serving(server):
        with datagram_client(server, tmp_path) as client:
            client.send(b"ping")
            assert await receive(client) == b"ping"


@each_server
@bounded
async def test_from_socket(server_class: type[Any], tmp_path: Path) -> None:
    sock = socket.socket(server_class.address_family, socket.SOCK_DGRAM)
    sock.bind(bind_address(server_class, tmp_path))
    server = server_class.from_socket(sock, Echo)
    assert server.server_address == sock.getsockname()
    async with serving(server):
        with datagram_client(server, tmp_path) as client:
            client.send(b"ping")
            assert await receive(client) == b"ping"
    assert server.fileno() == -1


@each_server
def test_from_socket_refuses_another_type(server_class: type[Any]) -> None:
    with socket.socket(server_class.address_family, socket.SOCK_STREAM) as sock:
        with pytest.raises(ValueError, match="cannot serve"):
            server_class.from_socket(sock, Echo)
        assert sock.fileno() > 0


@pytest.mark.parametrize("server_class", [UDPServer, NurseryUDPServer], ids=class_name)
def test_allow_reuse_port(server_class: type[Any]) -> None:
    class Sharing(server_class):  # type: ignore[misc]
        allow_reuse_port = True

    with Sharing(LOCALHOST, Echo).socket as first:
        Sharing(first.getsockname(), Echo).socket.close()
        with pytest.raises(OSError, match="in use"):
            server_class(first.getsockname(), Echo)


@needs_ipv6
@pytest.mark.parametrize("dual", [True, False], ids=["dual", "only_v6"])
@bounded
async def test_dualstack_ipv6(dual: bool) -> None:
    class Server(NurseryUDPServer):
        address_family = socket.AF_INET6
        dualstack_ipv6 = dual

    server = Server(("::", 0), Echo)
    port = server.server_address[1]
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four,
    ):
        six.connect(("::1", port))
        four.connect(("127.0.0.1", port))
        async with serving(server):
            six.send(b"six")
            assert await receive(six) == b"six"
            if dual:
                four.send(b"four")
                assert await receive(four) == b"four"
            else:
                four.send(b"four")
                with pytest.raises(ConnectionRefusedError):
                    await receive(four)


# == Receiving ============================================================================


@each_server
@bounded
async def test_a_request_is_a_datagram_and_a_socket(
    server_class: type[Any], tmp_path: Path
) -> None:
    async def look(request: Any, client_address: Any, server: Any) -> None:
        seen.append((request, client_address, server))

    seen: list[Any] = []
    server = server_class(bind_address(server_class, tmp_path), look)
    with datagram_client(server, tmp_path) as client:
        async with server:
            for datagram in (b"one", b"two"):
                client.send(datagram)
                await server.handle_request()
                await trio.testing.wait_all_tasks_blocked()
            [first, second] = seen
            ((data, sender), client_address, seen_server) = first
            assert data == b"one"
            assert type(sender) is DatagramSocket
            assert sender.fileno() == server.fileno()
            assert sender.getsockname() == server.server_address
            assert client_address == client.getsockname()
            assert seen_server is server
            # One socket, and so one object that takes the turns of its senders.
            assert second[0] == (b"two", sender)


@each_server
@bounded
async def test_the_socket_of_a_request_follows_a_new_socket(
    server_class: type[Any], tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), Echo)
    for _ in range(2):
        with datagram_client(server, tmp_path) as client:
            client.send(b"ping")
            await server.handle_request()
            assert await receive(client) == b"ping"
        await server.server_close()
        again = server_class(bind_address(server_class, tmp_path), Echo)
        server.socket, server.server_address = again.socket, again.server_address
    await server.server_close()


@each_server
@bounded
async def test_an_empty_datagram_is_a_request_too(
    server_class: type[Any], tmp_path: Path
) -> None:
    server = collecting(server_class, tmp_path)
    with datagram_client(server, tmp_path) as client:
        async with serving(server):
            for datagram in (b"", b"x", b""):
                client.send(datagram)
            await trio.testing.wait_all_tasks_blocked()
    assert sorted(server.received) == [b"", b"", b"x"]
    assert server.statistics().completed == 3
    assert server.statistics().truncated_datagrams == 0


@each_server
@bounded
async def test_a_longer_datagram_is_cut_and_counted(
    server_class: type[Any], tmp_path: Path
) -> None:
    server = collecting(server_class, tmp_path)
    sizes = 8191, 8192, 8193, 60_000, 1
    with datagram_client(server, tmp_path) as client:
        async with serving(server):
            for size in sizes:
                client.send(bytes(size))
                await trio.testing.wait_all_tasks_blocked()
            assert list(map(len, server.received)) == [8191, 8192, 8192, 8192, 1]
            assert server.statistics().truncated_datagrams == 2
            # Read when it is used.
            server.max_packet_size = 0
            client.send(b"x")
            client.send(b"")
            await trio.testing.wait_all_tasks_blocked()
            server.max_packet_size = 65535
            client.send(bytes(60_000))
            await trio.testing.wait_all_tasks_blocked()
    assert list(map(len, server.received[5:])) == [0, 0, 60_000]
    assert server.statistics().truncated_datagrams == 3
    assert server.statistics().completed == 8


@pytest.mark.parametrize("server_class", [UDPServer, NurseryUDPServer], ids=class_name)
@bounded
async def test_what_the_kernel_drops_is_counted(server_class: type[Any]) -> None:
    server = server_class(LOCALHOST, Collect)
    server.received = []
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    with datagram_client(server) as client:
        async with server:
            assert server.statistics().datagrams_dropped == 0
            for _ in range(100):
                client.send(bytes(1000))
            dropped = server.statistics().datagrams_dropped
            assert 0 < dropped < 100
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve_forever)
                await trio.testing.wait_all_tasks_blocked()
                await server.shutdown()
            # Each has been received or counted, and nothing is counted twice.
            assert len(server.received) + dropped == 100
            assert server.statistics().datagrams_dropped == dropped
    # The number outlives the socket.
    assert server.fileno() == -1
    assert server.statistics().datagrams_dropped == dropped
    assert server.statistics().accepted == 100 - dropped


@each_unix_server
@bounded
async def test_a_unix_server_loses_nothing(server_class: type[Any], tmp_path: Path) -> None:
    server = collecting(server_class, tmp_path)
    sent = 0
    with datagram_client(server, tmp_path) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                client.send(b"%d" % sent)
                sent += 1
        async with serving(server):
            await trio.testing.wait_all_tasks_blocked()
    assert sent > 1
    assert sorted(map(int, server.received)) == list(range(sent))
    assert server.statistics().datagrams_dropped == 0


@each_server
@pytest.mark.parametrize("option", [32_000, socket.SO_TYPE], ids=["unknown", "shorter"])
@bounded
async def test_a_system_that_does_not_count_drops(
    server_class: type[Any], option: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_socketserver._datagram_servers.SO_MEMINFO", option)
    async with collecting(server_class, tmp_path) as server:
        assert server.statistics().datagrams_dropped == 0
    assert server.statistics().datagrams_dropped == 0


@pytest.mark.parametrize(
    ("server_class", "limit"), [(UDPServer, 1), (NurseryUDPServer, 3)], ids=str
)
@bounded
async def test_at_the_limit_datagrams_stay_in_the_kernel(
    server_class: type[Any], limit: int
) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        began.append(request[0])
        await may_end.wait()

    began: list[bytes] = []
    may_end = trio.Event()
    server = server_class(LOCALHOST, handler)
    server.max_tasks = 3
    with datagram_client(server) as client:
        async with serving(server):
            for number in range(10):
                client.send(b"%d" % number)
            await trio.testing.wait_all_tasks_blocked()
            assert server.statistics().accepted == limit
            may_end.set()
            await trio.testing.wait_all_tasks_blocked()
    assert sorted(began) == [b"%d" % number for number in range(10)]
    assert server.statistics().completed == 10


# == Replying =============================================================================


@each_server
@bounded
async def test_a_reply_needs_a_normal_return_and_something_written(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            if self.packet != b"silence":
                self.wfile.write(b"re: " + self.packet)
            if self.packet == b"failure":
                raise ValueError("a fault of ours")

    caplog.set_level(logging.CRITICAL, logger="trio_socketserver")
    server = server_class(bind_address(server_class, tmp_path), Handler)
    with datagram_client(server, tmp_path) as client:
        async with serving(server):
            client.send(b"silence")
            client.send(b"failure")
            await trio.testing.wait_all_tasks_blocked()
            assert not arrived(client)
            client.send(b"question")
            assert await receive(client) == b"re: question"
    assert server.statistics().completed == 2
    assert server.statistics().failed == 1


@each_server
@bounded
async def test_many_requests_reply_at_once(server_class: type[Any], tmp_path: Path) -> None:
    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            began.append(self.packet)
            if issubclass(server_class, NurseryMixIn):
                while len(began) < len(clients):
                    await trio.lowlevel.checkpoint()
            for word in (b"one ", b"two "):
                await self.socket.sendto(word + self.packet, self.client_address)
            self.wfile.write(b"three " + self.packet)

    began: list[bytes] = []
    server = server_class(bind_address(server_class, tmp_path), Handler)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(datagram_client(server, tmp_path)) for _ in range(10)
        ]
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        async with serving(server):
            for number, client in enumerate(clients):
                received = [await receive(client) for _ in range(3)]
                assert received == [
                    word + b"%d" % number for word in (b"one ", b"two ", b"three ")
                ]
    assert server.statistics().completed == 10


@each_unix_server
@bounded
async def test_a_peer_that_does_not_read_delays_only_its_own_reply(
    server_class: type[Any], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            self.wfile.write(b"answer")

    server = server_class(bind_address(server_class, tmp_path), Handler)
    concurrent = issubclass(server_class, NurseryMixIn)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf,
        datagram_client(server, tmp_path) as other,
    ):
        # Not connected: Linux charges what a connected peer has not read to the server.
        deaf.bind(bind_address(server_class, tmp_path))
        async with serving(server):
            # Fill the queue of the one that does not read, until a reply has to wait.
            sent = 0
            while not server.statistics().active:
                deaf.sendto(b"question", server.server_address)
                sent += 1
                await trio.testing.wait_all_tasks_blocked()
            assert sent > 1
            before = trio.current_time()
            other.send(b"question")
            await trio.testing.wait_all_tasks_blocked()
            assert arrived(other) is concurrent
            assert trio.current_time() == before
            # It reads at last: nothing has been lost.
            replies = 0
            while replies < sent:
                assert await receive(deaf) == b"answer"
                replies += 1
                await trio.sleep(1)
            assert arrived(other)
    assert server.statistics().completed == sent + 1


@each_unix_server
@bounded
async def test_a_reply_that_has_to_wait_can_be_cancelled(
    server_class: type[Any], tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    class Handler(BaseRequestHandler):
        async def handle(self) -> None:
            _, sock = self.request
            while True:
                await sock.sendto(b"answer", self.client_address)

    server = server_class(bind_address(server_class, tmp_path), Handler)
    server.block_on_close = False
    with datagram_client(server, tmp_path) as deaf:
        async with serving(server):
            deaf.send(b"question")
            await trio.sleep(10)
            assert server.statistics().active == 1
    assert server.statistics().cancelled == 1


@each_unix_server
@pytest.mark.parametrize("how", ["closed", "removed", "unnamed"])
@bounded
async def test_a_reply_to_nobody_is_one_quiet_line(
    server_class: type[Any], how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="trio_socketserver")
    server = server_class(bind_address(server_class, tmp_path), Echo)
    async with server:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
            if how != "unnamed":
                client.bind(str(tmp_path / "client"))
            client.sendto(b"hello?", server.server_address)
        if how == "removed":
            (tmp_path / "client").unlink()
        await server.handle_request()
        await trio.testing.wait_all_tasks_blocked()
        [record] = caplog.records
        assert record.levelname == "INFO"
        assert "ConnectionBroken" in record.getMessage()
        # And the next is served.
        with datagram_client(server, tmp_path) as client:
            client.send(b"ping")
            await server.handle_request()
            assert await receive(client) == b"ping"
    assert server.statistics().peer_errors == 1
    assert_sums_up(server)


@pytest.mark.parametrize("server_class", [UDPServer, NurseryUDPServer], ids=class_name)
@bounded
async def test_a_reply_to_a_udp_peer_that_has_gone_is_not_noticed(
    server_class: type[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="trio_socketserver")
    server = server_class(LOCALHOST, Echo)
    async with serving(server):
        for _ in range(3):
            with datagram_client(server) as client:
                client.send(b"hello?")
            await trio.testing.wait_all_tasks_blocked()
        with datagram_client(server) as client:
            client.send(b"ping")
            assert await receive(client) == b"ping"
    assert server.statistics().completed == 4
    assert server.statistics().accept_errors == 0
    assert not caplog.records


@each_server
@bounded
async def test_an_oversized_reply_is_a_fault_of_ours(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            self.wfile.write(bytes(300_000))

    server = server_class(bind_address(server_class, tmp_path), Handler)
    with datagram_client(server, tmp_path) as client:
        async with server:
            client.send(b"question")
            await server.handle_request()
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    error = record.exc_info[1]
    assert isinstance(error, OSError)
    assert error.errno == errno.EMSGSIZE
    assert server.statistics().failed == 1


# == Closing ==============================================================================


@each_server
@pytest.mark.parametrize("how", ["leaving", "server_close"])
@bounded
async def test_requests_can_still_reply_while_the_server_closes(
    server_class: type[Any], how: str, tmp_path: Path
) -> None:
    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            await may_end.wait()
            await self.socket.sendto(b"first", self.client_address)
            self.wfile.write(b"second")

    may_end = trio.Event()
    address = bind_address(server_class, tmp_path)
    server = server_class(address, Handler)
    with datagram_client(server, tmp_path) as client:
        async with trio.open_nursery() as nursery:
            async with server:
                nursery.start_soon(server.serve_forever)
                client.send(b"question")
                await trio.testing.wait_all_tasks_blocked()
                assert server.statistics().active == 1
                if how == "server_close":
                    nursery.start_soon(server.server_close)
                    await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(let_it_end, server, client, may_end)
            assert server.fileno() == -1
        assert await receive(client) == b"first"
        assert await receive(client) == b"second"
        assert not arrived(client)
    assert server.statistics().completed == 1
    assert server.statistics().accepted == 1
    assert_sums_up(server)


async def let_it_end(server: Any, client: socket.socket, may_end: trio.Event) -> None:
    """When closing has begun, knock once more, in vain; then let the request end."""
    await server.draining.wait()
    await trio.testing.wait_all_tasks_blocked()
    # A Unix server's file has gone, but the socket this one is connected to has not.
    client.send(b"too late")
    await trio.testing.wait_all_tasks_blocked()
    assert server.statistics().accepted == 1
    may_end.set()


@each_server
@bounded
async def test_hooks_that_close_a_request_are_called(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Server(server_class):  # type: ignore[misc]
        async def shutdown_request(self, request: Any) -> None:
            called.append(("shutdown_request", request[0]))
            await trio.lowlevel.checkpoint()
            await super().shutdown_request(request)

        async def close_request(self, request: Any) -> None:
            called.append(("close_request", request[0]))
            await super().close_request(request)

    called: list[tuple[str, bytes]] = []
    server = Server(bind_address(server_class, tmp_path), Echo)
    with datagram_client(server, tmp_path) as client:
        async with server:
            client.send(b"x")
            await server.handle_request()
        assert await receive(client) == b"x"
    assert called == [("shutdown_request", b"x"), ("close_request", b"x")]


@each_server
@bounded
async def test_a_failing_shutdown_request_is_reported(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: Any) -> None:
        raise ValueError("cannot close")

    server = server_class(bind_address(server_class, tmp_path), Echo)
    server.shutdown_request = fail
    with datagram_client(server, tmp_path) as client:
        async with serving(server):
            for _ in range(2):
                # The server's own socket is not what is closed.
                client.send(b"ping")
                assert await receive(client) == b"ping"
            await trio.testing.wait_all_tasks_blocked()
            assert not read_all(client)
    assert server.statistics().failed == 2
    assert len(caplog.records) == 2


@each_unix_server
@bounded
async def test_the_file_goes_when_closing_begins(
    server_class: type[Any], tmp_path: Path
) -> None:
    """So that a successor can take the place while this one still replies."""

    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            await self.server.draining.wait()
            await trio.testing.wait_all_tasks_blocked()
            with contextlib.closing(server_class(address, Echo).socket):
                self.wfile.write(b"goodbye")

    address = bind_address(server_class, tmp_path)
    server = server_class(address, Handler)
    with datagram_client(server, tmp_path) as client:
        async with serving(server):
            client.send(b"question")
            await trio.testing.wait_all_tasks_blocked()
            assert server.statistics().active == 1
        assert await receive(client) == b"goodbye"
    # The successor's file is not ours to remove.
    assert os.path.exists(address)
