"""What several of the tests of hooks need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from helpers import DATAGRAM_SERVERS, STREAM_SERVERS, class_name

LOOPBACK = ("127.0.0.1", 0)
SERVERS = (*STREAM_SERVERS, *DATAGRAM_SERVERS)
all_servers = pytest.mark.parametrize("server_class", SERVERS, ids=class_name)


# Compiled twice too; see test_hooks_oracle.
async def serve_one(server, joined):
    async with server:
        await server.handle_request()
        await joined()


class Wrapped:
    """A request in an object of the user's."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@contextmanager
def errors_reported(server_class: Any) -> Iterator[list[BaseException | None]]:
    """Collect what goes to `handle_error` of a server class; keep the log quiet."""
    reported: list[BaseException | None] = []

    async def handle_error(self: Any, request: Any, client_address: Any) -> None:
        reported.append(sys.exception())

    server_class.handle_error = handle_error
    yield reported
