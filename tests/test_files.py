"""rfile answers as io.BufferedReader does, loses nothing, bounds lines; wfile writes."""

from __future__ import annotations

import array
import collections
import contextlib
import io
import itertools
import random
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, Moments, clog, close_with_reset, connected, read_all
from trio.testing import (
    MemoryReceiveStream,
    assert_checkpoints,
    lockstep_stream_pair,
    memory_stream_pair,
    wait_all_tasks_blocked,
)

from trio_socketserver import (
    ConnectionBroken,
    IncompleteRead,
    LineTooLong,
    RequestTimeout,
    StreamSocket,
)
from trio_socketserver._draining import Drain
from trio_socketserver._exceptions import is_peer_fault
from trio_socketserver._files import (
    LINES_IN_A_ROW,
    MAX_LINE_SIZE,
    WRITE_BUFFER_SIZE,
    StreamReader,
    StreamWriter,
)

# -- peers that send piece by piece -----------------------------------------------------


class Pieces:
    """The pieces that a peer sends, each when the one before has been received."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.left = collections.deque(piece for piece in pieces if piece)
        self.in_transit = 0

    def next(self) -> bytes | None:
        """Return what is to be sent now: a piece, b"" for the end, or None."""
        if self.in_transit:
            return None
        piece = self.left.popleft() if self.left else b""
        self.in_transit = len(piece)
        return piece

    def received(self, data: bytes) -> None:
        self.in_transit -= len(data)


class ScriptedMemoryStream(trio.abc.ReceiveStream):
    """trio's memory stream, fed piece by piece."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.pieces = Pieces(pieces)
        self.stream = MemoryReceiveStream()

    async def receive_some(self, max_bytes: int | None = None) -> bytearray:
        if piece := self.pieces.next():
            self.stream.put_data(piece)
        elif piece == b"":
            self.stream.put_eof()
        data = await self.stream.receive_some(max_bytes)
        self.pieces.received(data)
        return data

    async def aclose(self) -> None:
        raise AssertionError("not the reader's business")


class ScriptedSocket(socket.socket):
    """A socket whose peer sends piece by piece, and that would block each other time."""

    pieces: Pieces
    peer: socket.socket
    blocks = False

    def recv(self, size: int, flags: int = 0) -> bytes:
        if piece := self.pieces.next():
            self.peer.sendall(piece)
        elif piece == b"":
            self.peer.shutdown(socket.SHUT_WR)
        self.blocks = not self.blocks
        if self.blocks:
            raise BlockingIOError
        data = super().recv(size, flags)
        self.pieces.received(data)
        return data


READER_KINDS = ("memory", "socket")
any_stream = pytest.mark.parametrize("kind", READER_KINDS)


@contextlib.contextmanager
def stream_of(kind: str, pieces: Iterable[bytes]) -> Iterator[Any]:
    """Yield a stream of one of `READER_KINDS` that gives *pieces*, then ends."""
    if kind == "memory":
        yield ScriptedMemoryStream(pieces)
        return
    ours, theirs = socket.socketpair()
    with ScriptedSocket(fileno=ours.detach()) as sock, theirs:
        sock.setblocking(False)
        sock.pieces = Pieces(pieces)
        sock.peer = theirs
        yield StreamSocket(sock)


