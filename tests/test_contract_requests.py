"""The contract, over every dispatcher alike: how requests are served."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from blocking_servers import ask_stream, receive_exactly
from contract import (
    DATAGRAM,
    HOOKED,
    STREAM,
    TICKING,
    Dispatcher,
    Gate,
    assert_ended,
    each_of,
    free_address,
    journal,
    serving,
)
from helpers import answer, ask, bounded, connect, pose, receive_to_end

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

each_dispatcher = each_of()
each_kind = each_of(STREAM | DATAGRAM)
each_stream_kind = each_of(STREAM)
each_hooked_kind = each_of(HOOKED)


@each_kind
@bounded
async def test_a_request_is_answered(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        for number in (b"one", b"two", b"three"):
            assert await ask(server, b"echo\n" + number) == number
    assert_ended(server, completed=3)


@each_dispatcher
@bounded
async def test_the_address_is_good_at_once(dispatcher: Dispatcher, tmp_path: Path) -> None:
    server = dispatcher.make("tcp", tmp_path)
    with pose(server, b"echo\nfirst") as early:  # Before anything has been entered.
        async with server, trio.open_nursery() as nursery:
            address = await nursery.start(server.serve_forever)
            assert address == server.server_address == server.socket.getsockname()
            assert await answer(early) == b"first"
            await server.shutdown()
    assert_ended(server, completed=1)


@each_kind
@bounded
async def test_requests_are_served_side_by_side(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        with Gate(tmp_path) as gate, contextlib.ExitStack() as clients:
            asking = [
                clients.enter_context(pose(server, f"wait {gate.path}".encode()))
                for _ in range(4)
            ]
            await gate.fills_up_to(4)
            for _ in asking:
                gate.let_go()
            assert [await answer(client) for client in asking] == [b"waited\n"] * 4
    assert_ended(server, completed=4)


@each_stream_kind
@bounded
async def test_a_half_closed_client_gets_its_reply(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        with connect(server.server_address) as client:
            client.sendall(b"park\n")
            assert await receive_exactly(client, 7) == b"parked\n"
            client.sendall(b"the rest")
            client.shutdown(socket.SHUT_WR)
            assert await receive_to_end(client) == b"the rest"
    assert_ended(server, completed=1)


@each_stream_kind
@bounded
async def test_much_goes_both_ways(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    much = bytes(range(256)) * 4096
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        assert await ask_stream(server, b"echo\n" + much) == much
    assert_ended(server, completed=1)


@each_kind
@bounded
async def test_a_handler_knows_its_client_and_its_server(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path, greeting="hello")
    async with serving(server):
        with pose(server, b"tell") as client:
            told = (await answer(client)).decode()
            mine = client.getsockname()
    given = None if kind in DATAGRAM else "not given"
    assert told == repr((mine, server.server_address, "hello", given, True))


@each_dispatcher
@bounded
async def test_a_handler_may_be_a_partial(dispatcher: Dispatcher, tmp_path: Path) -> None:
    handler = functools.partial(dispatcher.stream, greeting="given")
    server = dispatcher.make("tcp", tmp_path, handler)
    async with serving(server):
        assert b"'given'" in await ask(server, b"tell")
    assert_ended(server, completed=1)


@each_kind
@bounded
async def test_a_handler_may_be_a_function(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path, dispatcher.function)
    async with serving(server):
        assert await ask(server, b"hello") == b"HELLO"
    assert_ended(server, completed=1)


@each_dispatcher
@bounded
async def test_other_children_of_the_program_keep_their_exit_status(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    other = [sys.executable, "-ISc", "raise SystemExit(int(input()))"]
    async with serving(server):
        with subprocess.Popen(other, stdin=subprocess.PIPE) as process:
            assert process.stdin is not None
            assert await ask(server, b"echo\nbefore") == b"before"
            process.stdin.write(b"7\n")
            process.stdin.close()
            # It has ended, and nobody has asked for its status.
            await trio.to_thread.run_sync(
                os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT
            )
            assert await ask(server, b"echo\nafter") == b"after"
            assert process.wait() == 7


@each_dispatcher
@bounded
async def test_what_a_handler_changes_is_its_processs(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path, greeting="as it was")
    async with serving(server):
        await ask(server, b"greet changed")
    assert server.greeting == ("changed" if dispatcher.shares_memory else "as it was")


@each_kind
@bounded
async def test_an_inherited_socket_may_be_served(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server_class = dispatcher.servers[kind]
    listener = socket.socket(server_class.address_family, server_class.socket_type)
    listener.bind(free_address(kind, tmp_path))
    if kind in STREAM:
        listener.listen()
    handler = dispatcher.stream if kind in STREAM else dispatcher.datagram
    server = dispatcher.tell(server_class.from_socket(listener, handler), tmp_path)
    async with serving(server):
        assert await ask(server, b"echo\nhello") == b"hello"
    assert listener.fileno() == -1
    assert_ended(server, completed=1)


@each_of(DATAGRAM)
@bounded
async def test_a_long_datagram_is_cut_and_counted(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path, max_packet_size=10)
    async with serving(server):
        assert await ask(server, b"echo\n12345") == b"12345"
        assert await ask(server, b"echo\n1234567") == b"12345"
    assert_ended(server, completed=2, truncated_datagrams=1)


@each_hooked_kind
@bounded
async def test_hooks_and_phases_have_the_stdlibs_order(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    async with serving(server):
        assert await ask(server, b"echo\nhello") == b"hello"
    hooks = ["get_request", "verify_request", "process_request", "finish_request"]
    phases = ["setup", "handle", "finish"]
    closing = ["shutdown_request", "close_request"]
    assert journal(server) == [*hooks, *phases, *closing]
    assert_ended(server, completed=1)


# -- handle_request() ----------------------------------------------------------------------


@each_kind
@bounded
async def test_handle_request_handles_one(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    with pose(server, b"echo\none") as one, pose(server, b"echo\ntwo") as two:
        await server.handle_request()
        assert journal(server).count("handle") == 1  # It has been waited for.
        assert await answer(one) == b"one"
        await server.handle_request()
        assert await answer(two) == b"two"
    await server.server_close()
    assert_ended(server, completed=2)


@each_dispatcher
@bounded
async def test_handle_request_in_a_block_does_not_wait_for_the_end(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path)
    async with server:
        with Gate(tmp_path) as gate, pose(server, f"wait {gate.path}".encode()) as client:
            await server.handle_request()
            await gate.fills_up_to(1)
            gate.let_go()
            assert await answer(client) == b"waited\n"
    assert_ended(server, completed=1)


@each_dispatcher
@bounded
async def test_handle_request_does_not_wait_for_ever(
    dispatcher: Dispatcher, tmp_path: Path
) -> None:
    server = dispatcher.make("tcp", tmp_path, timeout=0.01)
    await server.handle_request()
    assert journal(server) == ["timeout"]
    await server.server_close()
    assert_ended(server)


# -- service_actions() ---------------------------------------------------------------------


@each_of(TICKING)
@bounded
async def test_service_actions_follow_requests_and_time(
    dispatcher: Dispatcher, kind: str, tmp_path: Path
) -> None:
    server = dispatcher.make(kind, tmp_path)
    for poll_interval, question in ((1000, b"echo\nx"), (0.001, b"")):
        (tmp_path / "journal").unlink(missing_ok=True)
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever, poll_interval)
            if question:
                assert await ask(server, question) == b"x"
            while "tick" not in journal(server):
                await trio.sleep(0.001)
            await server.shutdown()
    await server.server_close()
    assert_ended(server, completed=1)
