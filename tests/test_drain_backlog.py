"""What the kernel has accepted when a server closes: served with `drain_backlog`, and no
request is lost where servers take turns on one listening socket."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from blocking_servers import in_thread
from helpers import answer, assert_sums_up, bounded, echo_all, pose

from trio_socketserver import (
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
)

CLIENTS = 10

NOTHING = b""
"""What is read from a connection that has been reset, too."""


class Gate(StreamRequestHandler):
    """Answer a line; the line "wait" only when the server's gate opens."""

    async def handle(self) -> None:
        line = await self.rfile.readline()
        if line == b"wait\n":
            self.server.waits.set()
            await self.server.gate.wait()
        self.server.most = max(self.server.most, self.server.statistics().active)
        await self.wfile.write(line)


def make(base: type[Any], **attributes: Any) -> Any:
    names = {"drain_backlog": True, "max_tasks": 1, "max_threads": 1, **attributes}
    server = type(base.__name__, (base,), names)(("127.0.0.1", 0), Gate)
    server.waits, server.gate, server.most = trio.Event(), trio.Event(), 0
    return server


@bounded
@pytest.mark.parametrize("base", [TCPServer, NurseryTCPServer, ThreadingTCPServer])
async def test_what_is_queued_is_served_within_the_limit(base: type[Any]) -> None:
    server = make(base)
    running = []

    async def finish_request(request: Any, client_address: Any) -> None:
        running.append(client_address)
        assert len(running) == 1
        await base.finish_request(server, request, client_address)
        running.remove(client_address)

    server.finish_request = finish_request
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"wait\n") as first:
            await server.waits.wait()
            queued = [pose(server, b"%d\n" % number) for number in range(CLIENTS)]
            nursery.start_soon(server.server_close)
            await server.draining.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert server.fileno() == -1
            assert server.statistics().active == 1 + CLIENTS
            server.gate.set()
            assert await answer(first) == b"wait\n"
            for number, client in enumerate(queued):
                with client:
                    assert await answer(client) == b"%d\n" % number
    assert server.statistics().completed == 1 + CLIENTS
    assert_sums_up(server)


@bounded
async def test_without_it_what_is_queued_is_reset() -> None:
    server = make(NurseryTCPServer, drain_backlog=False)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"wait\n"):
            await server.waits.wait()
            with pose(server, b"queued\n") as queued:
                nursery.start_soon(server.server_close)
                assert await answer(queued) == NOTHING
            server.gate.set()


@bounded
async def test_no_more_than_the_queue_s_size() -> None:
    server = make(NurseryTCPServer, request_queue_size=3)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"wait\n"):
            await server.waits.wait()
            queued = [pose(server, b"x\n") for _ in range(4)]  # The kernel has room for it.
            nursery.start_soon(server.server_close)
            await server.draining.wait()
            server.gate.set()
            for client in queued[:3]:
                with client:
                    assert await answer(client) == b"x\n"
            with queued[3] as last:
                assert await answer(last) == NOTHING


@bounded
async def test_what_waits_for_its_turn_is_cancelled_and_closed() -> None:
    server = make(NurseryTCPServer, graceful_timeout=0)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"wait\n"), pose(server, b"queued\n") as queued:
            await server.waits.wait()
            await server.server_close()
            assert await answer(queued) == NOTHING
    assert server.statistics().cancelled == 2
    assert_sums_up(server)


@bounded
async def test_a_cancelled_server_takes_nothing_more() -> None:
    server = make(NurseryTCPServer)
    with trio.CancelScope() as scope:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            with pose(server, b"wait\n"), pose(server, b"queued\n"):
                await server.waits.wait()
                scope.cancel()
                await trio.sleep_forever()
    assert server.statistics().accepted == 1


@bounded
async def test_a_server_that_has_not_served_takes_nothing() -> None:
    async with make(NurseryTCPServer) as server:
        queued = pose(server, b"queued\n")
    with queued:
        assert await answer(queued) == NOTHING
    assert server.statistics().accepted == 0


@bounded
async def test_hooks_decide_as_always() -> None:
    class Choosy(NurseryTCPServer):
        drain_backlog = True
        max_tasks = 1

        async def verify_request(self, request: Any, client_address: Any) -> bool:
            if self.draining.is_set():
                await self.server_close()  # Which does not wait for itself.
                return False
            return True

    server: Any = Choosy(("127.0.0.1", 0), Gate)
    server.waits, server.gate, server.most = trio.Event(), trio.Event(), 0
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"wait\n") as first:
            await server.waits.wait()
            with pose(server, b"queued\n") as queued:
                nursery.start_soon(server.server_close)
                await server.draining.wait()
                server.gate.set()
                assert await answer(first) == b"wait\n"
                assert await answer(queued) == NOTHING
    assert server.statistics().rejected == 1


@bounded
async def test_datagrams_and_unix_connections(tmp_path: Path) -> None:
    async def late(request: Any, client_address: Any, server: Any) -> None:
        await gate.wait()
        if isinstance(request, tuple):
            await request[1].sendto(request[0], client_address)
        else:
            await request.send_all(await request.receive_some())

    for base, address in (
        (NurseryUDPServer, ("127.0.0.1", 0)),
        (NurseryUnixStreamServer, str(tmp_path / "socket")),
    ):
        gate = trio.Event()
        names = {"drain_backlog": True, "max_tasks": 1}
        server: Any = type("Server", (base,), names)(address, late)
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            with pose(server, b"one") as one:
                await trio.testing.wait_all_tasks_blocked()
                with pose(server, b"two") as two:
                    nursery.start_soon(server.server_close)
                    await trio.testing.wait_all_tasks_blocked()
                    gate.set()
                    assert await answer(one) == b"one"
                    assert await answer(two) == b"two"


