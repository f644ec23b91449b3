"""A server of something else than sockets works, given what BaseServer asks for."""

from __future__ import annotations

import os
from typing import Any

import pytest
import trio
from helpers import assert_sums_up, bounded, echo_all
from trio.testing import wait_all_tasks_blocked

from trio_socketserver import BaseRequestHandler, BaseServer, NurseryMixIn


class PipeServer(BaseServer):
    """A server that is no socket server: its requests are the bytes of a pipe."""

    def __init__(self, handler: Any) -> None:
        super().__init__("the pipe", handler)
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.server_bind()
        self.server_activate()

    def fileno(self) -> int:
        return self.reader

    async def get_request(self) -> tuple[Any, Any]:
        return os.read(self.reader, 1), "somebody"

    async def server_close(self) -> None:
        await super().server_close()
        if self.reader != -1:
            os.close(self.reader)
            os.close(self.writer)
            self.reader = -1


@pytest.mark.parametrize("concurrent", [False, True])
@bounded
async def test_a_server_needs_no_socket(autojump_clock: Any, concurrent: bool) -> None:
    handled = []

    async def handler(request: Any, client_address: Any, server: Any) -> None:
        handled.append((request, client_address))
        if request == b"c":
            raise ConnectionResetError
        if len(handled) == 3:
            await server.shutdown()

    class Concurrent(NurseryMixIn, PipeServer):
        """One with a task per byte."""

    server = (Concurrent if concurrent else PipeServer)(handler)
    async with server:
        os.write(server.writer, b"abc")
        async with trio.open_nursery() as nursery:
            assert await nursery.start(server.serve_forever) == "the pipe"
            await wait_all_tasks_blocked()
            await server.shutdown()
    assert sorted(handled) == [(b"a", "somebody"), (b"b", "somebody"), (b"c", "somebody")]
    assert server.reader == -1
    assert server.statistics().failed == 1
    assert_sums_up(server)


@bounded
async def test_closing_that_hangs_is_cut_where_there_is_nothing_to_abort(
    autojump_clock: Any,
) -> None:
    class Server(PipeServer):
        async def close_request(self, request: Any) -> None:
            await trio.sleep_forever()

    server = Server(echo_all)
    server.RequestHandlerClass = BaseRequestHandler
    async with server:
        os.write(server.writer, b"a")
        await server.handle_request()
        assert trio.current_time() == server.cleanup_timeout
    assert server.statistics().failed == 1


@bounded
async def test_what_a_server_must_bring(autojump_clock: Any) -> None:
    class Nothing(BaseServer):
        """Neither fileno() nor get_request()."""

    server = Nothing("nowhere", echo_all)
    with pytest.raises(NotImplementedError, match=r"Nothing .*fileno"):
        server.fileno()
    with pytest.raises(NotImplementedError, match=r"Nothing .*get_request"):
        await server.get_request()
    with pytest.raises(NotImplementedError, match="fileno"):
        async with server:
            await server.serve_forever()
    await server.server_close()
