"""The servers that are compared, one process each.

All of them echo. ``trio_socketserver`` is used as its README shows it: a handler that
iterates over the lines of ``rfile`` and writes each to ``wfile``. The others do the least
their library allows: send back what arrived, without looking for line ends. That favours
them.

Where a library has a line reader of its own, there is a second row, "by lines", that does
the same work as ours. trio has none. A library read by chunks is no server of lines: a line
that arrives in two pieces would be two.

This module imports none of the libraries, so that a process loads only what it serves with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

HOST = "127.0.0.1"

BACKLOG = 128
"""Connections the kernel queues, for every peer. socketserver's own default is 5, asyncio's
100, gevent's 256, trio's the system's maximum. Below the number of clients, what is
measured is how long a client waits before it sends its SYN again: one second."""

CHUNK = 65536
"""Bytes asked for by one receive: asyncio streams' limit, and trio's own default."""

Announce = Callable[[int], None]
"""Called with the port, once the server's socket listens."""

Serve = Callable[[Announce], None]
"""Serves until the process is killed."""


@dataclass(frozen=True)
class Peer:
    """One row of the tables.

    Attributes:
        name: What the command line and the tables call it.
        tcp: The function that serves TCP, as ``module:function`` of this package.
        udp: The function that serves UDP.
        blocking: The function that serves TCP with `with_socketserver.EchoLines`.
        forking: The same, with a process per connection, in a process of our size.
        computing: The function that serves TCP, and computes for each connection.
        requires: The packages to be installed for it.
        only: The workloads it takes part in, if not all that its servers could.
        just_started: Whether each measurement gets a new process, not warmed up.
    """

    name: str
    tcp: str | None = None
    udp: str | None = None
    requires: tuple[str, ...] = ()
    only: frozenset[str] | None = None
    blocking: str | None = None
    forking: str | None = None
    computing: str | None = None
    just_started: bool = False

    def absent(self) -> list[str]:
        """The required packages that are not installed."""
        return [package for package in self.requires if find_spec(package) is None]


LINES = frozenset({"short", "pingpong"})
"""The workloads in which it matters whether a server looks for line ends."""

OURS = Peer(
    "trio_socketserver",
    "with_trio_socketserver:tcp",
    "with_trio_socketserver:udp",
    ("trio_socketserver",),
    blocking="with_trio_socketserver:tcp_threading",
    forking="with_trio_socketserver:tcp_forking",
    computing="with_trio_socketserver:two_workers",
)

PEERS = {
    peer.name: peer
    for peer in [
        OURS,
        Peer(
            "trio_socketserver, one worker",
            requires=("trio_socketserver",),
            computing="with_trio_socketserver:one_worker",
        ),
        Peer("trio", "with_trio:tcp", "with_trio:udp", ("trio",)),
        Peer("anyio on trio", "with_anyio:tcp", None, ("anyio", "trio")),
        Peer(
            "anyio on trio, by lines",
            "with_anyio:tcp_by_lines",
            requires=("anyio", "trio"),
            only=LINES,
        ),
        Peer("asyncio", "with_asyncio:tcp", "with_asyncio:udp"),
        Peer(
            "asyncio, just started",
            "with_asyncio:tcp",
            only=frozenset({"pingpong", "bulk"}),
            just_started=True,
        ),
        Peer("asyncio, by lines", "with_asyncio:tcp_by_lines", only=LINES),
        Peer("uvloop", "with_asyncio:tcp_uvloop", "with_asyncio:udp_uvloop", ("uvloop",)),
        Peer(
            "uvloop, by lines",
            "with_asyncio:tcp_uvloop_by_lines",
            requires=("uvloop",),
            only=LINES,
        ),
        Peer("gevent", "with_gevent:tcp", "with_gevent:udp", ("gevent",)),
        Peer(
            "gevent, by lines",
            "with_gevent:tcp_by_lines",
            requires=("gevent",),
            only=LINES,
        ),
        Peer(
            "socketserver threading",
            "with_socketserver:tcp_threading",
            "with_socketserver:udp_threading",
            blocking="with_socketserver:tcp_threading_by_lines",
        ),
        Peer(
            "socketserver threading, by lines",
            "with_socketserver:tcp_threading_by_lines",
            only=LINES,
        ),
        Peer(
            "socketserver forking",
            "with_socketserver:tcp_forking",
            forking="with_socketserver:tcp_forking_of_our_size",
            only=frozenset({"short", "forking"}),
        ),
        Peer("bare epoll", "with_epoll:tcp", "with_epoll:udp"),
    ]
}
