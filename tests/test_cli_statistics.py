"""SIGUSR1: the command, however it dispatches, prints its numbers and is not disturbed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import connect, line_of, printed_address, receive_until_closed, running

from trio_socketserver import BaseServer, _cli, _cli_statistics
from trio_socketserver._cli_output import say
from trio_socketserver._cli_statistics import StatisticsOnSignal

LOCAL = "--bind=127.0.0.1:0"

# In a group of its own, which can be sent a signal.
APART = (
    "import os, sys; os.setpgrp(); "
    "os.execv(sys.executable, [sys.executable, '-W', 'error', *sys.argv[1:]])"
)
COMMAND = ("-c", APART, "-m", "trio_socketserver")

HANDLERS = """
import os, socketserver
from trio_socketserver import StreamRequestHandler

class Async(StreamRequestHandler):
    async def handle(self):
        await self.request.send_all(b"%d\\n" % os.getpid())
        async for line in self.rfile:
            await self.wfile.write(line)

class Blocking(socketserver.StreamRequestHandler):
    def handle(self):
        self.request.sendall(b"%d\\n" % os.getpid())
        for line in self.rfile:
            self.wfile.write(line)
"""


@contextlib.contextmanager
def serving(folder: Path, *options: str, module: str = HANDLERS) -> Iterator[Any]:
    """Run the command; yield its process and its address."""
    (folder / "handlers.py").write_text(module)
    with running(*COMMAND, LOCAL, *options, folder=folder) as process:
        address = printed_address(line_of(process))
        line_of(process)
        yield process, address


def ask(client: socket.socket, question: bytes) -> bytes:
    client.sendall(question)
    return client.recv(100)


def end(process: Any) -> str:
    """Stop the command, which has nothing to complain of; return what it says."""
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    return str(out)


@pytest.mark.parametrize(
    ("handler", "options"),
    [
        ("Async", ["--dispatch=nursery"]),
        ("Blocking", ["--dispatch=threading"]),
        ("Async", ["--dispatch=forking"]),
        ("Blocking", ["--dispatch=forking"]),
        ("Async", ["--workers=2", "--max-requests-at-once=1"]),
        ("Blocking", ["--workers=2", "--max-requests-at-once=1", "--dispatch=forking"]),
    ],
)
def test_a_signal_to_the_whole_group(tmp_path, handler, options):
    with serving(tmp_path, *options, f"handlers:{handler}") as (process, address):
        # Of two workers, each has one.
        with connect(address) as one, connect(address) as other:
            pids = {int(client.recv(100)) for client in (one, other)}
            for _ in range(3):
                os.killpg(process.pid, signal.SIGUSR1)
                assert line_of(process) == "accepted 2, active 2\n"
                for client in one, other:
                    assert ask(client, b"still here\n") == b"still here\n"
            one.shutdown(socket.SHUT_WR)
            assert receive_until_closed(one) == b""
            other.shutdown(socket.SHUT_WR)
            assert receive_until_closed(other) == b""
        in_processes = any("forking" in o or "workers" in o for o in options)
        assert len(pids) == (2 if in_processes else 1)
        assert end(process) == "accepted 2, completed 2\n"


def test_a_quiet_server_answers_nevertheless(tmp_path):
    # It does not say where it serves, so that has to be known before.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = ("-q", f"--fd={listener.fileno()}", "handlers:Async")
        (tmp_path / "handlers.py").write_text(HANDLERS)
        descriptors = (listener.fileno(),)
        with running(*COMMAND, *options, folder=tmp_path, pass_fds=descriptors) as process:
            with connect(listener.getsockname()) as client:
                client.recv(100)
                process.send_signal(signal.SIGUSR1)
                assert line_of(process) == "accepted 1, active 1\n"
            assert end(process) == ""


def test_before_it_serves_a_signal_does_nothing(tmp_path):
    early = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1)\n" + HANDLERS
    with serving(tmp_path, "handlers:Async", module=early) as (process, address):
        with connect(address) as client:
            client.recv(100)
        assert end(process) == "accepted 1, completed 1\n"


USERS_OWN = """
import signal
signal.signal(signal.SIGUSR1, lambda *_: print("mine", flush=True))
"""


def test_a_handler_of_the_user_s_takes_precedence(tmp_path):
    module = USERS_OWN + HANDLERS
    with serving(tmp_path, "handlers:Async", module=module) as (process, address):
        with connect(address) as client:
            client.recv(100)
            process.send_signal(signal.SIGUSR1)
            assert line_of(process) == "mine\n"
        assert end(process) == "accepted 1, completed 1\n"


# -- where stdout leads nowhere ------------------------------------------------------------


def test_nobody_reads(tmp_path):
    with serving(tmp_path, "handlers:Async") as (process, address):
        process.stdout.close()
        with connect(address) as client:
            client.recv(100)
            process.send_signal(signal.SIGUSR1)
            # Of signals that are pending at once, the first may not be heard first.
            assert ask(client, b"hello\n") == b"hello\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
        assert process.stderr.read() == ""


@pytest.mark.parametrize("stdout", ["os.close(1)", "os.dup2(os.open('/dev/full', 1), 1)"])
def test_nobody_can_read(tmp_path, stdout):
    (tmp_path / "handlers.py").write_text(HANDLERS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = ("-m", "trio_socketserver", f"--fd={listener.fileno()}")
        with running(
            "-c",
            f"import os, sys; {stdout}; "
            "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
            *arguments,
            "handlers:Async",
            folder=tmp_path,
            pass_fds=(listener.fileno(),),
        ) as process:
            with connect(listener.getsockname()) as client:
                client.recv(100)
                process.send_signal(signal.SIGUSR1)
                assert ask(client, b"hello\n") == b"hello\n"
            assert end(process) == ""


# -- in this process -----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def default_afterwards() -> Iterator[None]:
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    yield
    left, _ = signal.getsignal(signal.SIGUSR1), signal.signal(signal.SIGUSR1, 0)
    assert left is signal.SIG_DFL


def test_the_signal_is_given_back(capsys):
    assert _cli.main(["--version"]) == 0
    assert _cli.main(["--nonsense"]) == 2
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


@pytest.mark.parametrize("theirs", [signal.SIG_IGN, lambda number, frame: None])
def test_the_signal_of_somebody_else_is_left_alone(theirs):
    signal.signal(signal.SIGUSR1, theirs)
    try:
        with StatisticsOnSignal():
            assert signal.getsignal(signal.SIGUSR1) is theirs
        assert signal.getsignal(signal.SIGUSR1) is theirs
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_a_signal_in_the_loop(capsys):
    async def signalled() -> None:
        server = BaseServer(("", 0), print)
        server._counters.accepted, server._counters.completed = 3, 2
        statistics.show_those_of(server)
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
        await trio.testing.wait_all_tasks_blocked()

    with StatisticsOnSignal() as statistics:
        trio.run(signalled)
    # Of several that have come together, one is answered.
    assert capsys.readouterr() == ("accepted 3, active 1, completed 2\n", "")


@pytest.mark.parametrize("where", ["/dev/full", None])
def test_what_cannot_be_said(monkeypatch, where):
    with open(where or os.devnull, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout if where else None)
        say("this")
        say("and that")


def test_nothing_is_said_where_stdout_has_been_closed(monkeypatch):
    """As a daemon does it. What a callback of trio's raises would end the program."""
    with open(os.devnull, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        stdout.close()
        say("this")


def test_a_signal_when_the_loop_has_ended(capsys):
    class Server:
        def statistics(self):
            raise AssertionError("nobody is to look")

    async def begin() -> None:
        statistics.show_those_of(Server())

    with StatisticsOnSignal() as statistics:
        signal.raise_signal(signal.SIGUSR1)
        trio.run(begin)
        signal.raise_signal(signal.SIGUSR1)
    assert capsys.readouterr() == ("", "")


def test_without_the_signal(monkeypatch):
    monkeypatch.setattr(_cli_statistics, "SIGUSR1", None)
    with StatisticsOnSignal():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
