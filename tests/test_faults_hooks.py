"""Exceptions, interrupts and broken logging at every place of a user's, in every world.

test_promise_6_errors has the same for tasks; here are threads and child processes, and what
they do to the others who are served.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from faults import (
    PLACES_OF_HANDLERS,
    STREAM_WORLDS,
    World,
    all_ended,
    assert_answers,
    assert_echoes,
    assert_says_goodbye,
    assert_serves,
    comes_true,
    each,
    forks,
    greeted,
    in_each_datagram_world,
    in_each_world,
    name_of,
    receive_exactly,
)
from helpers import assert_sums_up, bounded, connect, is_refused, receive_to_end
from promises import RaisingFilter, serve, serving
from promises import broken_logging as broken_logging

from trio_socketserver import RequestTimeout

pytestmark = forks

PLACES_OF_THE_LOOP = ("verify_request", "process_request")
PLACES_OF_A_REQUEST = (
    "finish_request",
    "shutdown_request",
    "close_request",
    "handle_error",
)
HOOKS = PLACES_OF_THE_LOOP + PLACES_OF_A_REQUEST
PLACES = HOOKS + PLACES_OF_HANDLERS

in_threads_and_children = each(STREAM_WORLDS[1:])


class FaultyHooks:
    """Mixed into a server of `World.make`: each hook may raise."""

    async def get_request(self) -> Any:
        self.reach("get_request")  # type: ignore[attr-defined]
        return await super().get_request()  # type: ignore[misc]

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        self.reach("verify_request")  # type: ignore[attr-defined]
        return True

    async def process_request(self, request: Any, client_address: Any) -> None:
        self.reach("process_request")  # type: ignore[attr-defined]
        await super().process_request(request, client_address)  # type: ignore[misc]

    async def finish_request(self, request: Any, client_address: Any) -> None:
        self.reach("finish_request")  # type: ignore[attr-defined]
        if self.place == "handle_error" and self.error:  # type: ignore[attr-defined]
            raise LookupError("so that there is an error to handle")
        await super().finish_request(request, client_address)  # type: ignore[misc]

    async def shutdown_request(self, request: Any) -> None:
        self.reach("shutdown_request")  # type: ignore[attr-defined]
        await super().shutdown_request(request)  # type: ignore[misc]

    async def close_request(self, request: Any) -> None:
        self.reach("close_request")  # type: ignore[attr-defined]
        await super().close_request(request)  # type: ignore[misc]

    async def handle_error(self, request: Any, client_address: Any) -> None:
        self.reach("handle_error")  # type: ignore[attr-defined]
        await super().handle_error(request, client_address)  # type: ignore[misc]


class Ticking(FaultyHooks):
    async def service_actions(self) -> None:
        self.reach("service_actions")  # type: ignore[attr-defined]

    async def handle_timeout(self) -> None:
        self.reach("handle_timeout")  # type: ignore[attr-defined]


async def be_victim(server: Any) -> None:
    """Be the client whose request meets the fault."""
    with connect(server.server_address) as client:
        with contextlib.suppress(OSError):
            client.sendall(b"ping\n")
            client.shutdown(socket.SHUT_WR)
        await receive_to_end(client)


# -- exceptions ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@in_threads_and_children
@bounded
async def test_an_exception_costs_its_own_request(
    world: World, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make(FaultyHooks)
    async with serving(server):
        with await greeted(server) as served_already:
            server.place, server.error = place, ValueError("a fault")
            await be_victim(server)
            await comes_true(lambda: server.statistics().failed == 1)
            server.error = None  # It was a child's copy that has raised it.
            await assert_serves(server)
            await assert_echoes(served_already)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.exc_info is not None
    assert repr(record.exc_info[1]) == "ValueError('a fault')"
    if place == "handle_error":
        assert "handle_error() failed" in record.getMessage()
        assert not server.errors
    else:
        assert [repr(error) for error in server.errors] == ["ValueError('a fault')"]
    assert server.statistics().completed == 2
    assert server.statistics().failed == 1


@in_threads_and_children
@bounded
async def test_verify_request_that_raises_denies(world: World) -> None:
    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        if client_address in banned:
            raise LookupError("no such user")
        return True

    banned: set[Any] = set()
    server = world.make(verify_request=verify_request)
    async with serving(server):
        # It connects, and is banned, before the loop has a chance to look.
        with connect(server.server_address) as client:
            banned.add(client.getsockname())
            assert await receive_to_end(client) == b""
        await assert_serves(server)
        await all_ended(server)
    # Nothing was started for who has been denied.
    assert [str(error) for error in server.errors] == ["no such user"]
    assert server.statistics().completed == 1


@in_each_world
@bounded
async def test_verify_request_comes_before_any_byte_is_read(world: World) -> None:
    async def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        with socket.socket(fileno=os.dup(request.fileno())) as copy:
            seen.append(copy.recv(100, socket.MSG_PEEK))
        return seen != [b"first\n"]

    seen: list[bytes] = []
    server = world.make(verify_request=verify_request)
    # The kernel has each line before the loop begins to look.
    with (
        connect(server.server_address) as denied,
        connect(server.server_address) as admitted,
    ):
        denied.sendall(b"first\n")
        admitted.sendall(b"second\n")
        async with serving(server):
            assert await receive_to_end(denied) == b""
            assert await receive_exactly(admitted, 13) == b"hello\nsecond\n"
            admitted.shutdown(socket.SHUT_WR)
            await all_ended(server)
    assert seen == [b"first\n", b"second\n"]
    assert (server.statistics().rejected, server.statistics().completed) == (1, 1)


# -- SystemExit and KeyboardInterrupt ------------------------------------------------------


def is_contained(world: World, place: str, error_type: type[BaseException]) -> bool:
    """Tell whether an interrupt ends its own request only, as the design says.

    That is SystemExit in a thread or a child, where the handler is all there is to exit.
    """
    return (
        error_type is SystemExit
        and place in PLACES_OF_HANDLERS
        and (world.is_blocking or world.forks)
    )


INTERRUPTS = [
    pytest.param(world, place, error_type, id=f"{name_of(world)}-{place}-{word}")
    for world, place, (word, error_type) in itertools.product(
        STREAM_WORLDS,
        (*PLACES, "get_request", "service_actions"),
        (("exit", SystemExit), ("interrupt", KeyboardInterrupt)),
    )
]


@pytest.mark.parametrize(
    ("world", "place", "error_type"),
    [param for param in INTERRUPTS if not is_contained(*param.values)],  # type: ignore[arg-type]
)
@bounded
async def test_an_interrupt_ends_the_server(
    world: World,
    place: str,
    error_type: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def be_clients() -> None:
        with await greeted(server) as served_already:
            await comes_true(lambda: server.statistics().accepted == 1)
            server.place, server.error = place, error
            await be_victim(server)
            assert await receive_to_end(served_already) == b""
            ended.append("served already")

    server = world.make(FaultyHooks if place != "service_actions" else Ticking)
    error = error_type("enough")
    ended: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(be_clients)
        with pytest.raises(error_type, match="enough") as caught:
            await serve(server)
        assert server.fileno() == -1
        assert is_refused(server.server_address)
    # Bare, and never an error of a request.
    if not (world.forks and place in PLACES_OF_HANDLERS):
        assert caught.value is error
    assert ended == ["served already"]
    assert all(isinstance(error, LookupError) for error in server.errors)
    assert len(caplog.records) == len(server.errors)
    assert_sums_up(server)
    # Whoever starts anew, has the port at once.
    server = world.make(address=server.server_address)
    async with serving(server):
        await assert_serves(server)
        await all_ended(server)


@pytest.mark.parametrize(
    ("world", "place", "error_type"),
    [param for param in INTERRUPTS if is_contained(*param.values)],  # type: ignore[arg-type]
)
@bounded
async def test_system_exit_in_a_thread_or_child_ends_its_own_request(
    world: World,
    place: str,
    error_type: type[BaseException],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = world.make(FaultyHooks)
    async with serving(server):
        with await greeted(server) as served_already:
            server.place, server.error = place, error_type("enough")
            await be_victim(server)
            await comes_true(lambda: server.statistics().active == 1)
            server.error = None  # It was a child's copy that has raised it.
            await assert_serves(server)
            await assert_echoes(served_already)
            await assert_says_goodbye(served_already)
        await all_ended(server)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "SystemExit('enough')" in record.getMessage()
    assert not server.errors


@pytest.mark.parametrize("error_type", [SystemExit, KeyboardInterrupt])
@in_each_world
@bounded
async def test_an_interrupt_in_handle_timeout_ends_handle_request(
    world: World, error_type: type[BaseException]
) -> None:
    server = world.make(Ticking, timeout=0)
    server.place, server.error = "handle_timeout", error_type("enough")
    with pytest.raises(error_type, match="enough"):
        await server.handle_request()
    # Without `async with` the listener stays; the next call serves.
    async with server:
        server.timeout = None
        with connect(server.server_address) as client:
            client.shutdown(socket.SHUT_WR)
            await server.handle_request()
            assert await receive_to_end(client) == b"hello\n"


@pytest.mark.parametrize("error_type", [SystemExit, KeyboardInterrupt])
@in_each_datagram_world
@bounded
async def test_an_interrupt_for_a_datagram(
    world: World, error_type: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def handle(self: Any) -> None:
        if self.packet == b"stop":
            raise error_type("enough")
        self.wfile.write(self.packet)

    async def handle_in_task(self: Any) -> None:
        handle(self)

    own_handler = type(
        world.handler.__name__,
        (world.handler,),
        {"handle": handle if world.is_blocking else handle_in_task},
    )
    server = world.make()
    server.RequestHandlerClass = own_handler
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(server.server_address)
        client.send(b"stop")
        if is_contained(world, "handle", error_type):
            async with serving(server):
                await comes_true(lambda: bool(caplog.records))
                await assert_answers(server)
                await all_ended(server)
            [record] = caplog.records
            assert record.levelname == "WARNING"
        else:
            with pytest.raises(error_type, match="enough"):
                await serve(server)
            assert server.fileno() == -1
            assert not caplog.records
    assert not server.errors
    assert_sums_up(server)


@pytest.mark.parametrize("error_type", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("hook", ["server_bind", "server_activate"])
@in_each_world
def test_an_interrupt_in_the_constructor_leaves_nothing(
    world: World, hook: str, error_type: type[BaseException]
) -> None:
    def interrupt(self: Any) -> None:
        getattr(super(type(self), self), hook)()
        bound.append(self.socket.getsockname())
        raise error_type("enough")

    bound: list[Any] = []
    with pytest.raises(error_type, match="enough"):
        world.make(**{hook: interrupt})
    assert is_refused(bound[0])  # The socket itself is for the leak fixture to see.


@pytest.mark.parametrize("error_type", [SystemExit, KeyboardInterrupt])
@in_each_world
@bounded
async def test_an_interrupt_in_server_close_leaves_nothing(
    world: World, error_type: type[BaseException]
) -> None:
    async def server_close(self: Any) -> None:
        raise error_type("enough")

    async def leave_with_a_client() -> None:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            clients.append(await greeted(server))
            await server.shutdown()

    server = world.make(server_close=server_close)
    clients: list[socket.socket] = []
    with pytest.raises(error_type, match="enough"):
        await leave_with_a_client()
    with clients[0] as client:
        assert await receive_to_end(client) == b""
    assert server.fileno() == -1
    assert is_refused(server.server_address)
    assert_sums_up(server)


@pytest.mark.parametrize("error_type", [SystemExit, KeyboardInterrupt])
@in_each_world
@bounded
async def test_an_interrupt_in_the_body_cancels_what_is_served(
    world: World, error_type: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    async def leave_with_a_client() -> None:
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            clients.append(await greeted(server))
            nursery.cancel_scope.cancel()
            raise error

    server = world.make()
    error = error_type("enough")
    clients: list[socket.socket] = []
    with pytest.raises(BaseExceptionGroup) as caught:
        await leave_with_a_client()
    # The group is of the test's own nursery.
    assert caught.value.exceptions == (error,)
    with clients[0] as client:
        assert await receive_to_end(client) == b""
    assert is_refused(server.server_address)
    assert server.statistics().cancelled == 1
    assert not server.errors
    assert not caplog.records


# -- broken logging ------------------------------------------------------------------------


class RaisingHandler(logging.Handler):
    """A handler of the log, as a full disk or a lost server makes it."""

    def __init__(self) -> None:
        super().__init__()
        self.emitted = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.emitted += 1
        raise OSError("no space left on the log")


@pytest.fixture
def broken_handler() -> Iterator[RaisingHandler]:
    logger = logging.getLogger("trio_socketserver")
    broken = RaisingHandler()
    logger.addHandler(broken)
    yield broken
    logger.removeHandler(broken)


@pytest.mark.parametrize("place", [*HOOKS, "handle"])
@in_threads_and_children
@bounded
async def test_logging_that_raises_costs_nobody_anything(
    world: World, place: str, broken_logging: RaisingFilter
) -> None:
    server = world.make(FaultyHooks)
    async with serving(server):
        server.place, server.error = place, ValueError("a fault")
        await be_victim(server)
        await comes_true(lambda: server.statistics().failed == 1)
        server.error = None
        await assert_serves(server)
        await all_ended(server)
    assert broken_logging.asked
    assert server.statistics().completed == 1


@pytest.mark.parametrize("place", ["handle", "handle_error"])
@in_each_world
@bounded
async def test_a_handler_of_the_log_that_raises_costs_nobody_anything(
    world: World, place: str, broken_handler: RaisingHandler
) -> None:
    server = world.make(FaultyHooks)
    async with serving(server):
        for count in (1, 2):
            server.place, server.error = place, ValueError("a fault")
            await be_victim(server)
            await comes_true(lambda count=count: server.statistics().failed == count)
        server.error = None
        await assert_serves(server)
        await all_ended(server)
    assert broken_handler.emitted == 2


@in_each_world
@bounded
async def test_a_shortage_with_a_broken_log_ends_all_the_same(
    world: World, broken_handler: RaisingHandler
) -> None:
    async def get_request(self: Any) -> Any:
        if errors:
            raise errors.pop()
        return await super(type(self), self).get_request()

    errors = [OSError(24, "Too many open files")] * 3
    server = world.make(get_request=get_request)
    async with serving(server):
        await assert_serves(server)
        await all_ended(server)
    assert not errors
    assert broken_handler.emitted == 1


class MuteError(TimeoutError):
    """An error of the peer's kind, by a program whose ``__str__()`` has a bug."""

    def __str__(self) -> str:
        raise AttributeError("no such attribute")


