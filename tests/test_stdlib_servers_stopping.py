"""Holds `serve_blocking` to how old servers stop, and to what is left of them then.

The numbers are those of the findings about servers in the wild.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
from blocking_servers import (
    LOOPBACK,
    NEVER,
    PARKED,
    PROMPTLY,
    Serial,
    ask_stream,
    client_of,
    each_dispatcher,
    each_in_process,
    echo,
    ends,
    forks_with_threads,
    given_back,
    happens,
    in_thread,
    make,
    no_impatience,
    park,
    parked_client,
    process_exists,
    receive_exactly,
    served,
    wait_for,
)
from blocking_world import is_true
from helpers import (
    REAL_LIMIT,
    bind_address,
    bounded,
    connect,
    is_refused,
    receive,
    receive_to_end,
)

from trio_socketserver import _stdlib_loop, _stdlib_servers, serve_blocking

__all__ = ["no_impatience"]  # A fixture.

pytestmark = forks_with_threads


class Threading(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """So that what is built on it overrides something of somebody else's."""


class Unpolled:
    """A mix-in: nothing is noticed by polling."""

    def serve_forever(self, poll_interval: float = NEVER) -> None:
        super().serve_forever(poll_interval)  # type: ignore[misc]


# -- 6: shutdown() -------------------------------------------------------------------------


def shut_down_and_say_so(request: Any, client_address: Any, server: Any) -> None:
    """Handle a connection by stopping the server."""
    server.shutdown()
    request.sendall(b"stopped")


@each_in_process
@bounded
async def test_6_a_handler_may_shut_the_server_down(mixin: type) -> None:
    server = make(shut_down_and_say_so, Unpolled, mixin)
    async with served(server) as serving:
        assert await ask_stream(server) == b"stopped"
        await serving.ended.wait()
        assert not serving.cancelled


@each_dispatcher
@bounded
async def test_6_any_thread_may_shut_the_server_down(mixin: type) -> None:
    server = make(echo, Unpolled, mixin)
    async with served(server) as serving:
        assert await ask_stream(server, b"hello") == b"hello"
        thread = threading.Thread(target=server.shutdown)
        thread.start()
        await serving.ended.wait()
        assert not serving.cancelled
        await in_thread(thread.join)
        assert is_refused(server.server_address)


