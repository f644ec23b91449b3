"""Servers of datagrams: UDP and Unix.

A request is the pair of a datagram and a `DatagramSocket` to reply on. There is no
connection, so nothing is shut down or closed after it; and nothing slows a sender down, so
the number of requests at a time is bounded even where that of connections is not. What
comes beyond stays in the kernel's queue, and what that cannot hold the kernel drops.
"""

from __future__ import annotations

import socket as socketlib
import struct
from typing import Any, Final

from ._life import Life, attend
from ._server import BaseServer
from ._sockets import DatagramSocket
from ._stream_servers import TCPServer

__all__ = ["UDPServer"]

DATAGRAM_TASKS: Final = 1000
"""Datagrams handled at once, unless the class says otherwise.

A task takes some 3 KB; the kernel's default queue holds a few hundred datagrams more.
"""

SO_MEMINFO: Final = 55
"""Linux: the socket's memory figures, nine 32-bit numbers (<linux/sock_diag.h>).

The socket module has no name for it.
"""
MEMINFO: Final = struct.Struct("=9I")
MEMINFO_DROPS: Final = 8


class UDPServer(TCPServer):
    """A server of UDP datagrams, one at a time.

    As `socketserver.UDPServer`. The handler's request is the pair of the datagram's bytes
    and a `DatagramSocket`.

    Args:
        server_address: the pair ``(host, port)``.
        RequestHandlerClass: the handler, see `BaseServer`.
        bind_and_activate: see `TCPServer`.
    """

    socket_type: int = socketlib.SOCK_DGRAM
    allow_reuse_address: bool = False

    max_packet_size: int = 8192
    """Bytes of a datagram that are delivered; a longer one is cut and counted."""

    share_tasks: bool = True
    """Whether datagrams that come together, and wait for nothing, share a task.

    One that waits for anything has a task of its own. So has each where ``get_request()``,
    ``verify_request()`` or ``process_request()`` is overridden. False is for handlers that
    leave something with their task, such as an open cancel scope.
    """

    _default_max_tasks = DATAGRAM_TASKS
    _run_handler = BaseServer._run_handler  # There is no TLS here.

    def _set_up(self) -> None:
        super()._set_up()
        self._sender: DatagramSocket | None = None
        self._dropped_before = 0

    def _check_context(self) -> None:
        if self.ssl_context is not None:
            name = type(self).__qualname__
            raise TypeError(f"{name} serves datagrams: there is no TLS, no ssl_context")

    def server_activate(self) -> None:
        """Do nothing: datagrams come to a bound socket."""

    async def get_request(self) -> tuple[Any, Any]:
        """Receive one datagram: ``((data, DatagramSocket), client_address)``.

        No checkpoint: what is received has an owner at once.

        Raises:
            BlockingIOError: nothing is queued (any more).
            OSError: recvfrom() failed; what follows of it is the loop's business.
        """
        size = self.max_packet_size
        # One byte more than wanted tells a cut datagram from one that fits.
        data, client_address = self.socket.recvfrom(size + 1)
        if len(data) > size:
            data = data[:size]
            self._counters.truncated_datagrams += 1
        sender = self._sender
        if sender is None or sender.socket is not self.socket:
            sender = self._sender = DatagramSocket(self.socket)
        return (data, sender), client_address

    _own_get_request: Any = get_request

    def _start_unseen(self, life: Life) -> None:
        if self.share_tasks and self._requests is not None:
            self._requests.start_shared(attend, self, self._handle, life)
        else:
            self._start(life)

    async def shutdown_request(self, request: Any) -> None:
        """Close the request, which does nothing. No checkpoint."""
        await self.close_request(request)

    async def close_request(self, request: Any) -> None:
        """Do nothing: a datagram has nothing to close. No checkpoint."""

    def _close_at_once(self, request: Any) -> bool:
        return (
            getattr(self.shutdown_request, "__func__", None) is _shutdown_request
            and getattr(self.close_request, "__func__", None) is _close_request
        )

    def _stop_listening(self) -> None:
        # Nothing is received any more; replies still leave by the socket.
        return

    def _close_listener(self) -> None:
        self._dropped_before = self._datagrams_dropped()
        super()._close_listener()

    def _datagrams_dropped(self) -> int:
        try:
            figures = self.socket.getsockopt(socketlib.SOL_SOCKET, SO_MEMINFO, MEMINFO.size)
            return int(MEMINFO.unpack(figures)[MEMINFO_DROPS])
        except (OSError, struct.error):
            # Closed, or a system that does not count, or counts fewer things.
            return self._dropped_before


_shutdown_request = UDPServer.shutdown_request
_close_request = UDPServer.close_request


if hasattr(socketlib, "AF_UNIX"):
    from ._stream_servers import UnixSocketFile

    __all__ += ["UnixDatagramServer"]

    class UnixDatagramServer(UnixSocketFile, UDPServer):
        """A server of Unix datagrams, one at a time.

        As `socketserver.UnixDatagramServer`, plus care for the socket's file. A client that
        wants a reply must bind its own socket to a name.

        Args:
            server_address: a path, a `pathlib.Path` too, or an abstract name that begins
                with a zero byte.
            RequestHandlerClass: the handler, see `BaseServer`.
            bind_and_activate: see `TCPServer`.
        """

        def _stop_listening(self) -> None:
            self._unlink_own_file()

        def _close_listener(self) -> None:
            self._unlink_own_file()
            super()._close_listener()
