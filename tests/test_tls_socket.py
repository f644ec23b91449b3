"""Holds `TLSSocket` to what a `StreamSocket` is: trio's own checks, then what TLS adds."""

from __future__ import annotations

import contextlib
import errno
import math
import random
import socket
import ssl
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing
from helpers import Moments, bounded, close_with_reset, connected, read_all
from tls_world import (
    HOST,
    ClientSide,
    both,
    client_context,
    each_version,
    server_context,
    two_ends,
)

from trio_socketserver import ConnectionBroken, RequestTimeout
from trio_socketserver._draining import FIRST_LINE_GRACE, Drain, Drained
from trio_socketserver._tls import ANSWERS_LIMIT, ENCRYPT_SIZE, TLSSocket


@contextlib.asynccontextmanager
async def established(
    version: ssl.TLSVersion | None = None, **options: Any
) -> AsyncIterator[tuple[TLSSocket, ClientSide]]:
    with two_ends(version, **options) as (server, client):
        await both(server, client)
        yield server, client


def clog(end: TLSSocket) -> int:
    """Have *end* send until the kernel takes no more, as a send that was cut short.

    Returns:
        How many times it could send.
    """
    sent = 0
    end._is_cut = True
    while end._flush_now():
        end._encrypt(memoryview(bytes(512)))
        sent += 1
    return sent


# -- as a stream ---------------------------------------------------------------------------


@pytest.mark.parametrize("lazily", [False, True], ids=["shaken", "lazily"])
@each_version
@bounded
async def test_it_is_a_half_closeable_stream(version: Any, lazily: bool) -> None:
    with contextlib.ExitStack() as stack:

        async def make(**options: Any) -> tuple[TLSSocket, ClientSide]:
            server, client = stack.enter_context(two_ends(version, **options))
            if options or not lazily:
                await both(server, client)
            return server, client

        async def make_clogged() -> tuple[TLSSocket, ClientSide]:
            # TCP would make room a moment later.
            ends = await make(kind="unix", small_buffers=True)
            while clog(ends[0]) + clog(ends[1]):
                pass  # What one side sends can make room on the other.
            return ends

        await trio.testing.check_half_closeable_stream(make, make_clogged)


@each_version
@bounded
async def test_it_understands_the_streams_of_trio(version: Any) -> None:
    with contextlib.ExitStack() as stack:

        async def make() -> tuple[TLSSocket, Any]:
            theirs, ours = stack.enter_context(connected("tcp"))
            client: Any = trio.SSLStream(
                trio.SocketStream(trio.socket.from_stdlib_socket(theirs)),
                client_context(version),
                server_hostname=HOST,
            )
            server = TLSSocket.secured(ours, server_context(), math.inf, 5.0)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.do_handshake)
                nursery.start_soon(client.do_handshake)
            return server, client

        await trio.testing.check_two_way_stream(make, None)


@bounded
async def test_it_answers_to_the_names_of_a_socket() -> None:
    async with established() as (server, client):
        assert await client.send(b"hello") == 5
        assert await server.recv(2) == b"he"
        buffer = bytearray(b"-----")
        assert await server.recv_into(buffer) == 3
        assert buffer == b"llo--"
        await client.sendall(memoryview(b"hello"))
        assert await server.recv_into(buffer, 1) == 1
        assert await server.recv(0) == b""
        assert await server.recv(100) == b"ello"
        assert server.getpeername() == client.getsockname()
        assert await server.send(bytes(2 * ENCRYPT_SIZE)) == ENCRYPT_SIZE
        await server.send_all(b"")
        for call in (
            server.recv(1, socket.MSG_PEEK),
            server.recv(-1),
            server.send(b"x", socket.MSG_OOB),
            server.sendall(b"x", socket.MSG_OOB),
            server.receive_some(0),
        ):
            with pytest.raises(ValueError, match=r"flags|negative|at least 1"):
                await call


