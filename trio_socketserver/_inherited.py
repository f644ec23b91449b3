"""What a forked child has inherited and must not keep.

A descriptor is open until the last process that has it closes it: a listening socket kept
by a child would keep the port, and a connection would not end for its peer. So what this
package has opened is known here.

It is known by weak references, in a plain set: a `weakref.WeakSet` is written in Python,
and after each fork every page that its functions touch has to be copied. (A reference is
equal to another one of the same object, so a new one finds it.) Servers are known by their
identity, because they are the user's, who may have made them equal and not hashable.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable
from typing import Any, Final, Protocol, TypeAlias

References: TypeAlias = set[weakref.ref[Any]]


class Holder(Protocol):
    """Something with sockets, such as a `StreamSocket`."""

    def held(self) -> Iterable[socket.socket]:
        """Return the sockets."""


connections: Final[References] = set()
"""The connections, each a `Holder`, that servers have accepted, until they are closed."""

servers: Final[dict[int, weakref.ref[Any]]] = {}
"""The servers, by `id()`; each may have a ``socket``."""


def remember(references: References, thing: object) -> None:
    """Add a reference to *thing*, which goes when it is forgotten or does not live."""
    references.add(weakref.ref(thing, references.discard))


def forget(references: References, thing: object) -> None:
    """Discard the reference to *thing*, if there is one."""
    references.discard(weakref.ref(thing))


def remember_server(server: object) -> None:
    """Add a reference to *server*, which goes when it does not live."""
    # Not by the module's name for them, which may be gone when the interpreter ends.
    identity, pop = id(server), servers.pop
    servers[identity] = weakref.ref(server, lambda _: pop(identity, None))


def close_inherited(kept: Iterable[socket.socket]) -> None:
    """Close, in a child, what it has inherited of the parent's, except for *kept*."""
    # Copies, because a reference goes when what it refers to does.
    inherited: list[Any] = [
        getattr(server(), "socket", None) for server in [*servers.values()]
    ]
    holders: list[Holder | None] = [connection() for connection in [*connections]]
    for holder in filter(None, holders):
        inherited += holder.held()
    keeping = {sock.fileno() for sock in kept}
    for sock in inherited:
        if isinstance(sock, socket.socket) and sock.fileno() not in keeping:
            # Below all overrides, which would tell the parent's trio, or take its locks.
            descriptor = super(socket.socket, sock).detach()
            if descriptor != -1:
                os.close(descriptor)
