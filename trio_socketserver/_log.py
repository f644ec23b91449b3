"""The package's log, which never breaks what it reports on.

Logging calls code of the user's: filters, handlers, formatters. What that raises must not
take the place of a cancellation, or stop a server that is only short of descriptors.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Final

from ._exceptions import is_peer_fault

logger: Final = logging.getLogger("trio_socketserver")


def log(level: int, message: str, *args: object, error: Exception | None = None) -> None:
    """Log a message, with the traceback of *error* if there is one."""
    with contextlib.suppress(Exception):
        logger.log(level, message, *args, exc_info=error)


def log_error(error: Exception, what: str, *args: object) -> None:
    """Log an error: a traceback for our fault, one quiet line for the peer's."""
    if is_peer_fault(error):
        log(logging.INFO, f"{what}: %s: %s", *args, type(error).__name__, error)
    else:
        log(logging.ERROR, what, *args, error=error)
