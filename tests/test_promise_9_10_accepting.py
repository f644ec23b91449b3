"""Promises 9 and 10: errors of accept(), and no loop that loses or starves anything."""

from __future__ import annotations

import collections
import contextlib
import errno
import gc
import itertools
import os
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from helpers import (
    assert_sums_up,
    bind_address,
    bounded,
    class_name,
    connect,
    datagram_client,
    receive,
)
from promises import (
    LOCALHOST,
    AtStep,
    RaisingFilter,
    converse,
    do_nothing,
    each_server,
    instrumented,
    knock,
    noting_handler,
    records,
    serve,
    serving,
    system_error,
    talk_datagrams,
)
from promises import broken_logging as broken_logging
from promises import log_everything as log_everything
from trio.lowlevel import checkpoint

from trio_socketserver import (
    DatagramRequestHandler,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixStreamServer,
    StreamRequestHandler,
    TCPServer,
    UDPServer,
)


async def echo_lines(request: Any, client_address: Any, server: Any) -> None:
    """A handler that sends back what it gets."""
    while data := await request.receive_some():
        await request.send_all(data)


# == 9. Errors of accept() ================================================================


class Flaky:
    """A server whose next attempts to accept fail with ``errors``."""

    def __init__(self, server_address: Any, handler: Any) -> None:
        super().__init__(server_address, handler)  # type: ignore[call-arg]
        self.errors: collections.deque[OSError] = collections.deque()
        self.attempts: list[float] = []

    async def get_request(self) -> tuple[Any, Any]:
        self.attempts.append(trio.current_time())
        if self.errors:
            raise self.errors.popleft()
        return await super().get_request()  # type: ignore[misc]


