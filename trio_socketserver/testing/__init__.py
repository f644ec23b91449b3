"""Helpers for testing servers and handlers, as `trio.testing` has them for streams.

* `serving` and `serving_in_thread` run a whole server for the length of a block.
* `memory_connection`, `converse` and `datagram_replies` run a handler without any socket.
* `check_cancellation` cancels a handler at every checkpoint in turn.

Nothing here knows a test framework: what is wrong is an `AssertionError`, and all of it
works in plain programs too.
"""

from __future__ import annotations

from ._cancellation import check_cancellation
from ._memory import converse, datagram_replies, memory_connection
from ._memory_sockets import MemoryClient
from ._serving import serving, serving_in_thread

__all__ = [
    "MemoryClient",
    "check_cancellation",
    "converse",
    "datagram_replies",
    "memory_connection",
    "serving",
    "serving_in_thread",
]
