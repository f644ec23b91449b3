"""A handler is set up, run and finished; finishing is shielded, bounded, hides no error."""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import socketserver
from collections.abc import Awaitable, Callable
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from helpers import REAL_LIMIT, STREAM_KINDS, ask, clog, connected, read_all
from trio.testing import assert_no_checkpoints, memory_stream_pair, wait_all_tasks_blocked

from trio_socketserver import (
    BaseRequestHandler,
    ConnectionBroken,
    DatagramRequestHandler,
    DatagramSocket,
    IncompleteRead,
    LineTooLong,
    NurseryTCPServer,
    NurseryUDPServer,
    RequestTimeout,
    StreamRequestHandler,
    StreamSocket,
)
from trio_socketserver._draining import Drain
from trio_socketserver._files import StreamReader, StreamWriter
from trio_socketserver._handlers import HandlerKind, handler_kind, run_handler
from trio_socketserver.testing import converse, serving

CLEANUP_TIMEOUT = 5.0

Step = Callable[[], Awaitable[None]]


async def nothing() -> None:
    """Succeed at once."""


def failing(error: BaseException) -> Step:
    """Return a step that fails with *error*."""

    async def step() -> None:
        raise error

    return step


class Scripted(BaseRequestHandler):
    """A handler whose phases are given, and that writes a log."""

    def __init__(
        self, *, setup: Step = nothing, handle: Step = nothing, finish: Step = nothing
    ) -> None:
        super().__init__(None, None, None)
        self.steps = {"setup": setup, "handle": handle, "finish": finish}
        self.log: list[str] = []

    async def _run(self, phase: str) -> None:
        self.log.append(phase)
        await self.steps[phase]()
        self.log.append(f"{phase} done")

    async def setup(self) -> None:
        await self._run("setup")

    async def handle(self) -> None:
        await self._run("handle")

    async def finish(self) -> None:
        await self._run("finish")


# -- the three phases -------------------------------------------------------------------


async def test_the_phases_come_in_order() -> None:
    handler = Scripted(
        setup=trio.lowlevel.checkpoint,
        handle=trio.lowlevel.checkpoint,
        finish=trio.lowlevel.checkpoint,
    )
    await run_handler(handler, CLEANUP_TIMEOUT)
    assert handler.log == [
        "setup",
        "setup done",
        "handle",
        "handle done",
        "finish",
        "finish done",
    ]


ERRORS: list[BaseException] = [
    ValueError("mine"),
    ConnectionBroken("the peer's"),
    ExceptionGroup("several", [ValueError()]),
    KeyboardInterrupt(),
    SystemExit(1),
    BaseExceptionGroup("mixed", [KeyboardInterrupt(), ValueError()]),
]
any_error = pytest.mark.parametrize("error", ERRORS, ids=repr)


@any_error
async def test_without_setup_there_is_nothing_to_finish(error: BaseException) -> None:
    handler = Scripted(setup=failing(error))
    with pytest.raises(type(error)) as caught:
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert caught.value is error
    assert handler.log == ["setup"]


@any_error
async def test_what_handle_raises_is_raised_when_finish_has_run(
    error: BaseException,
) -> None:
    handler = Scripted(handle=failing(error))
    with pytest.raises(type(error)) as caught:
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert caught.value is error
    assert handler.log == ["setup", "setup done", "handle", "finish", "finish done"]


@any_error
async def test_what_finish_raises_is_raised(error: BaseException) -> None:
    handler = Scripted(finish=failing(error))
    with pytest.raises(type(error)) as caught:
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert caught.value is error


def test_the_constructor_stores_its_arguments_and_does_nothing() -> None:
    for base in (BaseRequestHandler, StreamRequestHandler, DatagramRequestHandler):
        request, client_address, server = object(), object(), object()
        handler = base(request, client_address, server)
        assert vars(handler) == {
            "request": request,
            "client_address": client_address,
            "server": server,
        }


@pytest.mark.parametrize(
    "phase", ["setup", "handle", "finish"], ids=lambda phase: f"without {phase}"
)
async def test_the_base_class_does_nothing_without_a_checkpoint(phase: str) -> None:
    handler = BaseRequestHandler(None, None, None)
    with assert_no_checkpoints():
        await getattr(handler, phase)()
        await run_handler(handler, CLEANUP_TIMEOUT)


