"""Where a handler is, in the terms of who wrote it.

The place is the innermost line of theirs on which something is awaited, and then those that
led there. Lines of this package, and of trio, are shown where there are no others.
"""

from __future__ import annotations

import linecache
import types
from collections.abc import Iterable
from typing import Final

import trio

LIBRARIES: Final = ("trio", "outcome", "contextlib")
"""Packages that are shown only where a task of the handler's is all theirs."""

Frames = Iterable[tuple[types.FrameType, int]]


def _package_of(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def chain_of(frames: Frames) -> list[str]:
    """Describe the lines that await one another, innermost first.

    Args:
        frames: frames and their lines, outermost first.
    """
    found = list(frames)
    ours = [(f, line) for f, line in found if _package_of(f) not in LIBRARIES]
    users = [(f, line) for f, line in ours if _package_of(f) != "trio_socketserver"]
    return [_described(*each) for each in reversed(users or ours[-1:] or found[:1])]


def _described(frame: types.FrameType, line: int) -> str:
    code = frame.f_code
    text = linecache.getline(code.co_filename, line, frame.f_globals).strip()
    quoted = f": {text}" if text else ""
    return f"{code.co_filename}:{line}, in {code.co_qualname}{quoted}"


def place_of(task: trio.lowlevel.Task) -> str:
    """Say where a waiting task is: one line for each call, innermost first."""
    return "\n    awaited at ".join(chain_of(task.iter_await_frames()))


def is_shielded_checkpoint(task: trio.lowlevel.Task) -> bool:
    """Tell whether a waiting task only lets others run, whatever is cancelled."""
    return any(
        frame.f_code.co_name == trio.lowlevel.cancel_shielded_checkpoint.__name__
        for frame, _ in task.iter_await_frames()
    )
