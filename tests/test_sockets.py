"""StreamSocket is a full trio stream with the names of a socket; DatagramSocket replies."""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import random
import socket
import weakref
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import (
    REAL_LIMIT,
    STREAM_KINDS,
    Moments,
    clog,
    close_with_reset,
    connected,
    read_all,
)
from trio.testing import (
    assert_checkpoints,
    check_half_closeable_stream,
    wait_all_tasks_blocked,
)

from trio_socketserver import ConnectionBroken, DatagramSocket, RequestTimeout, StreamSocket
from trio_socketserver import _sockets as sockets_module
from trio_socketserver._draining import Drain
from trio_socketserver._exceptions import is_peer_fault
from trio_socketserver._sockets import (
    RECEIVE_SIZE,
    UNIX_BACK_OFF_LIMIT,
    ListeningSocket,
    close_socket,
)

any_kind = pytest.mark.parametrize("kind", STREAM_KINDS)


@contextlib.contextmanager
def stream_and_peer(
    kind: str, *, small_buffers: bool = False
) -> Iterator[tuple[StreamSocket, socket.socket]]:
    """Yield a StreamSocket and the plain socket at its other end."""
    with connected(kind, small_buffers=small_buffers) as (ours, theirs):
        yield StreamSocket(ours), theirs


# -- the stream -------------------------------------------------------------------------


@any_kind
async def test_passes_trios_own_check(kind: str) -> None:
    with contextlib.ExitStack() as stack:

        async def make() -> tuple[StreamSocket, StreamSocket]:
            left, right = stack.enter_context(connected(kind))
            return StreamSocket(left), StreamSocket(right)

        async def make_clogged() -> tuple[StreamSocket, StreamSocket]:
            left, right = stack.enter_context(connected(kind, small_buffers=True))
            while clog(left) + clog(right):
                pass  # What one side sends can make room on the other.
            return StreamSocket(left), StreamSocket(right)

        with trio.fail_after(REAL_LIMIT):
            await check_half_closeable_stream(make, make_clogged)


@any_kind
async def test_carries_everything_to_and_from_a_blocking_peer(kind: str) -> None:
    data = random.Random(1).randbytes(1_000_000)

    def echo(peer: socket.socket) -> None:
        peer.settimeout(REAL_LIMIT)
        while chunk := peer.recv(50_000):
            peer.sendall(chunk)
        peer.shutdown(socket.SHUT_WR)

    async def send(stream: StreamSocket) -> None:
        await stream.sendall(memoryview(data))
        await stream.send_eof()

    received = bytearray()
    with stream_and_peer(kind) as (stream, peer), trio.fail_after(REAL_LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, echo, peer)
            nursery.start_soon(send, stream)
            while chunk := await stream.recv(70_000):
                received += chunk
    assert received == data


@pytest.mark.parametrize(
    ("kind", "timeout"),
    [(socket.SOCK_DGRAM, 0), (socket.SOCK_STREAM, None), (socket.SOCK_STREAM, 5)],
)
def test_takes_non_blocking_stream_sockets_only(
    kind: socket.SocketKind, timeout: float | None
) -> None:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(timeout)
        with pytest.raises(ValueError, match="non-blocking stream socket"):
            StreamSocket(sock)


# -- the ported names -------------------------------------------------------------------


async def test_names_of_a_socket_that_wait_are_awaited() -> None:
    with stream_and_peer("tcp") as (stream, peer):
        assert isinstance(stream, trio.abc.HalfCloseableStream)
        assert await stream.send(b"spam") == 4
        assert await stream.sendall(b" and eggs") is None
        assert read_all(peer) == b"spam and eggs"

        peer.send(b"abcdefghij")
        assert await stream.recv(4, socket.MSG_PEEK) == b"abcd"
        assert await stream.recv(4) == b"abcd"
        buffer = bytearray(10)
        assert await stream.recv_into(buffer, 2) == 2
        assert await stream.recv_into(memoryview(buffer)[2:], 0, socket.MSG_PEEK) == 4
        assert buffer == b"efghij" + bytes(4)
        assert await stream.recv_into(buffer) == 4
        assert buffer.startswith(b"ghij")

        await stream.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""
        peer.send(b"still open")
        assert await stream.recv(20) == b"still open"
        await stream.close()
        assert stream.fileno() == -1


