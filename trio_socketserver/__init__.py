"""Python's ``socketserver``, ported to trio."""

from __future__ import annotations

import socket

from ._combinations import NurseryTCPServer, NurseryUDPServer
from ._datagram_servers import UDPServer
from ._exceptions import ConnectionBroken, IncompleteRead, LineTooLong, RequestTimeout
from ._handlers import BaseRequestHandler, DatagramRequestHandler, StreamRequestHandler
from ._nursery import NurseryMixIn
from ._run import run
from ._server import BaseServer
from ._sockets import DatagramSocket, StreamSocket
from ._statistics import ServerStatistics
from ._stream_servers import TCPServer

__all__ = [
    "BaseRequestHandler",
    "BaseServer",
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
    "UDPServer",
    "run",
]

if hasattr(socket, "AF_UNIX"):
    from ._combinations import NurseryUnixDatagramServer, NurseryUnixStreamServer
    from ._datagram_servers import UnixDatagramServer
    from ._stream_servers import UnixStreamServer

    __all__ += [
        "NurseryUnixDatagramServer",
        "NurseryUnixStreamServer",
        "UnixDatagramServer",
        "UnixStreamServer",
    ]