class Raw(io.RawIOBase):
    """The raw file under `io.BufferedReader`, which gives the same pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self.left = collections.deque(piece for piece in pieces if piece)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self.left:
            return 0
        piece = self.left.popleft()
        size = min(len(piece), len(buffer))
        buffer[:size] = piece[:size]
        if size < len(piece):
            self.left.appendleft(piece[size:])
        return size


# -- the standard library as oracle -----------------------------------------------------

READING_BY_CONTENT = ("read", "readline", "readlines", "readinto")
READING = (*READING_BY_CONTENT, "read1", "readinto1", "peek")


def random_pieces(source: random.Random) -> list[bytes]:
    """Return some bytes with many line ends, split at random."""
    data = bytes(source.choices(b"ab\r\n", [20, 5, 1, 3], k=source.randrange(200)))
    pieces = []
    while data:
        size = source.choice([1, 2, 3, 10, 50])
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def random_call(
    source: random.Random, names: tuple[str, ...]
) -> tuple[str, tuple[Any, ...]]:
    """Return a method and its arguments."""
    name = source.choice(names)
    size = source.choice([0, 1, 2, 3, 5, 8, 13, 40, 100])
    if name.startswith("readinto"):
        return name, (size,)
    if name == "read1":
        return name, source.choice([(), (-1,), (size,), (size,)])
    if source.random() < 0.8:
        return name, (size,)
    return name, source.choice([(), (-1,)] + [(None,)] * (name != "peek"))


def call(file: Any, name: str, arguments: tuple[Any, ...]) -> Any:
    """Call a method of a file, which may have to be awaited."""
    if not name.startswith("readinto"):
        return getattr(file, name)(*arguments)
    buffer = bytearray(*arguments)
    size = getattr(file, name)(buffer)
    if isinstance(size, int):
        return bytes(buffer[:size])

    async def filled() -> bytes:
        return bytes(buffer[: await size])

    return filled()


@any_stream
async def test_answers_as_the_standard_library_does(kind: str) -> None:
    for seed in range(150):
        source = random.Random(seed)
        pieces = random_pieces(source)
        oracle = io.BufferedReader(Raw(pieces), 65536)
        with stream_of(kind, pieces) as stream:
            reader = StreamReader(stream)
            for _ in range(25):
                name, arguments = random_call(source, READING)
                expected = call(oracle, name, arguments)
                assert await call(reader, name, arguments) == expected, (
                    seed,
                    name,
                    arguments,
                )
            assert await reader.read() == oracle.read()
            assert await reader.read() == b""


@any_stream
@pytest.mark.parametrize("buffer_size", [0, 1, 7])
async def test_the_buffers_size_changes_no_answer(kind: str, buffer_size: int) -> None:
    for seed in range(40):
        source = random.Random(seed)
        pieces = random_pieces(source)
        oracle = io.BufferedReader(Raw(pieces))
        with stream_of(kind, pieces) as stream:
            reader = StreamReader(stream, buffer_size=buffer_size)
            for _ in range(25):
                name, arguments = random_call(source, READING_BY_CONTENT)
                expected = call(oracle, name, arguments)
                assert await call(reader, name, arguments) == expected, (
                    seed,
                    name,
                    arguments,
                )


@any_stream
async def test_iterating_gives_the_lines_of_a_file(kind: str) -> None:
    for seed in range(30):
        pieces = random_pieces(random.Random(seed))
        with stream_of(kind, pieces) as stream:
            lines = [line async for line in StreamReader(stream)]
        assert lines == list(io.BytesIO(b"".join(pieces)))


async def test_large_reads_over_a_real_connection() -> None:
    data = random.Random(4).randbytes(600_000)

    def send(peer: socket.socket) -> None:
        peer.settimeout(REAL_LIMIT)
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)

    with connected("tcp") as (ours, theirs), trio.fail_after(REAL_LIMIT):
        reader = StreamReader(StreamSocket(ours))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, send, theirs)
            buffer = bytearray(200_000)
            assert await reader.readexactly(100_000) == data[:100_000]
            assert await reader.readinto(buffer) == 200_000
            assert buffer == data[100_000:300_000]
            assert await reader.read(200_000) == data[300_000:500_000]
            assert await reader.read() == data[500_000:]


async def test_is_readable_and_every_answer_is_bytes() -> None:
    with stream_of("memory", [b"a\nb\nc\ndef"]) as stream:
        reader = StreamReader(stream)
        assert reader.readable() is True
        answers = [
            await reader.peek(),
            await reader.readline(),
            await reader.readuntil(),
            await anext(reader),
            await reader.readexactly(1),
            await reader.read1(1),
            await reader.read(1),
            await reader.read1(),
        ]
    assert answers == [b"a\nb\nc\ndef", b"a\n", b"b\n", b"c\n", b"d", b"e", b"f", b""]
    assert {type(answer) for answer in answers} == {bytes}


# -- readinto ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["readinto", "readinto1"])
async def test_readinto_fills_any_writable_buffer(name: str) -> None:
    with stream_of("memory", [bytes(range(1, 9))]) as stream:
        reader = StreamReader(stream)
        numbers = array.array("H", [0, 0])
        assert await getattr(reader, name)(memoryview(numbers)) == 4
        assert numbers.tobytes() == b"\1\2\3\4"
        rest = bytearray(9)
        assert await getattr(reader, name)(memoryview(rest)[1:]) == 4
        assert rest == b"\0\5\6\7\10\0\0\0\0"
        assert await getattr(reader, name)(rest) == 0
        rest.append(0)  # Nothing holds on to the buffer.


@pytest.mark.parametrize("name", ["readinto", "readinto1"])
async def test_readinto_what_cannot_be_written_loses_nothing(name: str) -> None:
    with stream_of("memory", [b"data"]) as stream:
        reader = StreamReader(stream)
        with pytest.raises(TypeError):
            await getattr(reader, name)(memoryview(b"const"))
        assert await reader.read() == b"data"


# -- readexactly and readuntil ----------------------------------------------------------


@any_stream
async def test_readexactly(kind: str) -> None:
    with stream_of(kind, [b"ab", b"cdef", b"g"]) as stream:
        reader = StreamReader(stream)
        assert await reader.readexactly(3) == b"abc"
        assert await reader.readexactly(0) == b""
        with pytest.raises(ValueError, match="negative"):
            await reader.readexactly(-1)
        with pytest.raises(IncompleteRead, match="4 of 9") as caught:
            await reader.readexactly(9)
        assert caught.value.partial == b"defg"
        assert isinstance(caught.value, EOFError)
        assert is_peer_fault(caught.value)
        with pytest.raises(IncompleteRead) as caught:
            await reader.readexactly(1)
        assert caught.value.partial == b""


def partition(data: bytes, separator: bytes) -> list[bytes]:
    """Split *data* after each *separator*, by the book."""
    records = []
    while data:
        head, found, data = data.partition(separator)
        records.append(head + found)
    return records


SEPARATED = {
    b"\n": b"one\n\ntwo\nrest",
    b"\r\n": b"one\r\n\r\n\r\r\ntwo\n\r\n\r",
    b"ab": b"aab-ab-abab-a",
    b"aab": b"aaab-aab-aaaab-aa",
    b"--x--": b"1--x--2--x--x--3----x--x",
}


@any_stream
@pytest.mark.parametrize("separator", SEPARATED)
async def test_readuntil_finds_a_separator_however_it_is_split(
    kind: str, separator: bytes
) -> None:
    data = SEPARATED[separator]
    records = partition(data, separator)
    cuts = range(1, len(data))
    ways = [[data], [data[n : n + 1] for n in range(len(data))]]
    ways += [[data[:n], data[n:]] for n in cuts]
    ways += [[data[:n], data[n:m], data[m:]] for n, m in itertools.combinations(cuts, 2)]
    for pieces in ways:
        with stream_of(kind, pieces) as stream:
            reader = StreamReader(stream)
            for record in records[:-1]:
                assert await reader.readuntil(separator) == record, pieces
            with pytest.raises(IncompleteRead) as caught:
                await reader.readuntil(separator)
            assert caught.value.partial == records[-1], pieces


async def test_readuntil_at_the_end_and_without_a_separator() -> None:
    with stream_of("memory", [b"x"]) as stream:
        reader = StreamReader(stream)
        with pytest.raises(ValueError, match="separator"):
            await reader.readuntil(b"")
        with pytest.raises(IncompleteRead, match="after 1 bytes"):
            await reader.readuntil()
        with pytest.raises(IncompleteRead) as caught:
            await reader.readuntil()
        assert caught.value.partial == b""


# -- bounds -----------------------------------------------------------------------------

LIMITED: dict[str, Callable[[StreamReader], Awaitable[bytes]]] = {
    "readline": lambda reader: reader.readline(),
    "readuntil": lambda reader: reader.readuntil(b"\n"),
    "iteration": lambda reader: anext(reader),
}


def every_split(data: bytes) -> list[list[bytes]]:
    """Return *data* whole, in two pieces in every way, and byte by byte."""
    return [
        [data],
        [data[n : n + 1] for n in range(len(data))],
        *([data[:n], data[n:]] for n in range(1, len(data))),
    ]


@any_stream
@pytest.mark.parametrize("read", LIMITED.values(), ids=LIMITED)
async def test_a_line_may_be_exactly_as_long_as_the_limit(
    kind: str, read: Callable[[StreamReader], Awaitable[bytes]]
) -> None:
    for pieces in every_split(b"1234567\n7654321\n"):
        with stream_of(kind, pieces) as stream:
            reader = StreamReader(stream, max_line_size=8)
            assert await read(reader) == b"1234567\n"
            assert await read(reader) == b"7654321\n"


@any_stream
@pytest.mark.parametrize("read", LIMITED.values(), ids=LIMITED)
async def test_a_line_that_is_too_long_is_refused_and_kept(
    kind: str, read: Callable[[StreamReader], Awaitable[bytes]]
) -> None:
    data = b"ok\n12345678\nmore"
    for pieces in every_split(data):
        with stream_of(kind, pieces) as stream:
            reader = StreamReader(stream, max_line_size=8)
            assert await read(reader) == b"ok\n"
            for _ in range(2):
                with pytest.raises(LineTooLong, match="8 bytes") as caught:
                    await read(reader)
            assert isinstance(caught.value, ValueError)
            assert is_peer_fault(caught.value)
            # Whoever knows better can still take it.
            assert await reader.readline(4) == b"1234"
            assert await reader.read() == b"5678\nmore"


@any_stream
async def test_the_limit_holds_for_a_separator_that_ends_beyond_it(kind: str) -> None:
    for pieces in every_split(b"123456\r\n"):
        for limit in (6, 7):
            with stream_of(kind, pieces) as stream:
                reader = StreamReader(stream, max_line_size=limit)
                with pytest.raises(LineTooLong):
                    await reader.readuntil(b"\r\n")
                assert await reader.read() == b"123456\r\n"
        with stream_of(kind, pieces) as stream:
            reader = StreamReader(stream, max_line_size=8)
            assert await reader.readuntil(b"\r\n") == b"123456\r\n"


async def test_an_endless_line_is_not_buffered_without_end() -> None:
    class Endless(trio.abc.ReceiveStream):
        given = 0

        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            assert max_bytes is not None
            self.given += max_bytes
            return bytes(max_bytes)

        async def aclose(self) -> None:
            raise AssertionError("not the reader's business")

    for read in LIMITED.values():
        stream: Any = Endless()
        with pytest.raises(LineTooLong):
            await read(StreamReader(stream))
        assert MAX_LINE_SIZE <= stream.given < MAX_LINE_SIZE + 200_000
    assert MAX_LINE_SIZE == 1024 * 1024


async def test_readline_with_a_size_gives_a_part_where_a_line_is_longer() -> None:
    with stream_of("socket", [b"12345678\n9"]) as stream:
        reader = StreamReader(stream, max_line_size=4)
        assert await reader.readline(5) == b"12345"
        assert await reader.readline(0) == b""
        assert await reader.readline(100) == b"678\n"
        assert await reader.readline(None) == b"9"
        assert await reader.readline(5) == b""


class CountingBuffer(bytearray):
    """A buffer that counts how many bytes are searched, copied and moved."""

    work = 0

    def find(self, separator: Any, start: Any = 0, end: Any = None) -> int:  # type: ignore[override]
        found = super().find(separator, start)
        type(self).work += (len(self) if found < 0 else found) - start
        return found

    def __getitem__(self, item: Any) -> Any:
        found = super().__getitem__(item)
        type(self).work += len(found)
        return found

    def __bytes__(self) -> bytes:
        type(self).work += len(self)
        return self.take()

    def take(self) -> bytes:
        return bytes(memoryview(self))


class OneByOne(trio.abc.ReceiveStream):
    """A peer that sends a long line, one byte at a time, as fast as it is asked."""

    def __init__(self, size: int) -> None:
        self.left = size

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.left -= 1
        return b"x" if self.left else b"\n"

    async def aclose(self) -> None:
        raise AssertionError("not the reader's business")


@pytest.mark.parametrize("separator", [b"\n", b"x\n"])
async def test_a_line_sent_byte_by_byte_takes_linear_work(separator: bytes) -> None:
    size = 30_000
    stream: Any = OneByOne(size)
    reader = StreamReader(stream)
    CountingBuffer.work = 0
    reader._buffer = CountingBuffer()
    assert len(await reader.readuntil(separator)) == size
    assert size <= CountingBuffer.work < 4 * size


async def test_many_lines_that_came_at_once_take_linear_work() -> None:
    data = b"line\n" * 10_000
    with stream_of("memory", [data]) as stream:
        reader = StreamReader(stream)
        CountingBuffer.work = 0
        reader._buffer = CountingBuffer()
        assert len([line async for line in reader]) == 10_000
    assert len(data) <= CountingBuffer.work < 4 * len(data)


# -- no reading ahead -------------------------------------------------------------------

UNBUFFERED: dict[str, tuple[Callable[[StreamReader], Awaitable[object]], bytes]] = {
    "read": (lambda reader: reader.read(4), b"\nrest"),
    "read1": (lambda reader: reader.read1(4), b"\nrest"),
    "readexactly": (lambda reader: reader.readexactly(4), b"\nrest"),
    "readinto": (lambda reader: reader.readinto(bytearray(4)), b"\nrest"),
    "readinto1": (lambda reader: reader.readinto1(bytearray(4)), b"\nrest"),
    "readline": (lambda reader: reader.readline(), b"l2\nrest"),
    "readline with size": (lambda reader: reader.readline(1), b"\nl2\nrest"),
    "readlines": (lambda reader: reader.readlines(3), b"rest"),
    "readuntil": (lambda reader: reader.readuntil(b"2\n"), b"rest"),
    "iteration": (lambda reader: anext(reader), b"l2\nrest"),
    "peek": (lambda reader: reader.peek(), b"1\nl2\nrest"),
}


@pytest.mark.parametrize("name", UNBUFFERED)
async def test_an_unbuffered_reader_never_reads_ahead(name: str) -> None:
    read, rest = UNBUFFERED[name]
    data = b"1\nl2\nrest" if name != "peek" else b"x1\nl2\nrest"
    with connected("unix") as (ours, theirs), trio.fail_after(REAL_LIMIT):
        theirs.send(data)
        await read(StreamReader(StreamSocket(ours), buffer_size=0))
        assert read_all(ours) == rest


async def test_an_unbuffered_reader_keeps_what_was_peeked() -> None:
    with stream_of("memory", [b"ab\ncd"]) as stream:
        reader = StreamReader(stream, buffer_size=0)
        assert await reader.peek(10) == await reader.peek() == b"a"
        assert await reader.read(2) == b"ab"
        assert await reader.readline() == b"\n"
        assert await reader.read() == b"cd"


@pytest.mark.parametrize("name", ["read1", "readinto1", "peek"])
async def test_asks_the_stream_once_at_most(name: str) -> None:
    with stream_of("memory", [b"ab", b"cd"]) as stream:
        reader = StreamReader(stream)
        argument = bytearray(9) if name == "readinto1" else 9
        assert await getattr(reader, name)(argument) in (b"ab", 2)
        assert list(stream.pieces.left) == [b"cd"]


async def test_a_large_read_does_not_ask_in_small_pieces() -> None:
    asked = []

    class Zeros(trio.abc.ReceiveStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytes:
            asked.append(max_bytes)
            return bytes(max_bytes or 0)

        async def aclose(self) -> None:
            raise AssertionError("not the reader's business")

    stream: Any = Zeros()
    reader = StreamReader(stream, buffer_size=16)
    assert len(await reader.read(100_000)) == 100_000
    assert len(asked) < 10
    assert await reader.readexactly(5) == bytes(5)
    assert max(asked[-1], 16) == 16


# -- cancellation, errors, timeouts -----------------------------------------------------


async def into(reader: StreamReader, name: str) -> bytes:
    buffer = bytearray(6)
    return bytes(buffer[: await getattr(reader, name)(buffer)])


async def joined(lines: Awaitable[list[bytes]]) -> bytes:
    return b"".join(await lines)


CANCELLED: dict[str, Callable[[StreamReader], Awaitable[bytes]]] = {
    "read": lambda reader: reader.read(6),
    "read1": lambda reader: reader.read1(6),
    "readexactly": lambda reader: reader.readexactly(6),
    "readinto": lambda reader: into(reader, "readinto"),
    "readinto1": lambda reader: into(reader, "readinto1"),
    "readline": lambda reader: reader.readline(),
    "readline with size": lambda reader: reader.readline(5),
    "readuntil": lambda reader: reader.readuntil(b"5\n"),
    "iteration": lambda reader: anext(reader),
}


@any_stream
@pytest.mark.parametrize("buffer_size", [-1, 0])
@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("name", CANCELLED)
async def test_cancelling_loses_no_byte(
    kind: str, buffer_size: int, buffered: bool, name: str
) -> None:
    data = b"012345\nabcdefghij\nend"

    async def cancelled_at(cancel_at: int) -> bool:
        def happen(moment: int) -> None:
            if moment == cancel_at:
                scope.cancel()

        received = b""
        pieces = [data] if buffered else [data[n : n + 3] for n in range(0, len(data), 3)]
        with stream_of(kind, pieces) as stream:
            reader = StreamReader(stream, buffer_size=buffer_size, drain=Drain())
            if buffered:
                await reader.peek()
            with trio.CancelScope() as scope, Moments(happen) as moments:
                happen(0)
                received = await CANCELLED[name](reader)
            assert scope.cancelled_caught is (received == b"")
            assert received + await reader.read() == data
        ways_out.add(bool(received))
        return moments.passed >= cancel_at

    ways_out: set[bool] = set()
    cancel_at = 0
    with trio.fail_after(REAL_LIMIT):
        while await cancelled_at(cancel_at):
            cancel_at += 1
    assert ways_out == {True, False}


async def test_cancelling_readlines_loses_only_what_it_has_collected() -> None:
    # A list of lines cannot be put back; what has not become a line yet stays.
    with stream_of("memory", [b"one\ntw"]) as stream:
        reader = StreamReader(stream)
        with trio.CancelScope() as scope:
            await reader.readline()
            scope.cancel()
            await reader.readlines()
        assert scope.cancelled_caught
        assert await reader.read() == b"tw"


async def test_a_broken_connection_loses_nothing_that_had_arrived() -> None:
    with connected("tcp") as (ours, theirs):
        theirs.send(b"half a li")
        reader = StreamReader(StreamSocket(ours))
        await reader.peek()
        close_with_reset(theirs)
        with pytest.raises(ConnectionBroken):
            await reader.readline()
        assert await reader.read1() == b"half a li"


@any_stream
@pytest.mark.parametrize(
    "name", ["read", "read1", "readexactly", "readline", "readuntil", "peek"]
)
async def test_reading_lets_others_run(kind: str, name: str) -> None:
    calls = {**CANCELLED, "peek": lambda reader: reader.peek()}
    with stream_of(kind, [b"012345\n012345\n012345\n"]) as stream:
        reader = StreamReader(stream)
        for _ in range(2):  # from the stream, from the buffer
            with assert_checkpoints():
                await calls[name](reader)


class Turns:
    """A task that counts how often it gets its turn."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> None:
        while True:
            self.count += 1
            await trio.lowlevel.checkpoint()


