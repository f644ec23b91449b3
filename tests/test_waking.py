"""Threads that wait for a socket are woken, and nobody else's descriptor is touched."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from blocking_servers import forks_with_threads
from helpers import REAL_LIMIT, STREAM_KINDS, connected

from trio_socketserver import _waking
from trio_socketserver._waking import Waker, waker_of

each_kind = pytest.mark.parametrize("kind", STREAM_KINDS)


@contextlib.contextmanager
def blocking_pair(kind: str = "unix") -> Iterator[tuple[socket.socket, socket.socket]]:
    with connected(kind) as (ours, peer):
        ours.setblocking(True)
        peer.setblocking(True)
        peer.settimeout(REAL_LIMIT)
        yield ours, peer


@contextlib.contextmanager
def in_a_thread(function: Callable[[], Any]) -> Iterator[list[Any]]:
    """Call *function* in a thread beside the block, which must make it return."""
    results: list[Any] = []

    def call() -> None:
        begun.set()
        try:
            results.append(function())
        except OSError as error:
            results.append(error.errno)

    begun = threading.Event()
    thread = threading.Thread(target=call)
    thread.start()
    assert begun.wait(REAL_LIMIT)
    yield results
    thread.join(REAL_LIMIT)
    assert not thread.is_alive()


@each_kind
def test_who_receives_is_woken(kind: str) -> None:
    with blocking_pair(kind) as (ours, peer):
        waker = Waker(ours)
        with in_a_thread(lambda: ours.recv(1)) as results:
            waker.wake()
        assert results == [b""]
        assert ours.fileno() != -1
        assert peer.recv(1) == b""


@each_kind
def test_who_sends_is_woken(kind: str) -> None:
    def send() -> None:
        while True:
            ours.sendall(bytes(1_000_000))

    with blocking_pair(kind) as (ours, _):
        waker = Waker(ours)
        with in_a_thread(send) as results:
            waker.wake()
        assert results == [errno.EPIPE]


def test_the_socket_stays_what_it_is() -> None:
    class OwnSocket(socket.socket):
        pass

    with blocking_pair() as (plain, peer):
        own = OwnSocket(fileno=peer.detach())
        for sock in plain, own:
            before = type(sock)
            Waker(sock)
            assert isinstance(sock, before)
            assert type(sock).__name__ == before.__name__
            assert type(sock).__module__ == before.__module__
        Waker(own)
        own.extra = 1  # type: ignore[attr-defined]
        plain.sendall(b"x")
        assert own.recv(1) == b"x"
        own.close()


def test_a_socket_has_one_waker() -> None:
    with blocking_pair() as (ours, _):
        waker = waker_of(ours)
        assert waker_of(ours) is waker
        assert waker_of(_) is not waker


def test_what_is_closed_is_left_alone() -> None:
    with blocking_pair() as (ours, _), blocking_pair() as (other, its_peer):
        waker = Waker(ours)
        number = ours.fileno()
        ours.close()
        os.dup2(other.fileno(), number)  # The number is another's now.
        waker.wake()
        os.close(number)
        other.sendall(b"untouched")
        assert its_peer.recv(100) == b"untouched"
        waker.release()


def test_what_is_being_closed_is_left_alone() -> None:
    """The number may be another's as soon as closing has begun."""

    class Closing(socket.socket):
        def _real_close(self, *args: Any) -> None:
            waker.wake()
            super()._real_close(*args)  # type: ignore[misc]

    with blocking_pair() as (plain, peer), plain.dup() as other:
        ours = Closing(fileno=plain.detach())
        waker = Waker(ours)
        ours.close()
        other.sendall(b"untouched")
        assert peer.recv(100) == b"untouched"


def test_closing_waits_for_waking(monkeypatch: pytest.MonkeyPatch) -> None:
    def shutdown(sock: socket.socket, how: int) -> None:
        waking.set()
        assert go_on.wait(REAL_LIMIT)
        order.append(("woken", sock.fileno() == number))

    waking, go_on = threading.Event(), threading.Event()
    order: list[Any] = []
    with blocking_pair() as (ours, _):
        waker = Waker(ours)
        number = ours.fileno()
        monkeypatch.setattr(socket.socket, "shutdown", shutdown)
        with in_a_thread(waker.wake):
            assert waking.wait(REAL_LIMIT)
            with in_a_thread(ours.close):
                go_on.set()
    assert order == [("woken", True)]


def test_what_is_given_away_can_be_woken_until_it_is_released() -> None:
    with blocking_pair() as (ours, _):
        waker = Waker(ours)
        other = socket.socket(fileno=ours.detach())
        with other:
            with in_a_thread(lambda: other.recv(1)) as results:
                waker.wake()
            assert results == [b""]
            waker.release()
            waker.release()


@each_kind
def test_release_lets_the_connection_end(kind: str) -> None:
    with blocking_pair(kind) as (ours, peer):
        waker = Waker(ours)
        os.close(ours.detach())
        peer.settimeout(0)
        with pytest.raises(BlockingIOError):
            peer.recv(1)
        peer.settimeout(REAL_LIMIT)
        waker.release()
        assert peer.recv(1) == b""


def test_after_release_nothing_is_kept() -> None:
    with blocking_pair() as (ours, peer):
        waker = Waker(ours)
        waker.release()
        os.close(ours.detach())
        assert peer.recv(1) == b""
        waker.wake()


