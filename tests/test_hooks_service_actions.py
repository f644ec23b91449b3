"""service_actions() comes when it is due, and an idle server does not wake up."""

from __future__ import annotations

import errno
import functools
import itertools
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    answer,
    ask,
    bind_address,
    bounded,
    class_name,
    connect,
    echo_all,
    pose,
    receive_to_end,
)
from hooks import LOOPBACK, all_servers
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import NurseryMixIn, NurseryTCPServer, TCPServer, UDPServer


class Steps(trio.abc.Instrument):
    """Count the steps of all tasks."""

    def __init__(self) -> None:
        self.taken: list[str] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.taken.append(task.name)


@all_servers
@bounded
async def test_an_idle_server_does_not_wake_up(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        await wait_all_tasks_blocked()
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(24 * 3600)
        trio.lowlevel.remove_instrument(steps)
        assert not [name for name in steps.taken if "serve_forever" in name]
        assert len(steps.taken) == 1, "only this task has slept and woken up"
        await server.shutdown()


def ticking(server_class: Any) -> Any:
    class Ticking(server_class):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.ticks: list[float] = []

        async def service_actions(self) -> None:
            self.ticks.append(trio.current_time())

    return Ticking


@all_servers
@bounded
async def test_service_actions_every_poll_interval(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    server = ticking(server_class)(bind_address(server_class, tmp_path), echo_all)
    async with server:
        with trio.move_on_after(2.25):
            await server.serve_forever()
        assert server.ticks == [0.5, 1, 1.5, 2]
        server.ticks.clear()
        with trio.move_on_after(15):
            await server.serve_forever(poll_interval=6)
        assert server.ticks == [8.25, 14.25]


@all_servers
@pytest.mark.parametrize("never", [math.inf, None])
@bounded
async def test_service_actions_after_each_request(
    autojump_clock: Any, server_class: Any, never: float | None, tmp_path: Path
) -> None:
    server = ticking(server_class)(bind_address(server_class, tmp_path), echo_all)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(functools.partial(server.serve_forever, poll_interval=never))
        await trio.sleep(3600)
        assert not server.ticks
        for number in range(3):
            assert await ask(server, b"ping", tmp_path) == b"ping"
            await wait_all_tasks_blocked()
            assert len(server.ticks) == number + 1
        await server.shutdown()


@pytest.mark.parametrize("server_class", [TCPServer, UDPServer], ids=class_name)
@bounded
async def test_service_actions_while_the_server_is_full(
    autojump_clock: Any, server_class: Any
) -> None:
    async def park(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(2.25)

    server = ticking(server_class)(LOOPBACK, park)
    with pose(server, b"first"), pose(server, b"second"):
        async with server:
            with trio.move_on_after(2):
                await server.serve_forever()
    assert server.ticks == [0.5, 1, 1.5]
    assert server.statistics().accepted == 1


@pytest.mark.parametrize("server_class", [TCPServer, UDPServer], ids=class_name)
@bounded
async def test_a_request_does_not_delay_service_actions(
    autojump_clock: Any, server_class: Any
) -> None:
    async def park(request: Any, client_address: Any, server: Any) -> None:
        await trio.sleep(1)

    server = ticking(server_class)(LOOPBACK, park)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        await trio.sleep(0.75)
        with pose(server, b"in between"):
            await trio.sleep(1.5)
            await server.shutdown()
    assert server.ticks == [0.5, 1, 1.5, 2]


@bounded
async def test_service_actions_while_the_loop_backs_off(autojump_clock: Any) -> None:
    class Server(ticking(NurseryTCPServer)):
        async def get_request(self) -> tuple[Any, Any]:
            raise OSError(errno.ENFILE, "out of descriptors")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address):
        async with server:
            with trio.move_on_after(60):
                await server.serve_forever()
    gaps = [later - earlier for earlier, later in itertools.pairwise(server.ticks)]
    assert max(gaps) <= 0.5
    # Once the delay has reached its limit there is one attempt per second.
    assert 60 <= server.statistics().accept_errors <= 70


@bounded
async def test_service_actions_with_no_interval_still_serves(autojump_clock: Any) -> None:
    # As select(0) does: it reports what is ready, and does not wait.
    class Server(TCPServer):
        async def service_actions(self) -> None:
            await trio.sleep(1)

    for server_class in (Server, type("Concurrent", (NurseryMixIn, Server), {})):
        server = server_class(LOOPBACK, echo_all)
        async with server, trio.open_nursery() as nursery:
            await nursery.start(functools.partial(server.serve_forever, poll_interval=0))
            with trio.fail_after(10):
                assert await ask(server, b"ping") == b"ping"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("entered", [True, False])
@bounded
async def test_service_actions_that_fail_end_the_server(
    autojump_clock: Any, entered: bool
) -> None:
    class Server(NurseryTCPServer):
        async def service_actions(self) -> None:
            if self.statistics().active:
                raise LookupError("service_actions")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address) as client:
        with pytest.raises(LookupError, match="service_actions"):
            async with server if entered else nullcontext():
                await server.serve_forever()
        assert await receive_to_end(client) == b""
    assert server.statistics().cancelled == 1
    await server.server_close()


@bounded
async def test_service_actions_assigned_to_the_instance(autojump_clock: Any) -> None:
    ticks = []

    async def service_actions() -> None:
        ticks.append(trio.current_time())

    server = TCPServer(LOOPBACK, echo_all)
    server.service_actions = service_actions
    async with server:
        with trio.move_on_after(1.25):
            await server.serve_forever()
    assert ticks == [0.5, 1]


@pytest.mark.parametrize("hook", ["get_request", "verify_request", "process_request"])
@bounded
async def test_hooks_are_not_cut_short_by_any_interval(
    autojump_clock: Any, hook: str
) -> None:
    async def slow(self: Any, *args: Any) -> Any:
        await trio.sleep(10)
        return await getattr(NurseryTCPServer, hook)(self, *args)

    for server_class in (ticking(NurseryTCPServer), NurseryTCPServer):
        server = type("Server", (server_class,), {hook: slow})(LOOPBACK, echo_all)
        server.timeout = 1
        began = trio.current_time()
        with pose(server, b"ping") as client:
            async with server, trio.open_nursery() as nursery:
                if server_class is NurseryTCPServer:
                    await server.handle_request()
                else:
                    await nursery.start(server.serve_forever)
                assert await answer(client) == b"ping"
                assert trio.current_time() == began + 10
                nursery.cancel_scope.cancel()