@any_stream
@pytest.mark.parametrize("pieces", [[b"line\n" * 320], [b"line\n"] * 320])
async def test_iteration_lets_others_run_now_and_then(
    kind: str, pieces: list[bytes]
) -> None:
    turns = Turns()
    with stream_of(kind, pieces) as stream, trio.fail_after(REAL_LIMIT):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turns)
            assert len([line async for line in StreamReader(stream, drain=Drain())]) == 320
            nursery.cancel_scope.cancel()
    assert turns.count >= 320 // LINES_IN_A_ROW


@pytest.mark.parametrize("read", ["readline", "readuntil", "__anext__", "readlines"])
@pytest.mark.parametrize("buffer_size", [0, 1, 7])
async def test_a_long_line_lets_others_run(read: str, buffer_size: int) -> None:
    turns = Turns()
    line = b"x" * 4999 + b"\n"
    with connected("unix") as (ours, theirs), trio.fail_after(REAL_LIMIT):
        theirs.sendall(line)
        theirs.close()
        reader = StreamReader(StreamSocket(ours), buffer_size=buffer_size, drain=Drain())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(turns)
            await wait_for_turn()
            before = turns.count
            assert await getattr(reader, read)() in (line, [line])
            # As from accepting: 64 things at most are done in one go.
            assert turns.count - before >= 5000 // max(buffer_size, 1) // 64
            nursery.cancel_scope.cancel()


