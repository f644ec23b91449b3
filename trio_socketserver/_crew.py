"""The worker processes of one serving loop, as the server's process sees them.

Each place of the crew is a task, and has one worker process after another. A worker that
ends unasked is replaced, after a pause that grows if that happens again and again. One that
ends before it serves is another matter: a few of those in a row, and the crew has failed.

What a worker has counted stays counted when it ends; what it was at then, has failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import mmap
import os
import pickle
import socket
import sys
from collections.abc import Callable
from typing import Final, Protocol

import trio

from ._children import ChildTraceback, describe_end, nameless_file
from ._exceptions import ChildFailed
from ._fresh_interpreter import MainModule, command, is_of_main
from ._groups import open_ungrouped_nursery
from ._inherited import connections, forget, remember
from ._log import log
from ._statistics import Counters, SharedCounters
from ._worker_link import FRAME_LIMIT, Frames, News, Order, socket_pair
from ._worker_log import levels, log_for_worker

WORKER_MODULE: Final = "trio_socketserver._worker_process"

EXIT_TIMEOUT: Final = 1.0
"""Seconds that a cancelled worker has for ending, beside those for cleaning up."""

START_ATTEMPTS: Final = 5
"""Workers in a row that may end before they serve. systemd gives a service five, too."""

RESTART_DELAY: Final = 0.1
"""Seconds before a worker that has ended is replaced; systemd's default. gunicorn takes
none, and spins where every worker fails at once."""

LONGEST_RESTART_DELAY: Final = 10.0
"""Seconds to which that doubles, where workers end again and again."""

STEADY_AFTER: Final = 10.0
"""Seconds that a worker must have lived for its end not to count as "again"."""

RECEIVE_SIZE: Final = 2 * FRAME_LIMIT
"""Bytes that are taken at a time; what does not fit of a packet would be lost."""


class Host(Protocol):
    """What the crew needs of its server."""

    cleanup_timeout: float
    _counters: Counters

    def fileno(self) -> int:
        """Return the listening socket's descriptor."""

    def _obey_worker(self, news: News) -> None:
        """Do what a worker's handler has called."""


@dataclasses.dataclass(frozen=True, slots=True)
class Preparation:
    """What a worker is told on stdin."""

    argv: list[str]
    main: MainModule | None
    log_levels: dict[str | None, int]
    poll_interval: float | None
    server: bytes
    """The pickled server; to be opened when the main module has been run."""


def patience_of(server: Host) -> float:
    """Return the seconds that a worker has for ending when it is cancelled."""
    # Each request may take one for its finish() and one for being closed.
    return 2 * server.cleanup_timeout + EXIT_TIMEOUT