def test_only_the_names_of_the_standard_library_are_taken() -> None:
    """Whatever else a subclass calls its attributes, it is not in our way."""

    def names(cls: type) -> set[str]:
        return {name for name in dir(cls) if not name.startswith("_")}

    assert names(BaseRequestHandler) == names(socketserver.BaseRequestHandler)
    assert names(StreamRequestHandler) == {
        *names(socketserver.StreamRequestHandler),
        "max_line_size",
    }
    assert names(DatagramRequestHandler) == names(socketserver.DatagramRequestHandler)


async def test_another_writer_in_the_place_of_wfile_is_flushed() -> None:
    class Upper:
        def __init__(self, stream: trio.abc.SendStream) -> None:
            self.stream, self.held = stream, b""

        async def write(self, data: bytes) -> None:
            self.held += data.upper()

        async def flush(self) -> None:
            await self.stream.send_all(self.held)

    class Handler(StreamRequestHandler):
        wfile: Any

        async def setup(self) -> None:
            await super().setup()
            self.wfile = Upper(self.connection)

        async def handle(self) -> None:
            await self.wfile.write(b"hello")

    near, far = memory_stream_pair()
    await run_handler(Handler(near, None, None), CLEANUP_TIMEOUT)
    assert await far.receive_some() == b"HELLO"


async def test_a_setup_without_that_of_the_base_is_one_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Handler(StreamRequestHandler):
        async def setup(self) -> None:
            self.greeting = b"hello"

        async def handle(self) -> None:
            await self.wfile.write(self.greeting)

    with pytest.raises(AttributeError, match="wfile"):
        await run_handler(Handler(None, None, None), CLEANUP_TIMEOUT)
    assert not caplog.records


# -- finish() hides nothing -------------------------------------------------------------


@any_error
async def test_an_error_of_finish_never_hides_that_of_handle(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    handler = Scripted(handle=failing(error), finish=failing(ZeroDivisionError("second")))
    with pytest.raises(type(error)) as caught:
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert caught.value is error
    # It is our fault, so it is not lost either.
    (record,) = caplog.records
    assert record.name == "trio_socketserver"
    assert record.levelno == logging.ERROR
    assert "Scripted" in record.getMessage()
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


@any_error
async def test_one_reset_is_not_two_errors(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    handler = Scripted(handle=failing(error), finish=failing(ConnectionBroken("reset")))
    with pytest.raises(type(error)) as caught:
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert caught.value is error
    # Where the first error is not logged either, one quiet line tells of the second.
    expected = [] if isinstance(error, Exception) else [logging.INFO]
    assert [record.levelno for record in caplog.records] == expected


@any_error
async def test_a_log_that_fails_hides_nothing_either(error: BaseException) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ZeroDivisionError

    broken = Broken()
    logger = logging.getLogger("trio_socketserver")
    logger.addFilter(broken)
    try:
        handler = Scripted(handle=failing(error), finish=failing(ValueError()))
        with pytest.raises(type(error)) as caught:
            await run_handler(handler, CLEANUP_TIMEOUT)
    finally:
        logger.removeFilter(broken)
    assert caught.value is error


async def test_an_interrupt_in_finish_is_not_swallowed() -> None:
    handler = Scripted(
        handle=failing(ValueError("first")), finish=failing(KeyboardInterrupt())
    )
    with pytest.raises(KeyboardInterrupt):
        await run_handler(handler, CLEANUP_TIMEOUT)


@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError(), ConnectionBroken("reset"), ExceptionGroup("", [OSError()])],
)
async def test_a_cancellation_stays_one_whatever_finish_does(
    error: Exception, autojump_clock: Any
) -> None:
    handler = Scripted(handle=trio.sleep_forever, finish=failing(error))
    with trio.move_on_after(1) as scope:
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert scope.cancelled_caught
    assert handler.log[-1] == "finish"


# -- finish() is shielded, for a bounded time -------------------------------------------


async def test_a_cancelled_handler_can_say_goodbye(autojump_clock: Any) -> None:
    handler = Scripted(handle=trio.sleep_forever, finish=functools.partial(trio.sleep, 3))
    with trio.move_on_after(1) as scope:
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert scope.cancelled_caught
    assert handler.log[-1] == "finish done"
    assert trio.current_time() == 4


