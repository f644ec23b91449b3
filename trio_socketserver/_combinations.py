"""The ready-made classes: each mix-in in front of each server."""

from __future__ import annotations

import os
import socket

from ._datagram_servers import UDPServer
from ._nursery import NurseryMixIn
from ._stream_servers import TCPServer
from ._threading import ThreadingMixIn

__all__ = [
    "NurseryTCPServer",
    "NurseryUDPServer",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
]


class NurseryTCPServer(NurseryMixIn, TCPServer):
    """A server of TCP connections, with a task for each."""


class NurseryUDPServer(NurseryMixIn, UDPServer):
    """A server of UDP datagrams, with a task for each."""


class ThreadingTCPServer(ThreadingMixIn, TCPServer):
    """A server of TCP connections, with a thread for each."""


class ThreadingUDPServer(ThreadingMixIn, UDPServer):
    """A server of UDP datagrams, with a thread for each."""


if hasattr(os, "fork"):
    from ._forking import ForkingMixIn

    __all__ += ["ForkingTCPServer", "ForkingUDPServer"]

    class ForkingTCPServer(ForkingMixIn, TCPServer):
        """A server of TCP connections, with a child process for each."""

    class ForkingUDPServer(ForkingMixIn, UDPServer):
        """A server of UDP datagrams, with a child process for each."""


if hasattr(socket, "AF_UNIX"):
    from ._datagram_servers import UnixDatagramServer
    from ._stream_servers import UnixStreamServer

    __all__ += [
        "NurseryUnixDatagramServer",
        "NurseryUnixStreamServer",
        "ThreadingUnixDatagramServer",
        "ThreadingUnixStreamServer",
    ]

    class NurseryUnixStreamServer(NurseryMixIn, UnixStreamServer):
        """A server of Unix stream connections, with a task for each."""

    class NurseryUnixDatagramServer(NurseryMixIn, UnixDatagramServer):
        """A server of Unix datagrams, with a task for each."""

    class ThreadingUnixStreamServer(ThreadingMixIn, UnixStreamServer):
        """A server of Unix stream connections, with a thread for each."""

    class ThreadingUnixDatagramServer(ThreadingMixIn, UnixDatagramServer):
        """A server of Unix datagrams, with a thread for each."""

    if hasattr(os, "fork"):
        __all__ += ["ForkingUnixDatagramServer", "ForkingUnixStreamServer"]

        class ForkingUnixStreamServer(ForkingMixIn, UnixStreamServer):
            """A server of Unix stream connections, with a child process for each."""

        class ForkingUnixDatagramServer(ForkingMixIn, UnixDatagramServer):
            """A server of Unix datagrams, with a child process for each."""
