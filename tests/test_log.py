"""What the log says of an error, and that logging never breaks what it reports on."""

from __future__ import annotations

import logging

import pytest

from trio_socketserver._exceptions import ConnectionBroken, IncompleteRead
from trio_socketserver._log import LINE_LIMIT, log, log_error


def test_our_fault_comes_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("ours")
    log_error(error, "serving %r", "somebody")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.getMessage() == "serving 'somebody'"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_the_peers_fault_is_one_line_even_in_groups(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    inner = ExceptionGroup("inner", [IncompleteRead("short", b"")])
    log_error(ExceptionGroup("outer", [ConnectionBroken("reset"), inner]), "serving")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.exc_info is None
    assert record.getMessage() == (
        "serving: ConnectionBroken: reset; IncompleteRead: short"
    )


def test_a_peer_cannot_make_the_line_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log_error(ConnectionBroken("many\nlines " * 1000), "serving")
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    assert len(record.getMessage()) <= LINE_LIMIT + len("serving: ")


def test_logging_that_raises_is_nobodys_business() -> None:
    def refuse(record: logging.LogRecord) -> bool:
        refused.append(record)
        raise RuntimeError

    refused: list[logging.LogRecord] = []
    logger = logging.getLogger("trio_socketserver")
    logger.addFilter(refuse)
    try:
        log(logging.ERROR, "text")
    finally:
        logger.removeFilter(refuse)
    assert len(refused) == 1
