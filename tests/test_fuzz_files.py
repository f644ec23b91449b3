"""rfile answers as io.BufferedReader does: any bytes, any split, any sequence of calls.

test_files has a few hundred sequences of a seeded generator. Here hypothesis looks for one
that goes wrong, and shows the shortest.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trio
import trio.testing
from helpers import VIRTUAL_LIMIT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_files import READER_KINDS, Raw, stream_of

from trio_socketserver import IncompleteRead
from trio_socketserver._files import StreamReader

ENDED = "the end of the iteration"

deterministic = settings(
    derandomize=True,
    database=None,
    deadline=None,  # The machine may be slow, which is no fault.
    suppress_health_check=[HealthCheck.too_slow],
)

# -- what is sent, and what is called ------------------------------------------------------

# Line ends and separators are frequent, so that they meet the ends of pieces.
frequent = st.lists(st.sampled_from(b"ab\r\n"), max_size=30).map(bytes)
pieces = st.lists(st.one_of(frequent, st.binary(max_size=30)), max_size=8)

sizes = st.integers(0, 40)
sizes_or_all = st.one_of(sizes, sizes, sizes, st.sampled_from([-1, None]))
separators = st.one_of(
    st.lists(st.sampled_from(b"ab\r\n"), min_size=1, max_size=3).map(bytes),
    st.binary(min_size=1, max_size=2),
)


def calls_of(**arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Make lists of pairs: the name of a method, and its argument."""
    return st.lists(
        st.one_of([st.tuples(st.just(name), values) for name, values in arguments.items()]),
        max_size=20,
    )


# What these answer does not depend on how much is read ahead.
BY_CONTENT = {
    "read": sizes_or_all,
    "readinto": sizes,
    "readline": sizes_or_all,
    "readlines": sizes_or_all,
    "readexactly": sizes,
    "readuntil": separators,
    "__anext__": st.none(),
}
BY_CHUNK = {
    "read1": st.one_of(sizes, st.just(-1)),
    "readinto1": sizes,
    "peek": sizes,
}


def answer_of_oracle(oracle: io.BufferedReader, name: str, argument: Any) -> Any:
    """Call a method of the standard library's reader, or make it up from one of them."""
    if name.startswith("readinto"):
        buffer = bytearray(argument)
        size = getattr(oracle, name)(buffer)
        return bytes(buffer[:size])
    if name == "__anext__":
        return next(oracle, ENDED)
    if name == "readexactly":
        data = oracle.read(argument)
        return data if len(data) == argument else IncompleteRead("", data)
    if name == "readuntil":
        data = b""
        while not data.endswith(argument) and (byte := oracle.read(1)):
            data += byte
        return data if data.endswith(argument) else IncompleteRead("", data)
    return getattr(oracle, name)(argument)


async def answer_of_ours(reader: StreamReader, name: str, argument: Any) -> Any:
    if name.startswith("readinto"):
        buffer = bytearray(argument)
        size = await getattr(reader, name)(buffer)
        return bytes(buffer[:size])
    try:
        if name == "__anext__":
            return await anext(reader)
        return await getattr(reader, name)(argument)
    except StopAsyncIteration:
        return ENDED
    except IncompleteRead as error:
        return error


def comparable(answer: Any) -> Any:
    """Tell of an answer what must be the same, its type included."""
    if isinstance(answer, IncompleteRead):
        return IncompleteRead, answer.partial
    return type(answer), answer


def run(function: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(VIRTUAL_LIMIT):
            await function()

    trio.run(bounded, clock=trio.testing.MockClock(autojump_threshold=0))


def compare(kind: str, sent: list[bytes], calls: list[Any], buffer_size: int) -> None:
    """Have both readers answer *calls*, and then read the rest."""

    async def converse() -> None:
        with stream_of(kind, sent) as stream:
            reader = StreamReader(stream, buffer_size=buffer_size)
            for name, argument in [*calls, ("read", -1), ("read", 1), ("__anext__", None)]:
                expected = answer_of_oracle(oracle, name, argument)
                answer = await answer_of_ours(reader, name, argument)
                assert comparable(answer) == comparable(expected), (name, argument)

    oracle = io.BufferedReader(Raw(sent), 65536)
    run(converse)


@pytest.mark.parametrize("kind", READER_KINDS)
@settings(deterministic, max_examples=300)
@given(pieces, calls_of(**BY_CONTENT, **BY_CHUNK))
@example([b"ab\r", b"\nab"], [("readuntil", b"\r\n"), ("peek", 0), ("readexactly", 3)])
@example([b"a", b"b\n"], [("peek", 0), ("__anext__", None), ("__anext__", None)])
def test_any_calls_on_any_bytes(kind: str, sent: list[bytes], calls: list[Any]) -> None:
    compare(kind, sent, calls, -1)


@pytest.mark.parametrize("kind", READER_KINDS)
@settings(deterministic, max_examples=150)
@given(pieces, calls_of(**BY_CONTENT), st.integers(0, 9))
def test_any_size_of_the_buffer(
    kind: str, sent: list[bytes], calls: list[Any], buffer_size: int
) -> None:
    compare(kind, sent, calls, buffer_size)


class Stalling(trio.abc.ReceiveStream):
    """Gives pieces; before each it waits for ever, once."""

    def __init__(self, sent: list[bytes]) -> None:
        self.raw = Raw(sent)
        self.stalls = True

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        self.stalls = not self.stalls
        if not self.stalls:
            await trio.sleep_forever()
        buffer = bytearray(min(max_bytes or sys.maxsize, 65536))
        size = self.raw.readinto(buffer)
        return bytes(buffer[:size])

    async def aclose(self) -> None:
        raise AssertionError("not the reader's business")


# What readlines() has collected when it is cancelled, it loses, and says so.
CANCELLABLE = {name: BY_CONTENT[name] for name in BY_CONTENT if name != "readlines"}


@settings(deterministic, max_examples=150)
@given(pieces, calls_of(**CANCELLABLE, **BY_CHUNK), st.integers(-1, 9))
def test_cancelled_at_every_wait_and_called_again(
    sent: list[bytes], calls: list[Any], buffer_size: int
) -> None:
    async def insist(name: str, argument: Any) -> Any:
        while True:
            with trio.move_on_after(1):
                return await answer_of_ours(reader, name, argument)
            nonlocal cancelled
            cancelled += 1

    async def converse() -> None:
        for name, argument in [*calls, ("read", -1)]:
            if buffer_size >= 0 and name in BY_CHUNK:
                continue
            expected = answer_of_oracle(oracle, name, argument)
            answer = await insist(name, argument)
            assert comparable(answer) == comparable(expected), (name, argument)

    cancelled = 0
    oracle = io.BufferedReader(Raw(sent), 65536)
    reader = StreamReader(Stalling(sent), buffer_size=buffer_size)  # type: ignore[arg-type]
    run(converse)
    assert cancelled >= 1  # At the end of the stream, if nowhere else.
