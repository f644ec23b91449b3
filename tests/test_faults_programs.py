"""Whole programs without descriptors, or without a standard error, serve on."""

from __future__ import annotations

import contextlib
import itertools
import socket
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import GREETING, LOCALHOST, STREAM_WORLDS, World, in_each_world
from helpers import REAL_LIMIT, connect, line_of, receive_until_closed, running

PROGRAM = """
    import os, resource, socket, socketserver, sys, time
    import trio
    from trio_socketserver import *

    class AsyncStream(StreamRequestHandler):
        async def handle(self):
            await self.wfile.write(b"hello\\n")
            async for line in self.rfile:
                if line == b"fail\\n":
                    raise ValueError("as asked for")
                await self.wfile.write(line)

    class BlockingStream(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(b"hello\\n")
            for line in self.rfile:
                if line == b"fail\\n":
                    raise ValueError("as asked for")
                self.wfile.write(line)

    class NurseryWorkers(PreforkingMixIn, NurseryTCPServer):
        workers = 1

    class ThreadingWorkers(PreforkingMixIn, ThreadingTCPServer):
        workers = 1

    class ForkingWorkers(PreforkingMixIn, ForkingTCPServer):
        workers = 1

    def make(server_class, handler):
        return globals()[server_class](("127.0.0.1", 0), globals()[handler])
"""
"""The handlers of `faults`, as a program of its own has them."""


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], str]:
    """Make a script of `PROGRAM` and what a test adds."""

    def write(text: str) -> str:
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(PROGRAM) + textwrap.dedent(text))
        return str(path)

    return write


def ping(client: Any, times: int = 1) -> None:
    for _ in range(times):
        client.sendall(b"ping\n")
        assert client.recv(100) == b"ping\n"


# -- descriptors ---------------------------------------------------------------------------

SHORT_OF_DESCRIPTORS = """
    async def main():
        server = make(*sys.argv[2:])
        async with server, trio.open_nursery() as nursery:
            await nursery.start(server.serve_forever)
            control = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
            with control, control.makefile("rw", buffering=1) as commands:
                print(server.server_address[1], file=commands)
                await obey(commands, server)
            nursery.cancel_scope.cancel()

    async def obey(commands, server):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        since = time.monotonic()
        while command := await trio.to_thread.run_sync(commands.readline):
            if command == "limit\\n":
                lowest_free = os.dup(0)
                os.close(lowest_free)
                resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
                since = time.monotonic()
            elif command == "relax\\n":
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            seconds = time.monotonic() - since
            print(server.statistics().accept_errors, seconds, file=commands)

    if __name__ == "__main__":
        trio.run(main)
"""


@in_each_world
def test_really_out_of_descriptors(world: World, script: Callable[[str], str]) -> None:
    def tell(command: str) -> tuple[int, float]:
        print(command, file=commands)
        errors, seconds = commands.readline().split()
        return int(errors), float(seconds)

    names = (world.server_class.__name__, world.handler.__name__)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(LOCALHOST))
        listener.settimeout(REAL_LIMIT)
        port = str(listener.getsockname()[1])
        # Not all warnings are errors: forking warns of threads.
        arguments = ("-W", "ignore", script(SHORT_OF_DESCRIPTORS), port, *names)
        process = stack.enter_context(running(*arguments))
        control = stack.enter_context(listener.accept()[0])
        control.settimeout(REAL_LIMIT)
        commands = stack.enter_context(control.makefile("rw", buffering=1))
        address = ("127.0.0.1", int(commands.readline()))

        served_already = stack.enter_context(connect(address))
        assert served_already.recv(100) == GREETING
        tell("limit")
        waiting = [stack.enter_context(connect(address)) for _ in range(3)]
        ping(served_already, 50)
        time.sleep(0.3)  # For a loop to spin in, if it does.
        ping(served_already, 50)
        while not (seen := tell("look"))[0]:
            pass  # It has not been its turn yet.
        errors, seconds = seen
        # 10 ms doubling to one second, then one a second. (A loop that spins makes some
        # ten thousand attempts in that time.)
        assert errors <= 8 + seconds
        tell("relax")
        fresh = stack.enter_context(connect(address))
        for client in (*waiting, fresh):
            assert client.recv(100) == GREETING
        for client in (*waiting, fresh, served_already):
            ping(client)
            client.shutdown(socket.SHUT_WR)
            assert receive_until_closed(client) == b""

        control.shutdown(socket.SHUT_WR)
        # (Children, if there are any, have the pipe too.)
        _, complaints = process.communicate(timeout=2 * REAL_LIMIT)
    assert process.returncode == 0, complaints
    # One line per episode, without a traceback.
    [episode] = complaints.splitlines()
    assert "cannot accept" in episode
    assert "Too many open files" in episode


