"""Servers of other people's packages, whole and unmodified, under `serve_blocking`.

Each overrides other hooks of the standard library's classes; a comment says which.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import socketserver
import threading
import xmlrpc.client
from collections.abc import Iterator
from typing import Any
from wsgiref.simple_server import make_server

import pytest
import trio
from helpers import bounded, receive_until_closed
from programs import (
    CLIENT_LIMIT,
    ENDINGS,
    LOCAL,
    clients,
    fetch,
    get,
    http_connection,
    run_sync,
    serving,
    side_by_side,
)

import trio_socketserver

each_ending = pytest.mark.parametrize("ending", ENDINGS)


@contextlib.contextmanager
def library_threads() -> Iterator[None]:
    """Wait for the threads that a library starts itself: nobody else can.

    They end by themselves, soon after their sockets have ended.
    """
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        if not thread.name.startswith("Trio thread"):
            thread.join(CLIENT_LIMIT)
            assert not thread.is_alive()


# -- werkzeug: serve_forever() that closes, handle_error() that raises ---------------------


def werkzeug_server(threaded: bool, **options: Any) -> Any:
    serving_module = pytest.importorskip("werkzeug.serving")
    wrappers = importlib.import_module("werkzeug.wrappers")

    @wrappers.Request.application
    def application(request: Any) -> Any:
        if request.path == "/failing":
            raise RuntimeError("the application's own fault")
        if request.path == "/endless":
            return wrappers.Response(iter(lambda: bytes(65536), None))
        return wrappers.Response(f"{request.method} {request.args.get('name')}")

    return serving_module.make_server(*LOCAL, application, threaded=threaded, **options)


each_werkzeug = pytest.mark.parametrize(
    "threaded", [True, False], ids=["threaded", "serial"]
)


@each_ending
@each_werkzeug
@bounded
async def test_werkzeug(threaded, ending):
    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            assert fetch(connection, "/?name=x")[:2] == (200, b"GET x")
            assert fetch(connection, "/failing")[0] == 500
            assert fetch(connection, "/?name=y")[:2] == (200, b"GET y")

    async with serving(werkzeug_server(threaded), ending) as address:
        await run_sync(ask, address)
        await run_sync(ask, address)


@each_werkzeug
@bounded
async def test_werkzeug_passes_errors_through_and_serves_on(threaded):
    def ask(address: Any) -> None:
        with http_connection(address) as connection, contextlib.suppress(ConnectionError):
            assert fetch(connection, "/failing")[0] == 500
        assert get(address, "/?name=x") == b"GET x"

    server = werkzeug_server(threaded, passthrough_errors=True)
    async with serving(server) as address:
        await run_sync(ask, address)


@each_werkzeug
@bounded
async def test_cancelling_ends_werkzeug_amid_an_endless_answer(threaded):
    async with contextlib.AsyncExitStack() as stack:
        async with serving(werkzeug_server(threaded)) as address:
            (sock,) = await stack.enter_async_context(clients(address))
            sock.sendall(b"GET /endless HTTP/1.0\r\n\r\n")
            assert await run_sync(sock.recv, 4) == b"HTTP"
        assert await run_sync(receive_until_closed, sock)


# -- prometheus_client: daemon threads, for metrics beside a program -----------------------


@each_ending
@bounded
async def test_prometheus_client(ending):
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    asked = prometheus.Counter("asked", "How often", registry=registry)
    server = make_server(
        *LOCAL,
        prometheus.make_wsgi_app(registry),
        prometheus.exposition.ThreadingWSGIServer,
        handler_class=prometheus.exposition._SilentHandler,
    )
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server, ending) as address:
            (mute,) = await stack.enter_async_context(clients(address))
            asked.inc()
            assert b"\nasked_total 1.0\n" in await run_sync(get, address, "/metrics")
            asked.inc()
            assert b"\nasked_total 2.0\n" in await run_sync(get, address, "/metrics")
        assert receive_until_closed(mute) == b""


# -- jsonrpclib-pelix: process_request() into a pool, server_close() calls shutdown() ------


@contextlib.contextmanager
def json_rpc(address: Any) -> Iterator[Any]:
    """Yield a proxy of the server there."""
    jsonrpclib = importlib.import_module("jsonrpclib")
    host, port = address
    proxy = jsonrpclib.ServerProxy(f"http://{host}:{port}")
    try:
        yield proxy
    finally:
        proxy("close")()


def json_server(name: str) -> Any:
    module = pytest.importorskip("jsonrpclib.SimpleJSONRPCServer")
    server = getattr(module, name)(LOCAL, logRequests=False)
    server.register_function(pow)
    server.register_function(lambda x, y: x // y, "divide")
    return server


@each_ending
@pytest.mark.parametrize("name", ["SimpleJSONRPCServer", "PooledJSONRPCServer"])
@bounded
async def test_jsonrpclib(name, ending):
    server = json_server(name)
    jsonrpclib = importlib.import_module("jsonrpclib")

    def ask(address: Any) -> None:
        with json_rpc(address) as proxy:
            assert proxy.pow(2, 10) == 1024
            with pytest.raises(jsonrpclib.ProtocolError, match="Server error"):
                proxy.divide(1, 0)

    async with serving(server, ending) as address:
        await run_sync(ask, address)
        await run_sync(ask, address)


@bounded
async def test_jsonrpclib_answers_from_its_own_pool():
    count = 4
    meeting = threading.Barrier(count, timeout=CLIENT_LIMIT)
    server = json_server("PooledJSONRPCServer")
    server.register_function(meeting.wait, "meet")

    def ask(number: int) -> int:
        with json_rpc(server.server_address) as proxy:
            return proxy.meet()

    async with serving(server):
        assert sorted(await side_by_side(count, ask)) == [0, 1, 2, 3]


@bounded
async def test_cancelling_ends_the_clients_of_a_librarys_own_pool():
    """Its `server_close()` joins the pool, whose threads wait for clients."""
    server = json_server("PooledJSONRPCServer")

    def ask(address: Any) -> None:
        with json_rpc(address) as proxy:
            assert proxy.pow(2, 2) == 4

    async with contextlib.AsyncExitStack() as stack:
        async with serving(server) as address:
            mute = await stack.enter_async_context(clients(address, 3))
            await run_sync(ask, address)
        for sock in mute:
            assert receive_until_closed(sock) == b""


# -- python-osc: verify_request(), for datagrams; connections with binary frames -----------


def osc_dispatcher() -> Any:
    module = pytest.importorskip("pythonosc.dispatcher")

    class Telling(module.Dispatcher):
        def call_handlers_for_packet(self, data: bytes, client_address: Any) -> Any:
            self.packets.append(data)
            return super().call_handlers_for_packet(data, client_address)

    dispatcher = Telling()
    dispatcher.packets = []
    dispatcher.map("/add", lambda address, *numbers: ("/sum", sum(numbers)))
    return dispatcher


@each_ending
@pytest.mark.parametrize("name", ["ThreadingOSCUDPServer", "BlockingOSCUDPServer"])
@bounded
async def test_python_osc_datagrams(name, ending):
    dispatcher = osc_dispatcher()
    server_class = getattr(importlib.import_module("pythonosc.osc_server"), name)
    udp_client = importlib.import_module("pythonosc.udp_client")

    def ask(address: Any) -> None:
        with (
            udp_client.SimpleUDPClient(*address) as client,
            socket.socket(type=socket.SOCK_DGRAM) as other,
        ):
            other.sendto(b"no OSC message", address)  # Which verify_request() denies.
            client.send_message("/add", [1, 2, 3])
            message = next(iter(client.get_messages(CLIENT_LIMIT)))
            assert (message.address, message.params) == ("/sum", [6])

    async with serving(server_class(LOCAL, dispatcher), ending) as address:
        await run_sync(ask, address)
        await run_sync(ask, address)
    assert len(dispatcher.packets) == 2
    assert all(packet.startswith(b"/add") for packet in dispatcher.packets)


@each_ending
@bounded
async def test_python_osc_connections(ending):
    dispatcher = osc_dispatcher()
    module = importlib.import_module("pythonosc.osc_tcp_server")
    tcp_client = importlib.import_module("pythonosc.tcp_client")
    server = module.ThreadingOSCTCPServer(LOCAL, dispatcher)

    def ask(address: Any) -> None:
        with tcp_client.SimpleTCPClient(*address) as client:
            for numbers in ([1, 2], [3, 4]):
                client.send_message("/add", numbers)
                message = next(iter(client.get_messages(CLIENT_LIMIT)))
                assert (message.address, message.params) == ("/sum", [sum(numbers)])

    async with serving(server, ending) as address:
        await run_sync(ask, address)
        await run_sync(ask, address)


# -- dnslib: both protocols with one handler, attributes set on the object -----------------


@each_ending
@pytest.mark.parametrize("tcp", [False, True], ids=["udp", "tcp"])
@bounded
async def test_dnslib(tcp, ending):
    dnslib = pytest.importorskip("dnslib")
    module = importlib.import_module("dnslib.server")

    class Resolver(module.BaseResolver):
        def resolve(self, request: Any, handler: Any) -> Any:
            reply = request.reply()
            reply.add_answer(*dnslib.RR.fromZone(f"{request.q.qname} 60 A 192.0.2.7"))
            return reply

    def ask(address: Any) -> None:
        question = dnslib.DNSRecord.question("host.test")
        packet = question.send(*address, tcp=tcp, timeout=CLIENT_LIMIT)
        assert str(dnslib.DNSRecord.parse(packet).a.rdata) == "192.0.2.7"

    server = module.DNSServer(Resolver(), *LOCAL, tcp=tcp).server
    async with contextlib.AsyncExitStack() as stack:
        async with serving(server, ending) as address:
            if tcp:
                (mute,) = await stack.enter_async_context(clients(address))
            await run_sync(ask, address)
            await run_sync(ask, address)
        if tcp:
            assert receive_until_closed(mute) == b""


# -- robotremoteserver: bound late, stopped by a remote procedure --------------------------


@bounded
async def test_robotremoteserver():
    module = pytest.importorskip("robotremoteserver")

    class Library:
        def shout(self, text: str) -> str:
            return text.upper()

    remote = module.RobotRemoteServer(Library(), *LOCAL, serve=False)
    remote.activate()
    server = remote._server

    def ask(address: Any) -> None:
        host, port = address
        with xmlrpc.client.ServerProxy(f"http://{host}:{port}") as proxy:
            assert "shout" in proxy.get_keyword_names()
            result = proxy.run_keyword("shout", ["hello"])
            assert (result["status"], result["return"]) == ("PASS", "HELLO")
            assert proxy.run_keyword("shout", [])["status"] == "FAIL"
            assert proxy.stop_remote_server() is True

    with library_threads():
        async with trio.open_nursery() as nursery:
            address = await nursery.start(trio_socketserver.serve_blocking, server)
            await run_sync(ask, address)
        assert server.fileno() == -1


# -- pymodbus 2: base methods called on the class, a server_close() that joins nothing -----


@each_ending
@bounded
async def test_pymodbus(ending, monkeypatch):
    # Importing it does that, to everybody; here it is undone.
    monkeypatch.setattr(socketserver.ThreadingMixIn, "daemon_threads", True)
    sync = pytest.importorskip("pymodbus.server.sync")
    datastore = importlib.import_module("pymodbus.datastore")
    client_module = importlib.import_module("pymodbus.client.sync")
    registers = datastore.ModbusSequentialDataBlock(0, list(range(100)))
    context = datastore.ModbusServerContext(
        datastore.ModbusSlaveContext(hr=registers, zero_mode=True), single=True
    )

    def ask(address: Any) -> None:
        with contextlib.closing(
            client_module.ModbusTcpClient(*address, timeout=CLIENT_LIMIT)
        ) as client:
            assert client.connect()
            assert client.read_holding_registers(10, 3).registers == [10, 11, 12]
            assert not client.write_register(10, 7).isError()
            assert client.read_holding_registers(10, 1).registers == [7]
            assert not client.write_register(10, 10).isError()

    server = sync.ModbusTcpServer(context, address=LOCAL)
    with library_threads():
        async with contextlib.AsyncExitStack() as stack:
            async with serving(server, ending) as address:
                # Idle connections: this class knows no way to end their threads.
                idle = await stack.enter_async_context(clients(address, 2))
                await run_sync(ask, address)
                await run_sync(ask, address)
                if ending == "shut down":
                    for sock in idle:
                        sock.shutdown(socket.SHUT_WR)
            for sock in idle:
                assert receive_until_closed(sock) == b""


# -- pynetdicom: get_request(), process_request_thread(), service_actions(), shutdown() ----


@each_ending
@pytest.mark.parametrize("name", ["ThreadedAssociationServer", "AssociationServer"])
@bounded
async def test_pynetdicom(name, ending):
    """Requests outlive their handler, in the library's threads; shutdown() works once."""
    pynetdicom = pytest.importorskip("pynetdicom")
    transport = importlib.import_module("pynetdicom.transport")
    verification = "1.2.840.10008.1.1"
    entity = pynetdicom.AE()
    entity.add_supported_context(verification)
    server = entity.make_server(LOCAL, server_class=getattr(transport, name))
    entity._servers.append(server)  # As its start_server() does.

    def ask(address: Any) -> None:
        user = pynetdicom.AE()
        user.add_requested_context(verification)
        association = user.associate(*address[:2])
        assert association.is_established
        assert association.send_c_echo().Status == 0
        association.release()
        association.join(CLIENT_LIMIT)

    with library_threads():
        async with serving(server, ending) as address:
            await run_sync(ask, address)
            await run_sync(ask, address)
    assert entity._servers == []


