"""Programs of the standard library besides `http.server`, and of its documentation's kind.

XML-RPC, WSGI and log receivers, whole, asked by the standard library's own clients.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import pickle
import queue
import select
import socketserver
import struct
import threading
import xmlrpc.client
import xmlrpc.server
from collections.abc import Iterable, Iterator
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIServer, make_server

import pytest
import trio
from helpers import bounded, receive_until_closed
from programs import (
    CLIENT_LIMIT,
    ENDINGS,
    LOCAL,
    clients,
    fetch,
    http_connection,
    run_sync,
    serving,
    side_by_side,
)

import trio_socketserver

each_ending = pytest.mark.parametrize("ending", ENDINGS)


class OneAtATime:
    """A thing that two handlers cannot use at once without being found out."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.uses = 0

    def use(self) -> None:
        assert self._lock.acquire(blocking=False), "two handlers at once"
        try:
            threading.Event().wait(0.001)  # Long enough for another handler to come in.
            self.uses += 1
        finally:
            self._lock.release()


# -- XML-RPC -------------------------------------------------------------------------------


class ThreadingXMLRPCServer(ThreadingMixIn, xmlrpc.server.SimpleXMLRPCServer):
    """What the documentation's readers write."""


@contextlib.contextmanager
def rpc(address: Any) -> Iterator[Any]:
    """Yield a proxy of the server there."""
    host, port = address
    transport = xmlrpc.client.Transport()
    connect = transport.make_connection

    def make_connection(host: Any) -> Any:
        connection = connect(host)
        connection.timeout = CLIENT_LIMIT
        return connection

    transport.make_connection = make_connection  # type: ignore[method-assign]
    with xmlrpc.client.ServerProxy(
        f"http://{host}:{port}", transport, allow_none=True
    ) as proxy:
        yield proxy


each_rpc_server = pytest.mark.parametrize(
    "server_class", [xmlrpc.server.SimpleXMLRPCServer, ThreadingXMLRPCServer]
)


