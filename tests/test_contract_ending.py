"""The contract, over every dispatcher alike: limits, stopping, closing and cancelling."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from blocking_servers import receive_exactly
from contract import (
    DATAGRAM,
    STREAM,
    AskedFor,
    Dispatcher,
    Gate,
    assert_ended,
    each_of,
    errors,
    free_address,
    journal,
    serving,
)
from helpers import (
    answer,
    ask,
    bounded,
    connect,
    is_refused,
    pose,
    receive_to_end,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

each_dispatcher = each_of()
each_kind = each_of(STREAM | DATAGRAM)
each_stream_kind = each_of(STREAM)


async def parked(server: Any) -> socket.socket:
    """Return a client whose handler has been reached, and waits for it."""
    client = connect(server.server_address)
    client.sendall(b"park\n")
    assert await receive_exactly(client, 7) == b"parked\n"
    return client


async def release(client: socket.socket) -> bytes:
    """Let the handler of a parked client end, and return what it has sent."""
    with client:
        client.sendall(b"released")
        client.shutdown(socket.SHUT_WR)
        return await receive_to_end(client)


# -- limits --------------------------------------------------------------------------------


@each_kind
@bounded
async def test_the_limit_holds_back_what_comes_and_serves_it_later(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path, **{dispatcher.limit: 2})
    at_once = 2 * dispatcher.processes
    async with serving(server):
        with Gate(tmp_path) as gate, contextlib.ExitStack() as clients:
            asking = [
                clients.enter_context(pose(server, f"wait {gate.path}".encode()))
                for _ in range(at_once + 3)
            ]
            for _ in range(4):
                await gate.fills_up_to(at_once)
                gate.let_go()
            for _ in range(at_once - 1):
                await gate.fills_up_to(1)
                gate.let_go()
            assert [await answer(client) for client in asking] == [b"waited\n"] * len(
                asking
            )
    assert_ended(server, completed=at_once + 3)


@each_stream_kind
@bounded
async def test_shutdown_at_the_limit(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path, **{dispatcher.limit: 1})
    async with serving(server):
        inside = [await parked(server) for _ in range(dispatcher.processes)]
        outside = connect(server.server_address)
        await server.shutdown()
        for client in inside:
            assert await release(client) == b"released"
    with outside:
        assert await receive_to_end(outside) == b""
    assert_ended(server, completed=dispatcher.processes)


# -- shutdown() ----------------------------------------------------------------------------


@each_stream_kind
@bounded
async def test_shutdown_stops_accepting_until_it_serves_again(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        inside = await parked(server)
        await server.shutdown()
        late = pose(server, b"echo\nlate")
        assert await release(inside) == b"released"
        assert journal(server).count("setup") == 1
        await nursery.start(server.serve_forever)
        with late:
            assert await answer(late) == b"late"
        await server.shutdown()
        unserved = pose(server, b"echo\nnever")
    with unserved:
        assert await answer(unserved) == b""
    assert_ended(server, completed=2)


@each_dispatcher
@bounded
async def test_shutdown_may_be_called_by_many_and_often(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        assert await ask(server, b"echo\nx") == b"x"
        for _ in range(3):
            nursery.start_soon(server.shutdown)
        await server.shutdown()
        await server.shutdown()
    await server.shutdown()
    assert_ended(server, completed=1)


@each_dispatcher
@bounded
async def test_shutdown_before_serving_is_remembered_once(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with server:
        await server.shutdown()
        async with trio.open_nursery() as nursery:
            assert await nursery.start(server.serve_forever) == server.server_address
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            assert await ask(server, b"echo\nserved") == b"served"
            await server.shutdown()
    assert_ended(server, completed=1)


@pytest.mark.parametrize("method", ["shutdown", "server_close"])
@each_kind
@bounded
async def test_a_handler_may_stop_the_server(
    dispatcher: Dispatcher, kind: str, method: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    with pose(server, f"stop {method}".encode()) as client:
        async with server:
            await server.serve_forever()
            if method == "server_close":
                await server.draining.wait()
            assert server.draining.is_set() == (method == "server_close")
        assert await answer(client) == b"stopped\n"
    assert_ended(server, completed=1)


@each_dispatcher
@bounded
async def test_one_loop_at_a_time(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        with pytest.raises(RuntimeError):
            await server.serve_forever()
        with pytest.raises(RuntimeError):
            await server.handle_request()
        with pytest.raises(RuntimeError):
            async with server:
                pytest.fail("entered twice")
        assert await ask(server, b"echo\nunharmed") == b"unharmed"
    assert_ended(server, completed=1)


# -- closing -------------------------------------------------------------------------------


@each_stream_kind
@bounded
async def test_leaving_waits_for_requests(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    left = trio.Event()

    async def release_while_leaving(client: socket.socket) -> None:
        await server.draining.wait()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not left.is_set()
        assert await release(client) == b"released"

    async with trio.open_nursery() as outside:
        async with serving(server):
            client = await parked(server)
            outside.start_soon(release_while_leaving, client)
        left.set()
    assert_ended(server, completed=1)


@pytest.mark.parametrize("how", ["by leaving", "by server_close()"])
@each_stream_kind
@bounded
async def test_who_has_connected_may_be_served_while_closing(
    dispatcher: Dispatcher, kind: str, how: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path, **{dispatcher.limit: 1}, drain_backlog=True)

    async def release_while_closing(*clients: socket.socket) -> None:
        await server.draining.wait()
        for client in clients:
            assert await release(client) == b"released"

    with contextlib.ExitStack() as clients:
        async with trio.open_nursery() as outside, serving(server):
            inside = [await parked(server) for _ in range(dispatcher.processes)]
            queued = [
                clients.enter_context(pose(server, b"echo\nqueued")) for _ in range(3)
            ]
            outside.start_soon(release_while_closing, *inside)
            if how == "by server_close()":
                await server.shutdown()
                await server.server_close()
        assert [await answer(client) for client in queued] == [b"queued"] * 3
    assert_ended(server, completed=dispatcher.processes + 3)


@each_dispatcher
@bounded
async def test_server_close_is_leaving(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        client = await parked(server)
        nursery.start_soon(server.server_close)
        await server.draining.wait()
        assert await release(client) == b"released"
        await server.server_close()
        assert_ended(server, completed=1)
    await server.server_close()


@pytest.mark.parametrize(
    "how", [{"block_on_close": False}, {"graceful_timeout": 0.05}], ids=str
)
@each_stream_kind
@bounded
async def test_closing_may_cut_requests(
    dispatcher: Dispatcher, kind: str, how: dict[str, Any], tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path, **how)
    async with serving(server):
        client = await parked(server)
    with client:
        assert await receive_to_end(client) == b""
    assert journal(server) == ["setup", "handle", "finish"]
    assert_ended(server, cancelled=1)


@each_stream_kind
@bounded
async def test_after_closing_there_is_no_listener(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    address = server.server_address
    async with serving(server):
        assert server.fileno() >= 0
        assert await ask(server, b"echo\nx") == b"x"
    assert server.server_address == address
    assert server.fileno() == -1
    assert is_refused(address)
    if kind == "unix":
        assert not os.path.lexists(address)


@each_kind
@bounded
async def test_a_server_may_be_entered_again_with_a_new_socket(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        assert await ask(server, b"echo\nfirst") == b"first"
    server.socket = socket.socket(server.address_family, server.socket_type)
    server.server_address = free_address(kind, tmp_path)
    server.server_bind()
    server.server_activate()
    async with serving(server):
        assert await ask(server, b"echo\nagain") == b"again"
    assert_ended(server, completed=2)


@each_dispatcher
@bounded
async def test_without_a_block_the_loop_waits_for_requests_and_leaves_the_listener_open(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        client = await parked(server)
        await server.shutdown()
        assert await release(client) == b"released"
    assert server.statistics().completed == 1
    assert server.fileno() >= 0
    await server.server_close()
    assert_ended(server, completed=1)


# -- cancelling ----------------------------------------------------------------------------


@each_stream_kind
@bounded
async def test_cancelling_from_outside_ends_everything(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    with trio.CancelScope() as scope:
        async with serving(server):
            clients = [await parked(server) for _ in range(3)]
            scope.cancel()
    assert scope.cancelled_caught
    for client in clients:
        with client:
            assert await receive_to_end(client) == b""
    assert journal(server).count("finish") == 3
    assert errors(server) == []
    assert_ended(server, cancelled=3)


@each_dispatcher
@bounded
async def test_cancelling_the_loop_leaves_requests_alone(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    soft = trio.CancelScope()

    async def serve(*, task_status: trio.TaskStatus[Any]) -> None:
        with soft:
            await server.serve_forever(task_status=task_status)

    async with server, trio.open_nursery() as nursery:
        await nursery.start(serve)
        client = await parked(server)
        soft.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert await release(client) == b"released"
    assert_ended(server, completed=1)


@each_dispatcher
@bounded
async def test_an_error_in_the_block_cancels_requests_and_leaves_unchanged(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    error = AskedFor("by the block")
    clients = []

    async def block(nursery: trio.Nursery) -> None:
        async with server:
            await nursery.start(server.serve_forever)
            clients.append(await parked(server))
            raise error

    async with trio.open_nursery() as outside:
        with pytest.raises(AskedFor) as caught:
            await block(outside)
    assert caught.value is error
    [client] = clients
    with client:
        assert await receive_to_end(client) == b""
    assert journal(server) == ["setup", "handle", "finish"]
    assert_ended(server, cancelled=1)


@each_dispatcher
@bounded
async def test_the_address_is_free_while_requests_go_on(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with trio.open_nursery() as outside:

        async def succeed(client: socket.socket) -> None:
            await server.draining.wait()
            successor = None
            while successor is None:
                await trio.testing.wait_all_tasks_blocked(0.001)
                with contextlib.suppress(OSError):
                    successor = type(server)(server.server_address, dispatcher.stream)
            dispatcher.tell(successor, tmp_path)
            async with serving(successor):
                assert await ask(successor, b"echo\nhello") == b"hello"
            assert await release(client) == b"released"

        async with serving(server):
            outside.start_soon(succeed, await parked(server))
    assert_ended(server, completed=1)


@each_dispatcher
@bounded
async def test_a_client_that_nobody_has_accepted_is_let_go(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    client = pose(server, b"echo\nhello")
    async with server:
        pass
    with client:
        assert await receive_to_end(client) == b""
    assert_ended(server)


@each_of(["tcp", "hooked tcp"])
@pytest.mark.parametrize("how", ["cancel", "shutdown", "server_close"])
@bounded
async def test_any_moment_may_be_the_last(
    dispatcher: Dispatcher, kind: str, how: str, tmp_path: Path
) -> None:
    for moment in range(dispatcher.moments):
        server = dispatcher.make(kind, tmp_path)
        clients = [pose(server, b"echo\nhello") for _ in range(2)]
        with trio.CancelScope() as scope:
            async with server, trio.open_nursery() as nursery:
                await nursery.start(server.serve_forever)
                for _ in range(moment):
                    await trio.lowlevel.checkpoint()
                if how == "cancel":
                    scope.cancel()
                else:
                    await getattr(server, how)()
        answers = []
        for client in clients:
            with client:
                answers.append(await receive_to_end(client))
        seen = server.statistics()
        assert seen.completed == seen.accepted - seen.cancelled
        assert answers.count(b"hello") >= seen.completed
        assert set(answers) <= {b"hello", b""}
        assert_ended(server, completed=seen.completed, cancelled=seen.cancelled)
        assert seen.cancelled == 0 or how == "cancel"
    assert errors(server) == []
