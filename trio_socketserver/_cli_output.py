"""What the command tells its user: where it serves, what to type there, the numbers."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import socket
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any, Final

import trio

from ._colour import innermost
from ._server import Handler

DISTRIBUTION: Final = "trio-socketserver"


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


def numbers_of(server: Any) -> str:
    """Write the server's statistics on one line, without those that are zero."""
    numbers = asdict(server.statistics())
    return ", ".join(f"{name} {n}" for name, n in numbers.items() if n) or "no requests"


def versions() -> str:
    """Write what is running."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # A source tree.
        version = "(not installed)"
    python = platform.python_version()
    return f"{DISTRIBUTION} {version}, trio {trio.__version__}, Python {python}"


def say(line: str) -> None:
    """Print a line; what stdout cannot encode, a path perhaps, is escaped.

    Where it cannot be written, because ``head -1`` has had its line or the disk is full,
    the server goes on and says no more.
    """
    if sys.stdout is None or sys.stdout.closed:  # Started without one, or it was closed.
        return
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except OSError:
        # The buffer, which holds the line still, is written once more when Python ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
