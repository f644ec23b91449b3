"""Each error of accept() means one thing: the next connection, a back-off, or the end."""

from __future__ import annotations

import errno
import itertools
import logging
import math
import os
import socket
import ssl
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, assert_sums_up, connect, read_all

from trio_socketserver import ConnectionBroken, NurseryTCPServer, RequestTimeout
from trio_socketserver._accept import (
    BACK_OFF_FIRST,
    BACK_OFF_LIMIT,
    LISTENER,
    SHORTAGE,
    THIS_CONNECTION,
    AcceptErrors,
)

# What Linux and the BSDs document; the tables may know more.
ONE_CONNECTION = {
    "ECONNABORTED",
    "ECONNRESET",
    "EPROTO",
    "EPERM",
    "ENETDOWN",
    "ENOPROTOOPT",
    "EHOSTDOWN",
    "ENONET",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "ETIMEDOUT",
}
OUT_OF_SOMETHING = {"EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"}
UNUSABLE = {"EBADF", "EINVAL", "ENOTSOCK", "EOPNOTSUPP", "EFAULT"}


def error_of(name: str) -> OSError:
    """Return the error that a system call raises for an errno of this name."""
    number = getattr(errno, name)
    return OSError(number, os.strerror(number))


def test_the_tables_do_not_overlap() -> None:
    for one, other in itertools.combinations((THIS_CONNECTION, LISTENER, SHORTAGE), 2):
        assert not one & other


@pytest.mark.parametrize("name", sorted(ONE_CONNECTION))
async def test_an_error_of_one_connection_costs_no_time(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    errors = AcceptErrors()
    errors.failed(error_of(name))
    assert errors.delay == 0
    assert errors.resume_at <= trio.current_time()
    assert not caplog.records


@pytest.mark.parametrize("name", sorted(UNUSABLE))
async def test_an_unusable_listener_ends_the_loop(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    error = error_of(name)
    with pytest.raises(OSError, match=error.strerror) as caught:
        AcceptErrors().failed(error)
    assert caught.value is error
    assert not caplog.records


@pytest.mark.parametrize("name", [*sorted(OUT_OF_SOMETHING), "EDOM", "ENOSPC"])
async def test_a_shortage_or_the_unknown_backs_off(name: str, autojump_clock: Any) -> None:
    errors = AcceptErrors()
    delays = []
    for _ in range(10):
        errors.failed(error_of(name))
        assert errors.resume_at == trio.current_time() + errors.delay
        delays.append(errors.delay)
        await trio.sleep_until(errors.resume_at)
    assert delays == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1]
    assert delays[0] == BACK_OFF_FIRST
    assert delays[-1] == BACK_OFF_LIMIT


async def test_an_episode_is_logged_once_and_ended_by_success(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors = AcceptErrors()
    for _ in range(3):
        errors.failed(error_of("EMFILE"))
        errors.failed(error_of("ECONNABORTED"))  # It is no success.
    assert errors.delay == 4 * BACK_OFF_FIRST
    (record,) = caplog.records
    assert record.name == "trio_socketserver"
    assert record.levelno == logging.ERROR
    assert os.strerror(errno.EMFILE) in record.getMessage()
    assert "10 ms" in record.getMessage()

    errors.succeeded()
    assert errors.delay == 0
    errors.failed(error_of("ENFILE"))
    assert errors.delay == BACK_OFF_FIRST
    assert len(caplog.records) == 2
    assert os.strerror(errno.ENFILE) in caplog.records[1].getMessage()


async def test_a_log_that_fails_does_not_stop_the_back_off() -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ZeroDivisionError

    broken = Broken()
    logger = logging.getLogger("trio_socketserver")
    logger.addFilter(broken)
    try:
        errors = AcceptErrors()
        errors.failed(error_of("EMFILE"))
    finally:
        logger.removeFilter(broken)
    assert errors.delay == BACK_OFF_FIRST


@pytest.mark.parametrize(
    "error",
    [
        # Numbers of a TLS library look like EBADF or EMFILE.
        ssl.SSLError(errno.EBADF, "reason"),
        ssl.SSLError(errno.EMFILE, "reason"),
        ConnectionResetError("no number"),
        ConnectionBroken(errno.EINVAL, "odd"),
        TimeoutError("handshake"),
        RequestTimeout("handshake"),
        # The way of the standard library to refuse a connection in get_request().
        OSError("banned"),
    ],
    ids=repr,
)
async def test_errors_of_an_overridden_get_request_concern_one_connection(
    error: OSError, caplog: pytest.LogCaptureFixture
) -> None:
    errors = AcceptErrors()
    errors.failed(error)
    assert errors.delay == 0
    assert not caplog.records


def test_begins_without_a_delay() -> None:
    errors = AcceptErrors()
    assert errors.delay == 0
    assert errors.resume_at == -math.inf


# -- in a serving loop ------------------------------------------------------------------


class Failing(NurseryTCPServer):
    """A server whose accept() fails for a while."""

    def fail(self, *names: str) -> None:
        self.errors = list(names)
        self.attempts: list[float] = []

    async def get_request(self) -> tuple[Any, Any]:
        self.attempts.append(trio.current_time())
        if self.errors:
            raise error_of(self.errors.pop(0))
        return await super().get_request()


async def greet(request: Any, client_address: Any, server: Any) -> None:
    await request.sendall(b"hello")


async def test_a_loop_out_of_descriptors_does_not_spin_and_recovers(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = Failing(("127.0.0.1", 0), greet)
    server.fail(*["EMFILE"] * 9)
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with connect(server.server_address) as client:
            await trio.sleep(3.5)
            assert server.statistics().accept_errors == 9
            client.setblocking(False)
            assert read_all(client) == b"hello"
            waited = [b - a for a, b in itertools.pairwise(server.attempts)]
            backing_off = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1]
            assert waited[:9] == pytest.approx(backing_off)
            assert len(server.attempts) <= 11  # and once more, to find nothing
        with connect(server.server_address) as client:
            await trio.sleep(0)
            await trio.testing.wait_all_tasks_blocked()
            assert trio.current_time() == 3.5
            client.setblocking(False)
            assert read_all(client) == b"hello"
        await server.shutdown()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert_sums_up(server)
    assert server.statistics().accepted == 2


async def test_a_loop_takes_the_next_connection_at_once(autojump_clock: Any) -> None:
    server = Failing(("127.0.0.1", 0), greet)
    server.fail("ECONNABORTED", "EPROTO")
    async with server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        with connect(server.server_address) as client:
            await trio.testing.wait_all_tasks_blocked()
            client.setblocking(False)
            assert read_all(client) == b"hello"
        assert trio.current_time() == 0
        assert server.statistics().accept_errors == 2
        await server.shutdown()


async def test_a_loop_ends_with_its_listener() -> None:
    server = Failing(("127.0.0.1", 0), greet)
    server.fail("EINVAL")
    with trio.fail_after(REAL_LIMIT):
        async with server:
            with socket.socket() as client:
                client.connect(server.server_address)
                with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
                    await server.serve_forever()
    assert server.statistics().accept_errors == 1
