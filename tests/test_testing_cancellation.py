"""`check_cancellation` passes what is right, and finds what is wrong, where it is wrong."""

from __future__ import annotations

import contextlib
import inspect
import subprocess
import sys
import types
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import REAL_LIMIT, bounded, echo_all, running
from trio.testing import MockClock

from trio_socketserver import BaseRequestHandler, NurseryTCPServer, StreamRequestHandler
from trio_socketserver.testing import MemoryClient, check_cancellation, memory_connection
from trio_socketserver.testing._driving import STOPS_LIMIT

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

    async def nothing(client: MemoryClient) -> None:
        assert await client.receive_some() == b""

    cancelled: set[str] = set()
    await check_cancellation(Steps, nothing)
    names = [f"{kind} {n}" for kind in ("wait", "look") for n in range(3)]
    assert cancelled == {*names, "task"}


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
    assert fault == (
        f"the handler, cancelled at {place}\n"
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


@pytest.mark.parametrize("kind", ["system", "nursery", "grandchild"])
@bounded
async def test_finds_a_task_that_survives(kind: str) -> None:
    async def background() -> None:
        await trio.sleep_forever()

    async def parent() -> None:
        trio.lowlevel.spawn_system_task(background, name="background")

    class Leaving(Echo):
        async def handle(self) -> None:
            if kind == "system":
                trio.lowlevel.spawn_system_task(background, name="background")
            elif kind == "nursery":
                nursery.start_soon(background, name="background")
            else:
                async with trio.open_nursery() as own:
                    own.start_soon(parent)
            await super().handle()

    async with trio.open_nursery() as nursery:
        fault = await fault_of(Leaving)
        nursery.cancel_scope.cancel()
    place = line_of(background, "sleep_forever")
    assert fault == (
        f"the handler, undisturbed\n- its task background survived, at {place}"
    )


@bounded
async def test_finds_a_task_that_survives_only_if_cancelled() -> None:
    async def background() -> None:
        await trio.sleep_forever()

    class Leaving(Echo):
        async def handle(self) -> None:
            with trio.CancelScope() as scope:
                nursery.start_soon(run_in, scope)
                await super().handle()
            scope.cancel()

    async def run_in(scope: trio.CancelScope) -> None:
        with trio.CancelScope() as own:
            scopes[scope] = own
            await background()

    class Ending(Leaving):
        async def handle(self) -> None:
            await super().handle()
            for own in scopes.values():
                own.cancel()
            await trio.testing.wait_all_tasks_blocked()

    scopes: dict[trio.CancelScope, trio.CancelScope] = {}
    async with trio.open_nursery() as nursery:
        fault = await fault_of(Ending)
        nursery.cancel_scope.cancel()
    place = line_of(Echo.handle, "async for line")
    assert fault.startswith(f"the handler, cancelled at {place}\n- its task ")
    assert fault.endswith(f" survived, at {line_of(background, 'sleep_forever')}")


class SwallowsIt(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        except trio.Cancelled:
            return


class TurnsItIntoAnother(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        except trio.Cancelled:
            raise Oops from None


class SwallowsItInATask(Echo):
    async def handle(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.swallow)

    async def swallow(self) -> None:
        try:
            await Echo.handle(self)
        except trio.Cancelled:
            return


@pytest.mark.parametrize("handler", [SwallowsIt, TurnsItIntoAnother, SwallowsItInATask])
@bounded
async def test_finds_a_cancellation_that_is_swallowed(handler: Any) -> None:
    fault = await fault_of(handler)
    place = line_of(Echo.handle, "async for line")
    headline, first, *rest = fault.splitlines()
    assert headline == f"the handler, cancelled at {place}"
    assert first == f"- Cancelled, raised at {place}, was swallowed"
    raises = handler is TurnsItIntoAnother
    assert rest == (["- it raised Oops()"] if raises else [])


@bounded
async def test_finds_a_swallowing_function() -> None:
    async def swallowing(request: Any, client_address: Any, server: Any) -> None:
        try:
            await echo_all(request, client_address, server)
        except BaseException:
            return

    assert "was swallowed" in await fault_of(swallowing)


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
async def test_finds_a_loop_that_does_not_end(handler: Any) -> None:
    fault = await fault_of(handler)
    function = (
        GoesOnWhateverComes.handle if handler is GoesOnWhateverComes else GoesOn.handle
    )
    place = line_of(function, "readline()")
    assert fault == (
        f"the handler, cancelled at {place}\n- it did not end: it passed {STOPS_LIMIT} "
        f"checkpoints after that, and was at {place}"
    )


@bounded
async def test_finds_a_loop_that_does_not_end_without_its_client() -> None:
    class NoEnd(Echo):
        async def handle(self) -> None:
            while True:
                await self.rfile.readline()

    async def silent(client: MemoryClient) -> None:
        await client.send_eof()

    fault = await fault_of(NoEnd, silent)
    assert fault.startswith("the handler, undisturbed\n- it did not end: ")
    assert fault.endswith(f"and was at {line_of(NoEnd.handle, 'readline()')}")


def test_what_never_ends_does_not_hold_up_the_programs_end(tmp_path: Path) -> None:
    """It is left behind, and nothing asks it to end once more."""
    here = str(Path(__file__).parent)
    program = (
        f"import sys, trio; sys.path.insert(0, {here!r})\n"
        "import test_testing_cancellation as t\n"
        "trio.run(t.fault_of, t.GoesOnWhateverComes)\n"
        "print('done')\n"
    )
    with running("-c", program, folder=tmp_path) as process:
        assert process.communicate(timeout=REAL_LIMIT) == ("done\n", "")
    assert process.returncode == 0


class HidesForEver(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep_forever()


class HidesForLong(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(60)


class HidesAgainAndAgain(Echo):
    async def handle(self) -> None:
        try:
            await super().handle()
        except trio.Cancelled:
            while True:
                with contextlib.suppress(trio.Cancelled), trio.CancelScope(shield=True):
                    await trio.sleep(60)


@pytest.mark.parametrize("handler", [HidesForEver, HidesForLong, HidesAgainAndAgain])
@bounded
async def test_finds_a_cleanup_that_takes_too_long(
    handler: Any, autojump_clock: MockClock
) -> None:
    fault = await fault_of(handler)
    place = line_of(Echo.handle, "async for line")
    stuck = line_of(handler.handle, "await trio.sleep")
    assert fault == (
        f"the handler, cancelled at {place}\n"
        f"- it had not ended 5 s after that, and was at {stuck}"
    )


@bounded
async def test_the_limit_of_cleaning_up_can_be_chosen(autojump_clock: MockClock) -> None:
    class Finishing(Echo):
        async def finish(self) -> None:
            await trio.sleep(7)

    assert await check_cancellation(Finishing, one_line, cleanup_timeout=8)
    fault = await fault_of(Finishing, cleanup_timeout=6)
    assert fault.endswith(
        f"- finish() took too long, and was cut at {line_of(Finishing.finish, 'sleep')}"
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

    async def silent(client: MemoryClient) -> None:
        assert await client.receive_some() == b""

    fault = await fault_of(Swallowing, silent)
    function = Awaitable.__await__ if where == "generator" else opened.__wrapped__  # type: ignore[attr-defined]
    assert f"- Cancelled, raised at {line_of(function, 'tasks_blocked')}, was" in fault


@bounded
async def test_what_is_in_foreign_nurseries_is_not_touched(
    autojump_clock: MockClock,
) -> None:
    class Both(Echo):
        async def handle(self) -> None:
            try:
                await super().handle()
            except trio.Cancelled:
                nursery.start_soon(shielded)
                with trio.CancelScope(shield=True):
                    await trio.sleep_forever()

    async def shielded() -> None:
        with trio.CancelScope(shield=True) as scope:
            scopes.append(scope)
            await trio.sleep_forever()

    scopes: list[trio.CancelScope] = []
    async with trio.open_nursery() as nursery:
        with pytest.raises(AssertionError):
            await check_cancellation(Both, one_line)
        assert all(scope.shield for scope in scopes)
        for scope in scopes:
            scope.cancel()


@bounded
async def test_what_trio_refuses_is_refused() -> None:
    class Foreign:
        def __await__(self) -> Generator[Any, Any, Any]:
            yield "what asyncio would take"

    class Awaiting(Echo):
        async def handle(self) -> None:
            await Foreign()

    with pytest.raises(TypeError, match="asyncio"):
        await check_cancellation(Awaiting, one_line)


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


def test_needs_no_test_framework() -> None:
    program = (
        "import sys; sys.modules.update(pytest=None, _pytest=None)\n"
        "import trio_socketserver.testing"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=REAL_LIMIT)