@each_in_process
@bounded
async def test_6_in_trio_s_thread_shutdown_does_not_wait_for_who_waits_for_trio(
    mixin: type,
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def handler(request: socket.socket, client_address: Any, server: Any) -> None:
        reached.set()
        wait_for(go_on)
        request.sendall(trio.from_thread.run_sync(lambda: b"from trio"))

    server = make(handler, Unpolled, mixin)
    async with served(server) as serving, client_of(server) as client:
        await happens(reached)
        server.shutdown()  # As a signal handler would.
        go_on.set()
        assert await receive_to_end(client) == b"from trio"
        await serving.ended.wait()
        assert not serving.cancelled


@each_dispatcher
@bounded
async def test_6_shutdown_before_serving_is_remembered(mixin: type) -> None:
    server = make(echo, Unpolled, mixin)
    with given_back(server):
        thread = threading.Thread(target=server.shutdown)
        thread.start()
        while not server._BaseServer__shutdown_request:
            await trio.sleep(0)  # The thread sets it, and nothing tells.
        assert thread.is_alive()
        await serve_blocking(server)
        await in_thread(thread.join)


@each_in_process
@bounded
async def test_6_shutdown_after_serving_returns(mixin: type) -> None:
    server = make(echo, mixin)
    async with served(server) as serving:
        await serving.shut_down()
    await in_thread(server.shutdown)


@bounded
async def test_6_shutdown_may_come_just_when_serving_has_ended() -> None:
    server = make(echo, Threading)
    async with served(server) as serving:
        # What shutdown() waits for, in a thread that has got no further yet.
        stopped = server._BaseServer__is_shut_down
        await serving.stop()
    assert stopped.wait(REAL_LIMIT)


@bounded
async def test_6_shutdown_returns_when_the_loop_has_ended() -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Server(socketserver.TCPServer):
        def verify_request(self, request: Any, client_address: Any) -> bool:
            reached.set()
            wait_for(go_on)
            return False

    server = make(echo, Unpolled, Server)
    async with served(server) as serving, client_of(server):
        await happens(reached)
        thread = threading.Thread(target=server.shutdown)
        thread.start()
        await in_thread(thread.join, 0.1)
        assert thread.is_alive()
        assert not server._BaseServer__is_shut_down.is_set()
        go_on.set()
        await in_thread(thread.join)
        await serving.ended.wait()


@each_in_process
@bounded
async def test_6_server_close_may_call_shutdown(mixin: type) -> None:
    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def server_close(self) -> None:
            self.shutdown()
            super().server_close()

    for how in ("cancel", "shut_down"):
        server = make(echo, Server)
        async with served(server) as serving:
            assert await ask_stream(server, b"hello") == b"hello"
            if how == "cancel":
                await serving.stop()
            else:
                await serving.shut_down()


def shutdown_by_super(self: Any) -> None:
    super(socketserver.ThreadingTCPServer, self).shutdown()


def shutdown_by_name(self: Any) -> None:
    socketserver.BaseServer.shutdown(self)


def shutdown_by_hand(self: Any) -> None:
    self._BaseServer__shutdown_request = True
    self._BaseServer__is_shut_down.wait()


@pytest.mark.parametrize("how", [shutdown_by_super, shutdown_by_name, shutdown_by_hand])
@pytest.mark.parametrize("cancels", [False, True], ids=["shutdown", "cancelled"])
@bounded
async def test_6_shutdown_may_be_overridden(how: Any, cancels: bool) -> None:
    calls = []

    class Server(socketserver.ThreadingTCPServer):
        def shutdown(self) -> None:
            calls.append("begin")
            how(self)
            calls.append("end")

    server = make(echo, Unpolled, Server)
    async with served(server) as serving:
        assert await ask_stream(server, b"hello") == b"hello"
        if cancels:
            await serving.stop()
        else:
            await serving.shut_down()
    assert calls[:2] == ["begin", "end"]


@bounded
async def test_6_a_handler_may_shut_down_by_an_override() -> None:
    class Server(socketserver.ThreadingTCPServer):
        def shutdown(self) -> None:
            super(socketserver.ThreadingTCPServer, self).shutdown()

    server = make(shut_down_and_say_so, Unpolled, Server)
    async with served(server) as serving:
        assert await ask_stream(server) == b"stopped"
        await serving.ended.wait()


@each_in_process
@pytest.mark.parametrize("daemon_threads", [False, True], ids=["joined", "daemon"])
@bounded
async def test_6_a_handler_may_shut_down_and_close(
    mixin: type, daemon_threads: bool
) -> None:
    """It does not wait for itself. (The library's fails there, or does not wait either.)"""

    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.shutdown()
        server.server_close()
        request.sendall(b"closed")

    server = make(handler, mixin, daemon_threads=daemon_threads)
    async with served(server, closes=2) as serving:
        assert await ask_stream(server) == b"closed"
        await serving.ended.wait()
        assert not serving.cancelled


@pytest.mark.parametrize("value", [3, ["no number"]], ids=["a number", "others"])
@bounded
async def test_7_an_attribute_may_be_called_as_that_of_children(value: Any) -> None:
    """A server that does not fork may mean anything by it."""
    server = make(park, Threading, active_children=value)
    async with served(server) as serving, parked_client(server):
        await serving.stop()


@bounded
async def test_6_closing_before_shutting_down_stops_too() -> None:
    """In the wrong order, as many programs do."""
    server = make(echo, Unpolled, Threading)

    def stop() -> None:
        server.server_close()
        server.shutdown()

    async def serve(*, task_status: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # Its listener was closed.
            await serve_blocking(server, task_status=task_status)

    with given_back(server, closes=2):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            assert await ask_stream(server, b"hello") == b"hello"
            await in_thread(stop)


@pytest.mark.parametrize(
    "attributes", [{}, {"block_on_close": True, "daemon_threads": False}], ids=repr
)
@bounded
async def test_6_shutdown_waits_for_requests(attributes: dict[str, bool]) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        request.sendall(request.recv(100))

    server = make(handler, Unpolled, Threading, **attributes)
    async with served(server) as serving, parked_client(server) as client:
        await in_thread(server.shutdown)
        assert not serving.ended.is_set()
        client.sendall(b"still served")
        assert await receive_to_end(client) == b"still served"
        await serving.ended.wait()


@pytest.mark.parametrize(
    "attributes", [{"block_on_close": False}, {"daemon_threads": True}]
)
@bounded
async def test_6_shutdown_ends_requests_that_nobody_waits_for(attributes: Any) -> None:
    server = make(park, Unpolled, Threading, **attributes)
    async with served(server) as serving, parked_client(server) as client:
        await serving.shut_down()
        assert await receive(client) == b""


# -- 7: the server's own shutdown() --------------------------------------------------------


@each_in_process
@bounded
async def test_7_cancellation_calls_the_shutdown_that_handlers_listen_to(
    mixin: type,
) -> None:
    called_in = []

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        wait_for(server.stopping)

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        stopping = threading.Event()

        def shutdown(self) -> None:
            called_in.append(threading.get_ident())
            self.stopping.set()
            super().shutdown()

    server = make(handler, Server)
    async with served(server) as serving, parked_client(server) as client:
        await serving.stop()
        assert await receive_to_end(client) == b""
    assert len(called_in) == 1
    assert called_in[0] != threading.get_ident()


@bounded
async def test_7_shutdown_may_block_while_trio_runs() -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Server(socketserver.TCPServer):
        def shutdown(self) -> None:
            reached.set()
            wait_for(go_on)
            super().shutdown()

    server = make(echo, Server)
    async with served(server) as serving:
        serving.cancel()
        await happens(reached)
        assert not serving.ended.is_set()
        go_on.set()


@bounded
async def test_7_shutdown_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    def shutdown(self: Any) -> None:
        raise LookupError("mine")

    server = make(echo, Threading, shutdown=shutdown)
    async with served(server) as serving:
        await serving.stop()
    assert [record.name for record in caplog.records] == ["trio_socketserver"]
    assert "LookupError: mine" in caplog.text


@bounded
async def test_7_shutdown_may_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    threads = []

    def shutdown(self: Any) -> None:
        threads.append(threading.current_thread())
        wait_for(go_on)

    monkeypatch.setattr(_stdlib_servers, "SHUTDOWN_TIMEOUT", 0.05)
    server = make(echo, Threading, shutdown=shutdown)
    try:
        async with served(server) as serving:
            with trio.fail_after(PROMPTLY):
                await serving.stop()
    finally:
        go_on.set()
    await ends(*threads)


# -- 8: waking -----------------------------------------------------------------------------


def park_in_recv_into(request: Any) -> None:
    request.recv_into(bytearray(1))


def park_in_readline(request: Any) -> None:
    with request.makefile("rb") as file:
        file.readline()


def park_in_sendall(request: Any) -> None:
    with contextlib.suppress(ConnectionError):
        request.sendall(bytes(50_000_000))


def park_in_what_was_detached(request: Any) -> None:
    """As what wraps the connection does: TLS, say."""
    with socket.socket(fileno=request.detach()) as connection:
        connection.recv(1)


def park_in_duplicate(request: Any) -> None:
    with request.dup() as connection:
        request.close()
        connection.recv(1)


PARKS = (
    park_in_recv_into,
    park_in_readline,
    park_in_sendall,
    park_in_what_was_detached,
    park_in_duplicate,
)


@pytest.mark.parametrize("parks", PARKS)
@pytest.mark.parametrize("family", ["tcp", "unix"])
@each_dispatcher
@bounded
async def test_8_who_waits_for_the_peer_is_woken(
    mixin: type, family: str, parks: Any, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        parks(request)

    base = socketserver.TCPServer if family == "tcp" else socketserver.UnixStreamServer
    server = make(handler, mixin, base, address=bind_address(base, tmp_path))
    async with served(server) as serving, parked_client(server) as client:
        await serving.stop()
        with contextlib.suppress(ConnectionResetError):
            while await receive(client):
                pass


CLOCKS = {
    _stdlib_servers: ("ANSWER_GRACE", "DAEMON_GRACE", "LOOP_GRACE", "SHUTDOWN_TIMEOUT"),
    _stdlib_loop: ("FLAG_GRACE", "KNOCK_AFTER"),
}
"""What the end of a server may wait for, if nothing happens before."""


@pytest.mark.parametrize("state", ["idle", "parked"])
@each_dispatcher
@bounded
async def test_8_cancelling_takes_no_time(
    mixin: type, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 ms are promised, and socketserver takes up to 500: nothing waits for a clock."""
    for module, names in CLOCKS.items():
        for name in names:
            monkeypatch.setattr(module, name, 2 * REAL_LIMIT)
    for _ in range(5):
        server = make(park, Unpolled, mixin)
        async with served(server) as serving, contextlib.AsyncExitStack() as stack:
            assert await ask_stream(server) == PARKED  # So the loop has begun.
            if state == "parked":
                for _ in range(1 if mixin is Serial else 3):
                    await stack.enter_async_context(parked_client(server))
            await serving.stop()


@each_dispatcher
@bounded
async def test_8_who_wakes_by_cancellation_is_no_error(
    mixin: type, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    server = make(park, mixin)
    async with served(server) as serving, parked_client(server):
        await serving.stop()
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


@bounded
async def test_8_a_connection_ends_when_its_handler_closes_it() -> None:
    """What is kept to wake the handler must not keep the client waiting."""
    go_on = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(b"bye")
        request.close()
        wait_for(go_on)

    server = make(handler, Threading)
    async with served(server), client_of(server) as client:
        try:
            with trio.fail_after(PROMPTLY):
                assert await receive_to_end(client) == b"bye"
        finally:
            go_on.set()


@each_in_process
@bounded
async def test_8_a_connection_ends_when_close_request_does_no_more_than_that(
    mixin: type,
) -> None:
    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def shutdown_request(self, request: Any) -> None:
            self.close_request(request)

    server = make(lambda *args: None, Server)
    async with served(server), client_of(server) as client:
        assert await receive(client) == b""


# -- 9: who cannot be woken ----------------------------------------------------------------


@each_in_process
@bounded
async def test_9_who_cannot_be_woken_is_joined(mixin: type) -> None:
    go_on, ended = threading.Event(), threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        wait_for(go_on)
        ended.set()

    server = make(handler, mixin)
    async with served(server) as serving, parked_client(server) as client:
        serving.cancel()
        assert await receive(client) == b""  # So it has been done what can be.
        await trio.sleep(0.05)
        assert not serving.ended.is_set()
        go_on.set()
        await serving.ended.wait()
        assert ended.is_set()


@pytest.mark.parametrize("cancels", [True, False], ids=["cancelled", "shutdown"])
@bounded
async def test_9_who_cannot_be_woken_is_abandoned_where_the_program_says_so(
    cancels: bool,
) -> None:
    go_on = threading.Event()
    closed_in = []
    threads = []

    class Server(Threading):
        daemon_threads = True

        def close_request(self, request: Any) -> None:
            closed_in.append(threading.current_thread())
            super().close_request(request)

    def handler(request: Any, client_address: Any, server: Any) -> None:
        threads.append(threading.current_thread())
        request.sendall(PARKED)
        wait_for(go_on)

    server = make(handler, Server)
    try:
        async with served(server) as serving, parked_client(server) as client:
            with trio.fail_after(PROMPTLY):
                await (serving.stop() if cancels else serving.shut_down())
            assert await receive(client) == b""
            assert threads[0].is_alive()
            assert closed_in == []
    finally:
        go_on.set()
    await ends(threads[0])
    assert closed_in == threads


@bounded
async def test_9_a_hook_that_cannot_be_woken_is_joined() -> None:
    reached, go_on = threading.Event(), threading.Event()

    def verify_request(self: Any, request: Any, client_address: Any) -> bool:
        reached.set()
        wait_for(go_on)
        return False

    server = make(echo, Threading, verify_request=verify_request)
    async with served(server) as serving, client_of(server) as client:
        await happens(reached)
        serving.cancel()
        assert await receive(client) == b""  # So it has been done what can be.
        assert not serving.ended.is_set()
        go_on.set()
        await serving.ended.wait()


# -- 10: forking ---------------------------------------------------------------------------


class Forking(socketserver.ForkingMixIn, socketserver.TCPServer):
    """So that what is built on it overrides something of somebody else's."""


def say_pid_and_sleep(request: Any, client_address: Any, server: Any) -> None:
    """Handle a connection by doing what no socket can end."""
    request.sendall(b"%10d" % os.getpid())
    signal.sigtimedwait([], REAL_LIMIT)


@bounded
async def test_10_children_are_collected_in_time() -> None:
    collected = threading.Event()

    class Server(Forking):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            super().serve_forever(0.01)

        def service_actions(self) -> None:
            before = len(self.active_children or ())
            super().service_actions()
            if before and not self.active_children:
                collected.set()

    server = make(lambda request, *_: request.sendall(b"%d" % os.getpid()), Server)
    async with served(server):
        pid = int(await ask_stream(server))
        assert pid != os.getpid()
        await happens(collected)
        assert not process_exists(pid)


@bounded
async def test_10_cancellation_ends_children_before_closing_waits_for_them() -> None:
    server = make(say_pid_and_sleep, Forking)
    async with served(server) as serving, contextlib.AsyncExitStack() as stack:
        pids = []
        for _ in range(3):
            client = await stack.enter_async_context(client_of(server))
            pids.append(int(await receive_exactly(client, 10)))
            # The child may be faster than the loop.
            await is_true(lambda: server.active_children == set(pids))
        await serving.stop()
        assert not any(process_exists(pid) for pid in pids)
    assert server.active_children == set()


@bounded
async def test_10_children_that_do_not_listen_are_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say_pid_and_sleep(request, client_address, server)

    monkeypatch.setattr(_stdlib_servers, "SHUTDOWN_TIMEOUT", 0.05)
    server = make(handler, Forking)
    async with served(server) as serving, client_of(server) as client:
        pid = int(await receive_exactly(client, 10))
        with trio.fail_after(PROMPTLY):
            await serving.stop()
        assert not process_exists(pid)


@bounded
async def test_10_cancellation_ends_no_other_children() -> None:
    sleeper = [sys.executable, "-c", f"import time; time.sleep({REAL_LIMIT})"]
    with subprocess.Popen(sleeper) as other:
        try:
            server = make(say_pid_and_sleep, Forking)
            async with served(server) as serving, client_of(server) as client:
                await receive_exactly(client, 10)
                await serving.stop()
            assert other.poll() is None
        finally:
            other.kill()
    assert other.returncode == -signal.SIGKILL


@bounded
async def test_10_shutdown_waits_for_children() -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        request.sendall(PARKED)
        request.sendall(request.recv(100))

    server = make(handler, Forking)
    async with served(server) as serving, parked_client(server) as client:
        await in_thread(server.shutdown)
        client.sendall(b"still served")
        assert await receive_to_end(client) == b"still served"
        await serving.ended.wait()
    assert server.active_children == set()


# -- 11: server_close() --------------------------------------------------------------------


@each_in_process
@bounded
async def test_11_server_close_is_the_last_thing_and_called_off_the_loop(
    mixin: type,
) -> None:
    log: list[str] = []
    go_on = threading.Event()
    reached = threading.Event()

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            super().serve_forever(poll_interval)
            log.append("served")

        def close_request(self, request: Any) -> None:
            super().close_request(request)
            log.append("request closed")

        def server_close(self) -> None:
            reached.set()
            wait_for(go_on)
            super().server_close()
            log.append("closed")

    server = make(park, Server)
    async with served(server) as serving, parked_client(server):
        serving.cancel()
        await happens(reached)
        assert sorted(log) == ["request closed", "served"]
        go_on.set()
    assert log[2:] == ["closed"]


@pytest.mark.parametrize("cancels", [True, False], ids=["cancelled", "shutdown"])
@bounded
async def test_11_server_close_comes_after_a_loop_that_has_closed_already(
    cancels: bool,
) -> None:
    class Server(Threading):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            try:
                super().serve_forever(poll_interval)
            finally:
                self.server_close()

    server = make(echo, Server)
    async with served(server, closes=2) as serving:
        assert await ask_stream(server, b"hello") == b"hello"
        await (serving.stop() if cancels else serving.shut_down())


@bounded
async def test_11_server_close_may_fail() -> None:
    class Server(Threading):
        def server_close(self) -> None:
            super().server_close()
            raise LookupError("nothing to close")

    server = make(shut_down_and_say_so, Server)

    async def serve(*, task_status: Any) -> None:
        with pytest.raises(LookupError, match="nothing to close"):
            await serve_blocking(server, task_status=task_status)

    with given_back(server):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            assert await ask_stream(server) == b"stopped"


# -- the listener --------------------------------------------------------------------------


@pytest.mark.parametrize("cancels", [True, False], ids=["cancelled", "shutdown"])
@each_dispatcher
@bounded
async def test_a_listener_that_others_have_goes_on_listening(
    mixin: type, cancels: bool
) -> None:
    server = make(echo, Unpolled, mixin)
    with server.socket.dup() as others:
        async with served(server) as serving:
            assert await ask_stream(server, b"hello") == b"hello"
            await (serving.stop() if cancels else serving.shut_down())
        with connect(server.server_address) as client:
            others.settimeout(REAL_LIMIT)
            accepted, address = others.accept()
            accepted.close()
            assert address == client.getsockname()


@each_in_process
@pytest.mark.parametrize("end", ["stop", "shut_down"])
@bounded
async def test_a_connection_that_others_have_taken_does_not_keep_the_server(
    mixin: type, end: str
) -> None:
    """Then accept() waits for the next one."""
    reached = threading.Event()
    threads = []

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def get_request(self) -> Any:
            threads.append(threading.current_thread())
            others.accept()[0].close()
            reached.set()
            return super().get_request()

    server = make(echo, Server)
    with server.socket.dup() as others:
        async with served(server) as serving, client_of(server):
            await happens(reached)
            with trio.move_on_after(PROMPTLY):
                await getattr(serving, end)()
            in_time = serving.ended.is_set()
            if not in_time:
                connect(server.server_address).close()
            await serving.ended.wait()
        await ends(*threads)
        assert in_time


@each_in_process
@bounded
async def test_a_listener_that_does_not_listen_is_an_error(mixin: type) -> None:
    server_class = type("Server", (mixin, socketserver.TCPServer), {})
    server = server_class(LOOPBACK, echo, bind_and_activate=False)
    with given_back(server), pytest.raises(OSError, match="Invalid argument"):
        await serve_blocking(server)


@each_in_process
@bounded
async def test_a_listener_that_has_been_closed_is_an_error(mixin: type) -> None:
    server = make(echo, mixin)
    server.socket.close()
    with given_back(server), pytest.raises((OSError, ValueError)):
        await serve_blocking(server)


@bounded
async def test_a_scope_that_is_cancelled_already_closes_the_server() -> None:
    server = make(echo, Threading)
    with given_back(server), trio.CancelScope() as scope:
        scope.cancel()
        await serve_blocking(server)
    assert scope.cancelled_caught


# -- what is not served --------------------------------------------------------------------


@bounded
async def test_only_the_standard_library_s_servers_are_served() -> None:
    with pytest.raises(TypeError, match="none"):
        await serve_blocking(object())  # type: ignore[arg-type]


@bounded
async def test_a_server_is_not_served_twice_at_once() -> None:
    server = make(echo, Threading)
    async with served(server):
        with pytest.raises(RuntimeError, match="served already"):
            await serve_blocking(server)
        assert await ask_stream(server, b"hello") == b"hello"