def test_closing_is_seen_by_the_peer_at_once() -> None:
    with blocking_pair() as (ours, peer):
        waker = Waker(ours)
        ours.close()
        assert peer.recv(1) == b""
        del waker


def test_a_file_made_of_the_socket_keeps_it_wakeable() -> None:
    with blocking_pair() as (ours, _):
        waker = Waker(ours)
        with ours.makefile("rb") as file:
            ours.close()
            with in_a_thread(file.readline) as results:
                waker.wake()
            assert results == [b""]
        assert ours.fileno() == -1


def test_a_copy_is_woken_too() -> None:
    with blocking_pair() as (ours, _):
        waker = Waker(ours)
        with ours.dup() as copy:
            assert waker_of(copy) is waker
            ours.close()
            with in_a_thread(lambda: copy.recv(1)) as results:
                waker.wake()
            assert results == [b""]


def test_another_socket_of_the_class_is_nobodys() -> None:
    """A handler may make one itself, by ``type(self.request)(fileno=...)``."""
    with blocking_pair() as (ours, peer):
        waker = Waker(ours)
        with type(ours)(fileno=os.dup(ours.fileno())) as other, other.dup() as copy:
            copy.sendall(b"works")
            assert peer.recv(100) == b"works"
            with socket.socket(fileno=other.detach()):
                waker.wake()
        assert peer.recv(1) == b""


def test_what_has_no_descriptor_has_no_copy() -> None:
    with blocking_pair() as (ours, _):
        waker = Waker(ours)
        with socket.socket(fileno=ours.detach()):
            assert ours.detach() == -1
            with pytest.raises(OSError, match="Bad file descriptor"):
                ours.dup()
        waker.release()


def test_a_socket_that_is_forgotten_is_forgotten() -> None:
    with blocking_pair() as (ours, peer):
        waker = Waker(ours)
        copies = [ours.dup()]
        with pytest.warns(ResourceWarning):
            copies.clear()
        waker.wake()
        assert peer.recv(1) == b""


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_without_a_descriptor_left_it_only_cannot_be_woken(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dup(descriptor: int) -> int:
        raise OSError(number, os.strerror(number))

    with blocking_pair() as (ours, peer):
        waker = Waker(ours)
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", dup)
            other = socket.socket(fileno=ours.detach())
        with other:
            waker.wake()
            other.sendall(b"works")
            assert peer.recv(100) == b"works"
        waker.release()


def test_any_other_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def dup(descriptor: int) -> int:
        raise OSError(errno.EIO, "strange")

    with blocking_pair() as (ours, _):
        Waker(ours)
        with monkeypatch.context() as patch:
            patch.setattr(os, "dup", dup)
            with pytest.raises(OSError, match="strange"):
                ours.detach()


@pytest.mark.parametrize("number", [errno.ENOTCONN, errno.EBADF, errno.EINVAL])
def test_a_connection_that_has_ended_is_no_error(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shutdown(sock: socket.socket, how: int) -> None:
        raise OSError(number, os.strerror(number))

    with blocking_pair() as (ours, _):
        waker = Waker(ours)
        monkeypatch.setattr(socket.socket, "shutdown", shutdown)
        waker.wake()


def test_another_error_of_waking_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def shutdown(sock: socket.socket, how: int) -> None:
        raise OSError(errno.EIO, "strange")

    with blocking_pair() as (ours, _):
        waker = Waker(ours)
        monkeypatch.setattr(socket.socket, "shutdown", shutdown)
        with pytest.raises(OSError, match="strange"):
            waker.wake()


def test_what_is_no_connection_can_be_woken() -> None:
    with socket.socket() as sock:
        Waker(sock).wake()


def test_waking_beside_closing_hits_no_stranger() -> None:
    """Descriptors are closed and their numbers taken again, while others are woken."""
    wakers: queue.SimpleQueue[Waker | None] = queue.SimpleQueue()

    def wake() -> None:
        while waker := wakers.get():
            waker.wake()

    thread = threading.Thread(target=wake)
    thread.start()
    try:
        for _ in range(500):
            ours, peer = socket.socketpair()
            wakers.put(Waker(ours))
            ours.close()
            peer.close()
            one, another = socket.socketpair()  # With the numbers of the two.
            with one, another:
                one.sendall(b"x")
                another.sendall(b"y")
                assert (one.recv(2), another.recv(2)) == (b"y", b"x")
    finally:
        wakers.put(None)
        thread.join(REAL_LIMIT)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@forks_with_threads
def test_a_child_has_a_lock_of_its_own() -> None:
    """Forked while somebody holds the lock, it would wait for that one for ever."""
    with blocking_pair() as (ours, peer):
        waker = Waker(ours)
        with _waking._lock:
            pid = os.fork()
            if not pid:  # The alarm kills whoever waits.
                signal.alarm(int(REAL_LIMIT))
                waker.wake()
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert peer.recv(1) == b""


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_collection_under_the_lock_may_close_sockets() -> None:
    """A cycle may hold a file of a closed socket; collecting it closes the descriptor."""

    class Cycle:
        pass

    threshold = gc.get_threshold()
    gc.set_threshold(10)
    try:
        for _ in range(300):
            left, right = socket.socketpair()
            cycle: Any = Cycle()
            Waker(left)
            cycle.file, cycle.itself = left.makefile("rb"), cycle
            left.close()
            right.close()
            del cycle
    finally:
        gc.set_threshold(*threshold)