async def test_sendall_refuses_flags_that_it_would_ignore() -> None:
    with stream_and_peer("unix") as (stream, peer):
        with pytest.raises(ValueError, match="flags"):
            await stream.sendall(b"x", socket.MSG_DONTWAIT)
        assert read_all(peer) == b""


async def test_send_takes_flags_and_reports_a_part() -> None:
    with stream_and_peer("tcp", small_buffers=True) as (stream, peer):
        sent = await stream.send(bytes(10_000_000), socket.MSG_NOSIGNAL)
        assert 0 < sent < 10_000_000
        received = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                received += len(peer.recv(65536))
        assert 0 < received <= sent


async def test_names_of_a_socket_that_do_not_wait_are_plain() -> None:
    with stream_and_peer("tcp") as (stream, peer):
        assert stream.getpeername() == peer.getsockname()
        assert stream.getsockname() == peer.getpeername()
        assert stream.fileno() == stream.socket.fileno() >= 0
        option = (socket.IPPROTO_TCP, socket.TCP_NODELAY)
        stream.setsockopt(*option, 1)
        assert stream.getsockopt(*option) == stream.socket.getsockopt(*option) != 0
        assert stream.gettimeout() is None
        stream.settimeout(2.5)
        assert stream.gettimeout() == 2.5
        assert "StreamSocket" in repr(stream)
        assert str(stream.getpeername()) in repr(stream)


@pytest.mark.parametrize("seconds", [-1, math.nan])
def test_settimeout_refuses_what_a_socket_refuses(seconds: float) -> None:
    with stream_and_peer("unix") as (stream, peer):
        with pytest.raises(ValueError):  # noqa: PT011 (two messages, one of them socket's)
            peer.settimeout(seconds)
        with pytest.raises(ValueError):  # noqa: PT011
            stream.settimeout(seconds)


def test_can_be_referred_to_weakly_like_a_socket() -> None:
    with stream_and_peer("unix") as (stream, peer):
        assert set(weakref.WeakSet([stream])) == {stream}
        assert set(weakref.WeakSet([peer])) == {peer}


async def test_receive_some_takes_64_kib_unless_told_and_refuses_nothing() -> None:
    with stream_and_peer("unix") as (stream, peer):
        peer.send(bytes(RECEIVE_SIZE))
        peer.send(b"more")
        assert len(await stream.receive_some()) == RECEIVE_SIZE
        assert await stream.receive_some(3) == b"mor"
        for size in (0, -1):
            with pytest.raises(ValueError, match="at least 1"):
                await stream.receive_some(size)
        assert await stream.receive_some(None) == b"e"


# -- other tasks get their turn ---------------------------------------------------------


async def test_every_call_that_need_not_wait_is_a_checkpoint() -> None:
    with stream_and_peer("unix") as (stream, peer):
        peer.send(b"x" * 10)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: stream.receive_some(1),
            lambda: stream.recv(1),
            lambda: stream.recv_into(bytearray(1)),
            lambda: stream.send(b"x"),
            lambda: stream.send_all(b"x"),
            lambda: stream.sendall(b"x"),
            stream.wait_send_all_might_not_block,
            lambda: stream.shutdown(socket.SHUT_RD),
            stream.send_eof,
            stream.send_eof,
            stream.aclose,
            stream.close,
        ]
        for call in calls:
            with assert_checkpoints():
                await call()


# -- what the peer does -----------------------------------------------------------------


async def test_a_reset_is_a_broken_connection_for_old_and_new_code() -> None:
    with stream_and_peer("tcp") as (stream, peer):
        close_with_reset(peer)
        with pytest.raises(ConnectionBroken) as caught:
            await stream.receive_some()
        assert isinstance(caught.value, ConnectionError)
        assert isinstance(caught.value, trio.BrokenResourceError)
        assert caught.value.errno == errno.ECONNRESET
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        assert is_peer_fault(caught.value)


SENDING: dict[str, Callable[[StreamSocket], Awaitable[object]]] = {
    "send_all": lambda stream: stream.send_all(b"x"),
    "send": lambda stream: stream.send(b"x"),
    "send_eof": lambda stream: stream.send_eof(),
    "shutdown": lambda stream: stream.shutdown(socket.SHUT_RDWR),
}


@pytest.mark.parametrize("call", SENDING.values(), ids=SENDING)
async def test_sending_after_a_reset(call: Callable[[StreamSocket], Any]) -> None:
    with stream_and_peer("tcp") as (stream, peer):
        close_with_reset(peer)
        with pytest.raises(ConnectionBroken):
            await stream.recv(1)
        with pytest.raises(ConnectionBroken) as caught:
            await call(stream)
        assert caught.value.errno in (errno.EPIPE, errno.ENOTCONN)


