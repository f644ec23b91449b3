"""A worker process: a fresh interpreter that serves for a server in another process.

It is given the listening socket, a link to the server, memory to count in, and on stdin
the pickled server. It runs that as any program would, and ends

* when the server says so, or it gets SIGTERM: draining first;
* cancelled, when the server says that;
* in any case when the server's process is gone, by a thread that nothing can hold up.
"""

from __future__ import annotations

import functools
import mmap
import os
import pickle
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import trio

from ._children import open_pidfd
from ._crew import Preparation, patience_of
from ._groups import open_ungrouped_nursery
from ._inherited import remember_server
from ._preforking import PreforkingMixIn, means_copy
from ._sockets import ListeningSocket
from ._statistics import SharedCounters
from ._worker_link import News, Order, WorkerLink
from ._worker_log import log_to_server, shortened

WORKER_BATCH = 1
"""Requests taken per wake-up: a burst is for all workers, not for the first that wakes.

nginx does the same (multi_accept off).
"""


def main() -> None:
    """Be a worker; its descriptors are in ``sys.argv``."""
    parent, listener, link_end, figures = map(int, sys.argv[1:5])
    for descriptor in (listener, link_end, figures):
        os.set_inheritable(descriptor, False)
    # The program may have blocked it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    link = WorkerLink(socket.socket(fileno=link_end))
    watch = ParentWatch(parent, link)
    try:
        preparation: Preparation = pickle.load(sys.stdin.buffer)
        server = _server_of(preparation, link)
        server.socket = ListeningSocket(fileno=listener)
        remember_server(server)
        server._counters = SharedCounters(mmap.mmap(figures, SharedCounters.SIZE))
        os.close(figures)
        server._link = link
        server._batch = WORKER_BATCH
        watch.patience = patience_of(server)
        trio.run(_WorkerRun(server, link, preparation.poll_interval).run)
    except BaseException:  # noqa: ASYNC103 (nobody is left to raise it to)
        text = shortened(traceback.format_exc())
        link.say(News.FAILED, text.encode(errors="backslashreplace"))
        sys.exit(1)
    finally:
        link.say(News.ENDING)
        # Left open, because the watch looks at it until the process has ended.
        link.detach()


def _server_of(preparation: Preparation, link: WorkerLink) -> Any:
    sys.argv[:] = preparation.argv
    if preparation.main is not None:
        preparation.main.run_again()
    server = pickle.loads(preparation.server)
    log_to_server(functools.partial(link.say, News.LOG), preparation.log_levels)
    return server


class ParentWatch:
    """A thread that ends the process if the server's has ended.

    Attributes:
        patience: seconds that the event loop, which learns of it too, has for ending.
    """

    def __init__(self, parent: int, link: WorkerLink) -> None:
        self.patience = 0.0
        self._parent = parent
        self._link = link
        self._poll = select.poll()
        # Which leaves that the other end is closed. Not in the thread: when that begins, a
        # worker that has failed may have detached its link.
        self._poll.register(link, 0)
        threading.Thread(target=self._watch, name="parent watch", daemon=True).start()

    def _watch(self) -> NoReturn:
        # What the parent has forked may hold the link's other end open.
        pidfd = open_pidfd(self._parent)
        if pidfd is not None:
            self._poll.register(pidfd, select.POLLIN)
        if os.getppid() == self._parent:  # Or the number may be another's by now.
            self._poll.poll()
        self._link.hang_up()
        threading.Event().wait(min(self.patience, threading.TIMEOUT_MAX))
        os._exit(1)


class _WorkerRun:
    """The worker's run of its server."""

    def __init__(
        self, server: PreforkingMixIn, link: WorkerLink, poll_interval: float | None
    ) -> None:
        self._server = server
        self._link = link
        # Where it is None, no hook is called that way.
        self._poll_interval = 0.5 if poll_interval is None else poll_interval
        self._hard = trio.CancelScope()
        self._is_to_close = trio.Event()
        self._is_told_to_stop = False  # If not, an override has ended the loop.

    async def run(self) -> None:
        """Serve, until told to end."""
        means_copy.set(True)
        with trio.open_signal_receiver(signal.SIGTERM) as signals:
            async with open_ungrouped_nursery() as self._nursery:
                self._nursery.start_soon(self._link.obey, self._obey)
                self._nursery.start_soon(self._close_on, signals)
                with self._hard:
                    async with self._server:
                        await self._server.serve_forever(self._poll_interval)
                        self._link.say(News.STOPPED)
                        if self._is_told_to_stop:
                            await self._is_to_close.wait()
                self._nursery.cancel_scope.cancel()

    async def _close_on(self, signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            self._obey(Order.CLOSE)

    async def _retire(self) -> None:
        await self._server._wait_idle()
        self._server._retires = True
        self._obey(Order.CLOSE)

    def _obey(self, order: Order) -> None:
        match order:
            case Order.STOP:
                self._is_told_to_stop = True
                self._nursery.start_soon(self._server.shutdown)
            case Order.CLOSE:
                self._is_to_close.set()
                self._nursery.start_soon(self._server.server_close)
            case Order.RETIRE:
                self._nursery.start_soon(self._retire)
            case Order.CANCEL:  # pragma: no branch (there is no more)
                self._hard.cancel()
