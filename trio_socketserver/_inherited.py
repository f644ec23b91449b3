"""What a forked child has inherited and must not keep.

A descriptor is open until the last process that has it closes it: a listening socket kept
by a child would keep the port, and a connection would not end for its peer. So what this
package has opened is known here. Adding and discarding is a set operation per connection.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol


class Holder(Protocol):
    """Something with sockets, such as a `StreamSocket`."""

    def held(self) -> Iterable[socket.socket]:
        """Return the sockets."""


connections: Final[weakref.WeakSet[Holder]] = weakref.WeakSet()
"""The connections that servers have accepted, until they are closed."""

servers: Final[weakref.WeakSet[Any]] = weakref.WeakSet()
"""The servers; each may have a ``socket``."""


def _inherited() -> Iterator[socket.socket]:
    for connection in connections:
        yield from connection.held()
    for server in servers:
        sock = getattr(server, "socket", None)
        if isinstance(sock, socket.socket):
            yield sock


def close_inherited(kept: Iterable[socket.socket]) -> None:
    """Close, in a child, what it has inherited of the parent's, except for *kept*."""
    keeping = {sock.fileno() for sock in kept}
    for sock in list(_inherited()):
        if sock.fileno() not in keeping:
            # Below all overrides, which would tell the parent's trio, or take its locks.
            descriptor = super(socket.socket, sock).detach()
            if descriptor != -1:
                os.close(descriptor)
