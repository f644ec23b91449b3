"""The tables: what was measured, as text in rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from tests.benchmarks.comparison import Row, Table
from tests.benchmarks.goals import GOALS, MEMORY_GOAL, MEMORY_PEER
from tests.benchmarks.memory import CONNECTIONS, Footprint
from tests.benchmarks.results import Results
from tests.benchmarks.scaling import COUNTS, QUESTIONS, Growth, Question
from tests.benchmarks.servers import OURS
from tests.benchmarks.workloads import WORKLOADS


@dataclass(frozen=True)
class Grid:
    """A table, ready to be written down: the first column names, the others are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


COLUMNS: dict[str, Callable[[Row], str]] = {
    "p50 µs": lambda row: f"{row.latency_us('p50_us'):,.0f}",
    "p90 µs": lambda row: f"{row.latency_us('p90_us'):,.0f}",
    "p99 µs": lambda row: f"{row.latency_us('p99_us'):,.0f}",
    "p99.9 µs": lambda row: f"{row.latency_us('p999_us'):,.0f}",
    "CPU µs each": lambda row: f"{row.cpu_us:.1f}",
    "server's core": lambda row: f"{row.server_share:.0%}",
    "load's core": lambda row: f"{row.load_share:.0%}",
    "peak MB": lambda row: f"{row.peak_memory / 1e6:.0f}",
    "errors": lambda row: str(row.errors),
}
"""What is said of a server by itself. Before these come its name, its rate, and ratios."""


def our_row(table: Table) -> Row | None:
    """The row of the package itself, if it was measured."""
    for row in table.rows:
        if row.peer is OURS and row.failure is None:
            return row
    return None


def spread(ratios: Sequence[float]) -> str:
    """From the worst round to the best."""
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def cells(table: Table, row: Row, columns: Sequence[str]) -> list[str]:
    """One line of a comparison."""
    if row.failure is not None:
        return [row.peer.name, row.failure, *[""] * (3 + len(columns))]
    ours = our_row(table)
    ratio = between = by_cpu = ""
    if ours is not None and row is not ours:
        ratios = table.ratios(ours, row)
        ratio = f"**{median(ratios):.2f}**"
        between = spread(ratios)
        by_cpu = f"{median(table.cpu_ratios(ours, row)):.2f}"
    own = [COLUMNS[name](row) for name in columns]
    return [row.peer.name, f"{row.rate:,.0f}", ratio, between, by_cpu, *own]


def comparison_grid(table: Table, columns: Sequence[str] = tuple(COLUMNS)) -> Grid:
    """One workload."""
    ratios = ("requests/s", "ours / it", "worst to best round", "by CPU time")
    return Grid(
        table.workload.title,
        ("server", *ratios, *columns),
        [cells(table, row, columns) for row in table.rows],
    )


def memory_grid(footprints: Sequence[Footprint]) -> Grid:
    """Memory per idle connection."""
    ours = next((f for f in footprints if f.peer is OURS and f.failure is None), None)
    rows = []
    for taken in footprints:
        if taken.failure is not None:
            rows.append([taken.peer.name, taken.failure, "", ""])
            continue
        ratio = f"**{ours.usual / taken.usual:.2f}**" if ours and taken is not ours else ""
        before = median(taken.before)
        rows.append(
            [taken.peer.name, f"{taken.usual / 1000:.1f}", ratio, f"{before / 1e6:.0f}"]
        )
    return Grid(
        f"Memory per idle connection, of {CONNECTIONS:,}",
        ("server", "kB each", "ours / it", "MB without any"),
        rows,
    )


def growth_grid(growths: Sequence[Growth], question: Question) -> Grid:
    """One question, a server in each line."""
    counts = COUNTS[question]
    rows = []
    for growth in growths:
        if growth.question != question:
            continue
        if growth.failure is not None:
            rows.append([growth.peer.name, growth.failure, *[""] * (len(counts) * 2 - 2)])
            continue
        first, *more = counts
        rows.append(
            [
                growth.peer.name,
                f"{growth.rows[first].rate:,.0f}",
                *(
                    f"{growth.rows[count].rate:,.0f} (**{growth.relative(count):.2f}**)"
                    for count in more
                ),
                *(f"{growth.relative(count, by_cpu=True):.2f}" for count in more),
            ]
        )
    columns = [f"{count:,}" for count in counts]
    by_cpu = [f"{count:,} by CPU time" for count in counts[1:]]
    return Grid(QUESTIONS[question], ("server", *columns, *by_cpu), rows)


def goals_grid(results: Results) -> Grid:
    """What is wanted, what was measured, and whether that is enough."""
    rows = []
    tables = {table.workload.name: table for table in results.tables}
    for goal in GOALS:
        table = tables.get(goal.workload)
        ours = our_row(table) if table else None
        theirs = [row for row in table.rows if row.peer.name == goal.peer] if table else []
        if table is None or ours is None or not theirs or theirs[0].failure is not None:
            continue
        ratios = table.ratios(ours, theirs[0])
        reached = median(ratios) >= goal.at_least
        rows.append(
            [
                WORKLOADS[goal.workload].brief,
                goal.peer,
                f"{goal.at_least:.2f}",
                f"**{median(ratios):.2f}**",
                spread(ratios),
                "yes" if reached else "no",
            ]
        )
    taken = {f.peer.name: f.usual for f in results.footprints if f.failure is None}
    if OURS.name in taken and MEMORY_PEER in taken:
        ratio = taken[OURS.name] / taken[MEMORY_PEER]
        rows.append(
            [
                "memory per idle connection",
                MEMORY_PEER,
                f"at most {MEMORY_GOAL:.2f}",
                f"**{ratio:.2f}**",
                "",
                "yes" if ratio <= MEMORY_GOAL else "no",
            ]
        )
    columns = (
        "workload",
        "against",
        "wanted",
        "measured",
        "worst to best round",
        "reached",
    )
    return Grid("Goals", columns, rows)


def grids(results: Results) -> list[Grid]:
    """All tables of a run."""
    found = [comparison_grid(table) for table in results.tables]
    if results.footprints:
        found.append(memory_grid(results.footprints))
    asked = {growth.question for growth in results.growths}
    found += [growth_grid(results.growths, name) for name in QUESTIONS if name in asked]
    goals = goals_grid(results)
    return [*found, goals] if goals.rows else found


def markdown(results: Results) -> str:
    """All tables, and what they were measured on."""
    lines = [", ".join(f"{name} {value}" for name, value in results.machine.items()), ""]
    for grid in grids(results):
        lines += [f"### {grid.title}", ""]
        lines.append(f"| {' | '.join(grid.columns)} |")
        lines.append("|---|" + "---:|" * (len(grid.columns) - 1))
        lines += [f"| {' | '.join(row)} |" for row in grid.rows]
        lines.append("")
    return "\n".join(lines)
