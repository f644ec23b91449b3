"""Holds stream servers to what they promise over TLS, wherever handlers of both colours
run: the handshake, hostile clients, closing, certificates, draining, cancellation."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from blocking_servers import forks_with_threads, in_thread
from blocking_world import serving
from helpers import (
    REAL_LIMIT,
    assert_sums_up,
    bounded,
    class_name,
    close_with_reset,
    connect,
    receive_to_end,
    receive_until_closed,
)
from tls_world import (
    AT_A_LINE,
    AUTHORITY,
    HOST,
    PLACES,
    STRANGERS,
    AsyncEcho,
    ask,
    client_context,
    each_async_server,
    each_place,
    each_version,
    receive_rest,
    server_context,
    tls_connect,
)

from trio_socketserver import (
    BaseRequestHandler,
    ForkingTCPServer,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
    ThreadingUnixStreamServer,
    UDPServer,
    UnixStreamServer,
)
from trio_socketserver._draining import FIRST_LINE_GRACE
from trio_socketserver._tls_contexts import make_context

pytestmark = forks_with_threads

ADDRESS = (HOST, 0)


def make(server_class: Any, handler: Any, **attributes: Any) -> Any:
    """Return a server of a subclass with these attributes; it speaks TLS."""
    context = attributes.pop("ssl_context", None) or server_context()
    address = attributes.pop("address", ADDRESS)
    own_class = type(server_class.__name__, (server_class,), attributes)
    return own_class(address, handler, ssl_context=context)


# -- it serves -----------------------------------------------------------------------------


@each_version
@each_place()
@bounded
async def test_it_serves(place: Any, version: ssl.TLSVersion) -> None:
    server_class, echo, _ = place
    server = make(server_class, echo)
    async with serving(server):
        for _ in range(2):
            context = client_context(version)
            answer = await ask(server, b"hello\n", b"bye\n", context=context)
            assert answer == b"hello\nbye\n"
    assert server.statistics().completed == 2
    assert_sums_up(server)


@each_place()
@bounded
async def test_a_handler_reads_the_facts_of_its_connection(place: Any) -> None:
    server_class, _, handler = place
    context = server_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.verify_mode = ssl.CERT_REQUIRED
    AUTHORITY.configure_trust(context)
    server = make(server_class, handler, ssl_context=context)
    theirs = client_context()
    theirs.set_alpn_protocols(["http/1.1"])
    AUTHORITY.issue_cert("client@example.org").configure_cert(theirs)

    def client() -> tuple[Any, Any]:
        with tls_connect(server.server_address, theirs, "one.example") as sock:
            return eval(receive_rest(sock)), sock.cipher()

    async with serving(server):
        facts, cipher = await in_thread(client)
    certificate = facts.pop("getpeercert")
    assert ("email", "client@example.org") in certificate["subjectAltName"]
    assert facts == {
        "version": "TLSv1.3",
        "selected_alpn_protocol": "http/1.1",
        "cipher": cipher,
        "compression": None,
        "sni": "one.example",
        "server_side": True,
        "session_reused": False,
        "pending": 0,
    }


@bounded
async def test_over_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    server = NurseryUnixStreamServer(path, AsyncEcho, ssl_context=server_context())
    async with serving(server):
        assert await ask(server, b"bye\n") == b"bye\n"


@each_async_server
@bounded
async def test_a_hook_may_use_the_request_itself(server_class: Any) -> None:
    class Direct(server_class):  # type: ignore[misc]
        async def finish_request(self, request: Any, client_address: Any) -> None:
            await request.sendall(await request.recv(100))

    server = make(Direct, BaseRequestHandler)
    async with serving(server):
        assert await ask(server, b"hello") == b"hello"


@bounded
async def test_what_a_hook_has_begun_a_child_goes_on_with() -> None:
    class Greeting(ForkingTCPServer):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            await request.send_all(b"from the parent\n")
            await super().finish_request(request, client_address)

    server = make(Greeting, AsyncEcho)
    async with serving(server):
        assert await ask(server, b"bye\n") == b"from the parent\nbye\n"
    assert server.statistics().completed == 1


@bounded
async def test_a_coroutine_function_and_what_it_leaves_open() -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        await request.send_all(request.version().encode())

    server = make(ForkingTCPServer, handler)
    async with serving(server):
        assert await ask(server) == b"TLSv1.3"


@bounded
async def test_the_constructor_of_a_handler_may_look() -> None:
    class Looking(BaseRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.found = self.request.version()

        async def handle(self) -> None:
            await self.request.send_all(self.found.encode())

    server = make(NurseryTCPServer, Looking)
    async with serving(server):
        assert await ask(server) == b"TLSv1.3"


# -- who may come in -----------------------------------------------------------------------


@each_place("plain", "threading-async")
@bounded
async def test_a_request_is_verified_before_a_byte_is_read(place: Any) -> None:
    server_class, echo, _ = place
    queued: list[int] = []

    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        await trio.lowlevel.wait_readable(request.socket)
        queued.append(len(request.socket.recv(65536, socket.MSG_PEEK)))
        return len(queued) > 1

    server = make(server_class, echo, verify_request=verify_request)
    async with serving(server):
        with pytest.raises(OSError):  # noqa: PT011 (an end or a reset, as it comes)
            await ask(server, b"bye\n")
        assert await ask(server, b"bye\n") == b"bye\n"
    assert min(queued) > 200  # The whole of the client's hello.
    assert server.statistics().rejected == 1
    assert server.statistics().peer_errors == 0


# -- hostile clients -----------------------------------------------------------------------


def silent(address: Any) -> bytes:
    with connect(address) as sock:
        return receive_until_closed(sock)


def plaintext(address: Any) -> bytes:
    with connect(address) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        return receive_until_closed(sock)


def half_a_hello(address: Any) -> bytes:
    with connect(address) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00\x01")
        sock.shutdown(socket.SHUT_WR)
        return receive_until_closed(sock)


def leaves(address: Any) -> bytes:
    with connect(address) as sock:
        sock.shutdown(socket.SHUT_WR)
        return receive_until_closed(sock)


def aborts(address: Any) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    half = client_context().wrap_bio(incoming, outgoing, server_hostname=HOST)
    with contextlib.suppress(ssl.SSLWantReadError):
        half.do_handshake()
    sock = connect(address)
    sock.sendall(outgoing.read())
    sock.recv(1)
    close_with_reset(sock)
    return b""


def old_version(address: Any) -> bytes:
    return refused(address, client_context(ssl.TLSVersion.TLSv1_2))


def distrustful(address: Any) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    STRANGERS.configure_trust(context)
    return refused(address, context)


def no_certificate(address: Any) -> bytes:
    return refused(address, client_context())


def strange_certificate(address: Any) -> bytes:
    context = client_context()
    STRANGERS.issue_cert("somebody").configure_cert(context)
    return refused(address, context)


def refused(address: Any, context: ssl.SSLContext) -> bytes:
    try:
        with tls_connect(address, context) as sock:
            return sock.recv(100)
    except (ssl.SSLError, ConnectionError):
        return b""


HOSTILE: dict[Callable[[Any], bytes], str] = {
    silent: "RequestTimeout: .*handshake took longer than 0.2 s",
    plaintext: r"ConnectionBroken: .*\[SSL: HTTP_REQUEST\] http request",
    half_a_hello: "ConnectionBroken: .*in the middle of the TLS handshake",
    leaves: "ConnectionBroken: .*in the middle of the TLS handshake",
    aborts: "ConnectionBroken: .*(reset by peer|middle of the TLS handshake)",
    old_version: "ConnectionBroken: .*UNSUPPORTED_PROTOCOL",
    distrustful: "ConnectionBroken: .*UNKNOWN_CA",
    no_certificate: "ConnectionBroken: .*PEER_DID_NOT_RETURN_A_CERTIFICATE",
    strange_certificate: "ConnectionBroken: .*CERTIFICATE_VERIFY_FAILED",
}
"""Clients that come to nothing, and the line that is logged of each."""


@pytest.mark.parametrize(
    ("place", "hostile"),
    [
        pytest.param(place, hostile, id=f"{name}-{hostile.__name__}")
        for name, place in PLACES.items()
        for hostile in HOSTILE
        # A child has a copy of our end of the connection, which so cannot be reset.
        if not (hostile is aborts and "forking" in name)
    ],
)
@bounded
async def test_a_hostile_client_costs_itself_only(
    place: Any, hostile: Callable[[Any], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    server_class, echo, _ = place
    context = server_context()
    if hostile is old_version:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
    theirs = client_context()
    if "certificate" in hostile.__name__:
        context.verify_mode = ssl.CERT_REQUIRED
        AUTHORITY.configure_trust(context)
        AUTHORITY.issue_cert("friend").configure_cert(theirs)
    timeout = 0.2 if hostile is silent else REAL_LIMIT
    server = make(server_class, echo, ssl_context=context, ssl_handshake_timeout=timeout)
    with caplog.at_level(logging.INFO, "trio_socketserver"):
        async with serving(server):
            await in_thread(hostile, server.server_address)
            server.ssl_handshake_timeout = REAL_LIMIT
            assert await ask(server, b"bye\n", context=theirs) == b"bye\n"
    seen = server.statistics()
    assert (seen.completed, seen.failed, seen.peer_errors) == (1, 1, 1)
    assert_sums_up(server)
    (line,) = caplog.records
    assert line.levelno == logging.INFO
    assert line.exc_info is None
    assert "\n" not in line.getMessage()
    assert re.search(HOSTILE[hostile], line.getMessage())


@each_place("plain", "plain-blocking", "threading-async")
@bounded
async def test_silent_clients_keep_nobody_waiting(place: Any) -> None:
    server_class, echo, _ = place
    server = make(server_class, echo, graceful_timeout=0)
    async with serving(server):
        with contextlib.ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(connect(server.server_address))
            assert await ask(server, b"bye\n") == b"bye\n"
            while not server.statistics().completed:  # It has an answer before its end.
                await trio.sleep(0.001)
            await server.server_close()
    assert server.statistics().cancelled == 5


@each_async_server
async def test_a_silent_client_has_a_minute(
    server_class: Any, autojump_clock: trio.testing.MockClock
) -> None:
    server = make(server_class, AsyncEcho)
    assert server.ssl_handshake_timeout == 60
    async with serving(server):
        with connect(server.server_address) as client:
            assert await receive_to_end(client) == b""
            assert trio.current_time() == pytest.approx(60)


async def test_the_whole_request_may_end_before_the_handshake(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = make(NurseryTCPServer, AsyncEcho, request_timeout=7)
    async with serving(server):
        with connect(server.server_address) as client:
            assert await receive_to_end(client) == b""
            assert trio.current_time() == pytest.approx(7)
    assert server.statistics().failed == 1


# -- cancelling ----------------------------------------------------------------------------


@each_place()
@bounded
async def test_a_handshake_is_cancelled(place: Any) -> None:
    server_class, echo, _ = place
    server = make(server_class, echo)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with connect(server.server_address) as client:
            while not server.statistics().active:
                await trio.sleep(0.001)
            await trio.sleep(0.05)  # So that most times it waits in its place.
            server._requests.cancel()
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                assert await in_thread(receive_until_closed, client) == b""
    assert server.statistics().cancelled == 1
    assert_sums_up(server)


class WaitingAsync(StreamRequestHandler):
    async def handle(self) -> None:
        await self.wfile.write(b"waiting\n")
        await self.rfile.read()


class WaitingBlocking(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"waiting\n")
        self.rfile.read()


@each_place()
@bounded
async def test_a_cancelled_request_is_ended_properly(place: Any) -> None:
    """Its handler waits for a client that says nothing. A blocking one is shut down."""
    server_class, echo, _ = place
    asynchronous = issubclass(echo, BaseRequestHandler)
    handler = WaitingAsync if asynchronous else WaitingBlocking
    server = make(server_class, handler)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with await in_thread(tls_connect, server.server_address) as client:
            assert await in_thread(client.recv, 100) == b"waiting\n"
            server._requests.cancel()
            nursery.cancel_scope.cancel()
            with (
                trio.CancelScope(shield=True),
                contextlib.suppress(*([] if asynchronous else [OSError])),
            ):
                assert await in_thread(client.recv, 100) == b""
    assert server.statistics().cancelled == 1


# -- closing -------------------------------------------------------------------------------


class Lavish(StreamRequestHandler):
    async def handle(self) -> None:
        await self.wfile.write(bytes(10**7))


@pytest.mark.parametrize(
    "server_class",
    # Over TCP there may be room later, though nobody reads.
    [UnixStreamServer, NurseryUnixStreamServer, ThreadingUnixStreamServer],
    ids=class_name,
)
async def test_a_client_that_does_not_read_is_waited_for_no_longer_than_allowed(
    server_class: Any, autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    class Clogging(StreamRequestHandler):
        async def handle(self) -> None:
            while self.request._flush_now():
                self.request._encrypt(memoryview(bytes(512)))
            self.request._unsent = b""  # As if there had been room, just.

    address = str(tmp_path / "s")
    server = make(server_class, Clogging, address=address, cleanup_timeout=5.0)
    async with serving(server):
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        half = client_context().wrap_bio(incoming, outgoing, server_hostname=HOST)
        with connect(server.server_address) as client:
            client.setblocking(False)
            while True:
                with contextlib.suppress(ssl.SSLWantReadError):
                    half.do_handshake()
                    break
                client.send(outgoing.read())
                await trio.lowlevel.wait_readable(client)
                incoming.write(client.recv(65536))
            start = trio.current_time()
            client.send(outgoing.read())
            while not (server.statistics().failed or server.statistics().completed):
                await trio.sleep(0.1)
            assert trio.current_time() - start == pytest.approx(5, abs=0.2)
    assert server.statistics().peer_errors == 1


@each_place("threading-async")
@bounded
async def test_nobody_waits_for_the_close_notify_of_the_client(place: Any) -> None:
    server_class, echo, _ = place
    server = make(server_class, echo)
    async with serving(server):
        with await in_thread(tls_connect, server.server_address) as client:
            await in_thread(client.sendall, b"bye\n")
            assert await in_thread(receive_rest, client) == b"bye\n"
            # We have said nothing, and still it is over.
            while server.statistics().active:
                await trio.sleep(0.001)
    assert server.statistics().completed == 1


@bounded
async def test_a_hook_of_its_own_may_close() -> None:
    class Closing(NurseryTCPServer):
        async def shutdown_request(self, request: Any) -> None:
            await super().shutdown_request(request)

    server = make(Closing, AsyncEcho)
    async with serving(server):
        assert await ask(server, b"bye\n") == b"bye\n"


# -- draining ------------------------------------------------------------------------------


class Lines(StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(line)
        await self.wfile.write(b"goodbye\n")


@each_async_server
@bounded
async def test_an_idle_client_is_let_go_when_the_server_drains(server_class: Any) -> None:
    server = make(server_class, Lines)
    async with serving(server):
        with await in_thread(tls_connect, server.server_address) as client:
            await in_thread(client.sendall, b"one\n")
            assert await in_thread(client.recv, 100) == b"one\n"
            await trio.testing.wait_all_tasks_blocked()
            await server.server_close()
            assert await in_thread(receive_rest, client) == b"goodbye\n"
    assert server.statistics().completed == 1


async def test_a_silent_client_holds_up_draining_for_its_grace_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = make(NurseryTCPServer, Lines)
    async with serving(server):
        with connect(server.server_address) as client:
            while not server.statistics().active:
                await trio.lowlevel.checkpoint()
            start = trio.current_time()
            await server.server_close()
            assert trio.current_time() - start == pytest.approx(FIRST_LINE_GRACE)
            assert await receive_to_end(client) == b""
    assert server.statistics().peer_errors == 1


# -- contexts ------------------------------------------------------------------------------


def certificate_of(server: Any) -> bytes:
    with tls_connect(server.server_address) as client:
        certificate = client.getpeercert(binary_form=True)
        client.sendall(b"bye\n")
        receive_rest(client)
        assert certificate
        return certificate


@each_place("threading-async", "forking-async")
@bounded
async def test_a_certificate_that_is_reloaded_serves_new_connections(place: Any) -> None:
    server_class, echo, _ = place
    server = make(server_class, echo)
    async with serving(server):
        with await in_thread(tls_connect, server.server_address) as early:
            certificates = [early.getpeercert(binary_form=True)]
            AUTHORITY.issue_cert(HOST).configure_cert(server.ssl_context)
            if server_class in (NurseryTCPServer, ThreadingTCPServer, ForkingTCPServer):
                certificates.append(await in_thread(certificate_of, server))
            await in_thread(early.sendall, b"bye\n")
            assert await in_thread(receive_rest, early) == b"bye\n"
        certificates.append(await in_thread(certificate_of, server))
        server.ssl_context = server_context(AUTHORITY.issue_cert(HOST))
        certificates.append(await in_thread(certificate_of, server))
    assert len(set(certificates)) == 3
    assert certificates[0] not in certificates[1:]


class Store:
    """Certificates of its own."""

    def __init__(self) -> None:
        self.made = 0

    def context(self) -> ssl.SSLContext:
        self.made += 1
        return server_context()


@bounded
async def test_another_object_s_method_makes_another_context() -> None:
    stores = [Store(), Store()]
    server = NurseryTCPServer(ADDRESS, AsyncEcho, ssl_context=stores[0].context)
    async with serving(server):
        for store in stores:
            server.ssl_context = store.context
            for _ in range(2):
                assert await ask(server, b"bye\n") == b"bye\n"
            assert store.made == 1


CALLS: list[str] = []


def make_it() -> ssl.SSLContext:
    CALLS.append("function")
    return server_context()


class Factories:
    class Function(NurseryTCPServer):
        ssl_context = make_it

    class Static(NurseryTCPServer):
        ssl_context = staticmethod(make_it)

    class Method(NurseryTCPServer):
        def ssl_context(self) -> ssl.SSLContext:  # type: ignore[override]
            assert isinstance(self, NurseryTCPServer)
            return make_it()


@pytest.mark.parametrize("form", ["Function", "Static", "Method", "argument", "later"])
@bounded
async def test_a_callable_is_called_once(form: str) -> None:
    CALLS.clear()
    if form == "argument":
        server = NurseryTCPServer(ADDRESS, AsyncEcho, ssl_context=make_it)
    elif form == "later":
        server = NurseryTCPServer(ADDRESS, AsyncEcho)
        server.ssl_context = make_it
        assert not CALLS
    else:
        server = getattr(Factories, form)(ADDRESS, AsyncEcho)
    async with serving(server):
        assert CALLS == ["function"]
        for _ in range(2):
            assert await ask(server, b"bye\n") == b"bye\n"
    assert CALLS == ["function"]


def fails() -> ssl.SSLContext:
    raise FileNotFoundError("no such certificate")


def makes_nonsense() -> Any:
    return 42


WRONG = {
    "client's": (ssl.create_default_context(), ValueError, "is one for clients"),
    "nonsense": (42, TypeError, "must be an ssl.SSLContext or a callable.*42 is neither"),
    "made nonsense": (makes_nonsense, TypeError, "42, made by .*makes_nonsense.* neither"),
    "failing": (fails, FileNotFoundError, "no such certificate"),
}

each_wrong = pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)


@each_wrong
@bounded
async def test_what_is_no_context_is_found_out_early(wrong: Any) -> None:
    source, error, message = wrong
    with pytest.raises(error, match=message):
        NurseryTCPServer(ADDRESS, AsyncEcho, ssl_context=source)
    with pytest.raises(error, match=message):
        make_context(source)
    server = NurseryTCPServer(ADDRESS, AsyncEcho)
    server.ssl_context = source
    with pytest.raises(error, match=message):
        async with server:
            await server.serve_forever()


@each_wrong
@bounded
async def test_what_is_no_context_does_not_take_the_place_of_one(
    wrong: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = make(NurseryTCPServer, AsyncEcho)
    async with serving(server):
        server.ssl_context = wrong[0]
        for _ in range(2):
            assert await ask(server, b"bye\n") == b"bye\n"
        (line,) = caplog.records
        assert line.levelno == logging.ERROR
        assert line.exc_info
        assert "the one before it serves on" in line.getMessage()
        server.ssl_context = server_context()
        assert await ask(server, b"bye\n") == b"bye\n"
    assert len(caplog.records) == 1
    assert server.statistics().accept_errors == 0


@bounded
async def test_a_first_context_that_fails_while_serving_is_loud() -> None:
    server = NurseryTCPServer(ADDRESS, AsyncEcho)
    async with server:
        server.ssl_context = 42  # type: ignore[assignment]
        with (
            connect(server.server_address),
            pytest.raises(TypeError, match="must be an"),
        ):
            await server.get_request()
        assert server.statistics().accepted == 0


@pytest.mark.parametrize("server_class", [UDPServer, NurseryUDPServer])
def test_there_is_no_tls_for_datagrams(server_class: Any) -> None:
    with pytest.raises(TypeError, match="ssl_context"):
        server_class(ADDRESS, AsyncEcho, ssl_context=server_context())
    own_class = type("Own", (server_class,), {"ssl_context": server_context()})
    with pytest.raises(TypeError, match="Own serves datagrams: there is no TLS"):
        own_class(ADDRESS, AsyncEcho)


@bounded
async def test_a_wrapped_listener_is_refused() -> None:
    """That is how it is done with `socketserver`."""
    server = TCPServer(ADDRESS, AsyncEcho)
    server.socket = server_context().wrap_socket(server.socket, server_side=True)
    with pytest.raises(TypeError, match="give the context to the server, as ssl_context"):
        await server.serve_forever()
    await server.server_close()


@bounded
async def test_of_an_inherited_socket() -> None:
    with socket.create_server(ADDRESS) as listener:
        server = NurseryTCPServer.from_socket(
            listener, AsyncEcho, ssl_context=server_context()
        )
        async with serving(server):
            assert await ask(server, b"bye\n") == b"bye\n"


# -- other makes ---------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl program")
@each_place("threading-async")
@bounded
async def test_the_openssl_program(place: Any, tmp_path: Path) -> None:
    server_class, echo, _ = place
    authority = tmp_path / "ca.pem"
    AUTHORITY.cert_pem.write_to_path(authority)

    def client() -> subprocess.CompletedProcess[str]:
        host, port = server.server_address
        return subprocess.run(
            [
                *(*AT_A_LINE, "openssl", "s_client", "-connect", f"{host}:{port}"),
                *("-CAfile", str(authority), "-verify_return_error"),
                *("-servername", "two.example", "-quiet"),
            ],
            input="\nhello\nbye\n",
            capture_output=True,
            text=True,
            timeout=REAL_LIMIT,
            check=False,
        )

    server = make(server_class, echo)
    async with serving(server):
        done = await in_thread(client)
    assert (done.returncode, done.stdout) == (0, "hello\nbye\n"), done.stderr
    assert "unexpected eof" not in done.stderr
    assert server.statistics().completed == 1


class Program:
    """An ``openssl s_client`` that is talked to."""

    def __init__(self, server: Any, *options: str) -> None:
        host, port = server.server_address
        self.process = subprocess.Popen(
            [*AT_A_LINE, "openssl", "s_client", "-connect", f"{host}:{port}", *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.watchdog = threading.Timer(REAL_LIMIT, self.process.kill)

    def __enter__(self) -> Program:
        self.watchdog.start()
        self.say("")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.watchdog.cancel()
        self.watchdog.join()
        self.process.kill()
        self.process.communicate()

    def say(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self, expected: str) -> None:
        """Read lines up to one that contains *expected*."""
        assert self.process.stdout
        heard = []
        while True:
            line = self.process.stdout.readline()
            assert line, heard
            heard.append(line)
            if expected in line:
                return


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl program")
@each_place("threading-async")
@bounded
async def test_keys_are_updated(place: Any) -> None:
    server_class, echo, _ = place
    server = make(server_class, echo)

    def client() -> None:
        with Program(server) as program:
            program.say("hello")
            program.hear("hello")
            program.say("K")
            program.hear("KEYUPDATE")
            program.say("again")
            program.hear("again")
            program.say("bye")
            program.hear("closed")

    async with serving(server):
        await in_thread(client)
    assert server.statistics().completed == 1


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl program")
@each_place("threading-async")
@bounded
async def test_a_client_that_wants_to_negotiate_again_is_refused(place: Any) -> None:
    server_class, echo, _ = place
    server = make(server_class, echo)

    def client() -> None:
        with Program(server, "-tls1_2") as program:
            program.say("hello")
            program.hear("hello")
            program.say("R")
            program.hear("RENEGOTIATING")
            program.hear("no renegotiation")

    async with serving(server):
        await in_thread(client)
        assert await ask(server, b"bye\n") == b"bye\n"
    assert_sums_up(server)
