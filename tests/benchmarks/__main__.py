"""The command: ``python -m tests.benchmarks``, from the repository's root."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.calibrate import calibrate
from tests.benchmarks.check import check
from tests.benchmarks.comparison import compare
from tests.benchmarks.load import LoadFailed, compile_load
from tests.benchmarks.memory import COMPARED as COMPARED_IN_MEMORY
from tests.benchmarks.memory import footprints
from tests.benchmarks.page import write_page
from tests.benchmarks.report import markdown
from tests.benchmarks.results import Results
from tests.benchmarks.scaling import COMPARED as COMPARED_IN_SCALING
from tests.benchmarks.scaling import growths
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
        choices=[*WORKLOADS, "idle", "scaling"],
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
        "--from",
        type=Path,
        metavar="FILE",
        dest="kept",
        help="measure nothing: read what --json wrote",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="DOCS",
        help="write the documentation's tables and picture there",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="the regression check instead: exit with 1 if a ratio is missed",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="instead: what the load generator can drive at most",
    )
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds and --seconds must be positive")
    if options.write and (options.workload or options.peer):
        parser.error("--write needs a whole run: no --workload, no --peer")
    return options


def takes_part(peer: Peer, workload: Workload) -> bool:
    """Whether the peer has a server for the workload."""
    entry = getattr(peer, workload.server)
    return entry is not None and (peer.only is None or workload.name in peer.only)


def measure_all(program: Path, options: argparse.Namespace) -> Results:
    """Measure what the command line asks for."""
    names = [OURS.name, *options.peer] if options.peer else [*PEERS]
    results = Results(options.rounds, options.seconds)
    for chosen in options.workload or [*WORKLOADS, "idle", "scaling"]:
        if chosen == "idle":
            in_memory = [name for name in COMPARED_IN_MEMORY if name in names]
            results.footprints = footprints(program, in_memory)
        elif chosen == "scaling":
            scaling = [name for name in COMPARED_IN_SCALING if name in names]
            results.growths = growths(program, options.rounds, options.seconds, scaling)
        else:
            workload = WORKLOADS[chosen]
            peers = [PEERS[name] for name in names if takes_part(PEERS[name], workload)]
            results.tables.append(
                compare(
                    program,
                    workload,
                    peers,
                    options.rounds,
                    options.seconds,
                    fresh=options.fresh,
                )
            )
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks. Returns the exit status."""
    options = parse(arguments)
    if not sys.platform.startswith("linux"):
        print("the benchmarks need Linux: epoll, /proc, 127.0.0.0/8", file=sys.stderr)
        return 2
    if options.kept:
        results = Results.from_json(json.loads(options.kept.read_text()))
    else:
        with tempfile.TemporaryDirectory() as directory:
            try:
                program = compile_load(Path(directory))
                if options.check:
                    return 0 if check(program) else 1
                if options.calibrate:
                    calibrate(program, Path(directory), options.seconds)
                    return 0
            except LoadFailed as reason:
                print(reason, file=sys.stderr)
                return 2
            results = measure_all(program, options)
    print(markdown(results))
    if options.json:
        options.json.write_text(json.dumps(results.as_json()) + "\n")
    if options.write:
        write_page(results, options.write)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
