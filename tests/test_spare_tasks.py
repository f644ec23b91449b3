"""Tasks that run one request after another, and what a request notices of that: nothing."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import pytest
import trio
import trio.testing
from helpers import answer, ask, bounded, pose, receive

from trio_socketserver import (
    BaseRequestHandler,
    NurseryTCPServer,
    NurseryUDPServer,
)
from trio_socketserver._spare_tasks import SPARE_TASKS, SpareTasks

LOCALHOST = ("127.0.0.1", 0)
variable: ContextVar[Any] = ContextVar("variable", default="default")

starters = pytest.mark.parametrize("how", ["start", "start_in_line"])


@contextlib.asynccontextmanager
async def spare_tasks() -> AsyncIterator[SpareTasks]:
    async with trio.open_nursery() as nursery:
        tasks = SpareTasks(nursery, name="request")
        yield tasks
        tasks.dismiss()


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

    async def set(self, value: object) -> None:
        await self.visit()
        variable.set(value)


@starters
async def test_the_next_request_has_the_task_of_the_last(how: str) -> None:
    visitors = Visitors()
    async with spare_tasks() as tasks:
        for _ in range(3):
            getattr(tasks, how)(visitors.visit)
            await trio.testing.wait_all_tasks_blocked()
    assert len(visitors.tasks) == 3
    assert len(set(visitors.tasks)) == 1


@starters
async def test_a_request_that_waits_has_its_task_for_itself(how: str) -> None:
    visitors, events = Visitors(), [trio.Event() for _ in range(4)]
    async with spare_tasks() as tasks:
        for event in events:
            getattr(tasks, how)(visitors.wait, event)
        await trio.testing.wait_all_tasks_blocked()
        assert len(set(visitors.tasks)) == len(visitors.tasks) == 4
        getattr(tasks, how)(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
        assert len(set(visitors.tasks)) == 5
        for event in events:
            event.set()


async def test_requests_that_come_together_and_do_not_wait_share_a_task() -> None:
    visitors = Visitors()
    async with spare_tasks() as tasks:
        for number in range(5):
            variable.set("the starter's")
            tasks.start_in_line(visitors.visit)
            assert not visitors.tasks, f"{number} was not to run yet"
        await trio.testing.wait_all_tasks_blocked()
    assert len(visitors.tasks) == 5
    assert len(set(visitors.tasks)) == 1
    assert visitors.found == ["the starter's"] * 5


async def test_a_line_keeps_its_order_when_one_waits() -> None:
    order: list[int] = []
    event = trio.Event()

    async def note(number: int) -> None:
        order.append(number)
        if number == 2:
            await event.wait()
            order.append(-number)

    async with spare_tasks() as tasks:
        for number in range(3):
            tasks.start_in_line(note, number)
        await trio.testing.wait_all_tasks_blocked()
        assert order == [0, 1, 2]
        event.set()
        await trio.testing.wait_all_tasks_blocked()
        assert order == [0, 1, 2, -2]


async def test_a_line_that_comes_while_one_waits_is_not_held_up() -> None:
    visitors, event = Visitors(), trio.Event()
    async with spare_tasks() as tasks:
        tasks.start_in_line(visitors.wait, event)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            tasks.start_in_line(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
        assert len(visitors.tasks) == 4
        event.set()


async def test_what_a_request_in_a_line_starts_comes_after_the_line() -> None:
    order: list[str] = []
    async with spare_tasks() as tasks:

        async def note(name: str, *more: str) -> None:
            order.append(name)
            for another in more:
                tasks.start_in_line(note, another)

        tasks.start_in_line(note, "a", "d", "e")
        tasks.start_in_line(note, "b", "f")
        tasks.start_in_line(note, "c")
        await trio.testing.wait_all_tasks_blocked()
    assert order == ["a", "b", "c", "d", "e", "f"]


@starters
async def test_context_variables_do_not_pass_to_the_next(how: str) -> None:
    visitors = Visitors()
    async with spare_tasks() as tasks:
        for number in range(3):
            getattr(tasks, how)(visitors.set, number)
        await trio.testing.wait_all_tasks_blocked()
        getattr(tasks, how)(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
    assert visitors.found == ["default"] * 4


@starters
async def test_a_request_finds_the_variables_of_its_starter(how: str) -> None:
    visitors = Visitors()
    async with spare_tasks() as tasks:
        for together in (True, False):
            for number in range(4):
                variable.set(number // 2)
                getattr(tasks, how)(visitors.visit)
                if not together:
                    await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked()
    assert sorted(visitors.found[:4]) == [0, 0, 1, 1]
    assert visitors.found[4:] == [0, 0, 1, 1]


class Incomparable:
    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value is ambiguous")

    __hash__ = None  # type: ignore[assignment]


@starters
async def test_values_that_cannot_be_compared_are_others(how: str) -> None:
    visitors = Visitors()
    async with spare_tasks() as tasks:
        for _ in range(2):
            variable.set(Incomparable())
            getattr(tasks, how)(visitors.set, Incomparable())
            getattr(tasks, how)(visitors.visit)
            await trio.testing.wait_all_tasks_blocked()
    assert len(visitors.found) == 4
    assert visitors.found[0] is visitors.found[1]
    assert visitors.found[2] is visitors.found[3] is variable.get()


async def test_few_tasks_stay() -> None:
    event = trio.Event()
    visitors = Visitors()
    before = trio.lowlevel.current_statistics().tasks_living
    async with spare_tasks() as tasks:
        for _ in range(SPARE_TASKS + 10):
            tasks.start(visitors.wait, event)
        event.set()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == before + SPARE_TASKS
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_who_ends_after_the_dismissal_does_not_stay() -> None:
    visitors, event = Visitors(), trio.Event()
    before = trio.lowlevel.current_statistics().tasks_living
    async with trio.open_nursery() as nursery:
        tasks = SpareTasks(nursery, name="request")
        tasks.start(visitors.wait, event)
        tasks.start(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
        tasks.dismiss()
        tasks.start(visitors.visit)
        event.set()
        await trio.testing.wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == before
    assert len(visitors.tasks) == 3


async def test_a_spare_task_can_be_cancelled() -> None:
    visitors = Visitors()
    async with trio.open_nursery() as nursery:
        tasks = SpareTasks(nursery, name="request")
        tasks.start(visitors.visit)
        tasks.start(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    tasks.dismiss()  # Nobody is left to be dismissed.
    assert len(visitors.tasks) == 2


@starters
async def test_what_is_started_in_a_cancelled_nursery_runs_to_its_first_checkpoint(
    how: str,
) -> None:
    ended: list[str] = []

    async def be_cancelled() -> None:
        try:
            await trio.lowlevel.checkpoint()
        finally:
            ended.append("cancelled")

    visitors = Visitors()
    async with trio.open_nursery() as nursery:
        tasks = SpareTasks(nursery, name="request")
        tasks.start(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(3):
            getattr(tasks, how)(be_cancelled)
        nursery.cancel_scope.cancel()
    assert ended == ["cancelled"] * 3


@starters
async def test_a_crash_takes_nobody_else_s_turn(how: str) -> None:
    visitors = Visitors()

    async def crash() -> None:
        raise KeyboardInterrupt

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            tasks = SpareTasks(nursery, name="request")
            for function in (visitors.visit, crash, visitors.visit, visitors.visit):
                getattr(tasks, how)(function)

    with pytest.raises(BaseExceptionGroup) as raised:
        await main()
    assert [type(error) for error in raised.value.exceptions] == [KeyboardInterrupt]
    assert len(visitors.tasks) == 3


class Interrupted(list[Any]):
    """A list in which Ctrl-C comes just after something has been done."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def append(self, item: Any) -> None:
        super().append(item)
        if self.when == "append":
            raise KeyboardInterrupt

    def pop(self, *args: Any) -> Any:
        item = super().pop(*args)
        if self.when == "pop":
            raise KeyboardInterrupt
        return item


