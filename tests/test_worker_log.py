"""What workers log, on its way to the program's log."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from prefork_clients import Log, logging_to
from prefork_servers import OnlyThere, OnlyTherePlain

from trio_socketserver._worker_log import (
    RECORD_LIMIT,
    TEXT_LIMIT,
    levels,
    log_for_worker,
    log_to_server,
    shortened,
)


@contextlib.contextmanager
def fresh_root() -> Iterator[logging.Logger]:
    """Have a root logger as a fresh process has it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        yield root
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    with logging_to(log):
        yield log


def record(message: str, *arguments: Any, **extra: Any) -> logging.LogRecord:
    made = logging.makeLogRecord(
        {"name": "prefork.link", "levelno": logging.WARNING, "levelname": "WARNING"}
    )
    made.msg, made.args = message, arguments
    vars(made).update(extra)
    return made


def sent(made: logging.LogRecord) -> bytes:
    """Return what goes to the server when a worker logs *made*."""
    contents: list[bytes] = []
    with fresh_root() as root:
        log_to_server(contents.append, {})
        root.handle(made)
    [content] = contents
    return content


def test_a_record_arrives(log: Log) -> None:
    try:
        raise LookupError("oh")
    except LookupError as error:
        made = record("%s and %r", threading, os, n=5)
        made.exc_info = (LookupError, error, error.__traceback__)
    log_for_worker(sent(made))
    [arrived] = log.records
    assert arrived.getMessage().startswith(f"{threading} and {os!r}")
    assert "LookupError: oh" in log.format(arrived)
    assert arrived.n == 5  # type: ignore[attr-defined]
    assert arrived.name == "prefork.link"


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), OnlyThere(), OnlyTherePlain(3), lambda: None],
    ids=["lock", "object", "number", "function"],
)
def test_what_does_not_travel_holds_no_record_up(
    log: Log, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = sent(record("one", value=value, n=5))
    monkeypatch.setattr(os, "getpid", lambda: 0)  # As if elsewhere.
    log_for_worker(content)
    [arrived] = log.records
    assert arrived.getMessage() == "one"
    assert arrived.n == 5  # type: ignore[attr-defined]


def test_the_middle_of_a_long_message_is_left_out(log: Log) -> None:
    log_for_worker(sent(record("A" + "\N{SNOWMAN}" * TEXT_LIMIT + "Z")))
    [line] = log.lines
    assert line.startswith("A\N{SNOWMAN}")
    assert line.endswith("\N{SNOWMAN}Z")
    assert " [...] " in line
    assert shortened("x" * TEXT_LIMIT) == "x" * TEXT_LIMIT


def test_of_a_long_record_what_users_have_added_is_left_out(log: Log) -> None:
    extra = {f"name{n}": "x" * TEXT_LIMIT for n in range(RECORD_LIMIT // TEXT_LIMIT)}
    content = sent(record("one", **extra))
    assert len(content) <= RECORD_LIMIT
    log_for_worker(content)
    [arrived] = log.records
    assert arrived.getMessage() == "one"
    assert not hasattr(arrived, "name0")


def test_text_of_any_kind_arrives(log: Log) -> None:
    log_for_worker(sent(record('\udc80\N{SNOWMAN}\x00"')))
    assert log.lines == ['\udc80\N{SNOWMAN}\x00"']


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"nonsense", "Expecting value"), (b"[]", "not a record"), (b"\xff", "decode")],
)
def test_nonsense_is_refused(content: bytes, words: str, log: Log) -> None:
    with pytest.raises(ValueError, match=words):
        log_for_worker(content)
    assert log.records == []


def test_a_record_that_makes_no_sense_harms_nobody(log: Log) -> None:
    log_for_worker(b'{"name": 5, "levelno": "high"}')
    assert log.records == []


def test_levels_of_the_program_hold(log: Log) -> None:
    content = sent(record("one"))
    logger = logging.getLogger("prefork.link")
    logger.setLevel(logging.ERROR)
    try:
        log_for_worker(content)
        assert log.records == []
    finally:
        logger.setLevel(logging.NOTSET)
    log_for_worker(content)
    assert log.lines == ["one"]


def test_a_handler_of_the_programs_that_fails_harms_nobody() -> None:
    class Bad(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            calls.append(record)
            raise LookupError

    calls: list[logging.LogRecord] = []
    logger = logging.getLogger("prefork.link")
    logger.addHandler(bad := Bad())
    try:
        log_for_worker(sent(record("one")))
    finally:
        logger.removeHandler(bad)
    assert len(calls) == 1


def test_a_fresh_process_logs_to_the_server() -> None:
    loud = logging.getLogger("prefork.loud")
    silent = logging.getLogger("prefork.silent")
    contents: list[bytes] = []
    with fresh_root() as root:
        loud.setLevel(logging.DEBUG)
        found = levels()
        assert found[None] == root.level
        assert found["prefork.loud"] == logging.DEBUG
        assert "prefork.silent" not in found
        loud.setLevel(logging.NOTSET)

        log_to_server(contents.append, found | {None: logging.ERROR})
        assert root.level == logging.ERROR
        loud.debug("one")
        silent.warning("not this")
        loud.setLevel(logging.NOTSET)
    [content] = contents
    assert json.loads(content)["msg"] == "one"


def test_a_process_that_has_configured_logging_is_left_alone() -> None:
    with fresh_root() as root:
        root.addHandler(own := logging.NullHandler())
        level = root.level
        log_to_server(bytes.decode, {None: logging.DEBUG})
        assert root.handlers == [own]
        assert root.level == level
