"""A draining server lets idle connections go at once, and loses no request it was sent."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
from helpers import STREAM_KINDS, assert_sums_up, connect, connected, read_all
from trio.testing import memory_stream_pair, wait_all_tasks_blocked

from trio_socketserver import (
    NurseryTCPServer,
    RequestTimeout,
    StreamRequestHandler,
    StreamSocket,
)
from trio_socketserver._draining import FIRST_LINE_GRACE, Drain
from trio_socketserver._files import DRAIN_GLANCE, StreamReader

KINDS = (*STREAM_KINDS, "memory")
any_stream = pytest.mark.parametrize("kind", KINDS)
Send = Callable[[bytes], None]


@contextlib.contextmanager
def stream_of(kind: str) -> Iterator[tuple[Any, Send]]:
    """Yield a stream, and a function that makes data arrive on it, at once."""
    if kind == "memory":
        near, _ = memory_stream_pair()
        incoming: Any = near.receive_stream
        yield near, incoming.put_data
        return
    with connected(kind) as (ours, theirs):
        yield StreamSocket(ours), theirs.sendall


class Iteration:
    """A task that iterates a reader, and notes what it gets and when it ends."""

    def __init__(self, reader: StreamReader) -> None:
        self.reader = reader
        self.lines: list[bytes] = []
        self.ended_at: float | None = None
        self.error: Exception | None = None

    async def __call__(self) -> None:
        try:
            async for line in self.reader:
                self.lines.append(line)
        except RequestTimeout as error:
            self.error = error
        self.ended_at = trio.current_time()


def glance(kind: str) -> float:
    """Return what the end of an idle wait costs: streams cannot be asked what they hold."""
    return DRAIN_GLANCE if kind == "memory" else 0


# -- the drain --------------------------------------------------------------------------


class Waiter:
    interrupted = 0

    def interrupt(self) -> None:
        self.interrupted += 1


async def test_begins_once_and_wakes_each_waiter_once(autojump_clock: Any) -> None:
    drain = Drain()
    waiters = [Waiter() for _ in range(3)]
    drain.waiting.update(waiters)
    drain.waiting.discard(waiters[0])
    assert not drain.event.is_set()
    assert drain.deadline(served=True) == drain.deadline(served=False) == math.inf

    await trio.sleep(10)
    drain.begin()
    await trio.sleep(10)
    drain.begin()
    assert drain.event.is_set()
    assert [waiter.interrupted for waiter in waiters] == [0, 1, 1]
    assert drain.deadline(served=True) == 10
    assert drain.deadline(served=False) == 10 + FIRST_LINE_GRACE
    assert FIRST_LINE_GRACE == 1.0


async def test_a_waiter_may_leave_when_it_is_woken() -> None:
    drain = Drain()

    class Leaving(Waiter):
        def interrupt(self) -> None:
            super().interrupt()
            drain.waiting.discard(self)

    waiters = [Leaving() for _ in range(3)]
    drain.waiting.update(waiters)
    drain.begin()
    assert all(waiter.interrupted == 1 for waiter in waiters)


# -- iteration --------------------------------------------------------------------------


@any_stream
async def test_an_idle_iteration_that_has_been_served_ends_at_once(
    kind: str, autojump_clock: Any
) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            iteration = Iteration(StreamReader(stream, drain=drain))
            nursery.start_soon(iteration)
            send(b"one\n")
            await trio.sleep(10)
            assert iteration.lines == [b"one\n"]
            assert iteration.ended_at is None
            drain.begin()
            await trio.sleep(20)
            assert iteration.ended_at == 10 + glance(kind)
    assert not drain.waiting


READING_A_LINE: dict[str, Callable[[StreamReader], Awaitable[bytes]]] = {
    "readline": lambda reader: reader.readline(),
    "readuntil": lambda reader: reader.readuntil(b"\n"),
    "readlines": lambda reader: lines_of(reader),
}


async def lines_of(reader: StreamReader) -> bytes:
    return b"".join(await reader.readlines(1))


@any_stream
@pytest.mark.parametrize("read", READING_A_LINE.values(), ids=READING_A_LINE)
async def test_a_line_is_a_line_however_it_was_read(
    kind: str, read: Callable[[StreamReader], Awaitable[bytes]], autojump_clock: Any
) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            reader = StreamReader(stream, drain=drain)
            send(b"hello\n")
            assert await read(reader) == b"hello\n"
            iteration = Iteration(reader)
            nursery.start_soon(iteration)
            await trio.sleep(10)
            drain.begin()
            await trio.sleep(20)
            assert iteration.ended_at == 10 + glance(kind)


@any_stream
async def test_who_has_not_sent_its_first_line_is_given_a_second(
    kind: str, autojump_clock: Any
) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, _):
        async with trio.open_nursery() as nursery:
            iteration = Iteration(StreamReader(stream, drain=drain))
            nursery.start_soon(iteration)
            await trio.sleep(10)
            drain.begin()
            await trio.sleep(20)
            assert iteration.lines == []
            assert iteration.ended_at == 11


@any_stream
async def test_a_first_line_within_that_second_is_served(
    kind: str, autojump_clock: Any
) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            iteration = Iteration(StreamReader(stream, drain=drain))
            nursery.start_soon(iteration)
            await trio.sleep(10)
            drain.begin()
            await trio.sleep(0.5)
            send(b"fi")
            await trio.sleep(0.4)
            send(b"rst\n")
            await trio.sleep(20)
            assert iteration.lines == [b"first\n"]
            # Served now, it has no right to the rest of the second.
            assert iteration.ended_at == pytest.approx(10.9 + glance(kind))


@any_stream
async def test_the_second_is_counted_from_when_draining_began(
    kind: str, autojump_clock: Any
) -> None:
    drain = Drain()
    drain.begin()
    await trio.sleep(0.7)
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            iteration = Iteration(StreamReader(stream, drain=drain))
            nursery.start_soon(iteration)
            await trio.sleep(0.1)
            send(b"never comp")
            await trio.sleep(20)
            assert iteration.lines == []
            assert iteration.ended_at == 1
            # What did come is not lost to who wants it.
            assert await iteration.reader.read1() == b"never comp"


@any_stream
async def test_what_has_arrived_comes_first(kind: str, autojump_clock: Any) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            reader = StreamReader(stream, drain=drain, buffer_size=4)
            send(b"one\n")
            assert await anext(reader) == b"one\n"
            send(b"two\nthree\nfour\n")
            drain.begin()
            iteration = Iteration(reader)
            nursery.start_soon(iteration)
            await trio.sleep(20)
            assert iteration.lines == [b"two\n", b"three\n", b"four\n"]
            assert iteration.ended_at == glance(kind)


@any_stream
@pytest.mark.parametrize("begun", ["waiting", "in the buffer"])
async def test_the_rest_of_a_line_that_has_begun_is_waited_for(
    kind: str, begun: str, autojump_clock: Any
) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            iteration = Iteration(StreamReader(stream, drain=drain))
            send(b"one\ntw" if begun == "in the buffer" else b"one\n")
            nursery.start_soon(iteration)
            await wait_all_tasks_blocked()
            if begun == "waiting":
                send(b"tw")
            drain.begin()
            await trio.sleep(0.9)
            assert iteration.ended_at is None
            send(b"o\n")
            await trio.sleep(20)
            assert iteration.lines == [b"one\n", b"two\n"]
            assert iteration.ended_at == pytest.approx(0.9 + glance(kind))


@any_stream
async def test_who_sends_a_line_by_and_by_has_a_second_too(
    kind: str, autojump_clock: Any
) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            iteration = Iteration(StreamReader(stream, drain=drain))
            send(b"one\ntw")
            nursery.start_soon(iteration)
            await wait_all_tasks_blocked()
            drain.begin()
            for _ in range(4):
                await trio.sleep(0.3)
                send(b"o")
            assert iteration.lines == [b"one\n"]
            assert iteration.ended_at == 1
            # What did come is not lost to who wants it.
            assert await iteration.reader.read1() == b"twooo"


@any_stream
async def test_what_arrives_in_the_moment_of_draining_is_served(
    kind: str, autojump_clock: Any
) -> None:
    drain = Drain()
    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            iteration = Iteration(StreamReader(stream, drain=drain))
            nursery.start_soon(iteration)
            send(b"one\n")
            await wait_all_tasks_blocked()
            send(b"two\n")
            drain.begin()
            await trio.sleep(20)
            assert iteration.lines == [b"one\n", b"two\n"]


@any_stream
async def test_the_end_of_the_stream_is_an_end_while_draining_too(
    kind: str, autojump_clock: Any
) -> None:
    if kind == "memory":
        near, far = memory_stream_pair()
        await far.send_all(b"last")
        await far.send_eof()
        stack: Any = contextlib.nullcontext(near)
    else:

        @contextlib.contextmanager
        def ended() -> Any:
            with connected(kind) as (ours, theirs):
                theirs.sendall(b"last")
                theirs.close()
                yield StreamSocket(ours)

        stack = ended()
    with stack as stream:
        drain = Drain()
        drain.begin()
        assert [line async for line in StreamReader(stream, drain=drain)] == [b"last"]
        assert trio.current_time() == 0


@any_stream
async def test_without_a_drain_iteration_waits(kind: str, autojump_clock: Any) -> None:
    with stream_of(kind) as (stream, _):
        with trio.move_on_after(1000) as scope:
            async for _line in StreamReader(stream):
                raise AssertionError
        assert scope.cancelled_caught


@any_stream
@pytest.mark.parametrize("draining", [False, True])
async def test_a_cancelled_wait_leaves_no_trace(
    kind: str, draining: bool, autojump_clock: Any
) -> None:
    drain = Drain()
    if draining:
        drain.begin()
    with stream_of(kind) as (stream, send):
        reader = StreamReader(stream, drain=drain)
        with trio.move_on_after(0.5) as scope:
            await anext(reader)
        assert scope.cancelled_caught
        assert not drain.waiting
        send(b"line\n")
        assert await anext(reader) == b"line\n"


@any_stream
@pytest.mark.parametrize("draining", [False, True])
async def test_a_timeout_is_one_while_draining_too(
    kind: str, draining: bool, autojump_clock: Any
) -> None:
    drain = Drain()
    if draining:
        drain.begin()
    with stream_of(kind) as (stream, _):
        if isinstance(stream, StreamSocket):
            stream.settimeout(0.5)
        reader = StreamReader(stream, drain=drain, timeout=0.5)
        with pytest.raises(RequestTimeout):
            await anext(reader)
        assert trio.current_time() == 0.5
        assert not drain.waiting


# -- what is no iteration never ends early ----------------------------------------------

WAITING: dict[str, Callable[[StreamReader], Awaitable[bytes]]] = {
    "read": lambda reader: reader.read(9),
    "readline": lambda reader: reader.readline(),
    "readexactly": lambda reader: reader.readexactly(9),
    "readuntil": lambda reader: reader.readuntil(b"ly\n"),
}


@any_stream
@pytest.mark.parametrize("name", WAITING)
@pytest.mark.parametrize("when", ["before", "while", "after iteration"])
async def test_reading_waits_for_its_answer(
    kind: str, name: str, when: str, autojump_clock: Any
) -> None:
    drain = Drain()
    answers = []

    async def read() -> None:
        answers.append(await WAITING[name](reader))

    with stream_of(kind) as (stream, send):
        async with trio.open_nursery() as nursery:
            reader = StreamReader(stream, drain=drain)
            if when == "before":
                drain.begin()
            elif when == "after iteration":
                send(b"line\n")
                iteration = Iteration(reader)
                nursery.start_soon(iteration)
                await trio.sleep(1)
                drain.begin()
                await trio.sleep(1)
                assert iteration.ended_at is not None
            nursery.start_soon(read)
            await trio.sleep(1)
            drain.begin()
            await trio.sleep(100)
            assert answers == []
            for piece in (b"final", b"ly", b"\n\n"):
                send(piece)
                await trio.sleep(100)
    assert len(answers) == 1
    assert answers[0] in (b"finally\n", b"finally\n\n")


@pytest.mark.parametrize("kind", STREAM_KINDS)
async def test_writers_take_no_notice(kind: str, autojump_clock: Any) -> None:
    drain = Drain()
    sent = bytes(200_000)
    with connected(kind, small_buffers=True) as (ours, theirs):
        stream = StreamSocket(ours)
        iteration = Iteration(StreamReader(stream, drain=drain))
        received = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(iteration)
            nursery.start_soon(stream.send_all, sent)
            theirs.sendall(b"line\n")
            await trio.sleep(1)
            drain.begin()
            while received < len(sent):
                await trio.sleep(1)
                received += len(read_all(theirs))
        assert iteration.lines == [b"line\n"]
        assert iteration.ended_at == 1


# -- in a server ------------------------------------------------------------------------


class Upper(StreamRequestHandler):
    """Answer each line; the line "slow" after ten seconds."""

    async def handle(self) -> None:
        async for line in self.rfile:
            if line == b"slow\n":
                await trio.sleep(10)
            await self.wfile.write(line.upper())
        await self.wfile.write(b"bye\n")


async def test_a_server_closes_without_keeping_or_losing_anybody(
    autojump_clock: Any,
) -> None:
    closed_at = {}
    server = NurseryTCPServer(("127.0.0.1", 0), Upper)
    clients = {}
    with contextlib.ExitStack() as stack:

        def client(name: str, data: bytes) -> None:
            clients[name] = stack.enter_context(connect(server.server_address))
            clients[name].setblocking(False)
            clients[name].sendall(data)

        async def note_end(name: str) -> None:
            while not answers[name].endswith(b"bye\n"):
                await trio.lowlevel.wait_readable(clients[name])
                answers[name] += clients[name].recv(1000)
            closed_at[name] = trio.current_time()

        async with trio.open_nursery() as nursery:
            async with server:
                await nursery.start(server.serve_forever)
                client("idle", b"hello\n")
                client("busy", b"slow\nand more\n")
                client("silent", b"")
                client("late", b"")
                await trio.sleep(5)
                assert not server.draining.is_set()
                client("fresh", b"just in time\n")
                await wait_all_tasks_blocked()
                answers = dict.fromkeys(clients, b"")
                for name in clients:
                    nursery.start_soon(note_end, name)
                nursery.start_soon(server.server_close)
                await server.draining.wait()
                assert trio.current_time() == 5
                await trio.sleep(0.5)
                clients["late"].sendall(b"sorry\n")
                clients["busy"].sendall(b"and this\n")
            # Leaving waits for the last of them.
            assert trio.current_time() == 10
    assert closed_at == {"idle": 5, "busy": 10, "silent": 6, "late": 5.5, "fresh": 5}
    assert answers == {
        "idle": b"HELLO\nbye\n",
        "busy": b"SLOW\nAND MORE\nAND THIS\nbye\n",
        "silent": b"bye\n",
        "late": b"SORRY\nbye\n",
        "fresh": b"JUST IN TIME\nbye\n",
    }
    assert_sums_up(server)
    assert server.statistics().completed == 5


async def test_each_entering_drains_anew() -> None:
    server = NurseryTCPServer(("127.0.0.1", 0), Upper)
    async with server:
        first = server.draining
        assert not first.is_set()
    assert first.is_set()
    async with server:
        assert server.draining is not first
        assert not server.draining.is_set()
