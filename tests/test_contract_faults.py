"""The contract, over every dispatcher alike: what goes wrong, and what it costs."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import process_exists
from contract import (
    DATAGRAM,
    STREAM,
    TICKING,
    AskedFor,
    Dispatcher,
    assert_adds_up,
    assert_ended,
    each_of,
    errors,
    journal,
    serving,
    told,
)
from helpers import REAL_LIMIT, answer, ask, bounded, connect, pose, receive_to_end

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

each_dispatcher = each_of()
each_kind = each_of(STREAM | DATAGRAM)
each_stream_kind = each_of(STREAM)


async def say(server: Any, words: bytes) -> bytes:
    """Be a client that does not end by itself, and return what it gets to the end."""
    with connect(server.server_address) as client:
        with contextlib.suppress(ConnectionError):  # Who is denied may be gone already.
            client.sendall(words + b"\n")
        return await receive_to_end(client)


async def assert_serves(server: Any) -> None:
    """A fresh client is served."""
    assert await ask(server, b"echo\nfresh") == b"fresh"


# -- errors --------------------------------------------------------------------------------


@each_stream_kind
@bounded
async def test_an_error_costs_its_request_only(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        with connect(server.server_address) as other:
            other.sendall(b"echo\n")
            assert await say(server, b"fail by the client") == b""
            assert errors(server) == ["AskedFor: by the client"]
            await assert_serves(server)
            other.sendall(b"other")
            other.shutdown(socket.SHUT_WR)
            assert await receive_to_end(other) == b"other"
    assert_ended(server, failed=1, completed=2)


@each_of(DATAGRAM)
@bounded
async def test_an_error_costs_its_datagram_only(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    with (
        contextlib.ExitStack() as clients
    ):  # Who may get an empty reply, and must be there.
        async with serving(server):
            clients.enter_context(pose(server, b"fail by the client"))
            await assert_serves(server)
            await assert_serves(server)
    assert errors(server) == ["AskedFor: by the client"]
    assert_ended(server, failed=1, completed=2)


@each_dispatcher
@bounded
async def test_a_group_of_errors_is_an_error(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        assert await say(server, b"fail_together one two") == b""
        assert errors(server) == ["ExceptionGroup: together (2 sub-exceptions)"]
        await assert_serves(server)
    assert_ended(server, failed=1, completed=1)


@each_stream_kind
@bounded
async def test_the_connection_is_closed_at_the_end(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        for command in (b"leave", b"fail", b"nothing of that name"):
            assert await say(server, command) == b""
    assert_ended(server, completed=1, failed=2)


@each_dispatcher
@bounded
async def test_finish_follows_an_error(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        await say(server, b"fail on purpose")
    assert journal(server) == ["setup", "handle", "finish", "error AskedFor: on purpose"]
    assert_ended(server, failed=1)


@each_dispatcher
@bounded
async def test_finish_does_not_follow_a_failed_setup(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        with told(server, "fail in setup"):
            assert await say(server, b"park") == b""
        assert journal(server) == ["setup", "error AskedFor: setup"]
        await assert_serves(server)
    assert_ended(server, failed=1, completed=1)


@each_dispatcher
@bounded
async def test_a_failed_finish_is_an_error(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        with told(server, "fail in finish"):
            assert await say(server, b"leave") == b""
        assert errors(server) == ["AskedFor: finish"]
        await assert_serves(server)
    assert_ended(server, failed=1, completed=1)


HOOKS = (
    "verify_request",
    "process_request",
    "finish_request",
    "shutdown_request",
    "close_request",
)


@each_of(["hooked tcp", "hooked udp"])
@bounded
async def test_a_failing_hook_costs_its_request_only(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        for number, hook in enumerate(HOOKS, 1):
            with told(server, f"fail in {hook}"):
                if kind == "hooked tcp":
                    await say(server, b"leave")
                else:
                    pose(server, b"echo").close()
                while len(errors(server)) < number:
                    await trio.sleep(0.001)  # Nothing tells of a datagram's end.
            await assert_serves(server)
            while server.statistics().completed < number:
                await trio.sleep(0.001)  # Its own hooks come after the reply.
            assert errors(server)[number - 1 :] == [f"AskedFor: {hook}"]
    assert_ended(server, failed=len(HOOKS), completed=len(HOOKS))


@each_dispatcher
@bounded
async def test_a_failing_handle_error_costs_its_request_only(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        with told(server, "fail in handle_error"):
            assert await say(server, b"fail first") == b""
        await assert_serves(server)
    assert errors(server) == ["AskedFor: first"]
    assert_ended(server, failed=1, completed=1)


async def watch_sums(server: Any) -> None:
    """See that the statistics add up, again and again."""
    while True:
        assert_adds_up(server)
        await trio.sleep(0.001)


@each_dispatcher
@bounded
async def test_many_faults_at_once(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server), trio.open_nursery() as watching:
        watching.start_soon(watch_sums, server)
        async with trio.open_nursery() as clients:
            for number in range(3):
                clients.start_soon(say, server, b"fail number %d" % number)
                clients.start_soon(say, server, b"leave")
                clients.start_soon(say, server, b"nothing of that name")
        await assert_serves(server)
        watching.cancel_scope.cancel()
    assert sorted(errors(server))[:3] == [f"AskedFor: number {n}" for n in range(3)]
    assert_ended(server, failed=6, completed=4)


# -- access --------------------------------------------------------------------------------


@each_stream_kind
@bounded
async def test_who_is_denied_is_closed_and_counted(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        with told(server, "deny"):
            for _ in range(2):
                assert await say(server, b"park") == b""
        assert journal(server) == []
        await assert_serves(server)
    assert_ended(server, rejected=2, completed=1)


@each_dispatcher
@bounded
async def test_an_error_in_verifying_denies(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        with told(server, "fail in verify_request"):
            assert await say(server, b"park") == b""
        assert journal(server) == ["error AskedFor: verify_request"]
        await assert_serves(server)
    assert_ended(server, failed=1, completed=1)


# -- peers ---------------------------------------------------------------------------------

RESET = """
import socket, struct, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as client:
    client.sendall(b"park\\n")
    assert client.recv(7) == b"parked\\n"
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
"""


@each_dispatcher
@bounded
async def test_a_reset_is_the_peers_error(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with serving(server):
        # Another process: here, a forked child would have a copy, and nothing be reset.
        port = str(server.server_address[1])
        await trio.run_process([sys.executable, "-ISc", RESET, port])
        while not errors(server):
            await trio.sleep(0.001)
        await assert_serves(server)
    [error] = errors(server)
    assert error.partition(":")[0] in ("ConnectionBroken", "ConnectionResetError")
    assert "finish" in journal(server)
    assert_ended(server, failed=1, peer_errors=1, completed=1)


@each_dispatcher
@bounded
async def test_a_request_may_take_too_long(dispatcher: Dispatcher, tmp_path: Path) -> None:
    # Where the machine is slow, a short limit is met before the handler has begun.
    for request_timeout in (0.2, 2, REAL_LIMIT / 4):
        (tmp_path / "journal").unlink(missing_ok=True)
        server = dispatcher.make("tcp", tmp_path, request_timeout=request_timeout)
        async with serving(server):
            reply = await say(server, b"park")
        [error] = errors(server)
        assert error.startswith("RequestTimeout: ")
        assert_ended(server, failed=1, peer_errors=1)
        if reply:
            break
    assert reply == b"parked\n"
    assert journal(server).count("finish") == 1


# -- what ends more than a request ---------------------------------------------------------


async def serve(server: Any) -> None:
    """Enter *server* and serve, until something ends it."""
    async with server:
        await server.serve_forever()


async def has_ended(said: bytes) -> None:
    """Wait for the end of the process that a handler has named."""
    while process_exists(int(said)):
        await trio.sleep(0.001)


@each_stream_kind
@bounded
async def test_system_exit(dispatcher: Dispatcher, kind: str, tmp_path: Path) -> None:
    server = dispatcher.make(kind, tmp_path)
    if dispatcher.exit_ends == "server":
        with pose(server, b"exit wanted") as client:
            with pytest.raises(SystemExit, match="wanted"):
                await serve(server)
            assert int(await answer(client)) == os.getpid()
        assert_ended(server, failed=1)
    else:
        is_failure = dispatcher.exit_ends == "worker"
        async with serving(server):
            said = await say(server, b"exit wanted")
            if is_failure:
                await has_ended(said)
            await assert_serves(server)
        assert_ended(server, failed=is_failure, completed=2 - is_failure)
    assert journal(server)[:3] == ["setup", "handle", "finish"]
    assert errors(server) == []


@each_dispatcher
@bounded
async def test_keyboard_interrupt_ends_who_serves(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    if dispatcher.workers:
        async with serving(server):
            await has_ended(await say(server, b"interrupt wanted"))
            await assert_serves(server)
        assert_ended(server, failed=1, completed=1)
    else:
        with pose(server, b"interrupt wanted") as client:
            with pytest.raises(KeyboardInterrupt, match="wanted"):
                await serve(server)
            assert await answer(client)
        assert_ended(server, failed=1)
    assert journal(server)[:3] == ["setup", "handle", "finish"]
    assert errors(server) == []


@each_of(TICKING)
@bounded
async def test_an_error_in_service_actions_ends_who_serves(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    if dispatcher.workers:
        async with serving(server):
            with told(server, "fail in service_actions"):
                while "tick" not in journal(server):
                    await trio.sleep(0.001)
            await assert_serves(server)
    else:
        with (
            told(server, "fail in service_actions"),
            pose(server, b"echo\nhello"),
            pytest.raises(AskedFor, match="service_actions"),
        ):
            await serve(server)
    assert errors(server) == []
    assert server.fileno() == -1
