"""The regression check: ratios that must hold on any machine.

A change that makes the package slower shows here first. The limits are ratios to other
servers in the same run, not times, and leave room for noise.

What is compared is requests per second *of the server's CPU time*. Where the server has its
core to itself, that is the rate; where other programs want the core too, as on most CI
machines, it still is what the code costs, while rates differ by half from one second to
the next. It would miss a server that waits where it should work, so the rate has a limit
too, a loose one. A limit that fails is measured again, in more rounds, before it counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.benchmarks.comparison import compare
from tests.benchmarks.report import our_row
from tests.benchmarks.servers import OURS, PEERS
from tests.benchmarks.workloads import WORKLOADS, Workload

ROUNDS, SECONDS = 3, 1.0
AGAIN_ROUNDS = 5

RATE_SHARE = 0.5
"""Of a limit, for the rate. On a busy machine a rate was seen to be off by a third; a stall
of any kind (a delayed acknowledgement, a dropped SYN) costs a factor of ten."""


@dataclass(frozen=True)
class Limit:
    """Ours must serve ``at_least`` times the requests of ``peer``."""

    workload: str
    peer: str
    at_least: float


@dataclass(frozen=True)
class Ratios:
    """What was measured for a limit."""

    cpu: float = 0.0
    rate: float = 0.0

    def satisfy(self, limit: Limit) -> bool:
        """Whether the limit holds."""
        return self.cpu >= limit.at_least and self.rate >= limit.at_least * RATE_SHARE


LIMITS = (
    Limit("short", "trio", 2.5),
    Limit("short", "socketserver threading", 2.5),
    Limit("blocking", "socketserver threading", 1.4),
    Limit("pingpong", "trio", 1.7),
    Limit("pingpong", "asyncio", 1.0),
    Limit("bulk", "trio", 1.2),
    Limit("udp", "trio", 1.3),
)
"""Only peers that need no package beyond the test dependencies, so that all of them are
always checked."""


def measure(
    program: Path, workload: Workload, limits: Iterable[Limit], rounds: int
) -> dict[Limit, Ratios]:
    """The measured ratios for every limit of one workload; zero where there are none."""
    limits = list(limits)
    peers = [OURS, *(PEERS[limit.peer] for limit in limits)]
    table = compare(program, workload, peers, rounds, SECONDS)
    ours = our_row(table)
    measured = {}
    for limit, row in zip(limits, table.rows[1:], strict=True):
        if ours is None or row.failure is not None:
            failed = table.rows[0] if ours is None else row
            print(f"{workload.name}: {failed.peer.name}: {failed.failure}")
            measured[limit] = Ratios()
        else:
            measured[limit] = Ratios(
                cpu=median(table.cpu_ratios(ours, row)),
                rate=median(table.ratios(ours, row)),
            )
    return measured


def check(program: Path) -> bool:
    """Measure and print every limit. True if all of them hold."""
    holds = True
    for workload in WORKLOADS.values():
        limits = [limit for limit in LIMITS if limit.workload == workload.name]
        measured = measure(program, workload, limits, ROUNDS)
        missed = [limit for limit in limits if not measured[limit].satisfy(limit)]
        if missed:
            measured |= measure(program, workload, missed, AGAIN_ROUNDS)
        for limit in limits:
            ratios = measured[limit]
            satisfied = ratios.satisfy(limit)
            holds &= satisfied
            print(
                f"{'ok  ' if satisfied else 'FAIL'} {limit.workload}: "
                f"{ratios.cpu:.2f} x {limit.peer} (at least {limit.at_least:.2f}; "
                f"by the rate {ratios.rate:.2f})",
                flush=True,
            )
    return holds