async def test_asking_for_the_peers_name_after_a_reset() -> None:
    with stream_and_peer("tcp") as (stream, peer):
        close_with_reset(peer)
        with pytest.raises(ConnectionBroken):
            stream.getpeername()


@pytest.mark.parametrize("call", ["receive_some", "send_all", "send"])
async def test_a_reset_wakes_who_waits(call: str) -> None:
    with stream_and_peer("tcp", small_buffers=True) as (stream, peer):
        if call != "receive_some":
            clog(stream.socket)
        argument = 10 if call == "receive_some" else bytes(10)
        raised = []

        async def wait() -> None:
            with pytest.raises(ConnectionBroken) as caught:
                await getattr(stream, call)(argument)
            raised.append(caught.value.errno)

        with trio.fail_after(REAL_LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                close_with_reset(peer)
        assert raised[0] in (errno.ECONNRESET, errno.EPIPE)


async def test_end_of_file_is_an_empty_answer_each_time() -> None:
    with stream_and_peer("tcp") as (stream, peer):
        peer.send(b"last")
        peer.close()
        assert await stream.recv(10) == b"last"
        assert await stream.receive_some() == b""
        assert await stream.recv_into(bytearray(4)) == 0


# -- closed on this side ----------------------------------------------------------------

OPERATIONS: dict[str, Callable[[StreamSocket], Awaitable[object]]] = {
    "receive_some": lambda stream: stream.receive_some(10),
    "recv": lambda stream: stream.recv(10),
    "recv_into": lambda stream: stream.recv_into(bytearray(10)),
    "receive_idle": lambda stream: stream.receive_idle(10, Drain(), served=False),
    "send_all": lambda stream: stream.send_all(bytes(10)),
    "send_all of nothing": lambda stream: stream.send_all(b""),
    "send": lambda stream: stream.send(bytes(10)),
    "wait": lambda stream: stream.wait_send_all_might_not_block(),
    "send_eof": lambda stream: stream.send_eof(),
    "shutdown": lambda stream: stream.shutdown(socket.SHUT_RD),
}
WAITING = [
    "receive_some",
    "recv",
    "recv_into",
    "receive_idle",
    "send_all",
    "send",
    "wait",
]


@pytest.mark.parametrize("call", OPERATIONS.values(), ids=OPERATIONS)
async def test_a_closed_socket_is_closed_for_everything(
    call: Callable[[StreamSocket], Any],
) -> None:
    with stream_and_peer("tcp") as (stream, _peer):
        await stream.send_eof()  # Being closed says more than that.
        await stream.aclose()
        with pytest.raises(trio.ClosedResourceError):
            await call(stream)


@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("timeout", [None, 60])
async def test_closing_wakes_who_waits(name: str, timeout: float | None) -> None:
    with stream_and_peer("unix", small_buffers=True) as (stream, _peer):
        stream.settimeout(timeout)
        clog(stream.socket)

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await OPERATIONS[name](stream)

        with trio.fail_after(REAL_LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                await stream.close()


@any_kind
async def test_the_closed_sending_side_takes_nothing(kind: str) -> None:
    with stream_and_peer(kind) as (stream, peer):
        await stream.shutdown(socket.SHUT_WR)
        for name in ("send_all", "send_all of nothing", "send", "wait"):
            with pytest.raises(trio.ClosedResourceError):
                await OPERATIONS[name](stream)
        await stream.send_eof()
        peer.send(b"the other side is open")
        assert await stream.recv(30) == b"the other side is open"


async def test_shutting_down_the_receiving_side_leaves_the_sending_side() -> None:
    with stream_and_peer("tcp") as (stream, peer):
        await stream.shutdown(socket.SHUT_RD)
        assert await stream.recv(1) == b""
        await stream.send_all(b"bye")
        assert read_all(peer) == b"bye"


async def test_what_is_shut_down_here_is_not_blamed_on_the_peer() -> None:
    with stream_and_peer("tcp", small_buffers=True) as (stream, _peer):

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(bytes(10_000_000))

        with trio.fail_after(REAL_LIMIT):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await wait_all_tasks_blocked()
                await stream.shutdown(socket.SHUT_RDWR)


async def test_a_cancelled_close_closes() -> None:
    for name in ("aclose", "close"):
        with stream_and_peer("unix") as (stream, peer):
            with trio.CancelScope() as scope:
                scope.cancel()
                await getattr(stream, name)()
            assert scope.cancelled_caught
            assert stream.fileno() == -1
            assert peer.recv(1) == b""


def test_closes_outside_of_a_trio_run() -> None:
    with stream_and_peer("unix") as (stream, peer):
        stream.close_now()
        stream.close_now()
        assert stream.fileno() == -1
        assert peer.recv(1) == b""


# -- the end of a request ---------------------------------------------------------------


@any_kind
def test_shutdown_now_ends_the_connection_for_every_holder(kind: str) -> None:
    with stream_and_peer(kind) as (stream, peer), stream.socket.dup():
        stream.shutdown_now()
        stream.close_now()
        assert peer.recv(1) == b""


def test_shutdown_now_forgives_who_has_gone() -> None:
    with stream_and_peer("tcp") as (stream, peer):
        close_with_reset(peer)
        stream.shutdown_now()
        stream.close_now()
        stream.shutdown_now()
        assert stream.fileno() == -1


def test_shutdown_now_forgives_nothing_else() -> None:
    class Broken(socket.socket):
        def shutdown(self, how: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    with connected("unix") as (ours, _), Broken(fileno=ours.detach()) as sock:
        sock.setblocking(False)
        stream = StreamSocket(sock)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            stream.shutdown_now()


# -- one sender, one receiver -----------------------------------------------------------

SENDERS = {
    "send_all": lambda stream: stream.send_all(b"intruder"),
    "send": lambda stream: stream.send(b"intruder"),
    "wait": lambda stream: stream.wait_send_all_might_not_block(),
    "send_eof": lambda stream: stream.send_eof(),
}


@any_kind
@pytest.mark.parametrize("call", SENDERS.values(), ids=SENDERS)
async def test_a_second_sender_is_refused_and_mixes_nothing_in(
    kind: str, call: Callable[[StreamSocket], Any]
) -> None:
    data = random.Random(2).randbytes(300_000)
    with (
        stream_and_peer(kind, small_buffers=True) as (stream, peer),
        trio.fail_after(REAL_LIMIT),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await call(stream)
            received = bytearray()
            while len(received) < len(data):
                await trio.lowlevel.wait_readable(peer)
                received += peer.recv(65536)
        assert received == data
        await stream.send_all(b"later")
        assert read_all(peer) == b"later"


async def test_a_waiting_send_refuses_a_second_sender() -> None:
    with (
        stream_and_peer("unix", small_buffers=True) as (stream, peer),
        trio.fail_after(REAL_LIMIT),
    ):
        filler = clog(stream.socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, b"first")
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await stream.send_all(b"second")
            received = read_all(peer)
        assert received + read_all(peer) == bytes(filler) + b"first"


@pytest.mark.parametrize("name", ["receive_some", "recv", "recv_into", "receive_idle"])
async def test_a_second_receiver_is_refused_and_takes_nothing(name: str) -> None:
    with stream_and_peer("tcp") as (stream, peer), trio.fail_after(REAL_LIMIT):
        received = []

        async def receive() -> None:
            received.append(await stream.receive_some())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await OPERATIONS[name](stream)
            peer.send(b"for the first")
        assert received == [b"for the first"]


async def test_a_second_receiver_does_not_cut_the_first_off_from_draining() -> None:
    drain = Drain()
    with stream_and_peer("unix") as (stream, _peer), trio.fail_after(REAL_LIMIT):

        async def receive() -> None:
            with pytest.raises(sockets_module.Drained):
                await stream.receive_idle(10, drain, served=True)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await stream.receive_idle(10, drain, served=True)
            drain.begin()


async def test_sending_and_receiving_go_together() -> None:
    with (
        stream_and_peer("unix", small_buffers=True) as (stream, peer),
        trio.fail_after(REAL_LIMIT),
    ):
        clog(stream.socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, b"x" * 1000)
            await wait_all_tasks_blocked()
            peer.send(b"ping")
            assert await stream.recv(10) == b"ping"
            read_all(peer)


# -- cancellation -----------------------------------------------------------------------

RECEIVING: dict[str, Callable[[StreamSocket], Awaitable[bytes]]] = {
    "receive_some": lambda stream: stream.receive_some(4),
    "recv": lambda stream: stream.recv(4),
    "receive_idle": lambda stream: stream.receive_idle(4, Drain(), served=False),
}


async def recv_into(stream: StreamSocket) -> bytes:
    buffer = bytearray(4)
    return bytes(buffer[: await stream.recv_into(buffer)])


RECEIVING["recv_into"] = recv_into


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("data_at", [0, 1], ids=["data there", "data comes"])
@pytest.mark.parametrize("call", RECEIVING.values(), ids=RECEIVING)
async def test_cancelling_loses_no_received_byte(
    call: Callable[[StreamSocket], Awaitable[bytes]], data_at: int, timeout: float | None
) -> None:
    async def cancelled_at(cancel_at: int) -> bool:
        sent = b""

        def happen(moment: int) -> None:
            nonlocal sent
            if moment == data_at:
                sent = b"12345678"
                peer.send(sent)
            if moment == cancel_at:
                scope.cancel()

        received = b""
        with stream_and_peer("unix") as (stream, peer):
            stream.settimeout(timeout)
            with trio.CancelScope() as scope, Moments(happen) as moments:
                happen(0)
                received = await call(stream)
            assert received + read_all(stream.socket) == sent
        ways_out.add("cancelled" if scope.cancelled_caught else "received")
        return moments.passed >= cancel_at

    ways_out: set[str] = set()
    cancel_at = 0
    with trio.fail_after(REAL_LIMIT):
        while await cancelled_at(cancel_at):
            cancel_at += 1
    # receive_idle() leaves it to its caller to look for a cancellation first.
    never_cancelled = call is RECEIVING["receive_idle"] and data_at == 0
    assert ways_out == {"received"} | ({"cancelled"} if not never_cancelled else set())


@pytest.mark.parametrize("full", [False, True])
async def test_a_cancelled_send_has_sent_nothing(full: bool) -> None:
    async def cancelled_at(cancel_at: int) -> bool:
        def happen(moment: int) -> None:
            if moment == cancel_at:
                scope.cancel()
            if full and moment == 1:
                received.extend(read_all(peer))

        sent = 0
        received = bytearray()
        with stream_and_peer("unix", small_buffers=True) as (stream, peer):
            filler = clog(stream.socket) if full else 0
            with trio.CancelScope() as scope, Moments(happen) as moments:
                happen(0)
                sent = await stream.send(b"abc")
            received += read_all(peer)
        assert scope.cancelled_caught is (sent == 0)
        assert received == bytes(filler) + b"abc"[:sent]
        ways_out.add(sent)
        return moments.passed >= cancel_at

    ways_out: set[int] = set()
    cancel_at = 0
    with trio.fail_after(REAL_LIMIT):
        while await cancelled_at(cancel_at):
            cancel_at += 1
    assert ways_out == {0, 3}


async def test_a_cancelled_send_all_frees_the_sending_side() -> None:
    with (
        stream_and_peer("unix", small_buffers=True) as (stream, peer),
        trio.fail_after(REAL_LIMIT),
    ):
        for name in ("send_all", "send", "wait"):
            clog(stream.socket)
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(OPERATIONS[name], stream)
                    await wait_all_tasks_blocked()
                    scope.cancel()
            read_all(peer)
            await stream.send_all(b"free")
            assert read_all(peer) == b"free"


# -- timeouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAITING)
async def test_each_wait_is_bounded(name: str, autojump_clock: Any) -> None:
    with stream_and_peer("unix", small_buffers=True) as (stream, _peer):
        clog(stream.socket)
        stream.settimeout(3)
        start = trio.current_time()
        with pytest.raises(RequestTimeout, match="3 s") as caught:
            await OPERATIONS[name](stream)
        assert trio.current_time() - start == 3
        assert isinstance(caught.value, TimeoutError)
        assert isinstance(caught.value, trio.TooSlowError)
        assert is_peer_fault(caught.value)

        stream.settimeout(None)
        with trio.move_on_after(1000) as scope:
            await OPERATIONS[name](stream)
        assert scope.cancelled_caught


async def test_a_slow_peer_is_not_a_stuck_one(autojump_clock: Any) -> None:
    with stream_and_peer("unix", small_buffers=True) as (stream, peer):
        stream.settimeout(3)
        filler = clog(stream.socket)
        received = 0

        async def read_slowly() -> None:
            nonlocal received
            while received < filler + 50_000:
                await trio.sleep(2)
                received += len(read_all(peer))

        start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_slowly)
            await stream.send_all(bytes(50_000))
        assert trio.current_time() - start > 6
        assert received == filler + 50_000


async def test_a_timeout_is_not_mixed_up_with_a_cancellation(autojump_clock: Any) -> None:
    with stream_and_peer("unix") as (stream, _peer):
        stream.settimeout(3)
        with trio.move_on_after(2) as scope:
            await stream.recv(1)
        assert scope.cancelled_caught
        assert trio.current_time() == 2


async def test_in_time_is_in_time(autojump_clock: Any) -> None:
    with stream_and_peer("unix") as (stream, peer):
        stream.settimeout(3)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.recv, 1)
            await trio.sleep(2.9)
            peer.send(b"x")


# -- interrupt() ------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 60])
@pytest.mark.parametrize("call", RECEIVING.values(), ids=RECEIVING)
async def test_an_interrupted_reader_reads_on(
    call: Callable[[StreamSocket], Awaitable[bytes]], timeout: float | None
) -> None:
    received = []

    async def receive(stream: StreamSocket) -> None:
        received.append(await call(stream))

    with stream_and_peer("tcp") as (stream, peer), trio.fail_after(REAL_LIMIT):
        stream.settimeout(timeout)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, stream)
            for _ in range(3):
                await wait_all_tasks_blocked()
                stream.interrupt()
            await wait_all_tasks_blocked()
            assert received == []
            peer.send(b"data")
        assert received == [b"data"]


@any_kind
async def test_an_interrupted_writer_writes_on(kind: str) -> None:
    data = random.Random(3).randbytes(100_000)
    with (
        stream_and_peer(kind, small_buffers=True) as (stream, peer),
        trio.fail_after(REAL_LIMIT),
    ):
        received = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            while len(received) < len(data):
                await wait_all_tasks_blocked()
                stream.interrupt()
                await wait_all_tasks_blocked()
                received += read_all(peer)
        assert received == data


async def test_an_interrupted_send_sends_on() -> None:
    with (
        stream_and_peer("unix", small_buffers=True) as (stream, peer),
        trio.fail_after(REAL_LIMIT),
    ):
        filler = clog(stream.socket)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, b"end")
            await wait_all_tasks_blocked()
            stream.interrupt()
            await wait_all_tasks_blocked()
            received = read_all(peer)
        assert received + read_all(peer) == bytes(filler) + b"end"


