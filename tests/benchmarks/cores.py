"""Which core runs what.

The server has one core to itself and the load another, so that neither slows the other
down and the scheduler moves nothing in between. On a machine with one core they share it,
and the report says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


def server_and_load() -> tuple[int, int]:
    """The core for the servers, and the core for the load."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """Processes started inside inherit this core and no other; all cores for None."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