@each_version
@bounded
async def test_it_answers_to_the_names_of_an_ssl_object(version: Any) -> None:
    with two_ends(version) as (server, client):
        assert server.version() is None
        with pytest.raises(ValueError, match="handshake not done yet"):
            server.getpeercert()
        with pytest.raises(AttributeError, match="sni"):
            _ = server.sni
        await both(server, client)
        assert server.version() == f"TLSv1.{version.name[-1]}"
        assert server.server_side is True
        assert server.getpeercert() is None
        assert server.sni is None  # An address is no name.
        assert {"getpeercert", "cipher", "sni", "receive_some"} <= set(dir(server))
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = server.no_such_name
        for name in ("_no_such_name", "read", "write", "unwrap"):
            with pytest.raises(AttributeError, match=f"'TLSSocket' .*'{name}'"):
                getattr(server, name)
            assert name not in dir(server)


@bounded
async def test_each_call_is_a_checkpoint() -> None:
    async with established() as (server, client):
        for call in (
            lambda: client.send_all(b"hello"),
            lambda: server.recv(2),
            lambda: server.receive_some(),
            lambda: server.do_handshake(),
            lambda: client.send_all(b""),
            lambda: client.send_eof(),
            lambda: server.recv(1),
            lambda: server.aclose(),
        ):
            with trio.testing.assert_checkpoints():
                await call()


@bounded
async def test_much_is_sent_in_both_directions_at_once() -> None:
    data = bytes(range(256)) * 8000

    async def send(end: TLSSocket) -> None:
        await end.send_all(data)

    async def receive(end: TLSSocket) -> None:
        received = bytearray()
        while len(received) < len(data):
            received += await end.receive_some()
        assert received == data

    async with (
        established(small_buffers=True) as (server, client),
        trio.open_nursery() as nursery,
    ):
        for end in (server, client):
            nursery.start_soon(send, end)
            nursery.start_soon(receive, end)


@bounded
async def test_two_tasks_may_begin_the_handshake() -> None:
    with two_ends() as (server, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.send_all, b"from the server")
            nursery.start_soon(server.receive_some)
            nursery.start_soon(client.send_all, b"from the client")
            assert await client.receive_some() == b"from the server"


# -- what is cut short ---------------------------------------------------------------------


@bounded
async def test_a_cancelled_receive_has_taken_nothing() -> None:
    async with established() as (server, client):
        for size in (1, 10):
            with trio.CancelScope() as scope, Moments(lambda _: scope.cancel()):
                await server.recv(size)
            assert scope.cancelled_caught
        await client.send_all(b"hello")
        assert await server.recv(10) == b"hello"


@each_version
@bounded
async def test_a_cancelled_handshake_can_be_gone_on_with(version: Any) -> None:
    """Cancelled at each of its steps, by both ends, it still comes to its end."""

    async def in_small_steps(end: TLSSocket) -> None:
        cancelled = 0
        while True:
            with trio.move_on_after(0.001) as scope:
                await end.do_handshake()
            if not scope.cancelled_caught:
                assert cancelled or end is not server
                return
            cancelled += 1
            waited.set()

    waited = trio.Event()
    with two_ends(version) as (server, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_small_steps, server)
            await waited.wait()
            nursery.start_soon(in_small_steps, client)
        await server.send_all(b"hello")
        assert await client.receive_some() == b"hello"


@bounded
async def test_after_a_cancelled_send_one_can_still_say_goodbye() -> None:
    async with established(small_buffers=True) as (server, client):
        received = b""

        async def receive() -> None:
            nonlocal received
            while data := await client.receive_some():
                received += data

        words = b"".join(b"word %06d\n" % n for n in range(100_000))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.send_all, words)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await server.send_all(b"goodbye\n")
            await server.aclose()
        before, goodbye, after = received.partition(b"goodbye\n")
        assert goodbye
        assert not after
        assert words.startswith(before)
        assert len(before) % ENCRYPT_SIZE == 0


