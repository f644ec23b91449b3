"""What the load generator can drive at most: ``python -m tests.benchmarks --calibrate``.

It drives an echo server in C, and the epoll loop in Python for comparison. On loopback
``send()`` also does the TCP of the side that receives, so that the load costs about as much
as the server in C, and the two cores are busy alike. A server in Python whose core is full
while the load's is not, is measured and not the load.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Literal, TypeAlias

from tests.benchmarks.comparison import Row, measure
from tests.benchmarks.cores import server_and_load
from tests.benchmarks.load import compile_c
from tests.benchmarks.server_process import running
from tests.benchmarks.servers import PEERS, Peer
from tests.benchmarks.workloads import WORKLOADS

ECHO = Path(__file__).with_name("echo.c")
ROUNDS = 5

Calibrated: TypeAlias = Literal["short", "pingpong", "udp"]
CALIBRATED: tuple[Calibrated, ...] = ("short", "pingpong", "udp")


def calibrate(program: Path, directory: Path, seconds: float) -> None:
    """Measure and print, a line for each workload and server."""
    echo = str(compile_c(ECHO, directory))
    server_core, _ = server_and_load()
    for name in CALIBRATED:
        workload = WORKLOADS[name]
        peer = PEERS["bare epoll"]
        python = [sys.executable, "-m", "tests.benchmarks.servers", peer.name]
        commands = {
            "C": [echo, workload.server],
            "Python": [*python, workload.server],
        }
        rows = {language: Row(Peer(f"epoll in {language}")) for language in commands}
        for _ in range(ROUNDS):
            for language, command in commands.items():
                with running(command, server_core) as server:
                    measure(rows[language], program, workload, server, seconds)
        for row in rows.values():
            of_the_load = median(
                sample.load.operations / sample.load.cpu_seconds for sample in row.samples
            )
            print(
                f"{name}, {row.peer.name}: {row.rate:,.0f} a second, "
                f"{of_the_load:,.0f} a second of the load's CPU time; "
                f"the server's core {row.server_share:.0%} busy, the load's "
                f"{row.load_share:.0%}",
                flush=True,
            )
