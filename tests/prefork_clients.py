"""Serving in worker processes for a block, and asking the workers of `prefork_servers`."""

from __future__ import annotations

import ast
import contextlib
import logging
import socket
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from helpers import answer, pose, receive, receive_to_end

from trio_socketserver import _crew

LOCAL = ("127.0.0.1", 0)


class Reply(NamedTuple):
    """What a worker has replied."""

    pid: int
    value: Any


def parsed(reply: bytes) -> Reply:
    """Read a reply."""
    pid, _, value = reply.partition(b"\n")
    return Reply(int(pid), ast.literal_eval(value.decode()))


@contextlib.asynccontextmanager
async def serving(server: Any) -> AsyncGenerator[Any]:
    """Enter *server* and serve for the length of the block."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield server
        await server.shutdown()


async def ask_for(server: Any, expression: str, folder: Path | None = None) -> Reply:
    """Have a worker of *server* evaluate *expression*."""
    with pose(server, expression.encode(), folder) as client:
        return parsed(await answer(client))


class AtWork:
    """A client whose request is being handled."""

    def __init__(self, client: socket.socket, pid: int) -> None:
        self.pid = pid
        self._client = client

    async def value(self) -> Any:
        """Wait for the reply, and return the value in it."""
        return ast.literal_eval((await receive_to_end(self._client)).decode())

    async def ended_without(self) -> bool:
        """Wait for the end, and tell whether it came without a value."""
        return await receive_to_end(self._client) == b""


@contextlib.asynccontextmanager
async def at_work(server: Any, expression: str) -> AsyncGenerator[AtWork]:
    """Have a worker of *server* begin to evaluate *expression*."""
    with pose(server, expression.encode()) as client:
        line = b""
        while not line.endswith(b"\n"):
            byte = await receive(client, 1)
            assert byte
            line += byte
        yield AtWork(client, int(line))


class Log(logging.Handler):
    """What is logged in this process, to look at and to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._more = trio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self._more.set()
        self._more = trio.Event()

    @property
    def lines(self) -> list[str]:
        """The messages."""
        return [record.getMessage() for record in self.records]

    async def wait_for(self, part: str, times: int = 1) -> str:
        """Wait until so many messages hold *part*, and return the last of those."""
        while True:
            found = [line for line in self.lines if part in line]
            if len(found) >= times:
                return found[-1]
            await self._more.wait()


@contextlib.contextmanager
def logging_to(log: Log) -> Iterator[None]:
    """Have *log* among the root logger's handlers."""
    root = logging.getLogger()
    root.addHandler(log)
    try:
        yield
    finally:
        root.removeHandler(log)


def when_started(monkeypatch: pytest.MonkeyPatch) -> trio.Event:
    """Return an event that is set when a worker's process runs, which cannot serve yet."""
    event = trio.Event()
    started = _crew._Worker.started

    def note(self: Any, process: Any = None) -> None:
        started(self, process)
        event.set()

    monkeypatch.setattr(_crew._Worker, "started", note)
    return event