REPLACEMENTS = 20
REQUESTS_EACH = 10


async def counting_echo(request: Any, client_address: Any, server: Any) -> None:
    await request.send_all(await request.receive_some())
    server.count += 1
    if server.count == REQUESTS_EACH:
        server.has_served.set()


class Generation(NurseryTCPServer):
    """One of the servers that follow each other."""

    drain_backlog = True

    async def live(self, task_status: trio.TaskStatus[None]) -> None:
        self.count, self.has_served, self.replaced = 0, trio.Event(), trio.Event()
        async with self, trio.open_nursery() as nursery:
            await nursery.start(self.serve_forever)
            task_status.started()
            await self.replaced.wait()
            await self.shutdown()


@bounded
async def test_servers_take_turns_on_one_socket_and_lose_no_request() -> None:
    """As a restart does that hands its listening socket on."""
    over = threading.Event()

    def keep_asking(address: Any) -> None:
        while not over.is_set():
            with socket.create_connection(address) as client:
                client.sendall(b"ping")
                assert client.recv(10) == b"ping"

    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with trio.open_nursery() as servers:
            current = Generation.from_socket(listener.dup(), counting_echo)
            await servers.start(current.live)
            async with trio.open_nursery() as askers:
                for _ in range(4):
                    askers.start_soon(in_thread, keep_asking, listener.getsockname())
                for _ in range(REPLACEMENTS):
                    await current.has_served.wait()
                    previous = current
                    current = Generation.from_socket(listener.dup(), counting_echo)
                    await servers.start(current.live)
                    previous.replaced.set()
                over.set()
            current.replaced.set()


@bounded
@pytest.mark.parametrize(("number", "served"), [(errno.ECONNABORTED, 2), (errno.EMFILE, 0)])
async def test_an_error_of_accepting(number: int, served: int) -> None:
    """One that is a connection's own costs nobody else; a shortage ends it."""
    server = make(NurseryTCPServer)
    accept, errors = server.get_request, [OSError(number, "")]

    async def get_request() -> Any:
        if server.draining.is_set() and errors:
            raise errors.pop()
        return await accept()

    server.get_request = get_request
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with (
            pose(server, b"wait\n"),
            pose(server, b"1\n") as one,
            pose(server, b"2\n") as two,
        ):
            await server.waits.wait()
            nursery.start_soon(server.server_close)
            await server.draining.wait()
            await trio.testing.wait_all_tasks_blocked()
            assert server.statistics().accept_errors == 1
            server.gate.set()
            replies = [await answer(one), await answer(two)]
    assert replies == ([b"1\n", b"2\n"] if served else [NOTHING] * 2)


@bounded
async def test_a_hook_that_closes_the_listener() -> None:
    server = make(NurseryTCPServer)
    accept = server.get_request

    async def get_request() -> Any:
        if server.draining.is_set():
            server.socket.close()
        return await accept()

    server.get_request = get_request
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"wait\n"), pose(server, b"queued\n") as queued:
            await server.waits.wait()
            server.gate.set()
            await server.server_close()
            assert await answer(queued) == NOTHING


@bounded
async def test_others_have_their_turn_meanwhile() -> None:
    server = make(NurseryTCPServer)
    server._batch = 1
    others_turns = []

    async def other() -> None:
        await server.draining.wait()
        while len(others_turns) < CLIENTS:
            others_turns.append(server.statistics().accepted)
            await trio.lowlevel.checkpoint()

    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with contextlib.ExitStack() as stack:
            stack.enter_context(pose(server, b"wait\n"))
            await server.waits.wait()
            for _ in range(3):
                stack.enter_context(pose(server, b"x\n"))
            nursery.start_soon(other)
            nursery.start_soon(server.server_close)
            await trio.testing.wait_all_tasks_blocked()
            server.gate.set()
    assert {2, 3} & set(others_turns)  # And not from 1 to 4 at once.


@bounded
async def test_a_hook_may_pass_on_something_else_and_count_it_once() -> None:
    class Wrapping(NurseryTCPServer):
        drain_backlog = True
        max_tasks = 1

        async def process_request(self, request: Any, client_address: Any) -> None:
            await trio.lowlevel.checkpoint()
            await super().process_request([request], client_address)

        async def finish_request(self, request: Any, client_address: Any) -> None:
            await super().finish_request(request[0], client_address)

        async def shutdown_request(self, request: Any) -> None:
            await super().shutdown_request(request[0])

    server: Any = Wrapping(("127.0.0.1", 0), Gate)
    server.waits, server.gate, server.most = trio.Event(), trio.Event(), 0
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with contextlib.ExitStack() as stack:
            stack.enter_context(pose(server, b"wait\n"))
            await server.waits.wait()
            queued = [stack.enter_context(pose(server, b"x\n")) for _ in range(3)]
            nursery.start_soon(server.server_close)
            await server.draining.wait()
            server.gate.set()
            for client in queued:
                assert await answer(client) == b"x\n"
    assert server.statistics().accepted == server.statistics().completed == 4


@bounded
async def test_who_comes_too_late_to_a_path_is_refused_and_not_reset(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "socket")
    late: list[int] = []

    class Server(NurseryUnixStreamServer):
        drain_backlog = True

        async def get_request(self) -> tuple[Any, Any]:
            try:
                return await super().get_request()
            except BlockingIOError:
                if self.draining.is_set():
                    with socket.socket(socket.AF_UNIX) as client:
                        late.append(client.connect_ex(path))
                raise

    async with Server(path, echo_all) as server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with pose(server, b"in time\n") as client:
            await server.server_close()
            assert await answer(client) == b"in time\n"
    assert late == [errno.ENOENT]
