"""What several test files share: independent peers, and ways to look inside a run."""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import itertools
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
import trio
import trio.testing

import trio_socketserver
from trio_socketserver import (
    BaseServer,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixDatagramServer,
    NurseryUnixStreamServer,
    TCPServer,
    UDPServer,
    UnixDatagramServer,
    UnixStreamServer,
)

STREAM_SERVERS = (TCPServer, NurseryTCPServer, UnixStreamServer, NurseryUnixStreamServer)
DATAGRAM_SERVERS = (
    UDPServer,
    NurseryUDPServer,
    UnixDatagramServer,
    NurseryUnixDatagramServer,
)


def class_name(server_class: type) -> str:
    """Name the parameter of a test."""
    return server_class.__name__


def bind_address(server_class: type[Any], folder: Path) -> Any:
    """Return an address that a server of *server_class* can bind, fresh at each call."""
    if server_class.address_family != socket.AF_UNIX:
        return ("127.0.0.1", 0)
    return next(
        path
        for n in itertools.count()
        if not os.path.lexists(path := str(folder / f"s{n}"))
    )


def family_of(address: Any) -> int:
    """Tell the family of a socket address by its form."""
    if isinstance(address, (str, bytes)):
        return socket.AF_UNIX
    return socket.AF_INET6 if len(address) == 4 else socket.AF_INET


def connect(address: Any) -> socket.socket:
    """Return a plain blocking socket, connected to *address*, with a timeout."""
    sock = socket.socket(family_of(address), socket.SOCK_STREAM)
    sock.settimeout(REAL_LIMIT)
    if sock.family != socket.AF_UNIX:
        # What is sent must be there at once, whatever a virtual clock says.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def datagram_client(server: Any, folder: Path | None = None) -> socket.socket:
    """Return a plain datagram socket that is connected to *server* and can be replied to.

    Args:
        server: a datagram server.
        folder: where the socket of a client of a Unix server is made; None for an
            automatic name.
    """
    sock = socket.socket(family_of(server.server_address), socket.SOCK_DGRAM)
    sock.settimeout(REAL_LIMIT)
    if sock.family == socket.AF_UNIX:
        sock.bind("" if folder is None else bind_address(type(server), folder))
    sock.connect(server.server_address)
    return sock


def has_ipv6() -> bool:
    """Tell whether this machine has the local IPv6 address; many containers have not."""
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")


def close_with_reset(sock: socket.socket) -> None:
    """Close a TCP connection so that the peer gets a reset instead of an end-of-file."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def receive(sock: socket.socket, size: int = 65536) -> bytes:
    """Receive on a plain socket, from a trio task; a reset raises `ConnectionError`."""
    sock.setblocking(False)
    while True:
        try:
            return sock.recv(size)
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)


async def receive_to_end(sock: socket.socket) -> bytes:
    """Receive until the peer has closed the connection, by end-of-file or by reset."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := await receive(sock):
            received += chunk
    return received


def is_refused(address: Any) -> bool:
    """Tell whether nobody listens at *address*."""
    with socket.socket(family_of(address), socket.SOCK_STREAM) as sock:
        return sock.connect_ex(address) in (errno.ECONNREFUSED, errno.ENOENT)


def assert_sums_up(server: BaseServer) -> None:
    """Every accepted request is in exactly one place, and none is active any more."""
    seen = server.statistics()
    assert seen.active == 0
    assert min(seen.completed, seen.failed, seen.rejected, seen.cancelled) >= 0
    assert seen.accepted == seen.completed + seen.failed + seen.rejected + seen.cancelled


# -- the lower modules ---------------------------------------------------------------------

STREAM_KINDS = ("tcp", "unix")
"""The kinds of connected stream sockets that `connected` makes."""

SMALL_WINDOW = 16384
"""Bytes of a small receive buffer: with fewer, Linux's TCP waits for probe timers."""


