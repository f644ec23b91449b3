"""examples/rolling_restart/, behind a real HAProxy: no request is lost, whatever its client
was doing when its replica went.

HAProxy is taken from the environment variable HAPROXY or the PATH; without it these tests
are skipped, unless REQUIRE_HAPROXY is set. `.ci/fetch_haproxy` gets one.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import ipaddress
import itertools
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, Self

import pytest
from helpers import (
    connect,
    is_refused,
    killed_in_the_end,
    line_of,
    receive_until_closed,
)

import trio_socketserver
from trio_socketserver._draining import FIRST_LINE_GRACE
from trio_socketserver._run import GRACEFUL_TIMEOUT

FOLDER = Path(__file__).parents[1] / "examples" / "rolling_restart"

README = (FOLDER / "README.md").read_text()

HOST = str(ipaddress.ip_address("127.64.0.0") + os.getpid())
"""An address of the loopback network that is this process's own, so its ports are free."""

PUBLIC = (HOST, 9999)
REPLICA_A = (HOST, 7001)

PATIENCE = 180
"""Seconds after which everything is killed: longer than any loaded machine needs."""

SHORT_CLIENTS = 4
SESSIONS = 4
REQUESTS_OF_A_SESSION = 20

ENOUGH = 5
"""Answers that each replica gives before the next restart."""


@pytest.fixture(scope="module")
def haproxy() -> str:
    places = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    found = os.environ.get("HAPROXY") or shutil.which("haproxy", path=places)
    if not found:
        if os.environ.get("REQUIRE_HAPROXY"):
            pytest.fail("there is no HAProxy, and REQUIRE_HAPROXY is set")
        pytest.skip("there is no HAProxy: see .ci/fetch_haproxy")
    return found


class Deployment:
    """restart.py, as who types at it sees it.

    Attributes:
        current: the process of each replica.
        pids: the processes of all replicas that have been.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.current: dict[str, int] = {}
        self.pids: list[int] = []

    def read_until(self, last: str) -> None:
        while (line := line_of(self.process)) != last:
            if started := re.fullmatch(r"([ab]) is process (\d+)\n", line):
                self.current[started[1]] = int(started[2])
                self.pids.append(int(started[2]))
            else:
                assert re.fullmatch(r"[ab] has ended, \d+ clients served\n", line)

    def restart(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.read_until("both have been restarted\n")


@pytest.fixture
def deployment(haproxy: str, tmp_path: Path) -> Iterator[Deployment]:
    environment = {
        **os.environ,
        "HAPROXY": haproxy,
        "HOST": HOST,
        "PYTHONPATH": str(Path(trio_socketserver.__file__).parents[1]),
        "PYTHONWARNINGS": "error",
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, str(FOLDER / "restart.py")]
    with (
        (tmp_path / "errors").open("w+") as errors,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        deployment = Deployment(process)
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        try:
            deployment.read_until(f"serving on {HOST}:9999\n")
            yield deployment
            process.communicate()  # Ctrl-D
            errors.seek(0)
            assert (process.returncode, errors.read()) == (0, "")
        finally:
            watchdog.cancel()
            watchdog.join()
            if process.poll() is None:
                process.kill()
            # A program that was killed could not end its own: HAProxy's pid file tells.
            for pid_file in tmp_path.glob("*/pid"):
                for pid in (int(pid_file.read_text()), *deployment.current.values()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


# -- clients -------------------------------------------------------------------------------


class Tally:
    """What the clients of a test got, and whether they shall go on."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self._changed = threading.Condition()
        self._answers: Counter[int] = Counter()
        self._failures: list[BaseException] = []
        self._numbers = itertools.count()

    def fresh_line(self) -> bytes:
        """Return a request that nobody else makes."""
        return b"%d\n" % next(self._numbers)

    def note(self, pid: int) -> None:
        with self._changed:
            self._answers[pid] += 1
            self._changed.notify_all()

    def wait_for(self, pids: Collection[int]) -> None:
        """Wait until each of these processes has given `ENOUGH` answers from now on."""
        with self._changed:
            goals = {pid: self._answers[pid] + ENOUGH for pid in pids}
            assert self._changed.wait_for(
                lambda: (
                    self._failures or all(self._answers[pid] >= goals[pid] for pid in pids)
                ),
                timeout=PATIENCE,
            ), (goals, self._answers)

    @contextlib.contextmanager
    def running(self, *clients: Callable[[], None]) -> Iterator[None]:
        """Run clients beside the block, each in a thread; fail if one of them does."""
        threads = [threading.Thread(target=self._run, args=[client]) for client in clients]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            for thread in threads:
                thread.join()
        assert not self._failures

    def _run(self, client: Callable[[], None]) -> None:
        try:
            client()
        except BaseException as error:
            with self._changed:
                self._failures.append(error)
                self._changed.notify_all()

    def answering(self) -> set[int]:
        """Return the processes that have given answers."""
        return set(self._answers)


