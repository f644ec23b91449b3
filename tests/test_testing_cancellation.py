"""`check_cancellation` passes what is right, and finds what is wrong, where it is wrong."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import subprocess
import sys
import threading
import types
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any

import pytest
import trio
import trio.testing
from helpers import REAL_LIMIT, bounded, echo_all
from trio.testing import MockClock

from trio_socketserver import (
    BaseRequestHandler,
    ConnectionBroken,
    DatagramRequestHandler,
    NurseryTCPServer,
    NurseryUDPServer,
    StreamRequestHandler,
)
from trio_socketserver.testing import MemoryClient, check_cancellation, memory_connection
from trio_socketserver.testing._watching import DELIVERIES_LIMIT

LOCAL = ("127.0.0.1", 0)


class Oops(Exception):
    """What a test raises."""


class Echo(StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(line)


async def one_line(client: MemoryClient) -> None:
    await client.send_all(b"hello\n")
    assert await client.rfile.readline() == b"hello\n"


async def two_lines(client: MemoryClient) -> None:
    await one_line(client)
    await one_line(client)
    await client.send_eof()
    await client.rfile.read()


async def leaving(client: MemoryClient) -> None:
    await trio.lowlevel.checkpoint()


async def silent(client: MemoryClient) -> None:
    assert await client.receive_some() == b""


def line_of(function: Callable[..., Any], text: str) -> str:
    """Return how a message names the one line of *function* with *text* in it."""
    lines, start = inspect.getsourcelines(function)
    (found,) = (n for n, line in enumerate(lines) if text in line)
    code = function.__code__
    return (
        f"{code.co_filename}:{start + found}, in {code.co_qualname}: {lines[found].strip()}"
    )


async def fault_of(handler: Any, client: Any = one_line, **options: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        await check_cancellation(handler, client, **options)
    return str(caught.value)


# -- what is right -------------------------------------------------------------------------


@pytest.mark.parametrize("handler", [Echo, echo_all])
@bounded
async def test_right_handlers_pass(handler: Any) -> None:
    counts = {await check_cancellation(handler, one_line) for _ in range(5)}
    (count,) = counts  # Each time the same.
    assert count > 10
    assert await check_cancellation(handler, two_lines) > count


@bounded
async def test_passes_with_tasks_limits_and_goodbyes(autojump_clock: MockClock) -> None:
    class Careful(Echo):
        timeout = 60

        async def setup(self) -> None:
            await super().setup()
            await trio.lowlevel.checkpoint()

        async def handle(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.beat)
                with trio.move_on_after(3):
                    await trio.sleep(9)
                try:
                    await super().handle()
                except trio.Cancelled:
                    with trio.move_on_after(1, shield=True):
                        await self.wfile.write(b"cancelled\n")
                        await trio.sleep(9)
                    raise
                nursery.cancel_scope.cancel()

        async def beat(self) -> None:
            while True:
                await trio.sleep(1)

        async def finish(self) -> None:
            await trio.sleep(1)
            await self.wfile.write(b"goodbye\n")
            await super().finish()

    assert await check_cancellation(Careful, two_lines) > 40


@bounded
async def test_every_checkpoint_gets_its_cancellation() -> None:
    """One that looks for a cancellation only, and those of a task of the handler's, too."""

    class Steps(BaseRequestHandler):
        async def handle(self) -> None:
            for n in range(3):
                await self.step(f"wait {n}", trio.testing.wait_all_tasks_blocked)
                await self.step(f"look {n}", trio.lowlevel.checkpoint_if_cancelled)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.step, "task", trio.lowlevel.checkpoint)

        async def step(self, name: str, checkpoint: Any) -> None:
            try:
                await checkpoint()
            except trio.Cancelled:
                cancelled.add(name)
                raise

    cancelled: set[str] = set()
    await check_cancellation(Steps, silent)
    names = [f"{kind} {n}" for kind in ("wait", "look") for n in range(3)]
    assert cancelled == {*names, "task"}