IN_A_WORKER = """
    class AsyncObedient(StreamRequestHandler):
        async def handle(self):
            await self.wfile.write(b"hello\\n")
            async for line in self.rfile:
                if line == b"stop\\n":
                    await self.server.shutdown()
                await self.wfile.write(obey(line, self.server))

    class BlockingObedient(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(b"hello\\n")
            for line in self.rfile:
                if line == b"stop\\n":
                    self.server.shutdown()
                self.wfile.write(obey(line, self.server))

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    since = time.monotonic()

    def obey(line, server):
        global since
        if line == b"limit\\n":
            lowest_free = os.dup(0)
            os.close(lowest_free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
            since = time.monotonic()
        elif line == b"relax\\n":
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        elif line == b"look\\n":
            errors = server.statistics().accept_errors
            return b"%d %g\\n" % (errors, time.monotonic() - since)
        return line

    async def main():
        server = make(*sys.argv[1:])
        async with server, trio.open_nursery() as nursery:
            host, port = await nursery.start(server.serve_forever)
            print(port, flush=True)

    if __name__ == "__main__":
        trio.run(main)
"""


@pytest.mark.parametrize(
    "names",
    [("NurseryWorkers", "AsyncObedient"), ("ThreadingWorkers", "BlockingObedient")],
    ids=["nursery", "threading"],
)
def test_a_worker_really_out_of_descriptors(
    names: tuple[str, str], script: Callable[[str], str]
) -> None:
    def tell(command: bytes) -> bytes:
        served_already.sendall(command)
        return served_already.recv(100)

    with contextlib.ExitStack() as stack:
        process = stack.enter_context(running(script(IN_A_WORKER), *names))
        address = ("127.0.0.1", int(line_of(process)))
        served_already = stack.enter_context(connect(address))
        assert served_already.recv(100) == GREETING
        assert tell(b"limit\n") == b"limit\n"
        waiting = stack.enter_context(connect(address))
        ping(served_already, 50)
        time.sleep(0.3)  # For a loop to spin in, if it does.
        while (seen := tell(b"look\n").split())[0] == b"0":
            pass  # It has not been its turn yet.
        errors, seconds = seen
        assert int(errors) <= 8 + float(seconds)
        assert tell(b"relax\n") == b"relax\n"
        for client in (waiting, stack.enter_context(connect(address))):
            assert client.recv(100) == GREETING
            ping(client)
            client.shutdown(socket.SHUT_WR)
            assert receive_until_closed(client) == b""
        assert tell(b"stop\n") == b"stop\n"
        served_already.shutdown(socket.SHUT_WR)
        _, complaints = process.communicate(timeout=2 * REAL_LIMIT)
    assert process.returncode == 0, complaints
    # The program has it in its log, once.
    [episode] = complaints.splitlines()
    assert "cannot accept" in episode
    assert "Too many open files" in episode


# -- standard error ------------------------------------------------------------------------

WITHOUT_STDERR = """
    def spoil(how):
        if how == "none":  # As by 2>&-; the next socket gets the number.
            sys.stderr = None
            os.close(2)
        elif how == "closed":
            sys.stderr.close()
        elif how == "full":
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        elif how == "broken":
            ours, theirs = os.pipe()
            os.dup2(theirs, 2)
            os.close(ours)
            os.close(theirs)

    async def main():
        async with trio.open_nursery() as nursery:
            for index in range(2, len(sys.argv), 2):
                server = make(*sys.argv[index : index + 2])
                host, port = await nursery.start(server.serve_forever)
                print(port, flush=True)

    if __name__ == "__main__":
        spoil(sys.argv[1])
        trio.run(main)
"""


@pytest.mark.parametrize("how", ["none", "closed", "full", "broken"])
def test_without_a_standard_error(how: str, script: Callable[[str], str]) -> None:
    names = [
        (world.server_class.__name__, world.handler.__name__) for world in STREAM_WORLDS
    ]
    names.append(("NurseryWorkers", "AsyncStream"))
    names.append(("ThreadingWorkers", "BlockingStream"))
    names.append(("ForkingWorkers", "BlockingStream"))
    path = script(WITHOUT_STDERR)
    with running("-W", "ignore", path, how, *itertools.chain(*names)) as process:
        for _ in names:
            address = ("127.0.0.1", int(line_of(process)))
            with connect(address) as served_already:
                assert served_already.recv(100) == GREETING
                for _ in range(3):
                    with connect(address) as client:
                        client.sendall(b"fail\n")
                        # Nothing of the traceback goes to a client either.
                        assert receive_until_closed(client) == GREETING
                with connect(address) as fresh:
                    assert fresh.recv(100) == GREETING
                    ping(fresh)
                ping(served_already)
        assert process.poll() is None
