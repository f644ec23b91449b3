"""Holds `serve_blocking` to who handles a request, in which thread, through which hooks.

The numbers are those of the findings about servers in the wild.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import http.server
import queue
import signal
import socket
import socketserver
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import (
    Serial,
    ask_stream,
    client_of,
    each_dispatcher,
    each_in_process,
    echo,
    forks_with_threads,
    happens,
    in_thread,
    make,
    park,
    parked_client,
    receive_exactly,
    served,
    wait_for,
)
from helpers import (
    REAL_LIMIT,
    ask,
    bind_address,
    bounded,
    class_name,
    receive,
    receive_to_end,
)

pytestmark = forks_with_threads

OLD_SERVERS = [
    getattr(socketserver, f"{mixin}{kind}Server")
    for mixin in ("", "Threading", "Forking")
    for kind in ("TCP", "UDP", "UnixStream", "UnixDatagram")
    if hasattr(socketserver, f"{mixin}{kind}Server")  # Forking and Unix: 3.12.
]


def answer(request: Any, client_address: Any, server: Any) -> None:
    """Handle a connection or a datagram by sending it back."""
    if isinstance(request, tuple):
        data, replies = request
        replies.sendto(data, client_address)
    else:
        echo(request, client_address, server)


@pytest.mark.parametrize("server_class", OLD_SERVERS, ids=class_name)
@bounded
async def test_every_old_server_answers(server_class: Any, tmp_path: Path) -> None:
    server = server_class(bind_address(server_class, tmp_path), answer)
    async with served(server) as serving:
        assert serving.address == server.server_address
        for question in (b"one", b"two"):
            assert await ask(server, question, tmp_path) == question


# -- 1: process_request_thread, or process_request -----------------------------------------


class Threading(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """So that what is built on it overrides something of somebody else's."""


@bounded
async def test_1_process_request_thread_of_the_class_has_the_request() -> None:
    seen = queue.SimpleQueue[Any]()

    class Server(Threading):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            seen.put((request.getpeername(), client_address, threading.get_ident()))
            super().process_request_thread(request, client_address)
            seen.put((request.fileno(), threading.get_ident()))

    server = make(echo, Server)
    async with served(server):
        assert await ask_stream(server, b"hello") == b"hello"
    peer, address, ident = seen.get_nowait()
    assert peer == address
    assert ident != threading.main_thread().ident
    assert seen.get_nowait() == (-1, ident)


@bounded
async def test_1_process_request_thread_on_the_instance_has_the_request() -> None:
    server = make(echo, Threading)

    def says(word: bytes) -> Any:
        def process_request_thread(request: Any, client_address: Any) -> None:
            request.sendall(word)
            server.shutdown_request(request)

        return process_request_thread

    server.process_request_thread = says(b"first")
    async with served(server, changes=["process_request_thread"]):
        assert await ask_stream(server) == b"first"
        server.process_request_thread = says(b"second")
        assert await ask_stream(server) == b"second"
        del server.process_request_thread
        assert await ask_stream(server, b"third") == b"third"


@bounded
async def test_1_process_request_thread_may_leave_the_request_open() -> None:
    handed_on = queue.SimpleQueue[socket.socket]()

    class Server(Threading):
        def process_request_thread(self, request: Any, client_address: Any) -> None:
            handed_on.put(request)
            request.sendall(b"later")

    server = make(echo, Server)
    async with served(server), client_of(server) as client:
        assert await receive_exactly(client, 5) == b"later"
        with handed_on.get_nowait() as request:
            for _ in range(3):  # By then the first one's thread has ended.
                async with client_of(server) as other:
                    assert await receive_exactly(other, 5) == b"later"
                    handed_on.get_nowait().close()
            request.sendall(b"still here")
            assert await receive_exactly(client, 10) == b"still here"