@bounded
async def test_a_cancellation_is_also_found_on_going_on() -> None:
    """A lock that is free only looks for a cancellation, before it is taken."""

    class Locking(BaseRequestHandler):
        async def handle(self) -> None:
            lock = trio.Lock()
            await trio.testing.wait_all_tasks_blocked()
            try:
                await lock.acquire()
            finally:
                lock.release()

    fault = await fault_of(Locking, silent)
    assert fault.startswith(
        f"the handler, cancelled at {line_of(Locking.handle, 'acquire()')}"
    )
    assert "it raised RuntimeError" in fault


@bounded
async def test_a_shield_delays_the_cancellation() -> None:
    class Shielding(BaseRequestHandler):
        async def handle(self) -> None:
            begun.append(self)
            with trio.CancelScope(shield=True):
                for _ in range(3):
                    await trio.testing.wait_all_tasks_blocked()
            whole.append(self)
            await self.request.recv(1)

    begun: list[Any] = []
    whole: list[Any] = []
    count = await check_cancellation(Shielding, leaving)
    assert begun == whole
    assert len(begun) == count + 2  # Undisturbed at the beginning and at the end.


@bounded
async def test_what_cannot_be_cancelled_may_return() -> None:
    """Nobody swallows a cancellation that is never raised."""

    async def to_thread(request: Any, client_address: Any, server: Any) -> None:
        await trio.to_thread.run_sync(threading.get_ident)

    async def shielded(request: Any, client_address: Any, server: Any) -> None:
        with trio.move_on_after(1, shield=True):
            await trio.testing.wait_all_tasks_blocked()
            await trio.lowlevel.checkpoint()

    async def last_step(request: Any, client_address: Any, server: Any) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    for handler in (to_thread, shielded, last_step):
        assert await check_cancellation(handler, silent)


@bounded
async def test_moments_are_before_the_first_step_and_twice_at_each_checkpoint() -> None:
    """Of the two here one is that of closing the connection; none is after the end."""

    async def one_step(request: Any, client_address: Any, server: Any) -> None:
        await trio.lowlevel.checkpoint()

    assert await check_cancellation(one_step, silent) == 1 + 2 * 2


@bounded
async def test_what_finish_cancels_itself_is_no_cancellation_of_the_handler() -> None:
    class Polling(BaseRequestHandler):
        async def handle(self) -> None:
            await trio.lowlevel.cancel_shielded_checkpoint()

        async def finish(self) -> None:
            with trio.move_on_after(0):
                await trio.sleep_forever()

    assert await check_cancellation(Polling, silent)


@bounded
async def test_a_peers_fault_is_none_of_the_handlers() -> None:
    """Nor is it in the place of a cancellation, or out of finish()."""

    class Breaking(Echo):
        async def handle(self) -> None:
            try:
                await super().handle()
            finally:
                raise ConnectionBroken("lost")

        async def finish(self) -> None:
            raise ConnectionBroken("lost, too")

    assert await check_cancellation(Breaking, one_line)


@bounded
async def test_tasks_that_the_handler_ends_are_no_survivors() -> None:
    class Tidy(Echo):
        async def handle(self) -> None:
            scope = await nursery.start(self.background)
            try:
                await super().handle()
            finally:
                scope.cancel()

        async def background(self, task_status: Any) -> None:
            with trio.CancelScope() as scope:
                task_status.started(scope)
                await background()

    async with trio.open_nursery() as nursery:
        assert await check_cancellation(Tidy, one_line)
        assert not nursery.child_tasks


@bounded
async def test_other_tasks_are_nobodys_business(autojump_clock: MockClock) -> None:
    """They may come, go and be cancelled meanwhile."""

    async def busy() -> None:
        while True:
            with trio.move_on_after(1):
                await trio.sleep(2)
            nursery.start_soon(trio.sleep, 0.5)

    class Waiting(Echo):
        async def handle(self) -> None:
            await trio.sleep(7)
            await super().handle()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(busy)
        count = await check_cancellation(Waiting, one_line)
        nursery.cancel_scope.cancel()
    assert count == await check_cancellation(Waiting, one_line)


class Upper(DatagramRequestHandler):
    async def handle(self) -> None:
        await trio.lowlevel.checkpoint()
        self.wfile.write(self.rfile.read().upper())


