"""The plugin for who hunts a test that fails now and then works, and brings no faults."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import REAL_LIMIT
from late import connected_late

ROOT = Path(__file__).parents[1]


def test_who_learns_late_that_it_is_connected_may_have_been_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:

        def connect(sock: socket.socket, address: Any) -> None:
            sock.connect(address)
            listener.close()

        with pytest.raises(ConnectionResetError):
            connected_late(connect)(client, listener.getsockname())


def test_good_tests_pass() -> None:
    # In a program of its own, which stays late.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.late",
        "tests/test_lifecycle.py",
    ]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=2 * REAL_LIMIT
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
