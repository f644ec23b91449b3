"""Memory per idle connection.

Each server is started, and warmed up with connections that end again. Then connections are
opened that echo one line and stay. What the server's process has grown by, divided by their
number, is what one of them takes. The kernel's memory is not in it: that of the sockets is
the same for all, and a thread takes 16 KiB more for its stack there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks.comparison import WARM_UP
from tests.benchmarks.cores import server_and_load
from tests.benchmarks.load import LoadFailed, idle_connections, run_load
from tests.benchmarks.server_process import ServerFailed, serving
from tests.benchmarks.servers import OURS, PEERS, Peer
from tests.benchmarks.workloads import WORKLOADS

CONNECTIONS = 1000
ROUNDS = 3
"""New processes each time. Memory hardly differs from one to the next."""

COMPARED = (
    OURS.name,
    "trio",
    "anyio on trio",
    "asyncio",
    "asyncio, by lines",
    "uvloop",
    "gevent",
    "gevent, by lines",
    "socketserver threading",
    "socketserver threading, by lines",
    "bare epoll",
)
"""A line reader has a buffer of its own, so those rows matter here too."""


@dataclass
class Footprint:
    """What one server takes.

    Attributes:
        peer: Whose it is.
        before: Bytes of the warm server without connections, one figure per round.
        per_connection: Bytes, one figure per round.
        failure: Why there is none.
    """

    peer: Peer
    before: list[int] = field(default_factory=list)
    per_connection: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def usual(self) -> float:
        """Bytes per connection, the median."""
        return median(self.per_connection)


def footprint(program: Path, peer: Peer, rounds: int = ROUNDS) -> Footprint:
    """Measure one server."""
    taken = Footprint(peer)
    if absent := peer.absent():
        taken.failure = f"absent: {', '.join(absent)} is not installed"
        return taken
    server_core, load_core = server_and_load()
    try:
        for _ in range(rounds):
            with serving(peer, "tcp", server_core) as server:
                run_load(program, WORKLOADS["short"], server.port, WARM_UP, load_core)
                before = server.memory()
                with idle_connections(program, server.port, CONNECTIONS, load_core):
                    grown = server.memory() - before
                taken.before.append(before)
                taken.per_connection.append(grown / CONNECTIONS)
    except (ServerFailed, LoadFailed) as reason:
        taken.failure = f"failed: {reason}"
    print(f"idle: {peer.name}", file=sys.stderr)
    return taken


def footprints(program: Path, names: Sequence[str] = COMPARED) -> list[Footprint]:
    """Measure all of them, one after the other: memory does not depend on the moment."""
    return [footprint(program, PEERS[name]) for name in names]
