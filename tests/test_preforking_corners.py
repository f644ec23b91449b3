"""Programs with worker processes, and a worker without a process of its own.

Programs are run as such, because of their main module, of who gets which signal, and of how
their processes end without them.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Self

import pytest
import trio
import trio.testing
from helpers import (
    REAL_LIMIT,
    answer,
    bounded,
    connect,
    line_of,
    pose,
    printed_address,
    receive_until_closed,
    running,
)
from prefork_clients import LOCAL, parsed
from prefork_servers import EndsItself, Tasks, evaluate

from trio_socketserver import _worker_process
from trio_socketserver._children import nameless_file
from trio_socketserver._crew import Preparation
from trio_socketserver._fresh_interpreter import MainModule
from trio_socketserver._preforking import pickled
from trio_socketserver._statistics import SharedCounters
from trio_socketserver._worker_link import Frames, News, Order, WorkerLink, socket_pair
from trio_socketserver._worker_process import ParentWatch

# -- programs ------------------------------------------------------------------------------

PROGRAM = """
import logging, os, sys
from trio_socketserver import NurseryTCPServer, PreforkingMixIn, StreamRequestHandler, run

class Server(PreforkingMixIn, NurseryTCPServer):
    workers = 2

class Handler(StreamRequestHandler):
    async def handle(self):
        await self.wfile.write(b"%d\\n" % os.getpid())
        await self.wfile.flush()
        await self.server.draining.wait()
        itself = type(self) is sys.modules["__main__"].Handler
        told = __name__, itself, sys.argv, tuple(sys.flags), sys.path
        await self.wfile.write(repr(told).encode())

logging.basicConfig()

if __name__ == "__main__":
    os.setpgid(0, 0)
    server = Server(("127.0.0.1", 0), Handler)
    print(repr((sys.argv, tuple(sys.flags), sys.path)), flush=True)
    run(server, started=lambda: print("%s:%d" % server.server_address, flush=True))
    print(server.statistics().completed)
"""


def as_script(folder: Path, text: str) -> list[str]:
    (folder / "program.py").write_text(text)
    return ["program.py"]


def as_module(folder: Path, text: str) -> list[str]:
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").write_text("")
    (folder / "package" / "part.py").write_text(text)
    return ["-m", "package.part"]


def as_directory(folder: Path, text: str) -> list[str]:
    (folder / "directory").mkdir()
    (folder / "directory" / "__main__.py").write_text(text)
    return ["directory"]


def as_archive(folder: Path, text: str) -> list[str]:
    with zipfile.ZipFile(folder / "program.pyz", "w") as archive:
        archive.writestr("__main__.py", text)
    return ["program.pyz"]


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Wait until nobody holds a program's output any more: its workers are gone too."""
    return process.communicate(timeout=REAL_LIMIT)


@pytest.mark.parametrize(
    ("make", "options", "number", "to_all"),
    [
        (as_script, [], signal.SIGINT, True),
        (as_module, ["-X", "dev"], signal.SIGTERM, True),
        (as_directory, ["-O", "-X", "utf8=1"], signal.SIGINT, False),
        (as_archive, ["-s"], signal.SIGTERM, False),
    ],
)
def test_programs(
    make: Any, options: list[str], number: int, to_all: bool, tmp_path: Path
) -> None:
    """Classes of the main module are found; the first signal drains, whoever gets it."""
    arguments = [*options, *make(tmp_path, PROGRAM), "--an", "argument"]
    with running(*arguments, folder=tmp_path) as process:
        here = eval(line_of(process))
        with connect(printed_address(line_of(process))) as client:
            client.recv(100)
            if to_all:
                os.killpg(process.pid, number)
            else:
                process.send_signal(number)
            name, itself, *there = eval(receive_until_closed(client))
        out, err = end(process)
    assert process.returncode == 0, err
    assert (name, itself) == ("__mp_main__", True)
    assert tuple(there) == here
    assert out == "1\n"
    # Nothing that was not closed, and no error; but a worker that has got a signal may end
    # before the program has heard of its own.
    assert "Warning" not in err
    assert "Traceback" not in err


