"""The command: it serves what it is told, says so, drains, and explains bad arguments.

Where time or a crowd matters it runs in this process, on a virtual clock, with clients that
have connected before it serves; where the process matters, as a real one.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import platform
import re
import runpy
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme
from helpers import (
    REAL_LIMIT,
    close_with_reset,
    connect,
    line_of,
    pose,
    printed_address,
    receive_until_closed,
    reply_now,
    run_on_virtual_clock,
    running,
)

import trio_socketserver
from trio_socketserver import (
    BaseRequestHandler,
    StreamRequestHandler,
    _cli,
    _cli_arguments,
    _cli_output,
    _cli_server,
    run,
)
from trio_socketserver._activation import take_listen_fds

LOCAL = "--bind=127.0.0.1:0"
COMMAND = ("-m", "trio_socketserver")


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


# -- in this process -----------------------------------------------------------------------


@contextlib.contextmanager
def unconfigured_logging() -> Iterator[None]:
    """Have a root logger as a fresh process has it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bad arguments that are taken be a failure, instead of a server without end."""

    def refuse(server: Any, **options: Any) -> None:
        trio.run(server.server_close)
        pytest.fail("it would serve")

    monkeypatch.setattr(_cli, "run", refuse)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


class Command:
    """The command in this process, on a clock that jumps.

    Args:
        monkeypatch: the test's.

    Attributes:
        server: the server of the last call.
        exit_code: what the last call returned.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.server: Any = None
        self.exit_code = -1

    def __call__(
        self, *arguments: str, questions: tuple[bytes, ...] = (b"hello\n",)
    ) -> Any:
        """Run the command with one client per question; return what they were sent."""
        clients: list[socket.socket] = []

        def run_with_clients(server, **options):
            self.server = server
            clients.extend(pose(server, question) for question in questions)
            run(server, **options)

        with unconfigured_logging(), self._monkeypatch.context() as patch:
            patch.setattr(_cli, "run", run_with_clients)
            patch.setattr(trio, "run", run_on_virtual_clock)
            self.exit_code = _cli.main(arguments)
        with contextlib.ExitStack() as stack:
            return [reply_now(stack.enter_context(client)) for client in clients]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    return Command(monkeypatch)


class Last(BaseRequestHandler):
    """Stop the server, as Ctrl-C would, and answer."""

    async def handle(self):
        signal.raise_signal(signal.SIGINT)
        await self.server.draining.wait()
        if isinstance(self.request, tuple):
            data, replies = self.request
            await replies.sendto(data, self.client_address)
        else:
            await self.request.send_all(await self.request.receive_some())


async def last_function(request, client_address, server):
    await Last(request, client_address, server).handle()


class Namespace:
    Last = Last
    partial = functools.partial(last_function)


@pytest.mark.parametrize(
    "name", ["Last", "last_function", "Namespace.Last", "Namespace.partial"]
)
def test_a_handler_is_loaded_served_and_counted(command, capsys, name):
    assert command(LOCAL, f"{__name__}:{name}") == [b"hello\n"]
    assert command.exit_code == 0
    shown, try_it, statistics = capsys.readouterr().out.splitlines()
    host, port = command.server.server_address
    assert shown == f"serving {__name__}:{name} on {host}:{port}"
    assert try_it.startswith("try: ")
    assert statistics == "accepted 1, completed 1"


@pytest.mark.parametrize("options", [["--udp"], ["--dispatch=sequential"], ["--udp", "-v"]])
@pytest.mark.parametrize("transport", ["tcp", "unix"])
def test_every_kind_of_server_serves(command, capsys, tmp_path, transport, options):
    bind = LOCAL if transport == "tcp" else f"--bind=unix:{tmp_path}/s"
    assert command(bind, *options, f"{__name__}:Last") == [b"hello\n"]
    assert capsys.readouterr().out.endswith("\naccepted 1, completed 1\n")
    assert not list(tmp_path.iterdir())


def test_no_requests_are_said_to_be_none(command, capsys, monkeypatch):
    def say_and_stop(line):
        say(line)
        if line.startswith("serving"):
            signal.raise_signal(signal.SIGINT)

    say = _cli.say
    monkeypatch.setattr(_cli, "say", say_and_stop)
    assert command(LOCAL, questions=()) == []
    assert capsys.readouterr().out.endswith("\nno requests\n")


class Crowd(StreamRequestHandler):
    """Note how many are served at once; the last of five stops the server."""

    served = now = peak = 0

    async def handle(self):
        crowd = type(self)
        crowd.now += 1
        crowd.peak = max(crowd.peak, crowd.now)
        await trio.sleep(1)
        crowd.now -= 1
        crowd.served += 1
        if crowd.served == 5:
            await self.server.shutdown()


