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
        brief: What a list of all of them calls it.
        title: What its own table is called.
        mode: The load generator's mode.
        clients: How many there are, and so how many requests are in flight.
        size: Bytes of one message.
        server: Which of a peer's servers it needs.
        pinned: Whether server and load have one core each.
    """

    name: str
    brief: str
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
            "short connections",
            "Short connections: connect, one line, one reply, close (50 clients, 64 bytes)",
            mode="short",
            clients=50,
            size=64,
        ),
        Workload(
            "pingpong",
            "line ping-pong",
            "Line ping-pong on open connections (50 clients, 64 bytes)",
            mode="pingpong",
            clients=50,
            size=64,
        ),
        Workload(
            "bulk",
            "64 KiB echoes",
            "64 KiB echoes on open connections (8 clients)",
            mode="pingpong",
            clients=8,
            size=65536,
        ),
        Workload(
            "udp",
            "UDP ping-pong",
            "UDP ping-pong (50 clients, 64 bytes)",
            mode="udp",
            clients=50,
            size=64,
            server="udp",
        ),
        Workload(
            "blocking",
            "short connections, blocking handler",
            "Short connections with one blocking handler for all (20 clients, 64 bytes)",
            mode="short",
            clients=20,
            size=64,
            server="blocking",
        ),
        Workload(
            "forking",
            "short connections, process for each",
            "Short connections with a process each (8 clients, 64 bytes)",
            mode="short",
            clients=8,
            size=64,
            server="forking",
        ),
        Workload(
            "computing",
            "2 ms of computing, two workers",
            "Short connections, 2 ms of computing for each (8 clients, 64 bytes)",
            mode="short",
            clients=8,
            size=64,
            server="computing",
            pinned=False,
        ),
    ]
}