async def wait_for_turn() -> None:
    for _ in range(3):
        await trio.lowlevel.checkpoint()


@any_stream
async def test_each_line_is_a_point_of_cancellation(kind: str) -> None:
    for served in range(20):
        with stream_of(kind, [b"line\n" * 20]) as stream:
            reader = StreamReader(stream, drain=Drain())
            with trio.CancelScope() as scope:
                lines = 0
                while True:
                    if lines == served:
                        scope.cancel()
                    await anext(reader)
                    lines += 1
            assert lines == served
            assert len(await reader.readlines()) == 20 - served


@any_stream
@pytest.mark.parametrize("pieces", [[], [b"line\n"], [b"li", b"ne\n"]])
async def test_the_end_is_asked_for_once(kind: str, pieces: list[bytes]) -> None:
    with stream_of(kind, pieces) as stream:
        # A reset that comes behind the end must not be seen.
        lines = [line async for line in StreamReader(OnceEnded(stream))]
    assert b"".join(lines) == b"".join(pieces)


class OnceEnded(trio.abc.ReceiveStream):
    """A stream that breaks when it is read beyond its end, as a stream may."""

    def __init__(self, stream: trio.abc.ReceiveStream) -> None:
        self.stream = stream
        self.ended = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self.ended:
            raise trio.BrokenResourceError
        data = await self.stream.receive_some(max_bytes)
        self.ended = not data
        return data

    async def aclose(self) -> None:
        raise AssertionError("not the reader's business")


