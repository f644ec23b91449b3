"""The command: ``python -m trio_socketserver [HANDLER] --bind ADDRESS``.

What a user can get wrong ends with one line on stderr and exit code 2, before anything is
served; a traceback is for our own faults only.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from . import _combinations, _datagram_servers, _stream_servers
from ._handlers import DatagramRequestHandler, StreamRequestHandler
from ._run import GRACEFUL_TIMEOUT, run
from ._server import BaseServer, Handler

DEFAULT_BIND = "127.0.0.1:9999"

logger = logging.getLogger("trio_socketserver")


class EchoStream(StreamRequestHandler):
    """Send every line back."""

    async def handle(self) -> None:
        """Echo lines until the client, or the server, has had enough."""
        async for line in self.rfile:
            await self.wfile.write(line)


class EchoDatagram(DatagramRequestHandler):
    """Send every datagram back."""

    async def handle(self) -> None:
        """Echo the datagram."""
        self.wfile.write(self.packet)


class UsageError(Exception):
    """What the user can mend; the message is the line that is shown."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise ValueError
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


# argparse puts these names into its messages.
_seconds.__name__ = "number of seconds"
_count.__name__ = "count"


def make_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    parser = _Parser(
        prog="python -m trio_socketserver",
        description="Serve a request handler. Ctrl-C drains the server, twice stops it.",
    )
    parser.add_argument(
        "handler",
        metavar="HANDLER",
        nargs="?",
        help="module:attribute, a handler class or coroutine function (default: an echo)",
    )
    parser.add_argument(
        "--bind",
        metavar="ADDRESS",
        default=DEFAULT_BIND,
        help="host:port, [ipv6]:port or unix:/path (default: %(default)s)",
    )
    parser.add_argument("--udp", action="store_true", help="serve datagrams")
    parser.add_argument(
        "--dispatch",
        choices=["sequential", "nursery"],
        default="nursery",
        help="one request at a time, or a task for each (default: %(default)s)",
    )
    parser.add_argument(
        "--max-requests-at-once",
        metavar="N",
        type=_count,
        help="leave further requests to the kernel's queue",
    )
    parser.add_argument(
        "--graceful-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=GRACEFUL_TIMEOUT,
        help="how long stopping waits for requests (default: %(default)g)",
    )
    parser.add_argument(
        "--request-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long one request may take",
    )
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument(
        "-v", "--verbose", action="store_true", help="show peers' errors too"
    )
    volume.add_argument("-q", "--quiet", action="store_true", help="show errors only")
    return parser


def parse_address(text: str) -> tuple[int, Any]:
    """Read ``host:port``, ``[ipv6]:port`` or ``unix:/path``.

    Returns:
        The address family, and the address in the socket module's form.

    Raises:
        UsageError: it is none of these.
    """
    if text.startswith("unix:"):
        if not hasattr(socket, "AF_UNIX"):
            raise UsageError("this system has no Unix sockets")
        return socket.AF_UNIX, text.removeprefix("unix:")
    host, colon, port = text.rpartition(":")
    if not colon or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
        raise UsageError(
            f"bad address {text!r}: write host:port, [ipv6]:port or unix:/path"
        )
    if host.startswith("[") and host.endswith("]"):
        return socket.AF_INET6, (host[1:-1], int(port))
    if ":" in host:
        raise UsageError(f"bad address {text!r}: write an IPv6 address in brackets")
    return socket.AF_INET, (host, int(port))


def load_handler(name: str) -> Handler:
    """Import ``module:attribute``.

    Raises:
        UsageError: the name or what it stands for is not there, or cannot be imported.
    """
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise UsageError(f"bad handler {name!r}: write module:attribute")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UsageError(
            f"cannot import {module_name!r}: {type(error).__name__}: {error}"
        ) from error
    for attribute in path.split("."):
        try:
            found = getattr(found, attribute)
        except AttributeError as error:
            raise UsageError(f"module {module_name!r} has no {path!r}") from error
    handler: Handler = found
    return handler


def make_server(options: argparse.Namespace) -> BaseServer:
    """Make the server that the command line asks for.

    Raises:
        UsageError: it cannot be made.
    """
    family, address = parse_address(options.bind)
    unix = family == getattr(socket, "AF_UNIX", None)
    kind = ("Unix" if unix else "") + (
        ("Datagram" if unix else "UDP") if options.udp else ("Stream" if unix else "TCP")
    )
    server_class: Any
    if options.dispatch == "nursery":
        server_class = getattr(_combinations, f"Nursery{kind}Server")
    else:
        module = _datagram_servers if options.udp else _stream_servers
        server_class = getattr(module, f"{kind}Server")
    handler: Handler = EchoDatagram if options.udp else EchoStream
    if options.handler is not None:
        handler = load_handler(options.handler)
    configured = type(
        server_class.__name__,
        (server_class,),
        {
            "address_family": family,
            "graceful_timeout": options.graceful_timeout,
            "request_timeout": options.request_timeout,
        },
    )
    try:
        server: BaseServer = configured(address, handler)
    except TypeError as error:
        raise UsageError(str(error)) from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot bind {options.bind}: {reason}") from error
    if options.max_requests_at_once is not None:
        server.max_tasks = options.max_requests_at_once  # type: ignore[attr-defined]
    return server


def try_it(family: int, address: Any, *, udp: bool) -> str:
    """Return a shell command that talks to a server of lines or datagrams."""
    if isinstance(address, tuple):
        host, port = address[:2]
        # What is bound to every address can be reached at the local one.
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        address = (host, port)
    kind = "SOCK_DGRAM" if udp else "SOCK_STREAM"
    name = {
        socket.AF_INET: "AF_INET",
        socket.AF_INET6: "AF_INET6",
    }.get(socket.AddressFamily(family), "AF_UNIX")
    # A Unix client that wants an answer to a datagram needs a name of its own.
    bind = "s.bind(''); " if udp and name == "AF_UNIX" else ""
    return (
        f'{os.path.basename(sys.executable)} -c "from socket import *; '
        f"s = socket({name}, {kind}); {bind}s.connect({address!r}); "
        "s.send(b'hello\\n'); print(s.recv(99))\""
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what stands behind the program's name; None for `sys.argv`.

    Returns:
        The exit code: 0, or 2 for what the user can mend.
    """
    try:
        options = make_parser().parse_args(arguments)
        server = make_server(options)
    except UsageError as error:
        print(f"python -m trio_socketserver: {error}", file=sys.stderr)
        return 2
    level = logging.ERROR if options.quiet else logging.WARNING
    logging.basicConfig(
        level=logging.INFO if options.verbose else level,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    if not options.quiet:
        _announce(server, udp=options.udp)
    run(server)
    if not options.quiet:
        numbers = asdict(server.statistics())
        print(", ".join(f"{name} {n}" for name, n in numbers.items() if n) or "no requests")
    return 0


def _announce(server: Any, *, udp: bool) -> None:
    address = server.server_address
    shown = address
    if isinstance(address, tuple):
        host, port = address[:2]
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    elif isinstance(address, str):
        shown = f"unix:{address}"
    print(f"serving {server.RequestHandlerClass.__qualname__} on {shown}")
    print(f"try: {try_it(server.address_family, address, udp=udp)}", flush=True)
