"""`run()` is a whole program: signals drain and cancel it, nothing is left when it ends."""

from __future__ import annotations

import math
import signal
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import (
    assert_sums_up,
    connect,
    is_refused,
    line_of,
    pose,
    printed_address,
    receive_until_closed,
    reply_now,
    run_on_virtual_clock,
    running,
)

from trio_socketserver import (
    BaseRequestHandler,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    run,
)

LOCAL = ("127.0.0.1", 0)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio, "run", run_on_virtual_clock)


@pytest.fixture(autouse=True)
def signals_are_given_back() -> Iterator[None]:
    """Let a signal that `run` does not take be a failure, not the end of the tests."""
    before = {
        number: signal.signal(number, signal.default_int_handler) for number in SIGNALS
    }
    yield
    after = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(after.values()) == {signal.default_int_handler}


def run_with_client(server: Any, question: bytes = b"hello\n") -> bytes:
    """Run *server* with a client that has sent *question* before; return its reply."""
    with pose(server, question) as client:
        run(server)
        return reply_now(client)


# -- signals -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_drains(number):
    async def handler(request, client_address, server):
        signal.raise_signal(number)
        await server.draining.wait()
        await trio.sleep(10)
        assert is_refused(server.server_address)
        await request.send_all(await request.receive_some())

    server = NurseryTCPServer(LOCAL, handler)
    assert run_with_client(server, b"still served") == b"still served"
    assert server.statistics().completed == 1


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_the_second_signal_cancels(first, second):
    class Handler(StreamRequestHandler):
        async def handle(self):
            signal.raise_signal(first)
            await self.server.draining.wait()
            began = trio.current_time()
            signal.raise_signal(second)
            try:
                await trio.sleep_forever()
            finally:
                self.took = trio.current_time() - began

        async def finish(self):
            await self.wfile.write(b"cancelled after %d s" % self.took)

    server = NurseryTCPServer(LOCAL, Handler)
    assert run_with_client(server) == b"cancelled after 0 s"
    assert server.statistics().cancelled == 1
    assert_sums_up(server)


def test_further_signals_change_nothing():
    class Handler(StreamRequestHandler):
        async def handle(self):
            signal.raise_signal(signal.SIGINT)
            await self.server.draining.wait()
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()

        async def finish(self):
            for number in SIGNALS:
                signal.raise_signal(number)
                await trio.sleep(1)
            await self.wfile.write(b"goodbye")

    # Those that nobody takes, trio would deliver to the default handlers at the end.
    assert run_with_client(NurseryTCPServer(LOCAL, Handler)) == b"goodbye"


def test_a_signal_stops_an_idle_server_at_once():
    server = NurseryTCPServer(LOCAL, _never_called)
    run(server, started=lambda: signal.raise_signal(signal.SIGTERM))
    assert server.statistics().accepted == 0
    assert server.fileno() == -1


def test_a_signal_before_the_server_is_entered_stops_it_when_it_is():
    class Server(NurseryTCPServer):
        async def __aenter__(self):
            signal.raise_signal(signal.SIGINT)
            await trio.testing.wait_all_tasks_blocked()
            return await super().__aenter__()

    run(Server(LOCAL, _never_called))


async def _never_called(request, client_address, server):
    raise AssertionError


# -- how long draining may take ------------------------------------------------------------


class Lasting(BaseRequestHandler):
    """A request that never ends by itself, and says how long it was left alone."""

    async def handle(self):
        signal.raise_signal(signal.SIGTERM)
        await self.server.draining.wait()
        began = trio.current_time()
        try:
            await trio.sleep_forever()
        finally:
            self.server.patience = trio.current_time() - began


@pytest.mark.parametrize(
    ("configured", "patience"), [(math.inf, 30), (7.5, 7.5), (3600, 3600)]
)
@pytest.mark.parametrize("where", ["class", "instance"])
def test_draining_is_bounded(where, configured, patience):
    class Server(NurseryTCPServer):
        pass

    if where == "class":
        Server.graceful_timeout = configured
    server = Server(LOCAL, Lasting)
    if where == "instance":
        server.graceful_timeout = configured
    run_with_client(server)
    assert server.patience == pytest.approx(patience)
    assert server.statistics().cancelled == 1


def test_block_on_close_is_heeded():
    server = NurseryTCPServer(LOCAL, Lasting)
    server.block_on_close = False
    run_with_client(server)
    assert server.patience == 0


# -- other ends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer, NurseryUnixStreamServer]
)
def test_shutdown_by_a_handler_ends_it(server_class, tmp_path):
    class Handler(BaseRequestHandler):
        async def handle(self):
            await self.server.shutdown()

    unix = server_class is NurseryUnixStreamServer
    server = server_class(str(tmp_path / "s") if unix else LOCAL, Handler)
    run_with_client(server)
    assert server.statistics().completed == 1
    assert server.fileno() == -1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error_class", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["service_actions", "started", "__aenter__"])
def test_an_error_of_the_server_is_raised_bare(where, error_class):
    error = error_class("the very object")

    def fail():
        raise error

    class Server(NurseryTCPServer):
        if where == "service_actions":

            async def service_actions(self):
                fail()

        if where == "__aenter__":

            async def __aenter__(self):
                fail()

    server = Server(LOCAL, _never_called)
    with pytest.raises(error_class) as raised:
        run(server, started=fail if where == "started" else None)
    assert raised.value is error
    assert error.__context__ is None
    assert server.fileno() == -1