class Crew:
    """The workers.

    Args:
        server: the server.
        pickled: what a worker serves.
        poll_interval: how.
    """

    def __init__(self, server: Host, pickled: bytes, poll_interval: float | None) -> None:
        main = MainModule.of_this_process() if is_of_main(pickled) else None
        self._server = server
        self._preparation = pickle.dumps(
            Preparation(sys.argv, main, levels(), poll_interval, pickled)
        )
        self._workers: set[_Worker] = set()
        self._ready: list[trio.Event] = []
        self._stopping = trio.Event()
        self._failed = trio.Event()
        self._failure: ChildFailed | None = None

    def begin(self, places: int, start_soon: Callable[..., object]) -> None:
        """Have so many workers from now on, until `stop`."""
        for number in range(places):
            ready = trio.Event()
            self._ready.append(ready)
            start_soon(self._keep_one, ready, name=f"worker {number}")

    async def wait_ready(self) -> None:
        """Wait until all places have had a worker that serves."""
        for ready in self._ready:
            await ready.wait()

    @property
    def has_failed(self) -> bool:
        """Whether `raise_failure` raises."""
        return self._failed.is_set()

    async def raise_failure(self) -> None:
        """Wait until no worker can be started any more; there is no other end to it.

        Raises:
            ChildFailed: what the last one ended by.
        """
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    def stop(self) -> None:
        """Have the workers accept no more, and replace none. No checkpoint."""
        self._stopping.set()
        for worker in self._workers:
            worker.stop()

    async def wait_stopped(self) -> None:
        """Wait until no worker accepts any more."""
        for worker in list(self._workers):
            await worker.stopped.wait()

    def retire(self) -> None:
        """Have the workers end, each when its requests have. No checkpoint."""
        self._stopping.set()
        for worker in self._workers:
            worker.say(Order.RETIRE)

    def close(self) -> None:
        """Have the workers drain, and end. No checkpoint."""
        self._stopping.set()
        for worker in self._workers:
            worker.say(Order.CLOSE)

    def has_workers(self) -> bool:
        """Tell whether workers of it run still."""
        return bool(self._workers)

    def add_to(self, counters: Counters) -> None:
        """Add what the workers have counted that run now."""
        for worker in self._workers:
            counters.add(worker.counters)

    async def _keep_one(self, ready: trio.Event) -> None:
        delay, failures = RESTART_DELAY, 0
        while not self._stopping.is_set():
            begun = trio.current_time()
            worker = await self._have_one(ready)
            failures = 0 if worker.is_ready else failures + 1
            if failures == START_ATTEMPTS:
                self._fail(worker)
            if self._stopping.is_set() or self.has_failed:
                if worker.status:
                    log(logging.WARNING, "%s", worker.describe_end())
                return
            if trio.current_time() - begun > STEADY_AFTER:
                delay = RESTART_DELAY
            message = "%s; another is started in %g s"
            log(logging.WARNING, message, worker.describe_end(), delay)
            with trio.move_on_after(delay):
                await self._stopping.wait()
            delay = min(2 * delay, LONGEST_RESTART_DELAY)

    async def _have_one(self, ready: trio.Event) -> _Worker:
        """Have one worker, until it ends."""
        worker = _Worker(self._server, ready.set)
        self._workers.add(worker)
        try:
            await worker.run(self._preparation)
        except OSError as error:  # The system has no room for a process, or a descriptor.
            worker.error = error
        finally:
            self._workers.discard(worker)
            worker.stopped.set()
            self._server._counters.add(worker.take_counters())
        return worker

    def _fail(self, worker: _Worker) -> None:
        self._failure = ChildFailed(
            f"{START_ATTEMPTS} worker processes in a row have ended before they could "
            f"serve; the last of them: {worker.describe_end(why=False)}"
        )
        self._failure.__cause__ = worker.error
        self._failed.set()


def _duplicate(descriptor: int) -> int:
    """Return a duplicate to pass on, whose number is free in the other process.

    Where this one has no stdin, say, the number of anything else may be 0.
    """
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)