@pytest.mark.parametrize("when", ["append", "pop"])
async def test_an_interrupt_leaves_no_task_behind(when: str) -> None:
    visitors = Visitors()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            tasks = SpareTasks(nursery, name="request")
            tasks._spare = Interrupted(when)
            try:
                tasks.start(visitors.visit)
                await trio.testing.wait_all_tasks_blocked()
                assert when == "pop"
                tasks.start(visitors.visit)
            finally:
                await trio.lowlevel.cancel_shielded_checkpoint()
                tasks.dismiss()

    with pytest.raises(BaseExceptionGroup) as raised:
        await main()
    assert raised.group_contains(KeyboardInterrupt)
    assert not raised.group_contains(Exception)
    assert len(visitors.tasks) == 1


@starters
async def test_a_spare_task_does_not_keep_what_it_has_run(how: str) -> None:
    class Request:
        pass

    async def look(request: Request) -> None:
        assert isinstance(request, Request)

    async with spare_tasks() as tasks:
        request = Request()
        reference = weakref.ref(request)
        getattr(tasks, how)(look, request)
        del request
        await trio.testing.wait_all_tasks_blocked()
        assert reference() is None


class Wakes(trio.abc.Instrument):
    def __init__(self) -> None:
        self.steps: list[trio.lowlevel.Task] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.steps.append(task)