async def test_interrupting_what_does_not_wait_does_nothing() -> None:
    with stream_and_peer("unix") as (stream, peer):
        stream.interrupt()
        peer.send(b"x")
        assert await stream.recv(1) == b"x"
        stream.close_now()
        stream.interrupt()
        with pytest.raises(trio.ClosedResourceError):
            await stream.recv(1)


# -- the listening socket ---------------------------------------------------------------


@pytest.mark.parametrize("close", [ListeningSocket.close, close_socket])
async def test_closing_a_listening_socket_by_any_means_wakes_its_loop(
    close: Callable[[ListeningSocket], None],
) -> None:
    with ListeningSocket() as listener, trio.fail_after(REAL_LIMIT):
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await trio.lowlevel.wait_readable(listener)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            close(listener)
        close(listener)
        assert listener.fileno() == -1


@pytest.mark.parametrize("close", [ListeningSocket.close, close_socket])
def test_a_listening_socket_closes_outside_of_a_run(
    close: Callable[[ListeningSocket], None],
) -> None:
    listener = ListeningSocket()
    close(listener)
    close(listener)
    assert listener.fileno() == -1


# -- DatagramSocket ---------------------------------------------------------------------


class Counting(socket.socket):
    """A datagram socket that counts attempts to send, and refuses the first of them."""

    attempts = 0
    refuse = 0

    def sendto(self, *args: Any) -> int:
        self.attempts += 1
        if self.attempts <= self.refuse:
            raise BlockingIOError
        return super().sendto(*args)


