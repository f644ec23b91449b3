"""What the clients do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Server: TypeAlias = Literal["tcp", "udp", "blocking", "forking", "computing"]
"""What a peer's server serves: connections, datagrams, connections by blocking handlers,
those in a process each, and connections for which it computes for 2 ms."""


@dataclass(frozen=True)
class Workload:
    """One table.

    Attributes:
        name: What the command line calls it.
        title: What the report calls it.
        mode: The load generator's mode.
        clients: How many there are, and so how many requests are in flight.
        size: Bytes of one message.
        server: Which of a peer's servers it needs.
        pinned: Whether server and load have one core each.
    """

    name: str
    title: str
    mode: Literal["short", "pingpong", "udp"]
    clients: int
    size: int
    server: Server = "tcp"
    pinned: bool = True


WORKLOADS = {
    workload.name: workload
    for workload in [
        Workload(
            "short",
            "Short connections: connect, one line, one reply, close (50 clients, 64 bytes)",
            mode="short",
            clients=50,
            size=64,
        ),
        Workload(
            "pingpong",
            "Line ping-pong on open connections (50 clients, 64 bytes)",
            mode="pingpong",
            clients=50,
            size=64,
        ),
        Workload(
            "bulk",
            "64 KiB echoes on open connections (8 clients)",
            mode="pingpong",
            clients=8,
            size=65536,
        ),
        Workload(
            "udp",
            "UDP ping-pong (50 clients, 64 bytes)",
            mode="udp",
            clients=50,
            size=64,
            server="udp",
        ),
        Workload(
            "blocking",
            "Short connections with one blocking handler for all (20 clients, 64 bytes)",
            mode="short",
            clients=20,
            size=64,
            server="blocking",
        ),
        Workload(
            "forking",
            "Short connections with a process each (8 clients, 64 bytes)",
            mode="short",
            clients=8,
            size=64,
            server="forking",
        ),
        Workload(
            "computing",
            "Short connections, 2 ms of computing for each (8 clients, 64 bytes)",
            mode="short",
            clients=8,
            size=64,
            server="computing",
            pinned=False,
        ),
    ]
}