@pytest.mark.parametrize(
    ("options", "peak"),
    [
        ([], 5),
        (["--dispatch=nursery"], 5),
        (["--dispatch=threading"], 5),
        (["--dispatch=threading", "--max-requests-at-once=3"], 3),
        (["--max-requests-at-once=2"], 2),
        (["--dispatch", "nursery", "--max-requests-at-once", "1"], 1),
        (["--dispatch=sequential"], 1),
        (["--dispatch=sequential", "--max-requests-at-once=3"], 1),
    ],
)
def test_how_many_are_served_at_once(command, capsys, monkeypatch, options, peak):
    for name in ("served", "now", "peak"):
        monkeypatch.setattr(Crowd, name, 0)
    command(LOCAL, *options, f"{__name__}:Crowd", questions=(b"",) * 5)
    assert Crowd.peak == peak
    assert capsys.readouterr().out.endswith("\naccepted 5, completed 5\n")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "ThreadingTCPServer"),
        (["--udp"], "ThreadingUDPServer"),
        (["--bind=unix:"], "ThreadingUnixStreamServer"),
        (["--dispatch=sequential"], "TCPServer"),
        (["--max-requests-at-once=7"], "ThreadingTCPServer"),
        (["--dispatch=forking"], "ForkingTCPServer"),
    ],
)
def test_a_blocking_handler_is_served_in_threads(tmp_path, options, expected):
    options = [f"{o}{tmp_path}/s" if o == "--bind=unix:" else o for o in options]
    handler = "socketserver:BaseRequestHandler"
    parser = _cli_arguments.make_parser()
    server: Any = _cli_server.make_server(parser.parse_args([LOCAL, *options, handler]))
    assert type(server).__name__ == expected
    if "--max-requests-at-once=7" in options:
        assert server.max_threads == 7
    server._close_listener()


def test_what_to_type_for_a_server_of_pages(tmp_path):
    handler = "http.server:SimpleHTTPRequestHandler"
    (tmp_path / "page.html").write_text("hello")
    arguments = ("-m", "trio_socketserver", "--bind=[::]:0", handler)
    with running(*arguments, folder=tmp_path) as process:
        assert line_of(process).startswith(f"serving {handler} on [::]:")
        command = line_of(process).removeprefix("try: ").strip()
        assert command.startswith("curl http://[::1]:")
        shown = subprocess.run(
            ["sh", "-c", f"{command}page.html"], check=True, capture_output=True, text=True
        )
        assert shown.stdout == "hello"
        process.send_signal(signal.SIGINT)
        assert process.wait(REAL_LIMIT) == 0


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("unix:{}/a b", "curl --unix-socket '{}/a b' http://localhost/"),
        ("0.0.0.0:0", "curl http://127.0.0.1:{}/"),
    ],
)
def test_what_to_type_for_pages(tmp_path, where, expected):
    options = [f"--bind={where.format(tmp_path)}", "http.server:SimpleHTTPRequestHandler"]
    server: Any = _cli_server.make_server(_cli_arguments.make_parser().parse_args(options))
    place = tmp_path if "unix" in where else server.server_address[1]
    assert _cli_output.try_it(server) == expected.format(place)
    server._close_listener()


def test_a_datagram_server_keeps_its_limit(command):
    command("--udp", LOCAL, f"{__name__}:Last")
    assert command.server.max_tasks == 1000


class Lasting(BaseRequestHandler):
    """A request that does not end by itself; says how long it was left alone."""

    async def handle(self):
        began = trio.current_time()
        if self.server.request_timeout is None:
            signal.raise_signal(signal.SIGINT)
        else:
            await self.server.shutdown()
        try:
            await trio.sleep_forever()
        finally:
            took = trio.current_time() - began
            with trio.CancelScope(shield=True):
                await self.request.send_all(f"{took:g} s".encode())


@pytest.mark.parametrize(
    ("options", "reply", "statistics"),
    [
        ([], b"30 s", "accepted 1, cancelled 1"),
        (["--graceful-timeout=7.5"], b"7.5 s", "accepted 1, cancelled 1"),
        (["--graceful-timeout=3600"], b"3600 s", "accepted 1, cancelled 1"),
        (["--request-timeout=2"], b"2 s", "accepted 1, failed 1, peer_errors 1"),
        (
            ["--request-timeout=9", "--graceful-timeout=4"],
            b"4 s",
            "accepted 1, cancelled 1",
        ),
    ],
)
def test_timeouts(command, capsys, options, reply, statistics):
    assert command(LOCAL, *options, f"{__name__}:Lasting") == [reply]
    assert capsys.readouterr().out.splitlines()[-1] == statistics


# -- what is logged ------------------------------------------------------------------------