async def test_finish_is_shielded_after_success_too(autojump_clock: Any) -> None:
    handler = Scripted(finish=functools.partial(trio.sleep, 3))
    with trio.move_on_after(1):
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert handler.log[-1] == "finish done"
    assert trio.current_time() == 3


async def test_a_finish_that_takes_too_long_is_cut(autojump_clock: Any) -> None:
    handler = Scripted(finish=trio.sleep_forever)
    with pytest.raises(RequestTimeout, match=r"finish\(\) took longer than 5 s"):
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert trio.current_time() == CLEANUP_TIMEOUT
    assert handler.log[-1] == "finish"


async def test_a_cancelled_handlers_finish_is_cut_too(
    autojump_clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    handler = Scripted(handle=trio.sleep_forever, finish=trio.sleep_forever)
    with trio.move_on_after(1) as scope:
        await run_handler(handler, 2.5)
    assert scope.cancelled_caught
    assert trio.current_time() == 3.5
    # Nothing else would tell that it has not finished.
    (record,) = caplog.records
    assert "finish() took longer than 2.5 s" in record.getMessage()


async def test_an_error_waits_no_longer_than_that_for_finish(autojump_clock: Any) -> None:
    handler = Scripted(handle=failing(ValueError("first")), finish=trio.sleep_forever)
    with pytest.raises(ValueError, match="first"):
        await run_handler(handler, CLEANUP_TIMEOUT)
    assert trio.current_time() == CLEANUP_TIMEOUT


@pytest.mark.parametrize(
    "base", [BaseRequestHandler, StreamRequestHandler, DatagramRequestHandler]
)
async def test_a_finish_given_to_the_object_counts(base: Any, autojump_clock: Any) -> None:
    finished = []

    class Handler(base):  # type: ignore[misc]
        async def setup(self) -> None:
            if base is not BaseRequestHandler:
                await super().setup()
            self.finish = self.say_goodbye

        async def handle(self) -> None:
            await trio.sleep_forever()

        async def say_goodbye(self) -> None:
            await trio.sleep(3)
            finished.append(True)

    stream, _ = memory_stream_pair()
    request = stream if base is not DatagramRequestHandler else (b"", None)
    with trio.move_on_after(1):
        await run_handler(Handler(request, None, None), CLEANUP_TIMEOUT)
    assert finished == [True]


# -- StreamRequestHandler ---------------------------------------------------------------


class Greeter(StreamRequestHandler):
    """One text for every stream."""

    wbufsize = 100
    disable_nagle_algorithm = True
    timeout = 3

    async def handle(self) -> None:
        name = (await self.rfile.readline()).strip()
        await self.wfile.write(b"hello " + name + b"\n")


STREAMS = (*STREAM_KINDS, "memory")


@contextlib.asynccontextmanager
async def stream_of(kind: str) -> Any:
    """Yield a stream, a function that sends to it, and one that takes what it has sent."""
    if kind == "memory":
        near, far = memory_stream_pair()

        async def taken() -> bytes:
            with trio.move_on_after(0.1):
                return bytes(await far.receive_some(1000))
            return b""

        yield near, far.send_all, taken
        return
    with connected(kind) as (ours, theirs):

        async def send(data: bytes) -> None:
            theirs.sendall(data)

        async def taken() -> bytes:
            return read_all(theirs)

        yield StreamSocket(ours), send, taken


@pytest.mark.parametrize("kind", STREAMS)
async def test_one_text_serves_every_stream(kind: str, autojump_clock: Any) -> None:
    async with stream_of(kind) as (stream, send, taken):
        await send(b"world\n")
        await run_handler(Greeter(stream, "address", None), CLEANUP_TIMEOUT)
        assert await taken() == b"hello world\n"

        with pytest.raises(RequestTimeout):
            await run_handler(Greeter(stream, "address", None), CLEANUP_TIMEOUT)


def test_has_the_attributes_of_the_standard_librarys() -> None:
    theirs = socketserver.StreamRequestHandler
    for name in ("rbufsize", "wbufsize", "timeout", "disable_nagle_algorithm"):
        assert getattr(StreamRequestHandler, name) == getattr(theirs, name)
    assert StreamRequestHandler.max_line_size == 1024 * 1024


@pytest.mark.parametrize("kind", STREAMS)
async def test_setup_makes_the_files_without_a_checkpoint(kind: str) -> None:
    async with stream_of(kind) as (stream, _, _):
        handler = StreamRequestHandler(stream, "address", None)
        with assert_no_checkpoints():
            await handler.setup()
        assert handler.connection is handler.request is stream
        assert isinstance(handler.rfile, StreamReader)
        assert isinstance(handler.wfile, StreamWriter)


async def test_nagles_algorithm() -> None:
    for disabled in (True, False):

        class Handler(StreamRequestHandler):
            disable_nagle_algorithm = disabled

        with connected("tcp") as (ours, _):
            await Handler(StreamSocket(ours), None, None).setup()
            option = ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert bool(option) is disabled


async def test_a_handler_without_a_timeout_leaves_the_connections_alone() -> None:
    with connected("unix") as (ours, _):
        stream = StreamSocket(ours)
        stream.settimeout(7)
        await StreamRequestHandler(stream, None, None).setup()
        assert stream.gettimeout() == 7
        await Greeter(stream, None, None).setup()
        assert stream.gettimeout() == 3


async def test_the_sizes_are_the_files_sizes() -> None:
    class Handler(StreamRequestHandler):
        rbufsize = 0
        wbufsize = 4
        max_line_size = 5

    with connected("unix") as (ours, theirs), trio.fail_after(REAL_LIMIT):
        theirs.send(b"1\nrest too long")
        handler = Handler(StreamSocket(ours), None, None)
        await handler.setup()
        assert await handler.rfile.readline() == b"1\n"
        assert ours.recv(5, socket.MSG_PEEK) == b"rest "
        with pytest.raises(LineTooLong):
            await handler.rfile.readline()
        await handler.wfile.write(b"abc")
        assert handler.wfile.pending == 3
        await handler.wfile.write(b"d")
        assert read_all(theirs) == b"abcd"


class Buffered(StreamRequestHandler):
    wbufsize = -1
    error: BaseException | None = None
    wait = 0.0

    async def handle(self) -> None:
        await self.wfile.write(b"half an answer")
        await trio.sleep(self.wait)
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, ValueError("failed")])
async def test_what_was_written_is_flushed_at_the_end(error: Exception | None) -> None:
    with connected("unix") as (ours, theirs):
        handler = Buffered(StreamSocket(ours), None, None)
        handler.error = error
        expected = pytest.raises(ValueError, match="failed") if error else None
        with expected or contextlib.nullcontext():
            await run_handler(handler, CLEANUP_TIMEOUT)
        assert read_all(theirs) == b"half an answer"


