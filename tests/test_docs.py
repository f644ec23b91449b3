"""README.md, docs/ and CHANGELOG.md are true: each block of code is executed, the numbers
and names in tables are those of the package."""

from __future__ import annotations

import ast
import dataclasses
import http.server
import importlib.util
import inspect
import math
import os
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import textwrap
import tomllib
import types
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree as ET

import pytest
import trio
import trio.testing
import trustme
from helpers import connect, is_refused, receive, running

import trio_socketserver
import trio_socketserver.testing
from trio_socketserver._accept import BACK_OFF_FIRST, BACK_OFF_LIMIT
from trio_socketserver._cli_arguments import DEFAULT_BIND, make_parser
from trio_socketserver._cli_server import make_server
from trio_socketserver._crew import (
    EXIT_TIMEOUT,
    LONGEST_RESTART_DELAY,
    RESTART_DELAY,
    START_ATTEMPTS,
    STEADY_AFTER,
)
from trio_socketserver._draining import FIRST_LINE_GRACE
from trio_socketserver._files import (
    LINES_IN_A_ROW,
    MAX_LINE_SIZE,
    WRITE_BUFFER_SIZE,
    StreamReader,
    StreamWriter,
)
from trio_socketserver._forking import BATCH as FORKING_BATCH
from trio_socketserver._fresh_interpreter import MAIN_AGAIN
from trio_socketserver._hooks import COROUTINE_HOOKS, PLAIN_HOOKS
from trio_socketserver._lifecycle import TRANSITIONS, LoopEvent, LoopState
from trio_socketserver._run import GRACEFUL_TIMEOUT
from trio_socketserver._server import BATCH
from trio_socketserver._sockets import RECEIVE_SIZE
from trio_socketserver._stdlib_servers import DAEMON_GRACE, SHUTDOWN_TIMEOUT
from trio_socketserver._tls import HANDSHAKE_TIMEOUT
from trio_socketserver._worker_process import WORKER_BATCH
from trio_socketserver._workers import IDLE_SECONDS
from trio_socketserver.testing._cancellation import CLEANUP_TIMEOUT
from trio_socketserver.testing._watching import DELIVERIES_LIMIT

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.rst"))]

LIMIT = 60
"""Seconds to wait for a program that hangs."""

WORDS = {1: "one", 5: "five", 10: "ten"}


# -- finding the blocks --------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of code in a document.

    Attributes:
        document: the file's name.
        name: in docs/, the block's caption or name, or ``after <caption>`` of the last
            program before it; in the README, the heading, and a number from 2 on.
        language: what it is written in.
        text: its lines, without indentation.
    """

    document: str
    name: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}: {self.name}"


def blocks_of_markdown(document: Path) -> Iterator[Block]:
    heading, number = "", 0
    for match in re.finditer(
        r"^#+ (?P<heading>[^\n]*)$|^```(?P<language>\w+)\n(?P<text>.*?)^```$",
        document.read_text(),
        re.MULTILINE | re.DOTALL,
    ):
        if match["heading"]:
            heading, number = match["heading"], 0
        else:
            number += 1
            name = heading if number == 1 else f"{heading} {number}"
            yield Block(document.name, name, match["language"], match["text"])


def blocks_of_rst(document: Path) -> Iterator[Block]:
    program = "the title"
    for match in re.finditer(
        r"^\.\. code-block:: (?P<language>\w+)\n"
        r"(?:   :(?:caption|name): (?P<caption>.*)\n)?\n(?P<text>(?:   .*\n|\n)+)",
        document.read_text(),
        re.MULTILINE,
    ):
        if match["caption"] and match["caption"].endswith(".py"):
            program = match["caption"]
        name = match["caption"] or f"after {program}"
        text = textwrap.dedent(match["text"]).strip() + "\n"
        yield Block(document.name, name, match["language"], text)


BLOCKS = {
    str(block): block
    for document in DOCUMENTS
    for block in (
        blocks_of_markdown(document) if document == README else blocks_of_rst(document)
    )
}


def test_every_block_of_code_is_found() -> None:
    texts = [document.read_text() for document in DOCUMENTS]
    marks = re.compile(r"^ *(?:```\w|\.\. code-block::)", re.MULTILINE)
    assert len(BLOCKS) == sum(len(marks.findall(text)) for text in texts)
    by_other_means = re.compile(
        r"^\.\. (?:code|sourcecode|parsed-literal)::"
        # What is in examples/ is tested with the rest of it.
        r"|^\.\. literalinclude:: (?!\.\./examples/)"
        r"|^[^.\n].*::$|^ *>>>|^~~~",
        re.MULTILINE,
    )
    assert not [found for text in texts for found in by_other_means.findall(text)]


# -- running whole programs ----------------------------------------------------------------

LAUNCHER = """
import runpy, socketserver, sys, trio_socketserver

def announce(server_class):
    bind_and_listen = server_class.__init__
    def __init__(self, *args, **kwargs):
        bind_and_listen(self, *args, **kwargs)
        print(self.server_address[1], flush=True)
    server_class.__init__ = __init__

announce(socketserver.TCPServer)
announce(trio_socketserver.TCPServer)
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Runs a program of the documentation, and prints the port of each server it makes."""


class Program:
    """A program in a process of its own, on free ports in the place of 9999 and 9998."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        package = Path(trio_socketserver.__file__).parent.parent
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(package), "PYTHONUNBUFFERED": "1"},
        )

    @classmethod
    def of(cls, block: Block, folder: Path) -> Self:
        path = folder / "program.py"
        source = re.sub(r"\b999[89]\b", "0", block.text)
        assert source != block.text
        path.write_text(source)
        return cls(folder, "-c", LAUNCHER, str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()

    def line(self) -> str:
        """Return the next line that the program prints."""
        line = b""
        while not line.endswith(b"\n"):
            assert self.process.stdout is not None
            assert select.select([self.process.stdout], [], [], LIMIT)[0], line
            byte = self.process.stdout.read(1)
            assert byte, self.end()
            line += byte
        return line.decode().rstrip("\n")

    def address(self) -> tuple[str, int]:
        """Return where the program's next server listens."""
        return ("127.0.0.1", int(self.line()))

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Wait for the program's end: return the exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, stdout.decode(), stderr.decode()

    def end_quietly(self) -> None:
        """Press Ctrl-C; nothing is said about it, and all is well."""
        self.interrupt()
        assert self.end() == (0, "", "")


def say(address: tuple[str, int], *lines: str) -> list[str]:
    """Say lines to a server, each after the answer to the one before; return those."""
    with connect(address) as client, client.makefile("rb") as answers:
        heard = []
        for line in lines:
            client.sendall(f"{line}\n".encode())
            heard.append(answers.readline().decode().rstrip("\n"))
        return heard


def exchange(address: tuple[str, int], data: bytes) -> bytes:
    """Send *data* and the end of the stream; return everything that comes back."""
    with connect(address) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        with client.makefile("rb") as answers:
            return answers.read()


# -- what each block is put through --------------------------------------------------------

ELSEWHERE = {"creation_notes.rst", "stdlib_examples.rst"}
"""The documents whose blocks `test_docs_pairs` executes."""

Scenario = Callable[[Block, Path], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(*names: str) -> Callable[[Scenario], Scenario]:
    """Register what is done with the blocks of these names."""

    def register(function: Scenario) -> Scenario:
        for name in names:
            assert name not in SCENARIOS
            SCENARIOS[name] = function
        return function

    return register


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, block in BLOCKS.items()
        if block.language != "text" and block.document not in ELSEWHERE
    ],
)
def test_block(name: str, tmp_path: Path) -> None:
    SCENARIOS[name](BLOCKS[name], tmp_path)


def test_no_scenario_without_a_block() -> None:
    assert not SCENARIOS.keys() - BLOCKS.keys()


def loaded(block: Block, name: str = "loaded") -> dict[str, Any]:
    """Execute a program as a module, so that its servers are not started."""
    module = types.ModuleType(name)
    exec(compile(block.text, str(block), "exec"), module.__dict__)
    return module.__dict__


