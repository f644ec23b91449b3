"""The load generator: ``load.c``, compiled when it is needed.

It is C because a Python client costs more than a Python server, and the slower side is the
one that gets measured.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.cores import pinned
from tests.benchmarks.workloads import Workload

SOURCE = Path(__file__).with_name("load.c")

GRACE = 30.0
"""Seconds beyond its own time after which the load counts as hung: it allows 10 for a
connection to be answered, and 3 for the last replies."""


OPENING_TIMEOUT = 60.0
"""Seconds for idle connections to be opened and greeted: 5,000 take about one, or ten where
each gets a thread and others want the core too."""


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
    p999_us: float

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.operations / self.seconds


def compile_c(source: Path, directory: Path) -> Path:
    """Compile a program into ``directory``.

    Raises:
        LoadFailed: There is no C compiler, or it failed.
    """
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        raise LoadFailed(
            f"no C compiler: {compiler[0]!r} was not found. The load generator needs one "
            "(Debian: apt install gcc libc6-dev); CC names another."
        )
    program = directory / source.stem
    done = subprocess.run(
        [*compiler, "-O2", "-std=c11", "-o", str(program), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise LoadFailed(f"{compiler[0]} could not compile {source.name}:\n{done.stderr}")
    return program


def compile_load(directory: Path) -> Path:
    """Compile the load generator into ``directory``.

    Raises:
        LoadFailed: There is no C compiler, or it failed.
    """
    return compile_c(SOURCE, directory)


@contextmanager
def idle_connections(program: Path, port: int, count: int) -> Iterator[None]:
    """Hold connections that have echoed one line, and say nothing more.

    Raises:
        LoadFailed: Not all of them could be opened.
    """
    command = [str(argument) for argument in (program, "idle", port, count)]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        ) as holder,
    ):
        assert holder.stdout is not None
        try:
            ready, _, _ = select.select([holder.stdout], [], [], OPENING_TIMEOUT)
            if not ready or holder.stdout.read(5) != b"open\n":
                stderr.seek(0)
                said = stderr.read().strip() or f"not within {OPENING_TIMEOUT:.0f} s"
                raise LoadFailed(f"could not open {count} connections: {said}")
            yield
        finally:
            holder.kill()


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