@pytest.mark.parametrize("seed", range(5))
@each_version
@bounded
async def test_cancelled_at_any_moment_messages_come_whole_or_not_at_all(
    version: Any, seed: int
) -> None:
    """In both directions at once, where senders and receivers are cancelled by chance."""
    chance = random.Random(seed)

    async def send(end: TLSSocket, whole: list[int]) -> None:
        for number in range(150):
            message = b"%06d" % number * chance.choice([1, 10, 1000]) + b"\n"
            moment = chance.choice([1, 2, 3, 4, 5, math.inf])
            with (
                trio.CancelScope() as scope,
                Moments(lambda n: scope.cancel() if n >= moment else None),  # noqa: B023
            ):
                await end.send_all(message)
            if not scope.cancelled_caught:
                whole.append(number)
        await end.send_eof()

    async def receive(end: TLSSocket, received: bytearray) -> None:
        while True:
            moment = chance.choice([1, 2, 3, math.inf])
            with (
                trio.CancelScope() as scope,
                Moments(lambda n: scope.cancel() if n >= moment else None),  # noqa: B023
            ):
                data = await end.receive_some(chance.choice([1, 100, 10_000]))
            if scope.cancelled_caught:
                await trio.lowlevel.checkpoint()
                continue
            if not data:
                return
            received += data

    sent: list[list[int]] = [[], []]
    received = [bytearray(), bytearray()]
    async with (
        established(version, small_buffers=True) as ends,
        trio.open_nursery() as nursery,
    ):
        for n, end in enumerate(ends):
            nursery.start_soon(send, end, sent[n])
            nursery.start_soon(receive, end, received[n])
    for n in (0, 1):
        numbers = []
        for line in received[1 - n].splitlines():
            assert line == line[:6] * (len(line) // 6)
            numbers.append(int(line[:6]))
        assert numbers == sorted(set(numbers))
        assert set(sent[n]) <= set(numbers)


@bounded
async def test_no_close_notify_follows_a_send_that_was_cut_short() -> None:
    async with established(small_buffers=True) as (server, client):
        clog(server)
        with trio.testing.assert_checkpoints():
            await server.aclose()  # And it waits for nobody.
        with pytest.raises(ssl.SSLEOFError):
            await tells_an_end_from_a_cut(client)


async def tells_an_end_from_a_cut(client: TLSSocket) -> None:
    """Receive to the end; raise if there is no close_notify before it."""
    while await client.receive_some():
        pass
    if client._is_at_end:
        raise ssl.SSLEOFError


async def test_closing_waits_for_room_and_no_longer_than_it_may(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with established(kind="unix", small_buffers=True) as (server, _):
        clog(server)
        # As if all was sent, but there is no room for another word.
        server._is_cut = False
        start = trio.current_time()
        await server.aclose()
        assert trio.current_time() - start == 5.0
        assert server.fileno() == -1


@bounded
async def test_a_timeout_bounds_each_wait() -> None:
    async with established(small_buffers=True) as (server, client):
        server.settimeout(0.01)
        with pytest.raises(RequestTimeout):
            await server.receive_some()
        with pytest.raises(RequestTimeout):
            await server.send_all(bytes(10**7))
        await client.send_all(b"still here")
        assert await server.receive_some() == b"still here"


# -- ends ----------------------------------------------------------------------------------


@each_version
@bounded
async def test_after_send_eof_what_has_come_and_what_comes_is_received(
    version: Any,
) -> None:
    async with established(version) as (server, client):
        await client.send_all(b"a" * 40_000)
        await trio.lowlevel.wait_readable(server.socket)
        assert await server.recv(1) == b"a"
        await server.send_eof()
        await server.send_eof()
        assert await client.receive_some() == b""
        await client.send_all(b"b" * 40_000)
        received = b""
        while len(received) < 79_999:
            received += await server.recv(1000)
        assert received == b"a" * 39_999 + b"b" * 40_000
        await client.send_eof()
        assert await server.receive_some() == b""
        assert await server.receive_some() == b""
        with pytest.raises(trio.ClosedResourceError):
            await server.send_all(b"x")


@bounded
async def test_send_eof_after_the_end_of_the_peer() -> None:
    async with established() as (server, client):
        await client.send_all(b"last words")
        await client.send_eof()
        await trio.lowlevel.wait_readable(server.socket)
        await server.send_eof()
        assert await server.receive_some() == b"last words"
        assert await server.receive_some() == b""
        assert await client.receive_some() == b""


@bounded
async def test_send_eof_of_a_busy_socket() -> None:
    async with (
        established(small_buffers=True) as (server, _),
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.send_all, bytes(10**7))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await server.send_eof()
        nursery.cancel_scope.cancel()


@each_version
@bounded
async def test_an_end_without_close_notify_is_an_end_that_can_be_answered(
    version: Any,
) -> None:
    async with established(version) as (server, client):
        await client.send_all(b"question")
        client.socket.shutdown(socket.SHUT_WR)
        assert await server.receive_some() == b"question"
        assert await server.receive_some() == b""
        await server.send_all(b"answer")
        assert await client.receive_some() == b"answer"


@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR])
@bounded
async def test_shutdown(how: int) -> None:
    async with established() as (server, client):
        await server.shutdown(how)
        if how == socket.SHUT_RD:
            await server.send_all(b"x")
            assert await client.receive_some() == b"x"
        else:
            with pytest.raises(trio.ClosedResourceError):
                await server.send_all(b"x")
            assert await client.receive_some() == b""
            assert not client._is_at_end  # That was close_notify.
        if how != socket.SHUT_WR:
            assert await server.receive_some() == b""


