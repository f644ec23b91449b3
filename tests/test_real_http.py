"""`http.server` as it stands, under `serve_blocking` and our servers, and real clients.

Plain and over TLS: keep-alive, large files, clients that are idle, mute or do not read.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import socket
import socketserver
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, assert_sums_up, bounded, connect, receive_until_closed
from programs import (
    CLIENT_LIMIT,
    ENDINGS,
    LOCAL,
    clients,
    curl,
    fetch,
    get,
    http_connection,
    needs_program,
    program,
    run_sync,
    serving,
    side_by_side,
)

import trio_socketserver
from trio_socketserver import _stdlib_servers

SMALL = b"a small file\n"
LARGE = bytes(range(251)) * 20_000
"""Some 5 MB in which no two pieces of a power of two are the same."""

ENDLESS_SIZE = 64 * 1024 * 1024
"""Bytes of a file that no socket buffers hold: who sends it, waits for who reads it."""


class KeepAlive(http.server.SimpleHTTPRequestHandler):
    """The usual way to get persistent connections: an attribute of a subclass."""

    protocol_version = "HTTP/1.1"


SERVERS = {
    "ours-threading": lambda handler: trio_socketserver.ThreadingTCPServer(LOCAL, handler),
    "ours-serial": lambda handler: trio_socketserver.TCPServer(LOCAL, handler),
    "http-threading": lambda handler: http.server.ThreadingHTTPServer(LOCAL, handler),
    "http-serial": lambda handler: http.server.HTTPServer(LOCAL, handler),
    "tcp-threading": lambda handler: socketserver.ThreadingTCPServer(LOCAL, handler),
}
THREADING = {name: make for name, make in SERVERS.items() if "threading" in name}

each_server = pytest.mark.parametrize("make", SERVERS.values(), ids=SERVERS)
each_threading_server = pytest.mark.parametrize("make", THREADING.values(), ids=THREADING)
each_ending = pytest.mark.parametrize("ending", ENDINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to share."""
    path = tmp_path_factory.mktemp("shared")
    (path / "small.txt").write_bytes(SMALL)
    (path / "large.bin").write_bytes(LARGE)
    (path / "endless.bin").touch()
    os.truncate(path / "endless.bin", ENDLESS_SIZE)
    return path


def sharing(folder: Path, handler: Any = KeepAlive) -> Any:
    """Return a handler that shares *folder*, made as the documentation says."""
    return functools.partial(handler, directory=os.fspath(folder))


def ask_idle(sock: socket.socket) -> None:
    """Make one request over a plain connection, which stays open then."""
    sock.sendall(b"GET /small.txt HTTP/1.1\r\nHost: here\r\n\r\n")
    received = b""
    while not received.endswith(SMALL):
        received += sock.recv(65536) or pytest.fail(f"closed after {received!r}")


# -- requests ------------------------------------------------------------------------------


@each_ending
@each_server
@bounded
async def test_one_connection_carries_many_requests(make, ending, folder):
    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            assert fetch(connection, "/small.txt")[:2] == (200, SMALL)
            kept = connection.sock
            status, body, headers = fetch(connection, "/large.bin", "HEAD")
            assert (status, body) == (200, b"")
            assert headers["Content-Length"] == str(len(LARGE))
            assert fetch(connection, "/")[0] == 200
            assert fetch(connection, "/small.txt")[:2] == (200, SMALL)
            assert kept is not None
            assert connection.sock is kept

    server = make(sharing(folder))
    async with serving(server, ending) as address:
        await run_sync(ask, address)
        await run_sync(ask, address)
    if isinstance(server, trio_socketserver.BaseServer):
        assert_sums_up(server)
        # The last answer may have been read before its request had ended.
        assert server.statistics().accepted == 2
        assert server.statistics().failed == 0
        if ending == "shut down":
            assert server.statistics().completed == 2


@each_server
@bounded
async def test_the_handler_of_http_server_works_without_any_subclass(
    make, folder, monkeypatch
):
    monkeypatch.chdir(folder)  # Where that handler finds its files.

    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            assert fetch(connection, "/small.txt")[:2] == (200, SMALL)
            assert connection.sock is None  # HTTP/1.0: the server has closed it.
            assert fetch(connection, "/no such file".replace(" ", "%20"))[0] == 404
            assert fetch(connection, "/small.txt", "DELETE")[0] == 501

    async with serving(make(http.server.SimpleHTTPRequestHandler)) as address:
        await run_sync(ask, address)


