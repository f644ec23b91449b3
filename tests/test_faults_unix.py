"""Whose socket file it is, under every dispatcher: nothing is stolen, nobody's is deleted.

test_stream_servers has stale files, live servers, other kinds of files, names and modes.
Here are who is served meanwhile, children that share the file, and the rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults import comes_true, forks
from helpers import (
    answer,
    assert_sums_up,
    bounded,
    class_name,
    echo_all,
    line_of,
    pose,
    running,
)
from promises import serving

from trio_socketserver import (
    BaseRequestHandler,
    ForkingUnixDatagramServer,
    ForkingUnixStreamServer,
    NurseryUnixDatagramServer,
    NurseryUnixStreamServer,
    ThreadingUnixDatagramServer,
    ThreadingUnixStreamServer,
    UnixDatagramServer,
    UnixStreamServer,
)

pytestmark = forks

WORLDS: tuple[Any, ...] = (
    NurseryUnixStreamServer,
    ThreadingUnixStreamServer,
    ForkingUnixStreamServer,
    NurseryUnixDatagramServer,
    ThreadingUnixDatagramServer,
    ForkingUnixDatagramServer,
)
in_each_world = pytest.mark.parametrize("server_class", WORLDS, ids=class_name)
each_unix_server = pytest.mark.parametrize(
    "server_class", [UnixStreamServer, UnixDatagramServer], ids=class_name
)


def echo_blocking(request: Any, client_address: Any, server: Any) -> None:
    """Echo, in a thread or a child."""
    if isinstance(request, tuple):
        data, replies = request
        replies.sendto(data, client_address)
        return
    while data := request.recv(65536):
        request.sendall(data)


def handler_for(server_class: Any) -> Any:
    """Return a handler of the other colour than the tasks', where there is a choice."""
    return echo_all if "Nursery" in server_class.__name__ else echo_blocking


