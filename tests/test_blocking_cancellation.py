"""A blocking handler that waits for its peer, or in trio, can be cancelled; in the time
that takes, nothing is closed under it. What sleeps is waited for, or abandoned.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import PARKED, ends, happens, wait_for
from blocking_world import (
    PATIENCE,
    THREADING_DATAGRAM,
    THREADING_STREAM,
    AtHost,
    Noting,
    Release,
    Sleeping,
    clock,
    each_stream_server,
    is_true,
    make,
    parked,
    sequential_and_threading,
    serving,
)
from helpers import (
    REAL_LIMIT,
    assert_sums_up,
    bounded,
    class_name,
    connect,
    pose,
    receive,
    receive_to_end,
)
from trio.testing import MockClock

from trio_socketserver import RequestTimeout, TCPServer, ThreadingTCPServer

__all__ = ["clock"]  # A fixture.


# -- what waits ----------------------------------------------------------------------------


class Receiving(Noting):
    def stall(self) -> None:
        while self.request.recv(1):
            pass


class ReadingLine(Noting):
    def stall(self) -> None:
        while self.rfile.readline():
            pass


class Sending(Noting):
    def stall(self) -> None:
        while True:
            self.request.sendall(bytes(1_000_000))


class Awaiting(Noting):
    def stall(self) -> None:
        trio.from_thread.run(trio.sleep_forever)


class Polling(Noting):
    def stall(self) -> None:
        while True:
            trio.from_thread.check_cancelled()
            time.sleep(0.001)


STALLS = {
    Receiving: type(None),
    ReadingLine: type(None),
    Sending: BrokenPipeError,
    Awaiting: trio.Cancelled,
    Polling: trio.Cancelled,
}
"""The handlers, and how each ends when it is cancelled."""

each_stall = pytest.mark.parametrize("handler", STALLS, ids=class_name)


def assert_ended_well(server: Any, handler: type) -> None:
    """The handler was woken, its descriptor was its own to the end, ``finish()`` ran."""
    (kept, error), finished = server.notes
    assert kept
    assert issubclass(error, STALLS[handler])
    assert finished == "finished"
    assert_sums_up(server)


# -- what cancels --------------------------------------------------------------------------


@each_stream_server
@each_stall
@bounded
async def test_cancelled_from_outside(
    server_class: Any, handler: type, tmp_path: Path
) -> None:
    server = make(server_class, handler, tmp_path)
    async with trio.open_nursery() as nursery:

        async def serve(task_status: trio.TaskStatus[Any]) -> None:
            async with server:
                await server.serve_forever(task_status=task_status)

        await nursery.start(serve)
        with await parked(server) as client:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await happens(server.finished)
                await receive_to_end(client)
    assert_ended_well(server, handler)
    assert server.statistics().cancelled == 1
    assert server.errors == []


@each_stream_server
@each_stall
@bounded
async def test_cancelled_by_block_on_close(
    server_class: Any, handler: type, tmp_path: Path
) -> None:
    server = make(server_class, handler, tmp_path, block_on_close=False)
    async with serving(server):
        client = await parked(server)
    with client:
        await receive_to_end(client)
    assert_ended_well(server, handler)
    assert server.statistics().cancelled == 1
    assert server.errors == []


@each_stream_server
@each_stall
@bounded
async def test_cancelled_by_graceful_timeout(
    server_class: Any, handler: type, tmp_path: Path, clock: MockClock
) -> None:
    server = make(server_class, handler, tmp_path, graceful_timeout=PATIENCE)
    async with trio.open_nursery() as nursery, serving(server):
        client = await parked(server)

        @nursery.start_soon
        async def lose_patience() -> None:
            await server.draining.wait()
            # The deadline is set when the loop has ended.
            await trio.testing.wait_all_tasks_blocked()
            assert server.notes == []
            clock.jump(PATIENCE)

    with client:
        await receive_to_end(client)
    assert_ended_well(server, handler)
    assert server.statistics().cancelled == 1
    assert server.errors == []


@each_stream_server
@each_stall
@bounded
async def test_cancelled_by_request_timeout(
    server_class: Any, handler: type, tmp_path: Path, clock: MockClock
) -> None:
    server = make(server_class, handler, tmp_path, request_timeout=PATIENCE)
    async with serving(server):
        with await parked(server) as client:
            clock.jump(PATIENCE)
            await happens(server.finished)
            await receive_to_end(client)
    assert_ended_well(server, handler)
    (error,) = server.errors
    assert type(error) is RequestTimeout
    assert server.statistics().failed == 1
    assert server.statistics().peer_errors == 1


@each_stream_server
@each_stall
@bounded
async def test_cancelled_by_a_scope_of_the_users(
    server_class: Any, handler: type, tmp_path: Path, clock: MockClock
) -> None:
    left = []

    class Impatient(server_class):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            with trio.move_on_after(PATIENCE) as scope:
                await super().finish_request(request, client_address)
            left.append((scope.cancelled_caught, list(self.notes)))
            # The connection is the server's again.
            assert request.fileno() != -1

    server = make(Impatient, handler, tmp_path)
    async with serving(server):
        with await parked(server) as client:
            clock.jump(PATIENCE)
            await happens(server.finished)
            await receive_to_end(client)
    assert_ended_well(server, handler)
    assert left == [(True, server.notes)]
    assert server.errors == []
    assert server.statistics().completed == 1


@sequential_and_threading
@bounded
async def test_it_serves_on_after_a_timeout(
    server_class: Any, tmp_path: Path, clock: MockClock
) -> None:
    server = make(server_class, Receiving, tmp_path, request_timeout=PATIENCE)
    async with serving(server):
        for _ in range(2):
            with await parked(server) as client:
                clock.jump(PATIENCE)
                await receive_to_end(client)
        with await parked(server) as client:
            client.sendall(b"not the end")
        await is_true(lambda: server.statistics().completed == 1)
    assert server.statistics().failed == 2


@sequential_and_threading
@bounded
async def test_an_error_after_being_woken_is_none(
    server_class: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Complaining(Noting):
        def stall(self) -> None:
            self.request.recv(1)
            raise LookupError("the peer has said nothing")

        def finish(self) -> None:
            super().finish()
            raise SystemExit("and is worse at the end")

    server = make(server_class, Complaining, tmp_path, block_on_close=False)
    async with serving(server):
        client = await parked(server)
    with client:
        await receive_to_end(client)
    assert server.notes == [(True, LookupError), "finished"]
    assert server.errors == []
    assert not caplog.records
    assert server.statistics().cancelled == 1


@bounded
async def test_many_are_cancelled_at_once(tmp_path: Path) -> None:
    server = make(ThreadingTCPServer, Receiving, tmp_path, block_on_close=False)
    with contextlib.ExitStack() as clients:
        async with serving(server):
            for _ in range(10):
                clients.enter_context(await parked(server))
    assert server.notes.count((True, type(None))) == 10
    assert server.statistics().cancelled == 10


@sequential_and_threading
@bounded
async def test_who_shields_itself_is_waited_for(server_class: Any, tmp_path: Path) -> None:
    class Shielding(Noting):
        def stall(self) -> None:
            trio.from_thread.run(self.shielded)

        async def shielded(self) -> None:
            with trio.CancelScope(shield=True):
                await self.server.opened.wait()

    server = make(server_class, Shielding, tmp_path, block_on_close=False)
    server.opened = trio.Event()
    async with trio.open_nursery() as nursery, serving(server):
        client = await parked(server)

        @nursery.start_soon
        async def open_later() -> None:
            await receive_to_end(client)
            assert server.notes == []
            server.opened.set()

    client.close()
    assert server.notes == [(True, type(None)), "finished"]
    assert server.statistics().cancelled == 1


# -- what sleeps ---------------------------------------------------------------------------


@each_stream_server
@bounded
async def test_what_sleeps_is_waited_for(server_class: Any, tmp_path: Path) -> None:
    server = make(server_class, Sleeping, tmp_path, block_on_close=False)
    with Release(server) as awake:
        async with trio.open_nursery() as nursery, serving(server):
            client = await parked(server)

            @nursery.start_soon
            async def wake_later() -> None:
                # It is shut down at once, though.
                assert await receive(client) == b""
                await trio.testing.wait_all_tasks_blocked()
                assert server.notes == []
                assert server.statistics().active == 1
                awake.set()

    client.close()
    assert server.notes == [(True, type(None)), "finished"]
    assert server.statistics().cancelled == 1
    assert server.statistics().abandoned_threads == 0


each_daemonic_server = pytest.mark.parametrize(
    "server_class", THREADING_STREAM, ids=class_name
)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "request" in thread.name]


@contextlib.asynccontextmanager
async def abandoned(server: Any) -> AsyncIterator[Any]:
    """Leave *server* while a `Sleeping` handler, which is let go at the end, sleeps."""
    with Release(server):
        async with serving(server):
            client = await parked(server)
            threads = workers()
            assert len(threads) == 1
        try:
            yield client
        finally:
            client.close()
            server.awake.set()
            await ends(*threads)


@each_daemonic_server
@bounded
async def test_a_daemonic_thread_is_abandoned(
    server_class: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = make(
        server_class, Sleeping, tmp_path, daemon_threads=True, block_on_close=False
    )
    async with abandoned(server) as client:
        assert server.notes == []
        assert_sums_up(server)
        assert server.statistics().cancelled == 1
        assert server.statistics().abandoned_threads == 1
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "abandoned" in record.getMessage()
        assert await receive(client) == b""
    assert server.notes == [(True, type(None)), "finished"]
    assert len(caplog.records) == 1


@bounded
async def test_an_abandoned_thread_closes_its_socket_at_its_end(tmp_path: Path) -> None:
    closed = threading.Event()
    sockets = []

    class Keeping(Sleeping):
        def finish(self) -> None:
            super().finish()
            sockets.append(self.request)
            closed.set()

    server = make(
        ThreadingTCPServer, Keeping, tmp_path, daemon_threads=True, block_on_close=False
    )
    async with abandoned(server):
        server.awake.set()
        await happens(closed)
        await is_true(lambda: sockets[0].fileno() == -1)
    assert server.notes[0] == (True, type(None))


@bounded
async def test_daemonic_handlers_that_wait_for_the_peer_are_woken(tmp_path: Path) -> None:
    server = make(
        ThreadingTCPServer, Receiving, tmp_path, daemon_threads=True, block_on_close=False
    )
    async with serving(server):
        client = await parked(server)
        threads = workers()
    with client:
        await receive_to_end(client)
        await ends(*threads)
    assert server.notes == [(True, type(None)), "finished"]
    assert server.statistics().abandoned_threads == 1


@bounded
async def test_without_cancellation_daemonic_threads_are_joined(tmp_path: Path) -> None:
    server = make(ThreadingTCPServer, Receiving, tmp_path, daemon_threads=True)
    async with trio.open_nursery() as nursery, serving(server):
        client = await parked(server)

        @nursery.start_soon
        async def end_later() -> None:
            await server.draining.wait()
            client.close()

    assert server.notes == [(True, type(None)), "finished"]
    assert server.statistics().completed == 1
    assert server.statistics().abandoned_threads == 0


@bounded
async def test_a_daemonic_thread_is_abandoned_at_request_timeout(
    tmp_path: Path, clock: MockClock
) -> None:
    server = make(
        ThreadingTCPServer,
        Sleeping,
        tmp_path,
        daemon_threads=True,
        max_threads=1,
        request_timeout=PATIENCE,
    )
    with Release(server) as awake:
        async with serving(server):
            with await parked(server) as client, connect(server.server_address) as next_one:
                (thread,) = workers()
                clock.jump(PATIENCE)
                await receive_to_end(client)
                await is_true(lambda: server.statistics().failed == 1)
                # It counts until it ends: there is no room for the next client.
                await trio.testing.wait_all_tasks_blocked()
                assert server.statistics().accepted == 1
                assert server.statistics().abandoned_threads == 1
                awake.set()
                assert await receive(next_one) == PARKED
        await ends(thread)
    assert type(server.errors[0]) is RequestTimeout
    assert server.statistics().accepted == 2
    assert_sums_up(server)


@bounded
async def test_a_request_of_ones_own_waits_for_an_abandoned_thread(
    tmp_path: Path, clock: MockClock
) -> None:
    server = make(
        ThreadingTCPServer,
        Sleeping,
        tmp_path,
        daemon_threads=True,
        max_threads=1,
        request_timeout=PATIENCE,
    )
    with Release(server) as awake:
        async with serving(server):
            with await parked(server) as client:
                clock.jump(PATIENCE)
                await is_true(lambda: server.statistics().failed == 1)
                server.request_timeout = None
                await receive_to_end(client)
            seen: list[str] = []
            server.RequestHandlerClass = lambda request, *rest: seen.append(request)
            await server.process_request("mine", "nobody")
            await trio.testing.wait_all_tasks_blocked()
            assert seen == []
            awake.set()
            await is_true(lambda: bool(seen))
    assert seen == ["mine"]


@pytest.mark.parametrize(
    "server_class", [*THREADING_STREAM, *THREADING_DATAGRAM], ids=class_name
)
@bounded
async def test_abandoned_before_the_thread_has_begun(
    server_class: Any, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.notes.append("never")

    server = make(server_class, handler, tmp_path, daemon_threads=True)
    with pose(server, b"ask", tmp_path) as client:
        async with trio.open_nursery() as nursery:
            with AtHost(nursery.cancel_scope.cancel):
                async with server:
                    await server.serve_forever()
        if client.type == socket.SOCK_STREAM:
            await receive_to_end(client)
    assert server.notes == []
    assert server.statistics().cancelled == 1
    assert server.statistics().abandoned_threads == 1


def test_an_abandoned_thread_outlives_the_run(tmp_path: Path) -> None:
    begun = threading.Event()
    sockets = []

    class Outliving(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            sockets.append(self.request)
            begun.set()
            assert self.server.awake.wait(REAL_LIMIT)
            self.server.notes.append(self.request.fileno() != -1)

    server = make(
        ThreadingTCPServer, Outliving, tmp_path, daemon_threads=True, block_on_close=False
    )

    async def main() -> None:
        with trio.fail_after(REAL_LIMIT):
            async with serving(server):
                clients.append(connect(server.server_address))
                await happens(begun)

    clients: list[Any] = []
    with Release(server) as awake:
        trio.run(main)
        (thread,) = workers()
        with clients[0] as client:
            assert client.recv(1) == b""
            awake.set()
            trio.run(ends, thread)
    assert server.notes == [True]
    assert sockets[0].fileno() == -1


@pytest.mark.parametrize("server_class", THREADING_DATAGRAM, ids=class_name)
@pytest.mark.parametrize("outlives", [False, True])
def test_an_abandoned_thread_with_a_datagram(
    server_class: Any, outlives: bool, tmp_path: Path
) -> None:
    begun = threading.Event()
    views = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        views.append(request[1])
        begun.set()
        wait_for(server.awake)
        if not outlives:
            with pytest.raises(BrokenPipeError):
                request[1].recv(1)
        server.notes.append(request[1].fileno() != -1)

    server = make(
        server_class, handler, tmp_path, daemon_threads=True, block_on_close=False
    )
    threads = []

    async def main() -> None:
        with trio.fail_after(REAL_LIMIT):
            async with serving(server):
                with pose(server, b"ask", tmp_path):
                    await happens(begun)
                threads.extend(workers())
            if not outlives:
                awake.set()
                await is_true(lambda: views[0].fileno() == -1)
                await ends(*threads)

    with Release(server) as awake:
        trio.run(main)
    trio.run(ends, *threads)
    assert server.notes == [True]
    assert views[0].fileno() == -1


@bounded
async def test_daemon_threads_is_read_when_it_is_used(tmp_path: Path) -> None:
    server = make(ThreadingTCPServer, Sleeping, tmp_path, block_on_close=False)
    threads = set(workers())
    with Release(server) as awake:
        awake.set()
        async with serving(server):
            # This leaves a thread, which trio could not abandon.
            with await parked(server) as client:
                await receive_to_end(client)
            awake.clear()
            server.daemon_threads = True
            client = await parked(server)
            threads = set(workers()) - threads
        client.close()
        assert server.statistics().abandoned_threads == 1
        awake.set()
        await ends(*threads)


@bounded
async def test_closing_a_lent_request_wakes_its_handler(tmp_path: Path) -> None:
    requests = []

    class Remembering(TCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            requests.append(request)
            return True

    server = make(Remembering, Receiving, tmp_path)
    async with serving(server):
        with await parked(server) as client:
            assert requests[0].fileno() == -1
            await requests[0].aclose()
            await receive_to_end(client)
    assert server.notes == [(True, type(None)), "finished"]
    assert server.statistics().completed == 1
