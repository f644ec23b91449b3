"""The command's log: colours for a person at a terminal, and for nobody else."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest
from helpers import REAL_LIMIT

import trio_socketserver
from trio_socketserver._cli_log import ColourFormatter, configure_logging, wants_colour

HANDLER = """
import logging
from trio_socketserver import StreamRequestHandler

async def handler(request, client_address, server):
    logging.getLogger("handler").warning("careful")
    await server.shutdown()
"""

SETTINGS = ("NO_COLOR", "FORCE_COLOR", "TERM")


@pytest.fixture
def terminal() -> Iterator[tuple[int, TextIO]]:
    """A pseudo-terminal: the descriptor that shows it, and the file to write to."""
    shows, written = os.openpty()
    with os.fdopen(shows, "rb", buffering=0), os.fdopen(written, "w") as file:
        yield shows, file


@pytest.mark.parametrize(
    ("environ", "of_terminal", "of_pipe"),
    [
        ({}, True, False),
        ({"TERM": "xterm"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": "0"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": ""}, True, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": ""}, True, True),
    ],
)
def test_who_wants_colour(terminal, monkeypatch, environ, of_terminal, of_pipe):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(terminal[1]) is of_terminal
    assert wants_colour(io.StringIO()) is of_pipe


def shown_on(shows: int) -> str:
    """Return what has been written to a terminal whose writers are gone."""
    found = b""
    while True:
        try:
            data = os.read(shows, 4096)
        except OSError:  # EIO, as Linux says that there is no writer any more.
            data = b""
        if not data:
            return found.decode().replace("\r\n", "\n")
        found += data


TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, rf"\x1b\[2m{TIME}\x1b\[0m \x1b\[33mWARNING\x1b\[0m careful\n"),
        ({"NO_COLOR": "1"}, rf"{TIME} WARNING careful\n"),
        ({"TERM": "dumb"}, rf"{TIME} WARNING careful\n"),
    ],
)
def test_the_command_at_a_terminal(terminal, tmp_path, environ, expected):
    (tmp_path / "handlers.py").write_text(HANDLER)
    shows, written = terminal
    code = (
        "import sys, socket, threading; from trio_socketserver._cli import main; "
        "listener = socket.create_server(('127.0.0.1', 0)); "
        "client = socket.create_connection(listener.getsockname()); "
        "sys.exit(main([f'--fd={listener.detach()}', 'handlers:handler']))"
    )
    kept = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    package = str(Path(trio_socketserver.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=kept | {"TERM": "xterm", "PYTHONPATH": package} | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=written,
        timeout=REAL_LIMIT,
        check=True,
    )
    written.close()
    assert re.fullmatch(expected, shown_on(shows))
    # What it prints is for programs, too.
    assert b"\x1b" not in done.stdout
    assert done.stdout.endswith(b"\naccepted 1, completed 1\n")


@pytest.mark.parametrize("colour", [False, True])
def test_how_logging_is_configured(terminal, monkeypatch, colour):
    shows, written = terminal
    monkeypatch.setenv("NO_COLOR", "" if colour else "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", written)
    root = logging.RootLogger(logging.NOTSET)
    monkeypatch.setattr(logging, "root", root)
    configure_logging(logging.ERROR)
    root.warning("careful")
    root.error("too late")
    configure_logging(logging.INFO)  # As where the user's module has done it.
    root.warning("careful")
    monkeypatch.undo()
    written.close()
    level = r"\x1b\[1;31mERROR\x1b\[0m" if colour else "ERROR"
    time = rf"\x1b\[2m{TIME}\x1b\[0m" if colour else TIME
    assert re.fullmatch(f"{time} {level} too late\n", shown_on(shows))


@pytest.mark.parametrize(
    ("level", "colour"),
    [
        (logging.CRITICAL, "1;31"),
        (logging.ERROR, "1;31"),
        (logging.ERROR - 1, "33"),
        (logging.WARNING, "33"),
        (logging.INFO, "36"),
        (1, "36"),
    ],
)
def test_only_the_level_is_coloured(level, colour):
    record: Any = logging.LogRecord("x", level, "", 0, "what %s", ("it is",), None)
    formatter = ColourFormatter("%(levelname)s %(message)s")
    name = logging.getLevelName(level)
    assert formatter.format(record) == f"\x1b[{colour}m{name}\x1b[0m what it is"
    assert record.levelname == name
    record.args = ()
    record.msg = "%(unknown"
    assert formatter.format(record).endswith("m %(unknown")