class Troubled(StreamRequestHandler):
    """Warn; then fail, by the peer's fault or by ours, as the request says."""

    async def handle(self):
        await self.server.shutdown()
        logging.getLogger("of.the.handler").warning("careful")
        await self.rfile.readexactly(5)
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("option", "levels"),
    [
        ("--verbose", ["WARNING", "INFO"]),
        ("-v", ["WARNING", "INFO"]),
        (None, ["WARNING"]),
        ("-q", []),
    ],
)
def test_what_is_logged(command, capsys, option, levels):
    arguments = [LOCAL, *filter(None, [option]), f"{__name__}:Troubled"]
    command(*arguments, questions=(b"123",))
    out, err = capsys.readouterr()
    assert [line.split()[2] for line in err.splitlines()] == levels
    assert ("IncompleteRead" in err) == ("INFO" in levels)
    assert bool(out) == (option != "-q")
    command(*arguments, questions=(b"12345",))
    _, err = capsys.readouterr()
    assert " ERROR " in err
    assert err.endswith("\nZeroDivisionError\n")


def test_quiet_says_nothing(command, capsys):
    assert command("--quiet", LOCAL, f"{__name__}:Last") == [b"hello\n"]
    assert command.exit_code == 0
    assert capsys.readouterr() == ("", "")


# -- the line to try -----------------------------------------------------------------------

SURROGATE = os.fsdecode(b"not \xff utf-8")