WAITS: dict[str, Callable[[StreamReader], Awaitable[object]]] = {
    "read": lambda reader: reader.read(),
    "read1": lambda reader: reader.read1(),
    "readexactly": lambda reader: reader.readexactly(9),
    "readinto": lambda reader: reader.readinto(bytearray(9)),
    "readline": lambda reader: reader.readline(),
    "readlines": lambda reader: reader.readlines(),
    "readuntil": lambda reader: reader.readuntil(b"end"),
    "iteration": lambda reader: anext(reader),
    "peek": lambda reader: reader.peek(),
}


@pytest.mark.parametrize("drain", [None, Drain()], ids=["alone", "in a server"])
@pytest.mark.parametrize("name", WAITS)
async def test_a_timeout_bounds_each_wait_on_any_stream(
    name: str, drain: Drain | None, autojump_clock: Any
) -> None:
    near, far = memory_stream_pair()
    reader = StreamReader(near, timeout=3, drain=drain)
    with pytest.raises(RequestTimeout, match="3 s"):
        await WAITS[name](reader)
    assert trio.current_time() == 3
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader.readline)
        for piece in (b"slow", b"ly,", b" but", b" here\n"):
            await trio.sleep(2)
            await far.send_all(piece)
    assert trio.current_time() == 11