@contextlib.contextmanager
def udp_pair() -> Iterator[tuple[Counting, socket.socket]]:
    """Yield two bound, non-blocking UDP sockets."""
    with (
        Counting(socket.AF_INET, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as theirs,
    ):
        for sock in (ours, theirs):
            sock.setblocking(False)
            sock.bind(("127.0.0.1", 0))
        yield ours, theirs


def unix_datagram_socket(address: str = "") -> Counting:
    """Return a non-blocking Unix datagram socket, bound to *address* or any name."""
    sock = Counting(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.bind(address)
    return sock


def read_datagrams(sock: socket.socket) -> list[bytes]:
    """Return the datagrams that *sock* holds now."""
    received = []
    with contextlib.suppress(BlockingIOError):
        while True:
            received.append(sock.recv(65536))
    return received


async def test_many_tasks_reply_at_once() -> None:
    with udp_pair() as (ours, theirs), trio.fail_after(REAL_LIMIT):
        sender = DatagramSocket(ours)
        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(sender.sendto, b"%d" % n, theirs.getsockname())
        assert sorted(read_datagrams(theirs)) == sorted(b"%d" % n for n in range(100))


async def test_many_tasks_wait_for_a_full_socket_at_once() -> None:
    with udp_pair() as (ours, theirs), trio.fail_after(REAL_LIMIT):
        ours.refuse = 25  # Each of ten senders is refused twice at least.
        sender = DatagramSocket(ours)
        async with trio.open_nursery() as nursery:
            for n in range(10):
                nursery.start_soon(sender.sendto, b"%d" % n, theirs.getsockname())
        assert sorted(read_datagrams(theirs)) == [b"%d" % n for n in range(10)]


async def test_closing_tells_everyone_who_waits_for_a_full_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Over loopback the kernel never reports a UDP socket full: wait for what never comes.
    monkeypatch.setattr(sockets_module, "wait_writable", trio.lowlevel.wait_readable)
    with udp_pair() as (ours, theirs), trio.fail_after(REAL_LIMIT):
        ours.refuse = 3
        sender = DatagramSocket(ours)
        closed = []

        async def send(address: Any) -> None:
            with pytest.raises(trio.ClosedResourceError):
                await sender.sendto(b"x", address)
            closed.append(True)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(send, theirs.getsockname())
            await wait_all_tasks_blocked()
            close_socket(ours)
        assert len(closed) == 3


def fill_queue(sock: socket.socket, address: Any) -> int:
    """Send datagrams until the peer's queue is full, and return how many."""
    for count in itertools.count():
        try:
            sock.sendto(b"filler", address)
        except BlockingIOError:
            return count
    raise AssertionError


async def test_a_full_unix_peer_delays_its_own_reply_only(autojump_clock: Any) -> None:
    with (
        unix_datagram_socket() as ours,
        unix_datagram_socket() as stuck,
        unix_datagram_socket() as quick,
    ):
        sender = DatagramSocket(ours)
        filler = fill_queue(ours, stuck.getsockname())
        ours.attempts = 0
        replied_at = []

        async def reply_to_stuck() -> None:
            assert await sender.sendto(b"at last", stuck.getsockname()) == 7
            replied_at.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reply_to_stuck)
            await wait_all_tasks_blocked()
            for _ in range(5):
                await sender.sendto(b"hello", quick.getsockname())
                assert read_datagrams(quick) == [b"hello"]
            assert trio.current_time() == 0
            await trio.sleep(10)
            # It backs off instead of spinning, and soon notices room.
            assert ours.attempts < 10 / UNIX_BACK_OFF_LIMIT + 20
            assert len(read_datagrams(stuck)) == filler
        assert read_datagrams(stuck) == [b"at last"]
        assert 10 < replied_at[0] <= 10 + UNIX_BACK_OFF_LIMIT + 1e-9


@pytest.mark.parametrize("address", [None, "", b""])
async def test_a_unix_client_without_a_name_cannot_be_replied_to(address: Any) -> None:
    with unix_datagram_socket() as ours:
        with pytest.raises(ConnectionBroken) as caught:
            await DatagramSocket(ours).sendto(b"x", address)
        assert caught.value.errno == errno.EDESTADDRREQ
        assert is_peer_fault(caught.value)


async def test_the_address_of_an_unbound_client_is_what_the_kernel_says() -> None:
    with (
        unix_datagram_socket() as ours,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as c,
    ):
        c.sendto(b"hello", ours.getsockname())
        _, address = ours.recvfrom(10)
        with pytest.raises(ConnectionBroken):
            await DatagramSocket(ours).sendto(b"x", address)


@pytest.mark.parametrize("leave_file", [False, True])
async def test_a_unix_client_that_has_gone(tmp_path: Path, leave_file: bool) -> None:
    path = str(tmp_path / "client")
    unix_datagram_socket(path).close()
    if not leave_file:
        os.unlink(path)
    with unix_datagram_socket() as ours:
        with pytest.raises(ConnectionBroken) as caught:
            await DatagramSocket(ours).sendto(b"x", path)
        expected = errno.ECONNREFUSED if leave_file else errno.ENOENT
        assert caught.value.errno == expected


async def test_a_datagram_that_is_too_long_is_not_the_peers_fault() -> None:
    with udp_pair() as (ours, theirs):
        sender = DatagramSocket(ours)
        with pytest.raises(OSError, match=os.strerror(errno.EMSGSIZE)) as caught:
            await sender.sendto(bytes(70_000), theirs.getsockname())
        assert caught.value.errno == errno.EMSGSIZE
        assert not isinstance(caught.value, ConnectionBroken)
        assert await sender.sendto(b"short", theirs.getsockname()) == 5


async def test_a_closed_datagram_socket() -> None:
    with udp_pair() as (ours, theirs):
        sender = DatagramSocket(ours)
        close_socket(ours)
        with pytest.raises(trio.ClosedResourceError):
            await sender.sendto(b"x", theirs.getsockname())


@pytest.mark.parametrize("full", [False, True])
async def test_a_cancelled_sendto_has_sent_nothing(full: bool) -> None:
    async def cancelled_at(cancel_at: int) -> bool:
        def happen(moment: int) -> None:
            if moment == cancel_at:
                scope.cancel()

        sent = 0
        with unix_datagram_socket() as ours, unix_datagram_socket() as theirs:
            sender = DatagramSocket(ours)
            if full:
                ours.refuse = 2
            with trio.CancelScope() as scope, Moments(happen) as moments:
                happen(0)
                sent = await sender.sendto(b"abc", theirs.getsockname())
            assert read_datagrams(theirs) == [b"abc"] * bool(sent)
        assert scope.cancelled_caught is (sent == 0)
        ways_out.add(sent)
        return moments.passed >= cancel_at

    ways_out: set[int] = set()
    cancel_at = 0
    with trio.fail_after(REAL_LIMIT):
        while await cancelled_at(cancel_at):
            cancel_at += 1
    assert ways_out == {0, 3}


async def test_sendto_has_the_forms_of_a_sockets() -> None:
    with udp_pair() as (ours, theirs):
        sender = DatagramSocket(ours)
        with assert_checkpoints():
            await sender.sendto(bytearray(b"plain"), theirs.getsockname())
        await sender.sendto(memoryview(b"flags"), socket.MSG_DONTWAIT, theirs.getsockname())
        assert read_datagrams(theirs) == [b"plain", b"flags"]
        with pytest.raises(TypeError):
            await sender.sendto(b"to nobody")


def test_plain_names_of_a_datagram_socket() -> None:
    with udp_pair() as (ours, _):
        sender = DatagramSocket(ours)
        assert sender.socket is ours
        assert sender.fileno() == ours.fileno()
        assert sender.getsockname() == ours.getsockname()
        assert sender.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) == socket.SOCK_DGRAM
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
        assert "DatagramSocket" in repr(sender)
        assert weakref.ref(sender)() is sender