class _Worker:
    """A worker process.

    Attributes:
        is_ready: whether it serves, or has served.
        stopped: set when it accepts no more.
        counters: what it counts.
        status: how the process has ended, as in `subprocess`; None if it has not been
            started, or has been cancelled.
        error: why, if it has said so.
    """

    def __init__(self, server: Host, note_ready: Callable[[], object]) -> None:
        self.is_ready = False
        self.stopped = trio.Event()
        self.counters = Counters()
        self.status: int | None = None
        self.error: Exception | None = None
        self._server = server
        self._note_ready = note_ready
        self._alive = trio.CancelScope()
        self._hearing = trio.CancelScope(shield=True)  # As long as the process lives.
        self._frames = Frames()
        self._passing = contextlib.ExitStack()
        self._passed: list[socket.socket] = []
        self._process: trio.Process | None = None
        self._is_ending = False
        self._is_cancelled = False

    def held(self) -> list[socket.socket]:
        """Return the sockets, which a forked child is not to keep."""
        return [self._sock, *self._passed]

    async def run(self, preparation: bytes) -> None:
        """Start the process, and wait for its end.

        Raises:
            OSError: it cannot be started.
        """
        with contextlib.ExitStack() as stack, self._passing:
            self._sock, theirs = map(stack.enter_context, socket_pair())
            self._sock.setblocking(False)
            remember(connections, self)
            stack.callback(forget, connections, self)
            self._pass(self._server.fileno())
            self._pass(theirs.fileno())
            theirs.close()
            figures = self._make_counters()
            descriptors = [*(sock.fileno() for sock in self._passed), figures]
            arguments = map(str, [os.getpid(), *descriptors])
            async with open_ungrouped_nursery() as nursery:
                nursery.start_soon(self._hear)
                try:
                    with self._alive:
                        await trio.run_process(
                            command(WORKER_MODULE, *arguments),
                            stdin=preparation,
                            pass_fds=descriptors,
                            check=False,
                            deliver_cancel=self._end,
                            task_status=self,
                        )
                    self._note_end()
                finally:
                    self._hearing.cancel()

    def _pass(self, descriptor: int) -> None:
        sock = socket.socket(fileno=_duplicate(descriptor))
        self._passed.append(self._passing.enter_context(sock))

    def _make_counters(self) -> int:
        memory = nameless_file()
        try:
            os.ftruncate(memory, SharedCounters.SIZE)
            self.counters = SharedCounters(mmap.mmap(memory, 0))
            figures = _duplicate(memory)
        finally:
            os.close(memory)
        self._passing.callback(os.close, figures)
        return figures

    def started(self, process: trio.Process | None = None) -> None:
        """Take note that the process has been started; called by `trio.run_process`."""
        self._process = process
        self._passing.close()

    async def _end(self, process: trio.Process) -> None:
        """End the process, which is being cancelled; this is, when it has ended."""
        if not self._is_ending:
            self._is_cancelled = True
            self.say(Order.CANCEL)
            process.terminate()  # If it does not listen yet.
            await trio.sleep(patience_of(self._server))
        process.kill()

    def _note_end(self) -> None:
        self._hear_rest()
        # Cancelled, it has been ended by us; or it has still waited for a thread to start.
        if self._process is not None and not self._is_cancelled:
            self.status = self._process.returncode

    def describe_end(self, *, why: bool = True) -> str:
        """Say how it has ended, and why."""
        if self.status is None:
            text = "a worker process could not be started"
            return f"{text}: {self.error}" if why else text
        assert self._process is not None
        text = f"worker process {self._process.pid} {describe_end(self.status)}"
        return f"{text}: {self.error}" if why and self.error is not None else text

    def take_counters(self) -> Counters:
        """Return what it has counted; what it was at has failed with it."""
        counters = Counters()
        counters.add(self.counters)
        counters.failed += counters.active
        if isinstance(self.counters, SharedCounters):
            self.counters.close()
        return counters

    # -- talking ---------------------------------------------------------------------

    def stop(self) -> None:
        """Have it accept no more. No checkpoint."""
        self._hear_rest()  # It may have said just now that it is ready.
        if self.is_ready:
            self.say(Order.STOP)
        else:
            self._alive.cancel()

    def say(self, order: Order) -> None:
        """Tell it something. No checkpoint."""
        # Its end may be closed: it is ending.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.send(order.value)

    async def _hear(self) -> None:
        with self._hearing:
            while True:
                await trio.lowlevel.wait_readable(self._sock)
                with contextlib.suppress(BlockingIOError):
                    if not self._take():
                        return

    def _hear_rest(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._take():
                pass

    def _take(self) -> bool:
        """Take what it has said; return whether it may say more."""
        try:
            data = self._sock.recv(RECEIVE_SIZE)
        except ConnectionResetError:
            return True  # It has not taken an order. What it has said comes after this.
        try:
            for news, content in self._frames.feed(data):
                self._take_news(news, content)
        except ValueError as error:
            log(logging.WARNING, "a worker process makes no sense: %s", error)
            if self._process is not None:
                self._process.kill()
            return False
        return bool(data)

    def _take_news(self, news: News, content: bytes) -> None:
        match news:
            case News.READY:
                self.is_ready = True
                self._note_ready()
            case News.STOPPED:
                self.stopped.set()
            case News.FAILED:
                self.error = ChildTraceback(content.decode(errors="replace"))
            case News.ENDING:
                self.stopped.set()
                self._is_ending = True
                # What may take long now is a thread of the user's that is no daemon.
                patience = self._server.cleanup_timeout
                self._alive.deadline = trio.current_time() + patience
            case News.LOG:
                log_for_worker(content)
            case News.SHUTDOWN | News.SERVER_CLOSE:  # pragma: no branch (there is no more)
                self._server._obey_worker(news)