@pytest.mark.parametrize("place", [*HOOKS, "handle", "finish"])
@in_each_world
@bounded
async def test_an_error_that_cannot_be_shown_costs_its_own_request(
    world: World, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="trio_socketserver")
    server = world.make(FaultyHooks)
    async with serving(server):
        server.place, server.error = place, MuteError()
        await be_victim(server)
        await comes_true(lambda: server.statistics().failed == 1)
        server.error = None
        await assert_serves(server)
        await all_ended(server)
    assert caplog.records
    assert server.statistics().completed == 1


@bounded
async def test_an_error_that_cannot_be_shown_replaces_no_cancellation(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = STREAM_WORLDS[0].make(FaultyHooks, request_timeout=10)
    caplog.set_level(logging.INFO, logger="trio_socketserver")
    server.place, server.error = "finish", MuteError()
    async with serving(server):
        with await greeted(server) as client:
            assert await receive_to_end(client) == b""
        await all_ended(server)
    assert [type(error) for error in server.errors] == [RequestTimeout]
    assert len(caplog.records) == 2  # Of finish(), and of the request.


@pytest.mark.parametrize("error_type", [SystemExit, KeyboardInterrupt])
@in_each_world
@bounded
async def test_an_interrupt_in_a_filter_of_the_log_ends_the_server(
    world: World, error_type: type[BaseException]
) -> None:
    def interrupt(record: logging.LogRecord) -> bool:
        raise error

    server = world.make(FaultyHooks)
    error = error_type("enough")
    server.place, server.error = "handle", ValueError("a fault")
    logger = logging.getLogger("trio_socketserver")
    logger.addFilter(interrupt)
    try:
        with connect(server.server_address) as client:
            client.sendall(b"ping\n")
            with pytest.raises(error_type, match="enough") as caught:
                await serve(server)
    finally:
        logger.removeFilter(interrupt)
    assert caught.value is error
    assert is_refused(server.server_address)
    assert_sums_up(server)