def make_stale(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


async def assert_serves(server: Any, folder: Path) -> None:
    with pose(server, b"ping", folder) as client:
        assert await answer(client) == b"ping"


@contextlib.contextmanager
def leaking_nothing(folder: Path) -> Iterator[None]:
    """The block leaves the folder and the open descriptors as they were."""
    before = os.listdir("/proc/self/fd"), sorted(os.listdir(folder))
    yield
    assert (os.listdir("/proc/self/fd"), sorted(os.listdir(folder))) == before


# -- taking the place of another -----------------------------------------------------------


@in_each_world
@bounded
async def test_a_live_server_serves_on_after_an_attempt_to_take_its_place(
    server_class: Any, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    server = server_class(str(path), handler_for(server_class))
    async with serving(server):
        inode = path.lstat().st_ino
        link = tmp_path / "link"
        link.symlink_to("socket")
        for name in (path, link):
            with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
                server_class(str(name), handler_for(server_class))
        assert path.lstat().st_ino == inode
        assert link.is_symlink()
        await assert_serves(server, tmp_path)
    assert_sums_up(server)
    assert not path.exists()
    assert link.is_symlink()


@in_each_world
@bounded
async def test_a_stale_file_is_replaced_and_the_next_client_served(
    server_class: Any, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    make_stale(path)
    server = server_class(str(path), handler_for(server_class))
    async with serving(server):
        await assert_serves(server, tmp_path)
    assert not path.exists()


KILLED = """
import signal, sys
from trio_socketserver import BaseRequestHandler, UnixStreamServer
server = UnixStreamServer(sys.argv[1], BaseRequestHandler)
print("bound", flush=True)
signal.pause()
"""


@bounded
async def test_what_a_killed_server_leaves_is_stale(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with running("-c", KILLED, str(path)) as process:
        line_of(process)
        with pytest.raises(OSError, match="in use"):
            UnixStreamServer(str(path), BaseRequestHandler)
        process.kill()
        process.wait()
    assert stat.S_ISSOCK(path.lstat().st_mode)
    server = NurseryUnixStreamServer(str(path), echo_all)
    async with serving(server):
        await assert_serves(server, tmp_path)


@pytest.mark.parametrize("name", ["EACCES", "EPERM", "EAGAIN", "EPROTOTYPE", "ETIMEDOUT"])
@each_unix_server
def test_only_a_refusal_makes_a_file_stale(
    server_class: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect_ex(sock: socket.socket, address: Any) -> int:
        asked.append(address)
        return int(getattr(errno, name))

    asked: list[Any] = []
    path = tmp_path / "socket"
    make_stale(path)
    inode = path.lstat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr(socket.socket, "connect_ex", connect_ex, raising=False)
        with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
            server_class(str(path), BaseRequestHandler)
    assert asked == [str(path)]
    assert path.lstat().st_ino == inode


@each_unix_server
def test_a_stale_file_that_may_not_be_removed_is_an_error_that_leaks_nothing(
    server_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unlink(path: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    path = tmp_path / "socket"
    make_stale(path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        with leaking_nothing(tmp_path), pytest.raises(PermissionError, match="socket"):
            server_class(str(path), BaseRequestHandler)


# -- what is not ours ----------------------------------------------------------------------


def make_link_to_live(path: Path) -> socket.socket:
    """Make a link to the socket of a server that lives."""
    alive = socket.socket(socket.AF_UNIX)
    alive.bind(str(path.with_name("alive")))
    alive.listen()
    path.symlink_to("alive")
    return alive


@each_unix_server
def test_a_link_to_a_live_server_stays_and_so_does_the_server(
    server_class: Any, tmp_path: Path
) -> None:
    path = tmp_path / "link"
    with make_link_to_live(path), socket.socket(socket.AF_UNIX) as client:
        with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
            server_class(str(path), BaseRequestHandler)
        client.connect(str(path))
    assert path.is_symlink()


@each_unix_server
@bounded
async def test_a_link_in_the_way_to_the_file_is_followed(
    server_class: Any, tmp_path: Path
) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "folder").symlink_to("real")
    make_stale(real / "socket")
    async with server_class(str(tmp_path / "folder" / "socket"), BaseRequestHandler):
        assert stat.S_ISSOCK((real / "socket").lstat().st_mode)
    assert os.listdir(real) == []


@each_unix_server
@bounded
async def test_an_inherited_socket_keeps_its_file(
    server_class: Any, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    sock = socket.socket(socket.AF_UNIX, server_class.socket_type)
    sock.bind(str(path))
    if server_class.socket_type == socket.SOCK_STREAM:
        sock.listen()
    inode = path.lstat().st_ino
    async with server_class.from_socket(sock, BaseRequestHandler) as server:
        assert server.server_address == str(path)
    assert server.fileno() == -1
    assert path.lstat().st_ino == inode


@pytest.mark.parametrize("what", ["file", "folder", "another socket", "link"])
@in_each_world
@bounded
async def test_what_has_come_in_place_of_our_file_stays(
    server_class: Any, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "socket"
    server = server_class(str(path), handler_for(server_class))
    async with serving(server):
        await assert_serves(server, tmp_path)
        path.rename(tmp_path / "moved")
        if what == "file":
            path.touch()
        elif what == "folder":
            path.mkdir()
        elif what == "another socket":
            make_stale(path)
        else:
            # To our own file: what is removed would be the link.
            path.symlink_to("moved")
        inode = path.lstat().st_ino
    assert path.lstat().st_ino == inode
    assert (tmp_path / "moved").exists()


# -- children ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "server_class", [ForkingUnixStreamServer, ForkingUnixDatagramServer], ids=class_name
)
@pytest.mark.parametrize("ends_by", ["return", "error", "exit"])
@bounded
async def test_a_child_does_not_take_the_file_with_it(
    server_class: Any, ends_by: str, tmp_path: Path
) -> None:
    def handler(request: Any, client_address: Any, server: Any) -> None:
        echo_blocking(request, client_address, server)
        if ends_by == "error":
            raise ValueError("a fault")
        if ends_by == "exit":
            raise SystemExit(3)

    path = tmp_path / "socket"
    server = server_class(str(path), handler)
    async with serving(server):
        inode = path.lstat().st_ino
        for count in range(1, 4):
            await assert_serves(server, tmp_path)
            await comes_true(lambda: server.statistics().active == 0)
            assert path.lstat().st_ino == inode
            assert server.statistics().accepted == count
    assert not path.exists()


# -- names ---------------------------------------------------------------------------------


@each_unix_server
@bounded
async def test_the_longest_path_there_is_and_one_byte_more(
    server_class: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with server_class("x" * 107, BaseRequestHandler) as server:
        assert server.server_address == "x" * 107
        assert os.listdir(tmp_path) == ["x" * 107]
    # Never cut, which would make a file of another name.
    for path in ("x" * 108, "x" * 300):
        with leaking_nothing(tmp_path), pytest.raises(OSError, match="too long"):
            server_class(path, BaseRequestHandler)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("unlink", [True, False])
@each_unix_server
def test_a_zero_byte_inside_is_refused_and_leaks_nothing(
    server_class: Any, unlink: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server(server_class):  # type: ignore[misc]
        unlink_socket = unlink

    monkeypatch.chdir(tmp_path)
    with leaking_nothing(tmp_path), pytest.raises(ValueError, match="zero byte"):
        Server("nul\0inside", BaseRequestHandler)


@in_each_world
@bounded
async def test_an_abstract_name_is_nobody_elses_and_ends_with_its_server(
    server_class: Any, tmp_path: Path
) -> None:
    name = f"\0trio_socketserver faults {os.getpid()} {server_class.__name__}"
    for _ in range(2):
        server = server_class(name, handler_for(server_class))
        async with serving(server):
            with leaking_nothing(tmp_path), pytest.raises(OSError, match="in use"):
                server_class(name, handler_for(server_class))
            await assert_serves(server, tmp_path)
        for file in tmp_path.iterdir():
            file.unlink()  # A datagram client's.


@in_each_world
@pytest.mark.parametrize("mode", [0o600, 0o666])
@bounded
async def test_the_mode_is_there_when_the_first_client_comes_and_when_children_go(
    server_class: Any, mode: int, tmp_path: Path
) -> None:
    own_class = type("Server", (server_class,), {"socket_mode": mode})
    path = tmp_path / "socket"
    server = own_class(str(path), handler_for(server_class))
    assert stat.S_IMODE(path.lstat().st_mode) == mode
    async with serving(server):
        await assert_serves(server, tmp_path)
        await comes_true(lambda: server.statistics().active == 0)
        assert stat.S_IMODE(path.lstat().st_mode) == mode