def flaky(server_class: type[Any]) -> type[Any]:
    return type(f"Flaky{server_class.__name__}", (Flaky, server_class), {})


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@pytest.mark.parametrize("name", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EIO"])
@bounded
async def test_promise_9_a_shortage_backs_off_and_recovers(
    server_class: type[Any],
    name: str,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = flaky(server_class)(LOCALHOST, do_nothing)
    delays = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1, 1, 1]
    async with serving(server):
        server.errors.extend([system_error(name)] * len(delays))
        with knock(server):
            await trio.sleep(60)
        assert gaps(server.attempts)[: len(delays)] == pytest.approx(delays)
        # Afterwards nothing is tried until a client comes.
        assert server.attempts[-1] - server.attempts[len(delays)] < 0.01
        assert server.statistics().completed == 1
        assert server.statistics().accept_errors == len(delays)
        assert len(caplog.records) == 1
        # Success has ended the episode: the next begins small, and is told again.
        server.attempts.clear()
        server.errors.extend([system_error(name)] * 2)
        with knock(server):
            await trio.sleep(60)
        assert gaps(server.attempts)[:2] == pytest.approx([0.01, 0.02])
    assert server.statistics().completed == 2
    assert server.statistics().accept_errors == len(delays) + 2
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert os.strerror(getattr(errno, name)) in caplog.records[0].getMessage()
    assert caplog.records[0].exc_info is None


@bounded
async def test_promise_9_an_error_of_one_connection_does_not_end_an_episode(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    server = flaky(NurseryTCPServer)(LOCALHOST, do_nothing)
    names = ["EMFILE", "EMFILE", "ECONNABORTED", "EMFILE"]
    server.errors.extend(map(system_error, names))
    async with serving(server):
        with knock(server):
            await trio.sleep(60)
    assert [delay for delay in gaps(server.attempts) if delay > 0.001] == pytest.approx(
        [0.01, 0.02, 0.04]
    )
    assert len(caplog.records) == 1


@bounded
async def test_promise_9_broken_logging_does_not_end_the_server(
    broken_logging: RaisingFilter, autojump_clock: trio.testing.MockClock
) -> None:
    server = flaky(NurseryTCPServer)(LOCALHOST, do_nothing)
    server.errors.extend([system_error("EMFILE")] * 3)
    async with serving(server):
        with knock(server):
            await trio.sleep(60)
    assert broken_logging.asked
    assert server.statistics().completed == 1
    assert gaps(server.attempts)[:3] == pytest.approx([0.01, 0.02, 0.04])


@bounded
async def test_promise_9_shutdown_does_not_wait_for_the_back_off(
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = flaky(NurseryTCPServer)(LOCALHOST, do_nothing)
    server.errors.extend([system_error("EMFILE")] * 100)
    async with serving(server):
        with knock(server):
            await trio.sleep(60)
            before = trio.current_time()
            await server.shutdown()
            assert trio.current_time() == before


@bounded
async def test_promise_9_handle_request_backs_off_within_its_timeout(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Server(flaky(TCPServer)):  # type: ignore[misc]
        timeout = 5

        async def handle_timeout(self) -> None:
            timed_out.append(trio.current_time())

    timed_out: list[float] = []
    start = trio.current_time()
    async with Server(LOCALHOST, do_nothing) as server:
        server.errors.extend([system_error("EMFILE")] * 100)
        with knock(server):
            await server.handle_request()
            assert timed_out == pytest.approx([start + 5])
            server.errors.clear()
            await server.handle_request()
    assert server.statistics().completed == 1


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@bounded
async def test_promise_9_an_error_of_one_connection_is_passed_over(
    server_class: type[Any],
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    names = (
        "ECONNABORTED ECONNRESET EPERM EPROTO ENETDOWN ENOPROTOOPT EHOSTDOWN ENONET "
        "EHOSTUNREACH ENETUNREACH ETIMEDOUT ECONNREFUSED EMSGSIZE EINTR"
    )
    errors = [
        *map(system_error, names.split()),
        ConnectionError("of an override"),
        TimeoutError("of an override"),
        ssl.SSLError(errno.EMFILE, "whose errno is a code of its own"),
    ]
    server = flaky(server_class)(LOCALHOST, do_nothing)
    server.errors.extend(errors)
    async with serving(server):
        start = trio.current_time()
        with knock(server):
            await trio.testing.wait_all_tasks_blocked()
            assert trio.current_time() - start < 0.001
            assert server.statistics().completed == 1
            assert server.statistics().accept_errors == len(errors)
    assert not caplog.records


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@pytest.mark.parametrize("name", ["EBADF", "EINVAL", "ENOTSOCK", "EOPNOTSUPP", "EFAULT"])
@bounded
async def test_promise_9_an_unusable_listener_propagates(
    server_class: type[Any], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = flaky(server_class)(LOCALHOST, do_nothing)
    error = system_error(name)
    server.errors.append(error)
    with (
        knock(server),
        pytest.raises(OSError, match=os.strerror(getattr(errno, name))) as caught,
    ):
        await serve(server)
    assert caught.value is error
    assert server.fileno() == -1
    assert server.statistics().accept_errors == 1
    assert not caplog.records


@bounded
async def test_promise_9_a_socket_that_does_not_listen_is_unusable() -> None:
    # The kernel reports such a socket as readable ("hung up").
    with socket.socket() as sock:
        sock.bind(LOCALHOST)
        server = TCPServer.from_socket(sock, do_nothing)
        with (
            pytest.raises(OSError, match="Invalid argument") as caught,
        ):
            await serve(server)
    assert caught.value.errno == errno.EINVAL


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Lower this process's limit to the descriptors that are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "server_class", [NurseryTCPServer, NurseryUnixStreamServer], ids=class_name
)
@bounded
async def test_promise_9_really_out_of_descriptors(
    server_class: type[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    server = server_class(bind_address(server_class, tmp_path), echo_lines)
    gc.collect()  # What it would close now and then, must not give a descriptor back.
    async with serving(server):
        with (
            connect(server.server_address) as served_already,
            socket.socket(server_class.address_family) as unlucky,
        ):
            served_already.sendall(b"before")
            assert await receive(served_already) == b"before"
            with no_descriptors_left():
                unlucky.connect(server.server_address)
                unlucky.sendall(b"let me in")
                for _ in range(10):
                    await trio.sleep(1)
                    # The one that is here does not notice.
                    served_already.sendall(b"meanwhile")
                    assert await receive(served_already) == b"meanwhile"
                assert server.statistics().accepted == 1
                # 10 ms to 640 ms, then once a second.
                assert 12 <= server.statistics().accept_errors <= 17
                assert len(caplog.records) == 1
            await trio.sleep(1)
            unlucky.setblocking(False)
            assert unlucky.recv(100) == b"let me in"
    [(level, message)] = records(caplog)
    assert level == "ERROR"
    assert "Too many open files" in message
    assert_sums_up(server)


# == 10. Nothing accepted is ownerless, and no loop starves the program ===================


class LoopSteps(trio.abc.Instrument):
    """Counts, for each step of the loop's task, the requests that it takes.

    Attributes:
        batches: those counts.
        others: the tasks that have run before each of those steps, since the one before.
    """

    def __init__(self) -> None:
        self.loop: trio.lowlevel.Task | None = None
        self.batches: list[int] = []
        self.others: list[set[trio.lowlevel.Task]] = []
        self._others: set[trio.lowlevel.Task] = set()

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self.loop:
            self.batches.append(0)
            self.others.append(self._others)
            self._others = set()
        else:
            self._others.add(task)


async def metronome(task_status: trio.TaskStatus[trio.lowlevel.Task]) -> None:
    """Run whenever the loop lets other tasks run."""
    task_status.started(trio.lowlevel.current_task())
    while True:
        await checkpoint()


@pytest.mark.parametrize(
    "server_class",
    [NurseryTCPServer, NurseryUnixStreamServer, NurseryUDPServer],
    ids=class_name,
)
@pytest.mark.parametrize("verdict", [True, False], ids=["handled", "rejected"])
@bounded
async def test_promise_10_at_most_64_requests_per_wake_up(
    server_class: type[Any], verdict: bool, tmp_path: Path
) -> None:
    class Server(server_class):  # type: ignore[misc]
        request_queue_size = 200

        async def get_request(self) -> tuple[Any, Any]:
            steps.loop = trio.lowlevel.current_task()
            if not steps.batches:
                steps.batches.append(0)
            taken = await super().get_request()
            steps.batches[-1] += 1
            return taken

        async def verify_request(self, request: Any, client_address: Any) -> bool:
            return verdict

    steps = LoopSteps()
    server = Server(bind_address(server_class, tmp_path), do_nothing)
    with contextlib.ExitStack() as clients:
        if issubclass(server_class, UDPServer):
            client = clients.enter_context(datagram_client(server))
            for _ in range(150):
                client.send(b"x")
        else:
            for _ in range(150):
                clients.enter_context(connect(server.server_address))
        with instrumented(steps):
            async with trio.open_nursery() as nursery:
                beat = await nursery.start(metronome)
                async with serving(server):
                    while server.statistics().accepted < 150:
                        await checkpoint()
                nursery.cancel_scope.cancel()
    assert [batch for batch in steps.batches if batch] == [64, 64, 22]
    # Between them every task that could run has had its turn. (trio shuffles each round of
    # tasks, so that it may come first in one and last in the next.)
    assert len(steps.others) >= 3
    for others, more in itertools.pairwise(steps.others):
        assert beat in others | more
    assert server.statistics().active == 0
    assert server.statistics().rejected == (0 if verdict else 150)
    assert_sums_up(server)


@pytest.mark.parametrize(
    "server_class", [TCPServer, NurseryTCPServer, NurseryUDPServer], ids=class_name
)
@bounded
async def test_promise_10_endless_errors_do_not_starve_the_program(
    server_class: type[Any],
) -> None:
    class Server(server_class):  # type: ignore[misc]
        async def get_request(self) -> tuple[Any, Any]:
            raise system_error("ECONNABORTED")

    server = Server(LOCALHOST, do_nothing)
    with knock(server):
        async with serving(server):
            while server.statistics().accept_errors < 200:
                before = server.statistics().accept_errors
                await checkpoint()
                assert server.statistics().accept_errors - before <= 64


@pytest.mark.parametrize("how", ["shutdown", "server_close"])
@each_server
@bounded
async def test_promise_10_stopped_at_every_step_nothing_accepted_is_lost(
    server_class: type[Any], how: str, tmp_path: Path
) -> None:
    async def be_client() -> None:
        await (talk_datagrams if datagrams else converse)(client)
        await trio.testing.wait_all_tasks_blocked()
        now.set()

    async def stop() -> None:
        await now.wait()
        await getattr(server, how)()

    datagrams = issubclass(server_class, UDPServer)
    base = DatagramRequestHandler if datagrams else StreamRequestHandler
    accepted = set()
    count = 0
    stopped = True
    while stopped:
        log: list[str] = []
        address = bind_address(server_class, tmp_path)
        server = server_class(address, noting_handler(base, log))
        now = trio.Event()
        at_step = AtStep(count, now.set, server)
        with (
            (
                datagram_client(server) if datagrams else connect(server.server_address)
            ) as client,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(be_client)
                with instrumented(at_step):
                    async with server:
                        nursery.start_soon(stop)
                        await server.serve_forever()
        stopped = at_step.fired
        statistics = server.statistics()
        assert statistics.completed == statistics.accepted
        assert (
            log == ["set up", "handled", "finish begins", "finished"] * statistics.accepted
        )
        accepted.add(statistics.accepted)
        count += 1
        assert count < 500
    assert count > 5
    assert 1 in accepted
