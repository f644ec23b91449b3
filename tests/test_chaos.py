"""Chaos: whatever clients, handlers and the program do at once, nothing is left of it.

What a round is, see `chaos`. ``CHAOS_SECONDS`` and ``CHAOS_SEED`` in the environment make
the run longer, and another one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import chaos
import pytest
from contract import DISPATCHERS, Dispatcher

import trio_socketserver

SEED = os.environ.get("CHAOS_SEED", "1995")
SECONDS = float(os.environ.get("CHAOS_SECONDS", "6"))

ROUND = 0.4
"""Seconds that a round takes, about."""

ROUND_OF_WORKERS = 1.4


def rounds_of(dispatcher: Dispatcher) -> int:
    """Return a number that does not depend on how fast the machine is."""
    seconds = SECONDS / len(DISPATCHERS)
    return max(1, round(seconds / (ROUND_OF_WORKERS if dispatcher.workers else ROUND)))


@pytest.mark.parametrize("dispatcher", DISPATCHERS, ids=str)
def test_chaos(dispatcher: Dispatcher) -> None:
    count = rounds_of(dispatcher)
    arguments = [str(dispatcher), SEED, "0", str(count)]
    package = str(Path(trio_socketserver.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-W", "error", chaos.__file__, *arguments],
        env={**os.environ, "PYTHONPATH": package},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            # The program itself looks after rounds that do not end.
            said, complained = process.communicate(timeout=chaos.GUARD * (count + 1))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    again = " ".join(["to see it again: python tests/chaos.py", *arguments])
    assert process.returncode == 0, f"{again}\n{said}\n{complained}"
    assert not complained, f"{again}\n{said}\n{complained}"
    assert said.count(f"{SEED}/{dispatcher}/") == count