async def test_without_a_timeout_nothing_is_bounded(autojump_clock: Any) -> None:
    near, _far = memory_stream_pair()
    with trio.move_on_after(10_000) as scope:
        await StreamReader(near).readline()
    assert scope.cancelled_caught
    assert trio.current_time() == 10_000


async def test_over_a_stream_socket_the_sockets_own_timeout_counts(
    autojump_clock: Any,
) -> None:
    with connected("unix") as (ours, _):
        stream = StreamSocket(ours)
        stream.settimeout(3)
        with pytest.raises(RequestTimeout):
            await StreamReader(stream, timeout=1000).readline()
        assert trio.current_time() == 3


# -- writing ----------------------------------------------------------------------------


@contextlib.contextmanager
def writer_and_wire(
    kind: str, buffer_size: int = 0
) -> Iterator[tuple[StreamWriter, Callable[[], bytes]]]:
    """Yield a writer, and a function that takes what has been sent."""
    if kind == "memory":
        near, far = memory_stream_pair()

        def sent() -> bytes:
            assert isinstance(far.receive_stream, MemoryReceiveStream)
            with contextlib.suppress(trio.WouldBlock):
                return bytes(near_out.get_data_nowait())
            return b""

        near_out: Any = near.send_stream
        near_out.send_all_hook = None  # Keep the data here instead of passing it on.
        yield StreamWriter(near, buffer_size=buffer_size), sent
        return
    with connected("unix") as (ours, theirs):
        yield (
            StreamWriter(StreamSocket(ours), buffer_size=buffer_size),
            lambda: read_all(theirs),
        )


