"""Holds `serve_blocking` to servers with loops of their own, and to what a loop does.

The numbers are those of the findings about servers in the wild.
"""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from typing import Any

import pytest
import trio
from blocking_servers import (
    NEVER,
    ask_stream,
    client_of,
    each_dispatcher,
    each_in_process,
    echo,
    forks_with_threads,
    given_back,
    happens,
    in_thread,
    make,
    park,
    parked_client,
    served,
    wait_for,
)
from helpers import REAL_LIMIT, bounded, receive, receive_to_end

from trio_socketserver import serve_blocking

pytestmark = forks_with_threads

each_end = pytest.mark.parametrize("end", ["stop", "shut_down"])
"""The two ways to end: cancelling, and shutting down. They are methods of `Serving`."""


class Threading(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """So that what is built on it overrides something of somebody else's."""


# -- 12: serve_forever() overridden --------------------------------------------------------


@each_dispatcher
@each_end
@bounded
async def test_12_what_wraps_the_loop_happens_before_and_after_it(
    mixin: type, end: str
) -> None:
    log: list[Any] = []
    ready = threading.Event()

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            log.append(poll_interval)
            ready.set()
            try:
                super().serve_forever(poll_interval=NEVER)
            finally:
                log.append("served")

        def server_close(self) -> None:
            super().server_close()
            log.append("closed")

    server = make(echo, Server)
    async with served(server) as serving:
        await happens(ready)
        assert await ask_stream(server, b"hello") == b"hello"
        assert log == [0.5]
        await getattr(serving, end)()
    assert log == [0.5, "served", "closed"]


@each_end
@bounded
async def test_12_the_loop_may_be_called_by_name(end: str) -> None:
    class Server(Threading):
        def serve_forever(self) -> None:  # type: ignore[override]
            socketserver.BaseServer.serve_forever(self, 0.05)

    server = make(park, Server)
    async with served(server) as serving, contextlib.AsyncExitStack() as stack:
        if end == "stop":
            client = await stack.enter_async_context(parked_client(server))
        await getattr(serving, end)()
        if end == "stop":
            assert await receive(client) == b""


@bounded
async def test_12_the_loop_may_be_started_again() -> None:
    """As a server does that reloads its configuration when it has been shut down."""
    rounds: list[int] = []
    again = threading.Event()

    class Server(Threading):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            for number in range(2):
                super().serve_forever(NEVER)
                rounds.append(number)
                wait_for(again)

    server = make(echo, Server)
    async with served(server) as serving:
        assert await ask_stream(server, b"one") == b"one"
        await in_thread(server.shutdown)
        again.set()
        assert await ask_stream(server, b"two") == b"two"
        await serving.shut_down()
    assert rounds == [0, 1]


@each_in_process
@each_end
@bounded
async def test_12_a_loop_may_be_quite_another(mixin: type, end: str) -> None:
    """It is stopped by its own means."""
    idents = set()

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        stopped = threading.Event()

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            idents.add(threading.get_ident())
            self.socket.settimeout(0.01)
            while not self.stopped.is_set():
                try:
                    request, address = self.socket.accept()
                except TimeoutError:
                    continue
                request.settimeout(None)
                self.process_request(request, address)

        def shutdown(self) -> None:
            self.stopped.set()

    server = make(echo, Server)
    async with served(server) as serving:
        assert await ask_stream(server, b"one") == b"one"
        assert await ask_stream(server, b"two") == b"two"
        await getattr(serving, end)()
    assert len(idents) == 1
    assert threading.get_ident() not in idents


@bounded
async def test_12_a_loop_of_its_own_may_end_by_itself() -> None:
    class Server(socketserver.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            for _ in range(2):
                self.handle_request()

    server = make(echo, Server)
    async with served(server) as serving:
        assert await ask_stream(server, b"one") == b"one"
        assert await ask_stream(server, b"two") == b"two"
        await serving.ended.wait()
        assert not serving.cancelled


@bounded
async def test_12_a_loop_that_does_not_know_shutdown_ends_by_closing() -> None:
    """The base class's shutdown() waits for an event that nobody sets here."""

    class Server(Threading):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            self.socket.settimeout(0.01)
            while self.socket.fileno() != -1:
                with contextlib.suppress(TimeoutError, OSError):
                    self.socket.accept()[0].close()

    server = make(echo, Server)
    async with served(server) as serving:
        assert await ask_stream(server) == b""
        await serving.stop()


@bounded
async def test_12_a_loop_may_wait_in_a_select_that_nothing_ends() -> None:
    """Closing a socket does not wake who waits for it in another thread."""
    ours, theirs = socket.socketpair()

    class Server(socketserver.TCPServer):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while theirs not in select.select([self, theirs], [], [])[0]:
                self._handle_request_noblock()

    server = make(echo, Server)
    with ours, theirs:
        async with served(server) as serving:
            assert await ask_stream(server, b"one") == b"one"
            has_stopped = await serving.has_stopped()
            ours.send(b"x")  # Else a failure would be a test that hangs.
    assert has_stopped


@each_in_process
@bounded
async def test_12_a_loop_may_wait_in_an_accept_that_nothing_ends(mixin: type) -> None:
    """The connection that wakes it must not have it wait again before closing comes."""
    rounds = threading.Semaphore(0)
    gives_up = threading.Event()

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while not gives_up.is_set():
                rounds.release()
                request, address = self.socket.accept()
                self.process_request(request, address)

        def server_close(self) -> None:
            assert rounds.acquire(timeout=REAL_LIMIT)  # The loop has come round.
            super().server_close()

    server = make(echo, Server)
    address = server.server_address
    async with served(server) as serving:
        assert await ask_stream(server, b"one") == b"one"
        for _ in range(2):
            assert await in_thread(rounds.acquire, True, REAL_LIMIT)
        has_stopped = await serving.has_stopped()
        gives_up.set()  # Else a failure would be a test that hangs.
        with contextlib.suppress(OSError):
            socket.create_connection(address).close()
    assert has_stopped


def send_back(request: Any, client_address: Any, server: Any) -> None:
    """Handle a datagram by replying with it."""
    data, replies = request
    replies.sendto(data, client_address)


@each_end
@each_in_process
@bounded
async def test_12_a_loop_may_wait_for_a_datagram(mixin: type, end: str) -> None:
    """It takes them by get_request(), which waits, and asks nobody before."""

    class Server(mixin, socketserver.UDPServer):  # type: ignore[misc, valid-type]
        stopped = False

        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while not self.stopped:
                request, address = self.get_request()
                self.process_request(request, address)

        def shutdown(self) -> None:
            self.stopped = True
            with udp_socket() as client:
                client.sendto(b"", self.server_address)

    server = make(send_back, Server)
    async with served(server, changes=["stopped"]) as serving:
        with udp_socket() as client:
            client.sendto(b"hello", server.server_address)
            assert await in_thread(client.recv, 10) == b"hello"
        await getattr(serving, end)()


@pytest.mark.parametrize("selects", [True, False], ids=["select", "recvfrom"])
@each_in_process
@bounded
async def test_12_a_loop_that_waits_for_a_datagram_ends_by_closing(
    mixin: type, selects: bool
) -> None:
    handled = []
    ours, theirs = socket.socketpair()

    class Server(mixin, socketserver.UDPServer):  # type: ignore[misc, valid-type]
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            while selects:
                if theirs in select.select([self, theirs], [], [])[0]:
                    return
                self._handle_request_noblock()
            while True:
                request, address = self.get_request()
                self.process_request(request, address)

    def handler(request: Any, client_address: Any, server: Any) -> None:
        handled.append(request[0])
        send_back(request, client_address, server)

    server = make(handler, Server)
    with ours, theirs:
        async with served(server) as serving:
            with udp_socket() as client:
                client.sendto(b"hello", server.server_address)
                assert await in_thread(client.recv, 10) == b"hello"
            has_stopped = await serving.has_stopped()
            ours.send(b"x")  # Else a failure would be a test that hangs.
    assert has_stopped
    assert handled == [b"hello"]


def udp_socket() -> socket.socket:
    """Return a plain socket for datagrams."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(REAL_LIMIT)
    return sock


class Requests:
    """A mix-in: handles requests until an attribute says otherwise."""

    stopped = False

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        while not self.stopped:
            self.handle_request()  # type: ignore[attr-defined]


@each_in_process
@bounded
async def test_12_a_loop_of_handle_request_is_ended_by_a_handler(mixin: type) -> None:
    """Side by side, the loop may see it at the next request only, as in socketserver."""
    handled = threading.Event()

    def handler(request: Any, client_address: Any, server: Any) -> None:
        server.stopped = True
        request.sendall(b"the last")
        handled.set()

    server = make(handler, Requests, mixin)
    async with served(server, changes=["stopped"]) as serving:
        assert await ask_stream(server) == b"the last"
        await happens(handled)
        if isinstance(server, socketserver.ThreadingMixIn) and not serving.ended.is_set():
            with contextlib.suppress(OSError):
                await ask_stream(server)
        await serving.ended.wait()
        assert not serving.cancelled


@pytest.mark.parametrize(
    ("end", "timeout"),
    # Without cancellation, socketserver's would wait for one more request, too.
    [("stop", None), ("stop", NEVER), ("stop", 0.01), ("shut_down", 0.01)],
)
@each_in_process
@bounded
async def test_12_a_loop_of_handle_request_is_ended_by_shutdown(
    mixin: type, end: str, timeout: float | None
) -> None:
    """It waits for a request that never comes."""

    def shutdown(self: Any) -> None:
        self.stopped = True

    server = make(echo, Requests, mixin, shutdown=shutdown, timeout=timeout)
    async with served(server, changes=["stopped"]) as serving:
        assert await ask_stream(server, b"hello") == b"hello"
        await getattr(serving, end)()


@pytest.mark.parametrize(
    "error", [RuntimeError, OSError, ExceptionGroup, SystemExit, KeyboardInterrupt]
)
@pytest.mark.parametrize("hook", ["serve_forever", "service_actions"])
@bounded
async def test_12_errors_of_the_loop_are_raised_as_they_are(
    hook: str, error: type[BaseException]
) -> None:
    raised = error("mine", [ValueError()]) if error is ExceptionGroup else error("mine")

    def fail(self: Any) -> None:
        raise raised

    server = make(echo, Threading, **{hook: fail})
    with given_back(server):
        # Connected before it serves: what closes a listener resets who is connecting.
        async with client_of(server) as client:  # The loop turns when a request has come.
            with pytest.raises(error) as caught:
                await serve_blocking(server)
            assert caught.value is raised
            await receive_to_end(client)


# -- 13: service_actions() -----------------------------------------------------------------


class Ticking:
    """A mix-in: notes when its service_actions() has been called three times."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.ticks = 0
        self.ticked = threading.Event()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        super().serve_forever(0.01)  # type: ignore[misc]

    def service_actions(self) -> None:
        super().service_actions()  # type: ignore[misc]
        self.ticks += 1
        if self.ticks == 3:
            self.ticked.set()


@each_dispatcher
@bounded
async def test_13_service_actions_run_while_nothing_comes(mixin: type) -> None:
    server = make(echo, Ticking, mixin)
    async with served(server, changes=["ticks"]):
        await happens(server.ticked)


@bounded
async def test_13_service_actions_run_while_requests_are_handled() -> None:
    server = make(park, Ticking, Threading)
    async with served(server, changes=["ticks"]), parked_client(server):
        server.ticks = 0
        server.ticked.clear()
        await happens(server.ticked)


@each_in_process
@bounded
async def test_13_service_actions_run_after_each_request_and_no_more(mixin: type) -> None:
    log: list[str] = []
    acted = threading.Semaphore(0)

    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            super().serve_forever(NEVER)

        def get_request(self) -> Any:
            log.append("get")
            return super().get_request()

        def process_request(self, request: Any, client_address: Any) -> None:
            super().process_request(request, client_address)
            log.append("process")

        def service_actions(self) -> None:
            log.append("act")
            acted.release()

    server = make(echo, Server)
    async with served(server):
        for number in range(1, 4):
            assert await ask_stream(server, b"hello") == b"hello"
            await in_thread(acted.acquire)
            assert log == ["get", "process", "act"] * number


@bounded
async def test_13_service_actions_run_after_a_request_that_is_refused() -> None:
    acted = threading.Event()

    class Server(Threading):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            super().serve_forever(NEVER)

        def verify_request(self, request: Any, client_address: Any) -> bool:
            return False

        def service_actions(self) -> None:
            acted.set()

    server = make(echo, Server)
    async with served(server):
        assert await ask_stream(server) == b""
        await happens(acted)


@each_in_process
@bounded
async def test_13_service_actions_may_put_another_handler_in(mixin: type) -> None:
    class Server(mixin, socketserver.TCPServer):  # type: ignore[misc, valid-type]
        def service_actions(self) -> None:
            self.RequestHandlerClass = echo
            changed.set()

    changed = threading.Event()
    server = make(lambda *args: None, Server)
    async with served(server, changes=["RequestHandlerClass"]):
        await ask_stream(server)
        await happens(changed)
        assert await ask_stream(server, b"hello") == b"hello"


# -- 14: timeout ---------------------------------------------------------------------------


@each_dispatcher
@bounded
async def test_14_timeout_says_nothing_to_serve_forever(mixin: type) -> None:
    timed_out: list[Any] = []
    server = make(
        echo, Ticking, mixin, timeout=0.001, handle_timeout=lambda self: timed_out.append(1)
    )
    async with served(server, changes=["ticks"]):
        await happens(server.ticked)  # Some 30 ms.
        assert timed_out == []
        assert await ask_stream(server, b"hello") == b"hello"


@each_in_process
@bounded
async def test_14_timeout_may_be_the_program_s_own_for_connections(mixin: type) -> None:
    seen = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            seen.append(self.request.gettimeout())
            self.request.settimeout(self.server.timeout)  # type: ignore[attr-defined]
            with pytest.raises(TimeoutError):
                self.request.recv(1)
            self.request.sendall(b"too slow")

    server = make(Handler, mixin)
    server.timeout = 0.01
    async with served(server), client_of(server) as client:
        assert await receive_to_end(client) == b"too slow"
    assert seen == [None]
    assert server.timeout == 0.01


@bounded
async def test_14_handle_request_waits_for_as_long_as_timeout_says() -> None:
    timed_out = threading.Event()

    class Server(Requests, socketserver.TCPServer):
        timeout = 0.01

        def handle_timeout(self) -> None:
            timed_out.set()
            self.stopped = True

    server = make(echo, Server)
    async with served(server, changes=["stopped"]) as serving:
        await serving.ended.wait()
        assert not serving.cancelled
    assert timed_out.is_set()


@bounded
async def test_14_handle_request_waits_for_as_long_as_the_listener_s_timeout_says() -> None:
    """The older way to say it."""

    class Server(Requests, socketserver.TCPServer):
        def handle_timeout(self) -> None:
            self.stopped = True

    server = make(echo, Server)
    server.socket.settimeout(0.01)
    async with served(server, changes=["stopped"]) as serving:
        await serving.ended.wait()
        assert not serving.cancelled


@bounded
async def test_14_verify_request_may_block_a_loop_of_handle_request() -> None:
    reached, go_on = threading.Event(), threading.Event()

    class Server(Requests, socketserver.TCPServer):
        timeout = 0.01

        def verify_request(self, request: Any, client_address: Any) -> bool:
            reached.set()
            wait_for(go_on)
            self.stopped = True
            return True

    server = make(echo, Server)
    async with served(server, changes=["stopped"]), trio.open_nursery() as nursery:

        @nursery.start_soon
        async def release() -> None:
            await happens(reached)
            go_on.set()

        assert await ask_stream(server, b"hello") == b"hello"


@bounded
async def test_14_handle_request_times_out_after_a_shutdown_that_it_ignores() -> None:
    """The base class's shutdown() is for serve_forever(), and no reason to spin."""
    timed_out = threading.Event()

    class Server(Requests, socketserver.TCPServer):
        timeout = 0.01

        def handle_timeout(self) -> None:
            timed_out.set()

        def shutdown(self) -> None:
            self.stopped = True

    server = make(echo, Server)
    async with served(server, changes=["stopped"]):
        await happens(timed_out)
        thread = threading.Thread(target=socketserver.BaseServer.shutdown, args=(server,))
        thread.start()
        await in_thread(thread.join, 0.1)  # In socketserver it would wait for ever.
        timed_out.clear()
        await happens(timed_out)
    await in_thread(thread.join)
