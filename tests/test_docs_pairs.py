"""The server creation notes, and the examples of the standard library, are true: what
socketserver and this package each do is executed side by side."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
import re
import shlex
import socket
import socketserver
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest
from helpers import connect
from test_docs import (
    BLOCKS,
    ELSEWHERE,
    LAUNCHER,
    LIMIT,
    ROOT,
    SCENARIOS,
    Block,
    Program,
    exchange,
    rst_tables,
    say,
    scenario,
    shell,
)

import trio_socketserver

EXAMPLES = "stdlib_examples.rst"
WHEN = ("before", "after")
NOTES = (ROOT / "docs" / "creation_notes.rst").read_text()


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, block in BLOCKS.items()
        if block.language != "text" and block.document in ELSEWHERE
    ],
)
def test_block(name: str, tmp_path: Path) -> None:
    SCENARIOS[name](BLOCKS[name], tmp_path)


def rewritten(block: Block, old: str, new: str) -> Block:
    """Return a program with another word in the place of one."""
    assert old in block.text
    return dataclasses.replace(block, text=block.text.replace(old, new))


# -- server creation notes -----------------------------------------------------------------


@scenario("creation_notes.rst: classes")
def classes(block: Block, folder: Path) -> None:
    namespace = dict(vars(trio_socketserver))
    exec(block.text, namespace)
    names = [name for name in trio_socketserver.__all__ if name.endswith("MixIn")]
    assert {mix_in.__name__ for mix_in in namespace["mix_ins"]} == set(names)
    diagram, _, _ = block.text.partition("mix_ins")
    exec(diagram, dict(vars(socketserver)))


def count_of(block: Block, folder: Path) -> tuple[list[bytes], str]:
    """Return what a counting server tells two clients, and the count at its end."""
    with Program.of(block, folder) as program:
        address = program.address()
        told = [exchange(address, b"") for _ in range(2)]
        program.interrupt()
        code, printed, complaints = program.end()
        assert (code, complaints) == (0, "")
        return told, printed


LOST = ([b"1\n", b"1\n"], "count: 0\n")
KEPT = ([b"1\n", b"2\n"], "count: 2\n")


@scenario("creation_notes.rst: count_in_children.py")
def count_in_children(block: Block, folder: Path) -> None:
    assert count_of(block, folder) == LOST
    threads = rewritten(block, "ForkingTCPServer", "ThreadingTCPServer")
    assert count_of(threads, folder) == KEPT


def test_count_in_children_of_the_standard_library(tmp_path: Path) -> None:
    block = BLOCKS["creation_notes.rst: count_in_children.py"]
    there = rewritten(block, "from trio_socketserver", "from socketserver")
    there = rewritten(there, "ForkingTCPServer, run", "ForkingTCPServer")
    two = "for _ in range(2):\n        server.handle_request()"
    there = rewritten(there, "run(server)", f"{two}\n    server.server_close()")
    with Program.of(there, tmp_path) as program:
        address = program.address()
        assert [exchange(address, b"") for _ in range(2)] == LOST[0]
        assert program.end() == (0, LOST[1], "")


@scenario("creation_notes.rst: count_in_tasks.py")
def count_in_tasks(block: Block, folder: Path) -> None:
    assert count_of(block, folder) == KEPT


@scenario("creation_notes.rst: report.py")
def report(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        address = program.address()
        assert exchange(address, b"three words here") == b"text 1: 3 words\n"
        assert exchange(address, b"two more") == b"text 2: 2 words\n"
        program.interrupt()
        assert program.end() == (0, "2 texts, 5 words\n", "")


def test_what_a_child_has_not_counted_is_not_added(tmp_path: Path) -> None:
    block = BLOCKS["creation_notes.rst: report.py"]
    counting = "len(self.rfile.read().split())"
    failing = rewritten(block, counting, f"6 // {counting}")
    with Program.of(failing, tmp_path) as program:
        address = program.address()
        assert exchange(address, b"two words") == b"text 1: 3 words\n"
        assert exchange(address, b"") == b""
        program.interrupt()
        code, printed, complaints = program.end()
        assert (code, printed) == (0, "2 texts, 3 words\n")
        assert complaints.endswith(
            "ZeroDivisionError: integer division or modulo by zero\n"
        )


class Talk:
    """A plain client that says and hears lines."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._socket = connect(address)
        self._answers = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._socket, self._answers:
            pass

    def say(self, data: bytes) -> None:
        self._socket.sendall(data)

    def hear(self) -> bytes:
        """Return the next line."""
        return self._answers.readline()

    def hear_all(self) -> bytes:
        """Return everything to the end."""
        return self._answers.read()

    def ask(self, data: bytes) -> bytes:
        """Say a line, and return the next one."""
        self.say(data)
        return self.hear()

    def leave(self) -> None:
        """Say that nothing more comes, and hear that the server has closed."""
        self._socket.shutdown(socket.SHUT_WR)
        self._answers.read()


