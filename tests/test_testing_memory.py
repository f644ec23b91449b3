"""Handlers on connections and datagrams in memory do what they do on real ones."""

from __future__ import annotations

import io
import socket
import ssl
import types
from typing import Any

import pytest
import trio
import trio.testing
from helpers import REAL_LIMIT, ask, assert_sums_up, bounded, class_name, echo_all
from trio.testing import MockClock

from trio_socketserver import (
    BaseRequestHandler,
    BaseServer,
    ConnectionBroken,
    DatagramRequestHandler,
    DatagramSocket,
    ForkingTCPServer,
    IncompleteRead,
    NurseryTCPServer,
    NurseryUDPServer,
    PreforkingMixIn,
    RequestTimeout,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
)
from trio_socketserver.testing import (
    MemoryClient,
    converse,
    datagram_replies,
    memory_connection,
    serving,
)

LOCAL = ("127.0.0.1", 0)


class Oops(Exception):
    """What a test raises."""


class Echo(StreamRequestHandler):
    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(line)


class Upper(DatagramRequestHandler):
    async def handle(self) -> None:
        self.wfile.write(self.rfile.read().upper())


@bounded
async def test_a_conversation() -> None:
    async with memory_connection(Echo) as client:
        await client.send_all(b"one\n")
        assert await client.rfile.readline() == b"one\n"
        await client.wfile.write(b"two\n")
        assert await client.receive_some() == b"two\n"
        await client.send_eof()
        assert await client.receive_some() == b""
        with pytest.raises(trio.ClosedResourceError):
            await client.send_all(b"more")


@pytest.mark.parametrize("handler", [Echo, echo_all])
@bounded
async def test_converse_gives_what_a_real_server_gives(handler: Any) -> None:
    question = b"one\ntwo\nrest"
    server = NurseryTCPServer(LOCAL, handler)
    async with serving(server):
        real = await ask(server, question)
    assert await converse(handler, question) == real == question


@bounded
async def test_a_client_that_leaves_is_an_end_of_file() -> None:
    class Counting(StreamRequestHandler):
        async def handle(self) -> None:
            received.append(await self.rfile.read())

    received: list[bytes] = []
    async with memory_connection(Counting) as client:
        await client.send_all(b"some")
    assert received == [b"some"]


@bounded
async def test_not_everything_need_be_read() -> None:
    async def deaf(request: Any, client_address: Any, server: Any) -> None:
        await request.sendall(b"no")

    assert await converse(deaf, bytes(1000)) == b"no"


@bounded
async def test_ported_names_on_the_request() -> None:
    async def ported(request: Any, client_address: Any, server: Any) -> None:
        assert request.getpeername() == client_address == ("192.0.2.7", 7)
        assert request.getsockname() == server.server_address
        assert request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 0
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        assert request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        with pytest.raises(io.UnsupportedOperation):
            request.fileno()
        data = await request.recv(3)
        assert (type(data), data) == (bytes, b"abc")
        buffer = bytearray(4)
        assert await request.recv_into(buffer, 2) == 2
        assert await request.recv_into(memoryview(buffer)[2:]) == 2
        assert buffer == b"defg"
        for call in (request.recv(1, socket.MSG_PEEK), request.send(b"x", 1)):
            with pytest.raises(ValueError, match="flags"):
                await call
        await request.wait_send_all_might_not_block()
        assert await request.send(b"12") == 2
        await request.sendall(memoryview(b"34"))
        await request.shutdown(socket.SHUT_WR)
        await request.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await request.send(b"5")
        await request.shutdown(socket.SHUT_RD)
        assert await request.recv(9) == b""
        await request.close()
        with pytest.raises(trio.ClosedResourceError):
            await request.recv(9)

    async with memory_connection(ported, client_address=("192.0.2.7", 7)) as client:
        assert client.client_address == ("192.0.2.7", 7)
        await client.wait_send_all_might_not_block()
        await client.send_all(b"abcdefg")
        assert await client.rfile.read() == b"1234"
        await client.aclose()


@bounded
async def test_losing_the_peer_is_what_it_is_on_a_socket() -> None:
    async def talking(request: Any, client_address: Any, server: Any) -> None:
        assert await request.recv(9) == b""
        await request.sendall(b"too late")

    async def leave() -> None:
        async with memory_connection(talking) as client:
            await client.aclose()

    with pytest.raises(ConnectionBroken):
        await leave()
    async with memory_connection(talking) as client:
        pass  # Not if it is the block's end that closes it.
    assert client.server.statistics().peer_errors == 1


