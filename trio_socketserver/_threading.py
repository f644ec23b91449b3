"""`ThreadingMixIn`: a thread for each blocking request, a task for each asynchronous one.

Where blocking handlers run, and how they are cancelled, is the same under every server (see
`_blocking`). What the mix-in adds is that there are many at a time, and how many.
"""

from __future__ import annotations

from ._server import BaseServer

__all__ = ["ThreadingMixIn"]


class ThreadingMixIn(BaseServer):
    """Handle each request side by side: blocking handlers in threads.

    As `socketserver.ThreadingMixIn`; put it in front of a server class. Unlike there the
    threads belong to a nursery: they are limited, joined, and woken when they are cancelled
    while they wait for the peer. They come from `trio.to_thread`, so a handler can call
    `trio.from_thread`. Asynchronous handlers need no thread and run as tasks.
    """

    max_threads: int = 256
    """Requests handled at once, of either colour; at the limit the server stops accepting.

    socketserver has no limit, and at 8 MiB of address space each meets the system's.
    gunicorn has 1 thread by default, waitress 4, `trio.to_thread` 40, which this does not
    take from: handlers may wait for their peers for as long as they like.
    """

    daemon_threads: bool = False
    """Whether cancelling leaves a blocking handler's thread to itself.

    If so, its connection is shut down, and closed by the thread at its end; the server does
    not wait for that. (`trio.from_thread.run` then runs in a system task, which nothing
    cancels.) In socketserver it means that the program's end does not wait.
    """

    _one_at_a_time = False

    def _limit(self) -> int | None:
        return self.max_threads - self._abandoned_threads()

    def _has_daemon_threads(self) -> bool:
        return self.daemon_threads