def rpc_server(server_class: Any) -> Any:
    """Return a server with some functions."""

    class Shop:
        def _dispatch(self, method: str, params: tuple[Any, ...]) -> Any:
            return method, params

    server = server_class(LOCAL, allow_none=True)
    server.register_introspection_functions()
    server.register_multicall_functions()
    server.register_function(pow)
    server.register_function(lambda x, y: x // y, "divide")
    server.register_instance(Shop())
    return server


@each_ending
@each_rpc_server
@bounded
async def test_remote_procedures_are_called(server_class, ending):
    def ask(address: Any) -> None:
        with rpc(address) as proxy:
            assert proxy.pow(2, 10) == 1024
            assert proxy.shop.call("é" * 100_000, None) == [
                "shop.call",
                ["é" * 100_000, None],
            ]
            assert "pow" in proxy.system.listMethods()
            with pytest.raises(xmlrpc.client.Fault, match="ZeroDivisionError"):
                proxy.divide(1, 0)
            several = xmlrpc.client.MultiCall(proxy)
            several.pow(3, 2)
            several.divide(9, 2)
            assert list(several()) == [9, 4]

    async with serving(rpc_server(server_class), ending) as address:
        await run_sync(ask, address)
        await run_sync(ask, address)


@bounded
async def test_a_serial_server_stays_serial():
    thing = OneAtATime()
    server = rpc_server(xmlrpc.server.SimpleXMLRPCServer)
    server.register_function(thing.use)

    def ask(number: int) -> None:
        with rpc(server.server_address) as proxy:
            proxy.use()

    async with serving(server):
        await side_by_side(4, ask)
    assert thing.uses == 4


@bounded
async def test_a_threading_server_runs_procedures_at_once():
    count = 4
    meeting = threading.Barrier(count, timeout=CLIENT_LIMIT)
    server = rpc_server(ThreadingXMLRPCServer)
    server.register_function(meeting.wait, "meet")

    def ask(number: int) -> int:
        with rpc(server.server_address) as proxy:
            return proxy.meet()

    async with serving(server):
        met = await side_by_side(count, ask)
    assert sorted(met) == [0, 1, 2, 3]


@each_rpc_server
@bounded
async def test_shutdown_may_be_a_remote_procedure(server_class):
    server = rpc_server(server_class)
    server.register_function(server.shutdown, "stop")

    def ask(address: Any) -> None:
        with rpc(address) as proxy:
            assert proxy.pow(2, 2) == 4
            assert proxy.stop() is None

    async with trio.open_nursery() as nursery:
        address = await nursery.start(trio_socketserver.serve_blocking, server)
        await run_sync(ask, address)
    assert server.fileno() == -1


# -- WSGI ----------------------------------------------------------------------------------


class ThreadingWSGIServer(ThreadingMixIn, WSGIServer):
    """What the documentation's readers write."""


each_wsgi_server = pytest.mark.parametrize(
    "server_class", [WSGIServer, ThreadingWSGIServer]
)


class Streaming:
    """A WSGI application that answers piece by piece.

    Attributes:
        go_on: the second piece is not made before this is set.
        left: set when the iteration has ended, in whatever way.
        thread: the name of the thread that was the last to answer.
    """

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.left = threading.Event()
        self.thread = ""

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        self.thread = threading.current_thread().name
        path = environ["PATH_INFO"]
        if path == "/failing":
            raise RuntimeError("the application's own fault")
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("200 OK", [("Content-Type", "application/octet-stream")])
        return self.pieces(path, body)

    def pieces(self, path: str, body: bytes) -> Iterator[bytes]:
        try:
            yield b"first;"
            if path == "/endless":
                while True:
                    yield bytes(65536)
            if path == "/waiting":
                assert self.go_on.wait(CLIENT_LIMIT)
            yield b"second;"
            yield body
        finally:
            self.left.set()


@each_ending
@each_wsgi_server
@bounded
async def test_an_application_streams_its_answer(server_class, ending):
    application = Streaming()

    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            connection.request("POST", "/waiting", b"body")
            with connection.getresponse() as response:
                # The rest has not been made yet.
                assert response.read(6) == b"first;"
                application.go_on.set()
                assert response.read() == b"second;body"

    server = make_server(*LOCAL, application, server_class)
    async with serving(server, ending) as address:
        await run_sync(ask, address)
    assert application.left.is_set()


@each_wsgi_server
@bounded
async def test_an_application_that_fails_harms_nobody_else(server_class, capsys):
    def ask(address: Any) -> None:
        for path, expected in (("/failing", 500), ("/", 200)):
            with http_connection(address) as connection:
                assert fetch(connection, path)[0] == expected

    async with serving(make_server(*LOCAL, Streaming(), server_class)) as address:
        await run_sync(ask, address)
    assert "the application's own fault" in capsys.readouterr().err


@each_wsgi_server
@bounded
async def test_cancelling_ends_an_endless_answer(server_class):
    application = Streaming()
    async with contextlib.AsyncExitStack() as stack:
        async with serving(make_server(*LOCAL, application, server_class)) as address:
            (sock,) = await stack.enter_async_context(clients(address))
            sock.sendall(b"GET /endless HTTP/1.0\r\n\r\n")
            assert await run_sync(sock.recv, 4) == b"HTTP"
        # The application has seen its iteration closed.
        assert application.left.is_set()
        assert await run_sync(receive_until_closed, sock)


@bounded
async def test_an_endless_answer_keeps_no_other_client_waiting():
    application = Streaming()
    server = make_server(*LOCAL, application, ThreadingWSGIServer)

    def ask(number: int) -> tuple[int, bytes]:
        with http_connection(server.server_address) as connection:
            return fetch(connection, "/")[:2]

    async with serving(server) as address, clients(address) as (sock,):
        sock.sendall(b"GET /endless HTTP/1.0\r\n\r\n")
        assert await run_sync(sock.recv, 4) == b"HTTP"
        assert await side_by_side(4, ask) == [(200, b"first;second;")] * 4


@bounded
async def test_every_request_has_a_thread_name_of_its_own():
    application = Streaming()
    names = set()

    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            assert fetch(connection, "/")[0] == 200

    server = make_server(*LOCAL, application, ThreadingWSGIServer)
    async with serving(server) as address:
        for _ in range(3):
            await run_sync(ask, address)
            names.add(application.thread)
    assert len(names) == 3


# -- log receivers -------------------------------------------------------------------------


def record_from(pickled: bytes) -> logging.LogRecord:
    """Return the record that a socket handler has sent."""
    return logging.makeLogRecord(pickle.loads(pickled))


class RecordStream(socketserver.StreamRequestHandler):
    """Receive records, each behind its length, until the program that logs has ended."""

    def handle(self) -> None:
        while header := self.rfile.read(4):
            (length,) = struct.unpack(">L", header)
            self.server.records.put(record_from(self.rfile.read(length)))  # type: ignore[attr-defined]


class RecordDatagram(socketserver.BaseRequestHandler):
    """Receive one record."""

    def handle(self) -> None:
        self.server.records.put(record_from(self.request[0][4:]))  # type: ignore[attr-defined]


class Receiver(socketserver.ThreadingTCPServer):
    """A receiver for the base class's loop."""

    allow_reuse_address = True
    daemon_threads = True


class SelectingReceiver(Receiver):
    """A receiver with a loop of its own, which knows nothing of the base class's."""

    abort = False
    timeout = 0.05  # Seconds between two looks at the flag.

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        while not self.abort:
            readable, _, _ = select.select([self.fileno()], [], [], self.timeout)
            if readable:
                self.handle_request()

    def shutdown(self) -> None:
        self.abort = True


STREAM_RECEIVERS = {
    "stdlib": Receiver,
    "stdlib-selecting": SelectingReceiver,
    "stdlib-serial": socketserver.TCPServer,
    "ours": trio_socketserver.ThreadingTCPServer,
    "ours-serial": trio_socketserver.TCPServer,
}
DATAGRAM_RECEIVERS = {
    "stdlib": socketserver.ThreadingUDPServer,
    "stdlib-serial": socketserver.UDPServer,
    "ours": trio_socketserver.ThreadingUDPServer,
    "ours-serial": trio_socketserver.UDPServer,
}


@contextlib.contextmanager
def logger_to(handler: logging.Handler) -> Iterator[logging.Logger]:
    """Yield a logger that sends its records by *handler*."""
    logger = logging.getLogger("remote")
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with contextlib.closing(handler):
            yield logger
    finally:
        logger.removeHandler(handler)


def log_some(address: Any, count: int) -> None:
    """Log from a connection of its own."""
    with logger_to(logging.handlers.SocketHandler(*address)) as logger:
        for number in range(count):
            logger.warning("naïve record %d", number)
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            logger.exception("failed")


@each_ending
@pytest.mark.parametrize("make", STREAM_RECEIVERS.values(), ids=STREAM_RECEIVERS)
@bounded
async def test_records_arrive_over_a_connection(make, ending):
    server = make(LOCAL, RecordStream)
    server.records = queue.Queue()
    async with serving(server, ending) as address:
        await run_sync(log_some, address, 100)
        received = [
            await run_sync(server.records.get, True, CLIENT_LIMIT) for _ in range(101)
        ]
    messages = [record.getMessage() for record in received]
    assert messages == [*(f"naïve record {n}" for n in range(100)), "failed"]
    assert "ZeroDivisionError" in received[-1].exc_text
    assert server.records.empty()


@pytest.mark.parametrize("make", STREAM_RECEIVERS.values(), ids=STREAM_RECEIVERS)
@bounded
async def test_cancelling_ends_connections_of_programs_that_still_run(make):
    server = make(LOCAL, RecordStream)
    server.records = queue.Queue()
    with contextlib.ExitStack() as stack:
        async with serving(server) as address:
            handler = logging.handlers.SocketHandler(*address)
            logger = stack.enter_context(logger_to(handler))
            logger.warning("one")
            record = await run_sync(server.records.get, True, CLIENT_LIMIT)
            assert record.getMessage() == "one"
            sock = handler.sock
            assert sock is not None
            sock.settimeout(CLIENT_LIMIT)
        assert receive_until_closed(sock) == b""


@bounded
async def test_a_selecting_loop_that_knows_no_shutdown_ends_when_it_is_closed():
    """Its own means are none, so that closing the socket is what ends it."""

    class Stubborn(SelectingReceiver):
        shutdown = socketserver.BaseServer.shutdown

    server = Stubborn(LOCAL, RecordStream)
    server.records = queue.Queue()
    async with serving(server) as address:
        await run_sync(log_some, address, 1)
        record = await run_sync(server.records.get, True, CLIENT_LIMIT)
        assert record.getMessage() == "naïve record 0"


@each_ending
@pytest.mark.parametrize("make", DATAGRAM_RECEIVERS.values(), ids=DATAGRAM_RECEIVERS)
@bounded
async def test_records_arrive_in_datagrams(make, ending):
    server = make(LOCAL, RecordDatagram)
    server.records = queue.Queue()
    received = []
    async with serving(server, ending) as address:
        with logger_to(logging.handlers.DatagramHandler(*address)) as logger:
            for number in range(20):
                logger.warning("record %d", number)
                record = await run_sync(server.records.get, True, CLIENT_LIMIT)
                received.append(record.getMessage())
    assert received == [f"record {n}" for n in range(20)]
