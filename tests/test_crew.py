"""The crew of worker processes, with processes that only speak as workers do.

They are started by the same means, take a few milliseconds, and serve nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, bounded
from prefork_clients import Log, logging_to, when_started
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import ChildFailed, _crew
from trio_socketserver._crew import Crew
from trio_socketserver._inherited import close_inherited
from trio_socketserver._statistics import Counters
from trio_socketserver._worker_link import News, WorkerLink, socket_pair

SPEAKS = """
import mmap, os, signal, socket, struct, sys, time

listener, link_end, figures = map(int, sys.argv[-3:])
link = socket.socket(fileno=link_end)
counters = memoryview(mmap.mmap(figures, 0)).cast("q")
ACCEPTED, COMPLETED = {accepted}, {completed}

def say(word, content=b""):
    link.sendall(struct.pack("=cI", word, len(content)) + content)

def heard():
    return link.recv(1)
"""
"""What begins the code of each process."""


class Host:
    """The server that a crew is part of."""

    cleanup_timeout = 0.0

    def __init__(self) -> None:
        self._counters = Counters()
        self.obeyed: list[News] = []
        self.told = trio.Event()
        self._sock = socket.socket()

    def fileno(self) -> int:
        return self._sock.fileno()

    def close(self) -> None:
        self._sock.close()

    def note(self, news: News) -> None:
        self.obeyed.append(news)
        self.told.set()

    def __getattr__(self, name: str) -> Any:
        # By whatever name the crew passes on what a worker's handler has called.
        if name.startswith("_obey"):
            return self.note
        raise AttributeError(name)


class Company:
    """A crew whose workers are what a test wants them to be."""

    def __init__(self, host: Host, nursery: trio.Nursery) -> None:
        self.host = host
        self.nursery = nursery
        self.crew = Crew(host, b"", None)  # type: ignore[arg-type]

    def begin(self, places: int = 1) -> None:
        self.crew.begin(places, self.nursery.start_soon)

    def counted(self) -> Counters:
        counters = Counters()
        counters.add(self.host._counters)
        self.crew.add_to(counters)
        return counters


@pytest.fixture
def workers_are(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that says what workers run, one after the other; the last again."""
    slots = Counters.__slots__
    prelude = SPEAKS.format(
        accepted=slots.index("accepted"), completed=slots.index("completed")
    )

    def have(*codes: str) -> None:
        rest = list(codes)

        def command(module: str, *arguments: str) -> list[str]:
            code = rest.pop(0) if len(rest) > 1 else rest[0]
            return [sys.executable, "-I", "-S", "-c", prelude + code, *arguments]

        monkeypatch.setattr(_crew, "command", command)

    return have


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    with logging_to(log):
        yield log


@pytest.fixture
def delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_crew, "RESTART_DELAY", 0.001)
    monkeypatch.setattr(_crew, "LONGEST_RESTART_DELAY", 0.004)


@contextlib.asynccontextmanager
async def company() -> AsyncGenerator[Company]:
    """Yield a crew that has not begun; wait for its workers at the end."""
    with contextlib.closing(Host()) as host:
        async with trio.open_nursery() as nursery:
            yield Company(host, nursery)


SERVES = "say(b'r')\nwhile (word := heard()) not in (b'c', b'x', b''): say(b's')\n"
"""Serve until told to close or to end; say so if told to stop."""


@bounded
async def test_ready_stopped_and_closed(workers_are: Any, log: Log) -> None:
    workers_are(SERVES)
    async with company() as these:
        these.begin(2)
        await these.crew.wait_ready()
        assert these.crew.has_workers()
        these.crew.stop()
        await these.crew.wait_stopped()
        these.crew.stop()  # Once more.
        these.crew.close()
    assert log.lines == []
    assert not these.crew.has_workers()
    await these.crew.wait_stopped()