@contextlib.contextmanager
def connected(
    kind: str, *, small_buffers: bool = False
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Yield two connected non-blocking stream sockets, and close them at the end.

    Args:
        kind: one of `STREAM_KINDS`.
        small_buffers: whether a few kilobytes shall be enough to `clog` them.
    """
    with contextlib.ExitStack() as stack:
        if kind == "unix":
            pair = socket.socketpair()
        else:
            with socket.socket() as listener:
                if small_buffers:
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_WINDOW)
                listener.bind(("127.0.0.1", 0))
                listener.listen(1)
                ours = stack.enter_context(socket.socket())
                if small_buffers:
                    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_WINDOW)
                ours.connect(listener.getsockname())
                pair = ours, listener.accept()[0]
        for sock in pair:
            stack.enter_context(sock)
            sock.setblocking(False)
            if small_buffers:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        yield pair


def clog(sock: socket.socket) -> int:
    """Send zeros until the kernel takes no more, and return how many."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(512))
    return sent


def read_all(sock: socket.socket) -> bytes:
    """Return what a non-blocking socket holds now."""
    received = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


class Moments(trio.abc.Instrument):
    """Do things at chosen moments of a task's life, as exactly as trio can tell them.

    A task has a moment each time it stops and each time it goes on. Used as a context
    manager in the task that is to be watched.

    Args:
        happen: called with the number of each moment, from 1.
    """

    def __init__(self, happen: Callable[[int], None]) -> None:
        self.happen = happen
        self.passed = 0

    def __enter__(self) -> Self:
        self.task = trio.lowlevel.current_task()
        trio.lowlevel.add_instrument(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        trio.lowlevel.remove_instrument(self)

    def _moment(self, task: trio.lowlevel.Task) -> None:
        if task is self.task:
            self.passed += 1
            self.happen(self.passed)

    before_task_step = after_task_step = _moment


VIRTUAL_LIMIT = 10.0**7
"""Seconds for a test on the virtual clock: what waits for ever gets there at once."""

REAL_LIMIT = 60.0
"""Seconds for a test on the real clock: far longer than a loaded machine needs."""


def bounded(test: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    """Decorate an asynchronous test: it fails when it waits for ever."""

    @functools.wraps(test)
    async def bounded_test(**fixtures: Any) -> None:
        virtual = "autojump_clock" in fixtures
        with trio.fail_after(VIRTUAL_LIMIT if virtual else REAL_LIMIT):
            await test(**fixtures)

    return bounded_test


def blocking_twin(function: Any) -> Any:
    """Return *function*, of a module's top level, as blocking code has it.

    The twin is compiled from the same source without the words ``async`` and ``await``.
    """
    source = re.sub(r"\b(?:async|await) ", "", inspect.getsource(function))
    namespace = dict(function.__globals__)
    exec(compile(source, f"<blocking twin of {function.__name__}>", "exec"), namespace)
    return namespace[function.__name__]


async def echo_all(request: Any, client_address: Any, server: Any) -> None:
    """Handle a request by sending back what has come, of a connection or a datagram."""
    if isinstance(request, tuple):
        data, replies = request
        await replies.sendto(data, client_address)
        return
    while data := await request.receive_some():
        await request.send_all(data)


def pose(server: Any, question: bytes, folder: Path | None = None) -> socket.socket:
    """Return a plain client that has sent *question*, and will send no more."""
    if server.socket_type == socket.SOCK_DGRAM:
        client = datagram_client(server, folder)
        client.send(question)
    else:
        client = connect(server.server_address)
        client.sendall(question)
        client.shutdown(socket.SHUT_WR)
    return client


async def answer(client: socket.socket) -> bytes:
    """Return what the server has replied to a client made by `pose`."""
    if client.type == socket.SOCK_DGRAM:
        return await receive(client)
    return await receive_to_end(client)


async def ask(server: Any, question: bytes, folder: Path | None = None) -> bytes:
    """Send one request to *server*, over whatever it serves, and return the reply."""
    with pose(server, question, folder) as client:
        return await answer(client)


def reply_now(client: socket.socket) -> bytes:
    """Return what a client made by `pose` has been sent so far, without waiting."""
    client.setblocking(False)
    try:
        return read_all(client)
    except ConnectionResetError:
        return b""  # A Unix connection that was closed with something unread.


# -- programs ------------------------------------------------------------------------------


@contextlib.contextmanager
def killed_in_the_end(
    process: subprocess.Popen[Any], seconds: float = REAL_LIMIT
) -> Iterator[None]:
    """Kill *process* after so many seconds, and at the end of the block."""
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
        process.kill()
        watchdog.join()


@contextlib.contextmanager
def running(
    *arguments: str, folder: Path | None = None, pass_fds: Collection[int] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Run Python, which finds the package under test and treats warnings as errors.

    Args:
        *arguments: what stands behind ``python`` on the command line.
        folder: the directory to run it in.
        pass_fds: descriptors that it inherits.

    Yields:
        The process. It is killed after `REAL_LIMIT` seconds, so that no read from it waits
        for ever, and at the end of the block.
    """
    package = str(Path(trio_socketserver.__file__).parents[1])
    with (
        subprocess.Popen(
            [sys.executable, "-W", "error", *arguments],
            cwd=folder,
            pass_fds=pass_fds,
            env={**os.environ, "PYTHONPATH": package},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
        killed_in_the_end(process),
    ):
        yield process


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line that a process of `running` prints; it must print one."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()
    return line


def printed_address(line: str) -> tuple[str, int]:
    """Read the address ``host:port`` at the end of *line*."""
    host, _, port = line.split()[-1].rpartition(":")
    return host.strip("[]"), int(port)


def receive_until_closed(sock: socket.socket) -> bytes:
    """Receive on a plain blocking socket until the peer has closed the connection."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := sock.recv(65536):
            received += chunk
    return received


REAL_RUN = trio.run


def run_on_virtual_clock(function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    """Take the place of `trio.run`: the clock jumps, and who waits for ever fails."""

    async def bounded_run() -> Any:
        with trio.fail_after(VIRTUAL_LIMIT):
            return await function(*arguments)

    return REAL_RUN(bounded_run, clock=trio.testing.MockClock(autojump_threshold=0))
