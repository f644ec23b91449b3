"""Python's ``socketserver``, ported to trio."""

from __future__ import annotations

import os
import socket

from ._combinations import (
    NurseryTCPServer,
    NurseryUDPServer,
    ThreadingTCPServer,
    ThreadingUDPServer,
)
from ._datagram_servers import UDPServer
from ._exceptions import (
    ChildFailed,
    ConnectionBroken,
    IncompleteRead,
    LineTooLong,
    RequestTimeout,
)
from ._handlers import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler
from ._nursery import NurseryMixIn
from ._run import run
from ._server import BaseServer
from ._sockets import DatagramSocket, StreamSocket
from ._statistics import ServerStatistics
from ._stdlib_servers import serve_blocking
from ._stream_servers import TCPServer
from ._threading import ThreadingMixIn

__all__ = [
    "BaseRequestHandler",
    "BaseServer",
    "ChildFailed",
    "ConnectionBroken",
    "DatagramRequestHandler",
    "DatagramSocket",
    "IncompleteRead",
    "LineTooLong",
    "NurseryMixIn",
    "NurseryTCPServer",
    "NurseryUDPServer",
    "RequestTimeout",
    "ServerStatistics",
    "StreamRequestHandler",
    "StreamSocket",
    "TCPServer",
    "ThreadingMixIn",
    "ThreadingTCPServer",
    "ThreadingUDPServer",
    "UDPServer",
    "run",
    "serve_blocking",
]

if hasattr(os, "fork"):
    from ._combinations import ForkingTCPServer, ForkingUDPServer
    from ._forking import ForkingMixIn
    from ._preforking import PreforkingMixIn

    __all__ += ["ForkingMixIn", "ForkingTCPServer", "ForkingUDPServer", "PreforkingMixIn"]

if hasattr(socket, "AF_UNIX"):
    from ._combinations import (
        NurseryUnixDatagramServer,
        NurseryUnixStreamServer,
        ThreadingUnixDatagramServer,
        ThreadingUnixStreamServer,
    )
    from ._datagram_servers import UnixDatagramServer
    from ._stream_servers import UnixStreamServer

    __all__ += [
        "NurseryUnixDatagramServer",
        "NurseryUnixStreamServer",
        "ThreadingUnixDatagramServer",
        "ThreadingUnixStreamServer",
        "UnixDatagramServer",
        "UnixStreamServer",
    ]

    if hasattr(os, "fork"):
        from ._combinations import ForkingUnixDatagramServer, ForkingUnixStreamServer

        __all__ += ["ForkingUnixDatagramServer", "ForkingUnixStreamServer"]
