"""The examples are whole programs: each is run as one, with clients of another make."""

from __future__ import annotations

import ast
import configparser
import contextlib
import functools
import hashlib
import http.client
import importlib.util
import logging
import logging.handlers
import os
import random
import re
import shlex
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import urllib.request
import xmlrpc.client
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing
import trustme
from helpers import (
    REAL_LIMIT,
    close_with_reset,
    connect,
    is_refused,
    killed_in_the_end,
    line_of,
    printed_address,
    receive_until_closed,
    running,
)

from trio_socketserver._cli_arguments import make_parser, parse_address
from trio_socketserver.testing import check_cancellation, memory_connection

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def example(name: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with running(str(FOLDER / name), *arguments) as process:
        yield process


def end(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    """Stop an example by a signal; return what it has printed since it was last read."""
    process.send_signal(number)
    return end_of(process)


def end_of(process: subprocess.Popen[str]) -> str:
    """Wait until an example that has got its signal ends; return what it still prints."""
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    return out


class Client:
    """A plain client of lines, which speaks TLS if it is given a context."""

    def __init__(self, address: Any, context: ssl.SSLContext | None = None) -> None:
        self.sock = connect(address)
        if context is not None:
            self.sock = context.wrap_socket(self.sock, server_hostname="127.0.0.1")
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.close()
        self.sock.close()

    def say(self, line: bytes) -> None:
        self.sock.sendall(line + b"\n")

    def hear(self) -> bytes:
        """Return the next line without its end; nothing at the end of the stream."""
        return self.file.readline().rstrip(b"\r\n")

    def hear_until(self, line: bytes) -> list[bytes]:
        """Return the lines that come before *line*, which must come."""
        before = []
        while (heard := self.hear()) != line:
            assert heard, before
            before.append(heard)
        return before


# -- all of them ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_explains_itself(path):
    source = path.read_text()
    tree = ast.parse(source)
    assert source.count("\n") < 80
    assert f"\n    python examples/{path.name} " in (ast.get_docstring(tree) or "")
    last = tree.body[-1]
    assert isinstance(last, ast.If)
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    assert f'example("{path.name}"' in Path(__file__).read_text()


def load(name: str) -> Any:
    """Import an example, which is not started by that."""
    spec = importlib.util.spec_from_file_location(
        f"example_{Path(name).stem}", FOLDER / name
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tried_commands(name: str, address: tuple[str, int]) -> Iterator[str]:
    """Yield the Python commands in an example's docstring, sent to *address*."""
    docstring = ast.get_docstring(ast.parse((FOLDER / name).read_text())) or ""
    found = re.findall(r'^ *(python -c ".*?")$', docstring, re.MULTILINE | re.DOTALL)
    for command in found:
        assert re.search(r"\b(9999|5514)\b", command)
        yield re.sub(r"\b(9999|5514)\b", str(address[1]), command).replace(
            "python", shlex.quote(sys.executable), 1
        )


def answers(name: str, address: tuple[str, int]) -> list[str]:
    """Run the Python commands in an example's docstring; return what they print."""
    return [
        subprocess.run(
            command,
            shell=True,
            capture_output=True,
            check=True,
            text=True,
            timeout=REAL_LIMIT,
        ).stdout
        for command in tried_commands(name, address)
    ]


async def say_hello(client):
    await client.send_all(b"hello\n")
    assert await client.rfile.readline() == b"hello\n"


async def enter_and_speak(client):
    assert await client.rfile.readexactly(11) == b"your name? "
    await client.send_all(b"ann\n")
    assert await client.rfile.readline() == b"* ann is here\r\n"
    await client.send_all(b"hello\n")
    assert await client.rfile.readline() == b"ann: hello\r\n"


async def send_frames(client):
    await client.send_all(frame(b"hello"))
    assert await client.rfile.readexactly(36) == frame(hashlib.sha256(b"hello").digest())
    await client.send_all(LENGTH.pack(1024 * 1024 + 1))
    assert b"error: " in await client.rfile.read()


async def be_counted(client):
    assert (await client.rfile.read()).startswith(b"you are number ")


@pytest.mark.parametrize(
    ("name", "handler", "client"),
    [
        ("echo_server.py", "Echo", say_hello),
        ("chat_room.py", "Visitor", enter_and_speak),
        ("framed_protocol.py", "Digests", send_frames),
        ("access_control.py", "count", be_counted),
        ("syslog_collector.py", "Message", b"<11>disk full"),
    ],
)
async def test_handlers_can_be_cancelled_anywhere(name, handler, client, autojump_clock):
    module = load(name)
    address = ("127.0.0.1", 0)
    servers = {
        "chat_room.py": lambda: module.ChatRoom(address),
        "access_control.py": lambda: module.GuardedServer(address, ["192.0.2.0/24"]),
        "syslog_collector.py": lambda: module.Collector(address),
    }
    server = servers[name]() if name in servers else None
    assert await check_cancellation(getattr(module, handler), client, server=server)
    assert not getattr(server, "visitors", None)


# -- echo_server.py ------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_echo_server(number):
    with (
        example("echo_server.py", "0") as process,
        Client(address := printed_address(line_of(process))) as first,
        Client(address) as second,
    ):
        for client in (first, second, first):
            client.say(b"hello")
            assert client.hear() == b"hello"
        assert answers("echo_server.py", address) == ["b'hello\\n'\n"]
        process.send_signal(number)
        assert first.hear() == second.hear() == b""
        assert end_of(process) == "3 clients served\n"


# -- chat_room.py --------------------------------------------------------------------------


@contextlib.contextmanager
def visitor(address: Any, name: bytes) -> Iterator[Client]:
    """Enter the chat room, and wait until everybody has been told."""
    with Client(address) as client:
        assert client.file.read(len(b"your name? ")) == b"your name? "
        client.say(name)
        assert client.hear() == b"* %b is here" % name
        yield client


@pytest.mark.parametrize("number", SIGNALS)
def test_chat_room_says_goodbye_to_everybody(number):
    with (
        example("chat_room.py", "0") as process,
        visitor(address := printed_address(line_of(process)), b"ann") as ann,
        visitor(address, b"bob") as bob,
    ):
        bob.say(b"hello")
        assert ann.hear_until(b"bob: hello") == [b"* bob is here"]
        assert bob.hear_until(b"bob: hello") == []
        with visitor(address, b"cid"):
            assert ann.hear() == b"* cid is here"
        assert ann.hear() == b"* cid has left"
        process.send_signal(number)
        for client in (ann, bob):
            client.hear_until(b"* the room closes, goodbye")
            assert client.hear() == b""
        assert end_of(process) == ""


def test_chat_room_drops_who_does_not_read():
    block = b"x" * 900
    with (
        example("chat_room.py", "0") as process,
        visitor(address := printed_address(line_of(process)), b"slow") as slow,
        visitor(address, b"fast") as fast,
    ):
        # What the kernel holds for the slow one is bounded: some megabytes at most. Half an
        # outbox at a time, as there and back for each line takes long on a busy machine.
        for _ in range(1000):
            fast.sock.sendall((block + b"\n") * 50)
            heard = {fast.hear() for _ in range(50)}
            if b"* slow has left" in heard:
                break
            assert heard == {b"fast: " + block}
        else:
            pytest.fail("the slow reader has not been dropped")
        *whole, _last = slow.file.read().split(b"\r\n")
        assert set(whole) == {b"* fast is here", b"fast: " + block}
        assert end(process) == ""


def test_chat_room_outlives_a_line_without_end():
    with (
        example("chat_room.py", "0") as process,
        visitor(address := printed_address(line_of(process)), b"ann") as ann,
        visitor(address, b"bob") as bob,
    ):
        bob.sock.sendall(bytes(2000))
        ann.hear_until(b"* bob has left")
        ann.say(b"still here")
        assert ann.hear() == b"ann: still here"
        assert end(process) == ""


# -- syslog_collector.py -------------------------------------------------------------------


def test_syslog_collector_and_the_logging_module():
    with example("syslog_collector.py", "0") as process:
        address = printed_address(line_of(process))
        handler = logging.handlers.SysLogHandler(address)
        logger = logging.getLogger("test_examples")
        logger.addHandler(handler)
        logger.warning("disk %d %% full", 99)
        assert line_of(process) == "127.0.0.1 warning: disk 99 % full\n"
        logger.critical("grüße\nof two lines")
        assert line_of(process) == "127.0.0.1 crit: grüße\\nof two lines\n"
        logger.removeHandler(handler)
        handler.close()
        assert answers("syslog_collector.py", address) == [""]
        assert line_of(process) == "127.0.0.1 err: disk full\n"
        assert end(process) == "1 warning, 1 crit, 1 err\n"


@pytest.mark.skipif(shutil.which("logger") is None, reason="there is no logger program")
def test_syslog_collector_and_the_logger_program():
    with example("syslog_collector.py", "0") as process:
        host, port = printed_address(line_of(process))
        command = ["logger", "--udp", "--server", host, "--port", str(port)]
        subprocess.run(
            [*command, "-p", "mail.err", "no route"], check=True, timeout=REAL_LIMIT
        )
        assert re.fullmatch(r"127\.0\.0\.1 err: .*no route\n", line_of(process))
        assert end(process, signal.SIGINT) == "1 err\n"


def test_syslog_collector_takes_anything():
    shown = {
        b"": "notice: ",
        b"no priority": "notice: no priority",
        b"<191>largest": "debug: largest",
        b"<192>too large": "notice: <192>too large",
        b"<99999999999>far too large": "notice: <99999999999>far too large",
        b"<3\xb2>not a digit": "notice: <3\\xb2>not a digit",
        b"<0>\xff\xfe": "emerg: \\xff\\xfe",
        b"<13>a\n127.0.0.1 emerg: faked": "notice: a\\n127.0.0.1 emerg: faked",
        b"<13>\x1b[31mred\x07": "notice: \\x1b[31mred\\x07",
        b"<13>" + b"x" * 60_000: "notice: " + "x" * 60_000,
    }
    with (
        example("syslog_collector.py", "0") as process,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        client.connect(printed_address(line_of(process)))
        for datagram, line in shown.items():
            client.send(datagram)
            assert line_of(process) == f"127.0.0.1 {line}\n"
        assert end(process) == "8 notice, 1 debug, 1 emerg\n"


# -- several_servers.py --------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_several_servers_share_the_votes(number, tmp_path):
    path = str(tmp_path / "votes")

    def result() -> bytes:
        with connect(path) as client:
            return receive_until_closed(client)

    with example("several_servers.py", "0", path) as process:
        printed = dict(line_of(process).split(" ", 1) for _ in range(3))
        addresses = {name: ast.literal_eval(text) for name, text in printed.items()}
        assert addresses["NurseryUnixStreamServer"] == path
        assert result() == b""
        with Client(addresses["NurseryTCPServer"]) as by_line:
            for choice in (b"tea", b"coffee", b"tea"):
                by_line.say(choice)
                assert by_line.hear() == b"thank you"
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as by_datagram:
                by_datagram.settimeout(REAL_LIMIT)
                by_datagram.sendto(b"tea\n", addresses["NurseryUDPServer"])
                assert by_datagram.recv(100) == b"thank you\n"
            assert result() == b"3 tea\n1 coffee\n"
            process.send_signal(number)
            assert by_line.hear() == b""
        assert end_of(process) == ""
    assert not list(tmp_path.iterdir())


async def test_several_servers_do_not_wait_for_who_does_not_read(
    mock_clock, monkeypatch, tmp_path
):
    module = load("several_servers.py")
    printed, started, ended = [], trio.Event(), trio.Event()

    def show(line: str, flush: bool = False) -> None:
        printed.append(line.split(" ", 1)[1])
        if len(printed) == 3:
            started.set()

    async def run_it() -> None:
        await module.main("0", str(tmp_path / "votes"))
        ended.set()

    class WithSmallBuffers(module.NurseryTCPServer):
        def server_activate(self) -> None:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                self.socket.setsockopt(socket.SOL_SOCKET, option, 4096)
            super().server_activate()

    monkeypatch.setattr(module, "NurseryTCPServer", WithSmallBuffers)
    monkeypatch.setattr(module, "print", show, raising=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_it)
        await started.wait()
        address = ast.literal_eval(printed[0])
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(address)
            deaf.setblocking(False)
            sent = -1
            while sent:  # Until the server has stopped reading.
                sent = 0
                with contextlib.suppress(BlockingIOError):
                    while True:
                        sent += deaf.send(b"tea\n" * 1000)
                await trio.testing.wait_all_tasks_blocked(0.01)
            signal.raise_signal(signal.SIGTERM)
            while not is_refused(address):
                await trio.lowlevel.checkpoint()
            mock_clock.jump(4.9)
            await trio.testing.wait_all_tasks_blocked()
            assert not ended.is_set()
            mock_clock.jump(0.2)
            await trio.testing.wait_all_tasks_blocked()
            assert ended.is_set()


def test_several_servers_keep_so_many_choices(monkeypatch):
    module = load("several_servers.py")
    monkeypatch.setattr(module, "MAX_CHOICES", 2)
    for choice in (b"tea\n", b"x" * 1000, b"coffee\n", b"tea\n"):
        module.vote(choice)
    assert module.votes == {"tea": 2, "x" * module.MAX_LENGTH: 1}


# -- framed_protocol.py --------------------------------------------------------------------

LENGTH = struct.Struct("!I")


def frame(data: bytes) -> bytes:
    return LENGTH.pack(len(data)) + data


@pytest.fixture
def digests() -> Iterator[tuple[subprocess.Popen[str], Client]]:
    with (
        example("framed_protocol.py", "0") as process,
        Client(printed_address(line_of(process))) as client,
    ):
        yield process, client


def receive_frame(client: Client) -> bytes:
    (size,) = LENGTH.unpack(client.file.read(LENGTH.size))
    return client.file.read(size)


def test_framed_protocol(digests):
    process, client = digests
    for data in (b"hello", b"", bytes(1024 * 1024)):
        client.sock.sendall(frame(data))
        assert receive_frame(client) == hashlib.sha256(data).digest()
    two = frame(b"one") + frame(b"two")
    for n in range(len(two)):
        client.sock.send(two[n : n + 1])
    assert receive_frame(client) == hashlib.sha256(b"one").digest()
    assert receive_frame(client) == hashlib.sha256(b"two").digest()
    (printed,) = answers("framed_protocol.py", client.sock.getpeername())
    assert ast.literal_eval(printed) == frame(hashlib.sha256(b"hello").digest())
    assert end(process) == ""


@pytest.mark.parametrize("number", SIGNALS)
def test_framed_protocol_sends_idle_clients_away(digests, number):
    process, client = digests
    with Client(client.sock.getpeername()) as busy:
        client.sock.sendall(frame(b"one"))
        receive_frame(client)
        busy.sock.sendall(LENGTH.pack(5) + b"he")
        # The busy one has been taken note of when another client has been served since.
        with Client(client.sock.getpeername()) as third:
            third.sock.sendall(frame(b"three"))
            receive_frame(third)
        process.send_signal(number)
        assert client.file.read() == b""
        busy.sock.sendall(b"llo")
        assert receive_frame(busy) == hashlib.sha256(b"hello").digest()
        assert busy.file.read() == b""
        assert end_of(process) == ""


def test_framed_protocol_refuses_a_large_frame(digests):
    process, client = digests
    client.sock.sendall(LENGTH.pack(1024 * 1024 + 1))
    assert receive_frame(client) == b"error: a frame may have 1048576 bytes, not 1048577"
    assert client.file.read() == b""
    assert end(process) == ""


async def test_framed_protocol_does_not_wait_for_ever(autojump_clock):
    async with memory_connection(load("framed_protocol.py").Digests) as client:
        await client.send_all(LENGTH.pack(5) + b"hell")
        expected = frame(b"error: a frame must be complete within 10 s")
        assert await client.rfile.read() == expected
    assert trio.current_time() == 10


@pytest.mark.parametrize("data", [b"\0\0", LENGTH.pack(5), LENGTH.pack(5) + b"hell"])
def test_framed_protocol_and_a_stream_that_ends_inside_a_frame(digests, data):
    process, client = digests
    client.sock.sendall(data)
    client.sock.shutdown(socket.SHUT_WR)
    assert client.file.read() == b""
    assert end(process) == ""  # The peer's fault: no traceback.


# -- access_control.py ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("networks", "reply"), [((), b""), (("127.0.0.0/8", "::1/128"), b"you are number 2\n")]
)
def test_access_control(networks, reply):
    with example("access_control.py", "0", *networks) as process:
        address = printed_address(line_of(process))
        with connect(address) as client:
            assert receive_until_closed(client) == b"you are number 1\n"
        with socket.create_connection(address, 5, ("127.0.0.2", 0)) as client:
            assert receive_until_closed(client) == reply
        n = 2 if reply else 1
        assert end(process) == f"{n} clients served, {2 - n} rejected\n"


# -- static_files.py -----------------------------------------------------------------------


def fetch(connection: Client, path: str) -> tuple[bytes, bytes]:
    """Ask for a file on a connection that is kept; return the status line and the file."""
    connection.sock.sendall(b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path.encode())
    status, size = connection.hear(), 0
    while header := connection.hear():
        name, _, value = header.partition(b": ")
        if name == b"Content-Length":
            size = int(value)
    return status, connection.file.read(size)


@pytest.mark.parametrize("number", SIGNALS)
def test_static_files(number, tmp_path):
    data = bytes(range(256)) * 4096
    (tmp_path / "file").write_bytes(data)
    with example("static_files.py", "0", str(tmp_path)) as process:
        address = printed_address(line_of(process))
        with Client(address) as first, Client(address) as second:
            for client in (first, second, first):
                assert fetch(client, "/file") == (b"HTTP/1.1 200 OK", data)
                assert line_of(process) == '"GET /file HTTP/1.1" 200 -\n'
        assert answers("static_files.py", address) == ["200\n"]
        assert line_of(process) == '"GET / HTTP/1.1" 200 -\n'
        assert end(process, number) == "3 connections served\n"


def test_static_files_prints_no_control_characters(tmp_path):
    with example("static_files.py", "0", str(tmp_path)) as process:
        with Client(printed_address(line_of(process))) as client:
            client.say(b"GET /\x1b[2J\xe9 HTTP/1.0\r\n\r")
            assert client.hear() == b"HTTP/1.1 404 File not found"
        assert line_of(process) == "code 404, message File not found\n"
        assert line_of(process) == '"GET /\\x1b[2J\\xe9 HTTP/1.0" 404 -\n'
        assert end(process) == "1 connections served\n"


def test_static_files_lets_a_download_end(tmp_path):
    data = bytes(8 * 1024 * 1024)  # More than the kernel holds.
    (tmp_path / "file").write_bytes(data)
    with example("static_files.py", "0", str(tmp_path)) as process:
        with Client(printed_address(line_of(process))) as client:
            client.sock.sendall(b"GET /file HTTP/1.0\r\n\r\n")
            assert client.hear() == b"HTTP/1.1 200 OK"
            process.send_signal(signal.SIGTERM)
            while client.hear():
                pass
            assert client.file.read() == data
        assert end_of(process).endswith("\n1 connections served\n")


async def test_static_files_does_not_wait_for_the_silent(mock_clock, tmp_path, capsys):
    module = load("static_files.py")
    (tmp_path / "file").write_bytes(b"hello")
    files = functools.partial(module.Files, directory=str(tmp_path))
    async with module.FileServer(("127.0.0.1", 0), files) as server:
        with Client(server.server_address) as silent:
            await server.handle_request()
            status, data = await trio.to_thread.run_sync(fetch, silent, "/file")
            assert (status, data) == (b"HTTP/1.1 200 OK", b"hello")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.server_close)
                await trio.testing.wait_all_tasks_blocked()
                mock_clock.jump(4.9)
                await trio.testing.wait_all_tasks_blocked()
                assert server.statistics().active == 1
                mock_clock.jump(0.2)
                assert await trio.to_thread.run_sync(silent.hear) == b""
    assert server.statistics().cancelled == 1
    assert capsys.readouterr().out == '"GET /file HTTP/1.1" 200 -\n'


# -- xmlrpc_service.py ---------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_xmlrpc_service(number):
    with example("xmlrpc_service.py", "0") as process:
        address = printed_address(line_of(process))
        assert answers("xmlrpc_service.py", address) == ["tomorrow: sun\n"]
        with Client(address) as silent:
            silent.sock.sendall(b"POST / HTTP/1.0\r\n")
            process.send_signal(number)
            assert receive_until_closed(silent.sock) == b""
        assert end_of(process) == "1 calls answered\n"


def test_xmlrpc_service_stopped_by_a_client():
    with example("xmlrpc_service.py", "0") as process:
        host, port = printed_address(line_of(process))
        with xmlrpc.client.ServerProxy(f"http://{host}:{port}", allow_none=True) as proxy:
            assert proxy.forecast("today") == "today: sun"
            with pytest.raises(xmlrpc.client.Fault, match="is not supported"):
                proxy.unknown()
            assert proxy.stop() is None
        assert end_of(process) == "1 calls answered\n"


async def test_xmlrpc_service_does_not_wait_for_the_silent(monkeypatch):
    module = load("xmlrpc_service.py")
    printed, started = [], trio.Event()

    def show(line: str, flush: bool = False) -> None:
        printed.append(line)
        started.set()

    monkeypatch.setattr(module, "print", show, raising=False)
    monkeypatch.setattr(module.Call, "timeout", 0.01)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(module.main, 0)
        await started.wait()
        with Client(printed_address(printed[0])) as silent:
            assert await trio.to_thread.run_sync(silent.hear) == b""
        signal.raise_signal(signal.SIGTERM)


async def test_xmlrpc_service_changes_its_mind(autojump_clock):
    forecast = load("xmlrpc_service.py").Forecast()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(forecast.change)
        assert forecast.answer("now") == "now: sun"
        await trio.sleep(61)
        assert forecast.answer("later") == "later: rain"
        nursery.cancel_scope.cancel()
    assert forecast.asked == 2


# -- blocking_handler.py -------------------------------------------------------------------


def test_blocking_handler():
    with (
        example("blocking_handler.py", "0") as process,
        Client(address := printed_address(line_of(process))) as first,
        Client(address) as second,
    ):
        for count, client in enumerate((first, second, first), 1):
            client.say(b"line %d" % count)
            assert client.hear() == b"published"
            assert line_of(process) == f"{count}: 'line {count}'\n"
        assert answers("blocking_handler.py", address) == ["b'published\\n'\n"]
        assert line_of(process) == "4: 'hello'\n"
        process.send_signal(signal.SIGTERM)
        second.say(b"the last one")
        assert second.hear() == b"published"
        second.sock.shutdown(socket.SHUT_WR)
        assert second.hear() == b""
        assert first.hear() == b""  # After three seconds of silence.
        assert end_of(process) == "5: 'the last one'\n"


def test_blocking_handler_keeps_no_long_line():
    with (
        example("blocking_handler.py", "0") as process,
        Client(printed_address(line_of(process))) as client,
    ):
        client.sock.sendall(b"x" * 1001)
        assert client.hear() == b"published"
        assert line_of(process) == f"1: {'x' * 1000!r}\n"
        client.sock.shutdown(socket.SHUT_WR)
        assert client.hear() == b"published"
        assert end(process) == "2: 'x'\n"


def test_blocking_handler_waits_for_the_channel():
    """Many clients at once: each line is published, and none twice."""
    with example("blocking_handler.py", "0") as process:
        address = printed_address(line_of(process))

        def client(n: int) -> None:
            with Client(address) as one:
                for k in range(25):
                    one.say(b"%d %d" % (n, k))
                    assert one.hear() == b"published"

        threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        lines = [line_of(process).split(": ", 1) for _ in range(200)]
        for thread in threads:
            thread.join()
        assert [int(number) for number, _ in lines] == list(range(1, 201))
        assert {line for _, line in lines} == {
            f"'{n} {k}'\n" for n in range(8) for k in range(25)
        }
        assert end(process, signal.SIGINT) == ""


# -- whole_server.py -----------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_whole_server(number):
    with example("whole_server.py", "0") as process:
        address = printed_address(line_of(process))
        assert answers("whole_server.py", address) == ["b'you are number 1\\n'\n"]
        with Client(address) as silent:
            host, port = address
            with urllib.request.urlopen(
                f"http://{host}:{port}/", timeout=REAL_LIMIT
            ) as response:
                assert response.read() == b"you are number 2\n"
            process.send_signal(number)
            assert silent.hear() == b""
        assert end_of(process) == "2 requests served\n"


def test_whole_server_ends_by_itself():
    with example("whole_server.py", "0", "0.1") as process:
        assert end_of(process).endswith("0 requests served\n")


async def test_whole_server_reports(autojump_clock, capsys):
    whole_server = load("whole_server.py")
    with trio.move_on_after(25):
        await whole_server.report(SimpleNamespace(counted=7))
    assert capsys.readouterr().out == "7 requests so far\n" * 2


# -- tls_service.py ------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_tls_service(number, tmp_path):
    authority = trustme.CA()
    files = cert, key, client_ca = [str(tmp_path / name) for name in ("cert", "key", "ca")]

    def renew() -> None:
        issued = authority.issue_cert("127.0.0.1")
        issued.cert_chain_pems[0].write_to_path(cert)
        issued.private_key_pem.write_to_path(key)

    def shake_hands(address: Any, identity: str | None) -> ssl.SSLSocket:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(context)
        if identity:
            authority.issue_cert(identity).configure_cert(context)
        return context.wrap_socket(connect(address), server_hostname="127.0.0.1")

    renew()
    authority.cert_pem.write_to_path(client_ca)
    with example("tls_service.py", *files, "0") as process:
        address = printed_address(line_of(process))
        with shake_hands(address, "ann@example.org") as ann:
            ann.sendall(b"hello\n")
            assert ann.recv(100) == b"ann@example.org says hello\n"
            certificates = [ann.getpeercert(binary_form=True)]
            renew()
            process.send_signal(signal.SIGHUP)
            assert line_of(process) == "certificate loaded\n"
            with shake_hands(address, "bob@example.org") as bob:
                bob.sendall(b"hi\n")
                assert bob.recv(100) == b"bob@example.org says hi\n"
                certificates.append(bob.getpeercert(binary_form=True))
            Path(cert).write_text("nonsense")
            process.send_signal(signal.SIGHUP)
            assert line_of(process).startswith("certificate not loaded: [SSL")
            with shake_hands(address, None) as nobody, pytest.raises(ssl.SSLError):
                nobody.recv(100)
            assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in line_of(process)
            ann.sendall(b"still here\n")
            assert ann.recv(100) == b"ann@example.org says still here\n"
            process.send_signal(number)
            assert ann.recv(100) == b""
        assert end_of(process) == "2 clients served\n"
    assert certificates[0] != certificates[1]


# -- cpu_bound.py --------------------------------------------------------------------------

FOR_HOURS = b"99999999999"


@pytest.mark.parametrize("number", SIGNALS)
def test_cpu_bound(number):
    with (
        example("cpu_bound.py", "0", "1000") as process,
        Client(address := printed_address(line_of(process))) as busy,
    ):
        busy.say(FOR_HOURS)
        for question, reply in {
            b"1000": b"168",
            b"0": b"0",
            b"x": b"a number, please",
        }.items():
            with Client(address) as client:
                client.say(question)
                assert client.hear() == reply
                assert client.hear() == b""
        assert [line_of(process) for _ in range(3)] == [f"answer {n}\n" for n in (1, 2, 3)]
        assert answers("cpu_bound.py", address) == ["b'9592\\n'\n"]
        assert line_of(process) == "answer 4\n"
        process.send_signal(number)
        while not is_refused(address):  # It has taken the first signal.
            pass
        process.send_signal(number)
        assert busy.hear() == b"stopped"
        *probes, last = end_of(process).splitlines()
        assert probes == [f"answer {n}" for n in range(5, 5 + len(probes))]
        assert last == f"{4 + len(probes)} answered, 0 took too long"


def test_cpu_bound_stops_what_takes_too_long():
    with example("cpu_bound.py", "0", "1") as process:
        with Client(printed_address(line_of(process))) as client:
            client.say(FOR_HOURS)
            assert client.hear() == b"stopped"
            assert client.hear() == b""
        assert end(process) == "0 answered, 1 took too long\n"


# -- preforked_echo.py ---------------------------------------------------------------------


def pid_answering(client: Client) -> int:
    client.say(b"hello")
    pid, _, line = client.hear().partition(b": ")
    assert line == b"hello"
    return int(pid)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process from running."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("number", SIGNALS)
def test_preforked_echo(number):
    with (
        example("preforked_echo.py", "0", "2") as process,
        Client(address := printed_address(line_of(process))) as first,
    ):
        one = pid_answering(first)
        # While one of them cannot, the other one must.
        with stopped(one), Client(address) as second:
            other = pid_answering(second)
        assert len({one, other, process.pid}) == 3
        (printed,) = answers("preforked_echo.py", address)
        assert re.fullmatch(
            rf"b'({one}|{other}): hello\\n'\n", printed.replace("\\\\", "\\")
        )
        with Client(address) as third:
            assert pid_answering(third) in (one, other)
            assert pid_answering(first) == one
            process.send_signal(number)
            assert first.hear() == third.hear() == b""
        assert end_of(process) == "4 clients served\n"


def test_preforked_echo_replaces_a_worker():
    with example("preforked_echo.py", "0", "1") as process:
        address = printed_address(line_of(process))
        with Client(address) as client:
            pid = pid_answering(client)
            os.kill(pid, signal.SIGKILL)
            assert receive_until_closed(client.sock) == b""
        with Client(address) as client:
            assert pid_answering(client) != pid
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert (process.returncode, out) == (0, "2 clients served\n")
        assert err == (
            f"worker process {pid} has been ended by SIGKILL; another is started in 0.1 s\n"
        )


# -- key_value_store.py --------------------------------------------------------------------


def client_context(
    authority: trustme.CA, certificate: trustme.LeafCert | None = None
) -> ssl.SSLContext:
    """Return the context of a client that has a certificate, or none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    if certificate is not None:
        certificate.configure_cert(context)
    return context


def written(certificate: trustme.LeafCert, folder: Path) -> list[str]:
    """Write a certificate, and its key, into files; return their names."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(certificate.cert_chain_pems[0].bytes())
    key.write_bytes(certificate.private_key_pem.bytes())
    return [str(cert), str(key)]


@contextlib.contextmanager
def store(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Client, Client]]:
    """Run the store, and yield it with a client over TLS and one of this machine."""
    authority = trustme.CA()
    files = written(authority.issue_cert("127.0.0.1"), folder)
    path = str(folder / "store")
    with example("key_value_store.py", *files, "0", path) as process:
        tls, local = [
            ast.literal_eval(line_of(process).removeprefix("listening on "))
            for _ in range(2)
        ]
        assert local == path
        with Client(tls, client_context(authority)) as remote, Client(local) as near:
            yield process, remote, near


def asked(client: Client, line: bytes) -> bytes:
    client.say(line)
    return client.hear()


@pytest.mark.parametrize("number", SIGNALS)
def test_key_value_store_is_one_over_tls_and_a_unix_socket(number, tmp_path):
    with store(tmp_path) as (process, remote, near):
        assert asked(remote, b"SET a one two") == b"OK"
        assert asked(near, b"GET a") == b"OK one two"
        assert asked(near, b"SET b  3 ") == asked(near, b"SET a 1") == b"OK"
        assert asked(remote, b"GET b") == b"OK 3"
        assert asked(remote, b"KEYS") == b"OK a b"
        assert asked(remote, b"DEL a") == b"OK"
        assert asked(near, b"GET a") == asked(near, b"DEL a") == b"ERROR no such key"
        assert asked(near, b"KEYS") == b"OK b"
        process.send_signal(number)
        assert remote.hear() == near.hear() == b""
        assert end_of(process) == ""
    assert not (tmp_path / "store").exists()


def test_key_value_store_answers_errors_by_a_line(tmp_path):
    usage = b"ERROR write GET key, SET key value, DEL key or KEYS"
    with store(tmp_path) as (process, remote, near):
        for client in (remote, near):
            for line in (b"", b" ", b"GET", b"get a", b"SET a", b"DEL a b", b"KEYS a"):
                assert asked(client, line) == usage
            assert asked(client, b"SET \xff \x00") == b"OK"
            assert asked(client, b"GET \xff") == b"OK \x00"
            client.sock.sendall(b"SET b " + bytes(994))
            assert client.hear() == b"ERROR the line is too long"
            assert client.hear() == b""
        assert end(process) == ""


def test_key_value_store_does_not_do_what_was_cut_off(tmp_path):
    with store(tmp_path) as (process, remote, near):
        near.sock.sendall(b"SET a 1\nSET a 10")
        near.sock.shutdown(socket.SHUT_WR)
        assert near.hear() == b"OK"
        assert near.hear() == b""
        assert asked(remote, b"GET a") == b"OK 1"
        assert end(process) == ""


def test_key_value_store_has_a_limit(monkeypatch):
    module = load("key_value_store.py")
    monkeypatch.setattr(module, "MAX_KEYS", 2)
    assert [module.answer(b"SET %d x" % key) for key in (1, 2, 1, 3)] == [
        b"OK",
        b"OK",
        b"OK",
        b"ERROR there are too many keys",
    ]
    assert module.answer(b"DEL 1") == module.answer(b"SET 3 x") == b"OK"


def has_openssl() -> bool:
    """Tell whether there is the program that the examples make certificates with."""
    if shutil.which("openssl") is None:
        return False
    version = subprocess.run(
        ["openssl", "version"],
        capture_output=True,
        check=True,
        text=True,
        timeout=REAL_LIMIT,
    ).stdout
    return version.startswith("OpenSSL ") and version[8:10] not in ("0.", "1.")


needs_openssl = pytest.mark.skipif(not has_openssl(), reason="no OpenSSL 3 program here")


def make_certificates(name: str, folder: Path) -> None:
    """Run the commands in an example's docstring that make certificates."""
    docstring = ast.get_docstring(ast.parse((FOLDER / name).read_text())) or ""
    commands = re.findall(
        r"^    ((?:openssl req|for ).*(?:(?<=\\)\n.*)*)$", docstring, re.MULTILINE
    )
    assert commands
    for command in commands:
        subprocess.run(
            ["sh", "-ec", command],
            cwd=folder,
            check=True,
            capture_output=True,
            timeout=REAL_LIMIT,
        )


@contextlib.contextmanager
def s_client(address: tuple[str, int], *options: str) -> Iterator[Any]:
    """Run ``openssl s_client``; yield what it sends and what it shows."""
    with (
        subprocess.Popen(
            [
                "openssl",
                "s_client",
                "-quiet",
                "-connect",
                "{}:{}".format(*address),
                *options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        ) as process,
        killed_in_the_end(process),
    ):
        yield process.stdin, process.stdout


@needs_openssl
def test_key_value_store_with_the_commands_it_names(tmp_path):
    make_certificates("key_value_store.py", tmp_path)
    files = [str(tmp_path / name) for name in ("CERT", "KEY")]
    with example("key_value_store.py", *files, "0", str(tmp_path / "s")) as process:
        address = ast.literal_eval(line_of(process).removeprefix("listening on "))
        with s_client(address) as (questions, answers):
            for question, reply in {b"SET a 1\n": b"OK\n", b"GET a\n": b"OK 1\n"}.items():
                questions.write(question)
                assert answers.readline() == reply
        line_of(process)
        assert end(process) == ""


# -- proxy.py ------------------------------------------------------------------------------


class Proxied:
    """A proxy, with the listening socket of the server behind it."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self.stack = stack
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.listener.settimeout(REAL_LIMIT)
        port = self.listener.getsockname()[1]
        self.process = stack.enter_context(example("proxy.py", "127.0.0.1", str(port), "0"))
        self.address = printed_address(line_of(self.process))

    def connection(self) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a new connection: the client's, and the server's."""
        client = self.stack.enter_context(connect(self.address))
        server = self.stack.enter_context(self.listener.accept()[0])
        server.settimeout(REAL_LIMIT)
        return client, server

    def end(self) -> tuple[str, dict[str, int]]:
        """Stop the proxy, or wait until it has; return its statistics."""
        statistics, counted = end(self.process).splitlines()[-2:]
        return statistics, ast.literal_eval(counted)


@pytest.fixture
def proxied() -> Iterator[Proxied]:
    with contextlib.ExitStack() as stack:
        yield Proxied(stack)


def say_all(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("clients_first", [True, False])
def test_proxy_passes_on_the_end_of_one_direction(proxied, clients_first):
    ends = proxied.connection()
    first, second = ends if clients_first else reversed(ends)
    say_all(first, b"that is all")
    assert receive_until_closed(second) == b"that is all"
    # The other direction goes on.
    for data in (b"more", b"and more"):
        second.sendall(data)
        assert first.recv(100) == data
    say_all(second, b"end")
    assert receive_until_closed(first) == b"end"
    statistics, counted = proxied.end()
    assert "(accepted=1, active=0, completed=1," in statistics
    up, down = (11, 15) if clients_first else (15, 11)
    assert counted == {"bytes up": up, "bytes down": down}


def test_proxy_with_much_both_ways_and_readers_that_let_it_wait(proxied):
    """More than the kernel holds. One direction is not read before the other has ended."""
    client, server = proxied.connection()
    up, down = (random.Random(n).randbytes(16 * 1024 * 1024) for n in range(2))
    senders = [
        threading.Thread(target=say_all, args=(client, up)),
        threading.Thread(target=say_all, args=(server, down)),
    ]
    for sender in senders:
        sender.start()
    assert hashlib.sha256(receive_until_closed(server)).digest() == (
        hashlib.sha256(up).digest()
    )
    assert hashlib.sha256(receive_until_closed(client)).digest() == (
        hashlib.sha256(down).digest()
    )
    for sender in senders:
        sender.join()
    assert proxied.end()[1] == {"bytes up": len(up), "bytes down": len(down)}


@pytest.mark.parametrize("clients", [True, False])
def test_proxy_passes_on_a_reset(proxied, clients):
    ends = proxied.connection()
    first, second = ends if clients else reversed(ends)
    second.sendall(b"hello")
    assert first.recv(100) == b"hello"
    close_with_reset(first)
    with pytest.raises(ConnectionResetError):
        second.recv(100)
    # The next one is served as if nothing had been.
    client, server = proxied.connection()
    say_all(client, b"hello")
    assert receive_until_closed(server) == b"hello"
    server.close()
    assert receive_until_closed(client) == b""
    statistics, _ = proxied.end()
    assert "(accepted=2, active=0, completed=1, failed=1," in statistics
    assert "peer_errors=1," in statistics


def test_proxy_whose_server_is_not_there(proxied):
    proxied.listener.close()
    for _ in range(2):
        with connect(proxied.address) as client:
            assert receive_until_closed(client) == b""
        assert line_of(proxied.process).startswith("no upstream: OSError('all attempts ")
    statistics, counted = proxied.end()
    assert "(accepted=2, active=0, completed=2," in statistics
    assert counted == {"unanswered": 2}


@pytest.mark.parametrize("number", SIGNALS)
def test_proxy_lets_a_transfer_end(proxied, number):
    client, server = proxied.connection()
    client.sendall(b"some")
    assert server.recv(100) == b"some"
    proxied.process.send_signal(number)
    while not is_refused(proxied.address):  # It has taken the signal.
        pass
    proxied.listener.close()  # And whoever else has come cannot go on.
    say_all(client, b" and all")
    assert receive_until_closed(server) == b" and all"
    say_all(server, b"thank you")
    assert receive_until_closed(client) == b"thank you"
    counted = ast.literal_eval(end_of(proxied.process).splitlines()[-1])
    assert (counted["bytes up"], counted["bytes down"]) == (12, 9)


def test_proxy_cuts_a_transfer_at_the_second_signal(proxied):
    client, server = proxied.connection()
    client.sendall(b"some")
    assert server.recv(100) == b"some"
    proxied.process.send_signal(signal.SIGTERM)
    while not is_refused(proxied.address):
        pass
    proxied.process.send_signal(signal.SIGTERM)
    for sock in (client, server):
        with pytest.raises(ConnectionResetError):
            sock.recv(100)
    statistics, counted = end_of(proxied.process).splitlines()[-2:]
    assert re.search(r"active=0, .*cancelled=[1-9]", statistics)
    assert ast.literal_eval(counted)["bytes up"] == 4


async def test_proxy_ends_what_is_idle(mock_clock):
    module = load("proxy.py")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = module.ProxyServer(("127.0.0.1", 0), module.Tunnel)
        server.upstream, server.counted = listener.getsockname(), module.Counter()
        async with server, trio.open_nursery() as nursery:
            with connect(server.server_address) as client:
                nursery.start_soon(server.handle_request)
                behind, _ = await trio.to_thread.run_sync(listener.accept)
                with behind:
                    await trio.testing.wait_all_tasks_blocked()
                    mock_clock.jump(module.IDLE_TIMEOUT - 1)
                    client.sendall(b"still here")
                    assert await trio.to_thread.run_sync(behind.recv, 100) == b"still here"
                    await trio.testing.wait_all_tasks_blocked()
                    mock_clock.jump(module.IDLE_TIMEOUT - 1)
                    await trio.testing.wait_all_tasks_blocked()
                    assert server.statistics().active == 1
                    mock_clock.jump(2)
                    for sock in (client, behind):
                        with pytest.raises(ConnectionResetError):
                            await trio.to_thread.run_sync(sock.recv, 100)
    assert server.statistics().peer_errors == 1


# -- client_certificates.py ----------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_client_certificates(number, tmp_path):
    authority, another = trustme.CA(), trustme.CA()
    files = written(authority.issue_cert("127.0.0.1"), tmp_path)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))

    def context_of(name: str, issuer: trustme.CA = authority) -> ssl.SSLContext:
        certificate = issuer.issue_cert(f"{name}@example.org", common_name=name)
        return client_context(authority, certificate)

    def refusal(context: ssl.SSLContext) -> str:
        with pytest.raises(ssl.SSLError), Client(address, context) as client:
            client.hear()
        return line_of(process)

    with example(
        "client_certificates.py", str(tmp_path / "ca.pem"), *files, "0", "ann", "cid"
    ) as process:
        address = printed_address(line_of(process))
        with Client(address, context_of("ann")) as ann:
            assert ann.hear() == b"welcome, ann"
            assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in refusal(client_context(authority))
            assert "CERTIFICATE_VERIFY_FAILED" in refusal(context_of("ann", another))
            with Client(address, context_of("bob")) as bob:
                assert bob.hear() == b"you may not come in, bob"
                assert bob.hear() == b""
            with Client(address, context_of("cid")) as cid:
                assert cid.hear() == b"welcome, cid"
                assert asked(cid, b"hello") == b"cid: hello"
            assert asked(ann, b"still here") == b"ann: still here"
            process.send_signal(number)
            assert ann.hear() == b""
        assert end_of(process) == "3 known, 1 turned away\n"


@needs_openssl
def test_client_certificates_with_the_commands_it_names(tmp_path):
    make_certificates("client_certificates.py", tmp_path)
    files = [str(tmp_path / f"{n}.pem") for n in ("ca", "localhost")]
    files.append(str(tmp_path / "localhost.key"))
    with example("client_certificates.py", *files, "0", "ann") as process:
        address = printed_address(line_of(process))
        for name, greeting in {
            "ann": b"welcome, ann\n",
            "bob": b"you may not come in, bob\n",
        }.items():
            paths = [str(tmp_path / f"{name}.{kind}") for kind in ("pem", "key")]
            options = ["-cert", paths[0], "-key", paths[1]]
            with s_client(address, *options) as (_, shown):
                assert shown.readline() == greeting
        with s_client(address) as (_, shown):
            assert shown.readline() == b""
        assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in line_of(process)
        assert end(process) == "2 known, 1 turned away\n"


# -- prometheus_metrics.py -----------------------------------------------------------------


def scraped(address: tuple[str, int]) -> dict[str, float]:
    """Ask for the metrics; return the echo server's, by name and perhaps outcome."""
    parser = pytest.importorskip("prometheus_client.parser")
    connection = http.client.HTTPConnection(*address, timeout=REAL_LIMIT)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    seen = [
        (sample.labels.get("outcome", sample.name.removeprefix("echo_")), sample.value)
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("echo_")
    ]
    assert len(dict(seen)) == len(seen)
    return dict(seen)


NOTHING_YET = dict.fromkeys(
    ("accepted_total", "active", "completed", "failed", "rejected", "cancelled"), 0
)


@pytest.mark.parametrize("number", SIGNALS)
def test_prometheus_metrics(number):
    pytest.importorskip("prometheus_client")
    with example("prometheus_metrics.py", "0", "0") as process:
        metrics, echo = [printed_address(line_of(process)) for _ in range(2)]
        assert scraped(metrics) == NOTHING_YET
        with Client(echo) as first, Client(echo) as second, Client(metrics) as mute:
            assert asked(first, b"hello") == asked(second, b"hello") == b"hello"
            assert scraped(metrics) == NOTHING_YET | {"accepted_total": 2, "active": 2}
            first.sock.shutdown(socket.SHUT_WR)
            assert first.hear() == b""
            second.file.close()
            close_with_reset(second.sock)
            while (seen := scraped(metrics))["active"]:
                pass  # The server has not come to it yet.
            ended = {"accepted_total": 2, "completed": 1, "failed": 1}
            assert seen == NOTHING_YET | ended
            process.send_signal(number)
            assert mute.hear() == b""
        assert end_of(process) == ""


async def test_prometheus_metrics_last_as_long_as_the_server(mock_clock, monkeypatch):
    pytest.importorskip("prometheus_client")
    module = load("prometheus_metrics.py")
    printed, started = [], trio.Event()

    def show(line: str, flush: bool = False) -> None:
        printed.append(printed_address(line))
        if len(printed) == 2:
            started.set()

    monkeypatch.setattr(module, "print", show, raising=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(module.main, 0, 0)
        await started.wait()
        metrics, echo = printed
        with Client(echo) as client:
            await trio.testing.wait_all_tasks_blocked()
            signal.raise_signal(signal.SIGTERM)
            while not is_refused(echo):
                await trio.lowlevel.checkpoint()
            # The client may still say something: it is given a second for it.
            seen = await trio.to_thread.run_sync(scraped, metrics)
            assert seen["active"] == seen["accepted_total"] - seen["completed"] >= 1
            mock_clock.jump(2)
            assert await trio.to_thread.run_sync(client.hear) == b""


# -- systemd/ ------------------------------------------------------------------------------

UNITS = FOLDER / "systemd"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(delimiters="=", interpolation=None)
    parser.optionxform = str
    parser.read_string((UNITS / name).read_text())
    return parser


def command_of_the_service() -> list[str]:
    """Return what stands behind ``python`` in ``ExecStart``."""
    _python, *command = shlex.split(unit("echo.service")["Service"]["ExecStart"])
    return command


def test_systemd_units_say_what_the_command_takes():
    service = unit("echo.service")["Service"]
    module, *arguments = command_of_the_service()[1:]
    options = make_parser().parse_args(arguments)
    assert module == "trio_socketserver"
    assert options.bind is options.fd is None
    assert options.graceful_timeout < float(service["TimeoutStopSec"])
    assert (service["KillSignal"], service["KillMode"]) == ("SIGTERM", "mixed")
    assert unit("echo.service")["Unit"]["Requires"] == "echo.socket"
    address = unit("echo.socket")["Socket"]["ListenStream"]
    assert parse_address(address) == (socket.AF_INET, ("127.0.0.1", 7777))
    # trio has a pair of Unix sockets; a server of an inherited socket makes one of its
    # family for a moment.
    families = service["RestrictAddressFamilies"].split()
    assert {"AF_UNIX", "AF_INET"} <= set(families)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_understands_the_units(tmp_path):
    python = shlex.split(unit("echo.service")["Service"]["ExecStart"])[0]
    for path in UNITS.iterdir():
        # It looks whether the program is there.
        text = path.read_text().replace(python, sys.executable)
        (tmp_path / path.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        timeout=REAL_LIMIT,
    )
    assert "echo." not in done.stdout + done.stderr
    assert done.returncode == 0


@contextlib.contextmanager
def activated(listener: socket.socket) -> Iterator[subprocess.Popen[str]]:
    """Start the service as systemd does: *listener* is its descriptor 3."""
    start = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    number = listener.fileno()
    command = ["-c", start, str(number), "-W", "error", *command_of_the_service()]
    with running(*command, pass_fds=[number]) as process:
        yield process


def test_systemd_s_socket_outlives_the_service():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        for _ in range(2):
            # Each time the client is there first, and waits in the socket.
            with Client(listener.getsockname()) as client, activated(listener) as process:
                assert printed_address(line_of(process)) == listener.getsockname()
                assert line_of(process).startswith("try: ")
                assert asked(client, b"hello") == b"hello"
                process.send_signal(signal.SIGTERM)
                assert client.hear() == b""
                assert end_of(process) == "accepted 1, completed 1\n"


@pytest.mark.skipif(
    shutil.which("systemd-socket-activate") is None, reason="no systemd here"
)
def test_systemd_s_program_that_stands_in_for_it(tmp_path):
    path = str(tmp_path / "socket")
    (tried,) = re.findall(
        r"^# +(systemd-socket-activate .*)$",
        (UNITS / "echo.service").read_text(),
        re.MULTILINE,
    )
    python = f"{shlex.quote(sys.executable)} -W error"
    command = tried.replace("-l 127.0.0.1:7777", f"-l {shlex.quote(path)} -E PYTHONPATH")
    command = shlex.split(command.replace("python", python, 1))
    assert command[-2:] == ["--graceful-timeout", "20"]
    start = "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])"
    with running("-c", start, *command) as process:
        assert "Listening on" in process.stderr.readline()
        with Client(path) as client:
            assert asked(client, b"hello") == b"hello"
            assert line_of(process) == f"serving EchoStream on unix:{path}\n"
            process.send_signal(signal.SIGTERM)
            assert client.hear() == b""
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert out.endswith("accepted 1, completed 1\n")
