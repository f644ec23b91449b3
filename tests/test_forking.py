"""A child process for each request: both colours, limits, errors, and what ends a child."""

from __future__ import annotations

import contextlib
import contextvars
import errno
import logging
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from blocking_world import PATIENCE, clock
from helpers import (
    REAL_LIMIT,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    pose,
    receive,
    receive_to_end,
    receive_until_closed,
    running,
)

import trio_socketserver
from trio_socketserver import ChildFailed, NurseryTCPServer, RequestTimeout
from trio_socketserver._combinations import (
    ForkingTCPServer,
    ForkingUDPServer,
    ForkingUnixDatagramServer,
    ForkingUnixStreamServer,
)
from trio_socketserver._forking import BATCH, SHUTDOWN, _Messages

__all__ = ["clock"]  # A fixture.

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

STREAM = (ForkingTCPServer, ForkingUnixStreamServer)
DATAGRAM = (ForkingUDPServer, ForkingUnixDatagramServer)
LOCAL = ("127.0.0.1", 0)
NEVER = 1000.0
"""Seconds that nothing here takes."""


class Keeps(ForkingTCPServer):
    """Keeps the errors of its requests."""

    def __init__(self, handler: Any, address: Any = LOCAL) -> None:
        super().__init__(address, handler)
        self.errors: list[Any] = []

    async def handle_error(self, request: Any, client_address: Any) -> None:
        self.errors.append(sys.exception())