class Client:
    """A plain client, which takes nothing but the answer for an answer.

    Attributes:
        dismissed: whether the server has said goodbye.
    """

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.dismissed = False
        self.sock = connect(PUBLIC)
        self.sock.settimeout(PATIENCE)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.close()
        self.sock.close()

    def hear_answer(self, line: bytes) -> None:
        heard = self.file.readline()
        if heard == b"bye\n":
            assert not self.dismissed
            self.dismissed = True
            heard = self.file.readline()
        pid, _, echo = heard.partition(b" ")
        assert echo == line, heard
        self.tally.note(int(pid))

    def ask(self, *, in_two: bool = False) -> None:
        line = self.tally.fresh_line()
        for part in (line[:1], line[1:]) if in_two else (line,):
            self.sock.sendall(part)
        self.hear_answer(line)


def ask_once_each(tally: Tally) -> None:
    while not tally.over.is_set():
        with Client(tally) as client:
            client.ask()


def ask_on(tally: Tally) -> None:
    while not tally.over.is_set():
        with Client(tally) as client:
            for number in range(REQUESTS_OF_A_SESSION):
                client.ask(in_two=number % 2 == 1)
                if client.dismissed:
                    break


class Idler(Client):
    """A client that waits for the server's goodbye.

    Args:
        tally: as for others.
        before: what it has sent of its next request before the goodbye.
        after: what it sends of it afterwards, which is as if that had crossed.
        served: whether it has had an answer before.
    """

    def __init__(self, tally: Tally, before: bytes, after: bytes, *, served: bool) -> None:
        super().__init__(tally)
        self.line, self.after = before + after, after
        if served:
            self.ask()
        self.sock.sendall(before)

    def wait_for_goodbye(self) -> None:
        assert self.file.readline() == b"bye\n"
        if self.line:
            self.dismissed = True
            self.sock.sendall(self.after)
            self.hear_answer(self.line)
        self.sock.shutdown(socket.SHUT_WR)
        assert self.file.read() == b""


LAST_REQUESTS = [(b"", b""), (b"", b"late\n"), (b"ha", b"lf\n")]
"""What idle clients send before the goodbye and after it."""


def test_no_request_is_lost(deployment: Deployment) -> None:
    tally = Tally()
    load = [ask_once_each] * SHORT_CLIENTS + [ask_on] * SESSIONS
    with (
        tally.running(*(functools.partial(client, tally) for client in load)),
        contextlib.ExitStack() as stack,
    ):
        stack.callback(tally.over.set)
        for served in (False, True):
            tally.wait_for(deployment.current.values())
            idlers = [
                stack.enter_context(Idler(tally, before, after, served=served))
                for before, after in LAST_REQUESTS * 2  # There are two replicas.
            ]
            with tally.running(*(idler.wait_for_goodbye for idler in idlers)):
                deployment.restart()
        tally.wait_for(deployment.current.values())
    assert len(set(deployment.pids)) == 6
    assert tally.answering() == set(deployment.pids)


def test_who_is_refused_by_one_replica_is_served_by_the_other(
    deployment: Deployment, tmp_path: Path
) -> None:
    """Nobody tells HAProxy that the replica goes, and no check does."""
    (admin,) = tmp_path.glob("*/admin.socket")
    assert tell(admin, "disable health replicas/a").strip() == ""
    gone = os.pidfd_open(deployment.current["a"])
    try:
        os.kill(deployment.current["a"], signal.SIGTERM)
        assert select.select([gone], [], [], PATIENCE)[0]
    finally:
        os.close(gone)
    assert is_refused(REPLICA_A)
    with asking_as_told() as answers:
        for _ in range(4):
            assert answers.readline() == f"{deployment.current['b']} hello\n"
    rows = csv.DictReader(tell(admin, "show stat").removeprefix("# ").splitlines())
    redispatched = {(row["pxname"], row["svname"]): row["wredis"] for row in rows}
    assert int(redispatched["replicas", "a"]) > 0


@contextlib.contextmanager
def asking_as_told() -> Iterator[IO[str]]:
    """Run the client in README.md, which never ends; yield what it prints."""
    (program,) = re.findall(r'python -c "\n(.*?)"\n\n', README, re.DOTALL)
    source = textwrap.dedent(program).replace("127.0.0.1", HOST)
    command = [sys.executable, "-u", "-c", source]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout
        finally:
            process.kill()


