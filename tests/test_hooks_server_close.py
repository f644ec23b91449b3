"""An overridden server_close() is called whenever the block is left, however it is left."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from helpers import assert_sums_up, bounded, connect, echo_all, receive_to_end
from hooks import LOOPBACK

from trio_socketserver import NurseryTCPServer, TCPServer


@bounded
async def test_an_exception_of_the_body_calls_server_close_too(autojump_clock: Any) -> None:
    calls = []

    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            calls.append("before")
            try:
                await super().server_close()
            finally:
                calls.append("after")

    async def use(server: Any) -> None:
        async with server:
            await server.handle_request()
            raise LookupError("the body's")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address), pytest.raises(LookupError, match="the body's"):
        await use(server)
    assert calls == ["before", "after"]
    assert server.fileno() == -1
    # The client never ends its request: only a cancellation can have ended it.
    assert server.statistics().cancelled == 1
    assert trio.current_time() == 0


@bounded
async def test_cancelling_the_body_calls_server_close_too(autojump_clock: Any) -> None:
    calls = []

    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            calls.append("called")
            await super().server_close()

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address), trio.move_on_after(1) as hard:
        async with server:
            await server.serve_forever()
    assert hard.cancelled_caught
    assert calls == ["called"]
    assert server.fileno() == -1
    assert server.statistics().cancelled == 1


@bounded
async def test_what_the_body_raises_counts_more_than_a_cancelled_server_close(
    autojump_clock: Any,
) -> None:
    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            await super().server_close()

    async def use(server: Any) -> None:
        with trio.CancelScope() as hard:
            async with server:
                hard.cancel()
                raise LookupError("the body's")

    server = Server(LOOPBACK, echo_all)
    with pytest.raises(LookupError, match="the body's"):
        await use(server)
    assert server.fileno() == -1


@bounded
async def test_a_server_close_that_fails_leaves_nothing_open(autojump_clock: Any) -> None:
    class Server(NurseryTCPServer):
        async def server_close(self) -> None:
            raise LookupError("not even super")

    server = Server(LOOPBACK, echo_all)
    with connect(server.server_address) as client:
        with pytest.raises(LookupError, match="not even super"):
            async with server:
                await server.handle_request()
        assert await receive_to_end(client) == b""
    assert server.fileno() == -1
    assert_sums_up(server)


@bounded
async def test_serving_alone_does_not_call_server_close(autojump_clock: Any) -> None:
    calls = []

    class Server(TCPServer):
        async def server_close(self) -> None:
            calls.append("called")
            await super().server_close()

    server = Server(LOOPBACK, echo_all)
    with trio.move_on_after(1):
        await server.serve_forever()
    server.timeout = 1
    await server.handle_request()
    assert calls == []
    await server.server_close()
    assert calls == ["called"]