@bounded
async def test_what_workers_count(workers_are: Any) -> None:
    """Seen while they run; what they are at when they end has failed."""
    workers_are("counters[ACCEPTED] = 5; counters[COMPLETED] = 3\n" + SERVES)
    async with company() as these:
        these.begin(2)
        await these.crew.wait_ready()
        seen = these.counted()
        assert (seen.accepted, seen.completed, seen.failed, seen.active) == (10, 6, 0, 4)
        these.crew.close()
    seen = these.counted()
    assert (seen.accepted, seen.completed, seen.failed, seen.active) == (10, 6, 4, 0)


@pytest.mark.usefixtures("delays")
@bounded
async def test_replaced_under_back_off(
    workers_are: Any, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The delay doubles, to a limit; for a worker of some age it begins anew."""
    workers_are("say(b'r'); sys.exit(3)")
    async with company() as these:
        these.begin()
        await log.wait_for("another is started in", 5)
        monkeypatch.setattr(_crew, "STEADY_AFTER", 0.0)
        await log.wait_for("another is started in", 7)
        these.crew.stop()
    waits = [float(line.split()[-2]) for line in log.lines]
    assert waits[:5] == [0.001, 0.002, 0.004, 0.004, 0.004]
    assert waits[6] == 0.001
    assert all("has exited with status 3" in line for line in log.lines[:7])


@bounded
async def test_stopped_between_two_workers(workers_are: Any, log: Log) -> None:
    """Which would otherwise be for the length of the delay."""
    workers_are("say(b'r')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_crew, "RESTART_DELAY", 1000.0)
        patch.setattr(_crew, "LONGEST_RESTART_DELAY", 1000.0)
        async with company() as these:
            these.begin()
            await log.wait_for("has exited with status 0; another is started in 1000 s")
            these.crew.close()


@pytest.mark.usefixtures("delays")
@bounded
async def test_failing_before_they_serve(workers_are: Any, log: Log) -> None:
    workers_are("say(b'f', b'Traceback: why'); sys.exit(1)")
    async with company() as these:
        these.begin()
        with pytest.raises(ChildFailed) as caught:
            await these.crew.raise_failure()
        assert these.crew.has_failed
        these.crew.stop()
    assert f"{_crew.START_ATTEMPTS} worker processes in a row" in str(caught.value)
    assert "has exited with status 1" in str(caught.value)
    assert "Traceback: why" in str(caught.value.__cause__)
    replaced = [line for line in log.lines if "another is started in" in line]
    assert len(replaced) == _crew.START_ATTEMPTS - 1


@pytest.mark.usefixtures("delays")
@bounded
async def test_one_that_serves_makes_the_count_begin_anew(
    workers_are: Any, log: Log
) -> None:
    attempts = _crew.START_ATTEMPTS
    fails, serves = "sys.exit(1)", "say(b'r')"
    workers_are(*[fails] * (attempts - 1), serves, *[fails] * (attempts - 1), SERVES)
    async with company() as these:
        these.begin()
        await log.wait_for("another is started in", 2 * attempts - 1)
        await these.crew.wait_ready()
        assert not these.crew.has_failed
        these.crew.stop()
        these.crew.close()


@pytest.mark.usefixtures("delays")
@pytest.mark.parametrize("where", ["socket_pair", "nameless_file", "command"])
@bounded
async def test_the_system_has_no_room(
    where: str, workers_are: Any, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers_are(SERVES)

    def refuse(*arguments: str) -> Any:
        if where == "command":
            return ["/nowhere/python"]
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(_crew, where, refuse)
    async with company() as these:
        these.begin()
        with pytest.raises(ChildFailed, match="could not be started"):
            await these.crew.raise_failure()
    assert isinstance(these.crew._failure, ChildFailed)
    assert isinstance(these.crew._failure.__cause__, OSError)
    assert these.counted().accepted == 0


CANCELLED_LATE = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
say(b"d")
heard()
say(b"e")
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
time.sleep(1000)
"""
"""End when told to, but be reached by SIGTERM when that is the default again."""


@bounded
async def test_a_worker_that_is_cancelled_at_its_start_is_no_news(
    workers_are: Any, log: Log
) -> None:
    workers_are(CANCELLED_LATE)
    async with company() as these:
        these.begin()
        await these.host.told.wait()
        these.crew.stop()
    assert log.lines == []


@bounded
async def test_a_worker_may_be_cancelled_before_there_is_a_thread_to_start_it(
    workers_are: Any, log: Log
) -> None:
    workers_are(SERVES)
    limiter = trio.to_thread.current_default_thread_limiter()
    limiter.total_tokens = 1
    async with limiter, company() as these:
        these.begin()
        await wait_all_tasks_blocked()
        these.crew.stop()
    assert log.lines == []


@pytest.mark.usefixtures("delays")
@bounded
async def test_a_worker_that_makes_no_sense_is_killed(workers_are: Any, log: Log) -> None:
    workers_are("say(b'r'); say(b'?'); time.sleep(1000)", SERVES)
    async with company() as these:
        these.begin()
        await log.wait_for("has been ended by SIGKILL; another is started")
        these.crew.stop()
        these.crew.close()
    assert log.lines[0].startswith("a worker process makes no sense: ")


@bounded
async def test_news_are_passed_on(workers_are: Any, log: Log) -> None:
    workers_are("say(b'r'); say(b'd'); say(b'c')\n" + SERVES)
    async with company() as these:
        these.begin()
        while len(these.host.obeyed) < 2:
            these.host.told = trio.Event()
            await these.host.told.wait()
        assert these.host.obeyed == [News.SHUTDOWN, News.SERVER_CLOSE]
        these.crew.close()


@bounded
async def test_a_worker_that_does_not_read(workers_are: Any, log: Log) -> None:
    """Its end resets the link: which is no error."""
    workers_are("say(b'r'); os.read(0, 1)\nlisten = heard(); sys.exit(0)")
    async with company() as these:
        these.begin()
        await these.crew.wait_ready()
        these.crew.stop()
        these.crew.close()  # This order stays in its socket.
        these.crew.close()
    assert not these.crew.has_workers()


@bounded
async def test_the_last_words_are_heard(workers_are: Any, log: Log) -> None:
    """Said just before the end."""
    workers_are("say(b'f', b'x' * 100_000 + b'END'); os._exit(1)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_crew, "START_ATTEMPTS", 1)
        async with company() as these:
            these.begin()
            with pytest.raises(ChildFailed) as caught:
                await these.crew.raise_failure()
    assert str(caught.value.__cause__).rstrip().endswith("xEND")


def test_what_has_come_before_its_end_is_heard_after_it() -> None:
    """All of it, whether more may come or not."""
    for is_closed in (True, False):
        ours, theirs = socket_pair()
        with ours, theirs, contextlib.closing(Host()) as host:
            ours.setblocking(False)
            worker = _crew._Worker(host, lambda: None)  # type: ignore[arg-type]
            worker._sock = ours
            for text in (b"not", b"why"):
                WorkerLink(theirs).say(News.FAILED, text)
            if is_closed:
                theirs.close()
            worker._hear_rest()
            assert "why" in str(worker.error)


def test_nonsense_before_the_process_is_known(log: Log) -> None:
    """It is said from another thread that the process runs."""
    ours, theirs = socket_pair()
    with ours, theirs, contextlib.closing(Host()) as host:
        ours.setblocking(False)
        worker = _crew._Worker(host, lambda: None)  # type: ignore[arg-type]
        worker._sock = ours
        theirs.send(b"nonsense")
        worker._hear_rest()
    [line] = log.lines
    assert line.startswith("a worker process makes no sense: ")


@bounded
async def test_a_worker_closes_its_link_before_it_ends(workers_are: Any, log: Log) -> None:
    workers_are("say(b'r'); link.close(); time.sleep(0.05)")
    async with company() as these:
        these.begin()
        await these.crew.wait_ready()
        these.crew.close()
    assert log.lines == []


@pytest.mark.parametrize(
    ("code", "logged"), [("sys.exit(4)", 1), ("sys.exit(0)", 0)], ids=["badly", "well"]
)
@bounded
async def test_the_end_of_one_that_drains(
    workers_are: Any, log: Log, code: str, logged: int
) -> None:
    """A bad one is logged, though nobody replaces it."""
    workers_are(f"say(b'r'); heard(); {code}")
    async with company() as these:
        these.begin()
        await these.crew.wait_ready()
        these.crew.close()
    assert len(log.lines) == logged
    assert all(line.endswith("has exited with status 4") for line in log.lines)


@bounded
async def test_workers_that_retire(workers_are: Any, log: Log) -> None:
    """They end in their own time, and are not replaced."""
    workers_are(
        "say(b'r')\nif heard() == b'r': counters[ACCEPTED] = counters[COMPLETED] = 7"
    )
    async with company() as these:
        these.begin()
        await these.crew.wait_ready()
        these.crew.retire()
    assert these.counted().completed == 7
    assert log.lines == []


@bounded
async def test_a_worker_whose_threads_do_not_end(workers_are: Any, log: Log) -> None:
    """It has said that it ends, and is given some time for that."""
    workers_are("say(b'r'); heard(); say(b'e'); time.sleep(1000)")
    async with company() as these:
        these.begin()
        await these.crew.wait_ready()
        these.crew.close()
    assert log.lines == [log.lines[0]]
    assert log.lines[0].endswith("has been ended by SIGKILL")


# -- cancelling ----------------------------------------------------------------------------


@bounded
async def test_cancelled_workers_are_told_and_ended(workers_are: Any, log: Log) -> None:
    workers_are(
        "signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "say(b'r')\n"
        "if heard() == b'x': counters[ACCEPTED] = counters[COMPLETED] = 7\n"
    )
    async with company() as these:
        these.host.cleanup_timeout = REAL_LIMIT  # Nobody is killed.
        these.begin()
        await these.crew.wait_ready()
        these.nursery.cancel_scope.cancel()
    assert these.counted().completed == 7
    assert log.lines == []


@bounded
async def test_cancelled_while_they_start(
    workers_are: Any, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They cannot listen yet: so there is SIGTERM too."""
    started = when_started(monkeypatch)
    workers_are("time.sleep(1000)")
    async with company() as these:
        these.begin()
        await started.wait()
        these.crew.stop()
    assert log.lines == []


@bounded
async def test_stubborn_workers_are_killed(
    workers_are: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_crew, "EXIT_TIMEOUT", 0.02)
    workers_are(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); counters[ACCEPTED] = 1\n"
        "say(b'r'); time.sleep(1000)"
    )
    async with company() as these:
        these.begin()
        await these.crew.wait_ready()
        these.nursery.cancel_scope.cancel()
    assert these.counted().failed == 1


def test_how_long_a_cancelled_worker_has() -> None:
    host = Host()
    host.close()
    host.cleanup_timeout = 3.0
    assert _crew.patience_of(host) == 6.0 + _crew.EXIT_TIMEOUT  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@bounded
async def test_links_are_not_for_forked_children(workers_are: Any) -> None:
    workers_are(SERVES)
    async with company() as these:
        these.begin()
        await these.crew.wait_ready()
        [worker] = these.crew._workers
        ours, *passed = worker.held()
        assert not os.get_inheritable(ours.fileno())
        assert {sock.fileno() for sock in passed} == {-1}  # The worker's process has them.
        descriptor = ours.fileno()
        pid = os.fork()
        if pid == 0:
            close_inherited([])
            try:
                os.fstat(descriptor)
            except OSError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        these.crew.close()


def test_what_a_worker_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The main module only where something of it is needed."""
    host = Host()
    host.close()
    asked: list[bool] = []
    monkeypatch.setattr(
        _crew.MainModule, "of_this_process", functools.partial(asked.append, True)
    )
    Crew(host, b"nothing of main", None)  # type: ignore[arg-type]
    assert asked == []
    Crew(host, b"__main__ Thing", None)  # type: ignore[arg-type]
    assert asked == [True]