@pytest.mark.parametrize("handler", [Upper, functools.partial(Upper)])
@bounded
async def test_datagrams(handler: Any) -> None:
    class Late(Upper):
        async def finish(self) -> None:
            await self.socket.sendto(self.reply, self.client_address)

        async def handle(self) -> None:
            await super().handle()
            self.reply = self.wfile.getvalue()

    server = NurseryUDPServer(LOCAL, handler, bind_and_activate=False)
    for options in ({}, {"server": server}):
        assert await check_cancellation(handler, b"hello", **options) > 3
        fault = await fault_of(Late, b"hello", **options)
        assert "- finish() raised AttributeError(" in fault
    assert server.statistics().cancelled


@bounded
async def test_hooks_find_what_they_know_of_the_handler() -> None:
    class Named(Echo):
        protocol = "echo"

    class Server(NurseryTCPServer):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            handler: Any = self.RequestHandlerClass
            protocols.add(handler.protocol)
            return True

    protocols: set[str] = set()
    server = Server(LOCAL, Named, bind_and_activate=False)
    await check_cancellation(Named, one_line, server=server)
    assert protocols == {"echo"}


@bounded
async def test_every_run_is_fresh() -> None:
    seen = []

    class Noting(Echo):
        async def setup(self) -> None:
            await super().setup()
            seen.append((self, self.request, self.server))

    count = await check_cancellation(Noting, one_line)
    assert len(seen) >= count  # Not those cancelled before.
    assert len(set(map(id, [each for run in seen for each in run]))) == 3 * len(seen)


@bounded
async def test_the_client_may_fail_once_the_handler_is_cancelled() -> None:
    async def strict(client: MemoryClient) -> None:
        await one_line(client)
        await one_line(client)

    async def wrong(client: MemoryClient) -> None:
        await client.send_all(b"hello\n")
        assert await client.rfile.readline() == b"good day\n"

    await check_cancellation(Echo, strict)
    with pytest.raises(AssertionError, match="good day"):
        await check_cancellation(Echo, wrong)


@bounded
async def test_a_server_passed_is_used() -> None:
    class Server(NurseryTCPServer):
        finished = 0

        async def finish_request(self, request: Any, client_address: Any) -> None:
            try:
                await super().finish_request(request, client_address)
            finally:
                self.finished += 1

    server = Server(LOCAL, Echo, bind_and_activate=False)
    async with server:
        count = await check_cancellation(Echo, one_line, server=server)
        assert server.RequestHandlerClass is Echo
        assert server.finished > count / 2
        async with memory_connection(Echo, server=server) as client:
            await one_line(client)
    state = types.SimpleNamespace(servers=0)

    async def counting(request: Any, client_address: Any, server: Any) -> None:
        server.servers += 1
        await echo_all(request, client_address, server)

    await check_cancellation(counting, one_line, server=state)
    assert state.servers > 1


# -- what is wrong -------------------------------------------------------------------------


@bounded
async def test_finds_a_finish_that_did_not_run() -> None:
    class Careless(NurseryTCPServer):
        async def finish_request(self, request: Any, client_address: Any) -> None:
            handler = self.RequestHandlerClass(request, client_address, self)
            await handler.setup()
            await handler.handle()
            await handler.finish()

    server = Careless(LOCAL, Echo, bind_and_activate=False)
    fault = await fault_of(Echo, server=server)
    place = line_of(Echo.handle, "async for line")
    hook = line_of(Careless.finish_request, "handler.handle()")
    assert fault == (
        f"the handler, cancelled at {place}\n"
        f"    awaited at {hook}\n"
        "- finish() did not run, although setup() had returned"
    )


@bounded
async def test_finds_a_connection_that_stays_open() -> None:
    class Careless(NurseryTCPServer):
        async def shutdown_request(self, request: Any) -> None:
            await trio.lowlevel.checkpoint()

    server = Careless(LOCAL, Echo, bind_and_activate=False)

    async def hasty(client: MemoryClient) -> None:
        await client.send_all(b"hello\n")

    fault = await fault_of(Echo, hasty, server=server)
    assert fault == "the handler, undisturbed\n- the connection stayed open"