SLOW_IMPORT = """
import os, sys, time

class Finder:
    def find_spec(name, path, target=None):
        if name == "trio":
            os.write(1, b"importing\\n")  # In one piece, whoever else does so.
            time.sleep(1000)

if "trio_socketserver._worker_process" in sys.orig_argv:
    sys.meta_path.insert(0, Finder)
"""


def test_ctrl_c_during_start_up(tmp_path: Path) -> None:
    """It goes to the workers too, which have to ignore it from the beginning."""
    (tmp_path / "sitecustomize.py").write_text(SLOW_IMPORT)
    with_path = 'os.environ["PYTHONPATH"] += os.pathsep + os.getcwd()\n    os.setpgid'
    arguments = as_script(tmp_path, PROGRAM.replace("os.setpgid", with_path))
    with running(*arguments, folder=tmp_path) as process:
        lines = [line_of(process) for _ in range(4)]
        assert lines[2:] == ["importing\n"] * 2
        os.killpg(process.pid, signal.SIGINT)
        out, err = end(process)
    assert process.returncode == 0
    assert out == "0\n"
    assert err == ""


UNGUARDED = PROGRAM.replace('if __name__ == "__main__":', "if True:")
SERVER_UNGUARDED = """
import trio
from trio_socketserver import PreforkingMixIn, TCPServer, run

class Server(PreforkingMixIn, TCPServer):
    workers = 1

async def handler(request, client_address, server): ...

server = Server(("127.0.0.1", 0), handler)
if __name__ == "__main__":
    run(server)
"""
FAILING = "if __name__ != '__main__': raise LookupError('not again')\n" + PROGRAM


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            UNGUARDED.replace("os.setpgid(0, 0)", ""),
            "RuntimeError: a worker process, which",
        ),
        (SERVER_UNGUARDED, "RuntimeError: a worker process, which"),
        (FAILING, "LookupError: not again"),
    ],
    ids=["unguarded", "server unguarded", "failing"],
)
def test_a_main_module_that_cannot_be_run_again(
    text: str, words: str, tmp_path: Path
) -> None:
    few = "import trio_socketserver._crew as c; c.START_ATTEMPTS = 2; c.RESTART_DELAY = 0\n"
    with running(*as_script(tmp_path, few + text), folder=tmp_path) as process:
        _, err = end(process)
    assert process.returncode == 1
    assert "ChildFailed: 2 worker processes in a row have ended before" in err
    assert words in err
    assert "belongs under \"if __name__ == '__main__':\"" in err


def test_a_main_module_that_is_no_file(tmp_path: Path) -> None:
    refuse = "import trio_socketserver._crew as c; c.command = None\n"
    text = refuse + PROGRAM.replace("os.setpgid(0, 0)", "")
    with running("-c", text, folder=tmp_path) as process:
        _, err = end(process)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith("TypeError: Server cannot be taken to worker processes: some of")
    assert "python -c" in last


LOSES_PARENT = """
import os, signal, sys, time, trio
from trio_socketserver import NurseryTCPServer, PreforkingMixIn, _crew

_crew.EXIT_TIMEOUT = 0.05

class Server(PreforkingMixIn, NurseryTCPServer):
    workers = 2
    cleanup_timeout = 0

async def handler(request, client_address, server):
    request.socket.send(b"in")
    if sys.argv[1] == "stuck":
        time.sleep(1000)
    await trio.sleep_forever()

if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), handler)
    print("%s:%d" % server.server_address, flush=True)
    trio.run(server.serve_forever)
elif sys.argv[1] == "importing":
    os.write(1, b"importing\\n")
    time.sleep(1000)
"""


@pytest.mark.parametrize("state", ["idle", "busy", "stuck", "importing"])
def test_a_killed_program_leaves_no_worker(state: str, tmp_path: Path) -> None:
    with running(*as_script(tmp_path, LOSES_PARENT), state, folder=tmp_path) as process:
        address = printed_address(line_of(process))
        with contextlib.ExitStack() as stack:
            if state == "importing":
                assert line_of(process) == "importing\n"
            else:
                for _ in range(2):
                    # The second is another worker's if the first is stuck.
                    client = stack.enter_context(connect(address))
                    assert client.recv(2) == b"in"
                if state == "idle":
                    stack.close()
            process.kill()
            end(process)