# -- Django: process_request_thread() and close_request(), with connections per thread -----


class Urls:
    """The URLs of a Django site."""

    urlpatterns: list[Any] = []  # noqa: RUF012


@pytest.fixture(scope="module")
def django_site(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A WSGI application of Django, with a database."""
    django = pytest.importorskip("django")
    settings = importlib.import_module("django.conf").settings
    settings.configure(
        ALLOWED_HOSTS=["127.0.0.1"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(tmp_path_factory.mktemp("django") / "database"),
                "CONN_MAX_AGE": None,  # Until the server closes it in its thread.
            }
        },
        LOGGING_CONFIG=None,
        # It tells the length of an answer, without which no connection is kept.
        MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
        ROOT_URLCONF=Urls,
    )
    django.setup()
    connection = importlib.import_module("django.db").connection
    http = importlib.import_module("django.http")

    def count(request: Any) -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SELECT COUNT(*) FROM sqlite_master")
            return http.HttpResponse(str(cursor.fetchone()[0]))

    Urls.urlpatterns.append(importlib.import_module("django.urls").path("count", count))
    return importlib.import_module("django.core.wsgi").get_wsgi_application()


@each_ending
@bounded
async def test_django(ending, django_site):
    module = importlib.import_module("django.core.servers.basehttp")
    server = module.ThreadedWSGIServer(LOCAL, module.WSGIRequestHandler)
    server.set_app(django_site)

    def ask(address: Any) -> None:
        with http_connection(address) as connection:
            assert fetch(connection, "/count")[:2] == (200, b"0")
            # It keeps connections because it sees that the server is a ThreadingMixIn.
            assert connection.sock is not None
            assert fetch(connection, "/count")[:2] == (200, b"0")
            assert fetch(connection, "/missing")[0] == 404

    with contextlib.ExitStack() as stack:
        async with serving(server, ending) as address:
            await run_sync(ask, address)
            await side_by_side(4, lambda _: ask(address))
            idle = stack.enter_context(http_connection(address))
            await run_sync(fetch, idle, "/count")
        assert idle.sock.recv(1) == b""