async def execute(block: Block, namespace: dict[str, Any]) -> None:
    """Execute a fragment in which there may be ``await``."""
    code = compile(block.text, str(block), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = types.FunctionType(code, namespace)()
    if inspect.iscoroutine(result):
        await result


def commands(block: Block) -> list[list[str]]:
    """Return the commands of a shell line, in words."""
    assert block.text.count("\n") == 1
    return [shlex.split(command) for command in block.text.split("&&")]


@scenario("README.md: Start a server")
def first_command(block: Block, folder: Path) -> None:
    venv, install, start = commands(block)
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install == [".venv/bin/pip", "install", "."]
    python, *arguments = start
    assert python == ".venv/bin/python"
    with Program(folder, *arguments, "--bind", "127.0.0.1:0") as server:
        assert server.line().startswith("serving EchoStream on 127.0.0.1:")
        offered = server.line()
        port = int(re.search(r"'127.0.0.1', (\d+)", offered)[1])  # type: ignore[index]
        assert say(("127.0.0.1", port), "hello") == ["hello"]
        client = BLOCKS["README.md: Start a server 2"].text
        assert client.startswith("python3 -c ")
        printed = shell(client.replace("python3", shlex.quote(sys.executable)), port)
        assert printed == BLOCKS["README.md: Start a server 3"].text
        server.interrupt()
        code, stdout, stderr = server.end()
        assert (code, stderr) == (0, "")
        assert "completed 2" in stdout
    assert DEFAULT_BIND == "127.0.0.1:9999"


def shell(command: str, port: int, folder: Path | None = None) -> str:
    """Run a shell command that talks to port 9999, with *port* in its place."""
    return subprocess.run(
        command.replace("9999", str(port)),
        shell=True,
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    ).stdout


@scenario("README.md: Start a server 2")
def client_command(block: Block, folder: Path) -> None:
    """The client's line is run by `first_command`; without a server it says so."""
    assert SCENARIOS["README.md: Start a server"] is first_command
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(subprocess.CalledProcessError, match="returned non-zero"):
            shell(
                block.text.replace("python3", shlex.quote(sys.executable)),
                unused.getsockname()[1],
            )


@scenario("README.md: Start a server 4")
def share_a_folder(block: Block, folder: Path) -> None:
    ((python, *arguments),) = commands(block)
    assert python == ".venv/bin/python"
    (folder / "file").write_bytes(b"hello\n")
    with Program(folder, *arguments, "--bind", "127.0.0.1:0") as server:
        port = int(server.line().rpartition(":")[2])
        assert f"curl http://127.0.0.1:{port}/" in server.line()
        answer = exchange(("127.0.0.1", port), b"GET /file HTTP/1.0\r\n\r\n")
        assert answer.startswith(b"HTTP/1.0 200 OK\r\n")
        assert answer.endswith(b"\r\n\r\nhello\n")
        server.interrupt()
        code, stdout, stderr = server.end()
        assert code == 0
        assert "completed 1" in stdout
        assert "GET /file" in stderr


@scenario("README.md: Port a server in four steps 3")
def whole_server(block: Block, folder: Path) -> None:
    namespace: dict[str, Any] = {
        "trio": trio,
        "http": http,
        "serve_blocking": trio_socketserver.serve_blocking,
        "address": ("127.0.0.1", 0),
    }

    async def main() -> None:
        with trio.fail_after(LIMIT), trio.CancelScope() as whole:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(execute, block, namespace)
                await trio.testing.wait_all_tasks_blocked()
                address = namespace["server"].server_address
                page = await in_thread(exchange, address, b"HEAD / HTTP/1.0\r\n\r\n")
                assert page.startswith(b"HTTP/1.0 200 OK\r\n")
                whole.cancel()
        assert is_refused(address)

    trio.run(main)


@scenario("README.md: Run the tests")
def second_command(block: Block, folder: Path) -> None:
    """A test cannot run all tests; the pieces of the command must exist."""
    venv, install, run_tests = commands(block)
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install[:3] == [".venv/bin/pip", "install", "-e"]
    extra = re.fullmatch(r"\.\[(\w+)\]", install[3])
    assert extra is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        re.match(r"[\w-]+", name)[0] for name in project["optional-dependencies"][extra[1]]
    }  # type: ignore[index]
    assert wanted >= {"pytest", "pytest-trio", "coverage"}
    assert run_tests == [".venv/bin/python", "-m", "pytest"]


@scenario("README.md: A server in 15 lines")
def counting(block: Block, folder: Path) -> None:
    assert block.text.count("\n") <= 15
    with Program.of(block, folder) as program:
        address = program.address()
        assert say(address, "a", "b") == ["1: a", "2: b"]
        assert say(address, "c") == ["3: c"]
        program.end_quietly()


@scenario("README.md: Port a server in four steps")
@scenario("README.md: Port a server in four steps 2")
def ported(block: Block, folder: Path) -> None:
    """Both programs answer the same bytes with the same bytes."""
    with Program.of(block, folder) as program:
        address = program.address()
        assert exchange(address, b"one\ntwo\nthr") == b"ONE\nTWO\nTHR"
        assert exchange(address, b"") == b""


@scenario("README.md: Three scopes", "structured.rst: scopes")
def scopes(block: Block, folder: Path) -> None:
    ended = []

    class Stubborn(trio_socketserver.StreamRequestHandler):
        async def handle(self) -> None:
            await self.wfile.write(await self.rfile.readline())
            await trio.sleep_forever()

        async def finish(self) -> None:
            ended.append("finish")

    async def main() -> None:
        namespace = {
            "trio": trio,
            "NurseryTCPServer": trio_socketserver.NurseryTCPServer,
            "address": ("127.0.0.1", 0),
            "Handler": Stubborn,
        }
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(execute, block, namespace)
                await trio.testing.wait_all_tasks_blocked()
                address = namespace["server"].server_address
                with connect(address) as one, connect(address) as two:
                    for client in one, two:
                        client.sendall(b"hello\n")
                        assert await receive(client) == b"hello\n"
                    namespace["soft"].cancel()
                    await trio.testing.wait_all_tasks_blocked()
                    assert is_refused(address)
                    assert not ended
                    assert namespace["server"].statistics().active == 2
                    namespace["hard"].cancel()
                    for client in one, two:
                        assert await receive(client) == b""
        assert ended == ["finish", "finish"]
        assert namespace["server"].statistics().cancelled == 2

    trio.run(main)


# -- the tutorial --------------------------------------------------------------------------


@scenario("tutorial.rst: after the title")
def tutorial_install(block: Block, folder: Path) -> None:
    """The same steps as in the README, in an active environment."""
    venv, _, install = (line.removeprefix("$ ") for line in block.text.splitlines())
    first = BLOCKS["README.md: Start a server"].text
    assert first.startswith(f"{venv} && .venv/bin/{install} && ")


