"""What every test is held to: it leaves no descriptor, thread or child behind."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


def open_descriptors() -> dict[str, str]:
    """Return what each descriptor of this process stands for."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[name] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue  # The descriptor of the listing itself.
    return found


def live_threads() -> set[threading.Thread]:
    """Return the running threads, without those that trio keeps for its next call."""
    return {
        thread
        for thread in threading.enumerate()
        if not thread.name.startswith("Trio thread")
    }


def children() -> set[str]:
    """Return the process ids of this process's children, zombies included."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update((task / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue  # A thread that has just ended.
    return found


@pytest.fixture(autouse=True, scope="session")
def _only_what_tests_make() -> Iterator[None]:
    """Take what is there already out of each test's collection, which would walk it all."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """Listen for SIGINT, which a shell has what it starts in the background ignore."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves something open or running."""
    before = open_descriptors(), live_threads(), children()
    yield
    gc.collect()
    gc.freeze()  # What a test has imported stays.
    descriptors = {
        number: target
        for number, target in open_descriptors().items()
        if before[0].get(number) != target
    }
    assert not descriptors, f"left open: {descriptors}"
    assert not live_threads() - before[1]
    assert not children() - before[2]
