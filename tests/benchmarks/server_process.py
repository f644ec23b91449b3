"""A server in a process of its own, and what the kernel says it used."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO

from tests.benchmarks.cores import pinned
from tests.benchmarks.servers import Peer
from tests.benchmarks.workloads import Server

START_TIMEOUT = 60.0
"""Seconds until a server must have announced its port: importing takes 0.1 to 0.5, and many
times as long where others want the core too."""

KILL_TIMEOUT = 5.0
"""Seconds that SIGTERM is given before SIGKILL. No server handles it: it ends at once."""

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>."""

libc = ctypes.CDLL(None)


class ServerFailed(Exception):
    """The server did not start, or died. The text holds the end of its stderr."""


class ServerProcess:
    """A running server.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        self._process = process
        self._stderr = stderr
        self.port = self._announced_port()

    def check(self) -> None:
        """See that it still runs.

        Raises:
            ServerFailed: It does not.
        """
        if self._process.poll() is not None:
            status = self._process.returncode
            raise ServerFailed(f"ended with {status}: {self.last_words()}")

    def cpu_seconds(self) -> float:
        """CPU time used so far, by all threads and by children."""
        return sum(map(cpu_seconds_of, [self._process.pid, *self._children()]))

    def _children(self) -> Iterator[int]:
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            with suppress(FileNotFoundError):  # It has just ended.
                yield from map(int, (thread / "children").read_text().split())

    def peak_memory(self) -> int:
        """The most memory it has had resident so far, in bytes, without children."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise ServerFailed("has no memory: it is a zombie")

    def memory(self) -> int:
        """Its proportional set size now, in bytes: its own memory, and its share of the
        rest. The kernel's memory, for sockets and for threads' stacks, is not in it.
        """
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        (line,) = (line for line in rollup.splitlines() if line.startswith("Pss:"))
        return int(line.split()[1]) * 1024

    def _announced_port(self) -> int:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], START_TIMEOUT)[0]:
            raise ServerFailed(f"did not start within {START_TIMEOUT:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(KILL_TIMEOUT)
            raise ServerFailed(f"did not start: {self.last_words()}")
        return int(line)

    def last_words(self) -> str:
        """The last line of its stderr."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def cpu_seconds_of(pid: int) -> float:
    """CPU time of a process, and of those of its children that it has waited for.

    Its own is read from its clock. The ticks in /proc are hundredths of a second, and on a
    busy core a measurement may be a tenth.
    """
    clock = ctypes.c_int()
    if libc.clock_getcpuclockid(pid, ctypes.byref(clock)):
        return 0.0  # It is waited for by now, and in its parent's figures the next time.
    try:
        own = time.clock_gettime(clock.value)
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    # proc(5): after the name in brackets comes field 3; cutime and cstime are fields 16 and
    # 17.
    return own + sum(map(int, stat.rpartition(")")[2].split()[13:15])) / TICKS_PER_SECOND


def die_with_parent() -> None:
    """Runs in the child: however the benchmarks end, no server stays behind."""
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def running(command: Sequence[str], core: int | None) -> Iterator[ServerProcess]:
    """Run a program that prints its port, on ``core`` or on all; kill it on leaving.

    Raises:
        ServerFailed: It did not start.
    """
    with tempfile.TemporaryFile() as stderr:
        with pinned(core):
            process = subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],
                stdout=subprocess.PIPE,
                stderr=stderr,
                preexec_fn=die_with_parent,
            )
        with process:
            try:
                yield ServerProcess(process, stderr)
            finally:
                process.terminate()
                try:
                    process.wait(KILL_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()


def serving(
    peer: Peer, server: Server, core: int | None
) -> AbstractContextManager[ServerProcess]:
    """Start a peer's server, as `running` does."""
    command = [sys.executable, "-m", "tests.benchmarks.servers", peer.name, server]
    return running(command, core)
