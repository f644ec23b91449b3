"""The states of a serving loop, from the package's own table, as a picture and a table.

The picture is an SVG element, so it needs no program and follows the page's colours. What
is in it comes from `trio_socketserver._lifecycle.TRANSITIONS`; only where things stand is
chosen here, once for a desk and once for a phone. A state without a place, or an event
without a caption, fails the build.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

from trio_socketserver._lifecycle import TRANSITIONS, LoopEvent, LoopState

Table = Mapping[tuple[LoopState, LoopEvent], LoopState]
Arrows = Mapping[tuple[LoopState, LoopState], list[LoopEvent]]

HEIGHT = 58
"""Of a state's box."""

Route = tuple[float, float, float]
"""How far an arrow bends to its left, as a part of its length, and where its caption stands
from its middle: so much to the right, so much down."""


class Layout(NamedTuple):
    """Where things stand.

    Attributes:
        name: the class of the SVG element, by which the style sheet chooses one.
        size: of the picture.
        width: of a state's box.
        places: the middles of the boxes.
        routes: the arrows that are not as `straight` has it.
        straight: all others.
    """

    name: str
    size: tuple[int, int]
    width: int
    places: Mapping[LoopState, tuple[float, float]]
    routes: Mapping[tuple[LoopState, LoopState], Route]
    straight: Route


WIDE = Layout(
    name="wide",
    size=(840, 350),
    width=172,
    places={
        LoopState.FRESH: (100, 150),
        LoopState.STOP_REMEMBERED: (100, 310),
        LoopState.RUNNING: (420, 150),
        LoopState.STOPPING: (420, 310),
        LoopState.STOPPED: (740, 150),
    },
    routes={
        (LoopState.FRESH, LoopState.STOP_REMEMBERED): (0.25, 42, 0),
        (LoopState.STOP_REMEMBERED, LoopState.FRESH): (0.25, -26, 0),
        (LoopState.RUNNING, LoopState.STOPPING): (0.0, 46, 0),
        (LoopState.RUNNING, LoopState.STOPPED): (0.2, 0, -12),
        (LoopState.STOPPED, LoopState.RUNNING): (0.2, 0, 20),
        (LoopState.STOPPED, LoopState.FRESH): (-0.33, 0, -12),
        (LoopState.STOPPING, LoopState.STOPPED): (-0.4, 54, 8),
    },
    straight=(0.0, 0, -18),
)

TALL = Layout(
    name="tall",
    size=(420, 515),
    width=142,
    places={
        LoopState.FRESH: (115, 55),
        LoopState.STOP_REMEMBERED: (345, 55),
        LoopState.RUNNING: (115, 250),
        LoopState.STOPPING: (345, 250),
        LoopState.STOPPED: (262, 475),
    },
    routes={
        (LoopState.FRESH, LoopState.STOP_REMEMBERED): (0.2, 0, -12),
        (LoopState.STOP_REMEMBERED, LoopState.FRESH): (0.2, 0, 14),
        (LoopState.STOP_REMEMBERED, LoopState.STOPPING): (0.0, -54, 12),
        (LoopState.RUNNING, LoopState.STOPPING): (0.0, 0, -12),
        (LoopState.RUNNING, LoopState.STOPPED): (0.1, 50, -8),
        (LoopState.STOPPED, LoopState.RUNNING): (0.1, -66, -14),
        (LoopState.STOPPED, LoopState.FRESH): (0.68, 24, -4),
        (LoopState.STOPPING, LoopState.STOPPED): (0.0, 52, 12),
    },
    straight=(0.0, 54, 12),
)

LAYOUTS = (WIDE, TALL)

TIP = 8
"""The length of an arrow's tip."""

CAPTIONS = {
    LoopEvent.ENTER: ["enter"],
    LoopEvent.BEGIN: ["serve_forever()", "handle_request()"],
    LoopEvent.STOP: ["shutdown()"],
    LoopEvent.END: ["the loop ends"],
    LoopEvent.LEAVE: ["leave"],
}