async def test_what_was_written_is_flushed_by_a_cancelled_handler(
    autojump_clock: Any,
) -> None:
    with connected("unix") as (ours, theirs):
        handler = Buffered(StreamSocket(ours), None, None)
        handler.wait = 10
        with trio.move_on_after(1) as scope:
            await run_handler(handler, CLEANUP_TIMEOUT)
        assert scope.cancelled_caught
        assert read_all(theirs) == b"half an answer"


async def test_a_peer_that_does_not_read_cannot_hold_the_flush(autojump_clock: Any) -> None:
    with connected("unix", small_buffers=True) as (ours, _):
        clog(ours)
        handler = Buffered(StreamSocket(ours), None, None)
        with pytest.raises(RequestTimeout):
            await run_handler(handler, CLEANUP_TIMEOUT)
        assert trio.current_time() == CLEANUP_TIMEOUT


async def test_the_servers_draining_reaches_rfile(autojump_clock: Any) -> None:
    near, _ = memory_stream_pair()
    server = SimpleNamespace(_drain=Drain())
    handler = StreamRequestHandler(near, None, server)
    await handler.setup()
    ended = []

    async def iterate() -> None:
        async for _ in handler.rfile:
            raise AssertionError
        ended.append(True)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(iterate)
            await trio.sleep(10)
            server._drain.begin()
    assert ended == [True]


@pytest.mark.parametrize(
    "server", [None, SimpleNamespace(), SimpleNamespace(_drain="mine")]
)
async def test_runs_without_a_server_of_ours(server: Any) -> None:
    near, far = memory_stream_pair()
    await far.send_all(b"a\nb\n")
    await far.send_eof()
    handler = StreamRequestHandler(near, None, server)
    await handler.setup()
    assert [line async for line in handler.rfile] == [b"a\n", b"b\n"]


