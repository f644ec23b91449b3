"""Promise 3: whatever ends a request, it is finished, closed and counted."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    assert_sums_up,
    bind_address,
    bounded,
    connect,
    datagram_client,
    receive,
    receive_to_end,
)
from promises import (
    ALL_SERVERS,
    AtStep,
    converse,
    do_nothing,
    each_server,
    each_stream_server,
    instrumented,
    noting_handler,
    records,
    serving,
    talk_datagrams,
)
from promises import log_everything as log_everything
from trio.lowlevel import checkpoint

from trio_socketserver import (
    BaseRequestHandler,
    DatagramRequestHandler,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)


class VerifyWaits:
    async def verify_request(self, request: Any, client_address: Any) -> bool:
        await checkpoint()
        verdict = await super().verify_request(request, client_address)  # type: ignore[misc]
        await checkpoint()
        return verdict


class VerifyRefuses:
    async def verify_request(self, request: Any, client_address: Any) -> bool:
        await checkpoint()
        return False


class GetRequestWaits:
    async def get_request(self) -> tuple[Any, Any]:
        await checkpoint()
        return await super().get_request()  # type: ignore[misc]


class GetRequestWraps:
    async def get_request(self) -> tuple[Any, Any]:
        request, client_address = await super().get_request()  # type: ignore[misc]
        return trio.StapledStream(request, request), client_address


class ProcessWaits:
    async def process_request(self, request: Any, client_address: Any) -> None:
        await checkpoint()
        await super().process_request(request, client_address)  # type: ignore[misc]
        await checkpoint()


class FinishWaits:
    async def finish_request(self, request: Any, client_address: Any) -> None:
        await checkpoint()
        await super().finish_request(request, client_address)  # type: ignore[misc]
        await checkpoint()


class ShutdownWaits:
    async def shutdown_request(self, request: Any) -> None:
        await checkpoint()
        await super().shutdown_request(request)  # type: ignore[misc]
        await checkpoint()


class CloseWaits:
    async def close_request(self, request: Any) -> None:
        await checkpoint()
        await super().close_request(request)  # type: ignore[misc]
        await checkpoint()


class CloseFails:
    async def shutdown_request(self, request: Any) -> None:
        await checkpoint()
        raise ValueError("not closed")

    async def handle_error(self, request: Any, client_address: Any) -> None:
        await checkpoint()


class HandleErrorWaits:
    async def finish_request(self, request: Any, client_address: Any) -> None:
        await super().finish_request(request, client_address)  # type: ignore[misc]
        raise ValueError("a fault of ours")

    async def handle_error(self, request: Any, client_address: Any) -> None:
        await checkpoint()
        assert isinstance(sys.exception(), ValueError)
        await checkpoint()


class TimesOut:
    request_timeout = 1000.0


HOOKS: dict[str, tuple[type, ...]] = {
    "no_hook": (),
    "verify_request": (VerifyWaits,),
    "verify_request_refuses": (VerifyRefuses,),
    "get_request": (GetRequestWaits,),
    "get_request_wraps": (GetRequestWraps,),
    "process_request": (ProcessWaits,),
    "finish_request": (FinishWaits,),
    "shutdown_request": (ShutdownWaits,),
    "shutdown_request_fails": (CloseFails,),
    "close_request": (CloseWaits,),
    "handle_error": (HandleErrorWaits,),
    "request_timeout": (TimesOut,),
    "all_at_once": (
        TimesOut,
        VerifyWaits,
        GetRequestWaits,
        GetRequestWraps,
        ProcessWaits,
        FinishWaits,
        ShutdownWaits,
        CloseWaits,
        HandleErrorWaits,
    ),
}


def with_hooks(server_class: type[Any], hooks: str) -> type[Any]:
    mix_ins = HOOKS[hooks]
    if issubclass(server_class, UDPServer):
        mix_ins = tuple(hook for hook in mix_ins if hook is not GetRequestWraps)
    return type(f"With_{hooks}", (*mix_ins, server_class), {})


def open_files() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{number}")
        for number in os.listdir("/proc/self/fd")
        if os.path.lexists(f"/proc/self/fd/{number}")
    }


async def interrupted_at_step(
    count: int, server_class: type[Any], folder: Path, handler_log: list[str], how: str
) -> tuple[Any, bool]:
    """Take one request through its life, and interrupt it after *count* steps.

    Returns:
        The server, and whether the interruption came before the end.
    """
    datagrams = issubclass(server_class, UDPServer)
    handler = noting_handler(
        DatagramRequestHandler if datagrams else StreamRequestHandler, handler_log
    )
    open_before = open_files()
    tasks_before = trio.lowlevel.current_statistics().tasks_living
    server = server_class(bind_address(server_class, folder), handler)
    with datagram_client(server) if datagrams else connect(server.server_address) as client:
        async with trio.open_nursery() as clients:
            hard, soft = trio.CancelScope(), trio.CancelScope()
            at_step = AtStep(count, (hard if how == "hard" else soft).cancel, server)
            with instrumented(at_step):
                # Not itself interrupted: it waits for what the server owes a client,
                # which is at least the end of the connection.
                talk = talk_datagrams if datagrams else converse
                at_step.unwatched.add(await clients.start(talk, client))
                with hard:
                    async with server:
                        with soft:
                            await server.handle_request()
    assert server.fileno() == -1
    assert trio.lowlevel.current_statistics().tasks_living == tasks_before
    assert open_files() <= open_before
    assert at_step.seen_active <= {0, 1}
    return server, at_step.fired


# Every server with no hook and with all; each hook with one server of each kind.
SWEEPS = [
    (server_class, hooks)
    for hooks in HOOKS
    for server_class in (
        ALL_SERVERS
        if hooks in ("no_hook", "all_at_once")
        else (TCPServer, NurseryUnixStreamServer)
    )
]


@pytest.mark.parametrize(
    ("server_class", "hooks"),
    SWEEPS,
    ids=lambda it: it if isinstance(it, str) else it.__name__,
)
@bounded
async def test_promise_3_cancelled_at_every_step_of_a_request(
    server_class: type[Any], hooks: str, tmp_path: Path
) -> None:
    interrupted = True
    count = 0
    ways: set[tuple[str, ...]] = set()
    while interrupted:
        log: list[str] = []
        server, interrupted = await interrupted_at_step(
            count, with_hooks(server_class, hooks), tmp_path, log, "hard"
        )
        statistics = server.statistics()
        assert_sums_up(server)
        # finish() has run, to its end, if and only if setup() succeeded.
        assert log.count("finished") == log.count("finish begins") == log.count("set up")
        if statistics.completed:
            assert "handled" in log
        ways.add(tuple(log))
        count += 1
        assert count < 500
    assert count > 5
    assert () in ways
    if hooks == "verify_request_refuses":
        assert ways == {()}
        assert statistics.rejected == 1
        return
    # The last went through unharmed; the others have been stopped in each phase.
    assert log == ["set up", "handled", "finish begins", "finished"]
    assert ("set up", "finish begins", "finished") in ways
    fails = hooks in ("handle_error", "shutdown_request_fails", "all_at_once")
    assert (statistics.failed if fails else statistics.completed) == 1


@each_server
@bounded
async def test_promise_3_cancelled_accepting_harms_no_request(
    server_class: type[Any], tmp_path: Path
) -> None:
    interrupted = True
    count = 0
    accepted = set()
    while interrupted:
        log: list[str] = []
        server, interrupted = await interrupted_at_step(
            count, server_class, tmp_path, log, "soft"
        )
        statistics = server.statistics()
        assert statistics.completed == statistics.accepted
        assert (
            log == ["set up", "handled", "finish begins", "finished"] * statistics.accepted
        )
        accepted.add(statistics.accepted)
        count += 1
        assert count < 500
    assert accepted == {0, 1}


@each_stream_server
@bounded
async def test_promise_3_finish_is_shielded_and_can_say_goodbye(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Handler(StreamRequestHandler):
        async def handle(self) -> None:
            await self.wfile.write(b"hello ")
            await self.rfile.readline()

        async def finish(self) -> None:
            await checkpoint()
            await self.wfile.write(b"goodbye")
            await super().finish()

    server = server_class(bind_address(server_class, tmp_path), Handler)
    with connect(server.server_address) as client:
        with trio.CancelScope() as hard:
            async with serving(server):
                await receive(client, 6)
                hard.cancel()
                await trio.sleep_forever()
        assert await receive_to_end(client) == b"goodbye"
    assert server.statistics().cancelled == 1
    assert_sums_up(server)


@each_stream_server
@pytest.mark.parametrize("cancelled", [False, True], ids=["returned", "cancelled"])
@bounded
async def test_promise_3_finish_is_cut_after_cleanup_timeout(
    server_class: type[Any],
    cancelled: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Handler(BaseRequestHandler):
        async def handle(self) -> None:
            if cancelled:
                hard.cancel()
                await trio.sleep_forever()

        async def finish(self) -> None:
            await trio.sleep(1000)

    server = server_class(bind_address(server_class, tmp_path), Handler)
    server.cleanup_timeout = 7
    start = trio.current_time()
    with connect(server.server_address) as client:
        with trio.CancelScope() as hard:
            async with server:
                await server.handle_request()
        assert await receive_to_end(client) == b""
    assert trio.current_time() - start == pytest.approx(7)
    assert (server.statistics().cancelled, server.statistics().failed) == (
        (1, 0) if cancelled else (0, 1)
    )
    [(_, message)] = records(caplog)
    assert "finish() took longer than 7 s" in message


@each_stream_server
@bounded
async def test_promise_3_closing_is_cut_after_cleanup_timeout(
    server_class: type[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Hanging(server_class):  # type: ignore[misc]
        cleanup_timeout = 7

        async def shutdown_request(self, request: Any) -> None:
            await trio.sleep(1000)

    server = Hanging(bind_address(server_class, tmp_path), do_nothing)
    start = trio.current_time()
    with connect(server.server_address) as client:
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b""
    assert trio.current_time() - start == pytest.approx(7)
    assert server.statistics().failed == 1
    [(_, message)] = records(caplog)
    assert "closing took longer than 7 s" in message


@each_stream_server
@bounded
async def test_promise_3_a_failed_setup_is_not_finished_but_closed(
    server_class: type[Any], tmp_path: Path
) -> None:
    class Handler(BaseRequestHandler):
        async def setup(self) -> None:
            raise ValueError("not set up")

        async def handle(self) -> None:
            called.append("handle")

        async def finish(self) -> None:
            called.append("finish")

    called: list[str] = []
    server = server_class(bind_address(server_class, tmp_path), Handler)
    with connect(server.server_address) as client:
        async with server:
            await server.handle_request()
        assert await receive_to_end(client) == b""
    assert not called
    assert server.statistics().failed == 1