@pytest.mark.parametrize(
    "bind",
    [
        "127.0.0.1:0",
        "localhost:0",
        ":0",
        "0.0.0.0:0",
        pytest.param("[::1]:0", marks=needs_ipv6),
        pytest.param("[::]:0", marks=needs_ipv6),
        "unix:s",
        "unix:with space, 'quotes\" and $HOME `id` \\ !",
        pytest.param(f"unix:{SURROGATE}", id="unix:surrogate"),
    ],
)
@pytest.mark.parametrize("udp", [False, True])
async def test_the_line_to_try_works(bind, udp, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--bind", bind, *["--udp"][:udp]]
    server: Any = _cli_server.make_server(
        _cli_arguments.make_parser().parse_args(arguments)
    )
    with trio.fail_after(REAL_LIMIT):
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            tried = await trio.run_process(
                _cli_output.try_it(server),
                shell=True,
                capture_stdout=True,
                capture_stderr=True,
            )
            await server.shutdown()
    assert "'0.0.0.0'" not in _cli_output.try_it(server)
    assert "'::'" not in _cli_output.try_it(server)
    assert (tried.stdout, tried.stderr) == (b"b'hello\\n'\n", b"")
    assert server.statistics().completed == 1


def test_the_line_to_try_names_a_python_that_is_there(monkeypatch, tmp_path):
    with _server(LOCAL) as server:
        monkeypatch.setenv("PATH", str(tmp_path))
        assert shlex.split(_cli_output.try_it(server))[0] == sys.executable
        (tmp_path / "python").touch(0o755)
        assert shlex.split(_cli_output.try_it(server))[0] == "python"
        (tmp_path / "python3").touch(0o755)
        assert shlex.split(_cli_output.try_it(server))[0] == "python3"


@contextlib.contextmanager
def _server(*arguments: str) -> Iterator[Any]:
    server = _cli_server.make_server(_cli_arguments.make_parser().parse_args(arguments))
    try:
        yield server
    finally:
        trio.run(server.server_close)


@needs_ipv6
def test_an_address_is_shown_as_bind_takes_it():
    for bind in ("127.0.0.1:0", "[::1]:0"):
        with _server("--bind", bind) as server:
            shown = _cli_output.shown(server.server_address)
            assert shown == bind.removesuffix("0") + str(server.server_address[1])
            assert _cli_arguments.parse_address(shown)[1] == server.server_address[:2]
    assert (
        _cli_output.shown(_cli_arguments.parse_address("unix:/tmp/x")[1]) == "unix:/tmp/x"
    )


def test_a_path_that_stdout_cannot_encode_is_escaped(command, capsys, tmp_path):
    bind = f"--bind=unix:{tmp_path}/{SURROGATE}"
    assert command(bind, f"{__name__}:Last") == [b"hello\n"]
    assert "not \\udcff utf-8\n" in capsys.readouterr().out


# -- TLS -----------------------------------------------------------------------------------


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """The names of a file with a certificate chain, and of one with its key."""
    issued = trustme.CA().issue_cert("localhost")
    names = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    for n, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(names[0], append=bool(n))
    issued.private_key_pem.write_to_path(names[1])
    return names


class OneLine(StreamRequestHandler):
    """Send one line back."""

    async def handle(self):
        await self.wfile.write(await self.rfile.readline())


@pytest.mark.parametrize(
    ("where", "pages"), [("tcp", False), ("unix", False), ("tcp", True)]
)
async def test_tls_and_the_line_to_try(tmp_path, certificate, where, pages):
    for program in ("openssl", "curl"):
        if not shutil.which(program):
            pytest.skip(f"no {program}")
    bind = LOCAL if where == "tcp" else f"--bind=unix:{tmp_path}/a socket"
    cert, key = certificate
    handler = "http.server:SimpleHTTPRequestHandler" if pages else f"{__name__}:OneLine"
    arguments = [bind, f"--tls-cert={cert}", f"--tls-key={key}", handler]
    server: Any = _cli_server.make_server(
        _cli_arguments.make_parser().parse_args(arguments)
    )
    with trio.fail_after(REAL_LIMIT):
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            line = _cli_output.try_it(server)
            tried = await trio.run_process(
                line, shell=True, capture_stdout=True, capture_stderr=True, stdin=b"hello\n"
            )
            await server.shutdown()
    assert line.startswith("curl -k " if pages else "openssl s_client ")
    if pages:
        assert b"<html" in tried.stdout
    else:
        assert tried.stdout == b"hello\n"
    assert server.statistics().completed == 1


@pytest.mark.parametrize("dispatch", ["nursery", "threading", "forking"])
def test_tls_in_workers(certificate, dispatch):
    cert, key = certificate
    handler = "http.server:BaseHTTPRequestHandler" if dispatch != "nursery" else ""
    tls = (f"--tls-cert={cert}", f"--tls-key={key}")
    options = ("--workers=2", f"--dispatch={dispatch}", *filter(None, [handler]))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with running(*COMMAND, LOCAL, *tls, *options) as process:
        address = printed_address(line_of(process))
        for _ in range(4):
            with context.wrap_socket(connect(address)) as client:
                client.sendall(b"nonsense\r\n\r\n")
                assert client.recv(100)
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 0


def test_what_to_type_for_pages_over_tls(tmp_path, certificate):
    cert, key = certificate
    pages = "http.server:SimpleHTTPRequestHandler"
    with _server(
        f"--bind=unix:{tmp_path}/s", f"--tls-cert={cert}", f"--tls-key={key}", pages
    ) as server:
        expected = f"curl -k --unix-socket {tmp_path}/s https://localhost/"
        assert _cli_output.try_it(server) == expected


def test_a_certificate_and_its_key_may_be_one_file(certificate):
    cert, key = certificate
    with open(cert, "a") as both:
        both.write(Path(key).read_text())
    with _server(LOCAL, f"--tls-cert={cert}") as server:
        assert server.ssl_context


def test_bad_tls_options(capsys, certificate):
    cert, key = certificate
    assert complaint(capsys, f"--tls-key={key}") == "--tls-key needs --tls-cert"
    line = complaint(capsys, "--udp", f"--tls-cert={cert}")
    assert line == "there is no TLS for datagrams: --tls-cert or --udp"
    line = complaint(capsys, LOCAL, f"--tls-cert={cert}.none")
    assert line.startswith(f"cannot load a certificate from {cert}.none: No such file")
    line = complaint(capsys, LOCAL, f"--tls-cert={key}", f"--tls-key={cert}")
    assert line.startswith(f"cannot load a certificate from {key} and {cert}: [SSL")
    assert complaint(capsys, LOCAL, f"--tls-cert={cert}").startswith("cannot load")


# -- the default, and the help -------------------------------------------------------------


def test_the_defaults():
    options = _cli_arguments.make_parser().parse_args([])
    assert options.bind is options.fd is options.workers is None
    assert _cli_arguments.parse_address(_cli_arguments.DEFAULT_BIND) == (
        socket.AF_INET,
        ("127.0.0.1", 9999),
    )
    assert options.graceful_timeout == 30
    assert (
        options.handler is options.request_timeout is options.max_requests_at_once is None
    )


def test_the_help_fits_a_small_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        _cli.main(["--help"])
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) < 80
    shown = "\n".join(lines)
    for action in _cli_arguments.make_parser()._actions:
        assert all(option in shown for option in action.option_strings)


def test_the_examples_of_the_help_are_taken():
    examples = re.findall(
        r"^  python -m trio_socketserver (.*)$", _cli_arguments.EXAMPLES, re.MULTILINE
    )
    assert len(examples) == 2
    for example in examples:
        options = _cli_arguments.make_parser().parse_args(shlex.split(example))
        assert ":" in options.handler


def test_the_version(capsys, monkeypatch):
    versions = {"trio-socketserver": "1.2.3"}

    def version_of(name):
        try:
            return versions.pop(name)
        except KeyError:
            raise metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(metadata, "version", version_of)
    assert _cli.main(["--version"]) == 0
    assert _cli.main(["--version", "--bind=[::1]:1"]) == 0
    rest = f", trio {trio.__version__}, Python {platform.python_version()}"
    assert capsys.readouterr().out.splitlines() == [
        f"trio-socketserver 1.2.3{rest}",
        f"trio-socketserver (not installed){rest}",
    ]