@any_stream
async def test_an_unbuffered_write_sends_at_once(kind: str) -> None:
    with writer_and_wire(kind) as (writer, sent):
        assert writer.writable() is True
        for data in (b"bytes", bytearray(b"bytearray"), memoryview(b"view")):
            with assert_checkpoints():
                assert await writer.write(data) == len(data)
            assert writer.pending == 0
            assert sent() == bytes(data)


@any_stream
@pytest.mark.parametrize("buffer_size", [0, 100])
async def test_write_counts_bytes_and_not_items(kind: str, buffer_size: int) -> None:
    numbers = array.array("I", [1, 2, 3])
    with writer_and_wire(kind, buffer_size) as (writer, sent):
        assert await writer.write(memoryview(numbers)) == 3 * numbers.itemsize
        await writer.flush()
        assert sent() == numbers.tobytes()


@any_stream
async def test_a_buffered_writer_collects(kind: str) -> None:
    with writer_and_wire(kind, 8) as (writer, sent):
        for data in (b"abc", b"def", b"g"):
            with assert_checkpoints():
                assert await writer.write(data) == len(data)
            assert sent() == b""
        assert writer.pending == 7
        await writer.write(b"h")
        assert sent() == b"abcdefgh"
        assert writer.pending == 0
        await writer.write(b"ij")
        with assert_checkpoints():
            await writer.flush()
        assert sent() == b"ij"
        with assert_checkpoints():
            await writer.flush()
        assert sent() == b""


