"""What a server and its worker processes say to each other, and how.

Over a socket pair for each worker. The server says single bytes, so saying never waits.
The worker says frames: a byte, a length, and that much of text or of a pickle. It says so
from any thread, and from children that it forks, so each is one packet, and of limited
length; and it waits where the server does not listen, as for a log file. What the workers
have counted is not said at all: it is in memory that both see (`SharedCounters`).
"""

from __future__ import annotations

import contextlib
import enum
import logging
import logging.handlers
import os
import pickle
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator

import trio


class Order(enum.Enum):
    """What the server says to a worker."""

    STOP = b"s"
    """Accept no more; requests go on."""
    CLOSE = b"c"
    """Close the server, wait for its requests, and end."""
    CANCEL = b"x"
    """End."""


class News(enum.Enum):
    """What a worker says to the server."""

    READY = b"r"
    """It serves."""
    STOPPED = b"s"
    """It accepts no more."""
    SHUTDOWN = b"d"
    """A handler has called ``shutdown()``."""
    SERVER_CLOSE = b"c"
    """A handler has called ``server_close()``."""
    FAILED = b"f"
    """It ends, because of this error: a traceback."""
    LOG = b"l"
    """This is to be logged: the pickled attributes of a `logging.LogRecord`."""


HEADER = struct.Struct("=cI")

LINK_TYPE = socket.SOCK_STREAM if sys.platform == "darwin" else socket.SOCK_SEQPACKET
"""Packets, where there are any; else what children log may get mixed up."""

TEXT_LIMIT = 20_000
"""Characters of a message; the end of a longer one is what arrives.

Linux takes packets of 200 KB; a record has its message in it twice, and a character may be
4 bytes.
"""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a link."""
    return socket.socketpair(type=LINK_TYPE)


class Frames:
    """The frames in a stream of bytes, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[News, bytes]]:
        """Take what has come; yield the frames that are complete now."""
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            word, size = HEADER.unpack_from(self._buffer)
            end = HEADER.size + size
            if len(self._buffer) < end:
                break
            content = bytes(self._buffer[HEADER.size : end])
            del self._buffer[:end]
            yield News(word), content


class WorkerLink:
    """The worker's end."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._renew_lock()
        # A forked child of the worker's logs by this link too.
        os.register_at_fork(after_in_child=self._renew_lock)

    def _renew_lock(self) -> None:
        self._saying = threading.Lock()

    def detach(self) -> None:
        """Leave the socket open, without an owner."""
        self._sock.detach()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def say(self, news: News, content: bytes = b"") -> None:
        """Tell the server something; from any thread."""
        # Without a server there is nobody to tell, and the worker ends for that reason.
        with self._saying, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._sock.sendall(HEADER.pack(news.value, len(content)) + content)

    async def obey(self, obey: Callable[[Order], object]) -> None:
        """Call *obey* with what the server orders; to cancel if the server is gone."""
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                orders = self._sock.recv(16, socket.MSG_DONTWAIT)
            except ConnectionResetError:
                orders = b""
            if not orders:
                obey(Order.CANCEL)
                return
            for order in orders:
                obey(Order(bytes([order])))


PLAIN = frozenset({int, bool, float, type(None)})
"""What pickles, and is the same in the server. All else is logged as text."""


def _plain(value: object) -> object:
    if type(value) in PLAIN:
        return value
    return (value if type(value) is str else repr(value))[-TEXT_LIMIT:]


class LogToServer(logging.handlers.QueueHandler):
    """Have the server log what the worker logs, to where the program has configured."""

    def __init__(self, link: WorkerLink) -> None:
        super().__init__(link)  # type: ignore[arg-type]
        self._link = link

    def enqueue(self, record: logging.LogRecord) -> None:
        """Send a record, of which the base class has made a text already."""
        values = {name: _plain(value) for name, value in vars(record).items()}
        self._link.say(News.LOG, pickle.dumps(values))


def log_levels() -> dict[str | None, int]:
    """Return the levels that loggers have here, for a worker to have the same."""
    levels: dict[str | None, int] = {
        name: logger.level
        for name, logger in logging.root.manager.loggerDict.items()
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET
    }
    return levels | {None: logging.root.level}


def log_to_server(link: WorkerLink, levels: dict[str | None, int]) -> None:
    """Send what is logged to the server, unless what was imported has configured it."""
    if not logging.root.handlers:
        logging.root.addHandler(LogToServer(link))
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def log_for_worker(content: bytes) -> None:
    """Log what a worker has sent."""
    record = logging.makeLogRecord(pickle.loads(content))
    with contextlib.suppress(Exception):  # Filters and handlers are the user's.
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)