# -- errors and ends -----------------------------------------------------------------------


@bounded
async def test_what_the_handler_raises_is_raised_bare_and_first() -> None:
    """The client, which waits, does not see the connection end before that."""

    class Failing(StreamRequestHandler):
        async def handle(self) -> None:
            await self.rfile.readline()
            raise Oops("the handler")

    async def talk() -> None:
        async with memory_connection(Failing) as client:
            await client.send_all(b"\n")
            await client.receive_some()
            raise AssertionError("not reached")

    with pytest.raises(Oops, match="the handler"):
        await talk()


@bounded
async def test_faults_of_the_peer_are_raised_too() -> None:
    class Exactly(StreamRequestHandler):
        async def handle(self) -> None:
            await self.rfile.readexactly(9)

    with pytest.raises(IncompleteRead) as caught:
        await converse(Exactly, b"half")
    assert caught.value.partial == b"half"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)], ids=repr)
@bounded
async def test_what_ends_a_program_is_raised_bare(error: BaseException) -> None:
    async def ending(request: Any, client_address: Any, server: Any) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        async with memory_connection(ending):
            await trio.sleep_forever()
    assert caught.value is error


async def fail_during(handler: Any, error: Exception) -> None:
    """Raise an error in the block while the handler waits."""
    async with memory_connection(handler):
        await trio.testing.wait_all_tasks_blocked()
        raise error


@bounded
async def test_what_the_body_raises_leaves_as_it_was() -> None:
    ends = []

    class Waiting(BaseRequestHandler):
        async def handle(self) -> None:
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                ends.append("cancelled")
                raise

        async def finish(self) -> None:
            await trio.lowlevel.checkpoint()
            ends.append("finished")

    error = Oops("the body")
    with pytest.raises(Oops) as caught:
        await fail_during(Waiting, error)
    assert caught.value is error
    assert ends == ["cancelled", "finished"]


@bounded
async def test_two_errors_leave_as_a_group() -> None:
    class Failing(BaseRequestHandler):
        async def handle(self) -> None:
            await trio.sleep_forever()

        async def finish(self) -> None:
            raise Oops("cannot be seen: it is logged")

    class Stubborn(BaseRequestHandler):
        async def handle(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise Oops("the handler")

    with pytest.raises(Oops, match="the body"):
        await fail_during(Failing, Oops("the body"))
    with pytest.raises(ExceptionGroup) as caught:
        await fail_during(Stubborn, Oops("the body"))
    assert [str(error) for error in caught.value.exceptions] == ["the body", "the handler"]


@bounded
async def test_blocking_handlers_are_refused_with_the_way_out() -> None:
    def blocking(request: Any, client_address: Any, server: Any) -> None: ...

    with pytest.raises(TypeError, match=r"serving\(ThreadingTCPServer.*serving_in_thread"):
        async with memory_connection(blocking):
            pass
    with pytest.raises(TypeError, match="blocking handler"):
        await converse(blocking, b"")
    with pytest.raises(TypeError, match="blocking handler"):
        await datagram_replies(blocking, b"")


# -- time ----------------------------------------------------------------------------------


@bounded
async def test_time_limits_on_the_virtual_clock(autojump_clock: MockClock) -> None:
    class Impatient(Echo):
        timeout = 30

    class SocketTimeout(BaseRequestHandler):
        async def handle(self) -> None:
            self.request.settimeout(30)
            assert self.request.gettimeout() == 30
            await self.request.recv(1)

    class WholeRequest(NurseryTCPServer):
        request_timeout = 30

    for handler, server in (
        (Impatient, None),
        (SocketTimeout, None),
        (Echo, WholeRequest(LOCAL, Echo, bind_and_activate=False)),
    ):
        start = trio.current_time()
        with pytest.raises(RequestTimeout):
            async with memory_connection(handler, server=server) as client:
                await client.receive_some()
        assert trio.current_time() - start == 30


@bounded
async def test_draining(autojump_clock: MockClock) -> None:
    class Polite(Echo):
        async def handle(self) -> None:
            await super().handle()
            assert self.server.draining.is_set()
            await self.wfile.write(b"goodbye\n")

    async with memory_connection(Polite) as client:
        await client.send_all(b"hello\n")
        assert await client.rfile.readline() == b"hello\n"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.server.server_close)
            assert await client.rfile.read() == b"goodbye\n"
        assert_sums_up(client.server)


