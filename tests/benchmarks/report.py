"""The tables, for people and for programs."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from statistics import median
from typing import Any

from tests.benchmarks.comparison import Row, Table
from tests.benchmarks.cores import server_and_load
from tests.benchmarks.servers import OURS

VERSIONED = ("trio", "anyio", "uvloop", "gevent")

COLUMNS = (
    "server",
    "requests/s",
    "ours / it",
    "(worst to best round)",
    "by CPU time",
    "p50 µs",
    "p99 µs",
    "CPU s / 1000",
    "load's core",
    "peak MB",
    "errors",
)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    versions = {}
    for package in VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    server_core, load_core = server_and_load()
    return {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": str(len(os.sched_getaffinity(0)))
        + (" (the server and the load share it)" if server_core == load_core else ""),
        **versions,
    }


def our_row(table: Table) -> Row | None:
    """The row of the package itself, if it was measured."""
    for row in table.rows:
        if row.peer is OURS and row.failure is None:
            return row
    return None


def cells(table: Table, row: Row) -> list[str]:
    """One line of a table."""
    if row.failure is not None:
        return [row.peer.name, row.failure, *[""] * (len(COLUMNS) - 2)]
    ours = our_row(table)
    ratio = spread = by_cpu = ""
    if ours is not None and row is not ours:
        ratios = table.ratios(ours, row)
        ratio = f"**{median(ratios):.2f}**"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        by_cpu = f"{median(table.cpu_ratios(ours, row)):.2f}"
    return [
        row.peer.name,
        f"{row.rate:,.0f}",
        ratio,
        spread,
        by_cpu,
        f"{row.latency_us('p50_us'):,.0f}",
        f"{row.latency_us('p99_us'):,.0f}",
        f"{row.cpu_per_1000:.4f}",
        f"{row.load_share:.0%}",
        f"{row.peak_memory / 1e6:.0f}",
        str(row.errors),
    ]


def markdown(tables: Sequence[Table]) -> str:
    """All tables, and what they were measured on."""
    lines = [", ".join(f"{name} {value}" for name, value in machine().items()), ""]
    for table in tables:
        lines += [f"### {table.workload.title}", ""]
        lines.append(f"| {' | '.join(COLUMNS)} |")
        lines.append("|---|" + "---:|" * (len(COLUMNS) - 1))
        lines += [f"| {' | '.join(cells(table, row))} |" for row in table.rows]
        lines.append("")
    return "\n".join(lines)


def as_json(tables: Sequence[Table]) -> dict[str, Any]:
    """Every sample of every round, for plots and for other statistics."""
    return {
        "machine": machine(),
        "workloads": {
            table.workload.name: {
                "title": table.workload.title,
                "clients": table.workload.clients,
                "size": table.workload.size,
                "peers": {
                    row.peer.name: {
                        "failure": row.failure,
                        "peak_memory_bytes": row.peak_memory,
                        "rounds": [
                            {
                                **vars(sample.load),
                                "rate": sample.load.rate,
                                "server_cpu_seconds": sample.server_cpu_seconds,
                            }
                            for sample in row.samples
                        ],
                    }
                    for row in table.rows
                },
            }
            for table in tables
        },
    }