# -- bad arguments -------------------------------------------------------------------------


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that the command has to say about bad *arguments*."""
    assert _cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    prefix, _, line = err.removesuffix("\n").partition(": ")
    assert prefix == "python -m trio_socketserver"
    return line


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("127.0.0.1", "bad address '127.0.0.1'"),
        ("", "bad address ''"),
        ("9999", "bad address '9999'"),
        ("127.0.0.1:", "bad address"),
        ("127.0.0.1:http", "bad address"),
        ("127.0.0.1:-1", "bad address"),
        ("127.0.0.1:+1", "bad address"),
        ("127.0.0.1: 80", "bad address"),
        ("127.0.0.1:65536", "bad address"),
        ("127.0.0.1:" + "9" * 5000, "bad address"),
        ("127.0.0.1:٩", "bad address"),
        ("::1:9999", "bad address '::1:9999'"),
        ("[::1]", "bad address"),
        ("[::1:9999", "bad address"),
        ("::1]:9999", "bad address"),
        ("[]:9999", "bad address"),
        ("[::zz]:9999", "bad address"),
        ("[127.0.0.1]:9999", "bad address"),
        ("[localhost]:9999", "bad address"),
        ("a..b:9999", "bad address"),
        ("ü" * 80 + ":9999", "bad address"),
        ("127.0.0.1\n:9999", "bad address"),
        ("192.0.2.1:0", "cannot bind 192.0.2.1:0: Cannot assign requested address"),
        ("unix:", "bad address 'unix:'"),
        ("unix:/dev/null/s", "cannot bind unix:/dev/null/s: Not a directory"),
        ("unix:/", "cannot bind unix:/: Address already in use"),
        ("unix:/nonexistent/s", "cannot bind unix:/nonexistent/s: No such file"),
        ("unix:/tmp/" + "x" * 200, "too long"),
    ],
)
def test_bad_addresses(capsys, argument, expected):
    line = complaint(capsys, f"--bind={argument}")
    assert expected in line
    if "bad address" in line:
        assert line.endswith("write host:port, [ipv6]:port or unix:/path")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--grace=1"], "unrecognized arguments: --grace=1"),
        (["a:b", "c:d"], "unrecognized arguments: c:d"),
        (["--bind"], "argument --bind: expected one argument"),
        (["--dispatch=parallel"], "argument --dispatch: invalid choice: 'parallel'"),
        (["--dispatch=nursery", "socketserver:StreamRequestHandler"], "ThreadingMixIn"),
        (["-q", "-v"], "not allowed with"),
        *(
            ([f"{option}={text}"], f"argument {option}: invalid number of seconds value: ")
            for option in ("--graceful-timeout", "--request-timeout")
            for text in ("-1", "0", "nan", "inf", "soon", "", "1\n2")
        ),
        *(
            ([f"--max-requests-at-once={text}"], "invalid count value: ")
            for text in ("-1", "0", "1.5", "many", "", "9" * 5000)
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_options(capsys, arguments, expected):
    assert expected in complaint(capsys, *arguments)


BAD_MODULES = {
    "raises": "raise RuntimeError('two\\nlines')",
    "exits": "import sys; sys.exit('not today')",
    "exits_well": "raise SystemExit",
    "broken": "def",
    "groups": "raise ExceptionGroup('several', [ValueError('one'), OSError('two')])",
    "imports": "import nonexistent.module",
    "attributes": "def __getattr__(name): raise LookupError(name)",
    "blocking": """
import socketserver
def function(request, client_address, server): ...
class Handler(socketserver.StreamRequestHandler): ...
class Mixed(socketserver.StreamRequestHandler):
    async def handle(self): ...
