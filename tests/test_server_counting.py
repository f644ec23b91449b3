"""A server's statistics have every request in exactly one place at every moment."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers import bind_address, bounded, echo_all, pose
from lifecycles import LOOPBACK, all_servers

from trio_socketserver import NurseryTCPServer, TCPServer

OUTCOMES = ("completed", "failed", "rejected", "cancelled")


class Auditor:
    """Look at a server's statistics wherever it lets us."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.looks = 0

    def look(self, server: Any, where: str, at_least: int = 0) -> None:
        self.looks += 1
        seen = server.statistics()
        parts = {name: getattr(seen, name) for name in (*OUTCOMES, "active")}
        if seen.accepted != sum(parts.values()):
            self.findings.append(f"{where}: {seen.accepted} accepted, {parts}")
        if min(parts.values()) < 0 or seen.peer_errors > seen.failed:
            self.findings.append(f"{where}: {seen}")
        if seen.active < at_least:
            self.findings.append(f"{where}: {seen.active} active")


def audited(server_class: Any, auditor: Auditor) -> Any:
    """Look in every hook; one that has a request in hand counts it as active."""

    def audit(hook: str) -> Callable[..., Awaitable[Any]]:
        async def override(self: Any, *args: Any) -> Any:
            auditor.look(self, f"before {hook}", len(args) > 0)
            try:
                return await getattr(super(Audited, self), hook)(*args)
            finally:
                # Without a checkpoint in between the request is still there.
                auditor.look(self, f"after {hook}", len(args) > 0)

        return override

    hooks = (
        "get_request",
        "verify_request",
        "process_request",
        "finish_request",
        "shutdown_request",
        "close_request",
        "handle_error",
        "service_actions",
    )
    Audited = type("Audited", (server_class,), {name: audit(name) for name in hooks})  # noqa: N806
    return Audited


@all_servers
@bounded
async def test_every_request_is_in_exactly_one_place_at_every_moment(
    autojump_clock: Any, server_class: Any, tmp_path: Path
) -> None:
    auditor = Auditor()

    class Server(server_class):
        async def verify_request(self, request: Any, client_address: Any) -> bool:
            if self.wish(request) == b"error":
                raise LookupError
            return self.wish(request) != b"reject"

        def wish(self, request: Any) -> bytes:
            if isinstance(request, tuple):
                return request[0]
            return request.socket.recv(10, socket.MSG_PEEK)

        async def handle_error(self, request: Any, client_address: Any) -> None:
            raise LookupError  # On top of everything else.

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        wish = server.wish(request)
        auditor.look(server, "handler", 1)
        await trio.sleep(1)
        auditor.look(server, "handler, later", 1)
        if wish == b"fail":
            raise LookupError
        if wish == b"reset":
            raise ConnectionResetError
        if wish == b"stay":
            await trio.sleep_forever()
        if wish == b"group":
            raise ExceptionGroup("several", [LookupError()])

    server_class = audited(Server, auditor)
    server = server_class(bind_address(server_class, tmp_path), handler)
    wishes = (b"work", b"fail", b"reset", b"reject", b"error", b"group", b"work", b"stay")
    clients = [pose(server, wish, tmp_path) for wish in wishes]
    with trio.move_on_after(100):
        async with server:
            await server.serve_forever()
    for client in clients:
        client.close()
    assert auditor.findings == []
    assert auditor.looks > 50
    seen = server.statistics()
    assert {name: getattr(seen, name) for name in OUTCOMES} == {
        "completed": 2,
        "failed": 4,
        "rejected": 1,
        "cancelled": 1,
    }
    assert seen.peer_errors == 1
    assert (seen.accepted, seen.active) == (8, 0)


@bounded
async def test_a_request_that_blames_the_peer_twice_counts_once(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        cleanup_timeout = 1

        async def shutdown_request(self, request: Any) -> None:
            await trio.sleep_forever()

    async def reset(request: Any, client_address: Any, server: Any) -> None:
        raise ConnectionResetError

    server = Server(LOOPBACK, reset)
    with pose(server, b""):
        async with server:
            await server.handle_request()
    seen = server.statistics()
    assert (seen.failed, seen.peer_errors) == (1, 1)


def test_statistics_are_frozen() -> None:
    server = TCPServer(LOOPBACK, echo_all)
    with server.socket:
        seen = server.statistics()
        with pytest.raises(AttributeError):
            seen.accepted = 1  # type: ignore[misc]
        assert seen == server.statistics()