@bounded
async def test_finds_a_connection_that_stays_open_only_if_cancelled() -> None:
    class Polite(NurseryTCPServer):
        is_happy = False

        async def finish_request(self, request: Any, client_address: Any) -> None:
            self.is_happy = False
            await super().finish_request(request, client_address)
            self.is_happy = True

        async def shutdown_request(self, request: Any) -> None:
            if self.is_happy:
                await super().shutdown_request(request)

    server = Polite(LOCAL, Echo, bind_and_activate=False)
    fault = await fault_of(Echo, server=server)
    place = line_of(Echo.handle, "async for line")
    assert fault.startswith(f"the handler, cancelled at {place}\n")
    assert fault.endswith("\n- the connection stayed open")


async def background() -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("kind", ["system", "nursery", "grandchild", "all trio's"])
@bounded
async def test_finds_a_task_that_survives(kind: str) -> None:
    async def parent() -> None:
        trio.lowlevel.spawn_system_task(background, name="background")

    class Leaving(Echo):
        async def handle(self) -> None:
            if kind == "system":
                trio.lowlevel.spawn_system_task(background, name="background")
            elif kind == "nursery":
                nursery.start_soon(background, name="background")
            elif kind == "grandchild":
                async with trio.open_nursery() as own:
                    own.start_soon(parent)
            else:
                nursery.start_soon(trio.sleep_forever, name="background")
            await super().handle()

    async with trio.open_nursery() as nursery:
        fault = await fault_of(Leaving)
        nursery.cancel_scope.cancel()
    function = trio.sleep_forever if kind == "all trio's" else background
    beginning = "the handler, undisturbed\n- its task background survived, at "
    assert fault.startswith(beginning)
    place = fault.removeprefix(beginning)
    assert f", in {function.__qualname__}: " in place
    assert kind == "all trio's" or place == line_of(background, "sleep_forever")


@bounded
async def test_finds_a_task_of_a_setup_that_did_not_return() -> None:
    """Nothing ends it: finish() is for what setup() has completed."""

    class Greedy(Echo):
        async def setup(self) -> None:
            await super().setup()
            self.scope = await nursery.start(self.background)
            await trio.lowlevel.checkpoint()

        async def background(self, task_status: Any) -> None:
            with trio.CancelScope() as scope:
                task_status.started(scope)
                await background()

        async def finish(self) -> None:
            self.scope.cancel()
            await super().finish()

    async with trio.open_nursery() as nursery:
        fault = await fault_of(Greedy)
        nursery.cancel_scope.cancel()
    headline, first, second = fault.splitlines()
    where = line_of(Greedy.setup, "checkpoint()")
    assert headline.removeprefix("the handler, cancelled at ") == where
    assert first.startswith("- its task ")
    assert first.endswith(f" survived, at {line_of(background, 'sleep_forever')}")
    assert second == f"    awaited at {line_of(Greedy.background, 'await background')}"