number = 3
""",
}


@pytest.mark.parametrize(
    ("handler", "expected"),
    [
        ("", "bad handler '': write module:attribute"),
        ("module", "bad handler 'module'"),
        (":attribute", "bad handler ':attribute'"),
        ("module:", "bad handler 'module:'"),
        ("nonexistent:Handler", "ModuleNotFoundError: No module named 'nonexistent'"),
        ("trio_socketserver._no:Handler", "No module named 'trio_socketserver._no'"),
        (".relative:Handler", "cannot load '.relative:Handler': TypeError"),
        ("os:Handler", "module 'os' has no attribute 'Handler'"),
        ("os:path.Handler", "has no attribute 'Handler'"),
        ("os:path..join", "cannot load 'os:path..join'"),
        ("raises:Handler", "cannot load 'raises:Handler': RuntimeError: two lines"),
        ("exits:Handler", "cannot load 'exits:Handler': SystemExit: not today"),
        ("exits_well:Handler", "cannot load 'exits_well:Handler': SystemExit"),
        ("broken:Handler", "SyntaxError"),
        ("groups:Handler", "several"),
        ("imports:Handler", "No module named 'nonexistent'"),
        ("attributes:Handler", "LookupError: Handler"),
        ("blocking:number", "a handler must be callable, and 3 is not"),
        ("blocking:Mixed", "not derived from trio_socketserver"),
    ],
)
def test_bad_handlers(capsys, tmp_path, monkeypatch, handler, expected):
    monkeypatch.syspath_prepend(tmp_path)
    for name, source in BAD_MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    try:
        assert expected in complaint(capsys, handler, LOCAL)
    finally:
        for name in BAD_MODULES:
            sys.modules.pop(name, None)


def test_a_module_that_is_interrupted_is_not_bad(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        _cli.main(["interrupted:Handler"])


@pytest.mark.parametrize("udp", [False, True])
def test_an_address_in_use(capsys, tmp_path, udp):
    options = ["--udp"][:udp]
    for bind in (LOCAL, f"--bind=unix:{tmp_path}/s"):
        with _server(bind, *options) as server:
            shown = _cli_output.shown(server.server_address)
            line = complaint(capsys, f"--bind={shown}", *options)
            assert line == f"cannot bind {shown}: Address already in use"


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Take root's rights away for the length of the test."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def first_unprivileged_port() -> int:
    return int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())


@pytest.mark.skipif(first_unprivileged_port() <= 1, reason="no port needs a privilege here")
@pytest.mark.usefixtures("unprivileged")
def test_a_privileged_port(capsys):
    line = complaint(capsys, "--bind=127.0.0.1:1")
    assert line == "cannot bind 127.0.0.1:1: Permission denied"


@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_folder_that_may_not_be_used(capsys, tmp_path, mode, request):
    tmp_path.chmod(mode)
    request.getfixturevalue("unprivileged")
    line = complaint(capsys, f"--bind=unix:{tmp_path}/s")
    assert line == f"cannot bind unix:{tmp_path}/s: Permission denied"


def test_without_unix_sockets(capsys, monkeypatch):
    monkeypatch.delattr(socket, "AF_UNIX")
    assert complaint(capsys, "--bind=unix:/tmp/s") == "this system has no Unix sockets"


# -- as a process --------------------------------------------------------------------------


def test_the_module_calls_main(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["-m", "--bind=nonsense"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("trio_socketserver", run_name="__main__")
    assert ended.value.code == 2
    assert "bad address" in capsys.readouterr().err
    runpy.run_module("trio_socketserver.__main__", run_name="imported")


def test_a_process_with_bad_arguments():
    with running(*COMMAND, "nonexistent:Handler") as process:
        out, err = process.communicate()
        assert process.returncode == 2
    assert out == ""
    assert re.fullmatch(r"python -m trio_socketserver: cannot load .*\n", err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_default_is_an_echo(number):
    with running(*COMMAND, LOCAL) as process:
        serving, try_it = line_of(process), line_of(process)
        assert re.fullmatch(r"serving EchoStream on 127\.0\.0\.1:\d+\n", serving)
        with connect(printed_address(serving)) as client:
            client.sendall(b"one\ntwo\nrest")
            client.shutdown(socket.SHUT_WR)
            assert receive_until_closed(client) == b"one\ntwo\nrest"
        tried = subprocess.run(
            try_it.removeprefix("try: "), shell=True, capture_output=True, check=True
        )
        assert tried.stdout == b"b'hello\\n'\n"
        process.send_signal(number)
        assert process.communicate() == ("accepted 2, completed 2\n", "")
        assert process.returncode == 0


HANDLER = """
from trio_socketserver import StreamRequestHandler

class Handler(StreamRequestHandler):
    async def handle(self):
        async for line in self.rfile:
            await self.wfile.write(line)
            if line == b"busy\\n":
                await self.wfile.write(await self.rfile.readline())
