"""What a server and its worker processes say to each other, and how.

Over a socket pair for each worker. The server says single bytes, so saying never waits.
The worker says frames: a byte, a length, and that much of text. It says so from any
thread, and from children that it forks, so each is one packet, of limited length; and it
waits where the server does not listen, as for a log file. The server believes nothing that
is not listed here: a worker may have fewer rights than it. What the workers have counted is
not said at all, it is in memory that both see (`SharedCounters`).
"""

from __future__ import annotations

import collections
import contextlib
import enum
import os
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
    RETIRE = b"r"
    """End when there are no requests."""
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
    ENDING = b"e"
    """The server has been left; the process is about to end."""
    LOG = b"l"
    """This is to be logged; see `_worker_log`."""


HEADER = struct.Struct("=cI")

LINK_TYPE = socket.SOCK_STREAM if sys.platform == "darwin" else socket.SOCK_SEQPACKET
"""Packets, where there are any; else what children log may get mixed up."""

FRAME_LIMIT = 150_000
"""Bytes of a frame. Linux takes packets of 200 KB, unless it is told to take fewer."""


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a link: the server's, and the worker's."""
    ours, theirs = socket.socketpair(type=LINK_TYPE)
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * FRAME_LIMIT)
    return ours, theirs


class Frames:
    """The frames in a stream of bytes, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[News, bytes]]:
        """Take what has come; yield the frames that are complete now.

        Raises:
            ValueError: it makes no sense.
        """
        self._buffer += data
        while len(self._buffer) >= HEADER.size:
            word, size = HEADER.unpack_from(self._buffer)
            if size > FRAME_LIMIT:
                raise ValueError(f"a frame of {size} bytes")
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
        self._begin_anew()
        # A forked child of the worker's logs by this link too.
        os.register_at_fork(after_in_child=self._begin_anew)

    def _begin_anew(self) -> None:
        self._lock = threading.RLock()
        self._is_saying = False
        self._frames: collections.deque[bytes] = collections.deque()

    def hang_up(self) -> None:
        """Have `obey` find out that the server is gone."""
        with contextlib.suppress(OSError):  # ENOTCONN, EBADF: it has, or need not.
            self._sock.shutdown(socket.SHUT_RDWR)

    def detach(self) -> None:
        """Leave the socket open, without an owner."""
        self._sock.detach()

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._sock.fileno()

    def say(self, news: News, content: bytes = b"") -> None:
        """Tell the server something; from any thread, and from within itself.

        A signal handler, or the garbage collector, may call something that logs.
        """
        self._frames.append(HEADER.pack(news.value, len(content)) + content)
        with self._lock:
            if self._is_saying:
                return  # The caller that this has interrupted goes on.
            self._is_saying = True
            try:
                # Without a server there is nobody to tell, and the worker ends.
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    while self._frames:
                        self._sock.sendall(self._frames.popleft())
            finally:
                self._is_saying = False

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
