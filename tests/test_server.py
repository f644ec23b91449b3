"""The lifecycle of servers: entering, serving, stopping, closing, in every order.

Also `handle_request()`, the counting of requests, and what happens when several ways of
ending a server race with each other.
"""

from __future__ import annotations

import errno
import functools
import itertools
import math
import os
import resource
import socket
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import (
    DATAGRAM_SERVERS,
    STREAM_SERVERS,
    answer,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    echo_all,
    is_refused,
    pose,
    receive_to_end,
    reply_now,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_socketserver import (
    BaseRequestHandler,
    BaseServer,
    NurseryMixIn,
    NurseryTCPServer,
    NurseryUDPServer,
    RequestTimeout,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)

LOOPBACK = ("127.0.0.1", 0)
SERVERS = (*STREAM_SERVERS, *DATAGRAM_SERVERS)
SEQUENTIAL = [server for server in SERVERS if not issubclass(server, NurseryMixIn)]
CONCURRENT = [server for server in SERVERS if issubclass(server, NurseryMixIn)]
all_servers = pytest.mark.parametrize("server_class", SERVERS, ids=class_name)
stream_servers = pytest.mark.parametrize("server_class", STREAM_SERVERS, ids=class_name)
entered_or_not = pytest.mark.parametrize("entered", [True, False], ids=["entered", "alone"])
some_servers = pytest.mark.parametrize(
    "server_class",
    [TCPServer, UDPServer, NurseryTCPServer, NurseryUDPServer],
    ids=class_name,
)
tcp_servers = pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer], ids=class_name
)


@asynccontextmanager
async def serving(server: Any) -> AsyncGenerator[trio.Nursery]:
    """Have *server* entered, and its loop in a task, for the length of the block."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield nursery
        await server.shutdown()


def entering(server: Any, entered: bool) -> Any:
    return server if entered else nullcontext()


class Gate:
    """A handler that keeps its requests until it is opened, then echoes."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.waiting = 0

    async def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        self.waiting += 1
        await self.opened.wait()
        await echo_all(request, client_address, server)


async def stuck(request: Any, client_address: Any, server: Any) -> None:
    """Handle a request for ever."""
    await trio.sleep_forever()


# -- serving -------------------------------------------------------------------------------