@bounded
async def test_what_handlers_ask_of_their_server() -> None:
    async def asking(request: Any, client_address: Any, server: Any) -> None:
        assert isinstance(server, BaseServer)
        assert not server.draining.is_set()
        assert server.statistics().active == 1
        await server.shutdown()
        await server.server_close()
        await server.draining.wait()
        await request.sendall(b"closing")

    with trio.fail_after(REAL_LIMIT):
        assert await converse(asking, b"") == b"closing"


# -- servers -------------------------------------------------------------------------------


@bounded
async def test_a_server_of_any_kind_is_handed_to_the_handler() -> None:
    async def greeting(request: Any, client_address: Any, server: Any) -> None:
        await request.sendall(server.greeting)

    state = types.SimpleNamespace(greeting=b"hello")
    assert await converse(greeting, b"", server=state) == b"hello"
    async with memory_connection(greeting, server=state) as client:
        assert client.server is state
        assert await client.rfile.read() == b"hello"


class Hooked(NurseryTCPServer):
    """Notes which of its hooks are called."""

    def __init__(self, handler: Any) -> None:
        super().__init__(LOCAL, handler, bind_and_activate=False)
        self.calls: list[str] = []
        self.accepts = True

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        self.calls.append("verify")
        return self.accepts

    async def finish_request(self, request: Any, client_address: Any) -> None:
        self.calls.append("finish")
        await super().finish_request(request, client_address)

    async def shutdown_request(self, request: Any) -> None:
        self.calls.append("shutdown")
        await super().shutdown_request(request)

    async def handle_error(self, request: Any, client_address: Any) -> None:
        self.calls.append("error")


@bounded
async def test_a_servers_hooks_are_called() -> None:
    async def failing(request: Any, client_address: Any, server: Any) -> None:
        assert server is hooked
        raise Oops

    hooked = Hooked(failing)
    with pytest.raises(Oops):
        await converse(failing, b"", server=hooked)
    assert hooked.calls == ["verify", "finish", "error", "shutdown"]
    assert hooked.statistics().failed == 1
    hooked = Hooked(Echo)
    hooked.accepts = False
    assert await converse(Echo, b"hello\n", server=hooked) == b""
    assert hooked.calls == ["verify", "shutdown"]
    assert hooked.statistics().rejected == 1
    assert_sums_up(hooked)
    assert hooked.RequestHandlerClass is Echo


@bounded
async def test_two_clients_of_one_server() -> None:
    class Chat(StreamRequestHandler):
        async def setup(self) -> None:
            await super().setup()
            self.server.members.add(self)

        async def handle(self) -> None:
            async for line in self.rfile:
                for member in self.server.members - {self}:
                    await member.wfile.write(line)

        async def finish(self) -> None:
            self.server.members.discard(self)
            await super().finish()

    async with NurseryTCPServer(LOCAL, Chat, bind_and_activate=False) as server:
        vars(server)["members"] = set()
        async with (
            memory_connection(Chat, server=server) as ann,
            memory_connection(Chat, server=server) as bob,
        ):
            await trio.testing.wait_all_tasks_blocked()
            await ann.send_all(b"hi\n")
            assert await bob.rfile.readline() == b"hi\n"
        assert server.statistics().completed == 2
        assert not vars(server)["members"]


class WithWorkers(PreforkingMixIn, NurseryTCPServer):
    """Handles in its own process what has not come through its socket."""


@pytest.mark.parametrize(
    "server_class", [TCPServer, ThreadingTCPServer, WithWorkers], ids=class_name
)
@bounded
async def test_what_a_server_accepts_connections_with_is_not_used(
    server_class: Any,
) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server = server_class(LOCAL, Echo, bind_and_activate=False, ssl_context=context)
    assert await converse(Echo, b"hello\n", server=server) == b"hello\n"
    assert server.statistics().completed == 1


@bounded
async def test_processes_are_refused() -> None:
    server = ForkingTCPServer(LOCAL, Echo, bind_and_activate=False)
    try:
        with pytest.raises(TypeError, match="child processes"):
            await converse(Echo, b"", server=server)
    finally:
        await server.server_close()


# -- datagrams -----------------------------------------------------------------------------


