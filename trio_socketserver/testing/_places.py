"""Where a handler is, in the terms of who wrote it.

The place is the innermost line of theirs on which something is awaited; the lines that led
there follow. Frames of trio and of this package say little to them, and are left out unless
there are no others.
"""

from __future__ import annotations

import linecache
import types
from collections.abc import Iterable
from typing import Final

import trio

LIBRARIES: Final = ("trio", "outcome", "contextlib")
"""Packages whose frames are never shown."""

Frames = Iterable[tuple[types.FrameType, int]]


def _package_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def chain_of(frames: Frames) -> list[str]:
    """Describe the lines that await one another, innermost first; at least none.

    Args:
        frames: frames and their lines, outermost first.
    """
    shown = [(f, line) for f, line in frames if _package_of(f) not in LIBRARIES]
    theirs = [(f, line) for f, line in shown if _package_of(f) != "trio_socketserver"]
    return [_described(*place) for place in reversed(theirs or shown[-1:])]


def _described(frame: types.FrameType, line: int) -> str:
    code = frame.f_code
    text = linecache.getline(code.co_filename, line, frame.f_globals).strip()
    quoted = f": {text}" if text else ""
    return f"{code.co_filename}:{line}, in {code.co_qualname}{quoted}"


def place_of(task: trio.lowlevel.Task) -> str:
    """Say where a waiting task is: one line for each call, innermost first."""
    chain = chain_of(task.iter_await_frames()) or [f"its task {task.name}"]
    return "\n    awaited at ".join(chain)


def is_shielded_checkpoint(task: trio.lowlevel.Task) -> bool:
    """Tell whether a waiting task only lets others run, whatever is cancelled."""
    return any(
        frame.f_code.co_name == trio.lowlevel.cancel_shielded_checkpoint.__name__
        for frame, _ in task.iter_await_frames()
    )