def arrows(table: Table) -> Arrows:
    """Return the events that lead from one state to another, by the two states."""
    found: dict[tuple[LoopState, LoopState], list[LoopEvent]] = {}
    for (state, event), target in table.items():
        found.setdefault((state, target), []).append(event)
    return found


def border(
    width: float, place: tuple[float, float], towards: tuple[float, float]
) -> tuple[float, float]:
    """Return where the line from the middle of a box towards a point leaves the box."""
    dx, dy = towards[0] - place[0], towards[1] - place[1]
    scale = min(
        (width / 2 + 4) / abs(dx) if dx else math.inf,
        (HEIGHT / 2 + 4) / abs(dy) if dy else math.inf,
    )
    return place[0] + dx * scale, place[1] + dy * scale


def text(x: float, y: float, lines: list[str], kind: str) -> str:
    """Draw centred lines of text around a point."""
    top = y - 7.5 * (len(lines) - 1) + 4
    return "".join(
        f'<text class="{kind}" x="{x:.0f}" y="{top + 15 * row:.0f}">{escape(line)}</text>'
        for row, line in enumerate(lines)
    )


def draw_arrow(
    layout: Layout, source: LoopState, target: LoopState, events: list[LoopEvent]
) -> str:
    """Draw one arrow, a quadratic curve, and its caption."""
    (x1, y1), (x2, y2) = layout.places[source], layout.places[target]
    bend, right, down = layout.routes.get((source, target), layout.straight)
    control = (x1 + x2) / 2 + (y2 - y1) * bend, (y1 + y2) / 2 - (x2 - x1) * bend
    start = border(layout.width, (x1, y1), control)
    end = border(layout.width, (x2, y2), control)
    middle = [(a + 2 * c + b) / 4 for a, c, b in zip(start, control, end, strict=True)]
    angle = math.atan2(end[1] - control[1], end[0] - control[0])
    tip = " ".join(
        f"{end[0] - TIP * math.cos(angle + side):.1f},"
        f"{end[1] - TIP * math.sin(angle + side):.1f}"
        for side in (0.4, -0.4)
    )
    curve = " ".join(f"{x:.1f},{y:.1f}" for x, y in (control, end))
    return (
        f'<path d="M{start[0]:.1f},{start[1]:.1f} Q{curve}"/>'
        f'<polygon points="{end[0]:.1f},{end[1]:.1f} {tip}"/>'
        + text(
            middle[0] + right,
            middle[1] + down,
            [line for event in events for line in CAPTIONS[event]],
            "event",
        )
    )


def draw(table: Table = TRANSITIONS, layout: Layout = WIDE) -> str:
    """Return the picture of *table*, as an SVG element."""
    parts = []
    width = layout.width
    between = arrows(table)
    for (source, target), events in between.items():
        if source is not target:
            parts.append(draw_arrow(layout, source, target, events))
    for state in LoopState:
        x, y = layout.places[state]
        parts.append(
            f'<rect x="{x - width / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{width}" '
            f'height="{HEIGHT}" rx="9"/>'
        )
        stays = [CAPTIONS[event][0] for event in between.get((state, state), [])]
        parts.append(text(x, y - (9 if stays else 0), [state.name], "state"))
        if stays:
            parts.append(text(x, y + 13, ["↻ " + ", ".join(stays)], "stays"))
    size = "{} {}".format(*layout.size)
    return (
        f'<svg class="loop {layout.name}" viewBox="0 0 {size}" role="img" '
        'aria-label="The states of a serving loop; the table below says the same">'
        + "".join(parts)
        + "</svg>"
    )


def tabulate(table: Table = TRANSITIONS) -> list[str]:
    """Return *table* in reStructuredText: a row per state, a column per event."""
    lines = [".. list-table::", "   :header-rows: 1", "   :class: loop-states", ""]
    rows = [["state", *(event.value for event in LoopEvent)]]
    for state in LoopState:
        targets = (table.get((state, event)) for event in LoopEvent)
        cells = ["error" if target is None else target.name for target in targets]
        rows.append([f"**{state.name}**: {state.value}", *cells])
    for first, *rest in rows:
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in rest)]
    return lines