@bounded
async def test_a_server_class_may_pass_more_to_its_handler(folder):
    class Sharing(http.server.ThreadingHTTPServer):
        # What ``python -m http.server`` does.
        def finish_request(self, request: Any, client_address: Any) -> None:
            self.RequestHandlerClass(
                request, client_address, self, directory=os.fspath(folder)
            )

    async with serving(Sharing(LOCAL, KeepAlive)) as address:
        assert await run_sync(get, address, "/small.txt") == SMALL


@bounded
async def test_an_asynchronous_port_of_that_server_class_works_too(folder):
    """The hook's one line runs in the worker thread there, by way of `super()`."""

    class Sharing(trio_socketserver.ThreadingTCPServer):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            finished.append(client_address)
            await super().finish_request(request, client_address)

    finished: list[Any] = []
    async with serving(Sharing(LOCAL, sharing(folder))) as address:
        assert await run_sync(get, address, "/small.txt") == SMALL
    assert len(finished) == 1


@each_server
@bounded
async def test_a_large_file_arrives_whole_also_in_slow_pieces(make, folder):
    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            # The handler knows no ranges, so that the whole file is the right answer.
            status, body, _ = fetch(connection, "/large.bin", Range="bytes=5-10")
            assert status == 200
            assert body == LARGE

    def read_in_pieces(sock: socket.socket) -> bytes:
        received = b""
        while piece := sock.recv(10_000):
            received += piece
        return received

    async with serving(make(sharing(folder))) as address:
        await run_sync(ask, address)
        with connect(address) as slow:
            slow.sendall(b"GET /large.bin HTTP/1.0\r\n\r\n")
            # Whoever reads slowly keeps one thread, and nobody else.
            if make in THREADING.values():
                assert await run_sync(get, address, "/small.txt") == SMALL
            received = await run_sync(read_in_pieces, slow)
    assert received.partition(b"\r\n\r\n")[2] == LARGE


@each_threading_server
@bounded
async def test_many_clients_are_served_at_once(make, folder):
    async with serving(make(sharing(folder))) as address, clients(address, 12, ask_idle):
        bodies = await side_by_side(4, lambda _: get(address, "/small.txt"))
    assert bodies == [SMALL] * 4


@bounded
async def test_a_handler_that_fails_harms_nobody_else(folder, capsys):
    class Failing(KeepAlive):
        def do_POST(self) -> None:
            raise RuntimeError("a handler's own fault")

        def do_PUT(self) -> None:
            sys.exit("a handler may not end the program")

    def ask(address: Any) -> None:
        for method in ("POST", "PUT"):
            with (
                http_connection(address) as connection,
                pytest.raises(http.client.RemoteDisconnected),
            ):
                fetch(connection, "/", method)
        assert get(address, "/small.txt") == SMALL

    async with serving(http.server.HTTPServer(LOCAL, sharing(folder, Failing))) as address:
        await run_sync(ask, address)
    assert "a handler's own fault" in capsys.readouterr().err


# -- curl ----------------------------------------------------------------------------------


@needs_program("curl")
@each_server
@bounded
async def test_curl_fetches_over_one_connection(make, folder, tmp_path):
    async with serving(make(sharing(folder))) as (host, port):
        url = f"http://{host}:{port}"
        saved = tmp_path / "large.bin", tmp_path / "small.txt"
        printed = await curl(
            *("--write-out", "%{http_code} %{num_connects}\n"),
            *("--output", str(saved[0]), f"{url}/large.bin"),
            *("--output", str(saved[1]), f"{url}/small.txt"),
        )
        assert printed == "200 1\n200 0\n"
        assert saved[0].read_bytes() == LARGE
        assert saved[1].read_bytes() == SMALL
        head = await curl("--head", f"{url}/small.txt")
        assert f"Content-Length: {len(SMALL)}" in head
        missing = await curl(
            *("--write-out", "%{http_code}", "--output", os.devnull), f"{url}/missing"
        )
        assert missing == "404"


