"""A server for the length of a block: in the background of trio code, or in a thread.

Both end in the same order: the loop, then the listener, then the requests. The thread's
version is the first one inside a `trio.run` of its own; between the two threads stand two
futures, so that neither side can wait for one that has gone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import trio

from .._groups import open_ungrouped_nursery
from .._server import BaseServer


@asynccontextmanager
async def serving(server: BaseServer) -> AsyncGenerator[Any]:
    """Serve in the background for the length of the block.

    ::

        async with serving(NurseryTCPServer(("127.0.0.1", 0), Echo)) as address:
            stream = await trio.open_tcp_stream(*address)

    The server is entered, and closed at the end: it stops accepting, and what it still
    handles is waited for, for ``graceful_timeout`` seconds. A server that ends by itself,
    because a handler has called its ``shutdown()``, leaves the block alone.

    Args:
        server: any server that has not been entered. It is closed also if it cannot serve.

    Yields:
        The server's address. Who connects to it is served, at once.

    Raises:
        RuntimeError: the server has been entered already.
        BaseException: what the server raises, bare; the block is cancelled. What the block
            raises leaves it unchanged, and cancels the requests. If both fail, the two
            leave as a group.

    Cancellation: cancels the requests, and closes the server.
    """
    async with server, open_ungrouped_nursery() as nursery:
        yield await nursery.start(server.serve_forever)
        await server.shutdown()


class _Remote:
    """A server in the `trio.run` of another thread.

    Attributes:
        started: gets the address.
        ended: gets what the run has raised, or None.
    """

    def __init__(self, server: BaseServer) -> None:
        self.started: Future[Any] = Future()
        self.ended: Future[BaseException | None] = Future()
        self._server = server
        self._token: trio.lowlevel.TrioToken | None = None
        self._leave = trio.Event()
        self._hard = trio.CancelScope()
        self._is_cancelled = False

    def run(self) -> None:
        """Serve, as the thread's whole work, unless it comes too late."""
        if not self.ended.set_running_or_notify_cancel():
            return
        error: BaseException | None = None
        try:
            trio.run(self._serve)
        except BaseException as raised:  # noqa: ASYNC103 (the other thread raises it)
            error = raised
        self.ended.set_result(error)

    async def _serve(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        if self._is_cancelled:  # Looked at after the token is there, see cancel().
            self._hard.cancel()
        with self._hard:
            async with serving(self._server) as address:
                self.started.set_result(address)
                await self._leave.wait()

    def stop(self) -> None:
        """Have the server closed; it waits for its requests."""
        self._tell(self._leave.set)

    def cancel(self) -> None:
        """Have the server closed, and its requests cancelled, even if it only starts."""
        self._is_cancelled = True
        self._tell(self._hard.cancel)

    def _tell(self, action: Callable[[], object]) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(action)


@contextmanager
def serving_in_thread(server: BaseServer) -> Generator[Any]:
    """Serve in a thread for the length of the block; for programs without trio.

    ::

        with serving_in_thread(NurseryTCPServer(("127.0.0.1", 0), Echo)) as address:
            with socket.create_connection(address) as client: ...

    It is `serving`, in a `trio.run` of its own in a thread of its own, which has ended when
    the block is left. It can be used in any thread. Signals are not taken care of: where
    they are to end a server, take `run`. In trio code take `serving`: entering and leaving
    this block hold the event loop up.

    Args:
        server: any server that has not been entered.

    Yields:
        The server's address.

    Raises:
        BaseException: what the server raises, bare, when the block has ended; nothing can
            interrupt a block that does not await. What the block raises,
            `KeyboardInterrupt` included, leaves it unchanged and cancels the requests.
        BaseExceptionGroup: both have failed.

    Cancellation: there is none. `KeyboardInterrupt` while the block's end waits for
    requests cancels those.
    """
    remote = _Remote(server)
    thread = threading.Thread(target=remote.run, name=f"serving {type(server).__name__}")
    raised: BaseException | None = None
    try:
        thread.start()
        wait([remote.started, remote.ended], return_when=FIRST_COMPLETED)
        if remote.started.done():
            yield remote.started.result()
            remote.stop()
            wait([remote.ended])
    except BaseException as error:  # noqa: ASYNC103 (raised below)
        raised = error
    if remote.ended.cancel():
        # No thread can be had, or KeyboardInterrupt came before it had begun.
        server._close_listener()
        crash = None
    else:
        remote.cancel()
        crash = remote.ended.result()
        thread.join()
    if raised is not None and crash is not None:
        raise BaseExceptionGroup("both the body and the server failed", [raised, crash])
    if raised is not None:
        raise raised
    if crash is not None:
        raise crash