@all_servers
@bounded
async def test_start_gives_the_address_when_the_kernel_queues(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        address = await nursery.start(server.serve_forever)
        assert address == server.server_address == server.socket.getsockname()
        assert await ask(server, b"ping", tmp_path) == b"ping"
        await server.shutdown()
    assert server.fileno() == -1


@all_servers
@bounded
async def test_start_without_entering(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(server.serve_forever)
        assert address == server.server_address
        assert await ask(server, b"ping", tmp_path) == b"ping"
        await server.shutdown()
    # As in the stdlib, the listening socket is closed by server_close() only.
    assert server.fileno() != -1
    await server.server_close()
    assert server.fileno() == -1


@all_servers
@entered_or_not
@bounded
async def test_serving_several_times_in_a_row(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with entering(server, entered):
        for number in range(3):
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve_forever)
                assert await ask(server, b"%d" % number, tmp_path) == b"%d" % number
                await server.shutdown()
            # Between the loops the kernel queues.
            with pose(server, b"queued", tmp_path) as client:
                async with trio.open_nursery() as nursery:
                    await nursery.start(server.serve_forever)
                    assert await answer(client) == b"queued"
                    await server.shutdown()
    await server.server_close()
    assert server.statistics().completed == 6


@bounded
async def test_a_request_outlives_the_loop_inside_the_block(autojump_clock: Any) -> None:
    gate = Gate()
    server = NurseryTCPServer(LOOPBACK, gate)
    with pose(server, b"ping") as client:
        async with server:
            with trio.CancelScope() as soft:
                async with trio.open_nursery() as nursery:
                    await nursery.start(server.serve_forever)
                    await wait_all_tasks_blocked()
                    soft.cancel()
            assert server.statistics().active == 1
            gate.opened.set()
            assert await answer(client) == b"ping"


@bounded
async def test_serving_alone_waits_for_its_requests(autojump_clock: Any) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await server.shutdown()
        await trio.sleep(100)
        await echo_all(request, client_address, server)

    server = NurseryTCPServer(LOOPBACK, slow)
    with pose(server, b"ping") as client:
        await server.serve_forever()
        assert trio.current_time() == 100
        assert reply_now(client) == b"ping"
    await server.server_close()


@all_servers
@entered_or_not
@bounded
async def test_a_second_loop_is_refused_and_harms_nothing(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with entering(server, entered), trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        for second in (server.serve_forever, server.handle_request):
            with pytest.raises(RuntimeError):
                await second()
            with pytest.raises(RuntimeError):
                await second()
            assert await ask(server, b"ping", tmp_path) == b"ping"
        await server.shutdown()
    await server.server_close()


@entered_or_not
@pytest.mark.parametrize("loops", ["serve_forever", "handle_request"])
@bounded
async def test_of_two_loops_that_begin_at_once_one_serves(
    autojump_clock: Any, entered: bool, loops: str
) -> None:
    ended = Counter[str]()

    async def loop(server: Any) -> None:
        try:
            await getattr(server, loops)()
        except RuntimeError:
            ended["refused"] += 1
        else:
            ended["returned"] += 1

    for _ in range(8):  # trio shuffles the order of the tasks.
        ended.clear()
        server = NurseryTCPServer(LOOPBACK, echo_all)
        with pose(server, b"ping") as client:
            async with entering(server, entered), trio.open_nursery() as nursery:
                nursery.start_soon(loop, server)
                nursery.start_soon(loop, server)
                assert await answer(client) == b"ping"
                assert ended["refused"] == 1
                await server.shutdown()
        await server.server_close()
        assert ended == {"refused": 1, "returned": 1}
        assert server.statistics().failed == 0


@bounded
async def test_entering_and_serving_at_once(autojump_clock: Any) -> None:
    """One task enters the server while another begins to serve: both orders are sound."""

    async def enter(server: Any, leave: trio.Event) -> None:
        try:
            async with server:
                await leave.wait()
        except RuntimeError:
            assert not server.statistics().failed

    for _ in range(8):
        server = NurseryTCPServer(LOOPBACK, echo_all)
        leave = trio.Event()
        with pose(server, b"ping") as client:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(enter, server, leave)
                nursery.start_soon(server.serve_forever)
                assert await answer(client) == b"ping"
                await server.shutdown()
                leave.set()
        await server.server_close()
        assert server.statistics().failed == 0


@bounded
async def test_a_server_cannot_be_entered_twice(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with serving(server):
        with pytest.raises(RuntimeError, match="entered"):
            async with server:
                pytest.fail("entered twice")
        assert await ask(server, b"ping") == b"ping"
    server = TCPServer(LOOPBACK, echo_all)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pytest.raises(RuntimeError):
            async with server:
                pytest.fail("entered while it serves alone")
        assert await ask(server, b"ping") == b"ping"
        await server.server_close()


@bounded
async def test_entering_gives_the_server(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with server as entered:
        assert entered is server


@all_servers
@bounded
async def test_a_server_can_be_entered_again_with_a_new_socket(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    drainings = [server.draining]
    for round_ in range(3):
        async with server, trio.open_nursery() as nursery:
            assert not server.draining.is_set()
            drainings.append(server.draining)
            if round_ != 1:  # In one round nothing is served.
                await nursery.start(server.serve_forever)
                assert await ask(server, b"ping", tmp_path) == b"ping"
                await server.shutdown()
        assert server.draining.is_set()
        server.socket = socket.socket(server.address_family, server.socket_type)
        server.server_address = bind_address(server_class, tmp_path)
        server.server_bind()
        server.server_activate()
    assert len(set(map(id, drainings))) == 4
    await server.server_close()
    assert server.statistics().completed == 2


@bounded
async def test_a_closed_server_can_be_given_a_new_socket(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    await server.server_close()
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    async with serving(server):
        assert await ask(server, b"ping") == b"ping"


@entered_or_not
@bounded
async def test_serving_a_closed_socket_is_an_error(
    autojump_clock: Any, entered: bool
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    server.socket.close()
    for loop in (server.serve_forever, server.handle_request):
        with pytest.raises(trio.ClosedResourceError):
            async with entering(server, entered):
                await loop()


@bounded
async def test_several_servers_side_by_side(autojump_clock: Any, tmp_path: Path) -> None:
    servers = [cls(bind_address(cls, tmp_path), echo_all) for cls in SERVERS]
    async with trio.open_nursery() as nursery:
        for server in servers:
            address = await nursery.start(server.serve_forever)
            assert address == server.server_address
        clients = [
            pose(server, server.__class__.__name__.encode(), tmp_path) for server in servers
        ]
        for server, client in zip(servers, clients, strict=True):
            with client:
                assert await answer(client) == server.__class__.__name__.encode()
        for server in servers:
            await server.server_close()
    assert [server.fileno() for server in servers] == [-1] * len(servers)
    assert [server.statistics().completed for server in servers] == [1] * len(servers)


def test_a_server_made_before_trio_runs_serves_in_several_runs() -> None:
    server = NurseryTCPServer(LOOPBACK, echo_all)

    async def serve() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await ask(server, b"ping") == b"ping"
            await server.shutdown()

    trio.run(serve)
    trio.run(serve, clock=MockClock(autojump_threshold=0))
    trio.run(server.server_close)


def test_a_shortage_of_one_run_does_not_delay_the_next() -> None:
    class Server(NurseryTCPServer):
        short = True

        async def get_request(self) -> tuple[Any, Any]:
            if self.short:
                raise OSError(errno.EMFILE, "out of descriptors")
            return await super().get_request()

    server = Server(LOOPBACK, echo_all)
    server.block_on_close = False

    async def run_short() -> None:
        await trio.sleep(10**5)
        with trio.move_on_after(0.5):
            await server.serve_forever()

    async def run_well() -> None:
        async with serving(server):
            assert await ask(server, b"ping") == b"ping"
        assert trio.current_time() < 2

    with connect(server.server_address):
        run_virtually(run_short)
        assert server.statistics().accept_errors > 1
        server.short = False
        run_virtually(run_well)


# -- shutdown ------------------------------------------------------------------------------


@all_servers
@bounded
async def test_shutdown_waits_until_nothing_more_is_accepted(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping", tmp_path) == b"ping"
        await server.shutdown()
        with pose(server, b"late", tmp_path):
            await trio.sleep(10)
            assert server.statistics().accepted == 1
        nursery.start_soon(server.shutdown)  # After the stop it does nothing.
        await server.shutdown()


@entered_or_not
@pytest.mark.parametrize("times", [1, 3])
@bounded
async def test_shutdown_before_the_first_loop_is_remembered(
    autojump_clock: Any, entered: bool, times: int
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    with pose(server, b""):
        async with entering(server, entered):
            for _ in range(times):
                await server.shutdown()
            async with trio.open_nursery() as nursery:
                assert await nursery.start(server.serve_forever) == server.server_address
            assert server.statistics().accepted == 0
            # It was for that loop only.
            with trio.move_on_after(1) as served:
                await server.serve_forever()
            assert served.cancelled_caught
            assert server.statistics().accepted == 1
    await server.server_close()


@bounded
async def test_shutdown_before_entering_is_remembered(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    await server.shutdown()
    async with server:
        await server.serve_forever()
    assert trio.current_time() == 0


@bounded
async def test_shutdown_is_remembered_at_each_entering(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with serving(server):
        assert await ask(server, b"ping") == b"ping"
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    async with server:
        await server.shutdown()
        await server.serve_forever()
    assert trio.current_time() == 0


@entered_or_not
@bounded
async def test_a_remembered_shutdown_asks_nothing_of_the_listener(
    autojump_clock: Any, entered: bool
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    await server.shutdown()
    server.socket.close()
    async with entering(server, entered):
        await server.serve_forever()
        with pytest.raises(trio.ClosedResourceError):
            await server.serve_forever()


@bounded
async def test_shutdown_is_remembered_until_the_server_is_left(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with server:
        await server.shutdown()
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    async with serving(server):
        assert await ask(server, b"ping") == b"ping"


@bounded
async def test_shutdown_is_remembered_for_handle_request_too(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    with pose(server, b"ping") as client:
        async with server:
            await server.shutdown()
            await server.handle_request()
            assert server.statistics().accepted == 0
            await server.handle_request()
        assert reply_now(client) == b"ping"


@bounded
async def test_shutdown_is_not_remembered_after_a_loop_has_stopped(
    autojump_clock: Any,
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with serving(server):
        pass
    for _ in range(2):
        await server.shutdown()
    server.socket = socket.create_server(LOOPBACK)
    server.server_address = server.socket.getsockname()
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping") == b"ping"
        await server.server_close()


@bounded
async def test_a_cancelled_start_does_not_stop_the_next_loop(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    for entered in (False, False):
        with trio.move_on_after(0) as given_up:
            async with entering(server, entered):
                await server.serve_forever()
        assert given_up.cancelled_caught
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping") == b"ping"
        await server.server_close()


@all_servers
@entered_or_not
@bounded
async def test_shutdown_by_a_handler(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    async def last(request: Any, client_address: Any, server: Any) -> None:
        await server.shutdown()
        await server.shutdown()
        await echo_all(request, client_address, server)

    server = server_class(bind_address(server_class, tmp_path), last)
    with pose(server, b"ping", tmp_path) as client:
        async with entering(server, entered):
            await server.serve_forever()
            assert await answer(client) == b"ping"
    await server.server_close()
    assert server.statistics().completed == 1
    assert trio.current_time() == 0


LOOP_HOOKS = ("get_request", "verify_request", "process_request", "service_actions")
REQUEST_HOOKS = ("finish_request", "shutdown_request", "close_request", "handle_error")


def calling(server_class: Any, hook: str, action: str, log: list[str]) -> Any:
    """A server class in which *hook* does *action*, one of the server's own methods."""

    async def override(self: Any, *args: Any) -> Any:
        log.append("called")
        await getattr(self, action)()
        log.append("returned")
        return await getattr(super(Calling, self), hook)(*args)

    Calling = type("Calling", (server_class,), {hook: override})  # noqa: N806
    return Calling


@some_servers
@entered_or_not
@pytest.mark.parametrize("hook", [*LOOP_HOOKS, *REQUEST_HOOKS])
@bounded
async def test_shutdown_by_a_hook(
    autojump_clock: Any, server_class: Any, hook: str, entered: bool, tmp_path: Path
) -> None:
    async def fail(request: Any, client_address: Any, server: Any) -> None:
        await echo_all(request, client_address, server)
        raise ConnectionResetError

    log: list[str] = []
    server_class = calling(server_class, hook, "shutdown", log)
    handler = fail if hook == "handle_error" else echo_all
    server = server_class(bind_address(server_class, tmp_path), handler)
    with pose(server, b"ping", tmp_path) as client, pose(server, b"late", tmp_path) as late:
        async with entering(server, entered):
            await server.serve_forever()
            # Shutting down costs the request at hand nothing.
            assert await answer(client) == b"ping"
            accepted = server.statistics().accepted
            if hook in LOOP_HOOKS and hook != "service_actions":
                assert accepted == 1, "nothing is accepted once shutdown() has returned"
            await wait_all_tasks_blocked()
        if accepted == 1:
            await server.server_close()
            assert reply_now(late) == b""
    await server.server_close()
    assert log.count("called") == log.count("returned") > 0
    assert server.statistics().cancelled == 0
    assert_sums_up(server)


@bounded
async def test_shutdown_by_handle_timeout(autojump_clock: Any) -> None:
    log: list[str] = []
    server = calling(TCPServer, "handle_timeout", "shutdown", log)(LOOPBACK, echo_all)
    server.timeout = 3
    async with server:
        await server.handle_request()
    assert log == ["called", "returned"]
    assert trio.current_time() == 3


@tcp_servers
@bounded
async def test_shutdown_by_several_tasks_at_once(
    autojump_clock: Any, server_class: Any
) -> None:
    ended = []

    async def end(server: Any) -> None:
        await server.shutdown()
        ended.append(looping.is_set())

    async def loop(server: Any, task_status: Any) -> None:
        await server.serve_forever(task_status=task_status)
        looping.set()

    looping = trio.Event()
    server = server_class(LOOPBACK, echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: loop(server, task_status))
        for _ in range(10):
            nursery.start_soon(end, server)
    assert len(ended) == 10


@bounded
async def test_shutdown_waits_for_a_hook_that_cannot_be_cancelled(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            return True

    server = Server(LOOPBACK, echo_all)
    with pose(server, b""), pose(server, b""):
        async with serving(server):
            await wait_all_tasks_blocked()
            await server.shutdown()
            assert trio.current_time() == 10
            assert server.statistics().accepted == 1
            await trio.sleep(100)
            assert server.statistics().accepted == 1


@entered_or_not
@bounded
async def test_a_cancelled_shutdown_stops_the_loop_all_the_same(
    autojump_clock: Any, entered: bool
) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with entering(server, entered), trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with trio.CancelScope() as scope:
            scope.cancel()
            await server.shutdown()
        assert scope.cancelled_caught
    # The nursery has ended, so the loop has.
    await server.server_close()


@bounded
async def test_shutdown_by_a_worker_thread() -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        await trio.to_thread.run_sync(trio.from_thread.run, server.shutdown)
        await trio.to_thread.run_sync(
            functools.partial(trio.from_thread.run, server.server_close),
            abandon_on_cancel=True,
        )
        await request.sendall(b"closed")

    class Server(NurseryTCPServer):
        async def service_actions(self) -> None:
            if self.statistics().completed == 1:
                await trio.to_thread.run_sync(trio.from_thread.run, self.shutdown)

    for server_class in (TCPServer, NurseryTCPServer):
        server = server_class(LOOPBACK, handler)
        with pose(server, b"") as client:
            async with server:
                await server.serve_forever()
            assert await answer(client) == b"closed"
    server = Server(LOOPBACK, echo_all)
    with pose(server, b"ping") as client:
        async with server:
            await server.serve_forever(poll_interval=0.01)
        assert await answer(client) == b"ping"


@bounded
async def test_shutdown_by_a_foreign_thread() -> None:
    server = NurseryTCPServer(LOOPBACK, echo_all)
    token = trio.lowlevel.current_trio_token()
    thread = threading.Thread(
        target=lambda: trio.from_thread.run(server.shutdown, trio_token=token)
    )
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        thread.start()
    thread.join()


# -- the scopes ----------------------------------------------------------------------------


@bounded
async def test_the_soft_scope_cancels_accepting_only(autojump_clock: Any) -> None:
    gate = Gate()
    server = NurseryTCPServer(LOOPBACK, gate)
    with pose(server, b"ping") as client, pose(server, b"later") as later:
        async with server:
            with trio.move_on_after(1) as soft:
                await server.serve_forever()
            assert soft.cancelled_caught
            assert server.statistics().active == 2
            with pose(server, b"queued"):
                await trio.sleep(1)
                assert server.statistics().active == 2
            gate.opened.set()
            assert await answer(client) == b"ping"
        assert await answer(later) == b"later"
    assert server.statistics().completed == 2


@entered_or_not
@tcp_servers
@bounded
async def test_the_hard_scope_cancels_everything(
    autojump_clock: Any, server_class: Any, entered: bool
) -> None:
    finished = []

    class Handler(BaseRequestHandler):
        async def handle(self) -> None:
            await trio.sleep_forever()

        async def finish(self) -> None:
            await trio.sleep(1)
            finished.append(self)

    server = server_class(LOOPBACK, Handler)
    with connect(server.server_address) as client:
        with trio.move_on_after(1) as hard:
            async with entering(server, entered):
                await server.serve_forever()
        assert hard.cancelled_caught
        assert trio.current_time() == 2
        assert await receive_to_end(client) == b""
    assert len(finished) == 1
    assert server.statistics().cancelled == 1
    assert (server.fileno() == -1) is entered
    await server.server_close()


@pytest.mark.parametrize(
    "error",
    [
        LookupError("the body's"),
        ExceptionGroup("a group of its own", [LookupError("the body's")]),
        StopIteration("odd"),
        StopAsyncIteration("odder"),
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
@bounded
async def test_an_exception_of_the_body_leaves_unchanged(
    autojump_clock: Any, error: BaseException
) -> None:
    server = NurseryTCPServer(LOOPBACK, stuck)
    context = error.__context__ = KeyError("what it was raised in the course of")
    caught: BaseException | None = None
    with connect(server.server_address) as client:
        try:
            async with server:
                await server.handle_request()
                await wait_all_tasks_blocked()
                raise error
        except BaseException as left:
            caught = left
        assert await receive_to_end(client) == b""
    assert caught is error
    assert error.__context__ is context
    assert error.__cause__ is None
    assert server.statistics().cancelled == 1
    assert server.fileno() == -1


@bounded
async def test_exceptions_of_the_body_and_of_a_request_come_together(
    autojump_clock: Any,
) -> None:
    async def interrupt(request: Any, client_address: Any, server: Any) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyboardInterrupt

    async def use(server: Any) -> None:
        async with server:
            await server.handle_request()
            await wait_all_tasks_blocked()
            raise LookupError

    server = NurseryTCPServer(LOOPBACK, interrupt)
    with connect(server.server_address), pytest.raises(BaseExceptionGroup) as raised:
        await use(server)
    leaves = set()
    groups: list[BaseException] = [raised.value]
    while groups:
        error = groups.pop()
        if isinstance(error, BaseExceptionGroup):
            groups.extend(error.exceptions)
        else:
            leaves.add(type(error))
    assert leaves == {LookupError, KeyboardInterrupt}


@entered_or_not
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@bounded
async def test_a_request_that_ends_the_program_ends_the_server(
    autojump_clock: Any, entered: bool, error: type[BaseException]
) -> None:
    async def crash(request: Any, client_address: Any, server: Any) -> None:
        if await request.receive_some():
            raise error("from a handler")
        await trio.sleep_forever()

    async def use(server: Any) -> None:
        async with entering(server, entered):
            await server.serve_forever()
            await trio.sleep_forever()

    server = NurseryTCPServer(LOOPBACK, crash)
    with pose(server, b"") as other:
        with pose(server, b"crash"), pytest.raises(error, match="from a handler"):
            await use(server)
        assert await answer(other) == b""
    assert server.fileno() == -1
    seen = server.statistics()
    assert (seen.accepted, seen.cancelled, seen.failed) == (2, 1, 1)


@pytest.mark.parametrize("tasks", [0, 1, 3])
@bounded
async def test_a_request_that_ends_the_program_is_bare_whatever_the_body_does(
    autojump_clock: Any, tasks: int
) -> None:
    async def crash(request: Any, client_address: Any, server: Any) -> None:
        raise KeyboardInterrupt("from a handler")

    async def use(server: Any) -> None:
        async with server, trio.open_nursery() as nursery:
            for _ in range(tasks):
                nursery.start_soon(trio.sleep_forever)
            await server.serve_forever()
            await trio.sleep_forever()

    server = NurseryTCPServer(LOOPBACK, crash)
    with pose(server, b""), pytest.raises(KeyboardInterrupt, match="from a handler"):
        await use(server)


# -- server_close --------------------------------------------------------------------------


@all_servers
@bounded
async def test_server_close_without_entering(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    for _ in range(3):
        await server.server_close()
        assert server.fileno() == -1
    assert list(tmp_path.iterdir()) == []


@all_servers
@entered_or_not
@bounded
async def test_server_close_while_serving(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with entering(server, entered), trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"ping", tmp_path) == b"ping"
        for _ in range(3):
            await server.server_close()
            assert server.fileno() == -1
            assert server.draining.is_set()
    await server.server_close()


@stream_servers
@entered_or_not
@bounded
async def test_server_close_waits_for_the_requests(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    gate = Gate()
    server = server_class(bind_address(server_class, tmp_path), gate)
    closed = []

    async def close() -> None:
        await server.server_close()
        closed.append(trio.current_time())

    with pose(server, b"ping") as client:
        async with entering(server, entered), trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            nursery.start_soon(close)
            nursery.start_soon(close)
            await trio.sleep(10)
            assert not closed
            assert server.fileno() == -1
            assert is_refused(server.server_address)
            gate.opened.set()
        assert await answer(client) == b"ping"
    assert closed == [10, 10]


@pytest.mark.parametrize("server_class", CONCURRENT, ids=class_name)
@bounded
async def test_replies_are_sent_while_closing(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    """What closing waits for is worth waiting for, datagrams included."""
    gate = Gate()
    server = server_class(bind_address(server_class, tmp_path), gate)
    with pose(server, b"ping", tmp_path) as client:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            nursery.start_soon(server.server_close)
            await wait_all_tasks_blocked()
            gate.opened.set()
        assert reply_now(client) == b"ping"
    assert server.fileno() == -1
    assert server.statistics().completed == 1


@tcp_servers
@bounded
async def test_server_close_closes_even_while_a_loop_alone_waits_for_its_requests(
    autojump_clock: Any, server_class: Any
) -> None:
    gate = Gate()
    server = server_class(LOOPBACK, gate)
    with pose(server, b"ping") as client:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            await server.shutdown()
            assert server.fileno() != -1
            nursery.start_soon(server.server_close)
            await wait_all_tasks_blocked()
            assert server.fileno() == -1
            gate.opened.set()
        assert await answer(client) == b"ping"
    assert server.fileno() == -1


@all_servers
@entered_or_not
@bounded
async def test_server_close_by_a_handler(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    async def last(request: Any, client_address: Any, server: Any) -> None:
        for _ in range(3):
            await server.server_close()
        log.append("returned")
        await trio.sleep(10)
        log.append("awake")

    log: list[str] = []
    server = server_class(bind_address(server_class, tmp_path), last)
    with pose(server, b"ping", tmp_path):
        async with entering(server, entered):
            await server.serve_forever()
    assert log == ["returned", "awake"]
    assert server.fileno() == -1
    assert server.statistics().completed == 1


@bounded
async def test_server_close_by_a_task_that_a_request_has_started(
    autojump_clock: Any,
) -> None:
    async def close(server: Any, how: str) -> None:
        await server.server_close()
        log.append(how)

    async def last(request: Any, client_address: Any, server: Any) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(close, server, "in the request's nursery")
        outside.start_soon(close, server, "in another nursery")
        await trio.sleep(10)
        log.append("request")

    log: list[str] = []
    server = NurseryTCPServer(LOOPBACK, last)
    with pose(server, b"ping"):
        async with trio.open_nursery() as outside, server:
            await server.serve_forever()
    assert log == ["in the request's nursery", "in another nursery", "request"]
    assert server.fileno() == -1


@bounded
async def test_server_close_of_another_server_by_a_request_waits(
    autojump_clock: Any,
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(10)

    async def close_other(request: Any, client_address: Any, server: Any) -> None:
        await other.server_close()
        await request.sendall(b"%d" % trio.current_time())

    other = NurseryTCPServer(LOOPBACK, slow)
    server = NurseryTCPServer(LOOPBACK, close_other)
    with pose(other, b""):
        async with serving(other), serving(server):
            await wait_all_tasks_blocked()
            assert await ask(server, b"") == b"10"


@some_servers
@entered_or_not
@pytest.mark.parametrize("hook", [*LOOP_HOOKS, *REQUEST_HOOKS])
@bounded
async def test_server_close_by_a_hook(
    autojump_clock: Any, server_class: Any, hook: str, entered: bool, tmp_path: Path
) -> None:
    async def fail(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError

    log: list[str] = []
    server_class = calling(server_class, hook, "server_close", log)
    handler = fail if hook == "handle_error" else echo_all
    server = server_class(bind_address(server_class, tmp_path), handler)
    with pose(server, b"ping", tmp_path), pose(server, b"late", tmp_path):
        async with entering(server, entered):
            await server.serve_forever()
    assert log.count("called") == log.count("returned") > 0
    assert server.fileno() == -1
    assert server.statistics().cancelled == 0
    assert_sums_up(server)


@entered_or_not
@bounded
async def test_a_cancelled_server_close_closes_all_the_same(
    autojump_clock: Any, entered: bool
) -> None:
    gate = Gate()
    server = NurseryTCPServer(LOOPBACK, gate)
    with pose(server, b"ping") as client:
        async with entering(server, entered), trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            await wait_all_tasks_blocked()
            with trio.CancelScope() as scope:
                scope.cancel()
                await server.server_close()
            assert scope.cancelled_caught
            await wait_all_tasks_blocked()
            assert server.fileno() == -1
            assert server.statistics().active == 1
            gate.opened.set()
        assert await answer(client) == b"ping"


@bounded
async def test_a_cancelled_server_close_of_an_idle_server(autojump_clock: Any) -> None:
    server = NurseryTCPServer(LOOPBACK, echo_all)
    with trio.CancelScope() as scope:
        scope.cancel()
        await server.server_close()
    assert server.fileno() == -1


@entered_or_not
@bounded
async def test_server_close_before_the_first_loop(
    autojump_clock: Any, entered: bool
) -> None:
    """It implies shutdown(), which is remembered: the loop says started() and returns."""
    server = TCPServer(LOOPBACK, echo_all)
    if entered:
        async with server, trio.open_nursery() as nursery:
            await server.server_close()
            assert await nursery.start(server.serve_forever) == server.server_address
    else:
        await server.server_close()
        with pytest.raises(trio.ClosedResourceError):
            await server.serve_forever()


@bounded
async def test_no_loop_after_server_close(autojump_clock: Any) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        await server.server_close()
        for loop in (server.serve_forever, server.handle_request):
            with pytest.raises(RuntimeError, match="clos"):
                await loop()


@pytest.mark.parametrize("ending", ["leave", "server_close"])
@bounded
async def test_block_on_close_false_cancels_the_requests(
    autojump_clock: Any, ending: str
) -> None:
    for server_class in (TCPServer, NurseryTCPServer):
        server = server_class(LOOPBACK, stuck)
        server.block_on_close = False
        with connect(server.server_address) as client:
            async with server, trio.open_nursery() as nursery:
                await nursery.start(server.serve_forever)
                await wait_all_tasks_blocked()
                assert server.statistics().active == 1
                await (server.shutdown() if ending == "leave" else server.server_close())
            assert await receive_to_end(client) == b""
        assert server.statistics().cancelled == 1
    assert trio.current_time() == 0


@pytest.mark.parametrize("graceful_timeout", [0, 7, math.inf])
@bounded
async def test_graceful_timeout_bounds_the_waiting(
    autojump_clock: Any, graceful_timeout: float
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(int(await request.recv(10)))
        await request.sendall(b"done")

    server = NurseryTCPServer(LOOPBACK, slow)
    with pose(server, b"5") as quick, pose(server, b"100") as long:
        async with serving(server):
            await wait_all_tasks_blocked()
            server.graceful_timeout = graceful_timeout  # It is read when closing begins.
        assert trio.current_time() == min(graceful_timeout, 100)
        assert reply_now(quick) == (b"done" if graceful_timeout >= 5 else b"")
        assert reply_now(long) == (b"done" if graceful_timeout >= 100 else b"")


@bounded
async def test_neither_closing_option_touches_the_body(autojump_clock: Any) -> None:
    for option, value in (("block_on_close", False), ("graceful_timeout", 1)):
        server = NurseryTCPServer(LOOPBACK, stuck)
        setattr(server, option, value)
        with connect(server.server_address):
            async with server:
                await server.handle_request()
                await server.server_close()
                await trio.sleep(10)
                assert server.statistics().cancelled == 1


@bounded
async def test_closing_waits_for_a_stuck_hook_as_long_as_for_any_cleanup(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        cleanup_timeout = 3

        async def verify_request(self, request: Any, client_address: Any) -> bool:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            return True

    for leave_first in (False, True):
        server = Server(LOOPBACK, echo_all)
        began = trio.current_time()
        with connect(server.server_address) as client:
            async with trio.open_nursery() as nursery:
                async with server:
                    await nursery.start(server.serve_forever)
                    await wait_all_tasks_blocked()
                    if not leave_first:
                        await server.server_close()
                        assert trio.current_time() == began + 3
                        assert server.fileno() == -1
                assert trio.current_time() == began + 3
                assert server.fileno() == -1
                if leave_first:
                    with pytest.raises(RuntimeError):
                        async with server:
                            pytest.fail("the old loop is still there")
            assert trio.current_time() == began + 10
            # It was accepted too late to be handled, but it was not forgotten.
            assert await receive_to_end(client) == b""
        assert_sums_up(server)


@bounded
async def test_leaving_while_get_request_is_stuck(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        cleanup_timeout = 3

        async def get_request(self) -> tuple[Any, Any]:
            with trio.CancelScope(shield=True):
                await trio.sleep(10)
            return await super().get_request()

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address):
        async with serving(server):
            await wait_all_tasks_blocked()
            await server.server_close()
            assert trio.current_time() == 3
    assert trio.current_time() == 10
    assert server.statistics().accept_errors == 0


# -- handle_request ------------------------------------------------------------------------


@all_servers
@entered_or_not
@bounded
async def test_handle_request_handles_one(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    with pose(server, b"one", tmp_path) as one, pose(server, b"two", tmp_path) as two:
        async with entering(server, entered):
            await server.handle_request()
            assert await answer(one) == b"one"
            assert server.statistics().accepted == 1
            await server.handle_request()
            assert await answer(two) == b"two"
    await server.server_close()
    assert server.statistics().completed == 2


@all_servers
@bounded
async def test_handle_request_waits_for_a_request(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(server.handle_request)
        await trio.sleep(1000)
        assert await ask(server, b"ping", tmp_path) == b"ping"


def counting_timeouts(server_class: Any) -> Any:
    class Server(server_class):
        timeouts = 0

        async def handle_timeout(self) -> None:
            self.timeouts += 1

    return Server


@all_servers
@entered_or_not
@bounded
async def test_handle_request_times_out(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    server_class = counting_timeouts(server_class)
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with entering(server, entered):
        server.timeout = 5
        await server.handle_request()
        assert trio.current_time() == 5
        server.timeout = 2
        await server.handle_request()
        assert trio.current_time() == 7
        assert server.timeouts == 2
        with pose(server, b"ping", tmp_path) as client:
            await server.handle_request()
            assert await answer(client) == b"ping"
        assert server.timeouts == 2
    await server.server_close()


@all_servers
@entered_or_not
@bounded
async def test_handle_request_without_patience_takes_what_is_there(
    autojump_clock: Any, server_class: Any, entered: bool, tmp_path: Path
) -> None:
    # As select(0) does: it reports what is ready, and does not wait.
    server_class = counting_timeouts(server_class)
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    server.timeout = 0
    async with entering(server, entered):
        await server.handle_request()
        assert server.timeouts == 1
        with pose(server, b"ping", tmp_path) as client:
            await server.handle_request()
            assert await answer(client) == b"ping"
        assert server.timeouts == 1
    await server.server_close()
    assert trio.current_time() == 0


@tcp_servers
@bounded
async def test_the_timeout_is_for_the_arrival_only(
    autojump_clock: Any, server_class: Any
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(100)
        await echo_all(request, client_address, server)

    server = server_class(LOOPBACK, slow)
    server.timeout = 5
    with pose(server, b"ping") as client:
        await server.handle_request()
        assert trio.current_time() == 100
        assert reply_now(client) == b"ping"
    await server.server_close()


@bounded
async def test_handle_request_of_a_sequential_server_waits_for_the_handler(
    autojump_clock: Any,
) -> None:
    async def slow(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(100)

    server = TCPServer(LOOPBACK, slow)
    with pose(server, b""):
        async with server:
            await server.handle_request()
            assert trio.current_time() == 100
            assert server.statistics().completed == 1


@pytest.mark.parametrize("max_tasks", [None, 1, 2])
@bounded
async def test_handle_request_of_a_concurrent_server_returns_when_handling_has_begun(
    autojump_clock: Any, max_tasks: int | None
) -> None:
    gate = Gate()
    server = NurseryTCPServer(LOOPBACK, gate)
    server.max_tasks = max_tasks
    with pose(server, b"ping") as client:
        async with server:
            await server.handle_request()
            await wait_all_tasks_blocked()
            assert server.statistics().active == gate.waiting == 1
            assert trio.current_time() == 0
            gate.opened.set()
        assert await answer(client) == b"ping"


@bounded
async def test_handle_request_waits_for_room(autojump_clock: Any) -> None:
    server_class = counting_timeouts(NurseryTCPServer)
    gate = Gate()
    server = server_class(LOOPBACK, gate)
    server.max_tasks = 1
    with pose(server, b"one") as one, pose(server, b"two") as two:
        async with server, trio.open_nursery() as nursery:
            await server.handle_request()
            server.timeout = 5
            await server.handle_request()
            assert server.timeouts == 1
            server.timeout = None
            nursery.start_soon(server.handle_request)
            await trio.sleep(10)
            assert server.statistics().accepted == 1
            gate.opened.set()
            assert await answer(one) == b"one"
        assert await answer(two) == b"two"


@tcp_servers
@bounded
async def test_handle_request_sees_through_spurious_readiness(
    autojump_clock: Any, server_class: Any
) -> None:
    class Server(counting_timeouts(server_class)):
        spurious = 3

        async def get_request(self) -> tuple[Any, Any]:
            if self.spurious:
                self.spurious -= 1
                raise BlockingIOError(errno.EAGAIN, "somebody else was faster")
            return await super().get_request()

    server = Server(LOOPBACK, echo_all)
    server.timeout = 60
    with pose(server, b"ping") as client:
        async with server:
            await server.handle_request()
            assert await answer(client) == b"ping"
    seen = server.statistics()
    assert (seen.accepted, seen.accept_errors, server.timeouts) == (1, 0, 0)
    assert trio.current_time() == 0


@bounded
async def test_handle_request_without_patience_nor_descriptors(autojump_clock: Any) -> None:
    server = counting_timeouts(TCPServer)(LOOPBACK, echo_all)
    server.timeout = 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with pose(server, b"ping") as client:
        async with server:
            with ExitStack() as stack:
                while True:  # Until every number below the limit is taken.
                    number = os.open(os.devnull, os.O_RDONLY)
                    stack.callback(os.close, number)
                    if number > max(client.fileno(), server.fileno()):
                        break
                stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
                resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
                await server.handle_request()
                assert server.timeouts == 1
                assert server.statistics().accept_errors == 1
            await trio.sleep(1)
            await server.handle_request()
            assert await answer(client) == b"ping"


@bounded
async def test_a_client_that_gives_up_does_not_prolong_the_timeout(
    autojump_clock: Any,
) -> None:
    class Server(counting_timeouts(TCPServer)):
        async def get_request(self) -> tuple[Any, Any]:
            request, _ = await super().get_request()
            request.close_now()
            raise BlockingIOError(errno.EAGAIN, "it has gone again")

    server = Server(LOOPBACK, echo_all)
    server.timeout = 5
    async with server, trio.open_nursery() as nursery:
        nursery.start_soon(server.handle_request)
        await trio.sleep(4)
        with connect(server.server_address):
            await trio.sleep(0.5)
    assert trio.current_time() == 5
    assert server.timeouts == 1


@all_servers
@bounded
async def test_handle_request_returns_after_a_request_that_was_denied(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Server(server_class):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            return False

    server = Server(bind_address(Server, tmp_path), echo_all)
    with pose(server, b"ping", tmp_path):
        async with server:
            await server.handle_request()
    assert server.statistics().rejected == 1
    assert_sums_up(server)


@entered_or_not
@bounded
async def test_shutdown_ends_handle_request(autojump_clock: Any, entered: bool) -> None:
    server = TCPServer(LOOPBACK, echo_all)
    async with entering(server, entered), trio.open_nursery() as nursery:
        nursery.start_soon(server.handle_request)
        await wait_all_tasks_blocked()
        await server.shutdown()
    await server.server_close()


class Steps(trio.abc.Instrument):
    """Count what happens from one step of any task to the next."""

    def __init__(self) -> None:
        self.actions: list[int] = [0]
        self.actions_in_this_step = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.actions.append(self.actions_in_this_step)
        self.actions_in_this_step = 0

    def __enter__(self) -> Steps:
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        trio.lowlevel.remove_instrument(self)


# -- limits --------------------------------------------------------------------------------


@pytest.mark.parametrize("server_class", SEQUENTIAL, ids=class_name)
@bounded
async def test_a_sequential_server_takes_one_request_at_a_time(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Handler(BaseRequestHandler):
        running = 0
        order: list[bytes] = []  # noqa: RUF012 (collected by all instances)

        async def handle(self) -> None:
            data = self.request[0] if isinstance(self.request, tuple) else None
            Handler.running += 1
            assert Handler.running == 1
            assert self.server.statistics().active == 1
            await trio.sleep(10)
            Handler.order.append(data or await self.request.recv(10))
            Handler.running -= 1

        async def finish(self) -> None:
            await trio.sleep(1)

    server = server_class(bind_address(server_class, tmp_path), Handler)
    clients = [pose(server, b"%d" % number, tmp_path) for number in range(4)]
    async with serving(server):
        await trio.sleep(100)
    for client in clients:
        client.close()
    assert Handler.order == [b"0", b"1", b"2", b"3"]
    assert server.statistics().completed == 4
    assert_sums_up(server)


@pytest.mark.parametrize(
    "server_class", [NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@bounded
async def test_a_flood_does_not_starve_the_program(
    autojump_clock: Any, server_class: Any
) -> None:
    flood = 200

    class Server(server_class):
        request_queue_size = flood

        async def get_request(self) -> tuple[Any, Any]:
            request = await super().get_request()
            steps.actions_in_this_step += 1
            return request

    server = Server(LOOPBACK, echo_all)
    clients = [pose(server, b"x") for _ in range(flood)]
    with Steps() as steps:
        async with serving(server):
            for client in clients:
                with client:
                    assert await answer(client) == b"x"
    assert server.statistics().completed == flood
    assert 1 < max(steps.actions) <= 64


@bounded
async def test_denied_requests_do_not_starve_the_program_either(
    autojump_clock: Any,
) -> None:
    class Server(TCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            steps.actions_in_this_step += 1
            return False

    server = Server(LOOPBACK, echo_all)
    clients = [connect(server.server_address) for _ in range(120)]
    with Steps() as steps:
        async with serving(server):
            for client in clients:
                with client:
                    assert await receive_to_end(client) == b""
    assert server.statistics().rejected == 120
    assert 1 < max(steps.actions) <= 64


@bounded
async def test_request_timeout_changed_while_serving(autojump_clock: Any) -> None:
    server = NurseryTCPServer(LOOPBACK, stuck)
    async with serving(server):
        for timeout in (3, 5):
            server.request_timeout = timeout
            began = trio.current_time()
            with connect(server.server_address) as client:
                assert await receive_to_end(client) == b""
            assert trio.current_time() == began + timeout
    seen = server.statistics()
    assert (seen.failed, seen.peer_errors) == (2, 2)


@bounded
async def test_request_timeout_comes_out_of_finish_request(autojump_clock: Any) -> None:
    raised = []

    class Server(NurseryTCPServer):
        request_timeout = 3

        async def finish_request(self, request: Any, client_address: Any) -> None:
            try:
                await super().finish_request(request, client_address)
            except RequestTimeout as error:
                raised.append(str(error))
                await request.sendall(b"too slow")

    server = Server(LOOPBACK, stuck)
    async with serving(server):
        assert await ask(server, b"") == b"too slow"
    assert raised
    assert "3 s" in raised[0]
    assert server.statistics().completed == 1


# -- counting ------------------------------------------------------------------------------


OUTCOMES = ("completed", "failed", "rejected", "cancelled")


class Auditor:
    """Look at a server's statistics wherever it lets us."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.looks = 0

    def look(self, server: Any, where: str, at_least: int = 0) -> None:
        self.looks += 1
        seen = server.statistics()
        parts = {name: getattr(seen, name) for name in (*OUTCOMES, "active")}
        if seen.accepted != sum(parts.values()):
            self.findings.append(f"{where}: {seen.accepted} accepted, {parts}")
        if min(parts.values()) < 0 or seen.peer_errors > seen.failed:
            self.findings.append(f"{where}: {seen}")
        if seen.active < at_least:
            self.findings.append(f"{where}: {seen.active} active")


def audited(server_class: Any, auditor: Auditor) -> Any:
    """Look in every hook; one that has a request in hand counts it as active."""

    def audit(hook: str) -> Callable[..., Awaitable[Any]]:
        async def override(self: Any, *args: Any) -> Any:
            auditor.look(self, f"before {hook}", len(args) > 0)
            try:
                return await getattr(super(Audited, self), hook)(*args)
            finally:
                # Without a checkpoint in between the request is still there.
                auditor.look(self, f"after {hook}", len(args) > 0)

        return override

    hooks = (
        "get_request",
        "verify_request",
        "process_request",
        "finish_request",
        "shutdown_request",
        "close_request",
        "handle_error",
        "service_actions",
    )
    Audited = type("Audited", (server_class,), {name: audit(name) for name in hooks})  # noqa: N806
    return Audited


@all_servers
@bounded
async def test_every_request_is_in_exactly_one_place_at_every_moment(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    auditor = Auditor()

    class Server(server_class):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            if self.wish(request) == b"error":
                raise LookupError
            return self.wish(request) != b"reject"

        def wish(self, request: Any) -> bytes:
            if isinstance(request, tuple):
                return request[0]
            return request.socket.recv(10, socket.MSG_PEEK)

        async def handle_error(self, request: Any, client_address: Any) -> None:
            raise LookupError  # On top of everything else.

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        wish = server.wish(request)
        auditor.look(server, "handler", 1)
        await trio.sleep(1)
        auditor.look(server, "handler, later", 1)
        if wish == b"fail":
            raise LookupError
        if wish == b"reset":
            raise ConnectionResetError
        if wish == b"stay":
            await trio.sleep_forever()
        if wish == b"group":
            raise ExceptionGroup("several", [LookupError()])

    server_class = audited(Server, auditor)
    server = server_class(bind_address(server_class, tmp_path), handler)
    wishes = (b"work", b"fail", b"reset", b"reject", b"error", b"group", b"work", b"stay")
    clients = [pose(server, wish, tmp_path) for wish in wishes]
    with trio.move_on_after(100):
        async with server:
            await server.serve_forever()
    for client in clients:
        client.close()
    assert auditor.findings == []
    assert auditor.looks > 50
    seen = server.statistics()
    assert {name: getattr(seen, name) for name in OUTCOMES} == {
        "completed": 2,
        "failed": 4,
        "rejected": 1,
        "cancelled": 1,
    }
    assert seen.peer_errors == 1
    assert (seen.accepted, seen.active) == (8, 0)


@bounded
async def test_a_request_that_blames_the_peer_twice_counts_once(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        cleanup_timeout = 1

        async def shutdown_request(self, request: Any) -> None:
            await trio.sleep_forever()

    async def reset(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError

    server = Server(LOOPBACK, reset)
    with pose(server, b""):
        async with server:
            await server.handle_request()
    seen = server.statistics()
    assert (seen.failed, seen.peer_errors) == (1, 1)


def test_statistics_are_frozen() -> None:
    server = TCPServer(LOOPBACK, echo_all)
    with server.socket:
        seen = server.statistics()
        with pytest.raises(AttributeError):
            seen.accepted = 1  # type: ignore[misc]
        assert seen == server.statistics()


# -- a server of something else ------------------------------------------------------------


class PipeServer(BaseServer):
    """A server that is no socket server: its requests are the bytes of a pipe."""

    def __init__(self, handler: Any) -> None:
        super().__init__("the pipe", handler)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.server_bind()
        self.server_activate()

    def fileno(self) -> int:
        return self.reader

    async def get_request(self) -> tuple[Any, Any]:
        return os.read(self.reader, 1), "somebody"

    async def server_close(self) -> None:
        await super().server_close()
        if self.reader != -1:
            os.close(self.reader)
            os.close(self.writer)
            self.reader = -1


@pytest.mark.parametrize("concurrent", [False, True])
@bounded
async def test_a_server_needs_no_socket(autojump_clock: Any, concurrent: bool) -> None:
    handled = []

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        handled.append((request, client_address))
        if request == b"c":
            raise ConnectionResetError
        if len(handled) == 3:
            await server.shutdown()

    class Concurrent(NurseryMixIn, PipeServer):
        """One with a task per byte."""

    server = (Concurrent if concurrent else PipeServer)(handler)
    async with server:
        os.write(server.writer, b"abc")
        async with trio.open_nursery() as nursery:
            assert await nursery.start(server.serve_forever) == "the pipe"
            await wait_all_tasks_blocked()
            await server.shutdown()
    assert sorted(handled) == [(b"a", "somebody"), (b"b", "somebody"), (b"c", "somebody")]
    assert server.reader == -1
    assert server.statistics().failed == 1
    assert_sums_up(server)


@bounded
async def test_closing_that_hangs_is_cut_where_there_is_nothing_to_abort(
    autojump_clock: Any,
) -> None:
    class Server(PipeServer):
        async def close_request(self, request: Any) -> None:
            await trio.sleep_forever()

    server = Server(echo_all)
    server.RequestHandlerClass = BaseRequestHandler
    async with server:
        os.write(server.writer, b"a")
        await server.handle_request()
        assert trio.current_time() == server.cleanup_timeout
    assert server.statistics().failed == 1


@bounded
async def test_what_a_server_must_bring(autojump_clock: Any) -> None:
    class Nothing(BaseServer):
        """Neither fileno() nor get_request()."""

    server = Nothing("nowhere", echo_all)
    with pytest.raises(NotImplementedError, match=r"Nothing .*fileno"):
        server.fileno()
    with pytest.raises(NotImplementedError, match=r"Nothing .*get_request"):
        await server.get_request()
    with pytest.raises(NotImplementedError, match="fileno"):
        async with server:
            await server.serve_forever()
    await server.server_close()


# -- evil interleavings --------------------------------------------------------------------


async def checkpoints(count: int) -> None:
    for _ in range(count):
        await trio.lowlevel.checkpoint()


def run_virtually(main: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run on a clock of its own; what waits for ever fails at once."""

    async def limited() -> None:
        with trio.fail_after(10**6):
            await main(*args)

    trio.run(limited, clock=MockClock(autojump_threshold=0))


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
                client.settimeout(1)
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