# -- ends ----------------------------------------------------------------------------------


@each_server
@bounded
async def test_cancelling_ends_idle_connections(make, folder):
    server = make(sharing(folder))
    count = 5 if make in THREADING.values() else 1
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server) as address:
            idle = await stack.enter_async_context(clients(address, count, ask_idle))
        for sock in idle:
            assert receive_until_closed(sock) == b""
    if isinstance(server, trio_socketserver.BaseServer):
        assert_sums_up(server)
        assert server.statistics().cancelled == count


@bounded
async def test_shutdown_ends_idle_connections_of_daemon_threads(folder):
    """`ThreadingHTTPServer` says that nobody waits for its threads."""
    server = http.server.ThreadingHTTPServer(LOCAL, sharing(folder))
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server, "shut down") as address:
            idle = await stack.enter_async_context(clients(address, 5, ask_idle))
        for sock in idle:
            assert receive_until_closed(sock) == b""


@bounded
async def test_shutdown_waits_for_connections_of_threads_that_are_no_daemons(folder):
    server = socketserver.ThreadingTCPServer(LOCAL, sharing(folder))
    async with trio.open_nursery() as nursery:
        address = await nursery.start(trio_socketserver.serve_blocking, server)
        async with clients(address, 1, ask_idle) as (idle,):
            await run_sync(server.shutdown)
            await run_sync(ask_idle, idle)
    assert server.fileno() == -1


@bounded
async def test_our_graceful_timeout_ends_idle_connections(folder):
    server = trio_socketserver.ThreadingTCPServer(LOCAL, sharing(folder))
    server.graceful_timeout = 0.05
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server, "shut down") as address:
            idle = await stack.enter_async_context(clients(address, 5, ask_idle))
        for sock in idle:
            assert receive_until_closed(sock) == b""
    assert_sums_up(server)
    assert server.statistics().cancelled == 5


@each_server
@bounded
async def test_cancelling_ends_a_transfer_that_nobody_reads(make, folder):
    server = make(sharing(folder))
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server) as address:
            (sock,) = await stack.enter_async_context(clients(address))
            sock.sendall(b"GET /endless.bin HTTP/1.1\r\nHost: here\r\n\r\n")
            assert await run_sync(sock.recv, 4) == b"HTTP"
        received = len(await run_sync(receive_until_closed, sock))
    assert received < ENDLESS_SIZE
    if isinstance(server, trio_socketserver.BaseServer):
        assert server.statistics().cancelled == 1


@each_server
@bounded
async def test_a_client_that_leaves_amid_a_transfer_harms_nobody_else(make, folder):
    async with serving(make(sharing(folder))) as address:
        with connect(address) as leaving:
            leaving.sendall(b"GET /endless.bin HTTP/1.1\r\nHost: here\r\n\r\n")
            assert await run_sync(leaving.recv, 4) == b"HTTP"
        assert await run_sync(get, address, "/small.txt") == SMALL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@bounded
async def test_cancelling_ends_idle_connections_of_children(folder, monkeypatch):
    # They end when they are asked to; nobody is killed within the time of a test.
    monkeypatch.setattr(_stdlib_servers, "SHUTDOWN_TIMEOUT", 2 * REAL_LIMIT)

    class ForkingHTTPServer(socketserver.ForkingMixIn, http.server.HTTPServer):
        pass

    class Telling(KeepAlive):
        def end_headers(self) -> None:
            self.send_header("Process", str(os.getpid()))
            super().end_headers()

    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            status, body, headers = fetch(connection, "/large.bin")
        assert (status, body) == (200, LARGE)
        assert int(headers["Process"]) != os.getpid()

    server = ForkingHTTPServer(LOCAL, sharing(folder, Telling))
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server) as address:
            idle = await stack.enter_async_context(clients(address, 3, ask_idle))
            await run_sync(ask, address)
        for sock in idle:
            assert receive_until_closed(sock) == b""
        await trio.lowlevel.checkpoint()