@pytest.mark.parametrize("written", [b"", b"something"])
async def test_an_overridden_finish_may_call_ours(written: bytes) -> None:
    class Handler(StreamRequestHandler):
        wbufsize = -1

        async def handle(self) -> None:
            if written:
                await self.wfile.write(written)

        async def finish(self) -> None:
            with contextlib.nullcontext() if written else assert_no_checkpoints():
                await super().finish()
            assert self.wfile.pending == 0
            await self.connection.send_all(b" and bye")

    with connected("unix") as (ours, theirs):
        await run_handler(Handler(StreamSocket(ours), None, None), CLEANUP_TIMEOUT)
        assert read_all(theirs) == written + b" and bye"


async def test_through_a_server() -> None:
    class Exact(StreamRequestHandler):
        async def handle(self) -> None:
            try:
                await self.rfile.readexactly(10)
            except IncompleteRead as error:
                await self.wfile.write(error.partial.upper())

    with trio.fail_after(REAL_LIMIT):
        server = NurseryTCPServer(("127.0.0.1", 0), Exact)
        async with serving(server):
            assert await ask(server, b"short") == b"SHORT"
        assert await converse(Exact, b"short") == b"SHORT"


# -- DatagramRequestHandler -------------------------------------------------------------


@pytest.fixture
def datagram_sockets() -> Any:
    with contextlib.ExitStack() as stack:
        pair = []
        for _ in range(2):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            sock.setblocking(False)
            sock.bind("")
            pair.append(sock)
        yield pair


def replies(sock: socket.socket) -> list[bytes]:
    """Return the datagrams that *sock* holds."""
    received = []
    with contextlib.suppress(BlockingIOError):
        while True:
            received.append(sock.recv(1000))
    return received


def datagram_handler(
    sockets: list[socket.socket], handle: Callable[[Any], Awaitable[None]]
) -> DatagramRequestHandler:
    """Return a handler of a datagram that the second of *sockets* has sent to the first."""

    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            await handle(self)

    ours, theirs = sockets
    return Handler((b"ping", DatagramSocket(ours)), theirs.getsockname(), None)


async def test_has_the_files_of_the_standard_librarys(datagram_sockets: Any) -> None:
    async def handle(self: Any) -> None:
        assert self.packet == b"ping"
        assert isinstance(self.socket, DatagramSocket)
        assert type(self.rfile) is type(self.wfile) is BytesIO
        self.wfile.write(self.rfile.read().upper())

    await run_handler(datagram_handler(datagram_sockets, handle), CLEANUP_TIMEOUT)
    assert replies(datagram_sockets[1]) == [b"PING"]


async def test_no_reply_where_nothing_was_written(datagram_sockets: Any) -> None:
    async def handle(self: Any) -> None:
        self.wfile.write(b"")

    await run_handler(datagram_handler(datagram_sockets, handle), CLEANUP_TIMEOUT)
    assert replies(datagram_sockets[1]) == []


@pytest.mark.parametrize("error", [ValueError("failed"), KeyboardInterrupt()], ids=repr)
async def test_no_reply_from_a_handler_that_failed(
    datagram_sockets: Any, error: BaseException
) -> None:
    async def handle(self: Any) -> None:
        self.wfile.write(b"half")
        raise error

    with pytest.raises(type(error)):
        await run_handler(datagram_handler(datagram_sockets, handle), CLEANUP_TIMEOUT)
    assert replies(datagram_sockets[1]) == []


async def test_no_reply_from_a_handler_that_was_cancelled(
    datagram_sockets: Any, autojump_clock: Any
) -> None:
    async def handle(self: Any) -> None:
        self.handled = True  # The name is the user's.
        self.wfile.write(b"half")
        await trio.sleep_forever()

    with trio.move_on_after(1):
        await run_handler(datagram_handler(datagram_sockets, handle), CLEANUP_TIMEOUT)
    assert replies(datagram_sockets[1]) == []


