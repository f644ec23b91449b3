"""The load generator: ``load.c``, compiled when it is needed.

It is C because a Python client costs more than a Python server, and the slower side is the
one that gets measured.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.cores import pinned
from tests.benchmarks.workloads import Workload

SOURCE = Path(__file__).with_name("load.c")

GRACE = 30.0
"""Seconds beyond its own time after which the load counts as hung: it allows 10 for a
connection to be answered, and 3 for the last replies."""


class LoadFailed(Exception):
    """The load could not be built, or gave up. The text is its own explanation."""


@dataclass(frozen=True)
class LoadResult:
    """What the clients saw. Times are in the unit of the name."""

    operations: int
    seconds: float
    errors: int
    lost: int
    unanswered: int
    cpu_seconds: float
    p50_us: float
    p90_us: float
    p99_us: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.operations / self.seconds


def compile_load(directory: Path) -> Path:
    """Compile the load generator into ``directory``.

    Raises:
        LoadFailed: There is no C compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise LoadFailed(
            f"no C compiler: {compiler[0]!r} was not found. The load generator needs one "
            "(Debian: apt install gcc libc6-dev); CC names another."
        )
    program = directory / "load"
    done = subprocess.run(
        [*compiler, "-O2", "-std=c11", "-o", str(program), str(SOURCE)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LoadFailed(f"{compiler[0]} could not compile {SOURCE.name}:\n{done.stderr}")
    return program


def run_load(
    program: Path, workload: Workload, port: int, seconds: float, core: int | None
) -> LoadResult:
    """Drive the server on ``port`` for ``seconds``.

    Raises:
        LoadFailed: The load gave up, or did not end.
    """
    command = [program, workload.mode, port, workload.clients, workload.size, seconds]
    try:
        with pinned(core):
            done = subprocess.run(
                [str(argument) for argument in command],
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds + GRACE,
            )
    except subprocess.TimeoutExpired as reason:
        raise LoadFailed("the load did not end") from reason
    if done.returncode != 0:
        raise LoadFailed(done.stderr.strip().replace("\n", "; "))
    return LoadResult(**json.loads(done.stdout))