@contextlib.asynccontextmanager
async def serving(server: Any) -> AsyncGenerator[Any]:
    """Enter *server* and serve for the length of the block."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield server
        await server.shutdown()


def blocking_only(function: Callable[[], object]) -> Any:
    """Make a blocking handler that calls *function*."""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        function()

    return handler


def async_only(function: Callable[[], object]) -> Any:
    """Make an asynchronous handler that calls *function*."""

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        function()

    return handler


both_colours = pytest.mark.parametrize(
    "colour", [blocking_only, async_only], ids=["blocking", "async"]
)


def stubborn_sleep() -> None:
    """Take longer than any test, by blocking."""
    time.sleep(NEVER)


# -- the four servers, both colours --------------------------------------------------------


def answer_to(data: bytes) -> bytes:
    return b"%d %s" % (os.getpid(), data.strip().upper())


class OldStream(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(answer_to(line))


class OldDatagram(socketserver.DatagramRequestHandler):
    def handle(self) -> None:
        self.wfile.write(answer_to(self.rfile.read()))


class NewStream(trio_socketserver.StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(answer_to(line))


class NewDatagram(trio_socketserver.DatagramRequestHandler):
    async def handle(self) -> None:
        self.wfile.write(answer_to(self.rfile.read()))


def old_function(request: Any, client_address: Any, server: Any) -> None:
    if isinstance(request, tuple):
        request[1].sendto(answer_to(request[0]), client_address)
    else:
        request.sendall(answer_to(request.recv(100)))


async def new_function(request: Any, client_address: Any, server: Any) -> None:
    if isinstance(request, tuple):
        await request[1].sendto(answer_to(request[0]), client_address)
    else:
        await request.send_all(answer_to(await request.receive_some()))


@pytest.mark.parametrize(
    ("server_class", "handler"),
    [(s, h) for s in STREAM for h in (OldStream, NewStream, old_function, new_function)]
    + [
        (s, h)
        for s in DATAGRAM
        for h in (OldDatagram, NewDatagram, old_function, new_function)
    ],
    ids=lambda value: value.__name__,
)
@bounded
async def test_each_request_has_a_process(
    server_class: Any, handler: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), handler)
    async with serving(server):
        replies = [await ask(server, b"hello\n", tmp_path) for _ in range(3)]
    pids = {int(reply.split()[0]) for reply in replies}
    assert [reply.split()[1] for reply in replies] == [b"HELLO"] * 3
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert_sums_up(server)
    assert server.statistics().completed == 3


@pytest.mark.parametrize("server_class", DATAGRAM, ids=class_name)
@bounded
async def test_a_blocking_handler_may_receive_from_the_servers_socket(
    server_class: Any, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        sock = request[1]
        sock.sendto(b"more?", client_address)
        sock.sendto(b"got " + sock.recvfrom(100)[0], client_address)

    class Server(server_class):  # type: ignore[misc]
        max_children = 1  # Or the loop would take the second datagram.

    server = Server(bind_address(server_class, tmp_path), handler)
    async with serving(server):
        with pose(server, b"one", tmp_path) as client:
            assert await receive(client) == b"more?"
            client.send(b"two")
            assert await receive(client) == b"got two"
    assert server.statistics().accepted == 1


@pytest.mark.parametrize("colour", ["blocking", "async"])
@bounded
async def test_handle_request(colour: str) -> None:
    server = Keeps(OldStream if colour == "blocking" else NewStream)
    with pose(server, b"hello\n") as client:
        await server.handle_request()
        assert (await receive_to_end(client)).endswith(b" HELLO")
    assert server.active_children == set()
    await server.server_close()


@bounded
async def test_context_variables_reach_the_handler() -> None:
    variable: contextvars.ContextVar[bytes] = contextvars.ContextVar("variable")

    class Server(ForkingTCPServer):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            variable.set(b"set in the parent")
            await super().finish_request(request, client_address)

    def old(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(variable.get(b"unset"))

    async def new(request: Any, client_address: Any, server: Any) -> None:
        await request.send_all(variable.get(b"unset"))

    for handler in (old, new):
        async with serving(Server(LOCAL, handler)) as server:
            assert await ask(server, b"") == b"set in the parent", handler


@bounded
async def test_finish_request_may_wrap_the_request() -> None:
    class Server(ForkingTCPServer):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            wrapped = trio.StapledStream(request, request)
            await super().finish_request(wrapped, client_address)

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        await request.send_all(await request.receive_some())

    async with serving(Server(LOCAL, handler)) as server:
        assert await ask(server, b"wrapped") == b"wrapped"
    assert server.statistics().completed == 1


@bounded
async def test_an_async_child_may_use_threads_of_trio() -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        await trio.to_thread.run_sync(bool)
        await request.send_all(b"done")

    await trio.to_thread.run_sync(bool)  # The parent has an idle thread; the child not.
    async with serving(Keeps(handler)) as server:
        assert await ask(server, b"") == b"done"


# -- the children, as the server knows them ------------------------------------------------


@bounded
async def test_active_children() -> None:
    async with serving(Keeps(old_function)) as server:
        assert server.active_children is None
        with connect(server.server_address) as one, connect(server.server_address) as two:
            while len(server.active_children or ()) < 2:
                await trio.testing.wait_all_tasks_blocked(0.001)
            known = set(server.active_children)
            pids = set()
            for client in (one, two):
                client.sendall(b"x")
                pids.add(int((await receive_to_end(client)).split()[0]))
            assert known == pids
        await server.collect_children(blocking=True)
        assert server.active_children == set()


@bounded
async def test_at_max_children_the_kernel_queues_and_the_program_runs() -> None:
    async with serving(Keeps(old_function)) as server:
        server.max_children = 2
        clients = [connect(server.server_address) for _ in range(3)]
        with clients[0], clients[1], clients[2]:
            while server.statistics().active < 2:
                await trio.testing.wait_all_tasks_blocked(0.001)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert server.statistics().accepted == 2  # And this task is running.
            assert len(server.active_children) == 2
            for client in clients:
                client.sendall(b"x")
                assert (await receive_to_end(client)).endswith(b" X")
        assert server.statistics().accepted == 3


@bounded
async def test_the_loop_goes_round_between_a_few_forks() -> None:
    rounds = 0
    forked_in: list[int] = []

    class Server(Keeps):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            forked_in.append(rounds)
            await super().finish_request(request, client_address)

    server = Server(old_function)
    clients = [pose(server, b"x") for _ in range(5 * BATCH)]
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_forever)
        while server.statistics().accepted < len(clients):
            await trio.lowlevel.checkpoint()
            rounds += 1
        for client in clients:
            with client:
                assert (await receive_to_end(client)).endswith(b" X")
        await server.shutdown()
    # Trio shuffles the tasks of a round, so two rounds may follow each other unseen.
    assert max(forked_in.count(number) for number in forked_in) <= 2 * BATCH


@bounded
async def test_collect_children_waits_if_blocking() -> None:
    async with serving(Keeps(old_function)) as server:
        await server.collect_children()
        await server.collect_children(blocking=True)
        client = connect(server.server_address)
        with client:
            while not server.active_children:
                await trio.testing.wait_all_tasks_blocked(0.001)
            await server.collect_children()  # At once.
            assert server.active_children
            async with trio.open_nursery() as nursery:
                collected = trio.Event()

                @nursery.start_soon
                async def collect() -> None:
                    await server.collect_children(blocking=True)
                    collected.set()

                await trio.testing.wait_all_tasks_blocked(0.01)
                assert not collected.is_set()
                client.sendall(b"x")
                await collected.wait()
        assert server.active_children == set()


@bounded
async def test_a_strangers_child_keeps_its_exit_status() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as stranger:
        # It has ended, and nobody has asked for its status.
        os.waitid(os.P_PID, stranger.pid, os.WEXITED | os.WNOWAIT)
        async with serving(Keeps(old_function)) as server:
            for _ in range(3):
                await ask(server, b"x")
            await server.collect_children(blocking=True)
        assert stranger.wait() == 7


# -- errors --------------------------------------------------------------------------------


class OwnError(Exception):
    def __init__(self, first: str, second: int) -> None:
        super().__init__(f"{first} {second}")  # So it cannot be unpickled.
        self.first, self.second = first, second


class GoodError(Exception):
    def __init__(self, first: str, second: int) -> None:
        super().__init__(first, second)
        self.first, self.second = first, second


class UnpicklableError(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("not for pickling")


class UnpicklableAndUnprintableError(UnpicklableError):
    def __str__(self) -> str:
        raise RuntimeError("not for printing")


PARENT = os.getpid()


def _rebuild_in_child_only() -> Any:
    if os.getpid() == PARENT:
        raise LookupError("not here")
    return ChildOnlyError()


class ChildOnlyError(Exception):
    def __reduce__(self) -> Any:
        return _rebuild_in_child_only, ()


def raiser(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


async def error_of(handler: Any) -> Any:
    """Return what `handle_error` gets of a request."""
    async with serving(Keeps(handler)) as server:
        await ask(server, b"x")
        await server.collect_children(blocking=True)
    seen = server.statistics()
    assert seen.failed == 1
    assert_sums_up(server)
    [error] = server.errors
    return error


@both_colours
@bounded
async def test_an_error_comes_home(colour: Any) -> None:
    error = await error_of(colour(raiser(GoodError("one", 2))))
    assert type(error) is GoodError
    assert (error.first, error.second) == ("one", 2)
    assert "raise error" in str(error.__cause__)
    assert "GoodError: ('one', 2)" in str(error.__cause__)


@both_colours
@bounded
async def test_a_group_comes_home(colour: Any) -> None:
    group = ExceptionGroup("both", [ValueError("v"), KeyError("k")])
    error = await error_of(colour(raiser(group)))
    assert type(error) is ExceptionGroup
    assert [type(leaf) for leaf in error.exceptions] == [ValueError, KeyError]
    assert "ValueError: v" in str(error.__cause__)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OwnError("one", 2), "OwnError: one 2"),
        (UnpicklableError("this one"), "UnpicklableError: this one"),
        (UnpicklableAndUnprintableError(), "UnpicklableAndUnprintableError"),
        (ChildOnlyError("that one"), "ChildOnlyError: that one"),
        (ValueError(threading.Lock()), "ValueError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@bounded
async def test_an_error_that_cannot_travel_is_described(
    error: Exception, words: str
) -> None:
    found = await error_of(blocking_only(raiser(error)))
    assert type(found) is ChildFailed
    assert words in str(found)
    assert "raise error" in str(found.__cause__)


@bounded
async def test_a_huge_traceback_is_cut_from_its_beginning() -> None:
    found = await error_of(blocking_only(raiser(UnpicklableError("x" * 10**6 + "end"))))
    assert type(found) is ChildFailed
    assert len(str(found.__cause__)) < 200_000
    assert "xend" in str(found.__cause__)


@bounded
async def test_the_log_shows_the_childs_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def the_guilty_function() -> None:
        raise ValueError("oh")

    async with serving(ForkingTCPServer(LOCAL, blocking_only(the_guilty_function))) as s:
        await ask(s, b"x")
        await s.collect_children(blocking=True)
    [record] = caplog.records
    assert record.levelno == logging.ERROR
    assert caplog.text.count("in the_guilty_function\n") == 1
    assert 'raise ValueError("oh")\n' in caplog.text  # Lines, not a repr of them.


@both_colours
@bounded
async def test_a_peers_fault_is_one_quiet_line(
    colour: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trio_socketserver")
    handler = colour(raiser(ConnectionResetError(errno.ECONNRESET, "reset")))
    async with serving(ForkingTCPServer(LOCAL, handler)) as server:
        await ask(server, b"x")
        await server.collect_children(blocking=True)
    [record] = caplog.records
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert server.statistics().peer_errors == 1


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "SIGKILL"),
        (signal.SIGALRM, "SIGALRM"),
        (int(signal.SIGRTMIN) + 2, str(int(signal.SIGRTMIN) + 2)),
    ],
)
@both_colours
@bounded
async def test_a_child_that_dies_of_a_signal(colour: Any, number: int, words: str) -> None:
    error = await error_of(colour(lambda: os.kill(os.getpid(), number)))
    assert type(error) is ChildFailed
    assert words in str(error)


@both_colours
@bounded
async def test_a_child_that_exits_with_a_status(colour: Any) -> None:
    error = await error_of(colour(lambda: os._exit(3)))
    assert type(error) is ChildFailed
    assert "exited with status 3" in str(error)


@both_colours
@bounded
async def test_a_child_that_exits_well(colour: Any) -> None:
    async with serving(Keeps(colour(lambda: os._exit(0)))) as server:
        await ask(server, b"x")
        await server.collect_children(blocking=True)
    assert not server.errors
    assert server.statistics().completed == 1


async def _in_a_nursery(request: Any, client_address: Any, server: Any) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep, NEVER)
        sys.exit("by a handler")


@pytest.mark.parametrize(
    "handler",
    [
        blocking_only(raiser(SystemExit("by a handler"))),
        async_only(raiser(SystemExit("by a handler"))),
        _in_a_nursery,
    ],
    ids=["blocking", "async", "in a nursery"],
)
@bounded
async def test_system_exit_ends_the_request_only(
    handler: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Keeps(handler)) as server:
        for _ in range(2):
            await ask(server, b"x")
            await server.collect_children(blocking=True)
    assert not server.errors
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert "by a handler" in caplog.text
    assert server.statistics().active == 0


@both_colours
@bounded
async def test_keyboard_interrupt_ends_the_server(colour: Any) -> None:
    server = Keeps(colour(raiser(KeyboardInterrupt())))

    async def serve_one() -> None:
        async with server:
            with pose(server, b"x"):
                await server.serve_forever()

    with pytest.raises(KeyboardInterrupt):
        await serve_one()
    assert server.socket.fileno() == -1
    assert_sums_up(server)


@both_colours
@bounded
async def test_fork_may_fail(colour: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    async with serving(Keeps(colour(bool))) as server:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fork", fail)
            await ask(server, b"x")
        await ask(server, b"x")
        await server.collect_children(blocking=True)
    [error] = server.errors
    assert error.errno == errno.EAGAIN
    assert (server.statistics().failed, server.statistics().completed) == (1, 1)
    assert server.active_children == set()


@bounded
async def test_no_descriptor_for_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with serving(Keeps(old_function)) as server:
        with monkeypatch.context() as patch:
            patch.setattr("trio_socketserver._forking.socket.socketpair", fail)
            await ask(server, b"x")
        with monkeypatch.context() as patch:
            patch.setattr("trio_socketserver._children.nameless_file", fail)
            await ask(server, b"x")
        assert (await ask(server, b"x")).endswith(b"X")
    assert [error.errno for error in server.errors] == [errno.EMFILE] * 2


@bounded
async def test_finish_request_needs_a_server_that_serves() -> None:
    server = Keeps(old_function)
    with pytest.raises(RuntimeError, match="serves"):
        await server.finish_request(object(), None)
    await server.server_close()


# -- the server, as a child sees it --------------------------------------------------------


class Hears(Keeps):
    """Notes what reaches the parent; every process has notes of its own."""

    def __init__(self, handler: Any) -> None:
        super().__init__(handler)
        self.notes: list[str] = []

    async def shutdown(self) -> None:
        self.notes.append(f"shutdown in {os.getpid()}")
        await super().shutdown()

    async def server_close(self) -> None:
        self.notes.append(f"server_close in {os.getpid()}")
        await super().server_close()

    async def question(self, number: int) -> int:
        self.notes.append("question")
        await trio.sleep(0)
        return number * 2


@pytest.mark.parametrize("name", ["shutdown", "server_close"])
@pytest.mark.parametrize("colour", ["blocking", "async"])
@bounded
async def test_a_child_may_end_the_server(name: str, colour: str) -> None:
    def old(request: Any, client_address: Any, server: Any) -> None:
        getattr(server, name)()
        request.sendall(b"goes on " + request.recv(100))

    async def new(request: Any, client_address: Any, server: Any) -> None:
        await getattr(server, name)()
        await request.send_all(b"goes on " + await request.receive_some())

    server = Hears(old if colour == "blocking" else new)
    async with server, trio.open_nursery() as nursery:
        serving = await nursery.start(_serve_and_tell, server)
        with connect(server.server_address) as client:
            await serving.wait()  # The loop has ended; the child waits for us.
            assert server.active_children
            client.sendall(b"still")
            assert await receive_to_end(client) == b"goes on still"
    assert server.notes[0] == f"{name} in {os.getpid()}"
    assert server.statistics().completed == 1


async def _serve_and_tell(server: Any, *, task_status: Any) -> None:
    ended = trio.Event()
    task_status.started(ended)
    await server.serve_forever()
    ended.set()


@bounded
async def test_a_helper_of_the_servers_may_shut_it_down() -> None:
    class Server(Keeps):
        async def stop(self) -> None:
            await self.shutdown()

    def old(request: Any, client_address: Any, server: Any) -> None:
        server.stop()

    async def new(request: Any, client_address: Any, server: Any) -> None:
        await server.stop()

    for handler in (old, new):
        server = Server(handler)
        async with server:
            with pose(server, b""):
                await server.serve_forever()
        assert not server.errors


@bounded
async def test_a_child_after_an_idle_time_may_end_the_server() -> None:
    """The one before has left nobody behind who would not listen any more."""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        if request.recv(100) == b"end":
            server.shutdown()

    server = Hears(handler)
    async with server, trio.open_nursery() as nursery:
        serving = await nursery.start(_serve_and_tell, server)
        for _ in range(2):
            await ask(server, b"go on")
            await server.collect_children(blocking=True)
        await ask(server, b"end")
        await serving.wait()
    assert server.notes[0] == f"shutdown in {os.getpid()}"
    assert server.statistics().completed == 3


@bounded
async def test_children_are_heard_each_time_the_server_is_entered() -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        if request.recv(100) == b"end":
            server.server_close()

    server = Hears(handler)
    for words in (b"go on", b"go on", b"end"):
        assert server.fileno() != -1
        with pose(server, words) as client:
            await server.handle_request()
            assert await receive_to_end(client) == b""
    assert server.fileno() == -1
    assert not server.errors


@bounded
async def test_a_child_that_begins_when_closing_has_begun_is_heard() -> None:
    begun, go_on = trio.Event(), trio.Event()

    class Server(Hears):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            begun.set()
            await go_on.wait()
            await super().finish_request(request, client_address)

    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.shutdown()

    server = Server(handler)
    async with serving(server), trio.open_nursery() as nursery:
        client = connect(server.server_address)
        await begun.wait()
        nursery.start_soon(server.server_close)
        await trio.testing.wait_all_tasks_blocked(0.01)
        server.notes.clear()
        go_on.set()
        await receive_to_end(client)
        client.close()
    assert f"shutdown in {os.getpid()}" in server.notes
    assert not server.errors


@bounded
async def test_what_a_child_says_before_it_is_heard_is_not_lost() -> None:
    heard: list[bytes] = []

    class Server:
        _obey_child = staticmethod(heard.append)

    messages = _Messages()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(messages.hear, Server())
        messages.child_end.send(SHUTDOWN)
        messages.end()
    assert heard == [SHUTDOWN]


@pytest.mark.parametrize("colour", ["blocking", "async"])
@bounded
async def test_all_else_is_the_childs_own_copy(colour: str) -> None:
    def old(request: Any, client_address: Any, server: Any) -> None:
        assert isinstance(server, Hears)
        assert server.__class__ is Hears
        assert server.question(21) == 42
        server.extra = 1
        request.sendall(",".join(server.notes).encode())

    async def new(request: Any, client_address: Any, server: Any) -> None:
        assert isinstance(server, Hears)
        assert server.__class__ is Hears
        assert await server.question(21) == 42
        server.extra = 1
        await request.send_all(",".join(server.notes).encode())

    async with serving(Hears(old if colour == "blocking" else new)) as server:
        assert await ask(server, b"") == b"question"
        assert server.notes == []
        assert not hasattr(server, "extra")
    assert not server.errors


@pytest.mark.parametrize("colour", ["blocking", "async"])
@bounded
async def test_slots_of_the_servers_class(colour: str) -> None:
    class Server(Keeps):
        __slots__ = ("slot",)

    def old(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(server.slot)

    async def new(request: Any, client_address: Any, server: Any) -> None:
        await request.send_all(server.slot)

    server = Server(old if colour == "blocking" else new)
    server.slot = b"in a slot"
    async with serving(server):
        assert await ask(server, b"") == b"in a slot"


@bounded
async def test_handle_error_called_by_a_blocking_child(tmp_path: Path) -> None:
    note = tmp_path / "note"

    class Server(ForkingTCPServer):
        async def handle_error(self, request: Any, client_address: Any) -> None:
            note.write_text(f"{sys.exception()!r}")

    def handler(request: Any, client_address: Any, server: Any) -> None:
        try:
            raise ValueError("mine")
        except ValueError:
            server.handle_error(request, client_address)

    async with serving(Server(LOCAL, handler)) as server:
        await ask(server, b"")
        await server.collect_children(blocking=True)
    assert note.read_text() == "ValueError('mine')"
    assert server.statistics().completed == 1


# -- cancellation --------------------------------------------------------------------------


class OldSleeper(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"in")
        time.sleep(NEVER)

    def finish(self) -> None:
        self.wfile.write(b"finished")
        super().finish()


class OldReader(OldSleeper):
    def handle(self) -> None:
        self.wfile.write(b"in")
        self.rfile.read()


class OldAsker(OldSleeper):
    """Waits in a coroutine method of the server's."""

    def handle(self) -> None:
        self.wfile.write(b"in")
        self.server.sleep_long()  # type: ignore[attr-defined]