"""


@contextlib.contextmanager
def busy_and_idle(folder: Path, *options: str) -> Iterator[tuple[Any, Any, Any]]:
    """Run the command with a busy and an idle client."""
    (folder / "handlers.py").write_text(HANDLER)
    with running(*COMMAND, LOCAL, *options, "handlers:Handler", folder=folder) as process:
        address = printed_address(line_of(process))
        line_of(process)
        with connect(address) as busy, connect(address) as idle:
            for client, line in ((busy, b"busy\n"), (idle, b"idle\n")):
                client.sendall(line)
                assert client.recv(100) == line
            yield process, busy, idle


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_drains(tmp_path, number):
    with busy_and_idle(tmp_path) as (process, busy, idle):
        process.send_signal(number)
        assert receive_until_closed(idle) == b""
        busy.sendall(b"answered\n")
        assert receive_until_closed(busy) == b"answered\n"
        assert process.communicate() == ("accepted 2, completed 2\n", "")
        assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_cancel(tmp_path, number):
    with busy_and_idle(tmp_path) as (process, busy, idle):
        process.send_signal(signal.SIGINT)
        assert receive_until_closed(idle) == b""
        process.send_signal(number)
        assert receive_until_closed(busy) == b""
        assert process.communicate() == ("accepted 2, completed 1, cancelled 1\n", "")
        assert process.returncode == 0


def test_draining_is_bounded(tmp_path):
    with busy_and_idle(tmp_path, "--graceful-timeout=0.01") as (process, busy, idle):
        # Its end may take longer than that, where the machine is slow.
        idle.shutdown(socket.SHUT_WR)
        assert receive_until_closed(idle) == b""
        process.send_signal(signal.SIGTERM)
        assert receive_until_closed(busy) == b""
        assert process.communicate() == ("accepted 2, completed 1, cancelled 1\n", "")
        assert process.returncode == 0


def test_a_peers_reset_is_one_line(tmp_path):
    with busy_and_idle(tmp_path, "--verbose") as (process, busy, idle):
        close_with_reset(busy)
        # The server has seen the reset when it answers the next client.
        idle.sendall(b"again\n")
        assert idle.recv(100) == b"again\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert out == "accepted 2, completed 1, failed 1, peer_errors 1\n"
    assert re.fullmatch(r"\S+ \S+ INFO .*ConnectionBroken.*\n", err)


# -- inherited sockets ---------------------------------------------------------------------


@contextlib.contextmanager
def inheriting(
    sock: socket.socket, *options: str, pid: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run the command as a service manager does: *sock* is its descriptor 3."""
    start = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3, inheritable=True); "
        "os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': sys.argv[2] or str(os.getpid())}; "
        "os.execv(sys.executable, [sys.executable, *sys.argv[3:]])"
    )
    # A number that dup2() does not find in its way.
    descriptor = fcntl.fcntl(sock, fcntl.F_DUPFD, 100)
    os.set_inheritable(descriptor, True)
    try:
        command = (start, str(descriptor), pid or "", *COMMAND, *options)
        with running("-c", *command, pass_fds=(descriptor,)) as process:
            yield process
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("options", [[], ["--workers=1"]])
def test_a_service_manager_s_socket_is_served(options):
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        inheriting(listener, *options) as process,
    ):
        assert printed_address(line_of(process)) == listener.getsockname()
        for _ in range(2):
            with connect(listener.getsockname()) as client:
                client.sendall(b"hello\n")
                assert client.recv(99) == b"hello\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


def test_a_service_manager_s_unix_socket_stays_where_it_is(tmp_path):
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with inheriting(listener) as process:
            assert f"unix:{path}" in line_of(process)
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0
        assert Path(path).is_socket()


def test_a_service_manager_s_datagram_socket_is_served(tmp_path):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        with inheriting(receiver) as process:
            assert printed_address(line_of(process)) == receiver.getsockname()
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"hello", receiver.getsockname())
                assert client.recv(99) == b"hello"
            process.send_signal(signal.SIGINT)
            assert process.wait() == 0


def test_a_socket_for_another_process_is_left_alone():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        with inheriting(listener, "--bind=127.0.0.1:0", pid="1") as process:
            assert printed_address(line_of(process)) != listener.getsockname()
        with inheriting(listener, "--bind=127.0.0.1:0") as process:
            assert printed_address(line_of(process)) != listener.getsockname()


@pytest.mark.parametrize(
    ("environ", "descriptors"),
    [
        ({}, []),
        ({"LISTEN_FDS": "2", "LISTEN_PID": str(os.getpid())}, [3, 4]),
        ({"LISTEN_FDS": "two", "LISTEN_PID": str(os.getpid())}, []),
        ({"LISTEN_FDS": "2"}, []),
        ({"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a:b"}, []),
    ],
)
def test_what_is_taken_is_taken_once(environ, descriptors):
    rest = {"PATH": "/bin"}
    environ |= rest
    assert list(take_listen_fds(environ)) == descriptors
    assert environ == rest


def test_a_descriptor_is_served():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = _cli_arguments.make_parser().parse_args(
            [f"--fd={os.dup(listener.fileno())}"]
        )
        server = _cli_server.make_server(options)
        assert server.server_address == listener.getsockname()
        assert not os.get_inheritable(server.fileno())
        server._close_listener()


def test_sockets_that_cannot_be_served(capsys):
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as stranger,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unbound,
    ):
        assert "of another family" in complaint(capsys, f"--fd={stranger.fileno()}")
        assert "not bound" in complaint(capsys, f"--fd={unbound.fileno()}")
        unbound.bind(("127.0.0.1", 0))
        _cli_server.check_served(unbound, datagrams=True)


