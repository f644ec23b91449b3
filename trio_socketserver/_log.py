"""The package's log, which never breaks what it reports on.

Logging calls code of the user's: filters, handlers, formatters. What that raises must not
take the place of a cancellation, or stop a server that is only short of descriptors.
"""

from __future__ import annotations

import contextlib
import logging
import textwrap
from collections.abc import Iterator
from typing import Final

from ._exceptions import is_peer_fault

LINE_LIMIT: Final = 200
"""Characters of a peer's error that are logged; it may be as long as the peer likes."""

logger: Final = logging.getLogger("trio_socketserver")


def log(level: int, message: str, *args: object, error: Exception | None = None) -> None:
    """Log a message, with the traceback of *error* if there is one."""
    with contextlib.suppress(Exception):
        logger.log(level, message, *args, exc_info=error)


def log_error(error: Exception, what: str, *args: object) -> None:
    """Log an error: a traceback for our fault, one quiet line for the peer's."""
    if is_peer_fault(error):
        text = "; ".join(_descriptions(error))
        log(logging.INFO, f"{what}: %s", *args, textwrap.shorten(text, LINE_LIMIT))
    else:
        log(logging.ERROR, what, *args, error=error)


def _descriptions(error: BaseException) -> Iterator[str]:
    """Describe an error; of a group, each of its leaves."""
    if isinstance(error, BaseExceptionGroup):
        for leaf in error.exceptions:
            yield from _descriptions(leaf)
    else:
        try:
            text = str(error)
        except Exception:  # A class of the user's.
            text = "<it cannot be shown>"
        yield f"{type(error).__name__}: {text}"