class NewSleeper(trio_socketserver.StreamRequestHandler):
    async def handle(self) -> None:
        await self.request.send_all(b"in")
        await trio.sleep_forever()

    async def finish(self) -> None:
        await trio.sleep(0)
        await self.request.send_all(b"finished")
        await super().finish()


class Sleeps(Keeps):
    async def sleep_long(self) -> None:
        await trio.sleep(NEVER)


all_sleepers = pytest.mark.parametrize(
    "handler", [OldSleeper, OldReader, OldAsker, NewSleeper], ids=class_name
)
sleepers = pytest.mark.parametrize("handler", [OldSleeper, NewSleeper], ids=class_name)


def assert_gone(server: Any) -> None:
    """No child is left, as a zombie or otherwise."""
    assert server.active_children == set()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@all_sleepers
@bounded
async def test_cancelled_from_outside(handler: Any) -> None:
    server = Sleeps(handler)
    with trio.CancelScope() as scope:
        async with serving(server):
            client = connect(server.server_address)
            assert await receive(client, 2) == b"in"
            scope.cancel()
    with client:
        assert await receive_to_end(client) == b"finished"
    assert scope.cancelled_caught
    assert server.statistics().cancelled == 1
    assert not server.errors
    assert_gone(server)


@sleepers
@pytest.mark.parametrize(
    ("attribute", "value"), [("block_on_close", False), ("graceful_timeout", 0.01)]
)
@bounded
async def test_closing_cancels(handler: Any, attribute: str, value: Any) -> None:
    server = Sleeps(handler)
    setattr(server, attribute, value)
    async with serving(server):
        client = connect(server.server_address)
        assert await receive(client, 2) == b"in"
    with client:
        assert await receive_to_end(client) == b"finished"
    assert server.statistics().cancelled == 1
    assert_gone(server)


