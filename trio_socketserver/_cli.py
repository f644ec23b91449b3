"""The command: ``python -m trio_socketserver [HANDLER] --bind ADDRESS``.

What a user can get wrong ends with one line on stderr and exit code 2, before anything is
served; a traceback is for our own faults only.
"""

from __future__ import annotations

import argparse
import copyreg
import functools
import importlib
import ipaddress
import logging
import math
import operator
import re
import shlex
import shutil
import socket
import ssl
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, NoReturn

import trio_socketserver

from ._activation import take_listen_fds
from ._colour import innermost
from ._handlers import (
    DatagramRequestHandler,
    HandlerKind,
    StreamRequestHandler,
    handler_kind,
)
from ._preforking import pickled
from ._run import GRACEFUL_TIMEOUT, run
from ._server import BaseServer, Handler

PROGRAM: Final = "python -m trio_socketserver"
DEFAULT_BIND: Final = "127.0.0.1:9999"
LARGEST_PORT: Final = 65535

INTERNET_ADDRESS: Final = re.compile(
    r"(?:\[(?P<ipv6>[^]]*)\]|(?P<host>[^][:\s]*)):(?P<port>[0-9]{1,5})"
)


DISPATCH: Final = {
    "sequential": ("", None),
    "nursery": ("Nursery", "max_tasks"),
    "threading": ("Threading", "max_threads"),
    "forking": ("Forking", "max_children"),
}
"""What begins the name of the server's class, and the name of its limit."""


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
    # run() puts its own bound in the place of an infinite one.
    if not 0 < seconds < math.inf:
        raise ValueError
    return seconds


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count


def _descriptor(text: str) -> int:
    descriptor = int(text)
    if descriptor < 0:
        raise ValueError
    return descriptor


# argparse puts these names into its messages.
_seconds.__name__ = "number of seconds"
_count.__name__ = "count"
_descriptor.__name__ = "descriptor"


