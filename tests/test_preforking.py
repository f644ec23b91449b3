"""Worker processes that serve one socket: what they are, and how their server ends."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pickle
import signal
import ssl
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prefork_servers
import pytest
import trio
import trio.testing
from helpers import (
    answer,
    assert_sums_up,
    bind_address,
    bounded,
    connect,
    is_refused,
    pose,
)
from prefork_clients import (
    LOCAL,
    Log,
    ask_for,
    at_work,
    logging_to,
    parsed,
    serving,
    when_started,
)
from prefork_servers import (
    BadState,
    Breaks,
    DatagramForks,
    DatagramsInTurn,
    DatagramTasks,
    EndsItself,
    FailsAtWork,
    Finishing,
    Forks,
    Initialized,
    LogsElsewhere,
    Sequential,
    Slotted,
    Stateless,
    Tasks,
    Threads,
    Ticks,
    UnixDatagramTasks,
    UnixDatagramThreads,
    UnixForks,
    UnixTasks,
    Verifying,
    WithLock,
    evaluate,
    evaluate_blocking,
)
from tls_world import CERTIFICATE
from tls_world import ask as tls_ask

from trio_socketserver import ChildFailed, PreforkingMixIn, _crew, _fresh_interpreter
from trio_socketserver._preforking import pickled

NEVER = 1000.0
"""Seconds that nothing here takes."""

SOON = 0.01
"""Seconds for what would otherwise be waited for."""


@pytest.fixture
def log() -> Iterator[Log]:
    """Return what is logged."""
    log = Log()
    with logging_to(log):
        yield log


@pytest.fixture
def without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace a worker almost at once."""
    monkeypatch.setattr(_crew, "RESTART_DELAY", 0.001)


@pytest.fixture
def without_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a cancelled worker little time, beside its ``cleanup_timeout``."""
    monkeypatch.setattr(_crew, "EXIT_TIMEOUT", SOON)


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# -- what a worker is ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_class", "handler"),
    [
        (Sequential, evaluate),
        (Sequential, evaluate_blocking),
        (Tasks, evaluate),
        (Threads, evaluate_blocking),
        (Forks, evaluate),
        (Forks, evaluate_blocking),
        (UnixTasks, evaluate),
        (UnixForks, evaluate_blocking),
        (DatagramsInTurn, evaluate),
        (DatagramTasks, evaluate),
        (DatagramForks, evaluate_blocking),
        (UnixDatagramTasks, evaluate),
        (UnixDatagramThreads, evaluate_blocking),
    ],
    ids=lambda value: value.__name__,
)
@bounded
async def test_every_kind_of_server(
    server_class: Any, handler: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), handler)
    server.mark = "set here"
    expression = (
        "type(server).__mro__[0].__name__, server.mark, server.server_address, os.getppid()"
    )
    async with serving(server):
        pid, (name, mark, address, parent) = await ask_for(server, expression, tmp_path)
        forked = isinstance(server, prefork_servers.ForkingTCPServer.__mro__[1])
        assert pid != os.getpid()
        assert (parent != os.getpid()) == forked
        # A blocking handler's view of the server is an instance of a subclass.
        assert name.startswith(server_class.__name__) or handler is evaluate_blocking
        assert (mark, address) == ("set here", server.server_address)
    assert_sums_up(server)
    assert server.statistics().completed == 1
    if isinstance(server.server_address, str):
        assert not os.path.lexists(server.server_address)


@bounded
async def test_two_workers_serve_side_by_side() -> None:
    """One at a time each: so the second request is the other worker's."""
    server = Sequential(LOCAL, evaluate)
    server.workers = 2
    async with (
        serving(server),
        at_work(server, "trio.sleep_forever()") as one,
        at_work(server, "os.getpid()") as other,
    ):
        assert one.pid != other.pid
        assert server.statistics().accepted == 2
        assert await other.value() == other.pid
        server.graceful_timeout = 0
    seen = server.statistics()
    assert (seen.accepted, seen.completed, seen.cancelled) == (2, 1, 1)