@sleepers
@bounded
async def test_request_timeout(handler: Any, clock: trio.testing.MockClock) -> None:
    server = Sleeps(handler)
    server.request_timeout = PATIENCE
    async with serving(server):
        with connect(server.server_address) as client:
            assert await receive(client, 2) == b"in"
            clock.jump(PATIENCE)
            assert await receive_to_end(client) == b"finished"
        await server.collect_children(blocking=True)
    [error] = server.errors
    assert type(error) is RequestTimeout
    assert_gone(server)


@sleepers
@bounded
async def test_a_users_scope_around_finish_request(handler: Any) -> None:
    scope = trio.CancelScope()

    class Server(Sleeps):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            with scope:
                await super().finish_request(request, client_address)

    async with serving(Server(handler)) as server:
        with connect(server.server_address) as client:
            assert await receive(client, 2) == b"in"
            scope.cancel()
            assert await receive_to_end(client) == b"finished"
    assert server.statistics().completed == 1
    assert_gone(server)


@pytest.mark.parametrize("has_pidfd", [True, False])
@bounded
async def test_a_stubborn_child_is_killed(
    has_pidfd: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        request.sendall(b"in")
        stubborn_sleep()

    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    server = Sleeps(handler)
    server.cleanup_timeout = 0.05
    with trio.CancelScope() as scope:
        async with serving(server):
            client = connect(server.server_address)
            assert await receive(client, 2) == b"in"
            scope.cancel()
    client.close()
    assert server.statistics().cancelled == 1
    assert_gone(server)


@bounded
async def test_a_handler_that_catches_system_exit_is_killed(
    clock: trio.testing.MockClock,
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        try:
            request.sendall(b"in")
            stubborn_sleep()
        except SystemExit:
            request.sendall(b"no")
            stubborn_sleep()

    async def hear_it_refuse() -> None:
        assert await receive(client, 2) == b"no"
        clock.jump(PATIENCE)
        assert await receive_to_end(client) == b""

    server = Sleeps(handler)
    server.cleanup_timeout = PATIENCE
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with serving(server):
                client = connect(server.server_address)
                assert await receive(client, 2) == b"in"
                nursery.start_soon(hear_it_refuse)
                scope.cancel()
    client.close()
    assert_gone(server)


@bounded
async def test_a_thread_of_the_handlers_that_waits_in_trio_hides_no_sigterm() -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        def wait() -> None:
            with contextlib.suppress(SystemExit):
                server.sleep_long()

        threading.Thread(target=wait, daemon=True).start()
        time.sleep(0.1)  # It waits by now; if not, the test passes for nothing.
        try:
            request.sendall(b"in")
            stubborn_sleep()
        finally:
            request.sendall(b"finished")

    server = Sleeps(handler)
    server.cleanup_timeout = REAL_LIMIT / 2
    with trio.CancelScope() as scope:
        async with serving(server):
            client = connect(server.server_address)
            assert await receive(client, 2) == b"in"
            scope.cancel()
    with client:
        assert await receive_to_end(client) == b"finished"


@bounded
async def test_cancelled_before_the_child_has_begun() -> None:
    class Server(Sleeps):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            with trio.CancelScope() as scope:
                scope.cancel()
                await super().finish_request(request, client_address)

    for handler in (OldSleeper, NewSleeper):
        async with serving(Server(handler)) as server:
            with connect(server.server_address) as client:
                await receive_to_end(client)
        assert server.statistics().completed == 1
        assert_gone(server)


@pytest.mark.parametrize("handler", [OldSleeper, NewSleeper], ids=class_name)
@bounded
async def test_ten_at_once(handler: Any) -> None:
    server = Sleeps(handler)
    clients = []
    with trio.CancelScope() as scope:
        async with serving(server):
            clients = [connect(server.server_address) for _ in range(10)]
            for client in clients:
                assert await receive(client, 2) == b"in"
            scope.cancel()
    for client in clients:
        with client:
            assert await receive_to_end(client) == b"finished"
    assert server.statistics().cancelled == 10
    assert_gone(server)


# -- what a child begins with --------------------------------------------------------------


def _tell_signals(request: Any, client_address: Any, server: Any) -> None:
    numbers = (signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
    told = " ".join(repr(int(signal.getsignal(number))) for number in numbers)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    request.sendall(f"{told} {len(mask)} {signal.set_wakeup_fd(-1)}".encode())


@bounded
async def test_signals_begin_anew() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with trio.open_signal_receiver(signal.SIGHUP):
            async with serving(Keeps(_tell_signals)) as server:
                told = (await ask(server, b"")).split()
    finally:
        signal.signal(signal.SIGUSR1, before)
    default, ignored = b"%d" % signal.SIG_DFL, b"%d" % signal.SIG_IGN
    assert told == [default, default, ignored, b"0", b"-1"]


@bounded
async def test_a_signal_to_a_child_does_not_reach_the_parent() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        error = await error_of(blocking_only(lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "SIGUSR1" in str(error)
    assert not heard


@both_colours
@bounded
async def test_sigint_is_ignored(colour: Any) -> None:
    async with serving(Keeps(colour(lambda: os.kill(os.getpid(), 2)))) as server:
        await ask(server, b"")
        await server.collect_children(blocking=True)
    assert server.statistics().completed == 1


def test_ctrl_c_between_fork_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def fork_and_interrupt() -> int:
        pid = fork()
        if pid:
            os.kill(os.getpid(), signal.SIGINT)
        return pid

    server = Keeps(OldSleeper)

    async def main() -> None:
        with trio.fail_after(REAL_LIMIT):
            async with server:
                with connect(server.server_address):
                    await server.serve_forever()

    monkeypatch.setattr(os, "fork", fork_and_interrupt)
    # Who starts the tests in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            trio.run(main)
    finally:
        signal.signal(signal.SIGINT, before)
    assert_gone(server)


def _tell_sockets(request: Any, client_address: Any, server: Any) -> None:
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{name}")
            if target.startswith("socket:"):
                inodes.add(target)
    request.sendall(" ".join(inodes).encode())


def _inode(sock: Any) -> str:
    return os.readlink(f"/proc/self/fd/{sock.fileno()}")


@bounded
async def test_a_child_has_its_own_request_only() -> None:
    received = trio.Event()
    held: list[Any] = []

    async def hold(request: Any, client_address: Any, server: Any) -> None:
        held.append(request)
        received.set()
        await trio.sleep_forever()

    other = NurseryTCPServer(LOCAL, hold)
    other.block_on_close = False
    idle = ForkingUDPServer(LOCAL, old_function)
    async with idle, serving(other), serving(Keeps(_tell_sockets)) as server:
        with connect(other.server_address), connect(server.server_address) as first:
            await received.wait()
            open_in_child = (await receive_to_end(first)).decode().split()
            assert open_in_child
            for sock in (server, other, idle, held[0]):
                assert _inode(sock) not in open_in_child


@bounded
async def test_the_port_is_free_at_once() -> None:
    """Though a child is at work still, and would not end by itself."""
    server = Keeps(OldReader)
    server.allow_reuse_address = False
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        client = connect(server.server_address)
        assert await receive(client, 2) == b"in"
        nursery.start_soon(server.server_close)
        while server.socket.fileno() != -1:
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert server.active_children
        successor = ForkingTCPServer(server.server_address, old_function)
        async with serving(successor):
            assert (await ask(successor, b"x")).endswith(b"X")
        client.shutdown(1)
        assert await receive_to_end(client) == b"finished"
        client.close()


# -- whole programs ------------------------------------------------------------------------

PROGRAM = """
import atexit, io, os, sys, threading, trio
import trio_socketserver
from trio_socketserver._combinations import ForkingTCPServer

# Buffered, whatever PYTHONUNBUFFERED says.
sys.stdout = io.TextIOWrapper(io.BufferedWriter(io.FileIO(1, "w", closefd=False)))
atexit.register(lambda: print("atexit", flush=True))

def old(request, client_address, server):
    print("blocking child")

async def new(request, client_address, server):
    print("async child")

async def main():
    print("parent begins")
    for handler in (old, new):
        async with ForkingTCPServer(("127.0.0.1", 0), handler) as server:
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve_forever)
                for _ in range(3):
                    stream = await trio.open_tcp_stream(*server.server_address)
                    await stream.receive_some()
                    await stream.aclose()
                await server.shutdown()
    print("parent ends")

trio.run(main)
"""


def test_buffered_output_is_written_once(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with running(str(program)) as process:
        out, err = process.communicate()
    assert not err
    assert out.splitlines() == [
        "parent begins",
        *["blocking child"] * 3,
        *["async child"] * 3,
        "parent ends",
        "atexit",
    ]


THREADS_PROGRAM = """
import threading, trio
from trio_socketserver._combinations import ForkingTCPServer

async def handler(request, client_address, server):
    await request.send_all(b"%d" % threading.active_count())

done = threading.Event()
for _ in range(50):
    threading.Thread(target=done.wait).start()

async def main():
    async with ForkingTCPServer(("127.0.0.1", 0), handler) as server:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            for _ in range(3):
                stream = await trio.open_tcp_stream(*server.server_address)
                print(await stream.receive_some())
                await stream.aclose()
            await server.shutdown()
    print(server.statistics().completed, server.statistics().failed)

try:
    trio.run(main)
finally:
    done.set()
"""


@pytest.mark.parametrize("warn", ["ignore", "error"])
def test_fifty_threads_in_the_parent(warn: str, tmp_path: Path) -> None:
    """Even where Python's warning about it is an error, no child is lost."""
    program = tmp_path / "program.py"
    program.write_text(THREADS_PROGRAM)
    with running("-W", f"{warn}::DeprecationWarning", str(program)) as process:
        out, err = process.communicate()
    assert not err
    # The main thread, which can do nothing else, and that of the handler's trio.
    assert out.splitlines() == [*["b'2'"] * 3, "3 0"]


def test_a_server_in_another_thread_than_the_main_one() -> None:
    replies: list[bytes] = []

    async def main() -> None:
        for handler in (OldStream, NewStream):
            async with serving(Keeps(handler)) as server:
                replies.append(await ask(server, b"x\n"))

    thread = threading.Thread(target=trio.run, args=[main])
    thread.start()
    thread.join()
    assert [reply.split()[1] for reply in replies] == [b"X", b"X"]


def test_clients_elsewhere_see_the_end(tmp_path: Path) -> None:
    """A client in another process, as they are; end-of-file goes both ways."""
    program = tmp_path / "program.py"
    program.write_text(
        PROGRAM.split("async def main")[0]
        + """
async def main():
    async with ForkingTCPServer(("127.0.0.1", 0), handler) as server:
        print(server.server_address[1], flush=True)
        for _ in range(2):
            await server.handle_request()

async def handler(request, client_address, server):
    while data := await request.receive_some():
        await request.send_all(data)

trio.run(main)
"""
    )
    with running(str(program)) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with connect(address) as one, connect(address) as two:
            for client in (two, one):
                client.sendall(b"hello")
                assert client.recv(5) == b"hello"
                client.shutdown(1)
                assert receive_until_closed(client) == b""
        assert process.wait() == 0