@each_server
@bounded
async def test_a_handler_may_shut_the_server_down(make, folder):
    """Of a serial server too, where the standard library's would wait for itself."""

    class Stopping(KeepAlive):
        def do_POST(self) -> None:
            self.server.shutdown()
            threading.Event().wait(0.02)  # The answer comes when the server has stopped.
            self.send_response(204)
            self.end_headers()
            self.close_connection = True

    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            assert fetch(connection, "/", "POST")[0] == 204

    server = make(sharing(folder, Stopping))
    if isinstance(server, trio_socketserver.BaseServer):
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await run_sync(ask, server.server_address)
    else:
        async with trio.open_nursery() as nursery:
            address = await nursery.start(trio_socketserver.serve_blocking, server)
            await run_sync(ask, address)
    assert server.fileno() == -1


# -- TLS -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> Any:
    """A certificate authority for the tests."""
    trustme = pytest.importorskip("trustme")
    return trustme.CA()


def context_for_server(authority: Any) -> ssl.SSLContext:
    """Return the context of a server that calls itself 127.0.0.1."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def server_context(authority) -> ssl.SSLContext:
    """The context of most of the servers."""
    return context_for_server(authority)


@pytest.fixture(scope="module")
def client_context(authority) -> ssl.SSLContext:
    """The context of a client that trusts the authority, and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


def wrapped(server_class: Any, handler: Any, context: ssl.SSLContext) -> Any:
    """Return a server over TLS, made as everybody makes it."""
    server = server_class(LOCAL, handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


each_http_server = pytest.mark.parametrize(
    "server_class", [http.server.ThreadingHTTPServer, http.server.HTTPServer]
)


@each_ending
@each_http_server
@bounded
async def test_tls_carries_many_requests_and_large_files(
    server_class, ending, folder, server_context, client_context
):
    def ask(address: Any) -> None:
        with http_connection(address, client_context) as connection:
            assert fetch(connection, "/small.txt")[:2] == (200, SMALL)
            kept = connection.sock
            assert fetch(connection, "/large.bin")[:2] == (200, LARGE)
            assert fetch(connection, "/missing")[0] == 404
            assert kept is not None

    server = wrapped(server_class, sharing(folder), server_context)
    listener = server.socket
    async with serving(server, ending) as address:
        await run_sync(ask, address)
        await run_sync(ask, address)
    assert server.socket is listener
    assert listener.do_handshake_on_connect is True


@bounded
async def test_mute_tls_clients_keep_nobody_waiting(folder, server_context, client_context):
    server = wrapped(http.server.ThreadingHTTPServer, sharing(folder), server_context)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server) as address:
            mute = await stack.enter_async_context(clients(address, 3))
            body = await run_sync(get, address, "/small.txt", client_context)
            assert body == SMALL
        # And cancelling has ended them.
        for sock in mute:
            assert receive_until_closed(sock) == b""


@each_http_server
@bounded
async def test_cancelling_ends_mute_tls_clients(server_class, folder, authority):
    arrived = threading.Event()

    class Handler(KeepAlive):
        def setup(self) -> None:
            arrived.set()  # Where the handshake has been left to the handler.
            super().setup()

    class Connection(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            arrived.set()  # Where it has not.
            super().do_handshake(block)

    context = context_for_server(authority)
    context.sslsocket_class = Connection
    server = wrapped(server_class, sharing(folder, Handler), context)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server) as address:
            (mute,) = await stack.enter_async_context(clients(address))
            # The first byte of a handshake that is never finished.
            mute.sendall(b"\x16")
            assert await run_sync(arrived.wait, CLIENT_LIMIT)
        assert receive_until_closed(mute) == b""


@each_http_server
@bounded
async def test_cancelling_ends_idle_tls_clients(
    server_class, folder, server_context, client_context
):
    async with contextlib.AsyncExitStack() as stack:
        async with serving(
            wrapped(server_class, sharing(folder), server_context)
        ) as address:
            connection = stack.enter_context(http_connection(address, client_context))
            assert (await run_sync(fetch, connection, "/small.txt"))[0] == 200
            idle = connection.sock
        with contextlib.suppress(ssl.SSLEOFError, ConnectionResetError):
            assert idle.recv(1) == b""