def make_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser. Its help fits a screen of 80 x 24."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [OPTIONS] [HANDLER]",
        description="Serve a request handler. Ctrl-C drains the server, twice cancels it.",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=31),
    )
    parser.add_argument(
        "handler",
        metavar="HANDLER",
        nargs="?",
        help="module:attribute, class or function (default: echo)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--bind",
        metavar="ADDRESS",
        help=f"[host]:port or unix:/path ({DEFAULT_BIND})",
    )
    where.add_argument(
        "--fd",
        metavar="N",
        type=_descriptor,
        help="a listening socket (LISTEN_FDS is honoured too)",
    )
    parser.add_argument("--udp", action="store_true", help="serve datagrams")
    parser.add_argument(
        "--dispatch",
        metavar="HOW",
        choices=list(DISPATCH),
        help="%(choices)s",
    )
    parser.add_argument(
        "--workers", metavar="N", type=_count, help="serve in so many processes"
    )
    parser.add_argument(
        "--max-requests-at-once",
        metavar="N",
        type=_count,
        help="in each worker; the kernel queues the rest",
    )
    parser.add_argument(
        "--graceful-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=GRACEFUL_TIMEOUT,
        help="how long draining may take (%(default)g)",
    )
    parser.add_argument(
        "--request-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long one request may take",
    )
    parser.add_argument(
        "--tls-cert", metavar="FILE", help="speak TLS, with this certificate chain"
    )
    parser.add_argument(
        "--tls-key", metavar="FILE", help="its key, if it is not in the same file"
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
    bad = UsageError(f"bad address {text!r}: write host:port, [ipv6]:port or unix:/path")
    if text.startswith("unix:"):
        if not hasattr(socket, "AF_UNIX"):
            raise UsageError("this system has no Unix sockets")
        if text == "unix:":
            raise bad
        return socket.AF_UNIX, text.removeprefix("unix:")
    match = INTERNET_ADDRESS.fullmatch(text)
    if match is None or (port := int(match["port"])) > LARGEST_PORT:
        raise bad
    family = socket.AF_INET if match["ipv6"] is None else socket.AF_INET6
    host = match["host"] if family == socket.AF_INET else match["ipv6"]
    try:
        if family == socket.AF_INET:
            host.encode("idna")
        else:
            ipaddress.IPv6Address(host)
    except ValueError as error:
        raise bad from error
    return family, (host, port)


def load_handler(name: str) -> Handler:
    """Import ``module:attribute``.

    Raises:
        UsageError: there is no such thing, or its module cannot be imported.
    """
    module_name, _, path = name.partition(":")
    if not (module_name and path):
        raise UsageError(f"bad handler {name!r}: write module:attribute")
    try:
        handler: Handler = operator.attrgetter(path)(importlib.import_module(module_name))
    except (Exception, SystemExit) as error:
        # What ends an import, a script's sys.exit() included, is the module's fault.
        raise UsageError(
            f"cannot load {name!r}: {type(error).__name__}: {error}"
        ) from error
    return handler


def make_context(certificate: str, key: str | None) -> ssl.SSLContext:
    """Make the context of a server that speaks TLS.

    Raises:
        UsageError: the files do not hold what they should.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:
        files = certificate if key is None else f"{certificate} and {key}"
        reason = error.strerror or error
        raise UsageError(f"cannot load a certificate from {files}: {reason}") from error
    return context


def _tls_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return what the server's constructor takes, if it is to speak TLS."""
    if options.tls_cert is None:
        if options.tls_key is not None:
            raise UsageError("--tls-key needs --tls-cert")
        return {}
    if options.udp:
        raise UsageError("there is no TLS for datagrams: --tls-cert or --udp")
    # Importable, for servers whose workers are processes.
    make = functools.partial(make_context, options.tls_cert, options.tls_key)
    return {"ssl_context": make}


def inherited_socket(options: argparse.Namespace) -> socket.socket | None:
    """Return the socket that was given by ``--fd`` or a service manager, if one was.

    Raises:
        UsageError: it cannot be served.
    """
    descriptor, descriptors = options.fd, take_listen_fds()
    if descriptor is None and options.bind is None:
        if descriptors[1:]:
            raise UsageError("there are several LISTEN_FDS: only one can be served")
        descriptor = descriptors[0] if descriptors else None
    if descriptor is None:
        return None
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        reason = error.strerror
        raise UsageError(f"cannot serve descriptor {descriptor}: {reason}") from error
    try:
        check_served(sock, datagrams=options.udp)
    except UsageError as error:
        sock.detach()  # It is not ours.
        raise UsageError(f"cannot serve descriptor {descriptor}: {error}") from None
    sock.set_inheritable(False)
    return sock


def check_served(sock: socket.socket, *, datagrams: bool) -> None:
    """Find out whether a socket is one that a server can have.

    Raises:
        UsageError: it is not.
    """
    families = {socket.AF_INET, socket.AF_INET6, getattr(socket, "AF_UNIX", None)}
    if sock.family not in families:
        raise UsageError("it is of another family")
    if sock.type == socket.SOCK_DGRAM:
        if sock.family != getattr(socket, "AF_UNIX", None) and not sock.getsockname()[1]:
            raise UsageError("it is not bound")
    elif sock.type != socket.SOCK_STREAM or datagrams:
        raise UsageError("it is of another type")
    elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise UsageError("it does not listen")


class _Made(type):
    """The type of the classes made here, which pickle as how they were made."""

    made_of: tuple[str, dict[str, Any]]


def make_class(name: str, attributes: dict[str, Any]) -> Any:
    """Make a server class.

    Args:
        name: that of the public class to derive it from.
        attributes: what it has instead; with "workers", it is a pre-forking one.
    """
    bases: tuple[type, ...] = (getattr(trio_socketserver, name),)
    if "workers" in attributes:
        bases = (trio_socketserver.PreforkingMixIn, *bases)
    made = _Made(name, bases, attributes)
    made.made_of = name, attributes
    return made


copyreg.pickle(_Made, lambda made: (make_class, made.made_of))


def make_server(options: argparse.Namespace) -> BaseServer:
    """Make the server that the command line asks for.

    Raises:
        UsageError: it cannot be made.
    """
    inherited = inherited_socket(options)
    bind = DEFAULT_BIND if options.bind is None else options.bind
    address: Any = None
    if inherited is None:
        family, address = parse_address(bind)
    else:
        family = inherited.family
        options.udp = inherited.type == socket.SOCK_DGRAM
    if family in (socket.AF_INET, socket.AF_INET6):
        kind = "UDP" if options.udp else "TCP"
    else:
        kind = "UnixDatagram" if options.udp else "UnixStream"
    attributes: dict[str, Any] = {
        "address_family": family,
        "graceful_timeout": options.graceful_timeout,
        "request_timeout": options.request_timeout,
    }
    tls = _tls_options(options)
    if options.workers is not None:
        if not hasattr(trio_socketserver, "PreforkingMixIn"):
            raise UsageError("this system has no worker processes")
        attributes["workers"] = options.workers
    handler: Handler = EchoDatagram if options.udp else EchoStream
    if options.handler is not None:
        handler = load_handler(options.handler)
    try:
        blocking = handler_kind(handler) is HandlerKind.BLOCKING
        dispatch = options.dispatch or ("threading" if blocking else "nursery")
        prefix, limit = DISPATCH[dispatch]
        if limit is not None and options.max_requests_at_once is not None:
            attributes[limit] = options.max_requests_at_once
        server_class = make_class(f"{prefix}{kind}Server", attributes)
        server: BaseServer
        if inherited is None:
            server = server_class(address, handler, **tls)
        else:
            server = server_class.from_socket(inherited, handler, **tls)
        if options.workers is not None:
            try:
                pickled(server)
            except TypeError:  # Now, and not when it is about to serve.
                server._close_listener()
                raise
    except TypeError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"cannot bind {bind}: {reason}") from error
    return server


