"""TCP and Unix stream servers: how they bind, listen, accept and close, by attribute."""

from __future__ import annotations

import contextlib
import errno
import importlib
import math
import os
import socket
import socketserver
import stat
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    REAL_LIMIT,
    STREAM_SERVERS,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    is_refused,
    needs_ipv6,
    receive,
    receive_to_end,
)

from trio_socketserver import (
    BaseRequestHandler,
    NurseryTCPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    StreamSocket,
    TCPServer,
    UnixDatagramServer,
    UnixStreamServer,
)

LOCALHOST = ("127.0.0.1", 0)

each_server = pytest.mark.parametrize("server_class", STREAM_SERVERS, ids=class_name)
each_tcp_server = pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer], ids=class_name
)
each_unix_server = pytest.mark.parametrize(
    "server_class", [UnixStreamServer, UnixDatagramServer], ids=class_name
)


async def echo(request: StreamSocket, client_address: Any, server: Any) -> None:
    while data := await request.receive_some():
        await request.send_all(data)


@contextlib.asynccontextmanager
async def serving(server: Any) -> AsyncIterator[None]:
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield
        await server.shutdown()


async def assert_echoes(address: Any) -> None:
    with connect(address) as client:
        client.sendall(b"ping")
        assert await receive(client) == b"ping"


def close(server: Any) -> None:
    """Close a server that nobody has entered, outside of trio too."""
    server.socket.close()
    if isinstance(server.server_address, str):
        os.unlink(server.server_address)


@contextlib.contextmanager
def leaking_nothing(folder: Path) -> Iterator[None]:
    """Assert that the block leaves no descriptor and no file behind."""
    before = os.listdir("/proc/self/fd"), sorted(os.listdir(folder))
    yield
    assert (os.listdir("/proc/self/fd"), sorted(os.listdir(folder))) == before


# == Construction =========================================================================


def test_the_attributes_have_their_documented_defaults() -> None:
    assert TCPServer.address_family == socket.AF_INET
    assert TCPServer.socket_type == socket.SOCK_STREAM
    assert TCPServer.request_queue_size == 128
    assert TCPServer.allow_reuse_address is True
    assert TCPServer.allow_reuse_port is False
    assert TCPServer.dualstack_ipv6 is True
    assert TCPServer.timeout is None
    assert TCPServer.block_on_close is True
    assert TCPServer.graceful_timeout == math.inf
    assert TCPServer.request_timeout is None
    assert TCPServer.cleanup_timeout == 5
    assert NurseryTCPServer.max_tasks is None
    assert UnixStreamServer.address_family == socket.AF_UNIX
    assert UnixStreamServer.unlink_socket is True
    assert UnixStreamServer.socket_mode is None


@each_server
def test_the_constructor_binds_and_listens_before_any_trio_run(
    server_class: type[Any], tmp_path: Path
) -> None:
    address = bind_address(server_class, tmp_path)
    server = server_class(address, echo)
    assert server.server_address == server.socket.getsockname()
    if isinstance(address, tuple):
        assert server.server_address[1] != 0
    assert server.fileno() == server.socket.fileno() > 0
    assert server.socket.getblocking() is False
    with connect(server.server_address) as client:
        # The kernel has connected them, though nobody serves yet.
        client.sendall(b"early")
        client.shutdown(socket.SHUT_WR)

        async def serve_one() -> bytes:
            with trio.fail_after(REAL_LIMIT):
                async with server:
                    await server.handle_request()
                return await receive_to_end(client)

        assert trio.run(serve_one) == b"early"
    assert server.fileno() == -1


@each_server
def test_an_address_in_use_is_an_error_of_the_constructor(
    server_class: type[Any], tmp_path: Path
) -> None:
    first = server_class(bind_address(server_class, tmp_path), echo)
    with leaking_nothing(tmp_path):
        with pytest.raises(OSError, match="in use") as caught:
            server_class(first.server_address, echo)
        assert caught.value.errno == errno.EADDRINUSE
    close(first)


