"""Servers are entered, serve, and serve again in every order that makes sense, no other."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import answer, ask, bind_address, bounded, connect, echo_all, pose, reply_now
from lifecycles import (
    LOOPBACK,
    SERVERS,
    Gate,
    all_servers,
    entered_or_not,
    entering,
    run_virtually,
    serving,
)
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_socketserver import NurseryTCPServer, TCPServer


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