@bounded
async def test_a_worker_is_a_fresh_interpreter_like_this_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--option", "-", "--", "ä"])
    monkeypatch.setattr(sys, "path", [*sys.path, "/nowhere"])
    with open(__file__) as kept_from_workers:
        os.set_inheritable(kept_from_workers.fileno(), True)
        server = Initialized(LOCAL, evaluate)
        async with serving(server):
            # In the locale "C" Python turns on UTF-8 mode; children find another locale.
            names = "[name for name in sys.flags.__match_args__ if name != 'utf8_mode']"
            flags = f"[getattr(sys.flags, name) for name in {names}]"
            asked = f"sys.argv, sys.path, {flags}, sys.warnoptions, sys._xoptions"
            here = eval(asked)
            assert (await ask_for(server, asked)).value == here
            assert (await ask_for(server, "sys.stdin.read()")).value == ""
            asked = "server.initialized_here, 'pytest' in sys.modules, signal.getsignal(2)"
            asked = f"{asked} is signal.SIG_IGN"
            assert (await ask_for(server, asked)).value == (False, False, True)
            theirs = (await ask_for(server, "descriptors()")).value
            ours = prefork_servers.descriptors()
            listener = ours[server.fileno()]
    sockets = [name for n, name in theirs.items() if n > 2 and name.startswith("socket:")]
    assert set(sockets) & set(ours.values()) == {listener}
    # The listener, the link, the request, and the two pairs by which trio is woken.
    assert len(sockets) == 7
    # The memory for counting, what trio waits with, and what tells of the parent's end.
    others = {name for n, name in theirs.items() if n > 2 and name not in sockets}
    assert len(others) == 3
    kinds = ("/memfd:trio_socketserver (deleted)", "[eventpoll]", "pidfd")
    assert all(any(kind in name for name in others) for kind in kinds)


@bounded
async def test_nothing_wakes_up_when_idle() -> None:
    class Wakings(trio.abc.Instrument):
        def __init__(self) -> None:
            self.tasks: list[str] = []

        def task_scheduled(self, task: trio.lowlevel.Task) -> None:
            if task is not me:
                self.tasks.append(task.name)

    def wakings_of(pid: int) -> int:
        return sum(
            int(line.split()[1])
            for status in Path(f"/proc/{pid}/task").glob("*/status")
            for line in status.read_text().splitlines()
            if line.startswith("voluntary_ctxt_switches")
        )

    me = trio.lowlevel.current_task()
    wakings = Wakings()
    async with serving(Tasks(LOCAL, evaluate)) as server:
        pid = (await ask_for(server, "1")).pid
        trio.lowlevel.add_instrument(wakings)
        before = 0
        # The connection is closed after the reply, and that takes some time.
        while wakings.tasks or wakings_of(pid) != before:
            before = wakings_of(pid)
            wakings.tasks.clear()
            await trio.sleep(0.3)
        trio.lowlevel.remove_instrument(wakings)
    assert before > 0


@bounded
async def test_hooks_run_in_the_worker() -> None:
    server = Ticks(LOCAL, evaluate)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever, NEVER)
        # Each batch, of one request in a worker, is followed by one.
        await ask_for(server, "1")
        assert (await ask_for(server, "server.ticks")).value in (1, 2)
        await server.shutdown()
        await nursery.start(server.serve_forever, SOON)
        await ask_for(server, "server.second_tick.wait()")
        await server.shutdown()
    assert server.ticks == 0


@bounded
async def test_handle_request_is_the_programs_own() -> None:
    server = Tasks(LOCAL, evaluate)
    async with server:
        with pose(server, b"server.statistics().active") as client:
            await server.handle_request()
            assert parsed(await answer(client)) == (os.getpid(), 1)
    assert server.statistics().completed == 1


# -- taking the server there ---------------------------------------------------------------


@bounded
async def test_getstate_and_setstate() -> None:
    server = WithLock(LOCAL, evaluate)
    async with serving(server):
        asked = "type(server.lock) is type(threading.RLock()), server.kind"
        assert (await ask_for(server, asked)).value == (True, "taken along")
    assert isinstance(server.lock, type(threading.Lock()))


def test_slots_are_taken_along() -> None:
    server = Slotted(LOCAL, evaluate)
    server.colour = "green"
    copy = pickle.loads(pickled(server))
    assert copy.colour == "green"
    assert "colour" not in vars(copy)
    server._close_listener()


def test_what_the_main_module_defines_needs_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(Slotted, "__module__", "__main__")
    main.Slotted = Slotted  # type: ignore[attr-defined]
    server = Slotted(LOCAL, evaluate)
    try:
        with pytest.raises(TypeError, match="Put it into a module"):
            pickled(server)
        main.__file__ = __file__
        assert b"__main__" in pickled(server)
    finally:
        server._close_listener()


