"""Tasks that run requests in a row, and what a request notices of that: nothing."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing
from helpers import bounded, pose, receive

from trio_socketserver import (
    BaseRequestHandler,
    DatagramRequestHandler,
    NurseryTCPServer,
    NurseryUDPServer,
    UDPServer,
)
from trio_socketserver._shared_tasks import SharedTasks

LOCALHOST = ("127.0.0.1", 0)
variable: ContextVar[Any] = ContextVar("variable", default="default")
another: ContextVar[Any] = ContextVar("another")


@contextlib.asynccontextmanager
async def shared_tasks() -> AsyncIterator[SharedTasks]:
    async with trio.open_nursery() as nursery:
        yield SharedTasks(nursery, name="request")


class Visitors:
    """Functions to be run, which note their task and the variable they find."""

    def __init__(self) -> None:
        self.tasks: list[trio.lowlevel.Task] = []
        self.found: list[Any] = []

    async def visit(self) -> None:
        self.tasks.append(trio.lowlevel.current_task())
        self.found.append(variable.get())

    async def wait(self, event: trio.Event) -> None:
        await self.visit()
        await event.wait()

    async def set(self, value: object, which: ContextVar[Any] = variable) -> None:
        await self.visit()
        which.set(value)


async def test_requests_that_come_together_and_do_not_wait_share_a_task() -> None:
    visitors = Visitors()
    variable.set("the starter's")
    async with shared_tasks() as tasks:
        for _ in range(5):
            tasks.start_soon(visitors.visit)
        assert not visitors.tasks, "it is not to run before the caller lets it"
    assert len(visitors.tasks) == 5
    assert len(set(visitors.tasks)) == 1
    assert visitors.tasks[0].name == "request"
    assert visitors.found == ["the starter's"] * 5


async def test_what_comes_later_has_another_task() -> None:
    visitors = Visitors()
    async with shared_tasks() as tasks:
        for _ in range(3):
            tasks.start_soon(visitors.visit)
            await trio.testing.wait_all_tasks_blocked()
    assert len(set(visitors.tasks)) == 3


async def test_a_request_that_waits_has_its_task_for_itself() -> None:
    visitors, events = Visitors(), [trio.Event() for _ in range(4)]
    async with shared_tasks() as tasks:
        for event in events:
            tasks.start_soon(visitors.wait, event)
        await trio.testing.wait_all_tasks_blocked()
        assert len(set(visitors.tasks)) == len(visitors.tasks) == 4
        for event in events:
            event.set()
            tasks.start_soon(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
        assert len(set(visitors.tasks[4:])) == 1
        assert not set(visitors.tasks[:4]) & set(visitors.tasks[4:])


async def test_a_row_keeps_its_order_when_one_waits() -> None:
    order: list[int] = []
    event = trio.Event()

    async def note(number: int) -> None:
        order.append(number)
        if number == 2:
            await event.wait()
            order.append(-number)

    async with shared_tasks() as tasks:
        for number in range(4):
            tasks.start_soon(note, number)
        await trio.testing.wait_all_tasks_blocked()
        assert order == [0, 1, 2, 3]
        event.set()
    assert order == [0, 1, 2, 3, -2]


async def test_what_a_request_starts_comes_after_its_row() -> None:
    order: list[str] = []
    async with shared_tasks() as tasks:

        async def note(name: str, *more: str) -> None:
            order.append(name)
            for each in more:
                tasks.start_soon(note, each)

        tasks.start_soon(note, "a", "d", "e")
        tasks.start_soon(note, "b", "f")
        tasks.start_soon(note, "c")
    assert order == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize(
    "which", [variable, another], ids=["other value", "other variable"]
)
async def test_context_variables_do_not_pass_to_the_next(which: ContextVar[Any]) -> None:
    visitors = Visitors()
    variable.set("the starter's")
    async with shared_tasks() as tasks:
        for number in range(3):
            tasks.start_soon(visitors.set, number, which)
        tasks.start_soon(visitors.visit)
    assert visitors.found == ["the starter's"] * 4
    assert len(set(visitors.tasks)) == 4


async def test_an_equal_object_is_another() -> None:
    """Who comes next must not find, and change, what the last one has left."""
    mine: list[int] = []
    variable.set(mine)
    visitors = Visitors()
    async with shared_tasks() as tasks:
        tasks.start_soon(visitors.set, [])
        tasks.start_soon(visitors.visit)
    assert visitors.found[1] is mine


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = None  # type: ignore[assignment]


async def test_values_are_not_compared_by_code_of_theirs() -> None:
    visitors = Visitors()
    variable.set(Incomparable())
    async with shared_tasks() as tasks:
        tasks.start_soon(visitors.visit)
        tasks.start_soon(visitors.set, Incomparable())
        tasks.start_soon(visitors.visit)
    assert len(set(visitors.tasks)) == 2
    assert all(value is variable.get() for value in visitors.found)


async def test_a_row_ends_with_a_nursery_that_is_left_open() -> None:
    visitors = Visitors()

    async def leave_open() -> None:
        await visitors.visit()
        await trio.open_nursery().__aenter__()

    with contextlib.suppress(BaseExceptionGroup):  # Newer versions of trio notice it.
        async with shared_tasks() as tasks:
            tasks.start_soon(leave_open)
            tasks.start_soon(visitors.visit)
    assert len(set(visitors.tasks)) == len(visitors.tasks) == 2


async def test_in_a_cancelled_nursery_each_runs_to_its_first_checkpoint() -> None:
    ended: list[str] = []

    async def be_cancelled() -> None:
        try:
            await trio.lowlevel.checkpoint()
        finally:
            ended.append("cancelled")

    async with trio.open_nursery() as nursery:
        tasks = SharedTasks(nursery, name="request")
        for _ in range(3):
            tasks.start_soon(be_cancelled)
        nursery.cancel_scope.cancel()
    assert ended == ["cancelled"] * 3


async def test_a_crash_takes_nobody_else_s_turn() -> None:
    visitors = Visitors()

    async def crash() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with shared_tasks() as tasks:
            for function in (visitors.visit, crash, visitors.visit, visitors.visit):
                tasks.start_soon(function)

    with pytest.raises(BaseExceptionGroup) as raised:
        await main()
    assert [type(error) for error in raised.value.exceptions] == [KeyboardInterrupt]
    assert len(visitors.tasks) == 3


async def test_who_waits_does_not_keep_what_the_row_has_run() -> None:
    class Request:
        pass

    async def look(request: Request) -> None:
        assert isinstance(request, Request)

    event, visitors = trio.Event(), Visitors()
    async with shared_tasks() as tasks:
        request = Request()
        reference = weakref.ref(request)
        tasks.start_soon(look, request)
        tasks.start_soon(visitors.wait, event)
        del request
        await trio.testing.wait_all_tasks_blocked()
        assert reference() is None
        event.set()


# -- in a server ---------------------------------------------------------------------


class Tell(BaseRequestHandler):
    """Answers at once with what it finds, and leaves something behind."""

    async def handle(self) -> None:
        data, replies = self.request
        self.server.tasks.append(trio.lowlevel.current_task())
        assert replies.sendto_now(str(variable.get()).encode(), self.client_address)
        if data == b"set":
            variable.set("left behind")


class Echo(DatagramRequestHandler):
    async def handle(self) -> None:
        self.server.tasks.append(trio.lowlevel.current_task())
        self.wfile.write(self.packet)


async def replies_to_a_batch(server: Any, questions: list[bytes]) -> list[bytes]:
    """Have the questions there before the server serves."""
    server.tasks = []
    clients = [pose(server, question) for question in questions]
    replies = []
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        for client in clients:
            with client:
                replies.append(await receive(client))
        await server.shutdown()
    return replies


@pytest.mark.parametrize("share", [True, False])
@bounded
async def test_share_tasks(share: bool) -> None:
    server = NurseryUDPServer(LOCALHOST, Echo)
    server.share_tasks = share
    questions = [b"%d" % number for number in range(5)]
    assert await replies_to_a_batch(server, questions) == questions
    assert len(server.tasks) == 5  # type: ignore[attr-defined]
    assert len(set(server.tasks)) == (1 if share else 5)  # type: ignore[attr-defined]


@bounded
async def test_what_a_handler_sets_is_not_seen_by_the_next() -> None:
    server = NurseryUDPServer(LOCALHOST, Tell)
    assert await replies_to_a_batch(server, [b"set"] * 5) == [b"default"] * 5


@bounded
async def test_a_server_of_one_at_a_time_has_rows_of_one() -> None:
    server = UDPServer(LOCALHOST, Echo)
    assert await replies_to_a_batch(server, [b"1", b"2", b"3"]) == [b"1", b"2", b"3"]
    assert len(set(server.tasks)) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("hook", ["get_request", "verify_request", "process_request"])
@bounded
async def test_a_hook_sets_variables_for_its_own_request(hook: str) -> None:
    async def get_request(self: Any) -> tuple[Any, Any]:
        request, client_address = await NurseryUDPServer.get_request(self)
        variable.set(request[0].decode())
        return request, client_address

    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        variable.set(request[0].decode())
        return True

    async def process_request(self: Any, request: Any, client_address: Any) -> None:
        variable.set(request[0].decode())
        await NurseryUDPServer.process_request(self, request, client_address)

    hooks = {
        "get_request": get_request,
        "verify_request": verify_request,
        "process_request": process_request,
    }
    server_class = type("Server", (NurseryUDPServer,), {hook: hooks[hook]})
    questions = [b"%d" % number for number in range(6)]
    assert await replies_to_a_batch(server_class(LOCALHOST, Tell), questions) == questions


@bounded
async def test_another_server_s_hook_is_no_hook_of_its_own() -> None:
    """Both are a method of the same class, of different objects."""
    other = NurseryUDPServer(LOCALHOST, Echo)
    server = NurseryUDPServer(LOCALHOST, Tell)
    other.tasks = []  # type: ignore[attr-defined]
    server.process_request = other.process_request  # type: ignore[method-assign]
    async with other:
        assert await replies_to_a_batch(server, [b"theirs"]) == [b"theirs"]
    assert (len(server.tasks), len(other.tasks)) == (0, 1)  # type: ignore[attr-defined]


@bounded
async def test_datagrams_of_one_batch_that_wait_do_not_wait_for_each_other() -> None:
    arrived: list[bytes] = []
    all_here = trio.Event()

    async def meet(request: Any, client_address: Any, server: Any) -> None:
        arrived.append(request[0])
        if len(arrived) == 5:
            all_here.set()
        await all_here.wait()
        await request[1].sendto(b"met", client_address)

    server = NurseryUDPServer(LOCALHOST, meet)
    assert await replies_to_a_batch(server, [b"?"] * 5) == [b"met"] * 5


@bounded
async def test_a_batch_does_not_go_beyond_the_limit() -> None:
    """The hooks that could change it are not overridden: room is looked up once."""
    most = 0

    async def count(request: Any, client_address: Any, server: Any) -> None:
        nonlocal most
        most = max(most, server.statistics().active)
        await trio.lowlevel.checkpoint()
        await request[1].sendto(request[0], client_address)

    server = NurseryUDPServer(LOCALHOST, count)
    server.max_tasks = 3
    questions = [b"%d" % number for number in range(10)]
    assert await replies_to_a_batch(server, questions) == questions
    assert most == 3


@bounded
async def test_a_request_that_comes_too_late_is_closed_and_counted() -> None:
    """Its hook was held up, and the server has been left meanwhile."""
    go_on = trio.Event()

    class Server(NurseryTCPServer):
        cleanup_timeout = 0.01

        async def get_request(self) -> tuple[Any, Any]:
            request = await super().get_request()
            with trio.CancelScope(shield=True):
                await go_on.wait()
            return request

    server = Server(LOCALHOST, Tell)
    async with trio.open_nursery() as nursery:
        async with server:
            await nursery.start(server.serve_forever)
            client = pose(server, b"?")
        go_on.set()
    with client, contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""
    seen = server.statistics()
    assert (seen.accepted, seen.failed, seen.active) == (1, 1, 0)
