"""Whether the cost stays flat as connections grow: ``python -m tests.benchmarks.scaling``.

Three questions, each at several numbers of open connections: how many requests 50 clients
get answered while the other connections say nothing; how many all of them together; and how
many short connections are served beside the idle ones.

As in `comparison`, only what was measured in one round is compared. Every number of
connections has a server process of its own, so that none pays for what another left behind.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal, TypeAlias

from tests.benchmarks.comparison import WARM_UP, Row, Sample, failures_noted, measure
from tests.benchmarks.cores import server_and_load
from tests.benchmarks.load import idle_connections, run_load
from tests.benchmarks.server_process import ServerProcess, serving
from tests.benchmarks.servers import OURS, PEERS, Peer
from tests.benchmarks.workloads import WORKLOADS, Workload

ROUNDS, SECONDS = 5, 1.0

Question: TypeAlias = Literal["beside idle", "all active", "short beside idle"]
QUESTIONS: dict[Question, str] = {
    "beside idle": "Ping-pong of 50 clients, beside so many idle connections",
    "all active": "Ping-pong of so many clients, all of them active",
    "short beside idle": "Short connections of 50 clients, beside so many idle connections",
}
COUNTS: dict[Question, tuple[int, ...]] = {
    "beside idle": (10, 100, 1000, 5000),
    "all active": (10, 100, 1000, 5000),
    "short beside idle": (0, 1000, 5000),
}

COMPARED = (OURS.name, "trio", "asyncio", "bare epoll")
"""What is flat for the bare loop and not for others, is theirs and not the kernel's."""


@dataclass(frozen=True)
class Growth:
    """One server, asked one question: a row for each number of open connections."""

    question: Question
    peer: Peer
    rows: dict[int, Row]

    def relative(self, open_connections: int, *, by_cpu: bool = False) -> float:
        """Requests per second over those at the first number, the median of the rounds."""
        first, *_ = self.rows.values()

        def rate(sample: Sample) -> float:
            return 1 / sample.cpu_per_request if by_cpu else sample.load.rate

        return median(
            rate(here) / rate(there)
            for here, there in zip(
                self.rows[open_connections].samples, first.samples, strict=True
            )
        )

    @property
    def failure(self) -> str | None:
        """The first one, if any."""
        return next((row.failure for row in self.rows.values() if row.failure), None)


def workload_for(question: Question, open_connections: int) -> tuple[Workload, int]:
    """What the active clients do, and how many connections are idle."""
    if question == "short beside idle":
        return WORKLOADS["short"], open_connections
    if question == "all active":
        return replace(WORKLOADS["pingpong"], clients=open_connections), 0
    return WORKLOADS["pingpong"], open_connections


def grow(
    program: Path, question: Question, peer: Peer, rounds: int, seconds: float
) -> Growth:
    """Ask one question of one server."""
    server_core, load_core = server_and_load()
    growth = Growth(question, peer, {count: Row(peer) for count in COUNTS[question]})
    with ExitStack() as stack:
        running: dict[int, ServerProcess] = {}
        for count, row in growth.rows.items():
            workload, idle = workload_for(question, count)
            with failures_noted(row):
                server = stack.enter_context(serving(peer, "tcp", server_core))
                run_load(program, WORKLOADS["short"], server.port, WARM_UP, load_core)
                if idle:
                    stack.enter_context(
                        idle_connections(program, server.port, idle, load_core)
                    )
                run_load(program, workload, server.port, WARM_UP, load_core)
                running[count] = server
        if growth.failure is None:
            for number in range(rounds):
                counts = list(running)[:: 1 if number % 2 else -1]
                for count in counts:
                    workload, _ = workload_for(question, count)
                    with failures_noted(growth.rows[count]):
                        measure(
                            growth.rows[count], program, workload, running[count], seconds
                        )
    print(f"scaling: {question}: {peer.name}", file=sys.stderr)
    return growth


def growths(
    program: Path,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
    names: Sequence[str] = COMPARED,
) -> list[Growth]:
    """Ask every question of every server."""
    return [
        grow(program, question, PEERS[name], rounds, seconds)
        for question in QUESTIONS
        for name in names
    ]


if __name__ == "__main__":
    from tests.benchmarks.__main__ import main

    sys.exit(main(["--workload", "scaling", *sys.argv[1:]]))