class SwallowsIt(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        except trio.Cancelled:
            return


class SwallowsItInATask(Echo):
    async def handle(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.swallow)

    async def swallow(self) -> None:
        try:
            await Echo.handle(self)
        except trio.Cancelled:
            return


@pytest.mark.parametrize("handler", [SwallowsIt, SwallowsItInATask])
@bounded
async def test_finds_a_cancellation_that_is_swallowed(handler: Any) -> None:
    headline, chain, *problems = (await fault_of(handler)).splitlines()
    place = line_of(Echo.handle, "async for line")
    swallower = getattr(handler, "swallow", handler.handle)
    assert headline == f"the handler, cancelled at {place}"
    assert chain == f"    awaited at {line_of(swallower, '.handle(')}"
    assert problems == ["- it swallowed Cancelled, and returned"]


@bounded
async def test_finds_a_swallowing_function() -> None:
    async def swallowing(request: Any, client_address: Any, server: Any) -> None:
        try:
            await echo_all(request, client_address, server)
        except BaseException:
            return

    assert "swallowed" in await fault_of(swallowing)


@bounded
async def test_finds_an_error_in_the_place_of_the_cancellation() -> None:
    class Another(Echo):
        async def handle(self) -> None:
            try:
                await super().handle()
            except trio.Cancelled:
                raise error from None

    error = Oops()
    with pytest.raises(AssertionError) as caught:
        await check_cancellation(Another, one_line)
    assert str(caught.value).splitlines()[2:] == ["- it raised Oops()"]
    assert caught.value.__cause__ is error


class GoesOn(Echo):
    async def handle(self) -> None:
        while True:
            try:
                line = await self.rfile.readline()
            except trio.Cancelled:
                continue
            if not line:
                break
            await self.wfile.write(line)


class GoesOnWhateverComes(Echo):
    async def handle(self) -> None:
        line = b"x"
        while line:
            try:
                line = await self.rfile.readline()
                await self.wfile.write(line)
            except BaseException:
                continue


class GoesOnInATask(GoesOn):
    async def handle(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().handle)


@pytest.mark.parametrize("handler", [GoesOn, GoesOnWhateverComes, GoesOnInATask])
@bounded
async def test_finds_a_loop_that_does_not_end(
    handler: Any, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock stands still meanwhile, because nothing waits."""
    fault = await fault_of(handler)
    function = (
        GoesOnWhateverComes.handle if handler is GoesOnWhateverComes else GoesOn.handle
    )
    place = line_of(function, "readline()")
    problem = f"it did not end: Cancelled was raised {DELIVERIES_LIMIT} times, at last at "
    assert fault == f"the handler, cancelled at {place}\n- {problem}{place}"
    assert caplog.messages == [
        f"check_cancellation still waits for the handler: {problem}{place}"
    ]


class HidesForLong(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(60)


class HidesFromItsClient(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await self.rfile.read()
            raise


@pytest.mark.parametrize("handler", [HidesForLong, HidesFromItsClient])
@bounded
async def test_finds_unwinding_that_takes_too_long(
    handler: Any, autojump_clock: MockClock
) -> None:
    headline, _, *problems = (await fault_of(handler)).splitlines()
    place = line_of(Echo.handle, "async for line")
    stuck = line_of(handler.handle, "                await ")
    assert headline == f"the handler, cancelled at {place}"
    assert problems == [f"- it had not ended 5 s after that, and was at {stuck}"]


@bounded
async def test_tells_the_log_of_what_it_cannot_end(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Here what is told ends it."""

    class Telling(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.set()

    class Hiding(Echo):
        async def handle(self) -> None:
            try:
                await super().handle()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await told.wait()
                raise

    told = trio.Event()
    logger, telling = logging.getLogger("trio_socketserver"), Telling()
    logger.addHandler(telling)
    try:
        fault = await fault_of(Hiding)
    finally:
        logger.removeHandler(telling)
    problem = "it had not ended 5 s after that, and was at " + line_of(
        Hiding.handle, "told.wait()"
    )
    assert fault.splitlines()[2:] == [f"- {problem}"]
    assert caplog.messages == [f"check_cancellation still waits for the handler: {problem}"]


@bounded
async def test_the_limit_of_cleaning_up_can_be_chosen(autojump_clock: MockClock) -> None:
    class Finishing(Echo):
        async def handle(self) -> None:
            try:
                await super().handle()
            except trio.Cancelled:
                with trio.CancelScope(shield=True):
                    await trio.sleep(7.5)
                raise

        async def finish(self) -> None:
            await trio.sleep(7)

    assert await check_cancellation(Finishing, one_line, cleanup_timeout=8)
    fault = await fault_of(Finishing, cleanup_timeout=7.2)
    assert "\n- it had not ended 7.2 s after that" in fault
    fault = await fault_of(Finishing, cleanup_timeout=6)
    place = line_of(Finishing.finish, "sleep")
    assert fault == (
        f"the handler, undisturbed\n- finish() took too long, and was cut at {place}"
    )


@bounded
async def test_finds_a_finish_that_fails_after_a_cancellation() -> None:
    class Naming(Echo):
        async def handle(self) -> None:
            await trio.lowlevel.checkpoint()
            self.name = "set by now"
            await super().handle()

        async def finish(self) -> None:
            await trio.lowlevel.checkpoint()
            assert_type: str = self.name
            assert assert_type

    with pytest.raises(AssertionError) as caught:
        await check_cancellation(Naming, one_line)
    headline, problem = str(caught.value).splitlines()
    place = line_of(Naming.handle, "checkpoint()")
    assert headline == f"the handler, cancelled at {place}"
    assert problem.startswith("- finish() raised AttributeError(")
    assert isinstance(caught.value.__cause__, AttributeError)


@bounded
async def test_an_error_of_finish_is_told_once() -> None:
    class Late(BaseRequestHandler):
        async def handle(self) -> None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            self.is_cancelled = trio.current_effective_deadline() == -math.inf

        async def finish(self) -> None:
            if self.is_cancelled:
                raise Oops

    headline, *problems = (await fault_of(Late, silent)).splitlines()
    assert headline == "the handler, cancelled before its first step"
    assert problems == ["- finish() raised Oops()"]


class Awaitable:
    def __await__(self) -> Generator[Any, Any, Any]:
        yield from trio.testing.wait_all_tasks_blocked().__await__()


@contextlib.asynccontextmanager
async def opened() -> AsyncGenerator[None]:
    await trio.testing.wait_all_tasks_blocked()
    yield


@pytest.mark.parametrize("where", ["generator", "context manager"])
@bounded
async def test_finds_places_in_generators(where: str) -> None:
    class Swallowing(BaseRequestHandler):
        async def handle(self) -> None:
            with contextlib.suppress(trio.Cancelled):
                if where == "generator":
                    await Awaitable()
                else:
                    async with opened():
                        await trio.lowlevel.checkpoint()

    fault = await fault_of(Swallowing, silent)
    function = Awaitable.__await__ if where == "generator" else opened.__wrapped__  # type: ignore[attr-defined]
    assert fault.startswith(
        f"the handler, cancelled at {line_of(function, 'tasks_blocked')}"
    )


# -- what is neither -----------------------------------------------------------------------


@bounded
async def test_what_the_handler_raises_undisturbed_is_raised() -> None:
    class Failing(Echo):
        async def handle(self) -> None:
            raise Oops

    with pytest.raises(Oops):
        await check_cancellation(Failing, one_line)


@bounded
async def test_what_the_client_raises_undisturbed_is_raised() -> None:
    async def failing(client: MemoryClient) -> None:
        raise Oops

    with pytest.raises(Oops):
        await check_cancellation(Echo, failing)


@bounded
async def test_blocking_handlers_are_refused() -> None:
    def blocking(request: Any, client_address: Any, server: Any) -> None: ...

    with pytest.raises(TypeError, match="blocking handler"):
        await check_cancellation(blocking, one_line)


@bounded
async def test_can_be_cancelled_itself() -> None:
    ends = []

    class Waiting(Echo):
        async def finish(self) -> None:
            ends.append(self)
            await super().finish()

    async def waiting(client: MemoryClient) -> None:
        await one_line(client)
        scope.cancel()
        await trio.sleep_forever()

    with trio.CancelScope() as scope:
        await check_cancellation(Waiting, waiting)
    assert scope.cancelled_caught
    assert len(ends) == 1


@pytest.mark.parametrize("handler", [Echo, SwallowsIt])
@bounded
async def test_leaves_no_instrument_behind(
    handler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(instrument: Any) -> None:
        instruments.append(instrument)
        add(instrument)

    instruments: list[Any] = []
    add = trio.lowlevel.add_instrument
    monkeypatch.setattr(trio.lowlevel, "add_instrument", noted)
    with contextlib.suppress(AssertionError):
        await check_cancellation(handler, one_line)
    assert instruments
    for instrument in instruments:
        with pytest.raises(KeyError):
            trio.lowlevel.remove_instrument(instrument)


def test_needs_no_test_framework() -> None:
    program = (
        "import sys; sys.modules.update(pytest=None, _pytest=None)\n"
        "import trio_socketserver.testing"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=REAL_LIMIT)
