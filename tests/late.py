"""A pytest plugin for who hunts a test that fails now and then: everybody comes late.

    LATE_SEED=1 python -m pytest -p tests.late tests/test_run.py

On a busy machine a thread, a child, a peer or the loop is late now and then, each at
another moment. Here each is, often, by some milliseconds; the seed says when. What fails is
a race: of the test's, or of the package's. (Or of a virtual clock, which jumps while a peer
that is a thread is late. On a busy machine it does so too.)

To be late is all that is done here. What is called is called once, as it was.
"""

from __future__ import annotations

import functools
import os
import random
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import trio

SEED = os.environ.get("LATE_SEED", "1")

OFTEN, SELDOM = 0.5, 0.05
"""How often one is late: who acts a few times in a test, and who a thousand times."""

MOST = 0.02
"""Seconds at most: several turns of the system's scheduler."""

CALLS_OF_PEERS = (
    *("accept", "close", "connect", "connect_ex", "recv", "recv_into"),
    *("send", "sendall", "shutdown"),
)

_random = random.Random(SEED)
_sleep = time.sleep  # Which tests may replace.


def be_late(how_often: float) -> None:
    """Sleep, perhaps."""
    if _random.random() < how_often:
        _sleep(_random.uniform(0, MOST))


def late(function: Callable[..., Any], when: Callable[[], bool]) -> Callable[..., Any]:
    """Return what calls *function*, late, and returns late."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not when():
            return function(*args, **kwargs)
        be_late(OFTEN)
        try:
            return function(*args, **kwargs)
        finally:
            be_late(OFTEN)

    return call


def connected_late(connect: Callable[..., None]) -> Callable[..., None]:
    """Return what also learns late that it is connected: it may have been reset by then."""

    @functools.wraps(connect)
    def call(self: socket.socket, address: Any) -> None:
        connect(self, address)
        if error := self.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(error, os.strerror(error))

    return call


class LateTasks(trio.abc.Instrument):
    """Has the loop come late, back from the kernel and to a task."""

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        be_late(SELDOM)

    def after_io_wait(self, timeout: float) -> None:
        be_late(SELDOM)


def run_late(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return what runs trio with late tasks."""

    @functools.wraps(run)
    def call(
        *args: Any, instruments: Sequence[trio.abc.Instrument] = (), **kwargs: Any
    ) -> Any:
        return run(*args, instruments=[*instruments, LateTasks()], **kwargs)

    return call


def is_peer() -> bool:
    """Tell whether the caller is no trio program, but one that talks to it."""
    return not trio.lowlevel.in_trio_run()


def pytest_configure() -> None:
    """Begin, before any test is imported."""
    for name in CALLS_OF_PEERS:
        setattr(socket.socket, name, late(getattr(socket.socket, name), is_peer))
    setattr(socket.socket, "connect", connected_late(socket.socket.connect))  # noqa: B010
    setattr(threading.Thread, "run", late(threading.Thread.run, lambda: True))  # noqa: B010
    trio.run = run_late(trio.run)
    os.register_at_fork(
        after_in_child=lambda: be_late(OFTEN), after_in_parent=lambda: be_late(OFTEN)
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Have each test meet the same, whether it runs alone or with others."""
    _random.seed(f"{SEED} {zlib.crc32(item.nodeid.encode())}")
    sys.setswitchinterval(10 ** _random.uniform(-5.5, -2.5))