def tell(admin: Path, command: str) -> str:
    """Send a command to HAProxy; return its answer."""
    with connect(str(admin)) as sock:
        sock.sendall(f"{command}\n".encode())
        return receive_until_closed(sock).decode()


# -- being interrupted, without HAProxy ----------------------------------------------------

STAND_IN = """
import os, signal, sys

def say(what):
    print(what, "ab"[int(sys.argv[2]) - 7001], os.getpid(), file=sys.stderr, flush=True)

def wait_until_parent_waits():
    state = ""
    while state != "S":
        with open(f"/proc/{os.getppid()}/stat") as stat:
            state = stat.read().rpartition(")")[2].split()[0]

signals = {signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
"""
"""The beginning of a program in the place of service.py, which tells by ``stderr``."""

SILENT = """
wait_until_parent_waits()
say("silent")
signal.sigwait(signals)
"""

DUMB = """
say("dumb")
os.close(1)
signal.sigwait(signals)
"""

PATIENT = """
print("serving", flush=True)
wait_until_parent_waits()
say("serving")
signal.sigwait(signals)
say("draining")
signal.sigwait(signals)
"""


@contextlib.contextmanager
def restarting(service: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Run restart.py with another program in the place of service.py, and no HAProxy."""
    shutil.copy(FOLDER / "restart.py", folder)
    (folder / "service.py").write_text(STAND_IN + service)
    with (
        subprocess.Popen(
            [sys.executable, str(folder / "restart.py")],
            env={**os.environ, "HAPROXY": "true", "TMPDIR": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        killed_in_the_end(process, PATIENCE),
    ):
        yield process


def told(process: subprocess.Popen[str], what: str, name: str) -> int:
    """Return the process id of the replica that says this next."""
    assert process.stderr is not None
    line = process.stderr.readline()
    assert line.startswith(f"{what} {name} "), line
    return int(line.split()[-1])


def last_words(process: subprocess.Popen[str], *pids: int) -> str:
    """Wait for restart.py, which leaves none of these; return what else has been told."""
    process.wait()
    for pid in pids:
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and b"service.py" in command.read_bytes():
            os.kill(pid, signal.SIGKILL)
            pytest.fail("a replica has been left behind")
    return process.communicate()[1]


def test_an_interrupt_while_a_replica_starts_ends_it(tmp_path: Path) -> None:
    with restarting(SILENT, tmp_path) as process:
        pid = told(process, "silent", "a")
        process.send_signal(signal.SIGINT)
        assert last_words(process, pid).endswith("\nKeyboardInterrupt\n")


def test_a_replica_that_does_not_start_is_ended(tmp_path: Path) -> None:
    with restarting(DUMB, tmp_path) as process:
        pid = told(process, "dumb", "a")
        assert last_words(process, pid) == "replica a has not started\n"
        assert process.returncode == 1


def test_a_second_interrupt_cuts_short_one_replica_and_skips_none(tmp_path: Path) -> None:
    with restarting(PATIENT, tmp_path) as process:
        pids = [told(process, "serving", name) for name in "ab"]
        for name in "ba":
            process.send_signal(signal.SIGINT)
            told(process, "draining", name)
        process.send_signal(signal.SIGINT)
        assert last_words(process, *pids).endswith("\nKeyboardInterrupt\n")


# -- what stands beside it -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["restart.py", "service.py"])
def test_a_program_is_short_and_explains_itself(name: str) -> None:
    source = source_of(name)
    assert source.count("\n") < 80
    docstring = ast.get_docstring(ast.parse(source)) or ""
    assert f"\n    python examples/rolling_restart/{name}" in docstring


def test_haproxy_takes_what_the_documentation_shows(haproxy: str, tmp_path: Path) -> None:
    page = (FOLDER.parents[1] / "docs" / "deploying.rst").read_text()
    (block,) = re.findall(r":name: haproxy\n\n((?: {3}.*\n)+)", page)
    frontend = "\nfrontend public\n    mode tcp\n    timeout client 10m\n    bind :9999\n"
    config = tmp_path / "haproxy.cfg"
    config.write_text(textwrap.dedent(block) + f"{frontend}    default_backend chat\n")
    command = [haproxy, "-dW", "-c", "-f", str(config)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_numbers_in_prose() -> None:
    last_word = re.search(r"^LAST_WORD = (\d+)$", source_of("service.py"), re.MULTILINE)
    assert last_word is not None
    words = " ".join(README.split())
    assert f"silent for {last_word[1]} seconds (`LAST_WORD`)" in words
    assert f"draining takes {GRACEFUL_TIMEOUT:g} seconds at most" in words
    assert {1: "one more second for its first line"}[FIRST_LINE_GRACE] in words


def source_of(name: str) -> str:
    return (FOLDER / name).read_text()