@bounded
async def test_1_a_permit_is_taken_in_process_request_and_given_back_in_the_thread() -> (
    None
):
    class Server(Threading):
        permits = threading.Semaphore(1)

        def process_request(self, request: Any, client_address: Any) -> None:
            assert self.permits.acquire(timeout=REAL_LIMIT)
            super().process_request(request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request_thread(request, client_address)
            finally:
                self.permits.release()

    server = make(echo, Server)
    async with served(server):
        for question in (b"one", b"two", b"three"):
            assert await ask_stream(server, question) == question
    assert server.permits.acquire(blocking=False)


@bounded
async def test_1_process_request_that_extends_sees_every_request() -> None:
    seen = []

    class Server(Threading):
        def process_request(self, request: Any, client_address: Any) -> None:
            seen.append(client_address)
            super().process_request(request, client_address)

    server = make(park, Server)
    async with served(server), parked_client(server) as one, parked_client(server) as two:
        assert seen == [one.getsockname(), two.getsockname()]


@bounded
async def test_1_process_request_with_a_pool_of_its_own_has_the_request() -> None:
    names = []

    class Server(Threading):
        def process_request(self, request: Any, client_address: Any) -> None:
            pool.submit(self.process_request_thread, request, client_address)

        def process_request_thread(self, request: Any, client_address: Any) -> None:
            names.append(threading.current_thread().name)
            super().process_request_thread(request, client_address)

    server = make(echo, Server)
    with ThreadPoolExecutor(2, thread_name_prefix="mine") as pool:
        async with served(server):
            for question in (b"one", b"two", b"three"):
                assert await ask_stream(server, question) == question
    assert [name.partition("_")[0] for name in names] == ["mine"] * 3


@bounded
async def test_1_process_request_with_threads_of_its_own_has_the_request() -> None:
    threads = []

    class Server(socketserver.TCPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            thread = threading.Thread(
                target=self.handle_there, args=(request, client_address)
            )
            threads.append(thread)
            thread.start()

        def handle_there(self, request: Any, client_address: Any) -> None:
            self.finish_request(request, client_address)
            self.shutdown_request(request)

    server = make(park, Server)
    async with served(server):
        async with parked_client(server), parked_client(server):
            assert all(thread.is_alive() for thread in threads)
        for thread in threads:
            await in_thread(thread.join, REAL_LIMIT)
    assert len(threads) == 2


@bounded
async def test_1_process_request_on_the_instance_has_the_request() -> None:
    server = make(echo, Threading)

    def process_request(request: Any, client_address: Any) -> None:
        request.sendall(b"mine")
        server.shutdown_request(request)

    server.process_request = process_request
    async with served(server):
        assert await ask_stream(server) == b"mine"


@bounded
async def test_1_process_request_may_name_the_class_it_extends() -> None:
    class Server(Threading):
        def process_request(self, request: Any, client_address: Any) -> None:
            socketserver.ThreadingMixIn.process_request(self, request, client_address)

    server = make(park, Server)
    async with (
        served(server, changes=["_threads"]) as serving,
        parked_client(server),
        parked_client(server) as client,
    ):
        await serving.stop()
        assert await receive(client) == b""


# -- 2: serial -----------------------------------------------------------------------------


@bounded
async def test_2_a_serial_server_ends_one_request_before_it_accepts_the_next() -> None:
    log: list[str] = []
    accepted_early = threading.Event()
    another_waits = threading.Event()

    class Server(socketserver.TCPServer):
        def get_request(self) -> Any:
            if log:
                accepted_early.set()
            log.append("accept")
            return super().get_request()

        def close_request(self, request: Any) -> None:
            super().close_request(request)
            log.append("close")
            accepted_early.clear()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        log.append("begin")
        wait_for(another_waits)
        assert len(log) > 3 or not accepted_early.wait(0.1)
        log.append("end")

    server = make(handler, Server)
    async with served(server), client_of(server) as one, client_of(server) as two:
        another_waits.set()
        assert await receive_to_end(one) == b""
        assert await receive_to_end(two) == b""
    assert log == ["accept", "begin", "end", "close"] * 2


# -- 3: off the event loop -----------------------------------------------------------------

HOOKS = ("get_request", "verify_request", "process_request", "service_actions")


@pytest.mark.parametrize("hook", HOOKS)
@each_dispatcher
@bounded
async def test_3_a_hook_may_block_while_trio_runs(mixin: type, hook: str) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def blocking(self: Any, *args: Any) -> Any:
        reached.set()
        wait_for(go_on)
        return getattr(super(Server, self), hook)(*args)

    Server = type("Server", (mixin, socketserver.TCPServer), {hook: blocking})  # noqa: N806
    server = make(echo, Server)
    async with served(server), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def release() -> None:
            await happens(reached)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            go_on.set()

        assert await ask_stream(server, b"hello") == b"hello"


@each_in_process
@bounded
async def test_3_all_hooks_of_the_loop_run_in_one_thread(mixin: type) -> None:
    idents: dict[str, set[int]] = {hook: set() for hook in HOOKS}

    def recording(hook: str) -> Any:
        def method(self: Any, *args: Any) -> Any:
            idents[hook].add(threading.get_ident())
            return getattr(super(Server, self), hook)(*args)

        return method

    Server = type(  # noqa: N806
        "Server",
        (mixin, socketserver.TCPServer),
        {hook: recording(hook) for hook in HOOKS},
    )
    server = make(echo, Server)
    async with served(server):
        for _ in range(5):
            assert await ask_stream(server, b"hello") == b"hello"
    assert len(set.union(*idents.values())) == 1
    assert all(idents.values())
    assert threading.get_ident() not in idents["get_request"]


@each_in_process
@bounded
async def test_3_a_handler_may_call_trio(mixin: type) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        ident = trio.from_thread.run_sync(threading.get_ident)
        request.sendall(b"%d" % (ident == threading.main_thread().ident))

    server = make(handler, mixin)
    async with served(server):
        assert await ask_stream(server) == b"1"


# -- 4: RequestHandlerClass ----------------------------------------------------------------


def suffixing(suffix: bytes, request: Any, client_address: Any, server: Any) -> None:
    """Handle a connection: one answer, with *suffix*."""
    request.sendall(request.recv(100) + suffix)


class Application:
    """Its method is a handler."""

    def handle(self, request: Any, client_address: Any, server: Any) -> None:
        suffixing(b"!", request, client_address, server)


class Uninspected:
    """A handler that remembers who looked at it."""

    def __init__(self) -> None:
        object.__setattr__(self, "looked_at", [])

    def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        looked_at = object.__getattribute__(self, "looked_at")
        suffixing(repr(looked_at).encode(), request, client_address, server)

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "looked_at").append(name)
        return object.__getattribute__(self, name)


class Chatty(socketserver.StreamRequestHandler):
    """Answers the client whatever it is asked for, as one library does."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.read())

    def __getattr__(self, name: str) -> Any:
        self.request.sendall(b"no such command: " + name.encode())
        raise AttributeError(name)


HANDLERS = {
    "partial": (lambda: functools.partial(suffixing, b"!"), b"!"),
    "bound method": (lambda: Application().handle, b"!"),
    "closure": (lambda: lambda *args: suffixing(b"!", *args), b"!"),
    "uninspected": (Uninspected, b"[]"),
    "chatty": (lambda: Chatty, b""),
}


@pytest.mark.parametrize(("make_handler", "suffix"), HANDLERS.values(), ids=HANDLERS)
@each_dispatcher
@bounded
async def test_4_whatever_is_called_as_a_handler_is_one(
    mixin: type, make_handler: Any, suffix: bytes
) -> None:
    server = make(make_handler(), mixin)
    async with served(server):
        assert await ask_stream(server, b"hello") == b"hello" + suffix


@each_dispatcher
@bounded
async def test_4_the_handler_may_be_another_while_serving(mixin: type) -> None:
    server = make(functools.partial(suffixing, b"1"), mixin)
    async with served(server, changes=["RequestHandlerClass"]):
        assert await ask_stream(server, b"hello") == b"hello1"
        server.RequestHandlerClass = functools.partial(suffixing, b"2")
        assert await ask_stream(server, b"hello") == b"hello2"


@each_dispatcher
@bounded
async def test_4_finish_request_decides_who_handles(mixin: type) -> None:
    def finish_request(self: Any, request: Any, client_address: Any) -> None:
        suffixing(type(self).__name__.encode(), request, client_address, self)

    server = make(None, mixin, finish_request=finish_request)
    async with served(server):
        assert await ask_stream(server, b"by ") == b"by OldServer"


# -- 5: one thread for a request's life ----------------------------------------------------


@each_in_process
@bounded
async def test_5_a_request_lives_and_is_closed_in_one_thread(mixin: type) -> None:
    lives: dict[Any, list[int]] = {}

    def note(request: Any) -> None:
        lives.setdefault(request, []).append(threading.get_ident())

    def noting(hook: str) -> Any:
        def method(self: Any, request: Any, *args: Any) -> Any:
            note(request)
            return getattr(super(Server, self), hook)(request, *args)

        return method

    class Failing(socketserver.BaseRequestHandler):
        def setup(self) -> None:
            note(self.request)

        def handle(self) -> None:
            park(self.request, self.client_address, self.server)
            note(self.request)
            raise ValueError("to see handle_error, too")

        def finish(self) -> None:
            note(self.request)

    hooks = ("finish_request", "handle_error", "shutdown_request", "close_request")
    Server = type(  # noqa: N806
        "Server", (mixin, socketserver.TCPServer), {hook: noting(hook) for hook in hooks}
    )
    server = make(Failing, Server)
    clients = 1 if mixin is Serial else 3
    async with served(server), contextlib.AsyncExitStack() as stack:
        connected = [
            await stack.enter_async_context(parked_client(server)) for _ in range(clients)
        ]
        for client in connected:
            client.shutdown(socket.SHUT_WR)
            assert await receive_to_end(client) == b""
    assert [len(life) for life in lives.values()] == [7] * clients
    assert all(len(set(life)) == 1 for life in lives.values())
    assert len({life[0] for life in lives.values()}) == clients
    assert threading.get_ident() not in {life[0] for life in lives.values()}


@each_in_process
@bounded
async def test_5_a_database_connection_of_the_thread_is_closed_in_it(mixin: type) -> None:
    errors: list[BaseException] = []
    local = threading.local()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        local.database = sqlite3.connect(":memory:")
        local.database.execute("CREATE TABLE notes (text)")
        while data := request.recv(100):
            local.database.execute("INSERT INTO notes VALUES (?)", [data])
            ((count,),) = local.database.execute("SELECT count(*) FROM notes")
            request.sendall(b"%d" % count)

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def close_request(self, request: Any) -> None:
            try:
                local.database.close()  # Another thread's has no such attribute.
            except Exception as error:
                errors.append(error)
            super().close_request(request)

    server = make(handler, Server)
    async with served(server):
        for _ in range(3):
            assert await ask_stream(server, b"remember") == b"1"
    assert errors == []


@bounded
async def test_5_what_is_kept_in_the_thread_is_there_at_closing() -> None:
    """Threads are used again: unlike in socketserver, what is left there is found again."""
    local = threading.local()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        if not hasattr(local, "database"):
            local.database = sqlite3.connect(":memory:")
        (row,) = local.database.execute("SELECT 42")
        request.sendall(b"%d" % row)

    class Server(Threading):
        def close_request(self, request: Any) -> None:
            local.database.close()
            del local.database
            super().close_request(request)

    server = make(handler, Server)
    async with served(server):
        for _ in range(3):
            assert await ask_stream(server) == b"42"


# -- 16: a limiter of the server's own -----------------------------------------------------


@bounded
async def test_16_fifty_parked_handlers_leave_trio_its_threads() -> None:
    server = make(park, Threading)
    async with served(server) as serving, contextlib.AsyncExitStack() as stack:
        for _ in range(50):
            client = await stack.enter_async_context(parked_client(server))
        limiter = trio.to_thread.current_default_thread_limiter()
        assert limiter.borrowed_tokens == 0
        assert await trio.to_thread.run_sync(lambda: "free") == "free"
        assert await trio.socket.getaddrinfo("localhost", 80)
        await serving.stop()
        assert await receive(client) == b""


@bounded
async def test_16_there_is_no_limit_that_socketserver_does_not_have() -> None:
    """More than the 256 threads that this package's own mix-in allows by default."""
    together = 300
    all_here = threading.Barrier(together)

    def meet(request: Any, client_address: Any, server: Any) -> None:
        all_here.wait(REAL_LIMIT)
        request.sendall(b"met")

    server = make(meet, Threading, request_queue_size=together)
    answers: list[bytes] = []
    async with served(server), trio.open_nursery() as nursery:

        async def client() -> None:
            answers.append(await ask_stream(server))

        for _ in range(together):
            nursery.start_soon(client)
    assert answers == [b"met"] * together


# -- 17: names of threads ------------------------------------------------------------------


@bounded
async def test_17_each_request_has_a_thread_name_of_its_own() -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        name = threading.current_thread().name
        assert "/" not in name
        request.sendall(name.encode().ljust(200))
        request.recv(1)

    server = make(handler, Threading)
    async with served(server):
        # In turn, when a thread may be used again ...
        names = [await ask_stream(server) for _ in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):  # ... and all at once.
                client = await stack.enter_async_context(client_of(server))
                names.append(await receive_exactly(client, 200))
    assert all(names)
    assert len(set(names)) == 8


# -- 18: built in the main thread ----------------------------------------------------------


@each_in_process
@bounded
async def test_18_a_server_is_built_once_and_where_the_user_does(mixin: type) -> None:
    built = []
    handled_by = []

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            # Raises in any thread but the main one.
            signal.signal(signal.SIGUSR1, lambda *_: None)
            super().__init__(*args)
            built.append(threading.current_thread())

    def handler(request: Any, client_address: Any, server: Any) -> None:
        handled_by.append(server)
        request.sendall(b"%d" % (threading.current_thread() is threading.main_thread()))

    before = signal.getsignal(signal.SIGUSR1)
    try:
        server = make(handler, Server)
        async with served(server):
            assert await ask_stream(server) == b"0"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert built == [threading.main_thread()]
    assert len(handled_by) == 1
    assert handled_by[0] is server


# -- 22: what a server is ------------------------------------------------------------------


@each_dispatcher
@bounded
async def test_22_a_server_is_an_instance_of_its_classes_while_served(mixin: type) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        seen = [
            type(server).__name__,
            server.__class__.__qualname__,
            isinstance(server, socketserver.ThreadingMixIn),
            isinstance(server, mixin),
            isinstance(server, socketserver.TCPServer),
            issubclass(type(server), mixin),
        ]
        request.sendall(repr(seen).encode())

    server = make(handler, mixin)
    threading_too = mixin is socketserver.ThreadingMixIn
    async with served(server):
        expected = ["OldServer", "OldServer", threading_too, True, True, True]
        assert (await ask_stream(server)).decode() == repr(expected)


@bounded
async def test_22_a_web_server_keeps_connections_alive() -> None:
    class Pages(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            keeps = isinstance(self.server, socketserver.ThreadingMixIn)
            page = f"{self.path} {self.client_address[1]}".encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Connection", "keep-alive" if keeps else "close")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    def browse(address: Any) -> list[bytes]:
        connection = http.client.HTTPConnection(*address, timeout=REAL_LIMIT)
        with contextlib.closing(connection):
            pages = []
            for path in ("/one", "/two"):
                connection.request("GET", path)
                pages.append(connection.getresponse().read())
        return pages

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    async with served(server):
        one, two = await in_thread(browse, server.server_address)
    assert one.split()[0] == b"/one"
    assert one.split()[1] == two.split()[1]