@each_http_server
@bounded
async def test_who_does_not_speak_tls_harms_nobody_else(
    server_class, folder, server_context, client_context
):
    async with serving(wrapped(server_class, sharing(folder), server_context)) as address:
        with connect(address) as plain:
            plain.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = await run_sync(receive_until_closed, plain)
            assert not answer.startswith(b"HTTP")
        # A client that does not trust the server leaves in the middle of the handshake.
        distrusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with pytest.raises(ssl.SSLCertVerificationError):
            await run_sync(get, address, "/small.txt", distrusting)
        assert await run_sync(get, address, "/small.txt", client_context) == SMALL


@needs_program("curl")
@each_http_server
@bounded
async def test_curl_fetches_over_tls(
    server_class, folder, server_context, authority, tmp_path
):
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(trusted)
    saved = tmp_path / "large.bin"
    server = wrapped(server_class, sharing(folder), server_context)
    async with serving(server) as (host, port):
        url = f"https://{host}:{port}"
        printed = await curl(
            *("--cacert", str(trusted), "--write-out", "%{http_code} %{num_connects}\n"),
            *("--output", str(saved), f"{url}/large.bin"),
            *("--output", os.devnull, f"{url}/small.txt"),
        )
    assert printed == "200 1\n200 0\n"
    assert saved.read_bytes() == LARGE


@needs_program("openssl")
@each_http_server
@bounded
async def test_openssl_fetches_over_tls(
    server_class, folder, server_context, authority, tmp_path
):
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(trusted)
    server = wrapped(server_class, sharing(folder), server_context)
    async with serving(server) as (host, port):
        printed = await program(
            *("openssl", "s_client", "-quiet", "-verify_return_error"),
            *("-CAfile", str(trusted), "-connect", f"{host}:{port}"),
            given=b"GET /small.txt HTTP/1.0\r\n\r\n",
            # The standard library's servers end without a close_notify, which it minds.
            check=False,
        )
    assert printed.encode().endswith(b"\r\n\r\n" + SMALL)


# -- load ----------------------------------------------------------------------------------


class Popular(http.server.ThreadingHTTPServer):
    # With the standard 5 a burst of 20 connections waits for SYN retries, whoever serves.
    request_queue_size = 128


LOADED_SERVERS = {
    "ours-threading": trio_socketserver.ThreadingTCPServer,
    "ours-serial": trio_socketserver.TCPServer,
    "http-threading": Popular,
}


@pytest.mark.parametrize("keeps", [True, False], ids=["one-connection", "connection-each"])
@pytest.mark.parametrize("server_class", LOADED_SERVERS.values(), ids=LOADED_SERVERS)
@bounded
async def test_no_request_fails_of_many_clients(server_class, keeps, folder):
    # Over a kept connection that handler answers only every 40 ms (Nagle's algorithm and
    # delayed acknowledgements); a serial server serves the connections one by one.
    at_once, each = 20, (2 if keeps else 15)
    server = server_class(LOCAL, sharing(folder))

    def ask(number: int) -> set[tuple[int, bytes]]:
        answers = set()
        with http_connection(server.server_address) as connection:
            for _ in range(each):
                answers.add(fetch(connection, "/small.txt")[:2])
                if not keeps:
                    connection.close()
        return answers

    async with serving(server, "shut down"):
        assert await side_by_side(at_once, ask) == [{(200, SMALL)}] * at_once
    if isinstance(server, trio_socketserver.BaseServer):
        assert_sums_up(server)
        assert server.statistics().completed == (at_once if keeps else at_once * each)


@needs_program("ab")
@pytest.mark.parametrize("server_class", LOADED_SERVERS.values(), ids=LOADED_SERVERS)
@bounded
async def test_no_request_fails_under_the_load_of_ab(server_class, folder):
    requests, at_once = 300, 20
    async with serving(server_class(LOCAL, sharing(folder))) as (host, port):
        printed = await program(
            *("ab", "-q", "-n", str(requests), "-c", str(at_once)),
            *("-s", str(int(CLIENT_LIMIT)), f"http://{host}:{port}/small.txt"),
        )
    found = dict(re.findall(r"([\w -]+requests|HTML transferred): +(\d+)", printed))
    assert found == {
        "Complete requests": str(requests),
        "Failed requests": "0",
        "HTML transferred": str(requests * len(SMALL)),
    }
