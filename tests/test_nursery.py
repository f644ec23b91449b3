"""`NurseryMixIn`: a task for each request, and a limit that stops accepting."""

from __future__ import annotations

import socket
from collections.abc import AsyncGenerator
from contextlib import ExitStack, asynccontextmanager
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
    echo_all,
    pose,
    receive_to_end,
    reply_now,
)
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import (
    BaseServer,
    NurseryMixIn,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixDatagramServer,
    NurseryUnixStreamServer,
    TCPServer,
    UDPServer,
)

LOOPBACK = ("127.0.0.1", 0)
CONCURRENT = [
    server
    for server in (*STREAM_SERVERS, *DATAGRAM_SERVERS)
    if issubclass(server, NurseryMixIn)
]
concurrent_servers = pytest.mark.parametrize("server_class", CONCURRENT, ids=class_name)


@asynccontextmanager
async def serving(server: Any) -> AsyncGenerator[trio.Nursery]:
    """Have *server* entered, and its loop in a task, for the length of the block."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield nursery
        await server.shutdown()


class Doorman:
    """A handler that lets its requests go one by one."""

    def __init__(self) -> None:
        self.waiting: list[trio.Event] = []
        self.most = 0

    async def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        event = trio.Event()
        self.waiting.append(event)
        self.most = max(self.most, len(self.waiting))
        try:
            await event.wait()
        finally:
            self.waiting.remove(event)
        await echo_all(request, client_address, server)

    async def let_go(self, count: int) -> None:
        for event in self.waiting[:count]:
            event.set()
        await wait_all_tasks_blocked()


# -- the limit as an attribute -------------------------------------------------------------


def test_the_default_limits() -> None:
    assert NurseryMixIn.max_tasks is None
    assert NurseryTCPServer.max_tasks is None
    assert NurseryUnixStreamServer.max_tasks is None
    assert NurseryUDPServer.max_tasks == 1000
    assert NurseryUnixDatagramServer.max_tasks == 1000


def test_the_default_is_that_of_the_whole_class() -> None:
    class MyMixIn(NurseryMixIn):
        """What somebody adds to every server of theirs."""

    class MyUDPServer(MyMixIn, UDPServer):
        """A datagram server with it."""

    class MyTCPServer(MyMixIn, TCPServer):
        """A stream server with it."""

    class Derived(MyUDPServer):
        """And one more."""

    assert MyMixIn.max_tasks is None
    assert MyUDPServer.max_tasks == 1000
    assert Derived.max_tasks == 1000
    assert MyTCPServer.max_tasks is None


def test_a_limit_of_the_users_stays() -> None:
    class Unlimited(NurseryUDPServer):
        max_tasks = None

    class Limited(NurseryTCPServer):
        max_tasks = 5

    class LimitedMixIn(NurseryMixIn):
        max_tasks = 6

    class UnlimitedMixIn(NurseryMixIn):
        max_tasks = None

    class DerivedUnlimited(Unlimited):
        """Derived from it."""

    assert Unlimited.max_tasks is None
    assert DerivedUnlimited.max_tasks is None
    assert type("Derived", (Limited,), {}).max_tasks == 5
    assert type("Derived", (LimitedMixIn, UDPServer), {}).max_tasks == 6
    assert type("Derived", (UnlimitedMixIn, UDPServer), {}).max_tasks is None
    Limited.max_tasks = 7
    assert type("Derived", (Limited,), {}).max_tasks == 7


def test_a_limit_assigned_to_a_class_is_inherited() -> None:
    class Server(NurseryUDPServer):
        """One that took the default first."""

    Server.max_tasks = 7
    assert type("Derived", (Server,), {}).max_tasks == 7


def test_an_instance_has_a_limit_of_its_own() -> None:
    server = NurseryUDPServer(LOOPBACK, echo_all)
    with server.socket:
        server.max_tasks = 3
        assert server.max_tasks == 3
        assert NurseryUDPServer.max_tasks == 1000


# -- a task for each request ---------------------------------------------------------------


@concurrent_servers
@bounded
async def test_requests_are_handled_side_by_side(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    doorman = Doorman()
    server = server_class(bind_address(server_class, tmp_path), doorman)
    with ExitStack() as stack:
        async with serving(server):
            clients = [
                stack.enter_context(pose(server, b"%d" % number, tmp_path))
                for number in range(8)
            ]
            await wait_all_tasks_blocked()
            assert len(doorman.waiting) == server.statistics().active == 8
            await doorman.let_go(8)
            for number, client in enumerate(clients):
                assert await answer(client) == b"%d" % number
    assert server.statistics().completed == 8
    assert_sums_up(server)


@bounded
async def test_requests_do_not_harm_each_other(autojump_clock: Any) -> None:
    async def handler(request: Any, client_address: Any, server: Any) -> None:
        wish = await request.recv(10)
        await trio.sleep(int(wish))
        if wish == b"5":
            raise ConnectionResetError
        await request.sendall(wish)

    server = NurseryTCPServer(LOOPBACK, handler)
    async with serving(server):
        with pose(server, b"5") as failing, pose(server, b"10") as good:
            assert await answer(failing) == b""
            assert trio.current_time() == 5
            assert await answer(good) == b"10"
    seen = server.statistics()
    assert (seen.completed, seen.failed) == (1, 1)


@bounded
async def test_the_tasks_are_the_servers_own(autojump_clock: Any) -> None:
    """A request is no child of the task that serves, and outlives the loop."""
    tasks = []

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        task = trio.lowlevel.current_task()
        tasks.append((task.name, task.parent_nursery))
        await trio.sleep(10)

    server = NurseryTCPServer(LOOPBACK, handler)
    with pose(server, b""), pose(server, b""):
        async with server:
            with trio.move_on_after(5):
                await server.serve_forever()
            loop = trio.lowlevel.current_task()
            assert [name for name, _ in tasks] == ["request", "request"]
            assert all(nursery not in loop.child_nurseries for _, nursery in tasks)
            assert server.statistics().active == 2
    assert server.statistics().completed == 2


# -- the limit at work ---------------------------------------------------------------------


@concurrent_servers
@pytest.mark.parametrize("limit", [1, 3])
@bounded
async def test_at_the_limit_the_kernel_queues(
    autojump_clock: Any, server_class: Any, limit: int, tmp_path: Path
) -> None:
    doorman = Doorman()
    server = server_class(bind_address(server_class, tmp_path), doorman)
    server.max_tasks = limit
    with ExitStack() as stack:
        # All of them are there before the server looks, so that one batch meets the limit.
        clients = [
            stack.enter_context(pose(server, b"%d" % number, tmp_path))
            for number in range(8)
        ]
        async with serving(server):
            for accepted in range(limit, 9):
                await wait_all_tasks_blocked()
                seen = server.statistics()
                assert seen.accepted == accepted
                assert seen.active == len(doorman.waiting) == limit
                await doorman.let_go(1)
            while doorman.waiting:
                await doorman.let_go(1)
            for number, client in enumerate(clients):
                assert await answer(client) == b"%d" % number
    assert doorman.most == limit
    assert server.statistics().completed == 8
    assert_sums_up(server)


@bounded
async def test_datagrams_are_limited_by_default(autojump_clock: Any) -> None:
    doorman = Doorman()
    server = NurseryUDPServer(LOOPBACK, doorman)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        async with serving(server):
            client.connect(server.server_address)
            for _ in range(11):
                for _ in range(100):  # Few enough for the kernel's queue.
                    client.send(b"x")
                await wait_all_tasks_blocked()
            assert len(doorman.waiting) == server.statistics().active == 1000
            assert server.statistics().accepted == 1000
            while doorman.waiting:
                await doorman.let_go(1000)
    assert doorman.most == 1000
    assert server.statistics().completed == 1100


@bounded
async def test_datagrams_may_be_unlimited(autojump_clock: Any) -> None:
    class Unlimited(NurseryUDPServer):
        max_tasks = None

    doorman = Doorman()
    server = Unlimited(LOOPBACK, doorman)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        async with serving(server):
            client.connect(server.server_address)
            for _ in range(11):
                for _ in range(100):
                    client.send(b"x")
                await wait_all_tasks_blocked()
            assert len(doorman.waiting) == 1100
            await doorman.let_go(1100)


@bounded
async def test_the_limit_may_change_while_serving(autojump_clock: Any) -> None:
    doorman = Doorman()
    server = NurseryTCPServer(LOOPBACK, doorman)
    server.max_tasks = 2
    with ExitStack() as stack:
        clients = [stack.enter_context(pose(server, b"x")) for _ in range(12)]
        async with serving(server):
            await wait_all_tasks_blocked()
            assert len(doorman.waiting) == 2
            server.max_tasks = 4
            await doorman.let_go(1)
            assert len(doorman.waiting) == 4
            server.max_tasks = 3
            await doorman.let_go(1)
            assert len(doorman.waiting) == 3
            await doorman.let_go(1)
            assert len(doorman.waiting) == 3
            server.max_tasks = None
            await doorman.let_go(1)
            assert len(doorman.waiting) == 8
            await doorman.let_go(8)
            for client in clients:
                assert await answer(client) == b"x"


@bounded
async def test_a_limit_that_is_raised_at_the_limit_takes_effect_with_the_next_poll(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        async def service_actions(self) -> None:
            """Make the loop look every half a second."""

    doorman = Doorman()
    server = Server(LOOPBACK, doorman)
    server.max_tasks = 1
    with pose(server, b"one") as one, pose(server, b"two") as two:
        async with serving(server):
            await trio.sleep(10)
            assert len(doorman.waiting) == 1
            server.max_tasks = 2
            await trio.sleep(1.1)
            assert len(doorman.waiting) == 2
            await doorman.let_go(2)
            assert await answer(one) == b"one"
            assert await answer(two) == b"two"


@concurrent_servers
@bounded
async def test_every_way_of_ending_makes_room(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    class Server(server_class):
        max_tasks = 1
        request_timeout = 5
        cleanup_timeout = 5

        async def verify_request(self, request: Any, client_address: Any) -> bool:
            if self.statistics().accepted == 1:
                raise LookupError("an error")
            return self.statistics().accepted != 2

        async def process_request(self, request: Any, client_address: Any) -> None:
            if self.statistics().accepted == 3:
                await self.shutdown_request(request)
            elif self.statistics().accepted == 4:
                raise LookupError("an error")
            else:
                await super().process_request(request, client_address)

        async def shutdown_request(self, request: Any) -> None:
            await super().shutdown_request(request)
            if self.statistics().accepted == 5:
                await trio.sleep_forever()

        async def handle_error(self, request: Any, client_address: Any) -> None:
            """Say nothing."""

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        if server.statistics().accepted == 6:
            raise LookupError("an error")
        if server.statistics().accepted == 7:
            await trio.sleep_forever()
        await echo_all(request, client_address, server)

    server = Server(bind_address(Server, tmp_path), handler)
    with ExitStack() as stack:
        clients = [
            stack.enter_context(pose(server, b"%d" % number, tmp_path))
            for number in range(1, 9)
        ]
        async with serving(server):
            assert await answer(clients[-1]) == b"8"
            for client in clients[:4] + clients[5:7]:
                assert reply_now(client) == b""
            assert reply_now(clients[4]) == b"5"
    seen = server.statistics()
    assert (seen.accepted, seen.completed, seen.rejected, seen.failed) == (8, 2, 1, 5)


@bounded
async def test_stopping_at_the_limit(autojump_clock: Any) -> None:
    doorman = Doorman()
    server = NurseryTCPServer(LOOPBACK, doorman)
    server.max_tasks = 1
    with pose(server, b"one") as one, pose(server, b"two") as two:
        async with serving(server):
            await wait_all_tasks_blocked()
            await server.shutdown()
            await doorman.let_go(1)
            assert await answer(one) == b"one"
            await trio.sleep(10)
            assert server.statistics().accepted == 1
        # Who was queued when the listener was closed is told so.
        assert await receive_to_end(two) == b""


def test_a_limit_needs_the_mixin() -> None:
    server = TCPServer(LOOPBACK, echo_all)
    with server.socket:
        assert not hasattr(server, "max_tasks")
    assert not hasattr(BaseServer, "max_tasks")


@bounded
async def test_the_mixin_may_come_second(autojump_clock: Any) -> None:
    class Server(TCPServer, NurseryMixIn):
        """Against the custom, but the server class has nothing to say here."""

    doorman = Doorman()
    server = Server(LOOPBACK, doorman)
    with pose(server, b"one") as one, pose(server, b"two") as two:
        async with serving(server):
            await wait_all_tasks_blocked()
            await doorman.let_go(2)
            assert await answer(one) == b"one"
            assert await answer(two) == b"two"
            server.RequestHandlerClass = echo_all
            assert await ask(server, b"three") == b"three"
    assert doorman.most == 2
