"""The tables and the picture of the documentation: ``--write docs``.

The page itself is written by hand. What comes from a run is in files of its own, which it
includes, so that a new run changes numbers and no prose.

The picture is drawn here and not by a plotting library, because it has to follow the
colours of the page, light or dark, and be read on a phone: bars and words in SVG, in one
column, in the colour of the text around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from tests.benchmarks.comparison import Row, Table
from tests.benchmarks.report import (
    Grid,
    comparison_grid,
    goals_grid,
    growth_grid,
    memory_grid,
    our_row,
)
from tests.benchmarks.results import Results
from tests.benchmarks.scaling import QUESTIONS
from tests.benchmarks.servers import OURS

COLUMNS = ("p50 µs", "p90 µs", "p99 µs", "CPU µs each", "peak MB")
"""Of a server by itself; the rest is for whoever runs the benchmark."""

PICTURED = ("short", "pingpong", "bulk", "udp")

WIDTH, LINE, BAR, TITLE = 400, 18, 12, 34
"""The picture's width, and the heights of a line, of the bar in it, and of a title: in
pixels where the page is wide, less on a phone."""

NAMES, NUMBERS = 180, 104
"""Of the width: what is kept for names at the left, and for numbers at the right."""

NO_BREAK = "\N{NO-BREAK SPACE}"

STYLE = (
    ".performance { max-width: 34rem; width: 100%; height: auto; color: #1b1b1b }"
    "@media (prefers-color-scheme: dark) { .performance { color: #dddddd } }"
    "body .performance { color: inherit }"
    ".performance text { fill: currentColor; font: 11px sans-serif }"
    ".performance .title { font-weight: bold; font-size: 12px }"
    ".performance .name { text-anchor: end }"
    ".performance rect { fill: currentColor; fill-opacity: 0.3 }"
    ".performance .ours { font-weight: bold }"
    ".performance rect.ours { fill: #2a8bd4; fill-opacity: 1 }"
)
"""In a page, the colour is the page's; a picture by itself asks the reader's system."""


def text(kind: str, x: float, y: float, content: str) -> str:
    """Words at a place."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(content)}</text>'


def bar(kind: str, top: float, length: float) -> str:
    """A bar, from where the names end."""
    return (
        f'<rect class="{kind}" x="{NAMES}" y="{top:.1f}" width="{length:.1f}" '
        f'height="{BAR}"/>'
    )


def panel(table: Table, top: float) -> tuple[str, float]:
    """Draw one workload; return that, and where it ends."""
    measured = [row for row in table.rows if row.failure is None]
    most = max(row.rate for row in measured)
    ours = our_row(table)
    parts = [text("title", 0, top + TITLE - 14, f"{table.workload.brief}, per second")]
    top += TITLE
    for row in sorted(measured, key=lambda row: -row.rate):
        length = row.rate / most * (WIDTH - NAMES - NUMBERS)
        kind = " ours" if row.peer is OURS else ""
        base = top + BAR - 2
        number = f"{row.rate:,.0f}{times(table, ours, row)}"
        parts += [
            text(f"name{kind}", NAMES - 6, base, row.peer.name),
            bar(f"bar{kind}", top, length),
            text(f"number{kind}", NAMES + length + 5, base, number),
        ]
        top += LINE
    return "".join(parts), top


def times(table: Table, ours: Row | None, row: Row) -> str:
    """What ours is, in times of a row."""
    if ours is None or row is ours:
        return ""
    return f" ({median(table.ratios(ours, row)):.2f} \N{MULTIPLICATION SIGN})"


def draw(tables: Sequence[Table]) -> str:
    """Draw the workloads below each other, as SVG."""
    panels, bottom = [], 0.0
    for table in tables:
        drawn, bottom = panel(table, bottom)
        panels.append(drawn)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="performance" role="img" '
        f'viewBox="0 0 {WIDTH} {bottom:.0f}" aria-label="Requests per second of each '
        f'server; the tables below say the same"><style>{STYLE}</style>'
        f"{''.join(panels)}</svg>\n"
    )


def list_table(grid: Grid) -> str:
    """A table in reStructuredText."""
    lines = [
        f".. list-table:: {grid.title}",
        "   :header-rows: 1",
        "",
    ]
    for row in [grid.columns, *grid.rows]:
        for number, cell in enumerate(row):
            kept_whole = cell.replace(" to ", f"{NO_BREAK}to{NO_BREAK}")
            lines.append(f"   {'*' if number == 0 else ' '} - {kept_whole}".rstrip())
    return "\n".join([*lines, "", ""])


def about(results: Results) -> str:
    """One paragraph: where and how it was measured."""
    versions = ", ".join(f"{name} {value}" for name, value in results.machine.items())
    return (
        f"Measured on: {versions}.\n"
        f"Each server was measured {results.rounds} times, "
        f"{results.seconds:g} s each time.\n"
    )


def write_page(results: Results, docs: Path) -> None:
    """Write the files that ``docs/performance.rst`` includes."""
    folder = docs / "performance"
    folder.mkdir(exist_ok=True)
    files = {
        "about": about(results),
        "goals": list_table(goals_grid(results)),
        "comparison": "".join(
            list_table(comparison_grid(table, COLUMNS)) for table in results.tables
        ),
        "memory": list_table(memory_grid(results.footprints)),
        "scaling": "".join(
            list_table(growth_grid(results.growths, question)) for question in QUESTIONS
        ),
    }
    for name, text in files.items():
        (folder / f"{name}.inc").write_text(text)
    pictured = [table for table in results.tables if table.workload.name in PICTURED]
    (docs / "_static" / "performance.svg").write_text(draw(pictured))
