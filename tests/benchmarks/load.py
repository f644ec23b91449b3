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
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.benchmarks.cores import pinned
from tests.benchmarks.workloads import Workload

SOURCE = Path(__file__).with_name("load.c")

GRACE = 30.0
"""Seconds beyond its own time after which the load counts as hung: it allows 3 for the last
replies."""


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


class Load:
    """A running load generator: its connections are open, and no request is sent yet."""

    def __init__(self, process: subprocess.Popen[str], stderr: IO[str]) -> None:
        self._process = process
        self._stderr = stderr
        self._line(OPENING_TIMEOUT)

    def run(self, seconds: float) -> LoadResult:
        """Run it. The connections stay open.

        Raises:
            LoadFailed: The load gave up, or did not end.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return LoadResult(**json.loads(self._line(seconds + GRACE)))

    def _line(self, timeout: float) -> str:
        """The next line it says; one that says nothing has failed."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise LoadFailed(f"the load said nothing for {timeout:.0f} s")
        if not (line := self._process.stdout.readline()):
            self._stderr.seek(0)
            raise LoadFailed(self._stderr.read().strip().replace("\n", "; "))
        return line


@contextmanager
def opened(command: Sequence[object], core: int | None) -> Iterator[Load]:
    """Start a load; close its connections on leaving."""
    with tempfile.TemporaryFile("w+") as stderr:
        with pinned(core):
            process = subprocess.Popen(
                [str(argument) for argument in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        with process:
            try:
                yield Load(process, stderr)
            finally:
                process.kill()


def opened_load(
    program: Path, workload: Workload, port: int, seconds: float, core: int | None
) -> AbstractContextManager[Load]:
    """Open what a workload needs: to be run once, for ``seconds``."""
    command = [program, workload.mode, port, workload.clients, workload.size, seconds]
    return opened(command, core)


def idle_connections(
    program: Path, port: int, count: int, core: int | None
) -> AbstractContextManager[Load]:
    """Hold connections that have echoed one line, and say nothing more."""
    return opened([program, "idle", port, count], core)


def run_load(
    program: Path, workload: Workload, port: int, seconds: float, core: int | None
) -> LoadResult:
    """Open, run and close.

    Raises:
        LoadFailed: The load gave up, or did not end.
    """
    with opened_load(program, workload, port, seconds, core) as load:
        return load.run(seconds)
