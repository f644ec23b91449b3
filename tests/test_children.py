"""A forked child by itself: its report, its end, and how its parent learns of it."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from helpers import bounded

from trio_socketserver import ChildFailed
from trio_socketserver._children import Child, call_in_child, fork, run_apart

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

NEVER = 1000.0
"""Seconds that nothing here takes."""


def no_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")


def refused_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", refuse)


def no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")


def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the system as it is."""


@pytest.fixture(params=[nothing, no_pidfd, refused_pidfd, no_memfd])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each kind of system in turn."""
    request.param(monkeypatch)


def fail() -> None:
    raise LookupError("oh")


async def end_of(work: Callable[[], object]) -> Child:
    child = fork(work, [])
    await child.run(NEVER)
    return child


def is_gone(child: Child) -> bool:
    try:
        os.kill(child.pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.usefixtures("system")
@bounded
async def test_a_child_that_ends_well() -> None:
    assert is_gone(await end_of(lambda: "of no interest"))


@pytest.mark.usefixtures("system")
@bounded
async def test_a_child_that_fails() -> None:
    with pytest.raises(LookupError, match="oh") as caught:
        await end_of(fail)
    assert "in fail\n" in str(caught.value.__cause__)


@pytest.mark.usefixtures("system")
@bounded
async def test_a_child_that_is_killed() -> None:
    with pytest.raises(ChildFailed, match="SIGKILL"):
        await end_of(lambda: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.usefixtures("system")
@bounded
async def test_cancelled() -> None:
    child = fork(lambda: time.sleep(NEVER), [])
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run, NEVER)
            await trio.testing.wait_all_tasks_blocked(0.01)
            scope.cancel()
    assert scope.cancelled_caught
    assert is_gone(child)


@pytest.mark.usefixtures("system")
@bounded
async def test_a_stubborn_child_is_killed() -> None:
    reader, writer = os.pipe()

    def stubborn() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(writer, b"x")
        time.sleep(NEVER)

    child = fork(stubborn, [])
    await trio.to_thread.run_sync(os.read, reader, 1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await child.run(0.02)
    assert is_gone(child)
    os.close(reader)
    os.close(writer)


@pytest.mark.usefixtures("system")
@bounded
async def test_somebody_else_takes_the_exit_status() -> None:
    child = fork(bool, [])
    os.waitpid(child.pid, 0)
    await child.run(NEVER)  # Its report says that all was well.

    child = fork(fail, [])
    os.waitpid(child.pid, 0)
    with pytest.raises(LookupError, match="oh"):
        await child.run(NEVER)

    child = fork(lambda: os.kill(os.getpid(), signal.SIGKILL), [])
    os.waitpid(child.pid, 0)
    with pytest.raises(ChildFailed, match="not known"):
        await child.run(NEVER)


@pytest.mark.usefixtures("system")
@bounded
async def test_a_program_that_ignores_sigchld() -> None:
    """Then the system reaps the children itself."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert is_gone(await end_of(bool))
        with pytest.raises(LookupError):
            await end_of(fail)
    finally:
        signal.signal(signal.SIGCHLD, before)


@bounded
async def test_streams_of_the_users_may_be_unusable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdout", stream)
        assert is_gone(await end_of(bool))


@bounded
async def test_a_report_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk: the child still ends, and its failure is noticed."""
    with tempfile.NamedTemporaryFile() as file:

        def read_only() -> Any:
            return open(file.name, "rb")

        monkeypatch.setattr("trio_socketserver._children.nameless_file", read_only)
        with pytest.raises(ChildFailed, match="status 1"):
            await end_of(bool)
    assert "in _be_child\n" in capfd.readouterr().err


@bounded
async def test_sigterm_from_elsewhere() -> None:
    """A handler that is ended by it says so as a shell does."""
    with pytest.raises(SystemExit) as caught:
        await end_of(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.code == 128 + signal.SIGTERM

    async def wait() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.sleep_forever()

    with pytest.raises(SystemExit) as caught:
        await end_of(lambda: run_apart(wait))
    assert caught.value.code == 128 + signal.SIGTERM


@bounded
async def test_a_run_apart_inside_of_a_run_apart() -> None:
    """From a thread of the inner trio's, a call may be made too."""

    async def one() -> int:
        return 1

    async def two() -> int:
        return 1 + int(await trio.to_thread.run_sync(call_in_child, one))

    async def three() -> int:
        return 1 + int(await call_in_child(two))  # Trio runs here: it is for awaiting.

    def work() -> None:
        if call_in_child(three) != 3:
            raise AssertionError

    await end_of(work)


@bounded
async def test_run_apart_raises_what_the_function_raises() -> None:
    async def wrong() -> None:
        raise LookupError("apart")

    with pytest.raises(LookupError, match="apart"):
        await end_of(lambda: run_apart(wrong))


@bounded
async def test_threads_of_the_childs_do_not_keep_it() -> None:
    def work() -> None:
        threading.Thread(target=time.sleep, args=[NEVER]).start()

    assert is_gone(await end_of(work))