def test_none_is_made_by_a_main_module_that_runs_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_fresh_interpreter, "_runs_main", True)
    with pytest.raises(RuntimeError, match="come upon a server being made there"):
        Tasks(LOCAL, evaluate)


def with_attribute(name: str, value: Any) -> Any:
    server = Tasks(LOCAL, evaluate)
    setattr(server, name, value)
    return server


class _Hidden(Tasks):
    """Not what its name leads to."""


Hidden, _Hidden = _Hidden, Tasks  # type: ignore[assignment,misc]


def of_a_local_class() -> Any:
    class Local(Tasks): ...

    return Local(LOCAL, evaluate)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: with_attribute("lock", threading.Lock()), "attribute 'lock'.*lock"),
        (
            lambda: with_attribute("context", ssl.create_default_context()),
            "attribute 'context'.*SSLContext",
        ),
        (lambda: Threads(LOCAL, lambda *request: None), "'RequestHandlerClass'.*lambda"),
        (of_a_local_class, "its class does not pickle.*Local"),
        (lambda: Hidden(LOCAL, evaluate), "its class does not pickle.*_Hidden"),
        (lambda: BadState(LOCAL, evaluate), "no state"),
        (lambda: Stateless(LOCAL, evaluate), "lock"),
    ],
    ids=["lock", "context", "lambda", "local", "hidden", "bad state", "stateless"],
)
@bounded
async def test_what_does_not_pickle_is_named(
    make: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any worker has started."""
    monkeypatch.setattr(_crew, "command", None)
    server = make()
    async with server:
        with pytest.raises(TypeError, match=words):
            await server.serve_forever()
        assert not is_refused(server.server_address)
    with pytest.raises(TypeError, match=words):
        pickled(server)


@bounded
async def test_workers_may_not_be_none() -> None:
    server = Tasks(LOCAL, evaluate)
    server.workers = 0
    async with server:
        with pytest.raises(ValueError, match="workers must be 1 or more, not 0"):
            await server.serve_forever()


def test_the_default_is_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PreforkingMixIn.workers == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert PreforkingMixIn.workers == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert PreforkingMixIn.workers == 1


# -- the death of a worker -----------------------------------------------------------------


@pytest.mark.usefixtures("without_delay")
@bounded
async def test_a_worker_that_dies_is_replaced(log: Log) -> None:
    """What it was at has failed, all else that it has counted stays."""
    server = Tasks(LOCAL, evaluate)
    ends = {
        "os.kill(os.getpid(), signal.SIGKILL)": "has been ended by SIGKILL",
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0)), os.abort()": "SIGABRT",
    }
    async with serving(server):
        for deaths, (expression, end) in enumerate(ends.items(), 1):
            async with (
                at_work(server, "trio.sleep_forever()") as other,
                at_work(server, expression) as last,
            ):
                line = await log.wait_for("another is started in", deaths)
                assert line.startswith(f"worker process {last.pid} has been ended by SIG")
                assert end in line
                assert await other.ended_without()
            seen = server.statistics()
            assert (seen.accepted, seen.failed, seen.active) == (2 * deaths, 2 * deaths, 0)
        async with at_work(server, "sys.exit(3)") as last:
            line = await log.wait_for(f"worker process {last.pid} has exited with status 1")
            assert "SystemExit: 3" in line
            assert ", in evaluate\n" in line
        pid, value = await ask_for(server, "1 + 1")
        assert value == 2
        assert pid not in (last.pid, other.pid)
    assert server.statistics().failed == 5
    assert server.statistics().completed == 1
    assert_sums_up(server)


@pytest.mark.usefixtures("without_delay")
@bounded
async def test_sigterm_drains_one_worker(log: Log) -> None:
    server = Tasks(LOCAL, evaluate)
    async with serving(server):
        async with at_work(server, "server.draining.wait()") as client:
            os.kill(client.pid, signal.SIGTERM)
            # It has been told, and it finishes what it is at.
            assert await client.value() is None
        await log.wait_for(f"worker process {client.pid} has exited with status 0; another")
        assert (await ask_for(server, "1")).pid != client.pid
    assert server.statistics().completed == 2
    assert_sums_up(server)


@pytest.mark.usefixtures("without_delay")
@bounded
async def test_an_error_of_the_server_itself_ends_a_worker_only(log: Log) -> None:
    server = FailsAtWork(LOCAL, evaluate)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever, SOON)
        line = await log.wait_for("another is started in")
        assert "LookupError: tick" in line
        await server.shutdown()


@pytest.mark.usefixtures("without_delay")
@bounded
async def test_workers_that_cannot_start_end_the_server(
    monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(_crew, "START_ATTEMPTS", 2)
    server = Breaks(LOCAL, evaluate)
    async with server:
        # Not by Nursery.start(), which takes the cause away before trio 0.33.
        with pytest.raises(ChildFailed, match="2 worker processes in a row") as caught:
            await server.serve_forever()
        shown = f"{caught.value}{caught.value.__cause__}"
        assert "LookupError: no luck" in shown
        assert ", in __setstate__\n" in shown
        assert not is_refused(server.server_address)
    # One has been replaced; the other has not.
    assert len([line for line in log.lines if "another is started" in line]) == 1


@pytest.mark.usefixtures("without_delay")
@bounded
async def test_a_module_that_only_a_worker_cannot_import(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = tmp_path / "prefork_handler_of_a_test.py"
    module.write_text("async def handler(request, client_address, server): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__(module.stem)
    handler = sys.modules.pop(module.stem).handler
    sys.modules[module.stem] = module_here = type(sys)(module.stem)
    module_here.handler = handler  # type: ignore[attr-defined]
    module.write_text(
        "raise LookupError('not for workers')  # and it is longer than before"
    )
    monkeypatch.setattr(_crew, "START_ATTEMPTS", 1)
    server = Tasks(LOCAL, handler)
    try:
        async with server:
            with pytest.raises(ChildFailed) as caught:
                await server.serve_forever()
    finally:
        del sys.modules[module.stem]
    shown = f"{caught.value}{caught.value.__cause__}"
    assert "LookupError: not for workers" in shown


# -- the ends of a server ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_class", "handler", "call"),
    [
        (Tasks, evaluate, "server.shutdown()"),
        (Threads, evaluate_blocking, "server.shutdown()"),
        (Forks, evaluate, "server.shutdown()"),
        (Forks, evaluate_blocking, "server.server_close()"),
        (Sequential, evaluate_blocking, "server.server_close()"),
        (Tasks, evaluate, "server.server_close()"),
        (Verifying, evaluate, "None"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@bounded
async def test_a_worker_may_end_the_server(
    server_class: Any, handler: Any, call: str
) -> None:
    server = server_class(LOCAL, handler)
    async with server:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert (await ask_for(server, call)).value is None
        # Nothing else has ended the loop.
        assert server.draining.is_set() == ("close" in call)
    assert server.fileno() == -1
    assert_sums_up(server)
    assert server.statistics().completed == 1


@bounded
async def test_a_hook_of_a_workers_loop_may_end_the_server() -> None:
    server = EndsItself(LOCAL, evaluate)
    await server.serve_forever(SOON)
    assert server.statistics().accepted == 0
    await server.server_close()


@pytest.mark.parametrize("method", ["shutdown", "server_close"])
@bounded
async def test_ended_during_start_up(
    method: str, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    started = when_started(monkeypatch)
    server = Tasks(LOCAL, evaluate)
    server.workers = 2
    async with server, trio.open_nursery() as nursery:

        async def end() -> None:
            await started.wait()
            await getattr(server, method)()

        nursery.start_soon(end)
        assert await nursery.start(server.serve_forever) == server.server_address
    assert log.lines == []
    assert server.statistics().accepted == 0


@bounded
async def test_cancelled_during_start_up(monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    started = when_started(monkeypatch)
    server = Tasks(LOCAL, evaluate)
    with trio.CancelScope() as scope:
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_forever)
            await started.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert log.lines == []


@bounded
async def test_shutdown_before_serving_starts_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: Any) -> Any:
        pytest.fail("a worker is started")

    monkeypatch.setattr(_crew, "command", refuse)
    server = Tasks(LOCAL, evaluate)
    async with server, trio.open_nursery() as nursery:
        await server.shutdown()
        await nursery.start(server.serve_forever)


@bounded
async def test_serving_again_and_entering_again() -> None:
    server = Tasks(LOCAL, evaluate)
    address = server.server_address
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)  # Without entering.
        first = (await ask_for(server, "1")).pid
        await server.shutdown()
    assert is_gone(first)
    async with serving(server):
        server.greeting = "hello"  # Too late for this worker.
        second = await ask_for(server, "getattr(server, 'greeting', None)")
    assert second.value is None
    assert server.server_address == address
    assert_sums_up(server)
    assert server.statistics().completed == 2
    assert server.fileno() == -1
    with pytest.raises(trio.ClosedResourceError):
        await server.serve_forever()


@bounded
async def test_serving_again_while_requests_of_the_first_loop_run(tmp_path: Path) -> None:
    """They go on, undisturbed; their worker ends after the last of them."""
    os.mkfifo(fifo := str(tmp_path / "fifo"))
    read = f"trio.to_thread.run_sync(lambda: open({fifo!r}).read())"
    server = Tasks(LOCAL, evaluate)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        async with at_work(server, read) as old:
            await server.shutdown()
            assert server.statistics().active == 1
            server.greeting = "hello"
            await nursery.start(server.serve_forever)
            assert server.statistics().accepted == 1
            new = await ask_for(server, "server.greeting, server.draining.is_set()")
            assert new.pid != old.pid
            assert new.value == ("hello", False)
            await trio.to_thread.run_sync(Path(fifo).write_text, "go on")
            assert await old.value() == "go on"
        while not is_gone(old.pid):
            await trio.testing.wait_all_tasks_blocked(0.001)
        assert server.statistics().accepted == 2
        await server.shutdown()
    assert server.statistics().completed == 2
    assert_sums_up(server)


@bounded
async def test_the_port_is_free_at_once() -> None:
    """Though a worker is at work still."""
    server = Tasks(LOCAL, evaluate)
    with trio.CancelScope() as scope:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            async with at_work(server, "trio.sleep_forever()") as client:
                nursery.start_soon(server.server_close)
                successor = None
                while successor is None:
                    await trio.testing.wait_all_tasks_blocked(0.001)
                    with contextlib.suppress(OSError):
                        successor = Tasks(server.server_address, evaluate)
                await successor.server_close()
                assert not is_gone(client.pid)
                scope.cancel()
    assert server.statistics().cancelled == 1


@bounded
async def test_cancelled_handlers_finish(tmp_path: Path) -> None:
    server = Tasks(LOCAL, Finishing)
    server.finished = str(tmp_path / "finished")
    with trio.CancelScope() as scope:
        async with serving(server), at_work(server, ""):
            scope.cancel()
            await trio.sleep_forever()
    assert os.path.exists(server.finished)
    assert server.statistics().cancelled == 1
    assert_sums_up(server)


@pytest.mark.parametrize(
    ("attribute", "value"), [("block_on_close", False), ("graceful_timeout", SOON)]
)
@bounded
async def test_closing_cancels(attribute: str, value: Any) -> None:
    server = Threads(LOCAL, evaluate)
    setattr(server, attribute, value)
    async with serving(server), at_work(server, "trio.sleep_forever()") as client:
        await server.server_close()
        assert await client.ended_without()
    assert server.statistics().cancelled == 1
    assert is_gone(client.pid)


STUCK = pytest.mark.parametrize(
    ("server_class", "handler", "expression"),
    [
        (Tasks, evaluate, "shielded()"),
        (Tasks, evaluate, "time.sleep(1000)"),
        (Threads, evaluate_blocking, "time.sleep(1000)"),
    ],
    ids=["shielded", "stuck loop", "stuck thread"],
)


@pytest.mark.usefixtures("without_patience")
@STUCK
@bounded
async def test_a_stuck_worker_is_killed(
    server_class: Any, handler: Any, expression: str
) -> None:
    server = server_class(LOCAL, handler)
    server.cleanup_timeout = SOON
    with trio.CancelScope() as scope:
        async with serving(server), at_work(server, expression) as client:
            scope.cancel()
            await trio.sleep_forever()
    assert is_gone(client.pid)
    assert server.statistics().failed == 1
    assert_sums_up(server)


@pytest.mark.usefixtures("without_patience")
@bounded
async def test_a_stuck_worker_holds_shutdown_up_for_a_while_only(log: Log) -> None:
    server = Tasks(LOCAL, evaluate)
    server.cleanup_timeout = server.graceful_timeout = SOON
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        async with at_work(server, "time.sleep(1000)") as client:
            await server.shutdown()
            assert not is_gone(client.pid)
            assert server.statistics().active == 1
            assert "has not stopped within 0.01 s" in log.lines[-1]
            await server.server_close()
            assert is_gone(client.pid)
    assert server.statistics().failed == 1


# -- counting ------------------------------------------------------------------------------


@bounded
async def test_the_sum_is_right_at_every_moment() -> None:
    server = Sequential(LOCAL, evaluate)
    server.workers = 2
    over = False
    looks = 0

    async def look() -> None:
        nonlocal looks
        accepted = 0
        while not over:
            seen = server.statistics()
            done = seen.completed + seen.failed + seen.rejected + seen.cancelled
            assert seen.accepted == seen.active + done
            assert seen.active >= 0
            assert seen.accepted >= accepted
            accepted = seen.accepted
            looks += 1
            await trio.sleep(0)

    async def load() -> None:
        for _ in range(50):
            await ask_for(server, "None")

    async with serving(server), trio.open_nursery() as nursery:
        nursery.start_soon(look)
        async with trio.open_nursery() as loads:
            for _ in range(4):
                loads.start_soon(load)
        over = True
    assert looks > 50
    assert server.statistics().completed == 200
    assert_sums_up(server)


# -- logging -------------------------------------------------------------------------------


@bounded
async def test_what_workers_log_is_logged_here(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    loud, quiet = (logging.getLogger(f"prefork.{name}") for name in ("loud", "quiet"))
    monkeypatch.setattr(loud, "level", logging.DEBUG)
    monkeypatch.setattr(quiet, "level", logging.ERROR)
    logging.getLogger("prefork.loud")._cache.clear()  # type: ignore[attr-defined]
    server = Tasks(LOCAL, evaluate)
    async with serving(server):
        for line in (
            "logging.getLogger('prefork.loud').debug('one %s', 1)",
            "logging.getLogger('prefork.quiet').warning('not this')",
            "logging.getLogger('prefork.quiet').error('two')",
            "logging.getLogger('prefork.other').info('nor this')",
            "logging.getLogger('prefork.other').warning('%s', threading)",
            "logging.warning('odd', extra={'lock': threading.Lock(), 'n': 5})",
            "logging.warning('odder', extra={'thing': OnlyThere(), 'n': 6})",
        ):
            await ask_for(server, line)
        await log.wait_for("odder")
        with pose(server, b"1 / 0") as client:
            await answer(client)
        line = await log.wait_for("exception while serving a request")
        pid = (await ask_for(server, "1")).pid
    assert "ZeroDivisionError" in log.format(log.records[-1])
    assert [line for line in log.lines if "not this" in line or "nor this" in line] == []
    assert log.lines[:5] == ["one 1", "two", repr(threading), "odd", "odder"]
    assert [record.n for record in log.records[3:5]] == [5, 6]  # type: ignore[attr-defined]
    assert {record.process for record in log.records} == {pid}
    assert log.records[0].levelno == logging.DEBUG
    assert log.records[0].name == "prefork.loud"


@bounded
async def test_a_module_that_configures_logging_is_left_alone(
    log: Log, tmp_path: Path
) -> None:
    server = LogsElsewhere(LOCAL, evaluate)
    server.log_file = str(tmp_path / "log")
    async with serving(server):
        await ask_for(server, "logging.warning('elsewhere')")
    assert Path(server.log_file).read_text() == "elsewhere\n"
    assert log.lines == []


@bounded
async def test_a_plain_client_gets_through_from_the_beginning() -> None:
    """The kernel queues what comes while the workers start."""
    server = Tasks(LOCAL, evaluate)
    with connect(server.server_address) as early:
        early.sendall(b"'early'")
        early.shutdown(1)
        async with serving(server):
            assert parsed(await answer(early)).value == "early"


# -- TLS -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server_class", "handler"),
    [
        (Tasks, prefork_servers.tell_pid),
        (Threads, prefork_servers.tell_pid_blocking),
        (Forks, prefork_servers.tell_pid),
        (Forks, prefork_servers.tell_pid_blocking),
    ],
)
@bounded
async def test_each_worker_makes_its_context(
    server_class: Any, handler: Any, tmp_path: Path
) -> None:
    file = tmp_path / "certificate.pem"
    CERTIFICATE.private_key_and_cert_chain_pem.write_to_path(file)
    make_context = functools.partial(prefork_servers.tls_context, str(file))
    server = server_class(LOCAL, handler, ssl_context=make_context)
    async with serving(server):
        assert int(await tls_ask(server)) != os.getpid()
    assert server.statistics().completed == 1
