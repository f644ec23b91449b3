"""What a server and its workers say to each other: frames, and orders."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import trio
import trio.testing
from helpers import REAL_LIMIT, bounded

from trio_socketserver._worker_link import (
    FRAME_LIMIT,
    HEADER,
    Frames,
    News,
    Order,
    WorkerLink,
    socket_pair,
)


def frame(news: News, content: bytes = b"") -> bytes:
    return HEADER.pack(news.value, len(content)) + content


SAID = [(News.READY, b""), (News.LOG, bytes(range(256)) * 300), (News.STOPPED, b"")]


@pytest.mark.parametrize("size", [1, 2, 5, 6, 1000, 10**6])
def test_frames_in_any_pieces(size: int) -> None:
    stream = b"".join(frame(*said) for said in SAID)
    frames = Frames()
    heard = [
        said
        for start in range(0, len(stream), size)
        for said in frames.feed(stream[start : start + size])
    ]
    assert heard == SAID


def test_half_a_frame_is_none() -> None:
    frames = Frames()
    assert list(frames.feed(frame(News.FAILED, b"traceback")[:-1])) == []
    assert list(frames.feed(b"k" + frame(News.READY))) == [
        (News.FAILED, b"traceback"),
        (News.READY, b""),
    ]


def test_words_are_bytes_of_their_own() -> None:
    for words in (Order, News):
        values = [word.value for word in words]
        assert len(set(values)) == len(values)
        assert {len(value) for value in values} == {1}


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket_pair()
    with ours, theirs:
        yield ours, theirs


def test_a_link_is_known_by_its_socket(pair: Any) -> None:
    link = WorkerLink(pair[1])
    assert link.fileno() == pair[1].fileno()
    descriptor = pair[1].fileno()
    link.detach()
    assert link.fileno() == -1
    os.close(descriptor)
    assert pair[0].recv(1) == b""


def test_what_threads_say_at_once_stays_whole(pair: Any) -> None:
    """More than the link holds: so they wait for who listens."""
    ours, theirs = pair
    link = WorkerLink(theirs)
    contents = [bytes([number]) * 60_000 for number in range(20)]

    def say(number: int) -> None:
        for content in contents[number::4]:
            link.say(News.LOG, content)

    threads = [threading.Thread(target=say, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    frames = Frames()
    heard: list[tuple[News, bytes]] = []
    while len(heard) < len(contents):
        heard += frames.feed(ours.recv(2 * FRAME_LIMIT))
    for thread in threads:
        thread.join()
    assert sorted(content for _, content in heard) == contents


def test_a_forked_child_may_speak_while_a_thread_does(pair: Any) -> None:
    """The lock that it inherits may be taken, by a thread that is not there any more."""
    ours, theirs = pair
    link = WorkerLink(theirs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", DeprecationWarning)
        holder = threading.Thread(target=hold, args=(link._lock, go := threading.Event()))
        holder.start()
        stack.callback(holder.join)
        stack.callback(go.set)
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(REAL_LIMIT))
            link.say(News.LOG, b"from the child")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert list(Frames().feed(ours.recv(100))) == [(News.LOG, b"from the child")]


def hold(lock: Any, go: threading.Event) -> None:
    with lock:
        go.wait()


def test_saying_something_while_something_is_said(pair: Any) -> None:
    """As a signal handler does: it neither waits for ever, nor breaks the first."""
    ours, theirs = pair
    ours.setblocking(False)
    link = WorkerLink(theirs)

    class Interrupted:
        def sendall(self, data: bytes) -> None:
            if b"first" in data:
                link.say(News.LOG, b"second")
            theirs.sendall(data)

    link._sock = Interrupted()  # type: ignore[assignment]
    link.say(News.LOG, b"first")
    frames = Frames()
    heard = [said for _ in range(2) for said in frames.feed(ours.recv(100))]
    assert heard == [(News.LOG, b"first"), (News.LOG, b"second")]


@pytest.mark.parametrize(
    "data", [HEADER.pack(b"l", FRAME_LIMIT + 1), HEADER.pack(b"?", 0)], ids=["size", "word"]
)
def test_nonsense_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"frame|News"):
        list(Frames().feed(data))


@bounded
async def test_hanging_up(pair: Any) -> None:
    """Then it obeys as if the server were gone; and it may do so again."""
    link = WorkerLink(pair[1])
    orders: list[Order] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.obey, orders.append)
        await trio.testing.wait_all_tasks_blocked()
        link.hang_up()
    assert orders == [Order.CANCEL]
    pair[1].close()
    link.hang_up()


@pytest.mark.parametrize("unread", [b"", b"x"])
def test_saying_to_nobody(pair: Any, unread: bytes) -> None:
    """Without a reset, and with one."""
    ours, theirs = pair
    theirs.send(unread)
    ours.close()
    WorkerLink(theirs).say(News.READY)
    WorkerLink(theirs).say(News.READY)


@pytest.mark.parametrize("unread", [b"", b"x"])
@bounded
async def test_obeying_until_the_server_is_gone(pair: Any, unread: bytes) -> None:
    ours, theirs = pair
    orders: list[Order] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(WorkerLink(theirs).obey, orders.append)
        await trio.testing.wait_all_tasks_blocked()
        ours.send(Order.STOP.value + Order.CLOSE.value)
        await trio.testing.wait_all_tasks_blocked()
        assert orders == [Order.STOP, Order.CLOSE]
        theirs.send(unread)  # What is not read makes a reset of the end.
        ours.close()
    assert orders == [Order.STOP, Order.CLOSE, Order.CANCEL]