@bounded
async def test_a_closed_one_is_closed() -> None:
    async with established() as (server, client):
        await client.send_all(b"not read")
        await trio.lowlevel.wait_readable(server.socket)
        await server.close()
        await server.aclose()
        for call in (server.receive_some(), server.send_all(b"x"), server.do_handshake()):
            with pytest.raises(trio.ClosedResourceError):
                await call
        with pytest.raises(trio.ClosedResourceError):
            server.getpeername()


@bounded
async def test_who_closes_before_the_handshake_says_nothing() -> None:
    with two_ends() as (server, client):
        await server.aclose()
        assert read_all(client.socket) == b""


# -- what peers do -------------------------------------------------------------------------


@bounded
async def test_a_peer_that_speaks_no_tls_is_told_and_remembered() -> None:
    with two_ends() as (server, client):
        client.socket.send(b"GET / HTTP/1.0\r\n\r\n")
        for _ in range(2):
            with pytest.raises(ConnectionBroken, match=r"handshake failed: .*http request"):
                await server.do_handshake()
        assert "_ssl.c" not in str(server._broken)
        with pytest.raises(ConnectionBroken) as caught:
            await server.send_all(b"x")
        assert caught.value.errno == errno.EPROTO


@bounded
async def test_a_peer_that_speaks_another_tls_gets_an_alert() -> None:
    with two_ends(ssl.TLSVersion.TLSv1_2) as (server, client):
        server._context.minimum_version = ssl.TLSVersion.TLSv1_3
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(ConnectionBroken, match=r"(?i)alert protocol version"):
                    await client.do_handshake()

            with pytest.raises(ConnectionBroken, match=r"(?i)handshake.*protocol"):
                await server.do_handshake()


@each_version
@bounded
async def test_garbage_in_the_middle_breaks_the_connection(version: Any) -> None:
    async with established(version) as (server, client):
        client.socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        for _ in range(2):
            with pytest.raises(ConnectionBroken, match="TLS failed: "):
                await server.receive_some()
        with pytest.raises(ConnectionBroken):
            await server.send_eof()


@bounded
async def test_garbage_before_send_eof() -> None:
    async with established() as (server, client):
        await client.send_all(b"hello")
        client.socket.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        await trio.lowlevel.wait_readable(server.socket)
        assert await server.recv(5) == b"hello"
        with pytest.raises(ConnectionBroken, match="TLS failed: "):
            await server.send_eof()


@bounded
async def test_a_peer_that_leaves_in_the_handshake() -> None:
    with two_ends() as (server, client):
        client.socket.shutdown(socket.SHUT_WR)
        for _ in range(2):
            with pytest.raises(ConnectionBroken, match="middle of the TLS handshake"):
                await server.do_handshake()


@bounded
async def test_a_reset_is_a_broken_connection() -> None:
    async with established() as (server, client):
        close_with_reset(client.socket)
        await trio.lowlevel.wait_readable(server.socket)
        with pytest.raises(ConnectionBroken):
            await server.send_all(b"x")
        await server.aclose()


@bounded
async def test_saying_goodbye_to_nobody() -> None:
    async with established() as (server, client):
        close_with_reset(client.socket)
        await trio.lowlevel.wait_readable(server.socket)
        assert server.say_goodbye_now()
        await server.aclose()


@bounded
async def test_sending_eof_to_nobody() -> None:
    async with established() as (server, client):
        close_with_reset(client.socket)
        await trio.lowlevel.wait_readable(server.socket)
        with pytest.raises(ConnectionBroken):
            await server.receive_some()
        with pytest.raises(ConnectionBroken):
            await server.send_eof()


