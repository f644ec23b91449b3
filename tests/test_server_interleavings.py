"""Several ways of starting and ending a server race with each other."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import trio
from helpers import (
    REAL_LIMIT,
    answer,
    ask,
    assert_sums_up,
    bounded,
    connect,
    echo_all,
    pose,
    receive_to_end,
)
from lifecycles import (
    LOOPBACK,
    entered_or_not,
    entering,
    run_virtually,
    serving,
    stuck,
    tcp_servers,
)
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import NurseryTCPServer, StreamRequestHandler, TCPServer


async def checkpoints(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


@contextmanager
def only(*expected: type[BaseException]) -> Iterator[None]:
    """Let exceptions of the expected types, in groups or not, pass silently."""
    try:
        yield
    except BaseException as error:
        group = BaseExceptionGroup("any", [error])
        _, rest = group.split(expected)
        if rest is not None:
            raise


class Boom(Exception):
    """What the body raises."""


class Crash(BaseException):
    """What a request raises."""


class Ordeal:
    """A server with a request in progress, for two things to happen to."""

    def __init__(self, server_class: Any) -> None:
        self.began = self.finished = 0
        self.crash = trio.Event()
        self.boom = trio.Event()
        self.leave = trio.Event()
        self.hard = trio.CancelScope()
        self.soft = trio.CancelScope()
        ordeal = self

        class Handler(StreamRequestHandler):
            async def setup(self) -> None:
                await super().setup()
                ordeal.began += 1

            async def handle(self) -> None:
                with trio.move_on_after(50):
                    await ordeal.crash.wait()
                    raise Crash

            async def finish(self) -> None:
                await trio.sleep(1)
                ordeal.finished += 1

        class Server(server_class):
            async def service_actions(self) -> None:
                await trio.lowlevel.checkpoint()

            async def verify_request(self, request: Any, client_address: Any) -> bool:
                await trio.lowlevel.checkpoint()
                return True

        self.server = Server(LOOPBACK, Handler)

    async def shutdown(self) -> None:
        await self.server.shutdown()

    async def close(self) -> None:
        await self.server.server_close()

    async def close_and_give_up(self) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await self.server.server_close()

    async def cancel_soft(self) -> None:
        self.soft.cancel()

    async def cancel_hard(self) -> None:
        self.hard.cancel()

    async def raise_in_body(self) -> None:
        self.boom.set()

    async def raise_in_request(self) -> None:
        self.crash.set()

    async def connect(self) -> None:
        if self.server.fileno() != -1:
            self.clients.append(connect(self.server.server_address))

    async def serve(self) -> None:
        with only(RuntimeError, trio.ClosedResourceError, Crash):
            await self.server.serve_forever()

    ACTIONS = (
        serve,
        shutdown,
        close,
        close_and_give_up,
        cancel_soft,
        cancel_hard,
        raise_in_body,
        raise_in_request,
        connect,
    )

    async def run(self, entered: bool, first: Any, second: Any, pause: int) -> None:
        self.clients = [connect(self.server.server_address)]
        async with trio.open_nursery() as outside:
            outside.start_soon(self._act, first, second, pause)
            with only(Boom, Crash), self.hard:
                async with entering(self.server, entered), trio.open_nursery() as body:
                    body.start_soon(self._serve)
                    body.start_soon(self._raise_boom)
                    await self.leave.wait()
                    body.cancel_scope.cancel()
            await self.server.server_close()
        assert self.server.fileno() == -1
        assert_sums_up(self.server)
        assert self.finished == self.began
        for client in self.clients:
            with client:
                client.settimeout(REAL_LIMIT)
                with only(ConnectionResetError):
                    assert client.recv(1) == b""

    async def _serve(self) -> None:
        with self.soft, only(RuntimeError, trio.ClosedResourceError):
            await self.server.serve_forever()

    async def _raise_boom(self) -> None:
        await self.boom.wait()
        raise Boom

    async def _act(self, first: Any, second: Any, pause: int) -> None:
        await checkpoints(pause % 4)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first, self)
            await checkpoints(pause // 4)
            nursery.start_soon(second, self)
            await checkpoints(6)
            self.leave.set()


@entered_or_not
@tcp_servers
@pytest.mark.parametrize("first", Ordeal.ACTIONS, ids=lambda action: action.__name__)
def test_any_two_events_may_race(first: Any, server_class: Any, entered: bool) -> None:
    for second, pause in itertools.product(Ordeal.ACTIONS, (0, 1, 3, 6, 10, 15)):
        run_virtually(Ordeal(server_class).run, entered, first, second, pause)


@entered_or_not
def test_a_start_may_be_cancelled_at_any_moment(entered: bool) -> None:
    async def main(moment: int) -> None:
        server = NurseryTCPServer(LOOPBACK, echo_all)
        with trio.CancelScope() as scope:

            async def cancel_later() -> None:
                await checkpoints(moment)
                scope.cancel()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(cancel_later)
                async with entering(server, entered), trio.open_nursery() as loops:
                    await loops.start(server.serve_forever)
                    started.append(moment)
                    await trio.sleep_forever()
        assert scope.cancelled_caught
        if entered:
            server.socket = socket.create_server(LOOPBACK)
            server.server_address = server.socket.getsockname()
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await ask(server, b"ping") == b"ping"
            await server.server_close()

    started: list[int] = []
    for moment in range(12):
        run_virtually(main, moment)
    assert started, "the last moments were late enough"
    assert 0 not in started


def test_closing_while_entering() -> None:
    async def main(moment: int, action: str) -> None:
        server = NurseryTCPServer(LOOPBACK, echo_all)

        async def close() -> None:
            await checkpoints(moment)
            await getattr(server, action)()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(close)
            async with server:
                with only(trio.ClosedResourceError, RuntimeError):
                    await server.serve_forever()
        assert server.fileno() == -1

    for moment, action in itertools.product(range(8), ("server_close", "shutdown")):
        run_virtually(main, moment, action)


def test_a_loop_may_begin_at_any_moment_of_leaving() -> None:
    async def main(moment: int, action: str) -> None:
        server = NurseryTCPServer(LOOPBACK, echo_all)

        async def serve() -> None:
            await checkpoints(moment)
            with only(trio.ClosedResourceError):
                await getattr(server, action)()

        async with trio.open_nursery() as nursery, server:
            nursery.start_soon(serve)
        assert server.fileno() == -1
        assert trio.current_time() == 0

    for _ in range(4):
        for moment, action in itertools.product(
            range(14), ("serve_forever", "handle_request")
        ):
            run_virtually(main, moment, action)


def test_entering_may_be_cancelled_while_another_task_begins_to_serve() -> None:
    async def main(moment: int, late: int) -> None:
        server = NurseryTCPServer(LOOPBACK, echo_all)

        async def serve() -> None:
            await checkpoints(late)
            with only(trio.ClosedResourceError):
                await server.serve_forever()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            with trio.CancelScope() as scope:
                nursery.start_soon(cancel_after, scope, moment)
                with only(RuntimeError):
                    async with server:
                        await trio.sleep_forever()
            await server.server_close()
        assert server.fileno() == -1
        assert trio.current_time() == 0

    async def cancel_after(scope: trio.CancelScope, moment: int) -> None:
        await checkpoints(moment)
        scope.cancel()

    for _ in range(4):
        for moment, late in itertools.product(range(6), range(6)):
            run_virtually(main, moment, late)


def test_shutdown_and_serve_in_turns() -> None:
    """Loops that begin and end all the time, and somebody who stops them all the time."""

    async def main(server_class: Any, pause: int) -> None:
        server = server_class(LOOPBACK, echo_all)
        done = trio.Event()

        async def stop() -> None:
            while not done.is_set():
                await server.shutdown()
                await checkpoints(pause)

        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            for number in range(20):
                with pose(server, b"%d" % number) as client:
                    while server.statistics().accepted <= number:
                        await server.serve_forever()
                    assert await answer(client) == b"%d" % number
            done.set()
        assert server.statistics().completed == 20

    for server_class, pause in itertools.product(
        (TCPServer, NurseryTCPServer), (1, 2, 3, 5, 9)
    ):
        run_virtually(main, server_class, pause)


@bounded
async def test_exceptions_in_hooks_while_closing(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            try:
                await super().finish_request(request, client_address)
            finally:
                raise LookupError("finish_request")

        async def shutdown_request(self, request: Any) -> None:
            raise LookupError("shutdown_request")

        async def handle_error(self, request: Any, client_address: Any) -> None:
            raise LookupError("handle_error")

    for ending in ("cancel", "graceful", "raise"):
        server = Server(LOOPBACK, stuck)
        server.graceful_timeout = 1
        with connect(server.server_address) as one, connect(server.server_address) as two:
            with only(Boom), trio.CancelScope() as hard:
                async with serving(server):
                    await wait_all_tasks_blocked()
                    assert server.statistics().active == 2
                    if ending == "cancel":
                        hard.cancel()
                    if ending == "raise":
                        raise Boom
            assert await receive_to_end(one) == b""
            assert await receive_to_end(two) == b""
        assert server.fileno() == -1
        assert server.statistics().failed == 2
        assert_sums_up(server)


@bounded
async def test_a_request_processed_while_closing_has_an_owner(autojump_clock: Any) -> None:
    """process_request() by a task of the user's, at every stage of closing."""

    class Server(NurseryTCPServer):
        async def process_request(self, *request: Any) -> None:
            held.append(request)

        async def process_later(self) -> None:
            await super().process_request(*held[-1])
            held.pop()

    held: list[Any] = []
    server = Server(LOOPBACK, stuck)
    server.graceful_timeout = 5
    with pose(server, b""), pose(server, b""), pose(server, b""):
        async with serving(server):
            await wait_all_tasks_blocked()
            assert len(held) == 3
            await server.process_later()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.server_close)
                await trio.sleep(1)
                await server.process_later()  # While the first one is waited for.
                await trio.sleep(1)
                assert server.statistics().active == 2
            assert trio.current_time() == 5
            accepted = server.statistics().accepted
            with pytest.raises(RuntimeError):
                await server.process_later()  # Too late: it stays its caller's.
            assert server.statistics().accepted == accepted
            [(request, _)] = held
            request.close_now()
    assert server.statistics().cancelled == 2
    assert_sums_up(server)


def test_closing_while_a_second_loop_alone_begins() -> None:
    async def main(moment: int) -> None:
        server = NurseryTCPServer(LOOPBACK, echo_all)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await server.shutdown()

        async def serve() -> None:
            nonlocal closed_before
            try:
                await server.serve_forever()
            except trio.ClosedResourceError:
                closed_before = True

        closed_before = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await checkpoints(moment)
            await server.server_close()
        assert server.fileno() == -1
        # trio shuffles: one step later it can still have been the first.
        assert not (closed_before and moment > 1)

    for moment in range(10):
        run_virtually(main, moment)
