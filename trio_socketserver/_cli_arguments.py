"""The command's arguments: what may be written, and what is wrong with what was."""

from __future__ import annotations

import argparse
import ipaddress
import math
import re
import socket
from typing import Any, Final, NoReturn

from ._run import GRACEFUL_TIMEOUT

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


EXAMPLES: Final = f"""examples:
  {PROGRAM} http.server:SimpleHTTPRequestHandler
  {PROGRAM} --bind :7777 --workers 4 chat:Member

Ctrl-C or SIGTERM drains, twice cancels; SIGUSR1 prints statistics."""


def make_parser() -> argparse.ArgumentParser:
    """Return the command's argument parser. Its help fits a screen of 80 x 30."""
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [OPTIONS] [HANDLER]",
        description="Serve HANDLER, a module:attribute; without one, an echo.",
        epilog=EXAMPLES,
        allow_abbrev=False,
        add_help=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=31
        ),
    )
    parser.add_argument("handler", nargs="?", help=argparse.SUPPRESS)
    _add_place(parser)
    _add_way(parser)
    _add_output(parser)
    return parser


def _add_place(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where")
    place = group.add_mutually_exclusive_group()
    place.add_argument(
        "--bind",
        metavar="ADDRESS",
        help=f"[host]:port or unix:/path ({DEFAULT_BIND})",
    )
    place.add_argument(
        "--fd",
        metavar="N",
        type=_descriptor,
        help="a listening socket (LISTEN_FDS is honoured too)",
    )
    group.add_argument("--udp", action="store_true", help="serve datagrams")
    group.add_argument(
        "--tls-cert", metavar="FILE", help="speak TLS, with this certificate chain"
    )
    group.add_argument(
        "--tls-key", metavar="FILE", help="its key, if it is not in the same file"
    )


def _add_way(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how")
    group.add_argument(
        "--dispatch",
        metavar="HOW",
        choices=list(DISPATCH),
        help="%(choices)s",
    )
    group.add_argument(
        "--workers", metavar="N", type=_count, help="serve in so many processes"
    )
    group.add_argument(
        "--max-requests-at-once",
        metavar="N",
        type=_count,
        help="in each worker; the kernel queues the rest",
    )
    group.add_argument(
        "--request-timeout",
        metavar="SECONDS",
        type=_seconds,
        help="how long one request may take",
    )
    group.add_argument(
        "--graceful-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=GRACEFUL_TIMEOUT,
        help="how long draining may take (%(default)g)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is shown")
    volume = group.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="peers' errors too")
    volume.add_argument("-q", "--quiet", action="store_true", help="errors only")
    group.add_argument("--version", action="store_true", help="the version, and no more")
    group.add_argument("-h", "--help", action="help", help="this help, and no more")


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