PRINTERS = [
    "creation_notes.rst: printer_threads.py",
    "creation_notes.rst: printer_tasks.py",
]


@contextmanager
def two_documents(program: Program) -> Iterator[tuple[Talk, Talk]]:
    """Have a client whose document is being printed, and another with a line to print."""
    address = program.address()
    with Talk(address) as ann:
        assert ann.hear() == b"document 1\n"
        assert ann.ask(b"a1\n") == b"printed\n"
        with Talk(address) as bob:
            assert bob.hear() == b"document 2\n"
            bob.say(b"b1\n")
            yield ann, bob


@scenario(*PRINTERS)
def printer(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        with two_documents(program) as (ann, bob):
            assert ann.ask(b"a2\n") == b"printed\n"
            ann.leave()
            assert bob.hear() == b"printed\n"
            bob.leave()
        printed = ["1: a1", "1: a2", "2: b1"]
        assert [program.line() for _ in printed] == printed
        program.end_quietly()


@pytest.mark.parametrize("name", PRINTERS)
def test_without_its_lock_a_printer_mixes_documents(name: str, tmp_path: Path) -> None:
    text, locks = re.subn(
        r"(async )?with self\.server\.printer", "if True", BLOCKS[name].text
    )
    assert locks == 1
    with Program.of(dataclasses.replace(BLOCKS[name], text=text), tmp_path) as program:
        with two_documents(program) as (ann, bob):
            assert bob.hear() == b"printed\n"
            assert ann.ask(b"a2\n") == b"printed\n"
        printed = ["1: a1", "2: b1", "1: a2"]
        assert [program.line() for _ in printed] == printed


MUCH = 50_000_000
"""Bytes of a download that stops until its client reads; no buffers have as much room."""


def download(address: tuple[str, int], size: int) -> Talk:
    """Ask for *size* bytes, and do not read them."""
    client = Talk(address)
    client.say(b"%d\n" % size)
    return client


@scenario("creation_notes.rst: deaf.py")
def deaf(block: Block, folder: Path) -> None:
    with Program.of(block, folder) as program:
        downloads, admin = program.address(), program.address()
        with download(downloads, MUCH) as slow:
            assert program.line() == f"{MUCH} begins"
            with download(downloads, 5) as quick:
                assert len(slow.hear_all()) == MUCH
                assert quick.hear_all() == bytes(5)
        printed = [f"{MUCH} ends", "5 begins", "5 ends"]
        assert [program.line() for _ in printed] == printed
        with download(downloads, MUCH) as slow:
            assert program.line() == f"{MUCH} begins"
            assert exchange(admin, b"") == b"stopped\n"
            assert len(slow.hear_all()) == MUCH
        assert program.end() == (0, f"{MUCH} ends\nclosed\n", "")


def test_the_deaf_server_hears_with_tasks(tmp_path: Path) -> None:
    block = BLOCKS["creation_notes.rst: deaf.py"]
    where = '(("127.0.0.1", 9999), Download)'
    assert f"``NurseryTCPServer{where}``" in NOTES
    hearing = rewritten(block, f" TCPServer{where}", f" NurseryTCPServer{where}")
    with Program.of(hearing, tmp_path) as program:
        downloads, _ = program.address(), program.address()
        with download(downloads, MUCH) as slow:
            assert program.line() == f"{MUCH} begins"
            with download(downloads, 5) as quick:
                assert quick.hear_all() == bytes(5)
            assert len(slow.hear_all()) == MUCH
        printed = ["5 begins", "5 ends", f"{MUCH} ends"]
        assert [program.line() for _ in printed] == printed


@scenario("creation_notes.rst: words.py")
def words(block: Block, folder: Path) -> None:
    """The words are a pipe without a writer: a slow disk, in a thread or in a child."""
    os.mkfifo(folder / "words.txt")
    with Program.of(block, folder) as program:
        address = program.address()
        with Talk(address) as client:
            for question, answer in ((b"all\n", b"b\na\n"), (b"sorted\n", b"a\nb\n")):
                client.say(question)
                assert say(address, "hello") == ["ask for all or sorted"]
                shell("printf 'b\\na\\n' > words.txt", 0, folder)
                assert client.hear() + client.hear() == answer
            with Talk(address) as idle:
                assert idle.ask(b"hello\n") == b"ask for all or sorted\n"
                client.say(b"sorted\n")  # The child waits for a writer who never comes.
                program.interrupt()
                assert idle.hear_all() == b""
            program.interrupt()
            assert client.hear_all() == b""
        assert program.end() == (0, "", "")


@scenario("creation_notes.rst: primes.py")
def primes(block: Block, folder: Path) -> None:
    threads = rewritten(block, "ForkingTCPServer", "ThreadingTCPServer")
    for program_block, in_the_program in ((block, False), (threads, True)):
        with Program.of(program_block, folder) as program:
            address = program.address()
            count, _, here = (
                exchange(address, b"10\n").decode().partition(", says process ")
            )
            assert count == "4 primes"
            assert (int(here) == program.process.pid) is in_the_program
            expected = f"1 counted, says process {program.process.pid}\n"
            assert exchange(address, b"?").decode() == expected
            program.end_quietly()


@scenario("creation_notes.rst: conversation.py")
def conversation(block: Block, folder: Path) -> None:
    with ExitStack() as stack, Program.of(block, folder) as program:
        address = program.address()
        clients = []

        def come() -> Talk:
            clients.append(stack.enter_context(Talk(address)))
            return clients[-1]

        ann = come()
        assert program.line() == "waiting for []"
        assert ann.hear() == b"name?\n"
        assert ann.ask(b"ann\n") == b"item?\n"
        assert come().hear() == b"name?\n"
        assert program.line() == "waiting for ['item?']"
        assert come().hear() == b"name?\n"
        assert program.line() == "waiting for ['item?', 'name?']"
        fourth = come()  # The server takes it when there is room.
        assert ann.ask(b"tea\n") == b"ann gets tea\n"
        assert program.line() == "waiting for ['name?', 'name?']"
        assert fourth.hear() == b"name?\n"
        for client in clients:
            client.leave()
        program.end_quietly()


# -- the examples of the standard library --------------------------------------------------


def client_session(block: Block, folder: Path, port: int) -> None:
    """Type what is shown, and see what is shown."""
    program = BLOCKS[f"{block.document}: {block.name.removeprefix('after ')}"]
    (folder / program.name).write_text(program.text.replace("9999", str(port)))
    for command in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, *shown = command.splitlines()
        python, client, *_ = shlex.split(line)
        assert (python, client) == ("python", program.name)
        line = line.replace("python", shlex.quote(sys.executable), 1)
        assert shell(line, port, folder).splitlines() == shown


def serve_session(block: Block, session: Block, folder: Path) -> None:
    """Run a server of the examples, and its client."""
    with Program.of(block, folder) as program:
        client_session(session, folder, program.address()[1])
        printed = BLOCKS[f"{EXAMPLES}: tcp_printed"].text.splitlines()
        assert [program.line() for _ in printed] == printed
        program.interrupt()
        code, stdout, stderr = program.end()
        assert stdout == ""
        if "after" in block.name:
            assert (code, stderr) == (0, "")
        else:
            assert stderr.endswith("KeyboardInterrupt\n")


@scenario(*(f"{EXAMPLES}: {name}_{when}.py" for name in ("tcp", "stream") for when in WHEN))
def tcp_server(block: Block, folder: Path) -> None:
    serve_session(block, BLOCKS[f"{EXAMPLES}: after tcp_client.py"], folder)


@scenario(*(f"{EXAMPLES}: udp_{when}.py" for when in WHEN))
def udp_server(block: Block, folder: Path) -> None:
    serve_session(block, BLOCKS[f"{EXAMPLES}: after udp_client.py"], folder)


@scenario(f"{EXAMPLES}: after tcp_client.py", f"{EXAMPLES}: after udp_client.py")
def session_of_examples(block: Block, folder: Path) -> None:
    """As with each server; what is shown of TCP is shown of UDP, but for the name."""
    protocol = re.search("tcp|udp", block.name)[0]  # type: ignore[index]
    serve_session(BLOCKS[f"{EXAMPLES}: {protocol}_after.py"], block, folder)
    other = BLOCKS[f"{EXAMPLES}: after tcp_client.py"].text
    assert block.text == other.replace("tcp_client", f"{protocol}_client")


@scenario(f"{EXAMPLES}: tcp_client.py")
def tcp_client(block: Block, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        with started(block, folder, listener.getsockname()[1], "two", "words") as client:
            with listener.accept()[0] as connection, connection.makefile("rb") as lines:
                assert lines.readline() == b"two words\n"
                connection.sendall(b"an answer")
            assert client.end() == (0, "sent:     two words\nreceived: an answer\n", "")


@scenario(f"{EXAMPLES}: udp_client.py")
def udp_client(block: Block, folder: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(LIMIT)
        with started(block, folder, peer.getsockname()[1], "two", "words") as client:
            packet, client_address = peer.recvfrom(99)
            assert packet == b"two words\n"
            peer.sendto(b"an answer", client_address)
            assert client.end() == (0, "sent:     two words\nreceived: an answer\n", "")


def started(block: Block, folder: Path, port: int, *arguments: str) -> Program:
    """Start a client of the examples."""
    (folder / block.name).write_text(block.text.replace("9999", str(port)))
    return Program(folder, block.name, *arguments)


def printed_by(block: Block, folder: Path) -> str:
    """Return what a program prints that is its own client."""
    (folder / block.name).write_text(block.text)
    with Program(folder, "-c", LAUNCHER, block.name) as program:
        program.address()
        code, printed, complaints = program.end()
        assert (code, complaints) == (0, "")
        return printed


@scenario(*(f"{EXAMPLES}: threads_{when}.py" for when in WHEN))
def mix_ins(block: Block, folder: Path) -> None:
    shown = block.name.replace(".py", "_printed")
    assert printed_by(block, folder) == BLOCKS[f"{EXAMPLES}: {shown}"].text


def test_the_other_mix_in_is_used_in_the_same_way(tmp_path: Path) -> None:
    block = BLOCKS[f"{EXAMPLES}: threads_after.py"]
    forking = rewritten(block, "ThreadingMixIn", "ForkingMixIn")
    printed = printed_by(forking, tmp_path)
    expected = BLOCKS[f"{EXAMPLES}: threads_after_printed"].text
    assert printed == re.sub(r"ThreadedTCPServer request \d", "MainThread", expected)


def lines_of(block: Block) -> tuple[list[str], list[str]]:
    """Return a program's lines that are not empty: those of its handler, and the others."""
    (handler,) = (
        node
        for node in ast.parse(block.text).body
        if isinstance(node, ast.ClassDef) and node.name.endswith("Handler")
    )
    lines = block.text.splitlines()
    inside = slice(handler.lineno - 1, handler.end_lineno)
    parts = lines[inside], lines[: inside.start] + lines[inside.stop :]
    return tuple([line for line in part if line] for part in parts)  # type: ignore[return-value]


def changed_lines(before: list[str], after: list[str]) -> int:
    """Count the lines that read differently, have come or have gone."""
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    return sum(
        max(old_end - old, new_end - new)
        for what, old, old_end, new, new_end in matcher.get_opcodes()
        if what != "equal"
    )


def test_changed_lines() -> None:
    before = ["a", "b", "c", "d"]
    assert changed_lines(before, before) == 0
    assert changed_lines(before, ["a", "x", "c", "d"]) == 1
    assert changed_lines(before, ["a", "b", "d"]) == 1
    assert changed_lines(before, ["a", "x", "y", "c", "z"]) == 3


def test_the_numbers_of_changed_lines() -> None:
    (rows,) = rst_tables(EXAMPLES, "How much changes").values()
    counted = []
    for name in ("tcp", "stream", "udp", "threads"):
        before, after = (lines_of(BLOCKS[f"{EXAMPLES}: {name}_{when}.py"]) for when in WHEN)
        inside, outside = map(changed_lines, before, after)
        total = sum(map(len, before))
        counted.append(
            [f"``{name}_after.py``", *map(str, (total, inside + outside, inside))]
        )
    assert rows == counted


def test_each_example_stands_before_and_after() -> None:
    names = [block.name for block in BLOCKS.values() if block.document == EXAMPLES]
    servers = [re.fullmatch(r"(\w+)_(before|after)\.py", name) for name in names]
    pairs = [match.groups() for match in servers if match]
    assert pairs == [
        (n, when) for n in ("tcp", "stream", "udp", "threads") for when in WHEN
    ]
    for name, when in pairs:
        text = BLOCKS[f"{EXAMPLES}: {name}_{when}.py"].text
        assert ("trio_socketserver" in text) == (when == "after")
