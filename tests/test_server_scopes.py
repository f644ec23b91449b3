"""What a server's two cancel scopes cancel, and which exceptions leave its block."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from helpers import answer, bounded, connect, pose, receive_to_end
from lifecycles import LOOPBACK, Gate, entered_or_not, entering, stuck, tcp_servers
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import BaseRequestHandler, NurseryTCPServer


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


async def test_a_plain_with_says_what_to_write() -> None:
    async with NurseryTCPServer(LOOPBACK, stuck) as server:
        match = "'async with' for a NurseryTCPServer"
        with pytest.raises(TypeError, match=match), server:
            pass