async def test_a_spare_task_does_not_wake_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    visitors, wakes = Visitors(), Wakes()
    async with spare_tasks() as tasks:
        tasks.start(visitors.visit)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(wakes)
        await trio.sleep(100_000)
        trio.lowlevel.remove_instrument(wakes)
    assert visitors.tasks[0] not in wakes.steps
    assert wakes.steps, "the instrument saw this task, at least"


# -- in a server ---------------------------------------------------------------------


class TellTask(BaseRequestHandler):
    """Answers with what it finds, and leaves something behind."""

    async def handle(self) -> None:
        self.server.tasks.append(trio.lowlevel.current_task())
        found = str(variable.get()).encode()
        variable.set("left behind")
        if isinstance(self.request, tuple):
            await self.request[1].sendto(found, self.client_address)
        else:
            await self.request.recv(100)
            await self.request.sendall(found)


class Quiet(BaseRequestHandler):
    async def handle(self) -> None:
        self.server.tasks.append(trio.lowlevel.current_task())
        if isinstance(self.request, tuple):
            self.request[1].sendto_now(b"done", self.client_address)
        else:
            await self.request.recv(100)
            await self.request.sendall(b"done")


each_server = pytest.mark.parametrize("server_class", [NurseryTCPServer, NurseryUDPServer])


@contextlib.asynccontextmanager
async def serving(server_class: Any, handler: Any, **attributes: Any) -> AsyncIterator[Any]:
    class Server(server_class):  # type: ignore[misc]
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.tasks: list[trio.lowlevel.Task] = []
            vars(self).update(attributes)

    async with Server(LOCALHOST, handler) as server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield server
        await server.shutdown()


@each_server
@bounded
async def test_what_a_handler_sets_is_not_seen_by_the_next(server_class: Any) -> None:
    async with serving(server_class, TellTask) as server:
        for _ in range(3):
            assert await ask(server, b"?") == b"default"
        clients = [pose(server, b"?") for _ in range(5)]
        for client in clients:
            with client:
                assert await answer(client) == b"default"


@each_server
@pytest.mark.parametrize("reuse", [True, False])
@bounded
async def test_reuse_tasks(server_class: Any, reuse: bool) -> None:
    async with serving(server_class, Quiet, reuse_tasks=reuse) as server:
        for _ in range(3):
            assert await ask(server, b"?") == b"done"
            await trio.testing.wait_all_tasks_blocked()
        assert len(server.tasks) == 3
        assert len(set(server.tasks)) == (1 if reuse else 3)


@bounded
async def test_a_hook_of_the_loop_sets_variables_for_its_own_request() -> None:
    class Server(NurseryUDPServer):
        async def get_request(self) -> tuple[Any, Any]:
            request, client_address = await super().get_request()
            variable.set(request[0])
            return request, client_address

    class Tell(BaseRequestHandler):
        async def handle(self) -> None:
            self.request[1].sendto_now(variable.get(), self.client_address)

    async with Server(LOCALHOST, Tell) as server:
        names = [f"{number}".encode() for number in range(6)]
        clients = [pose(server, name) for name in names]  # They come as one batch.
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            for name, client in zip(names, clients, strict=True):
                with client:
                    assert await receive(client) == name
            await server.shutdown()


@each_server
@bounded
async def test_leaving_the_server_ends_spare_tasks(server_class: Any) -> None:
    before = trio.lowlevel.current_statistics().tasks_living
    async with serving(server_class, Quiet) as server:
        for _ in range(3):
            await ask(server, b"?")
    assert trio.lowlevel.current_statistics().tasks_living == before
    assert server.statistics().completed == 3


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

    async with NurseryUDPServer(LOCALHOST, meet) as server:
        clients = [pose(server, b"?") for _ in range(5)]
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            for client in clients:
                with client:
                    assert await receive(client) == b"met"
            await server.shutdown()
