"""What a forked child has inherited and must not keep.

A descriptor is open until the last process that has it closes it: a listening socket kept
by a child would keep the port, and a connection would not end for its peer. So what this
package has opened is known here.

It is known by weak references, in a plain set: a `weakref.WeakSet` is written in Python,
and after each fork every page that its functions touch has to be copied. (A reference is
equal to another one of the same object, so a new one finds it.)
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Final, Protocol, TypeVar

T = TypeVar("T")


class Holder(Protocol):
    """Something with sockets, such as a `StreamSocket`."""

    def held(self) -> Iterable[socket.socket]:
        """Return the sockets."""


connections: Final[set[weakref.ref[Holder]]] = set()
"""The connections that servers have accepted, until they are closed."""

servers: Final[set[weakref.ref[Any]]] = set()
"""The servers; each may have a ``socket``."""


def remember(references: set[weakref.ref[T]], thing: T) -> None:
    """Add a reference to *thing*, which goes when it is forgotten or does not live."""
    references.add(weakref.ref(thing, references.discard))


def forget(references: set[weakref.ref[T]], thing: T) -> None:
    """Discard the reference to *thing*, if there is one."""
    references.discard(weakref.ref(thing))


def _inherited() -> Iterator[socket.socket]:
    for connection in list(connections):
        if (holder := connection()) is not None:
            yield from holder.held()
    for server in list(servers):
        sock = getattr(server(), "socket", None)
        if isinstance(sock, socket.socket):
            yield sock


def close_inherited(kept: Iterable[socket.socket]) -> None:
    """Close, in a child, what it has inherited of the parent's, except for *kept*."""
    keeping = {sock.fileno() for sock in kept}
    for sock in _inherited():
        if sock.fileno() not in keeping:
            # Below all overrides, which would tell the parent's trio, or take its locks.
            descriptor = super(socket.socket, sock).detach()
            if descriptor != -1:
                os.close(descriptor)