@bounded
async def test_an_error_of_openssl_in_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def write(self, data: memoryview) -> int:
            raise ssl.SSLError(1, "[SSL: NO_WAY] no way (_ssl.c:1)")

    async with established() as (server, _):
        server._object = Refusing()
        for _ in range(2):
            with pytest.raises(
                ConnectionBroken, match=r"TLS failed: \[SSL: NO_WAY\] no way$"
            ):
                await server.send_all(b"x")


# -- time, and draining --------------------------------------------------------------------


async def test_a_handshake_takes_no_longer_than_it_may(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with two_ends() as (server, _):
        server._handshake_timeout = 60
        start = trio.current_time()
        with pytest.raises(RequestTimeout, match="handshake took longer than 60 s"):
            await server.receive_some()
        assert trio.current_time() - start == 60
        with pytest.raises(ConnectionBroken, match="took longer"):
            await server.receive_some()


async def test_a_drip_does_not_lengthen_the_handshake(
    autojump_clock: trio.testing.MockClock,
) -> None:
    with two_ends() as (server, client):
        server._handshake_timeout = 60

        async def drip() -> None:
            for byte in b"\x16\x03\x01\x02\x00" + bytes(500):
                client.socket.send(bytes([byte]))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            with pytest.raises(RequestTimeout):
                await server.do_handshake()
            assert trio.current_time() < 100
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("began", [True, False], ids=["before", "meanwhile"])
async def test_a_server_that_drains_waits_little_for_a_handshake(
    began: bool, autojump_clock: trio.testing.MockClock
) -> None:
    drain = Drain()
    with two_ends() as (server, _):
        async with trio.open_nursery() as nursery:
            if began:
                drain.begin()
            else:
                nursery.start_soon(trio.testing.wait_all_tasks_blocked)
            start = trio.current_time()

            async def begin_soon() -> None:
                await trio.sleep(7)
                drain.begin()

            nursery.start_soon(begin_soon)
            with pytest.raises(RequestTimeout, match="closed before the TLS handshake"):
                await server.do_handshake(drain)
            waited = 0 if began else 7
            assert trio.current_time() - start == pytest.approx(waited + FIRST_LINE_GRACE)
        assert not drain.waiting


@bounded
async def test_draining_ends_an_idle_wait_and_does_no_harm() -> None:
    async with established() as (server, client):
        drain = Drain()

        async def idle() -> bytes:
            return await server.receive_idle(100, drain, served=True)

        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(Drained):
                    await idle()

            await trio.testing.wait_all_tasks_blocked()
            drain.begin()
        await client.send_all(b"too late?")
        await trio.lowlevel.wait_readable(server.socket)
        assert await idle() == b"too late?"
        await server.send_all(b"no")
        assert await client.receive_some() == b"no"


@bounded
async def test_an_idle_wait_may_begin_with_the_handshake() -> None:
    with two_ends() as (server, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, b"line")
            assert await server.receive_idle(100, Drain(), served=False) == b"line"


# -- lending -------------------------------------------------------------------------------


@bounded
async def test_what_was_used_is_not_lent() -> None:
    async with established() as (server, client):
        with pytest.raises(RuntimeError, match="has been used asynchronously"):
            server.lend()
        await server.send_all(b"x")
        assert await client.receive_some() == b"x"


@bounded
async def test_what_was_lent_has_ended() -> None:
    with two_ends() as (server, _):
        lent, _ = server.lend()
        assert isinstance(lent, ssl.SSLSocket)
        with pytest.raises(trio.ClosedResourceError):
            await server.receive_some()
        server.take_back()
        with pytest.raises(trio.ClosedResourceError, match="TLS has ended"):
            await server.receive_some()
        await server.aclose()
        assert lent.fileno() == -1


@bounded
async def test_what_was_left_to_a_child_encrypts_nothing_more() -> None:
    async with established() as (server, client):
        server.leave()
        with pytest.raises(trio.ClosedResourceError):
            await server.send_all(b"x")
        await server.aclose()
        assert await client.receive_some() == b""
        assert client._is_at_end


@bounded
async def test_a_peer_that_has_gone_before_it_is_lent() -> None:
    with two_ends() as (server, client):
        client.socket.send(b"hello")
        close_with_reset(client.socket)
        await trio.lowlevel.wait_readable(server.socket)
        with pytest.raises(ConnectionBroken):
            server.lend()
        assert server.fileno() == -1


@bounded
async def test_a_send_cut_between_two_pieces_is_cut_too() -> None:
    """All that was encrypted has been sent, but not all that was to be."""
    async with established() as (server, client):
        received, scope = 0, trio.CancelScope()

        async def send() -> None:
            with scope:
                await server.send_all(bytes(10 * ENCRYPT_SIZE))
            await server.aclose()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while chunk := await client.receive_some():
                received += len(chunk)
                scope.cancel()
        assert scope.cancelled_caught
        assert received < 10 * ENCRYPT_SIZE
        with pytest.raises(ssl.SSLEOFError):
            await tells_an_end_from_a_cut(client)


@bounded
async def test_a_cancellation_after_the_last_byte_cuts_nothing() -> None:
    """The client may have read all of it by then, and is told that it was all."""
    async with established() as (server, client):
        scope = trio.CancelScope()
        with scope, Moments(lambda _: scope.cancel()):
            await server.send_all(b"all")
        assert scope.cancel_called
        await server.aclose()
        assert await client.receive_some() == b"all"
        await tells_an_end_from_a_cut(client)


@bounded
async def test_sends_that_are_cut_short_do_not_pile_up() -> None:
    async with established(kind="unix", small_buffers=True) as (server, _):
        for _ in range(20):
            with trio.move_on_after(0):
                await server.send_all(bytes(ENCRYPT_SIZE))
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(server.send_all, bytes(ENCRYPT_SIZE))
                    await trio.testing.wait_all_tasks_blocked()
                    nursery.cancel_scope.cancel()
            assert not scope.cancelled_caught
        assert 0 < len(server._unsent) < 2 * ENCRYPT_SIZE


@bounded
async def test_recv_into_takes_what_fits() -> None:
    async with established() as (server, client):
        await client.send_all(b"hello")
        with pytest.raises(TypeError, match="buffer"):
            await server.recv_into(memoryview(b"constant"))
        buffer = bytearray(3)
        assert await server.recv_into(buffer, 99) == 3
        assert buffer == b"hel"
        assert await server.recv(99) == b"lo"


class Busy:
    """What stands for an engine that is sent much and finds no data in it."""

    def __init__(self, end: TLSSocket, answer: bytes) -> None:
        self._end = end
        self._answer = answer
        self.reads = 0

    def read(self, size: int) -> bytes:
        self.reads += 1
        self._end._outgoing.write(self._answer)
        raise ssl.SSLWantReadError

    def unwrap(self) -> None: ...


@bounded
async def test_others_have_their_turn_while_a_peer_says_much_and_sends_nothing() -> None:
    """New keys, for example: 27 bytes each, and work for the server."""
    async with established() as (server, client):
        for _ in range(10):
            await client.send_all(bytes(ENCRYPT_SIZE))
        server._object = busy = Busy(server, b"")  # type: ignore[assignment]
        assert server._read_now(1) is None
        assert busy.reads == 2  # Before a piece has been taken from the kernel, and after.


@bounded
async def test_a_peer_that_wants_answers_and_reads_none() -> None:
    async with established(kind="unix", small_buffers=True) as (server, client):
        server._object = Busy(server, bytes(ENCRYPT_SIZE))  # type: ignore[assignment]
        client._sock.send(b"something")
        with pytest.raises(ConnectionBroken, match="does not read"):
            for _ in iter(lambda: server._read_now(1), b"never"):
                pass
        assert len(server._unsent) <= ANSWERS_LIMIT + 2 * ENCRYPT_SIZE
        with pytest.raises(ConnectionBroken, match="does not read"):
            await server.receive_some()


@bounded
async def test_two_tasks_may_close() -> None:
    async with established(kind="unix", small_buffers=True) as (server, _):
        clog(server)
        server._is_cut = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.aclose)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(server.aclose)


@bounded
async def test_a_closed_one_is_not_lent() -> None:
    async with established() as (server, _):
        server.close_now()
        with pytest.raises(trio.ClosedResourceError):
            server.lend()


@bounded
async def test_a_reset_is_told_each_time() -> None:
    async with established() as (server, client):
        close_with_reset(client._sock)
        for _ in range(2):
            with pytest.raises(ConnectionBroken):
                await server.receive_some()
