"""What the tests of a server's lifecycle share: servers, hooks and handlers to try."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
import trio
from helpers import DATAGRAM_SERVERS, STREAM_SERVERS, class_name, echo_all
from trio.testing import MockClock

from trio_socketserver import NurseryTCPServer, NurseryUDPServer, TCPServer, UDPServer

LOOPBACK = ("127.0.0.1", 0)
SERVERS = (*STREAM_SERVERS, *DATAGRAM_SERVERS)
all_servers = pytest.mark.parametrize("server_class", SERVERS, ids=class_name)
entered_or_not = pytest.mark.parametrize("entered", [True, False], ids=["entered", "alone"])
some_servers = pytest.mark.parametrize(
    "server_class",
    [TCPServer, UDPServer, NurseryTCPServer, NurseryUDPServer],
    ids=class_name,
)
tcp_servers = pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer], ids=class_name
)

LOOP_HOOKS = ("get_request", "verify_request", "process_request", "service_actions")
REQUEST_HOOKS = ("finish_request", "shutdown_request", "close_request", "handle_error")


@asynccontextmanager
async def serving(server: Any) -> AsyncGenerator[trio.Nursery]:
    """Have *server* entered, and its loop in a task, for the length of the block."""
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        yield nursery
        await server.shutdown()


def entering(server: Any, entered: bool) -> Any:
    return server if entered else nullcontext()


class Gate:
    """A handler that keeps its requests until it is opened, then echoes."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.waiting = 0

    async def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        self.waiting += 1
        await self.opened.wait()
        await echo_all(request, client_address, server)


async def stuck(request: Any, client_address: Any, server: Any) -> None:
    """Handle a request for ever."""
    await trio.sleep_forever()


def calling(server_class: Any, hook: str, action: str, log: list[str]) -> Any:
    """A server class in which *hook* does *action*, one of the server's own methods."""

    async def override(self: Any, *args: Any) -> Any:
        log.append("called")
        await getattr(self, action)()
        log.append("returned")
        return await getattr(super(Calling, self), hook)(*args)

    Calling = type("Calling", (server_class,), {hook: override})  # noqa: N806
    return Calling


def run_virtually(main: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run on a clock of its own; what waits for ever fails at once."""

    async def limited() -> None:
        with trio.fail_after(10**6):
            await main(*args)

    trio.run(limited, clock=MockClock(autojump_threshold=0))