async def test_a_negative_size_collects_8_kib() -> None:
    with writer_and_wire("socket", -1) as (writer, sent):
        await writer.write(bytes(WRITE_BUFFER_SIZE - 1))
        assert sent() == b""
        await writer.write(b"x")
        assert len(sent()) == WRITE_BUFFER_SIZE == 8192


async def test_what_was_written_is_not_what_the_caller_does_next() -> None:
    with writer_and_wire("socket", 100) as (writer, sent):
        data = bytearray(b"first")
        await writer.write(data)
        data[:] = b"other"
        await writer.flush()
        assert sent() == b"first"


@any_stream
@pytest.mark.parametrize("buffer_size", [0, 4, 100])
async def test_writelines_writes_one_piece(kind: str, buffer_size: int) -> None:
    with writer_and_wire(kind, buffer_size) as (writer, sent):
        await writer.writelines(
            line for line in (b"a\n", bytearray(b"b"), memoryview(b"c\n"))
        )
        await writer.flush()
        assert sent() == b"a\nbc\n"
        await writer.writelines([])
        await writer.flush()
        assert sent() == b""


async def test_writelines_makes_one_system_call() -> None:
    class CountingSocket(socket.socket):
        calls = 0

        def send(self, data: Any, flags: int = 0) -> int:
            self.calls += 1
            return super().send(data, flags)

    with connected("unix") as (ours, theirs), CountingSocket(fileno=ours.detach()) as sock:
        sock.setblocking(False)
        await StreamWriter(StreamSocket(sock)).writelines([b"a\n"] * 1000)
        assert sock.calls == 1
        assert read_all(theirs) == b"a\n" * 1000


@pytest.mark.parametrize("buffer_size", [0, 100])
async def test_only_bytes_can_be_written(buffer_size: int) -> None:
    with writer_and_wire("socket", buffer_size) as (writer, sent):
        text: Any = "text"
        with pytest.raises(TypeError):
            await writer.write(text)
        with pytest.raises(TypeError):
            await writer.writelines([text])
        await writer.flush()
        assert sent() == b""


async def test_a_failed_flush_drops_what_it_held() -> None:
    with connected("tcp") as (ours, theirs):
        stream = StreamSocket(ours)
        writer = StreamWriter(stream, buffer_size=100)
        await writer.write(b"too late")
        close_with_reset(theirs)
        with pytest.raises(ConnectionBroken):
            await stream.recv(1)
        with pytest.raises(ConnectionBroken):
            await writer.flush()
        assert writer.pending == 0
        await writer.flush()


async def test_a_cancelled_flush_drops_what_it_held() -> None:
    with connected("unix", small_buffers=True) as (ours, _):
        clog(ours)
        writer = StreamWriter(StreamSocket(ours), buffer_size=100)
        await writer.write(b"too late")
        with trio.fail_after(REAL_LIMIT), trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer.flush)
                await wait_all_tasks_blocked()
                scope.cancel()
        assert writer.pending == 0


@pytest.mark.parametrize("buffer_size", [0, 2])
async def test_a_timeout_bounds_sending_on_any_stream(
    buffer_size: int, autojump_clock: Any
) -> None:
    near, far = lockstep_stream_pair()
    writer = StreamWriter(near, buffer_size=buffer_size, timeout=3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.write, b"in time")
        await trio.sleep(2)
        assert await far.receive_some(10) == b"in time"
    with pytest.raises(RequestTimeout, match="3 s"):
        await writer.write(b"too late")
    assert trio.current_time() == 5


async def test_a_cancelled_write_is_no_timeout(autojump_clock: Any) -> None:
    near, _ = lockstep_stream_pair()
    with trio.move_on_after(2) as scope:
        await StreamWriter(near, timeout=3).write(b"x")
    assert scope.cancelled_caught