# -- a worker without a process of its own -------------------------------------------------


@pytest.fixture
def no_end(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the statuses with which this process would have ended."""
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    # Nothing but the end of the process would close it.
    monkeypatch.setattr(_worker_process, "open_pidfd", lambda pid: None)
    return statuses


def join_watch() -> None:
    for thread in threading.enumerate():
        if thread.name == "parent watch":
            thread.join()


def test_the_watch_sees_the_link_closed(no_end: list[int]) -> None:
    """Where there are no pidfds."""
    ours, theirs = socket_pair()
    with theirs:
        watch = ParentWatch(os.getppid(), WorkerLink(theirs))
        watch.patience = 0.01
        ours.send(b"s")  # Orders are none of its business.
        assert no_end == []
        ours.close()
        join_watch()
    assert no_end == [1]


def test_the_watch_sees_the_server_s_process_end(
    no_end: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though what that has forked holds the link; and tells who listens to it."""
    ours, theirs = socket_pair()
    with subprocess.Popen(["sleep", "1000"]) as parent, ours, theirs:
        pidfd = os.pidfd_open(parent.pid)
        monkeypatch.setattr(_worker_process, "open_pidfd", lambda pid: pidfd)
        monkeypatch.setattr(os, "getppid", lambda: parent.pid)
        ParentWatch(parent.pid, WorkerLink(theirs))
        assert no_end == []
        parent.kill()
        join_watch()
        os.close(pidfd)
        assert theirs.recv(1) == b""
    assert no_end == [1]


def test_the_watch_comes_too_late(no_end: list[int]) -> None:
    """The process is another's child already."""
    ours, theirs = socket_pair()
    with ours, theirs:
        ParentWatch(os.getppid() + 1, WorkerLink(theirs))
        join_watch()
    assert no_end == [1]


def test_the_watch_begins_after_the_worker_has_failed(
    no_end: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread may be late where much else runs."""
    late: list[threading.Thread] = []
    ours, theirs = socket_pair()
    with ours, monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: late.append(thread))
        link = WorkerLink(theirs)
        ParentWatch(os.getppid() + 1, link)
        descriptor = link.fileno()
        link.detach()
        late[0].run()
        os.close(descriptor)
    assert no_end == [1]


class Peer:
    """The server's end of a link."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames = Frames()
        self._heard: list[tuple[News, bytes]] = []

    def order(self, *orders: Order) -> None:
        for order in orders:
            self._sock.send(order.value)

    async def hear(self) -> tuple[News, bytes]:
        while not self._heard:
            await trio.lowlevel.wait_readable(self._sock)
            data = self._sock.recv(65536)
            assert data
            self._heard += self._frames.feed(data)
        return self._heard.pop(0)


def copy_of(server: Any) -> Any:
    """Return the copy of *server* that a worker would have, with a socket."""
    copy = pickle.loads(pickled(server))
    copy.socket = server.socket
    return copy


@contextlib.asynccontextmanager
async def worker_of(
    server: Any, interval: float | None = None
) -> AsyncGenerator[tuple[Any, Peer]]:
    """Run a worker in this process, and yield its copy and the other end of its link."""
    ours, theirs = socket_pair()
    with ours, theirs:
        copy = copy_of(server)
        copy._link = link = WorkerLink(theirs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_worker_process._WorkerRun(copy, link, interval).run)
            yield copy, Peer(ours)


@bounded
async def test_stop_then_close() -> None:
    server = Tasks(LOCAL, evaluate)
    async with worker_of(server) as (copy, peer):
        assert await peer.hear() == (News.READY, b"")
        with pose(server, b"server.draining.wait()") as client:
            while not copy.statistics().active:
                await trio.testing.wait_all_tasks_blocked()
            peer.order(Order.STOP)
            assert await peer.hear() == (News.STOPPED, b"")
            assert copy.fileno() != -1
            peer.order(Order.CLOSE)
            assert parsed(await answer(client)).value is None
    assert copy.statistics().completed == 1
    assert copy.fileno() == -1


@bounded
async def test_close_before_it_has_begun() -> None:
    server = Tasks(LOCAL, evaluate)
    async with worker_of(server) as (copy, peer):
        peer.order(Order.CLOSE)
    assert copy.fileno() == -1


@bounded
async def test_retire() -> None:
    """It ends when there are no requests, at once or later."""
    server = Tasks(LOCAL, evaluate)
    async with worker_of(server) as (copy, peer):
        await peer.hear()
        with pose(server, b"trio.sleep(0.05)") as client:
            while not copy.statistics().accepted:
                await trio.testing.wait_all_tasks_blocked()
            peer.order(Order.STOP, Order.RETIRE)
            assert parsed(await answer(client)).value is None
    assert copy.statistics().completed == 1
    server = Tasks(LOCAL, evaluate)
    async with worker_of(server) as (copy, peer):
        await peer.hear()
        peer.order(Order.STOP, Order.RETIRE)
    assert copy.fileno() == -1


@pytest.mark.parametrize("at_once", [True, False])
@bounded
async def test_cancel(at_once: bool) -> None:
    server = Tasks(LOCAL, evaluate)
    async with worker_of(server) as (copy, peer):
        if not at_once:
            await peer.hear()
        peer.order(Order.CLOSE, Order.CANCEL)
    assert copy.fileno() == -1


@bounded
async def test_sigterm_closes() -> None:
    server = Tasks(LOCAL, evaluate)
    async with worker_of(server) as (copy, peer):
        await peer.hear()
        signal.raise_signal(signal.SIGTERM)
    assert copy.fileno() == -1


@bounded
async def test_a_loop_that_ends_by_itself_ends_the_worker() -> None:
    class Brief(Tasks):
        async def serve_forever(self, *arguments: Any, **options: Any) -> None:
            await trio.lowlevel.checkpoint()

    Brief.__qualname__ = Tasks.__qualname__
    server = Tasks(LOCAL, evaluate)
    ours, theirs = socket_pair()
    with ours, theirs:
        copy = copy_of(server)
        copy.__class__ = Brief
        copy._link = link = WorkerLink(theirs)
        await _worker_process._WorkerRun(copy, link, 0.5).run()
        assert await Peer(ours).hear() == (News.STOPPED, b"")
    assert copy.fileno() == -1


@pytest.mark.parametrize(
    ("call", "news"),
    [("shutdown", News.SHUTDOWN), ("server_close", News.SERVER_CLOSE)],
)
@bounded
async def test_what_a_handler_calls_is_passed_on(call: str, news: News) -> None:
    server = Tasks(LOCAL, evaluate)
    async with worker_of(server) as (copy, peer):
        await peer.hear()
        with pose(server, f"server.{call}()".encode()) as client:
            assert parsed(await answer(client)).value is None
            assert await peer.hear() == (news, b"")
        assert not copy.draining.is_set()
        # So is what others call, as tasks and threads that a handler has left.
        await getattr(copy, call)()
        assert await peer.hear() == (news, b"")
        assert not copy.draining.is_set()
        peer.order(Order.CLOSE)


@bounded
async def test_what_a_hook_of_the_loop_calls_is_passed_on() -> None:
    server = EndsItself(LOCAL, evaluate)
    async with worker_of(server, 0.01) as (_, peer):
        await peer.hear()
        assert await peer.hear() == (News.SHUTDOWN, b"")
        peer.order(Order.CANCEL)


class Place:
    """What `main` finds in a process of its own, in this one. All is put back at the end.

    Attributes:
        link: the server's end of the link.
        counters: the server's view of what the worker counts.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, server: Any, told: bytes) -> None:
        self._stack = contextlib.ExitStack()
        self._server = server
        self._told = told
        self._patch = monkeypatch

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self._enter(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def _enter(self, stack: contextlib.ExitStack) -> None:
        stack.callback(self._server._close_listener)
        own: dict[int, Any] = {}
        stack.callback(close_what_is_left, own)  # What the process's end would close.
        stack.callback(join_watch)
        stdin = types.SimpleNamespace(buffer=io.BytesIO(self._told))
        figures = nameless_file()
        stack.callback(os.close, figures)
        os.ftruncate(figures, SharedCounters.SIZE)
        self.counters = SharedCounters(mmap.mmap(figures, 0))
        stack.callback(self.counters.close)
        self.link, theirs = socket_pair()
        stack.enter_context(self.link)
        self.link.settimeout(REAL_LIMIT)
        passed = os.dup(self._server.fileno()), theirs.detach(), os.dup(figures)
        own.update({descriptor: identity(descriptor) for descriptor in passed})
        self._patch.setattr(sys, "argv", ["-c", *map(str, [os.getppid(), *passed])])
        self._patch.setattr(sys, "stdin", stdin)
        self._patch.setattr("trio_socketserver._crew.EXIT_TIMEOUT", 0.0)
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        root = logging.getLogger()
        stack.callback(setattr, root, "handlers", root.handlers)
        stack.callback(root.setLevel, root.level)
        root.handlers = []


def identity(descriptor: int) -> tuple[int, int] | None:
    """Tell what a descriptor is open for; None if it is not open."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def close_what_is_left(descriptors: dict[int, Any]) -> None:
    gc.collect()
    for descriptor, before in descriptors.items():
        if identity(descriptor) == before:
            os.close(descriptor)


def told(server: Any, main: MainModule | None = None) -> bytes:
    levels: dict[str | None, int] = {None: logging.WARNING}
    preparation = Preparation(["it", "self"], main, levels, None, pickled(server))
    return pickle.dumps(preparation)


@pytest.mark.usefixtures("no_end")
def test_being_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Tasks(LOCAL, evaluate)
    server.cleanup_timeout = 0
    replies: list[bytes] = []
    news: list[News] = []

    def talk() -> None:
        frames = Frames()
        assert [word for word, _ in frames.feed(place.link.recv(65536))] == [News.READY]
        with connect(server.server_address) as client:
            client.sendall(
                b"(sys.argv, signal.getsignal(2) is signal.SIG_IGN, server._batch, "
                b"logging.warning('logged'))"
            )
            client.shutdown(socket.SHUT_WR)
            replies.append(receive_until_closed(client))
        place.link.send(Order.STOP.value)
        while News.STOPPED not in news:
            news.extend(word for word, _ in frames.feed(place.link.recv(65536)))
        place.link.send(Order.CLOSE.value)

    # In a process of its own it ignores SIGINT from the beginning.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Place(monkeypatch, server, told(server)) as place:
            talking = threading.Thread(target=talk)
            talking.start()
            _worker_process.main()
            talking.join()
            assert place.counters.accepted == place.counters.completed == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert parsed(replies[0]).value == (["it", "self"], True, 1, None)
    assert news == [News.LOG, News.STOPPED]


@pytest.mark.usefixtures("no_end")
@pytest.mark.parametrize("words", [b"", b"nonsense"])
def test_a_worker_that_cannot_begin(words: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with Place(monkeypatch, Tasks(LOCAL, evaluate), words) as place:
        with pytest.raises(SystemExit) as ended:
            _worker_process.main()
        [(news, content)] = Frames().feed(place.link.recv(65536))
    assert ended.value.code == 1
    assert news is News.FAILED
    assert b"Error: " in content
    assert b", in main\n" in content


@pytest.mark.usefixtures("no_end")
def test_a_worker_runs_the_main_module_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise LookupError('run again')")
    server = Tasks(LOCAL, evaluate)
    with Place(monkeypatch, server, told(server, MainModule(None, str(script)))) as place:
        with pytest.raises(SystemExit):
            _worker_process.main()
        [(_, content)] = Frames().feed(place.link.recv(65536))
    assert b"LookupError: run again" in content
