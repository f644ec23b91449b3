"""Old and new code catch the same exceptions, and the log knows whose fault they are."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import ssl
from typing import Any

import pytest
import trio

import trio_socketserver
from trio_socketserver import ConnectionBroken, IncompleteRead, LineTooLong, RequestTimeout
from trio_socketserver._exceptions import connection_broken, is_peer_fault


@pytest.mark.parametrize(
    ("error", "parents"),
    [
        (LineTooLong, [ValueError]),
        (IncompleteRead, [EOFError]),
        (RequestTimeout, [TimeoutError, OSError, trio.TooSlowError]),
        (ConnectionBroken, [ConnectionError, OSError, trio.BrokenResourceError]),
    ],
)
def test_old_and_new_code_both_catch_them(
    error: type[Exception], parents: list[type[Exception]]
) -> None:
    assert all(issubclass(error, parent) for parent in parents)
    assert getattr(trio_socketserver, error.__name__) is error
    assert error.__name__ in trio_socketserver.__all__


def test_messages_and_attributes() -> None:
    timeout = RequestTimeout("too slow")
    assert timeout.errno == errno.ETIMEDOUT
    assert timeout.strerror == "too slow"
    incomplete = IncompleteRead("short", b"abc")
    assert str(incomplete) == "short"
    assert incomplete.partial == b"abc"


@pytest.mark.parametrize("way", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize(
    "error",
    [
        LineTooLong("long"),
        IncompleteRead("short", b"abc"),
        RequestTimeout("slow"),
        ConnectionBroken(errno.EPIPE, "pipe"),
        ConnectionBroken("no number"),
    ],
    ids=repr,
)
def test_they_can_be_passed_between_processes(error: Any, way: Any) -> None:
    passed = way(error)
    assert type(passed) is type(error)
    assert passed.args == error.args
    assert str(passed) == str(error)
    for name in ("partial", "errno", "strerror"):
        assert getattr(passed, name, None) == getattr(error, name, None)


class SubclassOfIncompleteRead(IncompleteRead):
    """A user's own."""


def test_a_subclass_stays_itself() -> None:
    passed = pickle.loads(pickle.dumps(SubclassOfIncompleteRead("m", b"p")))
    assert type(passed) is SubclassOfIncompleteRead
    assert passed.partial == b"p"


def test_a_system_error_is_translated_with_its_number() -> None:
    broken = connection_broken(ConnectionResetError(errno.ECONNRESET, "whatever"))
    assert broken.errno == errno.ECONNRESET
    assert broken.strerror == os.strerror(errno.ECONNRESET)
    without = connection_broken(OSError("no number"))
    assert without.errno is None
    assert str(without) == "no number"


THEIRS = [
    ConnectionBroken(errno.ECONNRESET, "reset"),
    RequestTimeout("slow"),
    LineTooLong("long"),
    IncompleteRead("short", b""),
    trio.BrokenResourceError("memory stream"),
    BrokenPipeError(),
    ConnectionResetError(),
    ConnectionAbortedError(),
    TimeoutError(),
    ssl.SSLError("alert"),
    ssl.SSLZeroReturnError("close_notify"),
]
OURS = [
    ValueError("a bug"),
    OSError(errno.ENOSPC, "disk full"),
    EOFError("of some file"),
    ConnectionRefusedError("by our database"),
    trio.ClosedResourceError("by ourselves"),
    trio.BusyResourceError("two senders"),
    KeyboardInterrupt(),
    Exception(),
]


@pytest.mark.parametrize("error", THEIRS, ids=repr)
def test_the_peers_faults(error: BaseException) -> None:
    assert is_peer_fault(error)


@pytest.mark.parametrize("error", OURS, ids=repr)
def test_our_faults(error: BaseException) -> None:
    assert not is_peer_fault(error)


def test_a_group_is_the_peers_fault_when_all_its_leaves_are() -> None:
    theirs = ExceptionGroup(
        "", [ConnectionResetError(), ExceptionGroup("", [LineTooLong("long")])]
    )
    assert is_peer_fault(theirs)
    assert not is_peer_fault(ExceptionGroup("", [theirs, ValueError()]))
    assert not is_peer_fault(BaseExceptionGroup("", [theirs, KeyboardInterrupt()]))