@pytest.mark.parametrize("error_class", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_in_a_handler_is_raised_bare(error_class):
    error = error_class(3)

    async def handler(request, client_address, server):
        raise error

    server = NurseryTCPServer(LOCAL, handler)
    with pytest.raises(error_class) as raised:
        run_with_client(server)
    assert raised.value is error
    assert server.fileno() == -1


def test_an_error_of_closing_is_raised_bare():
    class Server(NurseryTCPServer):
        async def server_close(self):
            await super().server_close()
            if errors:
                raise errors.pop()

    error = ZeroDivisionError()
    errors = [error]
    server = Server(LOCAL, _never_called)
    with pytest.raises(ZeroDivisionError) as raised:
        run(server, started=lambda: signal.raise_signal(signal.SIGTERM))
    assert raised.value is error
    assert server.fileno() == -1


def test_two_errors_come_as_a_group():
    class Server(NurseryTCPServer):
        async def service_actions(self):
            raise ZeroDivisionError

    class Handler(BaseRequestHandler):
        async def handle(self):
            try:
                await trio.sleep_forever()
            finally:
                raise SystemExit(3)

    server = Server(LOCAL, Handler)
    with pytest.raises(BaseExceptionGroup) as raised:
        run_with_client(server)
    matched, rest = raised.value.split((ZeroDivisionError, SystemExit))
    assert matched is not None
    assert rest is None


def test_started_is_called_once_when_a_client_would_be_served():
    calls = []

    async def handler(request, client_address, server):
        calls.append("handled")
        await server.shutdown()

    server = NurseryTCPServer(LOCAL, handler)
    clients = []

    def started():
        calls.append("started")
        clients.append(connect(server.server_address))

    run(server, started=started)
    clients[0].close()
    assert calls == ["started", "handled"]


def test_in_another_thread_it_refuses_and_closes():
    server = NurseryTCPServer(LOCAL, _never_called)
    raised = []

    def call():
        try:
            run(server)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(raised) == 1
    assert server.fileno() == -1


async def test_inside_of_trio_it_refuses_and_closes():
    server = NurseryTCPServer(LOCAL, _never_called)
    with pytest.raises(RuntimeError):
        run(server)
    assert server.fileno() == -1


@pytest.mark.parametrize(
    "server",
    [NurseryTCPServer, lambda: NurseryTCPServer(LOCAL, _never_called)],
    ids=["a class", "a function"],
)
def test_what_is_no_server_is_refused(server):
    with pytest.raises(TypeError, match="takes a server of trio_socketserver"):
        run(server)


def test_a_server_of_the_standard_library_is_told_where_to_go():
    with socketserver.TCPServer(LOCAL, socketserver.BaseRequestHandler) as server:
        with pytest.raises(TypeError, match=r"trio\.run\(serve_blocking, server\)"):
            run(server)
        assert server.fileno() != -1


# -- as a script ---------------------------------------------------------------------------

SCRIPT = """
from trio_socketserver import NurseryTCPServer, StreamRequestHandler, run

class Handler(StreamRequestHandler):
    async def handle(self):
        async for line in self.rfile:
            await self.wfile.write(line)
            if line == b"busy\\n":
                await self.wfile.write(await self.rfile.readline())

    async def finish(self):
        await self.wfile.write(b"goodbye\\n")

server = NurseryTCPServer(("127.0.0.1", 0), Handler)
run(server, started=lambda: print("%s:%d" % server.server_address, flush=True))
print("closed" if server.fileno() == -1 else "open")
"""


@pytest.fixture
def script(tmp_path: Path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return str(path)


def ask_line(client, line: bytes) -> bytes:
    client.sendall(line)
    return client.recv(len(line), 0x100)  # MSG_WAITALL


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_ended_by_one_signal(script, number):
    with (
        running(script) as process,
        connect(address := printed_address(line_of(process))) as idle,
        connect(address) as busy,
    ):
        assert ask_line(idle, b"hello\n") == b"hello\n"
        assert ask_line(busy, b"busy\n") == b"busy\n"
        process.send_signal(number)
        assert receive_until_closed(idle) == b"goodbye\n"
        busy.sendall(b"the rest\n")
        assert receive_until_closed(busy) == b"the rest\ngoodbye\n"
        assert process.communicate() == ("closed\n", "")
        assert process.returncode == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_script_ended_by_two_signals(script, number):
    with (
        running(script) as process,
        connect(address := printed_address(line_of(process))) as idle,
        connect(address) as busy,
    ):
        assert ask_line(idle, b"hello\n") == b"hello\n"
        assert ask_line(busy, b"busy\n") == b"busy\n"
        process.send_signal(number)
        assert receive_until_closed(idle) == b"goodbye\n"
        process.send_signal(signal.SIGINT)
        assert receive_until_closed(busy) == b"goodbye\n"
        assert process.communicate() == ("closed\n", "")
        assert process.returncode == 0


def test_a_script_that_is_interrupted_as_soon_as_it_says_that_it_serves(script):
    with running(script) as process:
        line_of(process)
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("closed\n", "")
        assert process.returncode == 0
