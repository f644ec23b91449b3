"""What children and parents do where the system does not help, or others interfere."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outcome
import pytest
import trio
from helpers import bounded, running

from trio_socketserver import ChildFailed, ForkingTCPServer, _children, _forking, _inherited
from trio_socketserver._inherited import close_inherited, remember, remember_server

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def nothing() -> None:
    pass


async def fork_and_wait(work: Callable[[], object] = nothing) -> None:
    await _children.fork(work, []).run(5)


@bounded
async def test_without_pidfds_a_thread_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    await fork_and_wait()
    with pytest.raises(ChildFailed, match="SIGKILL"):
        await fork_and_wait(lambda: os.kill(os.getpid(), signal.SIGKILL))


@bounded
async def test_without_pidfds_cancelling_ends_the_child(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    with trio.move_on_after(0.1) as scope:
        await fork_and_wait(signal.pause)
    assert scope.cancelled_caught
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@bounded
async def test_without_pidfds_and_threads_no_child_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.delattr(os, "pidfd_open")
    monkeypatch.setattr(trio.to_thread, "run_sync", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        await fork_and_wait(signal.pause)
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@bounded
async def test_without_memfds_the_report_is_in_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "memfd_create")

    def fail() -> None:
        raise LookupError("in the child")

    with pytest.raises(LookupError, match="in the child"):
        await fork_and_wait(fail)


@bounded
async def test_what_cannot_be_reported_is_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(error: object = None) -> bytes:
        raise LookupError("no words")

    monkeypatch.setattr(_children, "_describe", fail)
    with pytest.raises(ChildFailed, match="status 1"):
        await fork_and_wait(fail)
    assert "no words" in capfd.readouterr().err


@bounded
async def test_a_child_that_others_have_waited_for() -> None:
    for status in (0, 3):
        child = _children.fork(lambda status=status: os._exit(status), [])
        os.waitpid(child.pid, 0)
        with pytest.raises(ChildFailed, match="not known"):
            await child.run(5)


def test_where_trio_runs_a_child_calls_it_by_awaiting() -> None:
    answers: list[str] = []

    async def answer() -> str:
        return "answer"

    async def main() -> None:
        awaitable = _children.call_in_child(answer)
        assert inspect.iscoroutine(awaitable)
        answers.append(await awaitable)

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    thread.join()
    # In the main thread there is a run that never ends, in a child.
    answers.append(_children.call_in_child(answer))
    assert answers == ["answer", "answer"]


def test_the_sockets_of_a_request() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert _forking._sockets_of(left) == [left]
        assert _forking._sockets_of("another request") == []


def test_a_child_closes_what_it_does_not_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        socket: Any = None

    with_socket, without = Server(), Server()
    kept, other = socket.socketpair()
    with_socket.socket = other
    keeping = Server()
    keeping.socket = kept
    monkeypatch.setattr(_inherited, "servers", {})
    for server in (with_socket, without, keeping):
        remember_server(server)

    class Connection:
        def held(self) -> list[socket.socket]:
            return [third]

    third, fourth = socket.socketpair()
    connection = Connection()
    connections: _inherited.References = set()
    remember(connections, connection)
    monkeypatch.setattr(_inherited, "connections", connections)
    with kept, fourth:
        close_inherited([kept])
        assert third.fileno() == -1
        assert other.fileno() == -1
        assert kept.fileno() != -1
        close_inherited([kept])


@bounded
async def test_a_child_needs_a_server_that_serves() -> None:
    server = ForkingTCPServer(("127.0.0.1", 0), nothing)
    with server.socket, pytest.raises(RuntimeError, match="serves"):
        await server.finish_request(None, None)


WAKEUP_PROGRAM = """
import signal
import trio
from trio_socketserver import ForkingTCPServer

def tell(request, client_address, server):
    request.sendall(b"%d" % signal.set_wakeup_fd(-1))

async def main():
    async with ForkingTCPServer(("127.0.0.1", 0), tell) as server:
        async with await trio.open_tcp_stream(*server.server_address) as stream:
            await server.handle_request()
            print((await stream.receive_some()).decode(), flush=True)

trio.run(main)
"""


def test_a_signal_to_a_child_does_not_wake_the_parent(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(WAKEUP_PROGRAM)
    with running("-W", "ignore::DeprecationWarning", str(program)) as process:
        out, err = process.communicate()
    assert (out, err) == ("-1\n", "")


def test_what_is_cancelled_before_it_begins_ends_at_once() -> None:
    results: list[outcome.Outcome[object]] = []
    apart = _children._Apart(trio.sleep_forever)
    apart.cancel()
    run = functools.partial(outcome.capture, trio.run, apart.main)
    thread = threading.Thread(target=lambda: results.append(run()))
    thread.start()
    thread.join()
    apart.cancel()  # Nor is it too late for one that has ended.
    with pytest.raises(SystemExit):
        results[0].unwrap()


def test_a_child_that_runs_no_trio_ends_by_an_exception() -> None:
    with pytest.raises(SystemExit):
        _children._asked_to_end(signal.SIGTERM, None)


def test_a_child_whose_main_thread_waits_for_trio_ends_with_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart = _children._Apart(trio.sleep_forever)
    monkeypatch.setattr(_children, "_aparts", [apart])
    _children._asked_to_end(signal.SIGTERM, None)
    with pytest.raises(SystemExit):
        trio.run(apart.main)


@pytest.mark.parametrize(
    "error", [LookupError("where"), LookupError(lambda: None)], ids=repr
)
def test_an_error_is_reported_or_described(error: Exception) -> None:
    report = _children._describe(error)
    pickled, description, text = pickle.loads(report)
    assert description.startswith("LookupError: ")
    assert "LookupError" in text
    if pickled:
        assert pickle.loads(pickled).error.args == ("where",)