def test_descriptors_that_cannot_be_served(capsys, monkeypatch, tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket() as connecting,
        open(tmp_path / "file", "w") as file,
    ):
        for arguments, reason in (
            ([f"--fd={listener.fileno()}", "--udp"], "it is of another type"),
            ([f"--fd={connecting.fileno()}"], "it does not listen"),
            ([f"--fd={file.fileno()}"], "Socket operation on non-socket"),
            (["--fd=12345"], "Bad file descriptor"),
            (["--fd=-1"], "invalid descriptor value"),
            (["--fd=5", "--bind=:1"], "not allowed with"),
        ):
            assert reason in complaint(capsys, *arguments)
        assert listener.fileno() != -1
        monkeypatch.setenv("LISTEN_FDS", "2")
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        assert "only one can be served" in complaint(capsys)


# -- worker processes ----------------------------------------------------------------------

IN_WORKERS = """
import os, socketserver
from trio_socketserver import StreamRequestHandler

class Async(StreamRequestHandler):
    async def handle(self):
        await self.request.send_all(b"%d\\n" % os.getpid())
        await self.rfile.read()

class Blocking(socketserver.StreamRequestHandler):
    def handle(self):
        self.request.sendall(b"%d\\n" % os.getpid())
        self.rfile.read()

class Datagram(socketserver.DatagramRequestHandler):
    def handle(self):
        self.wfile.write(b"%d\\n" % os.getpid())

nameless = lambda request, client_address, server: None
"""


@contextlib.contextmanager
def in_workers(folder: Path, *options: str) -> Iterator[tuple[Any, Any]]:
    """Run the command with workers; yield its process and the address."""
    (folder / "handlers.py").write_text(IN_WORKERS)
    with running(*COMMAND, *options, folder=folder) as process:
        address = line_of(process).split()[-1]
        line_of(process)
        if address.startswith("unix:"):
            yield process, address.removeprefix("unix:")
        else:
            yield process, printed_address(address)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
        assert (process.returncode, err) == (0, "")
        assert re.fullmatch(r"accepted (\d+), completed \1\n", out)


@pytest.mark.parametrize(
    ("dispatch", "handler"),
    [
        ("sequential", "Blocking"),
        ("nursery", "Async"),
        ("threading", "Blocking"),
        ("forking", "Async"),
    ],
)
def test_workers_with_each_dispatch(tmp_path, dispatch, handler):
    where = f"--bind=unix:{tmp_path}/s" if dispatch == "nursery" else LOCAL
    options = (where, "--workers=1", f"--dispatch={dispatch}", f"handlers:{handler}")
    with (
        in_workers(tmp_path, *options) as (process, address),
        connect(address) as client,
    ):
        assert client.recv(100) != b"%d\n" % process.pid
        client.shutdown(socket.SHUT_WR)
        assert receive_until_closed(client) == b""


def test_workers_for_datagrams(tmp_path):
    options = LOCAL, "--udp", "--workers=1", "handlers:Datagram"
    with (
        in_workers(tmp_path, *options) as (process, address),
        socket.socket(type=socket.SOCK_DGRAM) as client,
    ):
        client.settimeout(REAL_LIMIT)
        client.sendto(b"hello", address)
        assert client.recv(100) != b"%d\n" % process.pid


def test_the_limit_is_of_each_worker(tmp_path):
    options = LOCAL, "--workers=2", "--max-requests-at-once=1", "handlers:Async"
    with in_workers(tmp_path, *options) as (_, address), contextlib.ExitStack() as stack:

        def begun() -> tuple[socket.socket, bytes]:
            client = stack.enter_context(connect(address))
            return client, client.recv(100)

        (_, one), (second, other) = begun(), begun()
        assert one != other
        # The next is served where there is room again, and by nobody before.
        second.shutdown(socket.SHUT_WR)
        assert receive_until_closed(second) == b""
        assert begun()[1] == other


def test_a_handler_that_cannot_be_taken_to_workers(capsys, tmp_path, monkeypatch):
    (tmp_path / "handlers.py").write_text(IN_WORKERS)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        line = complaint(capsys, LOCAL, "--workers=2", "handlers:nameless")
    finally:
        sys.modules.pop("handlers", None)
    assert "cannot be taken to worker processes" in line
    assert "<lambda>" in line


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_bad_numbers_of_workers(capsys, number):
    expected = f"argument --workers: invalid count value: '{number}'"
    assert expected in complaint(capsys, f"--workers={number}")


def test_without_worker_processes(capsys, monkeypatch):
    monkeypatch.delattr(trio_socketserver, "PreforkingMixIn")
    expected = "this system has no worker processes"
    assert complaint(capsys, LOCAL, "--workers=2") == expected
