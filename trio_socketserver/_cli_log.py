"""The command's log: on stderr, coloured where a person looks at it.

Whether that is so is decided much as CPython decides it for its tracebacks: ``NO_COLOR``
and ``FORCE_COLOR`` count when they are set and not empty (https://no-color.org), then
``TERM=dumb``, then whether it is a terminal.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Final, TextIO

FAINT: Final = "\x1b[2m"
RESET: Final = "\x1b[0m"

LEVEL_COLOURS: Final = (
    (logging.ERROR, "\x1b[1;31m"),  # bold red
    (logging.WARNING, "\x1b[33m"),  # yellow
    (logging.NOTSET, "\x1b[36m"),  # cyan
)
"""The escape sequence for each level, and for those between it and the one above."""


def wants_colour(stream: TextIO) -> bool:
    """Tell whether what is written to *stream* is to be coloured."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and stream.isatty()


class ColourFormatter(logging.Formatter):
    """Colour the level of a record, and make its time faint."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Write down when it was."""
        return f"{FAINT}{super().formatTime(record, datefmt)}{RESET}"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Write down a record, without its traceback."""
        plain = record.levelname
        colour = next(c for level, c in LEVEL_COLOURS if record.levelno >= level)
        record.levelname = f"{colour}{plain}{RESET}"
        try:
            return super().formatMessage(record)
        finally:
            record.levelname = plain  # Others may handle the record too.


def configure_logging(level: int) -> None:
    """Log to stderr, unless the user's module has configured logging."""
    handler = logging.StreamHandler()
    formatter = logging.Formatter
    if sys.stderr is not None and wants_colour(sys.stderr):
        formatter = ColourFormatter
    handler.setFormatter(formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
