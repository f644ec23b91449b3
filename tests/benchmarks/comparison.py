"""The interleaved run.

A machine is never equally fast for a whole run: other programs, the clock rate, the
hypervisor. So no two numbers taken at different times are compared. In each round every
peer is measured for a short time, one right after the other, and a ratio is taken within
a round only. The median over the rounds is what is reported. The order rotates from round
to round, so that nobody always comes first.

All servers of a workload run at once, but only one of them has anything to do. They are
warmed up first: what counts is a server that has been up for a while, and the difference
can be large. asyncio asks for 256 KiB with every receive, and glibc maps and unmaps fresh
memory for each, until the first connection has ended; that end teaches it to keep the
block. Measured before that, asyncio's streams do half of what they do ever after. So there
is a row for asyncio just started too, and ``fresh`` starts every server anew each time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks.cores import server_and_load
from tests.benchmarks.load import LoadFailed, LoadResult, opened_load, run_load
from tests.benchmarks.server_process import ServerFailed, ServerProcess, serving
from tests.benchmarks.servers import Peer
from tests.benchmarks.workloads import Workload

WARM_UP = 0.3
"""Seconds of load before the first round: caches, free lists and worker threads fill, and
the specialising interpreter has seen its loops."""


@dataclass(frozen=True)
class Sample:
    """One peer in one round."""

    load: LoadResult
    server_cpu_seconds: float
    """While the load ran, last replies included. Connections that stay open were opened
    before that, and are closed after."""

    @property
    def cpu_per_request(self) -> float:
        """CPU seconds of the server."""
        return self.server_cpu_seconds / self.load.operations


@dataclass
class Row:
    """One peer in one workload: a sample per round, or the reason why there is none."""

    peer: Peer
    samples: list[Sample] = field(default_factory=list)
    peak_memory: int = 0
    failure: str | None = None

    @property
    def rate(self) -> float:
        """Requests per second, the median."""
        return median(sample.load.rate for sample in self.samples)

    @property
    def cpu_us(self) -> float:
        """CPU time of the server per request in microseconds, the median."""
        return median(sample.cpu_per_request * 1e6 for sample in self.samples)

    @property
    def server_share(self) -> float:
        """How much of one core the server used, the median."""
        return median(
            sample.server_cpu_seconds / sample.load.seconds for sample in self.samples
        )

    @property
    def load_share(self) -> float:
        """How much of its core the load used, the median. The load is the limit where this
        is near 1 and the server's share is not.
        """
        return median(
            sample.load.cpu_seconds / sample.load.seconds for sample in self.samples
        )

    @property
    def errors(self) -> int:
        """Requests that went wrong or were never answered, and datagrams sent again."""
        return sum(
            sample.load.errors + sample.load.unanswered + sample.load.lost
            for sample in self.samples
        )

    def latency_us(self, name: str) -> float:
        """The median over the rounds of a percentile: ``p50_us`` to ``p999_us``."""
        return float(median(getattr(sample.load, name) for sample in self.samples))


@dataclass(frozen=True)
class Table:
    """One workload, measured."""

    workload: Workload
    rows: list[Row]

    def ratios(self, ours: Row, other: Row) -> list[float]:
        """Requests per second of ``ours`` over those of ``other``, round by round."""
        return [
            our.load.rate / their.load.rate
            for our, their in zip(ours.samples, other.samples, strict=True)
        ]

    def cpu_ratios(self, ours: Row, other: Row) -> list[float]:
        """The same for requests per second of the server's CPU time."""
        return [
            their.cpu_per_request / our.cpu_per_request
            for our, their in zip(ours.samples, other.samples, strict=True)
        ]


@contextmanager
def failures_noted(row: Row) -> Iterator[None]:
    """What fails for one peer is written into its row."""
    try:
        yield
    except (ServerFailed, LoadFailed) as reason:
        row.failure = f"failed: {reason}"


def cores_of(workload: Workload) -> tuple[int | None, int | None]:
    """The core for the server, and that for the load; None for all of them."""
    return server_and_load() if workload.pinned else (None, None)


def measure(
    row: Row, program: Path, workload: Workload, server: ServerProcess, seconds: float
) -> None:
    """Add one sample to a row."""
    load_core = cores_of(workload)[1]
    with opened_load(program, workload, server.port, seconds, load_core) as load:
        cpu_before = server.cpu_seconds()
        result = load.run(seconds)
        cpu_after = server.cpu_seconds()
    server.check()
    if result.operations == 0:
        raise LoadFailed(f"not one request was answered: {server.last_words()}")
    row.samples.append(Sample(result, cpu_after - cpu_before))
    row.peak_memory = max(row.peak_memory, server.peak_memory())


def compare(
    program: Path,
    workload: Workload,
    peers: Sequence[Peer],
    rounds: int,
    seconds: float,
    *,
    fresh: bool = False,
) -> Table:
    """Measure the peers against each other. A peer that fails does not stop the others.

    Args:
        program: The compiled load generator.
        workload: What the clients do.
        peers: The rows of the table.
        rounds: How often each peer is measured.
        seconds: How long each time.
        fresh: Start a new process for every measurement, and do not warm it up.
    """
    server_core, load_core = cores_of(workload)
    rows = [Row(peer) for peer in peers]

    def start(row: Row) -> AbstractContextManager[ServerProcess]:
        return serving(row.peer, workload.server, server_core)

    with ExitStack() as stack:
        running: dict[str, ServerProcess] = {}
        for row in rows:
            if absent := row.peer.absent():
                row.failure = f"absent: {', '.join(absent)} is not installed"
            elif not fresh and not row.peer.just_started:
                with failures_noted(row):
                    server = stack.enter_context(start(row))
                    run_load(program, workload, server.port, WARM_UP, load_core)
                    running[row.peer.name] = server
        for number in range(rounds):
            first = number % len(rows)
            for row in rows[first:] + rows[:first]:
                if row.failure is not None:
                    continue
                with failures_noted(row):
                    if fresh or row.peer.just_started:
                        with start(row) as server:
                            measure(row, program, workload, server, seconds)
                    else:
                        measure(row, program, workload, running[row.peer.name], seconds)
            print(f"{workload.name}: round {number + 1} of {rounds}", file=sys.stderr)
    return Table(workload, rows)
