"""The command: ``python -m tests.benchmarks``, from the repository's root."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.check import check
from tests.benchmarks.comparison import compare
from tests.benchmarks.load import LoadFailed, compile_load
from tests.benchmarks.report import as_json, markdown
from tests.benchmarks.servers import OURS, PEERS, Peer
from tests.benchmarks.workloads import WORKLOADS, Workload

ROUNDS, SECONDS = 5, 1.5
QUICK_ROUNDS, QUICK_SECONDS = 3, 0.5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description="Compare trio_socketserver with other servers in one interleaved run.",
    )
    parser.add_argument(
        "--workload",
        action="append",
        choices=WORKLOADS,
        help="only this one; may be repeated",
    )
    parser.add_argument(
        "--peer",
        action="append",
        choices=[name for name in PEERS if name != OURS.name],
        help="only against this one; may be repeated",
    )
    parser.add_argument("--rounds", type=int, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--seconds", type=float, help=f"per measurement; default: {SECONDS}"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds of {QUICK_SECONDS} s"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="a new server process for every measurement, not warmed up",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every sample there"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="the regression check instead: exit with 1 if a ratio is missed",
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    return options


def takes_part(peer: Peer, workload: Workload) -> bool:
    """Whether the peer has a server for the workload."""
    entry = getattr(peer, workload.server)
    return entry is not None and (peer.only is None or workload.name in peer.only)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks. Returns the exit status."""
    options = parse(arguments)
    if not sys.platform.startswith("linux"):
        print("the benchmarks need Linux: epoll, /proc, 127.0.0.0/8", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as directory:
        try:
            program = compile_load(Path(directory))
        except LoadFailed as reason:
            print(reason, file=sys.stderr)
            return 2
        if options.check:
            return 0 if check(program) else 1
        peers = (
            [OURS, *map(PEERS.__getitem__, options.peer)]
            if options.peer
            else [*PEERS.values()]
        )
        tables = [
            compare(
                program,
                WORKLOADS[name],
                [peer for peer in peers if takes_part(peer, WORKLOADS[name])],
                options.rounds,
                options.seconds,
                fresh=options.fresh,
            )
            for name in options.workload or WORKLOADS
        ]
    print(markdown(tables))
    if options.json:
        options.json.write_text(json.dumps(as_json(tables), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
