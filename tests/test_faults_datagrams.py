"""Replies that cannot be sent: too long, no room, nobody there; then the next client's."""

from __future__ import annotations

import errno
import logging
import os
import socket
from typing import Any

import pytest
from faults import (
    World,
    all_ended,
    assert_answers,
    comes_true,
    forks,
    in_each_datagram_world,
    sendto_fails,
)
from helpers import bounded
from promises import serving

pytestmark = forks

IP_RECVERR = getattr(socket, "IP_RECVERR", 11)
"""Linux: report what ICMP says of earlier datagrams. The module has no name for it."""


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="trio_socketserver")


def send_to(server: Any, data: bytes) -> None:
    """Be a client that sends a datagram, and has gone when it is answered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect(server.server_address)
        client.send(data)  # Not by sendto(), which is the part that breaks.


@in_each_datagram_world
@bounded
async def test_a_reply_that_is_too_long_is_our_fault(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    server = world.make()
    async with serving(server):
        for _ in range(2):
            send_to(server, b"much")
        await comes_true(lambda: server.statistics().failed == 2)
        await assert_answers(server)
        await all_ended(server)
    assert [error.errno for error in server.errors] == [errno.EMSGSIZE] * 2
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
    assert all(record.exc_info for record in caplog.records)
    assert server.statistics().peer_errors == 0


@pytest.mark.parametrize("name", ["ENOBUFS", "EPERM", "EMSGSIZE"])
@in_each_datagram_world
@bounded
async def test_a_system_that_sends_nothing_fails_that_reply_only(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(errno, name)
    server = world.make()
    async with serving(server):
        with sendto_fails(OSError(number, os.strerror(number))):
            send_to(server, b"one")
            send_to(server, b"two")
            await comes_true(lambda: server.statistics().failed == 2)
        await assert_answers(server)
        await all_ended(server)
    assert [error.errno for error in server.errors] == [number] * 2
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2


@pytest.mark.parametrize("name", ["ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH"])
@in_each_datagram_world
@bounded
async def test_a_client_that_cannot_be_reached_is_one_line(
    world: World, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    number = getattr(errno, name)
    server = world.make()
    async with serving(server):
        with sendto_fails(OSError(number, os.strerror(number))):
            send_to(server, b"one")
            await comes_true(lambda: server.statistics().failed == 1)
        await assert_answers(server)
        await all_ended(server)
    [error] = server.errors
    assert error.errno == number
    [record] = caplog.records
    assert os.strerror(number) in record.getMessage() or record.exc_info
    # A blocking handler has the system's own error, which may be of anything it did.
    if not world.is_blocking:
        assert record.levelname == "INFO"
        assert server.statistics().peer_errors == 1
    else:
        assert record.levelname == "ERROR"


@in_each_datagram_world
@bounded
async def test_what_icmp_says_of_a_reply_stops_nothing(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    # Most sockets do not hear of it. Who asks the system to tell, gets the error at the
    # next call on the server's socket, whosever that is.
    server = world.make()
    server.socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    async with serving(server):
        for count in range(1, 4):
            send_to(server, b"x")
            await comes_true(lambda count=count: server.statistics().accept_errors == count)
        await assert_answers(server)
        await all_ended(server)
    assert server.statistics().accept_errors == 3
    assert server.statistics().completed == 4
    assert not server.errors
    assert not caplog.records
