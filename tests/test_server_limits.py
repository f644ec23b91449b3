"""A server takes no more requests, steps or time than it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import (
    answer,
    ask,
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    echo_all,
    pose,
    receive_to_end,
)
from lifecycles import LOOPBACK, SERVERS, serving, stuck

from trio_socketserver import (
    BaseRequestHandler,
    NurseryMixIn,
    NurseryTCPServer,
    NurseryUDPServer,
    RequestTimeout,
    TCPServer,
)

SEQUENTIAL = [server for server in SERVERS if not issubclass(server, NurseryMixIn)]


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


@bounded
async def test_a_server_that_a_request_has_crashed_takes_no_more() -> None:
    """In a worker process, another worker may."""
    async with TCPServer(("127.0.0.1", 0), echo_all) as server:
        with connect(server.server_address):
            server._requests.cancel()
            await server._accept_batch()
    assert server.statistics().accepted == 0