@pytest.mark.parametrize(
    ("server_class", "address", "error_type"),
    [
        (TCPServer, ("192.0.2.1", 0), OSError),  # An address of nobody's.
        (TCPServer, ("127.0.0.1", 65536), OverflowError),
        (TCPServer, ("127.0.0.1", -1), OverflowError),
        (TCPServer, ("::1", 0), OSError),  # Of another family.
        (TCPServer, "a path", TypeError),
        (TCPServer, None, TypeError),
        (UnixStreamServer, "missing/folder/socket", OSError),
        (UnixStreamServer, "x" * 200, OSError),
        (UnixStreamServer, "x" * 300, OSError),
        (UnixStreamServer, b"x" * 200, OSError),
        (UnixStreamServer, "\0" + "x" * 200, OSError),
        (UnixStreamServer, "nul\0inside", ValueError),
        (UnixStreamServer, ("127.0.0.1", 0), TypeError),
        (UnixStreamServer, None, TypeError),
        (UnixStreamServer, 5, TypeError),
    ],
)
def test_a_bad_address_is_an_error_of_the_constructor(
    server_class: type[Any],
    address: Any,
    error_type: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with leaking_nothing(tmp_path), pytest.raises(error_type):
        server_class(address, echo)


@each_server
@pytest.mark.parametrize("hook", ["server_bind", "server_activate"])
def test_a_failing_hook_of_the_constructor_leaks_nothing(
    server_class: type[Any], hook: str, tmp_path: Path
) -> None:
    def fail(self: Any) -> None:
        getattr(server_class, hook)(self)
        raise error

    error = ValueError("not today")
    failing = type("Failing", (server_class,), {hook: fail})
    with leaking_nothing(tmp_path):
        with pytest.raises(ValueError, match="not today") as caught:
            failing(bind_address(server_class, tmp_path), echo)
        assert caught.value is error


@each_server
def test_what_is_no_handler_leaks_nothing(server_class: type[Any], tmp_path: Path) -> None:
    with leaking_nothing(tmp_path), pytest.raises(TypeError, match="callable"):
        server_class(bind_address(server_class, tmp_path), None)


@each_server
@bounded
async def test_binding_and_listening_can_be_left_to_the_caller(
    server_class: type[Any], tmp_path: Path
) -> None:
    address = bind_address(server_class, tmp_path)
    server = server_class(address, echo, bind_and_activate=False)
    assert server.server_address == address
    assert server.fileno() > 0
    assert is_refused(address) or address == LOCALHOST
    server.server_bind()
    assert server.server_address == server.socket.getsockname()
    assert is_refused(server.server_address)
    server.server_activate()
    async with serving(server):
        await assert_echoes(server.server_address)


@each_server
@bounded
async def test_an_inherited_socket_can_be_put_in_place(
    server_class: type[Any], tmp_path: Path
) -> None:
    inherited = socket.socket(server_class.address_family)
    inherited.bind(bind_address(server_class, tmp_path))
    inherited.listen()
    server = server_class("ignored", echo, bind_and_activate=False)
    server.socket.close()
    server.socket = inherited
    async with serving(server):
        # A blocking one would stop the whole program.
        assert inherited.getblocking() is False
        await assert_echoes(inherited.getsockname())
    assert inherited.fileno() == -1


@each_server
@bounded
async def test_a_closed_server_does_not_serve(
    server_class: type[Any], tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo)
    await server.server_close()
    for method in (server.serve_forever, server.handle_request):
        with (
            pytest.raises(trio.ClosedResourceError, match="closed"),
        ):
            await method()


# == from_socket ==========================================================================


@each_server
@bounded
async def test_from_socket_serves_and_owns_the_socket(
    server_class: type[Any], tmp_path: Path
) -> None:
    address = bind_address(server_class, tmp_path)
    listener = socket.socket(server_class.address_family)
    listener.bind(address)
    listener.listen()
    bound = listener.getsockname()
    with connect(bound) as early:
        early.sendall(b"early")
        server = server_class.from_socket(listener, echo)
        assert server.server_address == bound
        assert server.fileno() > 0
        assert server.socket.getblocking() is False
        async with serving(server):
            assert await receive(early) == b"early"
            early.close()
            await assert_echoes(bound)
    assert server.fileno() == listener.fileno() == -1
    # The file, if there is one, is of who has bound it.
    assert os.path.exists(address) if isinstance(address, str) else is_refused(bound)


@each_server
def test_from_socket_leaves_one_descriptor(server_class: type[Any], tmp_path: Path) -> None:
    listener = socket.socket(server_class.address_family)
    listener.bind(bind_address(server_class, tmp_path))
    listener.listen()
    before = os.listdir("/proc/self/fd")
    server = server_class.from_socket(listener, echo)
    assert os.listdir("/proc/self/fd") == before
    server.socket.close()


@needs_ipv6
@bounded
async def test_from_socket_takes_over_the_family() -> None:
    listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    server = TCPServer.from_socket(listener, echo)
    assert server.address_family == socket.AF_INET6
    async with serving(server):
        await assert_echoes(server.server_address)


@each_server
def test_from_socket_refuses_another_type(server_class: type[Any], tmp_path: Path) -> None:
    with socket.socket(server_class.address_family, socket.SOCK_DGRAM) as sock:
        with leaking_nothing(tmp_path), pytest.raises(ValueError, match="cannot serve"):
            server_class.from_socket(sock, echo)
        # It stays the caller's.
        assert sock.fileno() > 0


@each_server
def test_from_socket_refuses_what_is_no_handler(
    server_class: type[Any], tmp_path: Path
) -> None:
    with socket.socket(server_class.address_family) as sock:
        sock.bind(bind_address(server_class, tmp_path))
        with leaking_nothing(tmp_path), pytest.raises(TypeError, match="callable"):
            server_class.from_socket(sock, None)
        assert sock.fileno() > 0


# == What the attributes do ===============================================================


@each_server
@bounded
async def test_a_burst_of_clients_fits_into_the_queue(
    server_class: type[Any], tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo)
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(100):
            client = stack.enter_context(socket.socket(server_class.address_family))
            client.setblocking(False)
            client.connect_ex(server.server_address)
            client.getpeername()  # Raises if the kernel has not connected it.
            clients.append(client)
        async with serving(server):
            for client in clients:
                client.sendall(b"ping")
                assert await receive(client) == b"ping"
                client.close()
    assert server.statistics().accepted == 100
    assert_sums_up(server)


def test_request_queue_size_is_what_the_kernel_is_told(tmp_path: Path) -> None:
    class Server(UnixStreamServer):
        request_queue_size = 3

    server = Server(str(tmp_path / "socket"), echo)
    with contextlib.ExitStack() as stack:
        results = []
        for _ in range(10):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            results.append(client.connect_ex(server.server_address))
        # Linux takes one more than it is told.
        assert results == [0] * 4 + [errno.EAGAIN] * 6
    close(server)


@contextlib.contextmanager
def address_of_a_connection() -> Iterator[Any]:
    """Yield an address that a connection has still, while nobody listens there any more.

    The server's end is open. One that it had closed first would do, in TIME_WAIT; but of
    those the system keeps a number, and then no more.
    """
    with socket.create_server(LOCALHOST) as listener:
        address = listener.getsockname()
        client, (connection, _) = connect(address), listener.accept()
    with client, connection:
        yield address


@each_tcp_server
def test_allow_reuse_address(server_class: type[Any]) -> None:
    class Stubborn(server_class):  # type: ignore[misc]
        allow_reuse_address = False

    with address_of_a_connection() as address:
        with pytest.raises(OSError, match="in use"):
            socketserver.TCPServer(address, socketserver.BaseRequestHandler)
        with pytest.raises(OSError, match="in use"):
            Stubborn(address, echo)
        close(server_class(address, echo))


@each_tcp_server
def test_allow_reuse_port(server_class: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharing(server_class):  # type: ignore[misc]
        allow_reuse_port = True

    first = Sharing(LOCALHOST, echo)
    close(Sharing(first.server_address, echo))
    with pytest.raises(OSError, match="in use"):
        server_class(first.server_address, echo)
    # Where the system has no such option, the attribute does nothing.
    monkeypatch.delattr(socket, "SO_REUSEPORT")
    with pytest.raises(OSError, match="in use"):
        Sharing(first.server_address, echo)
    close(first)


@pytest.mark.parametrize("base", [UnixStreamServer, TCPServer], ids=class_name)
@bounded
async def test_allow_reuse_port_means_nothing_to_a_unix_socket(
    base: type[Any], tmp_path: Path
) -> None:
    class Sharing(base):  # type: ignore[misc]
        # As some do, to whom a Unix server is a TCP server of another family.
        address_family = socket.AF_UNIX
        allow_reuse_port = True

    server = Sharing(str(tmp_path / "socket"), echo)
    with pytest.raises(OSError, match="in use"):
        Sharing(server.server_address, echo)
    async with serving(server):
        await assert_echoes(server.server_address)


WILDCARDS = ["::", "", "0::0", "0:0:0:0:0:0:0:0"]


@needs_ipv6
@pytest.mark.parametrize("dual", [True, False], ids=["dual", "only_v6"])
@pytest.mark.parametrize("host", WILDCARDS)
@bounded
async def test_dualstack_ipv6(dual: bool, host: str) -> None:
    class Server(NurseryTCPServer):
        address_family = socket.AF_INET6
        dualstack_ipv6 = dual

    async def note_peer(request: Any, client_address: Any, server: Any) -> None:
        peers.append(client_address[0])

    peers: list[str] = []
    server = Server((host, 0), note_peer)
    port = server.server_address[1]
    async with serving(server):
        with connect(("::1", port, 0, 0)):
            await trio.testing.wait_all_tasks_blocked()
        if dual:
            with connect(("127.0.0.1", port)):
                await trio.testing.wait_all_tasks_blocked()
        else:
            assert is_refused(("127.0.0.1", port))
    assert peers == ["::1", *["::ffff:127.0.0.1"] * dual]


@needs_ipv6
@pytest.mark.parametrize("dual", [True, False], ids=["dual", "only_v6"])
@bounded
async def test_dualstack_ipv6_does_not_matter_to_one_address(dual: bool) -> None:
    class Server(TCPServer):
        address_family = socket.AF_INET6
        dualstack_ipv6 = dual

    server = Server(("::1", 0), echo)
    async with serving(server):
        await assert_echoes(server.server_address)
        assert is_refused(("127.0.0.1", server.server_address[1]))


@needs_ipv6
@bounded
async def test_dualstack_ipv6_without_system_support_is_only_v6(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Server(TCPServer):
        address_family = socket.AF_INET6

    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    server = Server(("::", 0), echo)
    async with serving(server):
        await assert_echoes(("::1", server.server_address[1], 0, 0))
        assert is_refused(("127.0.0.1", server.server_address[1]))


@bounded
async def test_a_host_name_is_resolved() -> None:
    server = TCPServer(("localhost", 0), echo)
    assert server.server_address[0] == "127.0.0.1"
    async with serving(server):
        await assert_echoes(server.server_address)


@bounded
async def test_disable_nagle_algorithm() -> None:
    class Handler(StreamRequestHandler):
        async def handle(self) -> None:
            options.append(self.request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    class Impatient(Handler):
        disable_nagle_algorithm = True

    options: list[int] = []
    server = TCPServer(LOCALHOST, Handler)
    async with server:
        for handler in (Handler, Impatient):
            server.RequestHandlerClass = handler
            with connect(server.server_address):
                await server.handle_request()
    assert options[0] == 0
    assert options[1] != 0


# == Requests =============================================================================


@each_server
@bounded
async def test_a_request_is_a_stream_socket_that_is_ready_to_use(
    server_class: type[Any], tmp_path: Path
) -> None:
    async def look(request: Any, client_address: Any, server: Any) -> None:
        seen.append((request, client_address, server, request.socket.getblocking()))

    seen: list[Any] = []
    address = bind_address(server_class, tmp_path)
    async with server_class(address, look) as server:
        with connect(server.server_address) as client:
            await server.handle_request()
            name = client.getsockname()
            await trio.testing.wait_all_tasks_blocked()
        [(request, client_address, seen_server, blocking)] = seen
        assert type(request) is StreamSocket
        assert request.fileno() == -1
        assert client_address == name
        assert seen_server is server
        assert blocking is False


@each_server
@bounded
async def test_a_connection_ends_though_a_duplicate_lives_on(
    server_class: type[Any], tmp_path: Path
) -> None:
    async def give_away(request: Any, client_address: Any, server: Any) -> None:
        duplicates.append(request.socket.dup())

    duplicates: list[socket.socket] = []
    address = bind_address(server_class, tmp_path)
    async with server_class(address, give_away) as server:
        with connect(server.server_address) as client:
            await server.handle_request()
            assert await receive_to_end(client) == b""
            duplicates.pop().close()


@each_server
@bounded
async def test_what_get_request_puts_in_its_place_is_closed_too(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Wrapping(server_class):  # type: ignore[misc]
        async def get_request(self) -> tuple[Any, Any]:
            request, client_address = await super().get_request()
            return trio.StapledStream(request, request), client_address

    class Handler(StreamRequestHandler):
        async def handle(self) -> None:
            async for line in self.rfile:
                await self.wfile.write(line)

    server = Wrapping(bind_address(server_class, tmp_path), Handler)
    with connect(server.server_address) as client:
        client.sendall(b"line\n")
        client.shutdown(socket.SHUT_WR)
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b"line\n"
    assert server.statistics().completed == 1


class Stubborn(trio.abc.AsyncResource):
    """Something whose closing fails, or takes for ever."""

    def __init__(self, request: StreamSocket, error: Exception | None) -> None:
        self.request = request
        self.error = error

    async def aclose(self) -> None:
        try:
            if self.error is not None:
                raise self.error
            await trio.sleep_forever()
        finally:
            self.request.close_now()


@each_server
@pytest.mark.parametrize(
    "error", [None, ValueError("cannot close")], ids=["hangs", "fails"]
)
@bounded
async def test_closing_something_else_is_bounded_and_reported(
    server_class: type[Any],
    error: Exception | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Wrapping(server_class):  # type: ignore[misc]
        async def get_request(self) -> tuple[Any, Any]:
            request, client_address = await super().get_request()
            return Stubborn(request, error), client_address

    caplog.set_level("INFO", logger="trio_socketserver")
    start = trio.current_time()
    server = Wrapping(bind_address(server_class, tmp_path), BaseRequestHandler)
    with connect(server.server_address) as client:
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b""
    assert trio.current_time() - start == pytest.approx(5 if error is None else 0)
    assert server.statistics().failed == 1
    [record] = caplog.records
    assert record.levelname == ("INFO" if error is None else "ERROR")


@each_server
@pytest.mark.parametrize("hook", ["shutdown_request", "close_request"])
@bounded
async def test_a_hook_can_be_replaced_on_the_instance(
    server_class: type[Any], hook: str, tmp_path: Path
) -> None:
    async def replacement(request: Any) -> None:
        await trio.lowlevel.checkpoint()
        called.append(request)
        await original(request)

    called: list[Any] = []
    server = server_class(bind_address(server_class, tmp_path), BaseRequestHandler)
    original = getattr(server, hook)
    setattr(server, hook, replacement)
    with connect(server.server_address) as client:
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b""
    assert len(called) == 1


@each_server
@bounded
async def test_a_handler_may_close_its_connection_itself(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang_up(request: Any, client_address: Any, server: Any) -> None:
        await request.send_all(b"bye")
        await request.aclose()

    server = server_class(bind_address(server_class, tmp_path), hang_up)
    with connect(server.server_address) as client:
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b"bye"
    assert server.statistics().completed == 1
    assert not caplog.records


# == The file of a Unix server ============================================================


# Abstract names are everybody's; another run of these tests must not get in the way.
ABSTRACT = f"\0trio_socketserver test {os.getpid()}"


def make_stale(path: Path, kind: int = socket.SOCK_STREAM) -> None:
    """Leave a socket file behind, as a server that was killed does."""
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))


@each_unix_server
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@bounded
async def test_a_stale_socket_is_replaced_and_our_own_removed(
    server_class: type[Any], kind: int, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    make_stale(path, kind)
    async with server_class(str(path), BaseRequestHandler) as server:
        assert stat.S_ISSOCK(path.stat().st_mode)
        with socket.socket(socket.AF_UNIX, server_class.socket_type) as client:
            client.connect(str(path))
        assert server.server_address == str(path)
    assert not path.exists()


@each_unix_server
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_live_server_is_never_replaced(
    server_class: type[Any], kind: int, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, kind) as alive:
        alive.bind(str(path))
        if kind == socket.SOCK_STREAM:
            alive.listen()
        inode = path.stat().st_ino
        with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
            server_class(str(path), BaseRequestHandler)
        assert path.stat().st_ino == inode


def test_a_live_server_with_a_full_queue_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as alive, contextlib.ExitStack() as stack:
        alive.bind(str(path))
        alive.listen(0)
        while True:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            if client.connect_ex(str(path)) == errno.EAGAIN:
                break
        with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
            UnixStreamServer(str(path), echo)


def make_file(path: Path) -> None:
    path.write_text("precious")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_link_to_stale(path: Path) -> None:
    make_stale(path.with_name("target"))
    path.symlink_to("target")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@each_unix_server
@pytest.mark.parametrize(
    "make", [make_file, make_folder, make_link_to_stale, make_dangling_link, make_fifo]
)
def test_what_is_no_socket_is_never_removed(
    server_class: type[Any], make: Any, tmp_path: Path
) -> None:
    path = tmp_path / "there"
    make(path)
    before = path.lstat()
    with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
        server_class(str(path), BaseRequestHandler)
    assert path.lstat() == before


@each_unix_server
@bounded
async def test_without_unlink_socket_no_file_is_ever_removed(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Careful(server_class):  # type: ignore[misc]
        unlink_socket = False

    path = tmp_path / "socket"
    make_stale(path)
    with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
        Careful(str(path), BaseRequestHandler)
    path.unlink()
    async with Careful(str(path), BaseRequestHandler):
        pass
    assert stat.S_ISSOCK(path.lstat().st_mode)


@each_unix_server
@bounded
async def test_a_file_that_has_replaced_ours_is_kept(
    server_class: type[Any], tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    async with server_class(str(path), BaseRequestHandler):
        # Another server takes our place without asking.
        make_stale(tmp_path / "other")
        (tmp_path / "other").replace(path)
        theirs = path.stat().st_ino
    assert path.stat().st_ino == theirs


@each_unix_server
@bounded
async def test_a_file_that_somebody_has_removed_is_no_error(
    server_class: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "socket"
    async with server_class(str(path), BaseRequestHandler) as server:
        path.unlink()
    assert server.fileno() == -1
    assert not caplog.records


@each_unix_server
@pytest.mark.parametrize("entered", [True, False])
@bounded
async def test_a_file_that_cannot_be_removed_is_one_warning(
    server_class: type[Any],
    entered: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "socket"
    server = server_class(str(path), BaseRequestHandler)
    # The folder makes way for a file. (Usually it is rights that have been dropped.)
    folder.rename(tmp_path / "elsewhere")
    folder.touch()
    if entered:
        async with server:
            pass
    else:
        await server.server_close()
    assert server.fileno() == -1
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()


@each_unix_server
@bounded
async def test_a_relative_path_survives_a_change_of_folder(
    server_class: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    async with server_class("socket", BaseRequestHandler) as server:
        assert server.server_address == "socket"
        assert (tmp_path / "socket").exists()
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert not (tmp_path / "socket").exists()


@each_unix_server
@pytest.mark.parametrize("form", [os.fsencode, Path])
@bounded
async def test_a_path_of_bytes_or_an_object(
    server_class: type[Any], form: Callable[[Path], Any], tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    make_stale(path)
    async with server_class(form(path), BaseRequestHandler) as server:
        assert os.fsencode(server.server_address) == os.fsencode(path)
        assert path.exists()
    assert not path.exists()


@each_unix_server
@pytest.mark.parametrize("name", [ABSTRACT, ABSTRACT.encode()], ids=["str", "bytes"])
@bounded
async def test_an_abstract_name(server_class: type[Any], name: Any, tmp_path: Path) -> None:
    before = os.listdir(tmp_path)
    async with server_class(name, BaseRequestHandler) as server:
        assert server.server_address == ABSTRACT.encode()
        with pytest.raises(OSError, match="in use"):
            server_class(name, BaseRequestHandler)
        assert os.listdir(tmp_path) == before
    # Its end is the end of the name.
    close_at_once = server_class(name, BaseRequestHandler)
    await close_at_once.server_close()


@bounded
async def test_an_abstract_name_is_served() -> None:
    server = NurseryUnixStreamServer(ABSTRACT, echo)
    async with serving(server):
        await assert_echoes(server.server_address)


@each_unix_server
@bounded
async def test_an_automatic_name(server_class: type[Any]) -> None:
    async with server_class("", BaseRequestHandler) as server:
        assert server.server_address.startswith(b"\0")
        assert len(server.server_address) > 1


@contextlib.contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@each_unix_server
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o777], ids=oct)
@pytest.mark.parametrize("mode", [None, 0o600, 0o660, 0o666, 0o777], ids=repr)
@bounded
async def test_socket_mode(
    server_class: type[Any],
    mode: int | None,
    mask: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Server(server_class):  # type: ignore[misc]
        socket_mode = mode

    def chmod(path: Any, wanted: int) -> None:
        at_first.append(stat.S_IMODE(os.lstat(path).st_mode))
        really_chmod(path, wanted)

    really_chmod = os.chmod
    at_first: list[int] = []
    monkeypatch.setattr(os, "chmod", chmod)
    path = tmp_path / "socket"
    with umask(mask):
        server = Server(str(path), BaseRequestHandler)
    seen = stat.S_IMODE(path.stat().st_mode)
    await server.server_close()
    if mode is None:
        assert seen == 0o777 & ~mask
        return
    assert seen == mode
    # It has not been more open than asked for, not even for a moment.
    assert all(found & ~mode == 0 for found in at_first)


@each_unix_server
def test_a_mode_that_cannot_be_set_leaves_no_file(
    server_class: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server(server_class):  # type: ignore[misc]
        socket_mode = 0o660

    def chmod(path: Any, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "chmod", chmod)
    with leaking_nothing(tmp_path), pytest.raises(PermissionError):
        Server(str(tmp_path / "socket"), BaseRequestHandler)


@each_unix_server
@bounded
async def test_socket_mode_of_an_abstract_name_means_nothing(
    server_class: type[Any],
) -> None:
    class Server(server_class):  # type: ignore[misc]
        socket_mode = 0o600

    async with Server("", BaseRequestHandler) as server:
        with socket.socket(socket.AF_UNIX, server_class.socket_type) as client:
            client.connect(server.server_address)


# == Systems that lack something ==========================================================


def test_without_unix_sockets_there_are_no_unix_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as another_system:
        for name in list(sys.modules):
            if name.partition(".")[0] == "trio_socketserver":
                another_system.delitem(sys.modules, name)
        another_system.delattr(socket, "AF_UNIX")
        package = importlib.import_module("trio_socketserver")
        for name in list(sys.modules):
            if name.partition(".")[0] == "trio_socketserver":
                del sys.modules[name]
    assert package.TCPServer is not TCPServer
    assert not [name for name in package.__all__ if "Unix" in name]
    assert not hasattr(package, "UnixStreamServer")

    async def serve_one() -> bytes:
        server = package.NurseryTCPServer(LOCALHOST, echo)
        with connect(server.server_address) as client, trio.fail_after(REAL_LIMIT):
            client.sendall(b"ping")
            client.shutdown(socket.SHUT_WR)
            async with server:
                await server.handle_request()
            return await receive_to_end(client)

    assert trio.run(serve_one) == b"ping"