async def test_the_reply_is_all_that_was_written_wherever_wfile_stands(
    datagram_sockets: Any,
) -> None:
    async def handle(self: Any) -> None:
        self.wfile.write(b"xbc")
        self.wfile.seek(0)
        self.wfile.write(b"a")
        self.wfile.seek(0)

    await run_handler(datagram_handler(datagram_sockets, handle), CLEANUP_TIMEOUT)
    assert replies(datagram_sockets[1]) == [b"abc"]


@pytest.mark.parametrize("rewind", [False, True])
async def test_a_full_peer_holds_its_reply_for_a_bounded_time(
    datagram_sockets: Any, rewind: bool, autojump_clock: Any
) -> None:
    ours, theirs = datagram_sockets
    with pytest.raises(BlockingIOError):  # noqa: PT012
        while True:
            ours.sendto(b"filler", theirs.getsockname())

    async def handle(self: Any) -> None:
        self.wfile.write(b"pong")
        if rewind:
            self.wfile.seek(0)

    # Cancelled or not, the reply has its time.
    with trio.move_on_after(1):
        with pytest.raises(RequestTimeout, match="5 s"):
            await run_handler(datagram_handler(datagram_sockets, handle), CLEANUP_TIMEOUT)
    assert trio.current_time() == CLEANUP_TIMEOUT

    async with trio.open_nursery() as nursery:
        handler = datagram_handler(datagram_sockets, handle)
        nursery.start_soon(run_handler, handler, CLEANUP_TIMEOUT)
        await trio.sleep(2)
        filler = replies(theirs)
        assert set(filler) == {b"filler"}
    assert replies(theirs) == [b"pong"]
    assert trio.current_time() < CLEANUP_TIMEOUT + 2.1


async def test_a_reply_to_nobody_is_the_peers_fault(datagram_sockets: Any) -> None:
    async def handle(self: Any) -> None:
        self.client_address = None
        self.wfile.write(b"pong")

    with pytest.raises(ConnectionBroken):
        await run_handler(datagram_handler(datagram_sockets, handle), CLEANUP_TIMEOUT)


@pytest.mark.parametrize("reply", [[], [b"pong"]])
async def test_an_overridden_finish_decides_itself(
    datagram_sockets: Any, reply: list[bytes]
) -> None:
    class Handler(DatagramRequestHandler):
        async def handle(self) -> None:
            self.wfile.writelines(reply)

        async def finish(self) -> None:
            await super().finish()
            await self.socket.sendto(b"and bye", self.client_address)

    ours, theirs = datagram_sockets
    request = (b"ping", DatagramSocket(ours))
    await run_handler(Handler(request, theirs.getsockname(), None), CLEANUP_TIMEOUT)
    assert replies(theirs) == [*reply, b"and bye"]


async def test_replies_through_a_server_while_it_closes() -> None:
    asked, go = trio.Event(), trio.Event()

    class Slow(DatagramRequestHandler):
        async def handle(self) -> None:
            asked.set()
            await go.wait()
            self.wfile.write(self.packet.upper())

    answers = []

    async def client(server: Any) -> None:
        answers.append(await ask(server, b"late"))

    with trio.fail_after(REAL_LIMIT):
        server = NurseryUDPServer(("127.0.0.1", 0), Slow)
        async with trio.open_nursery() as nursery, server:
            await nursery.start(server.serve_forever)
            nursery.start_soon(client, server)
            await asked.wait()
            nursery.start_soon(server.server_close)
            await wait_all_tasks_blocked()
            go.set()
    assert answers == [b"LATE"]
    assert server.statistics().completed == 1


# -- what kind of handler it is ---------------------------------------------------------


class Asynchronous(StreamRequestHandler):
    """An asynchronous handler."""


class Old(socketserver.StreamRequestHandler):
    """A handler of the standard library, unmodified."""


class HalfPorted(socketserver.StreamRequestHandler):
    """One whose base class was forgotten."""

    async def handle(self) -> None:  # type: ignore[override]
        """Do nothing."""


class DuckTyped:
    """The protocol without the base class."""

    def __init__(self, request: Any, client_address: Any, server: Any) -> None:
        """Do nothing."""


async def coroutine_function(request: Any, client_address: Any, server: Any) -> None:
    """Do nothing."""


def function(request: Any, client_address: Any, server: Any) -> None:
    """Do nothing."""