@bounded
async def test_datagrams() -> None:
    async def echo_twice(request: Any, client_address: Any, server: Any) -> None:
        data, replies = request
        assert isinstance(replies, DatagramSocket)
        assert replies.getsockname() == server.server_address
        assert await replies.sendto(data, client_address) == len(data)
        assert await replies.sendto(data, 0, ("192.0.2.9", 9)) == len(data)
        with pytest.raises(ConnectionBroken):
            await replies.sendto(data, None)

    ann = ("192.0.2.5", 5)
    server = NurseryUDPServer(LOCAL, Upper, bind_and_activate=False)
    for replied in (
        await datagram_replies(Upper, b"hello", client_address=ann),
        await datagram_replies(Upper, b"hello", client_address=ann, server=server),
    ):
        assert replied == [(b"HELLO", ann)]
    replied = await datagram_replies(echo_twice, b"x", client_address=ann)
    assert replied == [(b"x", ann), (b"x", ("192.0.2.9", 9))]
    assert await datagram_replies(Upper, b"") == []
    assert server.statistics().completed == 1


@bounded
async def test_what_a_datagram_handler_raises_is_raised() -> None:
    class Failing(DatagramRequestHandler):
        async def handle(self) -> None:
            raise Oops

    with pytest.raises(Oops):
        await datagram_replies(Failing, b"hello")


async def test_the_clients_end_is_a_stream() -> None:
    async def make() -> tuple[Any, Any]:
        ends = trio.testing.memory_stream_pair()
        return tuple(MemoryClient(end, None, None) for end in ends)  # type: ignore[return-value]

    await trio.testing.check_half_closeable_stream(make, None)


async def receive_and_echo(request: Any, client_address: Any, server: Any) -> None:
    await request.send_all(await request.receive_some())


async def test_two_handlers_at_once_need_two_servers() -> None:
    server = NurseryTCPServer(LOCAL, echo_all)
    async with (
        server,
        memory_connection(receive_and_echo, server=server) as one,
        memory_connection(receive_and_echo, server=server) as two,
    ):
        with pytest.raises(RuntimeError, match="another handler"):
            await converse(echo_all, b"", server=server)
        for client in (one, two):
            await client.send_all(b"echo")
            assert await client.receive_some() == b"echo"
    assert server.RequestHandlerClass is echo_all


async def test_a_server_need_not_be_hashable() -> None:
    class Comparable(NurseryTCPServer):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Comparable)

    for server in (Comparable(LOCAL, echo_all), Comparable(LOCAL, echo_all)):
        assert await converse(receive_and_echo, b"hello", server=server) == b"hello"
        assert server.RequestHandlerClass is echo_all


async def test_requests_in_memory_may_end_in_any_order() -> None:
    server = NurseryTCPServer(LOCAL, echo_all)
    ends = [trio.Event(), trio.Event()]

    async def talk(end: trio.Event) -> None:
        async with memory_connection(receive_and_echo, server=server) as client:
            await end.wait()
            await client.send_all(b"echo")
            assert await client.receive_some() == b"echo"

    async with server, trio.open_nursery() as nursery:
        for end in ends:
            nursery.start_soon(talk, end)
            await trio.testing.wait_all_tasks_blocked()
        for end in ends:
            assert server.RequestHandlerClass is receive_and_echo
            end.set()
            await trio.testing.wait_all_tasks_blocked()
        assert server.RequestHandlerClass is echo_all


async def test_a_request_is_of_its_server_s_kind() -> None:
    async with NurseryUDPServer(LOCAL, echo_all) as server:
        with pytest.raises(TypeError, match="serves datagrams: use datagram_replies"):
            await converse(echo_all, b"", server=server)
    async with NurseryTCPServer(LOCAL, echo_all) as server:
        with pytest.raises(TypeError, match="serves connections: use memory_connection"):
            await datagram_replies(echo_all, b"", server=server)


async def test_the_handler_s_timeout_bounds_what_it_receives_by_itself(
    autojump_clock: MockClock,
) -> None:
    class Impatient(StreamRequestHandler):
        timeout = 5

        async def handle(self) -> None:
            await self.request.recv(10)

    async def say_nothing() -> None:
        async with memory_connection(Impatient) as client:
            await client.receive_some()

    with pytest.raises(RequestTimeout):
        await say_nothing()
    assert trio.current_time() == 5