@scenario("tutorial.rst: talk.py")
def talk(block: Block, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        with talking(folder, ["one", "two"], listener.getsockname()[1]) as client:
            with listener.accept()[0] as connection, connection.makefile("rb") as lines:
                for line in lines:
                    connection.sendall(line.upper())
            assert client.end() == (0, "ONE\nTWO\n", "")


def talking(folder: Path, words: list[str], port: int, name: str = "talk.py") -> Program:
    """Start the tutorial's client, or the one over TLS."""
    client = folder / name
    client.write_text(BLOCKS[f"tutorial.rst: {name}"].text.replace("9999", str(port)))
    return Program(folder, str(client), *words)


@scenario(
    "tutorial.rst: after echo.py",
    "tutorial.rst: after lines.py",
    "tutorial.rst: after chat.py",
)
def console(block: Block, folder: Path) -> None:
    """What is typed gives what is shown, with the program before it in the document."""
    program_name = block.name.removeprefix("after ")
    command, *shown = block.text.splitlines()
    prompt, python, client, *words = shlex.split(command)
    assert (prompt, python, client) == ("$", "python", "talk.py")
    program_block = BLOCKS[f"{block.document}: {program_name}"]
    with Program.of(program_block, folder) as program:
        with talking(folder, words, program.address()[1]) as client:
            code, printed, complaints = client.end()
        assert (code, printed.splitlines(), complaints) == (0, shown, "")
        program.end_quietly()


@scenario("tutorial.rst: echo.py")
def one_line(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        assert say(program.address(), "one", "two") == ["one", ""]
        program.end_quietly()


@scenario("index.rst: echo.py", "tutorial.rst: lines.py")
def many_clients(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        with connect(address) as idle:
            idle.sendall(b"first\n")
            assert idle.recv(99) == b"first\n"
            assert say(address, "one", "two") == ["one", "two"]
            program.interrupt()
            assert idle.recv(1) == b""
        assert program.end() == (0, "", "")


@scenario("tutorial.rst: chat.py")
def chat(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        with (
            connect(address) as ann,
            connect(address) as bob,
            ann.makefile("rb") as to_ann,
            bob.makefile("rb") as to_bob,
        ):
            ann.sendall(b"a\n")
            assert to_ann.readline() == b"a\n"
            bob.sendall(b"b\n")
            # Perhaps after Ann's line: whether Bob was in the room then, nobody can tell.
            assert b"b\n" in to_bob
            assert to_ann.readline() == b"b\n"
            ann.shutdown(socket.SHUT_WR)
            assert to_ann.readline() == b""
            bob.sendall(b"c\n")
            program.interrupt()
            assert to_bob.readlines() == [b"c\n"]
        assert program.end() == (0, "", "")


def write_programs(folder: Path, *names: str) -> None:
    """Write the tutorial's programs that a later one imports."""
    for name in names:
        (folder / name).write_text(BLOCKS[f"tutorial.rst: {name}"].text)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let the programs in *folder* be imported, and forget them afterwards."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for path in folder.glob("*.py"):
            if path.stem not in known:
                sys.modules.pop(path.stem, None)


@scenario("tutorial.rst: careful.py")
def careful(block: Block, folder: Path) -> None:
    write_programs(folder, "chat.py")
    with Program.of(block, folder) as program:
        address = program.address()
        assert say(address, "x" * 999) == ["x" * 999]
        with connect(address) as endless:
            endless.sendall(b"x" * 1000)
            assert endless.recv(1) == b""
        program.interrupt()
        code, stdout, stderr = program.end()
        assert (code, stdout) == (0, "")
        (line,) = stderr.splitlines()
        assert line.startswith("INFO:trio_socketserver:")
        assert "LineTooLong" in line

    with importable(folder):
        namespace = loaded(block)
    server_class, handler = namespace["CarefulRoom"], namespace["CarefulMember"]
    assert server_class.max_tasks == 100
    assert server_class.request_timeout == 24 * 60 * 60
    virtual = trio.testing.MockClock()

    async def silent_client() -> None:
        async with (
            server_class(("127.0.0.1", 0), handler) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(server.serve_forever)
            with connect(server.server_address) as client:
                for seconds in (599, 599):
                    client.sendall(b"x\n")
                    assert await in_thread(client.recv, 9) == b"x\n"
                    await trio.testing.wait_all_tasks_blocked()
                    virtual.jump(seconds)
                    await trio.testing.wait_all_tasks_blocked()
                assert server.statistics().active == 1
                virtual.jump(1)
                assert await in_thread(client.recv, 9) == b""
            assert server.statistics().failed == 1
            assert await server.verify_request(None, ("127.0.0.1", 1))
            assert not await server.verify_request(None, ("192.0.2.1", 1))
            await server.shutdown()

    trio.run(silent_client, clock=virtual)


@scenario("tutorial.rst: after careful.py")
def too_long(block: Block, folder: Path) -> None:
    """The client prints an empty answer."""
    write_programs(folder, "chat.py")
    command = block.text.removeprefix("$ ")
    with Program.of(BLOCKS["tutorial.rst: careful.py"], folder) as program:
        port = program.address()[1]
        talk_program = BLOCKS["tutorial.rst: talk.py"].text
        (folder / "talk.py").write_text(talk_program.replace("9999", str(port)))
        assert command.startswith("python ")
        python = shlex.quote(sys.executable)
        assert shell(command.replace("python", python, 1), port, folder) == ""
        program.interrupt()
        assert program.end()[2].count("LineTooLong") == 1


async def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a plain blocking function, which has a timeout of its own."""
    return await trio.to_thread.run_sync(function, *arguments)


@scenario("tutorial.rst: raises")
def forgetful(block: Block, folder: Path) -> None:
    with pytest.raises(TypeError) as caught:
        exec(block.text, {"NurseryTCPServer": trio_socketserver.NurseryTCPServer})
    shown = " ".join(BLOCKS["tutorial.rst: raised"].text.split())
    assert f"TypeError: {caught.value}" == shown


def write_secure_programs(folder: Path) -> None:
    """Write what the programs of the tutorial's last steps need."""
    write_programs(folder, "chat.py", "careful.py", "secure.py", "service.py")
    write_certificates(folder)


@scenario("tutorial.rst: certificate")
def certificate(block: Block, folder: Path) -> None:
    """It is one that the tutorial's client trusts."""
    if not shutil.which("openssl"):
        pytest.skip("no openssl program")
    write_programs(folder, "chat.py", "careful.py")
    shell(block.text.removeprefix("$ "), 0, folder)
    with Program.of(BLOCKS["tutorial.rst: secure.py"], folder) as program:
        with talking(folder, ["one", "two"], program.address()[1], "talk_tls.py") as client:
            assert client.end() == (0, "one\ntwo\n", "")
        program.end_quietly()


@scenario("tutorial.rst: secure.py")
def secure(block: Block, folder: Path) -> None:
    write_secure_programs(folder)
    with Program.of(block, folder) as program:
        address = program.address()
        with connect(address), shake_hands(address) as client:  # One says nothing.
            client.sendall(b"hello\n")
            assert client.recv(99) == b"hello\n"
        program.interrupt()
        assert program.end()[:2] == (0, "")


@scenario("tutorial.rst: talk_tls.py", "tutorial.rst: talk over TLS")
def talk_tls(block: Block, folder: Path) -> None:
    command, *shown = BLOCKS["tutorial.rst: talk over TLS"].text.splitlines()
    prompt, python, client_name, *words = shlex.split(command)
    assert (prompt, python, client_name) == ("$", "python", "talk_tls.py")
    write_secure_programs(folder)
    with Program.of(BLOCKS["tutorial.rst: secure.py"], folder) as program:
        port = program.address()[1]
        trustme.CA().cert_pem.write_to_path(folder / "cert.pem")
        with talking(folder, words, port, client_name) as stranger:
            assert "CERTIFICATE_VERIFY_FAILED" in stranger.end()[2]
        # The test's certificate has an issuer. The tutorial's vouches for itself.
        AUTHORITY.cert_pem.write_to_path(folder / "cert.pem")
        with talking(folder, words, port, client_name) as client:
            assert client.end() == (0, "".join(f"{line}\n" for line in shown), "")
        program.interrupt()
        assert program.end()[:2] == (0, "")


@scenario("tutorial.rst: service.py")
def service(block: Block, folder: Path) -> None:
    write_secure_programs(folder)
    for number in (signal.SIGINT, signal.SIGTERM):
        with Program.of(block, folder) as program:
            with shake_hands(program.address()) as client:
                assert program.line() == "the room is open"
                client.sendall(b"hello\n")
                assert client.recv(99) == b"hello\n"
                program.process.send_signal(number)
                with client.makefile("rb") as answers:
                    assert answers.read() == b"the room closes, goodbye\n"
            assert program.end() == (0, "members who have left: 1\n", "")
    with importable(folder):
        assert loaded(block)["PoliteRoom"].graceful_timeout == 10


@scenario("tutorial.rst: stay")
def stay(block: Block, folder: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl program")
    write_secure_programs(folder)
    with Program.of(BLOCKS["tutorial.rst: service.py"], folder) as program:
        port = program.address()[1]
        assert program.line() == "the room is open"
        prompt, *command = shlex.split(block.text.replace("9999", str(port)))
        assert prompt == "$"
        AUTHORITY.cert_pem.write_to_path(folder / "cert.pem")
        with subprocess.Popen(
            command,
            cwd=folder,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            client.stdin.write(b"hello\n")
            assert client.stdout.read(6) == b"hello\n"
            program.interrupt()
            assert client.communicate(timeout=LIMIT)[0] == b"the room closes, goodbye\n"
        assert program.end() == (0, "members who have left: 1\n", "")


@scenario("tutorial.rst: stop by SIGTERM")
def stop(block: Block, folder: Path) -> None:
    """Typed as it is, but for the port; and the server says itself when it is there."""
    write_secure_programs(folder)
    source = BLOCKS["tutorial.rst: service.py"].text
    (folder / "service.py").write_text(source.replace("9999", "0"))
    lines = block.text.splitlines()
    first, second = (line.removeprefix("$ ") for line in lines if line.startswith("$ "))
    assert first.startswith("python ")
    assert "sleep 2" in second
    script = "{}\n{}\n".format(
        first.replace("python", shlex.quote(sys.executable), 1),
        second.replace("sleep 2", "read there"),
    )
    package = Path(trio_socketserver.__file__).parent.parent
    with subprocess.Popen(
        ["sh", "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(package)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as terminal:
        assert terminal.stdout is not None
        said = terminal.stdout.readline()
        said += terminal.communicate("\n", timeout=LIMIT)[0]
    assert terminal.returncode == 0
    assert said.splitlines() == lines[2:]


@scenario("tutorial.rst: test_service.py", "tutorial.rst: test it")
def a_test(block: Block, folder: Path) -> None:
    write_secure_programs(folder)
    write_programs(folder, "test_service.py")
    shown = BLOCKS["tutorial.rst: test it"].text.splitlines()
    prompt, *install = shlex.split(shown[0])
    assert (prompt, install) == ("$", ["pip", "install", "pytest", "pytest-trio"])
    prompt, python, *arguments = shlex.split(shown[1])
    assert (prompt, python) == ("$", "python")
    with Program(folder, *arguments) as tests:
        code, printed, complaints = tests.end()
    assert (code, complaints) == (0, "")
    assert printed.splitlines()[-1].startswith(f"{shown[2]} in ")


@contextmanager
def imported_as(name: str, **attributes: object) -> Iterator[None]:
    """Let ``import name`` give a module with these attributes."""
    assert name not in sys.modules
    module = types.ModuleType(name)
    module.__dict__.update(attributes)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]


# -- writing handlers, structured servers --------------------------------------------------


@scenario("handlers.rst: frames.py")
def frames(block: Block, folder: Path) -> None:
    def frame(data: bytes) -> bytes:
        return struct.pack("!I", len(data)) + data

    with Program.of(block, folder) as program:
        address = program.address()
        data = frame(b"one") + frame(b"") + frame(bytes(65536))
        assert exchange(address, data) == data
        with connect(address) as greedy:
            greedy.sendall(struct.pack("!I", 65537))
            assert greedy.recv(1) == b""
        assert exchange(address, b"\0\0\0\5half") == b""
        assert exchange(address, b"\0\0") == b""
        program.end_quietly()


@scenario("handlers.rst: plain.py")
def plain(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        assert exchange(program.address(), b"no lines here") == b"no lines here"
        program.end_quietly()


@scenario("handlers.rst: fragment")
def too_late(block: Block, folder: Path) -> None:
    namespace: dict[str, Any] = {"trio": trio}
    exec(block.text, namespace)
    handler = type(
        "Handler",
        (trio_socketserver.StreamRequestHandler,),
        {"handle": namespace["handle"]},
    )
    virtual = trio.testing.MockClock()

    async def main() -> None:
        async with (
            trio_socketserver.NurseryTCPServer(("127.0.0.1", 0), handler) as server,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(server.serve_forever)
            with connect(server.server_address) as quick:
                quick.sendall(b"here\n")
                assert await in_thread(quick.recv, 99) == b"here\n"
            with connect(server.server_address) as slow:
                await trio.testing.wait_all_tasks_blocked()
                virtual.jump(5)
                assert await in_thread(slow.recv, 99) == b"too late\n"
            await server.shutdown()

    trio.run(main, clock=virtual)


@scenario("handlers.rst: upper.py")
def upper(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(LIMIT)
            client.connect(program.address())
            client.send(b"hello")
            assert client.recv(99) == b"HELLO"
        program.end_quietly()


@scenario("structured.rst: several.py")
def several(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        public, admin = program.address(), program.address()
        assert say(public, "a") == ["a"]
        assert say(public, "b") == ["b"]
        assert say(admin, "?") == ["2 requests"]


# -- handlers that can be cancelled --------------------------------------------------------


@scenario("cancellation.rst: orders.py")
def orders(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        assert exchange(address, b"lamp\npaid\n") == b"reserved, now pay\nyours\n"
        assert say(address, "vase", "no") == ["reserved, now pay", ""]
        assert program.line() == "released vase"
        with connect(address) as client, client.makefile("rb") as answers:
            client.sendall(b"book\n")
            assert answers.readline() == b"reserved, now pay\n"
            program.interrupt()
            assert answers.read() == b""
        assert program.end() == (0, "released book\n", "")


@scenario("cancellation.rst: transfer.py")
def transfer(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        assert say(program.address(), "ann bob 30", "bob ann 1") == ["done", "done"]
        program.end_quietly()

    # Where the second statement fails, the first has not been done either.
    namespace = loaded(block)
    bank = namespace["Bank"](("127.0.0.1", 0), namespace["Transfer"])

    async def main() -> list[tuple[str, int]]:
        async with bank, trio.open_nursery() as nursery:
            nursery.start_soon(bank.serve_forever)
            assert await in_thread(exchange, bank.server_address, b"ann bob 30\n")
            bank.database.execute(
                "CREATE TRIGGER broken BEFORE UPDATE ON account WHEN new.name = 'bob' "
                "BEGIN SELECT raise(ABORT, 'broken'); END"
            )
            assert not await in_thread(exchange, bank.server_address, b"ann bob 30\n")
            await bank.shutdown()
            return list(bank.database.execute("SELECT * FROM account"))

    assert trio.run(main) == [("ann", 70), ("bob", 130)]


class RecordingConnection:
    """A database that is awaited, and notes what it has been asked."""

    def __init__(self, broken: str = "") -> None:
        self.done: list[str] = []
        self.broken = broken

    async def execute(self, statement: str) -> None:
        await trio.sleep(1)
        if statement == self.broken:
            await trio.sleep_forever()
        self.done.append(statement)


@scenario("cancellation.rst: transaction")
def transaction(block: Block, folder: Path) -> None:
    namespace: dict[str, Any] = {"trio": trio, "asynccontextmanager": asynccontextmanager}
    exec(block.text, namespace)

    async def changed(connection: RecordingConnection, patience: float) -> bool:
        """Tell whether it was cancelled."""
        with trio.move_on_after(patience) as scope:
            async with namespace["transaction"](connection):
                await connection.execute("CHANGE")
        return scope.cancelled_caught

    async def main() -> None:
        for patience, done in (
            (0.5, ["ROLLBACK"]),
            (1.5, ["BEGIN", "ROLLBACK"]),
            (2.5, ["BEGIN", "CHANGE", "COMMIT"]),
            (math.inf, ["BEGIN", "CHANGE", "COMMIT"]),
        ):
            connection = RecordingConnection()
            assert await changed(connection, patience) is (patience < 2)
            assert connection.done == done
        connection = RecordingConnection(broken="COMMIT")
        with pytest.raises(trio.TooSlowError):
            await changed(connection, math.inf)
        assert connection.done == ["BEGIN", "CHANGE", "ROLLBACK"]
        connection = RecordingConnection(broken="ROLLBACK")
        assert await changed(connection, 1.5)
        assert connection.done == ["BEGIN"]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@scenario("cancellation.rst: ticker.py")
def ticker(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        assert exchange(address, b"").endswith(b"bye\n")
        with connect(address) as client, client.makefile("rb") as answers:
            assert answers.readline() == b"tick 1\n"
            client.sendall(b"0.01\n")
            assert [answers.readline() for _ in range(3)] == [
                b"tick %d\n" % number for number in (2, 3, 4)
            ]
            program.interrupt()
            assert answers.read().endswith(b"bye\n")
        assert program.end() == (0, "", "")


@scenario("cancellation.rst: test_orders.py")
def cancelled_everywhere(block: Block, folder: Path) -> None:
    pytest.importorskip("trio_socketserver.testing")
    source = BLOCKS["cancellation.rst: orders.py"].text
    unshielded = source.replace(", shield=True", "")
    assert unshielded != source
    for text, passes in ((source, True), (unshielded, False)):
        orders = loaded(
            dataclasses.replace(BLOCKS["cancellation.rst: orders.py"], text=text)
        )
        with imported_as("orders", Order=orders["Order"], Shop=orders["Shop"]):
            test = loaded(block)["test_nothing_stays_reserved"]
        clock = trio.testing.MockClock(autojump_threshold=0)
        if passes:
            trio.run(test, clock, clock=clock)
        else:
            with pytest.raises(AssertionError):
                trio.run(test, clock, clock=clock)


@pytest.mark.parametrize(
    "phrase",
    [
        f"``cleanup_timeout`` seconds ({trio_socketserver.BaseServer.cleanup_timeout:g})",
        f"after twice ``cleanup_timeout`` and {EXIT_TIMEOUT:g} s",
    ],
)
def test_numbers_of_cancellation(phrase: str) -> None:
    text = " ".join((ROOT / "docs" / "cancellation.rst").read_text().split())
    assert phrase in text


def test_the_table_of_what_was_done_is_complete() -> None:
    """Every coroutine method that talks to the peer stands in the table."""
    table = rst_tables("cancellation.rst", "Where it can happen")
    (rows,) = table.values()
    named = set(re.findall(r"\w+", " ".join(cell for cell, _ in rows)))
    awaited = {
        name
        for owner in (
            trio_socketserver.StreamSocket,
            trio_socketserver.DatagramSocket,
            StreamReader,
            StreamWriter,
        )
        for name, method in inspect.getmembers(owner, inspect.iscoroutinefunction)
        if not name.startswith("_")
    }
    assert awaited - named == {"receive_idle"}


# -- porting: the same client, before and after --------------------------------------------


@scenario(
    "porting.rst: notes_before.py",
    "porting.rst: notes_whole.py",
    "porting.rst: notes_server.py",
    "porting.rst: notes_after.py",
)
def notes(block: Block, folder: Path) -> None:
    # The whole server is imported from the first program.
    before = BLOCKS["porting.rst: notes_before.py"].text
    (folder / "notes_before.py").write_text(re.sub(r"\b9999\b", "0", before))
    with Program.of(block, folder) as program:
        address = program.address()
        with connect(address) as first, first.makefile("rb") as answers:
            first.sendall(b"add milk\nadd bread\nmumble\nshow\n")
            assert answers.readline() == b"note 1\n"
            assert answers.readline() == b"note 2\n"
            assert answers.readline() == b"milk, bread\n"
            assert say(address, "add tea", "show") == ["note 3", "milk, bread, tea"]
            with socket.create_connection(address, LIMIT, ("127.0.0.2", 0)) as stranger:
                assert stranger.recv(1) == b""
        assert exchange(address, b"add last\nstop\nadd none\n") == b"note 4\n"
        assert program.end() == (0, "", "")


def test_the_handler_that_is_kept_is_the_same() -> None:
    """Step two of the guide leaves it alone, and step three what is no handler."""

    def classes(name: str) -> dict[str, str]:
        tree = ast.parse(BLOCKS[f"porting.rst: {name}"].text)
        return {n.name: ast.unparse(n) for n in tree.body if isinstance(n, ast.ClassDef)}

    before, server, after = map(
        classes, ["notes_before.py", "notes_server.py", "notes_after.py"]
    )
    assert server["Notes"] == before["Notes"]
    without_lock = after["NotesServer"].splitlines()
    kept = server["NotesServer"].splitlines()
    assert [line for line in kept if "lock" not in line] == without_lock


@scenario("porting.rst: background_before.py", "porting.rst: background_after.py")
def background(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        assert say(address, "one", "two") == ["thank you"] * 2
        assert say(address, "three") == ["thank you"]
        assert program.end() == (0, "3 lines\n", "")


@scenario("porting.rst: hooks_before.py", "porting.rst: hooks_after.py")
def hooks(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        for divisor, quotient, error in [
            (b"5", b"20\n", []),
            (b"0", b"", ["error: integer division or modulo by zero"]),
            (b"100", b"1\n", []),
        ]:
            assert exchange(address, divisor) == quotient
            lines = ["begin", *error, "end"]
            assert [program.line() for _ in lines] == lines


@scenario("porting.rst: by_hand_before.py", "porting.rst: by_hand_after.py")
def by_hand(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(LIMIT)
            client.connect(program.address())
            for word in (b"one", b"two", b"three"):
                client.send(word)
                assert client.recv(99) == word.upper()
        assert program.end() == (0, "three datagrams\n", "")


def test_each_program_to_port_has_one_that_is_ported() -> None:
    names = [block.name for block in BLOCKS.values() if block.document == "porting.rst"]
    before = {n.removesuffix("_before.py") for n in names if n.endswith("_before.py")}
    after = {n.removesuffix("_after.py") for n in names if n.endswith("_after.py")}
    assert before == after
    assert len(before) == 4
    for name in before:
        for when, theirs in (("before", "socketserver"), ("after", "trio_socketserver")):
            text = BLOCKS[f"porting.rst: {name}_{when}.py"].text
            assert ("trio" in text) == (when == "after")
            assert f"import {theirs}" in text or f"from {theirs} import" in text
        before_driver, after_driver = (
            SCENARIOS[f"porting.rst: {name}_{when}.py"] for when in ("before", "after")
        )
        assert before_driver is after_driver


def test_the_table_of_porting_names_what_there_is() -> None:
    """Each hook of the standard library has a row, and each name of ours exists."""
    (rows,) = rst_tables("porting.rst", "What you had, what you write").values()
    had = " ".join(cell for cell, _ in rows)
    for hook in {*COROUTINE_HOOKS, "daemon_threads", "block_on_close", "timeout"}:
        assert re.search(rf"\b{hook}\b", had), hook
    assert all(cell for row in rows for cell in row)
    (pitfalls,) = rst_tables("porting.rst", "What became of the pitfalls").values()
    assert all(len(row) == 3 and all(row) for row in pitfalls)


# -- blocking handlers ---------------------------------------------------------------------


@scenario("blocking.rst: facts.py")
def facts(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        first, later = first_and_later_facts(program.address())
        assert later == BLOCKS["blocking.rst: facts"].text
        assert first == later.replace("before: True", "before: False")
        program.end_quietly()


def first_and_later_facts(address: Any) -> tuple[str, str]:
    """Ask until a thread answers that has answered before.

    A thread is spare some time after its client has seen the connection end.
    """
    first = later = exchange(address, b"").decode()
    for _ in range(100):
        if later != first:
            break
        later = exchange(address, b"").decode()
    return first, later


def test_facts_of_a_whole_server() -> None:
    """What the porting guide says of the same handler under `serve_blocking`."""
    namespace = loaded(BLOCKS["blocking.rst: facts.py"])

    class TellingServer(socketserver.ThreadingTCPServer):
        pass

    namespace["TellingServer"] = TellingServer
    server = TellingServer(("127.0.0.1", 0), namespace["Tell"])

    async def main() -> str:
        with trio.fail_after(LIMIT):
            async with trio.open_nursery() as nursery:
                address = await nursery.start(trio_socketserver.serve_blocking, server)
                _, later = await in_thread(first_and_later_facts, address)
                nursery.cancel_scope.cancel()
        return later

    expected = BLOCKS["blocking.rst: facts"].text
    for mix_in, holds in (("old", True), ("new", False)):
        expected = expected.replace(
            f"the {mix_in} mix-in: {not holds}", f"the {mix_in} mix-in: {holds}"
        )
    assert trio.run(main) == expected
    assert type(server) is TellingServer


@scenario("blocking.rst: tickets.py")
def tickets(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        assert [exchange(address, b"") for _ in range(3)] == [
            b"ticket %d\n" % number for number in (1, 2, 3)
        ]


@scenario("blocking.rst: context.py")
def context(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        for _ in range(2):
            assert exchange(address, b"") == b"hello, neighbour\n"
            with socket.create_connection(address, LIMIT, ("127.0.0.2", 0)) as stranger:
                assert stranger.recv(99) == b"hello, nobody\n"
        program.end_quietly()


@scenario("blocking.rst: computing.py")
def computing(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        with connect(program.address()) as client:
            assert client.recv(99) == b"begun\n"
            program.interrupt()
            assert client.recv(99) == b""
        assert program.end() == (0, "", "")


@scenario("blocking.rst: pages.py")
def pages(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        for _ in range(2):
            status, _, page = exchange(address, b"GET / HTTP/1.0\r\n\r\n").partition(
                b"\r\n"
            )
            assert status == b"HTTP/1.0 200 OK"
            assert page.endswith(b"\r\n\r\na page\n")
        with connect(address) as silent:
            stopped = exchange(address, b"POST / HTTP/1.0\r\n\r\n")
            assert stopped.startswith(b"HTTP/1.0 204 ")
            assert silent.recv(1) == b""
        assert program.end() == (0, "shut down\n", "")


# -- TLS -----------------------------------------------------------------------------------

AUTHORITY = trustme.CA()


def write_certificates(folder: Path) -> None:
    """Write the files that the programs about TLS read."""
    issued = AUTHORITY.issue_cert("127.0.0.1", "example.org")
    (folder / "cert.pem").write_bytes(issued.cert_chain_pems[0].bytes())
    issued.private_key_pem.write_to_path(folder / "key.pem")
    AUTHORITY.cert_pem.write_to_path(folder / "ca.pem")


def shake_hands(
    address: tuple[str, int], identity: str | None = None, name: str = "127.0.0.1"
) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    if identity is not None:
        AUTHORITY.issue_cert(identity).configure_cert(context)
    return context.wrap_socket(
        connect(address), server_hostname=name, suppress_ragged_eofs=False
    )


@scenario("tls.rst: echo_tls.py")
def echo_tls(block: Block, folder: Path) -> None:
    write_certificates(folder)
    with Program.of(block, folder) as program:
        with shake_hands(program.address()) as client:
            client.sendall(b"hello\n")
            assert client.recv(99) == b"hello\n"
            program.interrupt()
            assert client.recv(99) == b""
        assert program.end() == (0, "", "")
    (folder / "key.pem").unlink()
    with Program.of(block, folder) as program:
        code, stdout, stderr = program.end()
        assert (code, stdout) == (1, "")
        assert "FileNotFoundError" in stderr


@scenario("tls.rst: who.py")
def who(block: Block, folder: Path) -> None:
    write_certificates(folder)
    with Program.of(block, folder) as program:
        address = program.address()
        with shake_hands(address, "ann@example.org", "example.org") as client:
            assert client.recv(99) == b"ann@example.org asks example.org\n"
        with shake_hands(address, "bob@example.org") as client:
            assert client.recv(99) == b"bob@example.org asks None\n"
        with shake_hands(address) as nobody, pytest.raises(ssl.SSLError):
            nobody.recv(99)
        program.end_quietly()


@scenario("tls.rst: reload.py")
def reload(block: Block, folder: Path) -> None:
    write_certificates(folder)
    certificates = []
    with Program.of(block, folder) as program:
        address = program.address()
        for _ in range(2):
            with shake_hands(address) as client:
                assert client.recv(99) == b"hello\n"
                certificates.append(client.getpeercert(binary_form=True))
            write_certificates(folder)
            program.process.send_signal(signal.SIGHUP)
            assert program.line() == "reloaded"
        key = (folder / "key.pem").read_text()
        write_certificates(folder)
        (folder / "key.pem").write_text(key)  # As if a renewal had come half way.
        program.process.send_signal(signal.SIGHUP)
        assert program.line().startswith("not reloaded: ")
        with shake_hands(address) as client:
            assert client.recv(99) == b"hello\n"
    assert certificates[0] != certificates[1]


@pytest.mark.parametrize(
    "phrase",
    [
        f"``ssl_handshake_timeout``, {HANDSHAKE_TIMEOUT:g} seconds",
        f"an asynchronous handshake {({1: 'one second'})[FIRST_LINE_GRACE]}",
    ],
)
def test_numbers_of_tls(phrase: str) -> None:
    assert phrase in " ".join((ROOT / "docs" / "tls.rst").read_text().split())


# -- dispatchers and processes -------------------------------------------------------------


@scenario("dispatchers.rst: combinations")
def combinations(block: Block, folder: Path) -> None:
    namespace = dict(vars(trio_socketserver))
    exec(block.text, namespace)
    made = [name for name in namespace if name not in vars(trio_socketserver)]
    assert (
        made
        == ["__builtins__", "OneAtATime", "Tasks", "Threads", "Children", "Workers"][
            "__builtins__" in vars(trio_socketserver) :
        ]
    )
    ready_made = dict(re.findall(r"class (\w+).*# Or (\w+)\.$", block.text, re.MULTILINE))
    assert len(ready_made) == 3
    for name, public in ready_made.items():
        assert namespace[name].__mro__[1:] == getattr(trio_socketserver, public).__mro__[1:]


@scenario("processes.rst: divide.py")
def divide(block: Block, folder: Path) -> None:
    expected = BLOCKS["processes.rst: divided"].text.splitlines()
    with Program.of(block, folder) as program:
        address = program.address()
        answers = [exchange(address, number) for number in (b"5", b"0", b"13")]
        assert answers == [b"20\n", b"", b""]
        printed = [program.line() for _ in expected]
        assert [re.sub(r"\b\d{2,}\b", "4711", line) for line in printed] == expected
        program.end_quietly()


@contextmanager
def standing_still(pid: int) -> Iterator[None]:
    """Keep a process from running."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@scenario("processes.rst: visits.py")
def visits(block: Block, folder: Path) -> None:
    handler = re.sub(
        r"^(?P<indent> +)await self\.wfile",
        r"\g<indent>import os; await self.wfile.write(b'%d ' % os.getpid())\n\g<0>",
        block.text,
        flags=re.MULTILINE,
    )
    assert handler != block.text
    with Program.of(dataclasses.replace(block, text=handler), folder) as program:
        address = program.address()
        one, told = exchange(address, b"").split(b" ", 1)
        assert told == b"1 here, 1 in all\n"
        with standing_still(int(one)):  # So the other one answers.
            others = [exchange(address, b"").split(b" ", 1) for _ in range(2)]
        assert [told for _, told in others] == [
            b"1 here, 2 in all\n",
            b"2 here, 3 in all\n",
        ]
        (other,) = {pid for pid, _ in others}
        assert len({int(one), int(other), program.process.pid}) == 3
        program.end_quietly()


@scenario("processes.rst: lock")
def lock(block: Block, folder: Path) -> None:
    source = (
        "from trio_socketserver import PreforkingMixIn, ThreadingTCPServer, run\n"
        f"import threading\n\n{block.text}\ndef handler(*arguments): pass\n\n"
        'if __name__ == "__main__":\n    run(LockingServer(("127.0.0.1", 9999), handler))\n'
    )
    with Program.of(dataclasses.replace(block, text=source), folder) as program:
        program.address()
        code, stdout, stderr = program.end()
    assert (code, stdout) == (1, "")
    expected = " ".join(BLOCKS["processes.rst: unpicklable"].text.split())
    assert stderr.splitlines()[-1] == expected


@pytest.mark.skipif(sys.version_info < (3, 12), reason="came with Python 3.12")
def test_the_warning_of_forking_with_threads() -> None:
    """It is Python's, in these words."""
    expected = " ".join(BLOCKS["processes.rst: warning"].text.split())
    program = (
        "import os, threading; done = threading.Event()\n"
        "threading.Thread(target=done.wait).start(); pid = os.fork()\n"
        "if not pid: os._exit(0)\n"
        "done.set(); os.waitpid(pid, 0)"
    )
    shown = subprocess.run(
        [sys.executable, "-W", "always", "-c", program],
        capture_output=True,
        text=True,
        timeout=LIMIT,
    ).stderr
    (line,) = (line for line in shown.splitlines() if "DeprecationWarning" in line)
    assert re.sub(r"pid=\d+", "pid=4711", line).endswith(f"DeprecationWarning: {expected}")


@pytest.mark.parametrize(
    ("server", "limit"),
    [
        (trio_socketserver.TCPServer, "1"),
        (trio_socketserver.NurseryMixIn, "max_tasks"),
        (trio_socketserver.ThreadingMixIn, "max_threads"),
        (trio_socketserver.ForkingMixIn, "max_children"),
        (trio_socketserver.PreforkingMixIn, "workers"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_limits_of_dispatchers(server: type, limit: str) -> None:
    (rows,) = rst_tables("dispatchers.rst", "Where it runs").values()
    cells = {name.strip("`"): cell for name, *_, cell in rows}
    cell = cells[server.__name__ if "MixIn" in server.__name__ else "no mix-in"]
    match limit:
        case "1":
            assert cell == limit
        case "workers":
            assert cell.startswith("``workers`` \N{MULTIPLICATION SIGN} ")
        case "max_tasks":
            datagrams = trio_socketserver.NurseryUDPServer.max_tasks
            assert server.max_tasks is None  # type: ignore[attr-defined]
            assert cell == f"``max_tasks``: none; for datagrams {datagrams}"
        case _:
            assert cell == f"``{limit}``: {getattr(server, limit)}"


def test_dispatchers_are_those_there_are() -> None:
    """Each mix-in is in each table that should have it."""
    mix_ins = {name for name in trio_socketserver.__all__ if name.endswith("MixIn")}
    for section in ("By what the handler does", "Where it runs"):
        (rows,) = rst_tables("dispatchers.rst", section).values()
        assert all(all(row) for row in rows)
        assert mix_ins <= set(re.findall(r"`(\w+MixIn)`", str(rows)))


@pytest.mark.parametrize(
    "phrase",
    [
        f"after a pause of {RESTART_DELAY:g} s",
        f"which doubles up to {LONGEST_RESTART_DELAY:g} s",
        f"end within {STEADY_AFTER:g} s of their start",
        f"After {START_ATTEMPTS} of those in a row",
        f"after twice ``cleanup_timeout`` and {EXIT_TIMEOUT:g} s is",
        f"under the name ``{MAIN_AGAIN}``",
        {1: "A worker takes one request each time it wakes up"}[WORKER_BATCH],
        f"stay for {WORDS[trio._core._thread_cache.IDLE_TIMEOUT]} seconds after",
    ],
)
def test_numbers_of_processes(phrase: str) -> None:
    assert phrase in " ".join((ROOT / "docs" / "processes.rst").read_text().split())


STDLIB_QUEUE = socketserver.TCPServer.request_queue_size


@pytest.mark.parametrize(
    ("document", "phrase"),
    [
        ("blocking.rst", f"end after {WORDS[IDLE_SECONDS]} seconds"),
        ("blocking.rst", f"is {trio_socketserver.ThreadingMixIn.max_threads}. It bounds"),
        ("blocking.rst", f"{WORDS[SHUTDOWN_TIMEOUT]} seconds later, SIGKILL"),
        ("blocking.rst", f"abandoned after {WORDS[DAEMON_GRACE]} second"),
        ("blocking.rst", f"{WORDS[STDLIB_QUEUE]} connections in the queue"),
        (
            "porting.rst",
            f"``max_threads`` is {trio_socketserver.ThreadingMixIn.max_threads}",
        ),
        ("porting.rst", f"``max_tasks`` = {trio_socketserver.NurseryUDPServer.max_tasks}"),
        ("porting.rst", f"``request_queue_size`` is {STDLIB_QUEUE}: in a burst"),
        ("porting.rst", f"It is {trio_socketserver.TCPServer.request_queue_size}."),
    ],
)
def test_numbers_of_threads(document: str, phrase: str) -> None:
    assert phrase in " ".join((ROOT / "docs" / document).read_text().split())


# -- names and numbers ---------------------------------------------------------------------


def rst_tables(document: str, section: str) -> dict[str, list[list[str]]]:
    """Return the tables of a section by their titles: the cells, without the header."""
    text = (ROOT / "docs" / document).read_text()
    text = re.split(r"^(.+)\n-+\n", text, flags=re.MULTILINE)[
        1 + re.findall(r"^(.+)\n-+\n", text, re.MULTILINE).index(section) * 2 + 1
    ]
    tables = {}
    for table in re.finditer(
        r"^\.\. list-table::(?P<title>.*)\n(?:   :.*\n)*\n(?P<rows>(?:   .*\n|\n)+)",
        text,
        re.MULTILINE,
    ):
        rows = re.split(r"^   \* - ?", table["rows"], flags=re.MULTILINE)[2:]
        cells = (re.split(r"^     -(?: |$)", row, flags=re.MULTILINE) for row in rows)
        tables[table["title"].strip()] = [
            [" ".join(c.split()) for c in row] for row in cells
        ]
    return tables


ATTRIBUTES = [
    (class_name, *row)
    for class_name, rows in rst_tables("differences.rst", "Defaults").items()
    for row in rows
]
"""The class, the attribute, its default here and in the standard library, the reason."""


def literal(cell: str) -> Any:
    """Evaluate a cell that is one literal, or "cores"."""
    if cell == "cores":
        return len(os.sched_getaffinity(0))
    match = re.fullmatch(r"``(.*)``", cell)
    assert match is not None, cell
    return eval(match[1], {"inf": math.inf, **vars(socket)})


@pytest.mark.parametrize("row", ATTRIBUTES, ids=lambda row: f"{row[0]}.{row[1].strip('`')}")
def test_defaults(row: tuple[str, ...]) -> None:
    class_name, cell, here, there, why = row
    attribute = cell.strip("`")
    assert why
    assert getattr(getattr(trio_socketserver, class_name), attribute) == literal(here)
    owner = getattr(socketserver, class_name, None)
    if there.startswith("the mix-ins: "):
        owner, there = socketserver.ThreadingMixIn, there.partition(": ")[2]
        assert getattr(socketserver.ForkingMixIn, attribute) == literal(there)
    if there:
        assert getattr(owner, attribute) == literal(there)
    else:
        assert not hasattr(owner, attribute)


def test_every_attribute_is_in_a_table() -> None:
    roots = trio_socketserver.BaseServer, trio_socketserver.BaseRequestHandler
    classes = {
        base
        for found in vars(trio_socketserver).values()
        if inspect.isclass(found) and issubclass(found, roots)
        for base in found.__mro__
        if base is not object
    }
    defined = {
        name
        for owner in classes
        for name in vars(owner)
        if not name.startswith("_")
        if isinstance(getattr(owner, name), (bool, int, float, str, type(None)))
    }
    assert {cell.strip("`") for _, cell, *_ in ATTRIBUTES} == defined


def test_colours_of_hooks() -> None:
    text = (ROOT / "docs" / "differences.rst").read_text()
    section = text.partition("\nHooks that may wait are coroutine methods\n")[2]
    coroutines, plain_hooks, *_ = re.findall(r"``([\w\s]+)``", section)
    assert set(coroutines.split()) == set(COROUTINE_HOOKS)
    assert set(plain_hooks.split()) == set(PLAIN_HOOKS)


def test_what_a_request_has_not() -> None:
    text = (ROOT / "docs" / "differences.rst").read_text()
    section = text.partition("\nHooks and asynchronous handlers get a `StreamSocket`")[2]
    missing, *_ = re.findall(r"``([\w\s]+)``", section)
    plain = {name for name in dir(socket.socket) if not name.startswith("_")}
    gone = plain - set(dir(trio_socketserver.StreamSocket))
    # What nobody calls on a connection that was accepted, and others by the same name.
    gone -= {"accept", "bind", "connect", "connect_ex", "listen", "sendto", "sendmsg_afalg"}
    gone -= {"get_inheritable", "set_inheritable", "recvfrom_into", "recvmsg_into"}
    gone -= {"share", "ioctl"}  # On Windows.
    assert set(missing.split()) == gone


@pytest.mark.parametrize("mix_in", ["NurseryMixIn", "ThreadingMixIn", "ForkingMixIn"])
def test_a_mix_in_has_its_effect_wherever_it_stands(mix_in: str) -> None:
    chosen = getattr(trio_socketserver, mix_in)
    behind = type("Behind", (trio_socketserver.TCPServer, chosen), {})
    assert behind._limit is chosen._limit
    plain = socketserver.TCPServer
    there = type("There", (plain, socketserver.ThreadingMixIn), {})
    assert there.process_request is plain.process_request


def test_names_of_the_readme() -> None:
    table = README.read_text().partition("\n## Names\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", table, re.MULTILINE))
    names = {what: set(re.findall(r"`(\w+)`", cell)) for what, cell in rows.items()}
    assert set().union(*names.values()) == set(trio_socketserver.__all__)
    there = names["from `socketserver`"]
    # These two came with Python 3.12.
    newer = {"ForkingUnixStreamServer", "ForkingUnixDatagramServer"}
    assert there == set(trio_socketserver.__all__) & {*dir(socketserver), *newer}
    exceptions = names["exceptions"]
    assert all(
        issubclass(getattr(trio_socketserver, name), Exception) for name in exceptions
    )


UNNAMED = {"StreamReader", "StreamWriter", "TLSSocket"}
"""What users meet without a public name."""


def test_reference_covers_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.rst").read_text()
    directives = re.compile(
        r"^\.\. auto(?:class|exception|function):: (\w+)$", re.MULTILINE
    )
    described = directives.findall(text)
    assert len(described) == len(set(described))
    helpers = trio_socketserver.testing.__all__
    assert set(described) == {*trio_socketserver.__all__, *helpers, *UNNAMED}


def test_reference_covers_the_command() -> None:
    (rows,) = rst_tables("reference.rst", "The command").values()
    listed = {option for cell, _ in rows for option in re.findall(r"--?[a-z][a-z-]*", cell)}
    parser = make_parser()
    known = {option for action in parser._actions for option in action.option_strings}
    assert listed == known - {"-h", "--help"}
    meanings = {re.findall(r"--[\w-]+", cell)[0]: meaning for cell, meaning in rows}
    assert f"without it ``{DEFAULT_BIND}``" in meanings["--bind"]
    assert f"without it {GRACEFUL_TIMEOUT:g}" in meanings["--graceful-timeout"]
    dispatch = next(a for a in parser._actions if a.dest == "dispatch")
    assert "{" + ",".join(map(str, dispatch.choices or [])) + "}" in str(rows)
    assert dispatch.default is None
    without = re.findall(r"``(\w+)`` for an? (\w+)", meanings["--dispatch"])
    assert dict(without) == {
        server.__name__.removesuffix("TCPServer").lower(): colour
        for server, colour in (
            (type_served("trio_socketserver._cli_server:EchoStream"), "asynchronous"),
            (type_served("http.server:SimpleHTTPRequestHandler"), "blocking"),
        )
    }


def type_served(handler: str) -> type:
    """Return the class of the server that the command makes for a handler."""
    server = make_server(make_parser().parse_args([handler, "--bind", "127.0.0.1:0"]))
    with server.socket:  # type: ignore[attr-defined]
        return type(server)


@pytest.mark.parametrize(
    ("document", "phrase"),
    [
        ("structured.rst", f"takes at most {BATCH} requests per wake-up"),
        ("structured.rst", f"with `ForkingMixIn` at most {FORKING_BATCH},"),
        ("differences.rst", f"at most (with ``ForkingMixIn`` {FORKING_BATCH})"),
        ("differences.rst", f"arrived together, {BATCH} requests at most"),
        ("structured.rst", f"for {BACK_OFF_FIRST * 1000:g} ms at first"),
        ("structured.rst", f"up to {BACK_OFF_LIMIT:g} s"),
        ("handlers.rst", f"only at every {LINES_IN_A_ROW}th"),
        ("handlers.rst", {1: "gets one second for its first line"}[FIRST_LINE_GRACE]),
        ("handlers.rst", f"``max_line_size`` ({MAX_LINE_SIZE >> 20} MiB)"),
        ("handlers.rst", f"until there are {WRITE_BUFFER_SIZE >> 10} KiB"),
        ("differences.rst", f"it means {RECEIVE_SIZE >> 10} KiB here"),
        ("differences.rst", f"make it {GRACEFUL_TIMEOUT:g} s where it is infinite"),
    ],
)
def test_numbers_in_prose(document: str, phrase: str) -> None:
    assert phrase in " ".join((ROOT / "docs" / document).read_text().split())


def test_changelog_and_paths() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[([^]]+)\]", changelog, re.MULTILINE)[0] == version
    for path in re.findall(r"`((?:docs|examples)/[\w./]*|LICENSE)`", README.read_text()):
        assert (ROOT / path).exists(), path


# -- the picture ---------------------------------------------------------------------------


def load_picture() -> Any:
    path = ROOT / "docs" / "_extensions" / "loop_picture.py"
    spec = importlib.util.spec_from_file_location("loop_picture", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", ["WIDE", "TALL"])
def test_picture_shows_every_transition(layout: str) -> None:
    picture = load_picture()
    svg = ET.fromstring(picture.draw(layout=getattr(picture, layout)))
    texts = [element.text for element in svg.iter("text")]
    assert [text for text in texts if text in LoopState.__members__] == [
        state.name for state in LoopState
    ]
    moves = {(a, b) for (a, _), b in TRANSITIONS.items() if a is not b}
    assert len(list(svg.iter("path"))) == len(list(svg.iter("polygon"))) == len(moves)
    captions = [
        line
        for move in moves
        for (state, event), target in TRANSITIONS.items()
        if (state, target) == move
        for line in picture.CAPTIONS[event]
    ]
    drawn = [
        element.text for element in svg.iter("text") if element.get("class") == "event"
    ]
    assert sorted(drawn) == sorted(captions)
    loops = [
        element.text for element in svg.iter("text") if element.get("class") == "stays"
    ]
    stays = [(s, e) for (s, e), target in TRANSITIONS.items() if s is target]
    assert sum(text.count(",") + 1 for text in loops) == len(stays)


def test_picture_follows_the_table() -> None:
    """It is drawn from what it is given: without a transition, without its arrow."""
    picture = load_picture()
    fewer = dict(TRANSITIONS)
    del fewer[LoopState.FRESH, LoopEvent.STOP]
    whole, less = (
        len(list(ET.fromstring(picture.draw(table)).iter("path")))
        for table in (TRANSITIONS, fewer)
    )
    assert less == whole - 1


@pytest.mark.parametrize("layout", ["WIDE", "TALL"])
def test_everything_is_inside_the_picture_and_no_caption_on_another(layout: str) -> None:
    """Widths of text are guessed, and generously."""
    picture = load_picture()
    svg = ET.fromstring(picture.draw(layout=getattr(picture, layout)))
    *_, width, height = map(float, svg.get("viewBox", "").split())
    for path in svg.iter("path"):
        start, control, end = (
            tuple(map(float, point.split(",")))
            for point in re.findall(r"[\d.-]+,[\d.-]+", path.get("d", ""))
        )
        middle = [(a + 2 * c + b) / 4 for a, c, b in zip(start, control, end, strict=True)]
        assert 0 < middle[0] < width
        assert 0 < middle[1] < height
    boxes = []
    for element in svg.iter("text"):
        x, y = float(element.get("x", "")), float(element.get("y", ""))
        half = len(element.text or "") * 7.5 / 2
        boxes.append((x - half, x + half, y))
        assert -6 < x - half < x + half < width + 6, element.text
        assert 8 < y < height
    for index, (left, right, y) in enumerate(boxes):
        for other_left, other_right, other_y in boxes[:index]:
            apart = right < other_left or other_right < left
            assert apart or abs(y - other_y) > 10


def test_one_picture_is_shown_on_each_screen() -> None:
    style = (ROOT / "docs" / "_static" / "style.css").read_text()
    queries = re.findall(
        r"@media \((min|max)-width: ([\d.]+)rem\) \{\s*\.loop\.(\w+) \{\s*display: none;",
        style,
    )
    (least, most) = (
        next(float(size) for side, size, name in queries if (side, name) == hidden)
        for hidden in (("min", "tall"), ("max", "wide"))
    )
    assert 0 < least - most < 0.1
    names = [layout.name for layout in load_picture().LAYOUTS]
    assert sorted(names) == sorted(name for *_, name in queries)


def test_table_under_the_picture() -> None:
    lines = load_picture().tabulate()
    cells = [line.partition("- ")[2] for line in lines if "- " in line][
        1 + len(LoopEvent) :
    ]
    for state in LoopState:
        first, *targets = cells[: 1 + len(LoopEvent)]
        del cells[: 1 + len(LoopEvent)]
        assert first.startswith(f"**{state.name}**")
        for event, shown in zip(LoopEvent, targets, strict=True):
            target = TRANSITIONS.get((state, event))
            assert shown == ("error" if target is None else target.name)
    assert not cells


# -- deploying -----------------------------------------------------------------------------


@scenario("deploying.rst: activated.py")
def activated(block: Block, folder: Path) -> None:
    text = re.sub("fileno=3", "fileno=int(sys.argv[1])", "import sys\n" + block.text)
    (folder / "activated.py").write_text(text)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        descriptor = listener.fileno()
        os.set_inheritable(descriptor, True)
        with running(
            str(folder / "activated.py"), str(descriptor), pass_fds=[descriptor]
        ) as process:
            assert exchange(listener.getsockname(), b"") == b"hello\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait() == 0


# -- testing -------------------------------------------------------------------------------


@scenario("testing.rst: greeter.py")
def greeter(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        assert exchange(program.address(), b"Ann\n") == b"Hello, Ann\nGoodbye.\n"
        program.end_quietly()


@scenario(
    "testing.rst: test_greeter.py",
    "testing.rst: test_guests.py",
    "testing.rst: test_upper.py",
    "testing.rst: test_cancellation.py",
    "testing.rst: test_serving.py",
    "testing.rst: test_in_thread.py",
)
def run_tests_of_the_page(block: Block, folder: Path) -> None:
    (folder / "greeter.py").write_text(BLOCKS["testing.rst: greeter.py"].text)
    (folder / block.name).write_text(block.text)
    options = ["-o", "trio_mode=true", "-W", "error", "-s"]
    with Program(folder, "-m", "pytest", *options, block.name) as program:
        code, stdout, stderr = program.end()
    assert (code, stderr) == (0, ""), stdout + stderr
    if block.name == "test_cancellation.py":
        printed = BLOCKS["testing.rst: after test_cancellation.py"].text
        assert printed in stdout.replace(f"{folder}{os.sep}", "")


def test_every_testing_helper_is_described() -> None:
    reference = (ROOT / "docs" / "reference.rst").read_text()
    section = reference.partition("currentmodule:: trio_socketserver.testing\n")[2]
    section = section.partition(".. currentmodule::")[0]
    described = re.findall(r"^\.\. auto(?:function|class):: (\w+)", section, re.MULTILINE)
    assert sorted(described) == sorted(trio_socketserver.testing.__all__)


@pytest.mark.parametrize(
    "phrase",
    [
        f"Cancelled was raised {DELIVERIES_LIMIT} times",
        f"it had not ended {CLEANUP_TIMEOUT:g} s after that",
    ],
)
def test_numbers_of_testing(phrase: str) -> None:
    assert phrase in (ROOT / "docs" / "testing.rst").read_text()


# -- performance ---------------------------------------------------------------------------


@scenario("performance.rst: the benchmark", "performance.rst: the regression check")
def benchmark_command(block: Block, folder: Path) -> None:
    """A test cannot run it all: every option of the page must exist."""
    *install, (_, dash_m, module, *options) = commands(block)
    assert [words[:4] for words in install] in ([], [["python", "-m", "pip", "install"]])
    page = (ROOT / "docs" / "performance.rst").read_text()
    described = subprocess.run(
        [sys.executable, dash_m, module, "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    ).stdout
    for option in [*options, *re.findall(r"``(--[a-z]+)", page)]:
        assert option in described.split("options:")[1].split()