# == Accepting and lending ================================================================


@pytest.mark.parametrize("timeout", [None, 5.0])
async def test_what_is_accepted_never_waits(timeout: float | None) -> None:
    ours, peer = socket.socketpair()
    ours.settimeout(timeout)
    with peer, trio.move_on_after(0.05) as scope:
        async with StreamSocket.accepted(ours) as stream:
            await stream.receive_some()
    assert scope.cancelled_caught


async def test_the_underlying_socket_is_non_blocking_for_whoever_asks() -> None:
    ours, peer = socket.socketpair()
    with peer:
        stream = StreamSocket.accepted(ours)
        assert stream.socket.gettimeout() == 0
        stream.close_now()
        assert stream.socket.fileno() == -1


async def test_closing_ends_what_a_file_of_the_socket_holds_open() -> None:
    ours, peer = socket.socketpair()
    with peer:
        stream = StreamSocket.accepted(ours)
        lent, _ = stream.lend()
        with lent.makefile("rb"):
            stream.take_back()
            stream.close_now()
            assert peer.recv(1) == b""


async def test_what_is_lent_is_closed_here_and_woken_by_closing() -> None:
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    async with trio.open_nursery() as nursery:
        with peer, ours:
            stream = StreamSocket(ours)
            assert stream.held() == [ours]

            async def wait() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await stream.receive_some()

            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            lent, _ = stream.lend()
            assert stream.fileno() == -1
            assert stream.held() == [lent]
            stream.close_now()
            assert lent.recv(1) == b"", "closing wakes the borrower"
            stream.take_back()
            assert stream.fileno() == lent.fileno()
            stream.close_now()
