"""All that one run measured, and how it is kept in a file."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

from tests.benchmarks.comparison import Row, Sample, Table
from tests.benchmarks.cores import server_and_load
from tests.benchmarks.load import LoadResult
from tests.benchmarks.memory import Footprint
from tests.benchmarks.scaling import QUESTIONS, Growth
from tests.benchmarks.servers import PEERS
from tests.benchmarks.workloads import WORKLOADS

VERSIONED = ("trio", "anyio", "uvloop", "gevent")


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
        "Python": platform.python_version(),
        "Linux": ".".join(platform.release().split(".")[:2]),
        "cores": str(len(os.sched_getaffinity(0)))
        + (" (the server and the load share it)" if server_core == load_core else ""),
        **versions,
    }


@dataclass
class Results:
    """One run.

    Attributes:
        machine: What it was measured on.
        rounds: How often each peer was measured.
        seconds: How long each time.
        tables: The comparisons.
        footprints: Memory per idle connection.
        growths: The rates with many connections.
    """

    rounds: int
    seconds: float
    machine: dict[str, str] = field(default_factory=machine)
    tables: list[Table] = field(default_factory=list)
    footprints: list[Footprint] = field(default_factory=list)
    growths: list[Growth] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Every sample of every round."""
        return {
            "rounds": self.rounds,
            "seconds": self.seconds,
            "machine": self.machine,
            "comparison": {
                table.workload.name: rows_as_json(table.rows) for table in self.tables
            },
            "idle": [
                {**vars(footprint), "peer": footprint.peer.name}
                for footprint in self.footprints
            ],
            "scaling": [
                {
                    "question": growth.question,
                    "peer": growth.peer.name,
                    "counts": list(growth.rows),
                    "rows": rows_as_json(list(growth.rows.values())),
                }
                for growth in self.growths
            ],
        }

    @classmethod
    def from_json(cls, data: Any) -> Results:
        """The reverse of `as_json`."""
        return cls(
            rounds=data["rounds"],
            seconds=data["seconds"],
            machine=data["machine"],
            tables=[
                Table(WORKLOADS[name], rows_from_json(rows))
                for name, rows in data["comparison"].items()
            ],
            footprints=[
                Footprint(**{**kept, "peer": PEERS[kept["peer"]]}) for kept in data["idle"]
            ],
            growths=[
                Growth(
                    next(known for known in QUESTIONS if known == kept["question"]),
                    PEERS[kept["peer"]],
                    dict(zip(kept["counts"], rows_from_json(kept["rows"]), strict=True)),
                )
                for kept in data["scaling"]
            ],
        )


def rows_as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Keep rows."""
    return [{**asdict(row), "peer": row.peer.name} for row in rows]


def rows_from_json(kept: Sequence[Any]) -> list[Row]:
    """Make rows of what was kept."""
    return [
        Row(
            PEERS[row["peer"]],
            [
                Sample(LoadResult(**sample["load"]), sample["server_cpu_seconds"])
                for sample in row["samples"]
            ],
            row["peak_memory"],
            row["failure"],
        )
        for row in kept
    ]
