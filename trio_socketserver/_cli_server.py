"""The server that the command's arguments ask for."""

from __future__ import annotations

import argparse
import copyreg
import functools
import importlib
import operator
import socket
import ssl
from typing import Any

import trio_socketserver

from ._activation import take_listen_fds
from ._cli_arguments import DEFAULT_BIND, DISPATCH, UsageError, parse_address
from ._handlers import (
    DatagramRequestHandler,
    HandlerKind,
    StreamRequestHandler,
    handler_kind,
)
from ._preforking import pickled
from ._server import BaseServer, Handler


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