class Application:
    """Something with methods that handle requests."""

    async def asynchronous(self, request: Any, client_address: Any, server: Any) -> None:
        """Do nothing."""

    def blocking(self, request: Any, client_address: Any, server: Any) -> None:
        """Do nothing."""

    async def __call__(self, request: Any, client_address: Any, server: Any) -> None:
        """Do nothing."""


@functools.wraps(Asynchronous, updated=())
async def function_around_a_class(*arguments: Any) -> None:
    """Do nothing."""


@functools.wraps(Asynchronous, updated=())
def factory(*arguments: Any) -> Asynchronous:
    return Asynchronous(*arguments)


KINDS: dict[str, tuple[Any, HandlerKind]] = {
    "our class": (Asynchronous, HandlerKind.ASYNC_CLASS),
    "our base class": (BaseRequestHandler, HandlerKind.ASYNC_CLASS),
    "partial of our class": (functools.partial(Asynchronous), HandlerKind.ASYNC_CLASS),
    "factory that wraps our class": (factory, HandlerKind.ASYNC_CLASS),
    "coroutine function": (coroutine_function, HandlerKind.ASYNC_FUNCTION),
    "partial": (functools.partial(coroutine_function), HandlerKind.ASYNC_FUNCTION),
    "bound method": (Application().asynchronous, HandlerKind.ASYNC_FUNCTION),
    "callable object": (Application(), HandlerKind.ASYNC_FUNCTION),
    "coroutine function that wraps a class": (
        function_around_a_class,
        HandlerKind.ASYNC_FUNCTION,
    ),
    "class of callable objects": (Application, HandlerKind.BLOCKING),
    "standard library's class": (Old, HandlerKind.BLOCKING),
    "partial of that": (functools.partial(Old, server=None), HandlerKind.BLOCKING),
    "any class": (DuckTyped, HandlerKind.BLOCKING),
    "function": (function, HandlerKind.BLOCKING),
    "blocking method": (Application().blocking, HandlerKind.BLOCKING),
    "lambda": (lambda *arguments: coroutine_function(*arguments), HandlerKind.BLOCKING),
    "lambda that makes ours": (lambda *a: Asynchronous(*a), HandlerKind.BLOCKING),
}


@pytest.mark.parametrize(("candidate", "kind"), KINDS.values(), ids=KINDS)
def test_a_handler_is_judged_by_what_it_wraps(candidate: Any, kind: HandlerKind) -> None:
    assert handler_kind(candidate) is kind


@pytest.mark.parametrize(
    "wrap", [lambda cls: cls, functools.partial], ids=["bare", "partial"]
)
@pytest.mark.parametrize("phase", ["setup", "handle", "finish"])
def test_asynchronous_phases_that_nobody_would_await_are_refused(
    wrap: Callable[[type], Any], phase: str
) -> None:
    for base in (socketserver.BaseRequestHandler, object):
        half_ported = type("HalfPorted", (base,), {phase: coroutine_function})
        with pytest.raises(
            TypeError, match=rf"HalfPorted\.{phase} .* StreamRequestHandler"
        ):
            handler_kind(wrap(half_ported))


async def async_generator(*arguments: Any) -> Any:
    yield


class Generating:
    async def __call__(self, *arguments: Any) -> Any:
        yield


@pytest.mark.parametrize(
    "candidate",
    [async_generator, functools.partial(async_generator), Generating()],
    ids=["bare", "partial", "callable object"],
)
def test_an_async_generator_that_nobody_would_run_is_refused(candidate: Any) -> None:
    with pytest.raises(TypeError, match=r"is an async generator.* do not 'yield'"):
        handler_kind(candidate)


@pytest.mark.parametrize("phase", ["setup", "handle", "finish"])
def test_phases_that_are_async_generators_are_refused(phase: str) -> None:
    half_ported = type("HalfPorted", (), {phase: async_generator})
    with pytest.raises(TypeError, match=rf"HalfPorted\.{phase} .* StreamRequestHandler"):
        handler_kind(half_ported)


@pytest.mark.parametrize("candidate", [None, 42, "module:Handler", Asynchronous(1, 2, 3)])
def test_what_cannot_be_called_is_no_handler(candidate: Any) -> None:
    with pytest.raises(TypeError, match="callable"):
        handler_kind(candidate)


def test_every_kind_is_met() -> None:
    assert {kind for _, kind in KINDS.values()} == set(HandlerKind)
