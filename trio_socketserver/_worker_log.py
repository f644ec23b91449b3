"""What workers log, logged where the program has configured that it is.

A worker is a fresh interpreter, where nothing is configured. So its root logger has a
handler that sends every record to the server's process, as JSON: plain values and text, and
nothing that could be executed there. The loggers have the levels that they have there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
from collections.abc import Callable
from typing import Any, Final

TEXT_LIMIT: Final = 20_000
"""Characters of a message or another value; of a longer one, the middle is left out."""

RECORD_LIMIT: Final = 100_000
"""Bytes of a record; of a longer one, what users have added is left out."""

NAME_LIMIT: Final = 200
"""Characters, there, of everything but the message."""

PLAIN: Final = frozenset({int, bool, float, type(None)})
"""The types whose values are the same in the server. All else is text."""

_EVERY_RECORD_HAS: Final = frozenset(vars(logging.makeLogRecord({})))


def shortened(text: str, limit: int = TEXT_LIMIT) -> str:
    """Leave out the middle of a text that is too long."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} [...] {text[-limit // 2 :]}"


def _plain(value: object) -> object:
    if type(value) in PLAIN:
        return value
    return shortened(value if type(value) is str else repr(value))


class _LogToServer(logging.handlers.QueueHandler):
    """Send records, of which the base class makes one text each before."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        super().__init__(None)  # type: ignore[arg-type]
        self._send = send

    def enqueue(self, record: logging.LogRecord) -> None:
        values = {name: _plain(value) for name, value in vars(record).items()}
        values.pop("message", None)  # Again what is in "msg".
        data = _to_bytes(values)
        if len(data) > RECORD_LIMIT:
            data = _to_bytes(_cut_down(values))
        self._send(data)


def _cut_down(values: dict[str, object]) -> dict[str, object]:
    """Return what is in every record, and no long text but the message."""
    return {
        name: shortened(value, NAME_LIMIT)
        if isinstance(value, str) and name != "msg"
        else value
        for name, value in values.items()
        if name in _EVERY_RECORD_HAS
    }


def _to_bytes(values: dict[str, object]) -> bytes:
    return json.dumps(values, ensure_ascii=False).encode(errors="backslashreplace")


def levels() -> dict[str | None, int]:
    """Return the levels that loggers have here, for a worker to have the same."""
    found: dict[str | None, int] = {
        name: logger.level
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
    }
    return found | {None: logging.root.level}


def log_to_server(send: Callable[[bytes], object], levels: dict[str | None, int]) -> None:
    """Send what is logged, unless what has been imported has configured logging."""
    if not logging.root.handlers:
        logging.root.addHandler(_LogToServer(send))
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def log_for_worker(content: bytes) -> None:
    """Log what a worker has sent.

    Raises:
        ValueError: it makes no sense.
    """
    values: Any = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("not a record")  # noqa: TRY004 (as of what json finds)
    record = logging.makeLogRecord(values | {"args": None, "exc_info": None})
    with contextlib.suppress(Exception):  # Filters and handlers are the user's.
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
