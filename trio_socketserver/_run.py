"""`run()`: one server as a whole program.

The first SIGINT or SIGTERM drains the server, the second cancels it, and the impatience of
further ones changes nothing. A program whose requests may take for ever must still end when
asked to, so a server that leaves ``graceful_timeout`` infinite gets a finite one here.
"""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncIterator, Callable
from typing import Final

import trio

from ._groups import open_ungrouped_nursery
from ._server import BaseServer

__all__ = ["run"]

GRACEFUL_TIMEOUT: Final = 30.0
"""Seconds for draining. gunicorn and hypercorn give requests 30 s and 3 s; service managers
kill after 90 s (systemd) or 30 s (Kubernetes, counted from the same signal)."""

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def run(server: BaseServer, *, started: Callable[[], object] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; the whole ``__main__`` of a script.

    The first signal closes the server: it stops accepting and waits for the requests, for
    ``graceful_timeout`` seconds or, where the server leaves that infinite, 30. The second
    signal cancels them. A `shutdown()` by a handler ends it too.

    Must be called in the main thread, where Python delivers signals.

    Args:
        server: the server, not entered. It is closed when the function returns or raises.
        started: called when the server has been entered and the signals are taken care of:
            the moment to say so, since who is told may send one.

    Raises:
        TypeError: it is no server of this package.
        BaseException: whatever the server raises.
    """
    if not isinstance(server, BaseServer):
        raise TypeError(
            f"run() takes a server of trio_socketserver, and {server!r} is none "
            "(for one of socketserver's it is trio.run(serve_blocking, server))"
        )
    try:
        trio.run(_serve_until_signal, server, started)
    finally:
        # It has not been entered if the function was called in another thread.
        server._close_listener()


async def _serve_until_signal(
    server: BaseServer, started: Callable[[], object] | None
) -> None:
    if server.graceful_timeout == math.inf:
        server.graceful_timeout = GRACEFUL_TIMEOUT
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        async with open_ungrouped_nursery() as nursery:
            with trio.CancelScope() as hard:
                async with server:
                    # Not earlier: there must be something to close.
                    nursery.start_soon(_stop_on_signals, signals, server, nursery, hard)
                    if started is not None:
                        started()
                    await server.serve_forever()
            nursery.cancel_scope.cancel()


async def _stop_on_signals(
    signals: AsyncIterator[int],
    server: BaseServer,
    nursery: trio.Nursery,
    hard: trio.CancelScope,
) -> None:
    await anext(signals)
    nursery.start_soon(server.server_close)
    # To the end: what is not taken here, trio delivers again, to the default handlers.
    async for _ in signals:
        hard.cancel()