def shown(address: Any) -> str:
    """Write a bound address as ``--bind`` takes it."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reachable(address: tuple[Any, ...]) -> tuple[str, int]:
    """Return an address of this machine for a bound one, perhaps of every interface."""
    host, port = address[:2]
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port


def _speaks_http(handler: Handler) -> bool:
    pages: Any = sys.modules.get("http.server")
    wrapped = innermost(handler)
    return (
        pages is not None
        and isinstance(wrapped, type)
        and issubclass(wrapped, pages.BaseHTTPRequestHandler)
    )


def try_it(server: Any) -> str:
    """Return a shell command for trying a server of lines, datagrams or pages.

    It says hello by itself. Over TLS, where that would be too long, the user types it.
    """
    address = server.server_address
    if _speaks_http(server.RequestHandlerClass):
        curl, scheme = ("curl -k", "https") if server.ssl_context else ("curl", "http")
        if isinstance(address, str):
            return f"{curl} --unix-socket {shlex.quote(address)} {scheme}://localhost/"
        return f"{curl} {scheme}://{shown(_reachable(address))}/"
    if server.ssl_context:
        if isinstance(address, str):
            return f"openssl s_client -quiet -unix {shlex.quote(address)}"
        return f"openssl s_client -quiet -connect {shown(_reachable(address))}"
    family = socket.AddressFamily(server.address_family).name
    kind = socket.SocketKind(server.socket_type).name
    if family != "AF_UNIX":
        address = _reachable(address)
    if family != "AF_UNIX" and kind == "SOCK_STREAM":
        connect = f"s = create_connection({address!r})"
    else:
        # A Unix client that wants an answer to a datagram needs a name of its own.
        bind = "s.bind(''); " if (family, kind) == ("AF_UNIX", "SOCK_DGRAM") else ""
        connect = f"s = socket({family}, {kind}); {bind}s.connect({address!r})"
    code = f"from socket import *; {connect}; s.send(b'hello\\n'); print(s.recv(99))"
    # Double quotes suit every shell, as long as no path has a meaning inside of them.
    plain = set('"$`!\\').isdisjoint(repr(address))
    python = next(filter(shutil.which, ("python3", "python")), sys.executable)
    return f"{shlex.quote(python)} -c " + (f'"{code}"' if plain else shlex.quote(code))


def say(*lines: str) -> None:
    """Print lines; what stdout cannot encode, a path perhaps, is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what stands behind the program's name; None for `sys.argv`.

    Returns:
        The exit code: 0, or 2 for what the user can mend.
    """
    try:
        options = make_parser().parse_args(arguments)
        server: Any = make_server(options)
    except UsageError as error:
        line = " ".join(str(error).split())
        print(f"{PROGRAM}: {line}", file=sys.stderr)
        return 2
    normal = logging.ERROR if options.quiet else logging.WARNING
    logging.basicConfig(
        level=logging.INFO if options.verbose else normal,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    if options.quiet:
        run(server)
        return 0
    what = options.handler or server.RequestHandlerClass.__name__
    start = f"serving {what} on {shown(server.server_address)}"
    run(server, started=lambda: say(start, f"try: {try_it(server)}"))
    numbers = asdict(server.statistics())
    say(", ".join(f"{name} {n}" for name, n in numbers.items() if n) or "no requests")
    return 0
