"""Servers of connections: TCP and Unix.

They bind and listen in the constructor, synchronously, so that an error is raised where the
server is made, an address is good at once, and a privileged port can be bound before
`trio.run`. What the constructor has opened when it fails, it closes.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket as socketlib
import ssl
import stat
from collections.abc import Awaitable, Callable
from typing import Any, Final, Self

import trio

from ._blocking_tls import SecureSocket
from ._handlers import HandlerKind
from ._inherited import remember_server
from ._log import log
from ._server import BaseServer, Handler
from ._sockets import (
    ListeningSocket,
    StreamSocket,
    close_socket,
    shut_down_sending,
)
from ._tls import HANDSHAKE_TIMEOUT, TLSSocket
from ._tls_contexts import Contexts

__all__ = ["TCPServer"]

BACKLOG: Final = 128
"""Connections that the kernel queues for the server.

socketserver's 5 makes a burst of six clients wait a second for a retried SYN. asyncio takes
100, gevent 256, trio whatever the system allows; Linux cuts it at net.core.somaxconn.
"""


class TCPServer(BaseServer):
    """A server of TCP connections, one at a time.

    The arguments, the attributes and the three plain methods are those of
    `socketserver.TCPServer`. For several connections at a time put a mix-in in front, or
    take `NurseryTCPServer`.

    Args:
        server_address: the pair ``(host, port)``; port 0 lets the system choose.
            A host *name* is resolved here, which may take a while.
        RequestHandlerClass: the handler, see `BaseServer`.
        bind_and_activate: whether to bind and listen now. If not, call `server_bind()` and
            `server_activate()`, or replace ``socket``.
        ssl_context: sets the attribute of this name.

    Raises:
        OSError: the address cannot be bound. Nothing is left open.
        TypeError: the handler has the wrong colour, or ``ssl_context`` is no context.
        ValueError: ``ssl_context`` is one for clients.

    Attributes:
        socket: the listening socket, which the server owns.
        server_address: the address that was bound.
    """

    address_family: int = socketlib.AF_INET
    """The family of the listening socket."""

    socket_type: int = socketlib.SOCK_STREAM
    """The type of the listening socket."""

    request_queue_size: int = BACKLOG
    """Connections that the kernel queues; 5 in socketserver."""

    allow_reuse_address: bool = os.name == "posix"
    """Whether to set ``SO_REUSEADDR``, so that a restarted server can bind at once.

    False in socketserver, whose users set it; asyncio and trio set it too. On Windows the
    option means something else, and would let another program take the port.
    """

    allow_reuse_port: bool = False
    """Whether to set ``SO_REUSEPORT``."""

    dualstack_ipv6: bool = True
    """Whether a server of ``AF_INET6`` on the wildcard address serves IPv4 too."""

    ssl_context: ssl.SSLContext | Callable[..., ssl.SSLContext] | None = None
    """An `ssl.SSLContext`, or a callable that makes one, for a server that speaks TLS.

    A callable is called once, when the server is made, or begins to serve. (For workers
    that are processes of their own it has to be one that can be imported.) The attribute
    is read for each connection, so another context can take its place at any time.
    """

    ssl_handshake_timeout: float | None = HANDSHAKE_TIMEOUT
    """Seconds that a TLS handshake may take, else `RequestTimeout`."""

    drain_backlog: bool = False
    """Whether closing first accepts what the kernel has accepted already.

    At most ``request_queue_size`` of them; where a limit is reached, they wait for their
    turn. Without it the kernel resets these connections, as it does in socketserver.
    """

    socket: socketlib.socket
    server_address: Any

    def __init__(
        self,
        server_address: Any,
        RequestHandlerClass: Handler,
        bind_and_activate: bool = True,
        *,
        ssl_context: ssl.SSLContext | Callable[..., ssl.SSLContext] | None = None,
    ) -> None:
        super().__init__(server_address, RequestHandlerClass)
        if ssl_context is not None:
            self.ssl_context = ssl_context
        self._check_context()
        self.socket = ListeningSocket(self.address_family, self.socket_type)
        remember_server(self)
        self.socket.setblocking(False)
        if bind_and_activate:
            try:
                self.server_bind()
                self.server_activate()
            except BaseException:
                self._close_listener()
                raise

    def _set_up(self) -> None:
        super()._set_up()
        self._contexts = Contexts()

    @classmethod
    def from_socket(
        cls,
        sock: socketlib.socket,
        RequestHandlerClass: Handler,
        **options: Any,
    ) -> Self:
        """Make a server of a socket that is bound, and listening, already.

        Args:
            sock: the socket, inherited from a parent process or a service manager. The
                server owns it from now on, and closes it. It is made non-blocking, for
                everyone who shares it.
            RequestHandlerClass: the handler.
            **options: what else the constructor takes, such as ``ssl_context``.

        Raises:
            ValueError: the socket is of another type than the server's.
            TypeError: the handler has the wrong colour. The socket stays the caller's.
        """
        if sock.type != cls.socket_type:
            raise ValueError(f"{cls.__qualname__} cannot serve {sock!r}")
        address = sock.getsockname()
        server = cls(address, RequestHandlerClass, bind_and_activate=False, **options)
        server.socket.close()
        server.socket = sock
        server.address_family = sock.family
        sock.setblocking(False)
        return server

    def fileno(self) -> int:
        """Return the listening socket's descriptor; -1 when it is closed."""
        return self.socket.fileno()

    def server_bind(self) -> None:
        """Bind the socket to ``server_address``, which becomes the address bound.

        Raises:
            OSError: the address is in use, or cannot be bound.
        """
        internet = self.address_family in (socketlib.AF_INET, socketlib.AF_INET6)
        if self.allow_reuse_address:
            self.socket.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_REUSEADDR, 1)
        if self.allow_reuse_port and internet and hasattr(socketlib, "SO_REUSEPORT"):
            self.socket.setsockopt(socketlib.SOL_SOCKET, socketlib.SO_REUSEPORT, 1)
        if self.address_family == socketlib.AF_INET6:
            dual = self.dualstack_ipv6 and socketlib.has_dualstack_ipv6()
            self.socket.setsockopt(socketlib.IPPROTO_IPV6, socketlib.IPV6_V6ONLY, not dual)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """Listen. Raises `OSError` if the socket cannot."""
        self.socket.listen(self.request_queue_size)

    def _prepare_listener(self) -> None:
        if self.fileno() == -1:
            raise trio.ClosedResourceError("the listening socket has been closed")
        if isinstance(self.socket, ssl.SSLSocket):
            raise TypeError(
                "the listening socket has been wrapped by an SSLContext, and would shake "
                "hands in accept(): give the context to the server, as ssl_context"
            )
        self.socket.setblocking(False)
        if type(self.socket) is socketlib.socket:
            # Inherited, or put there by the user: from now on it is ours, and must wake the
            # loop when it is closed. It stays the same object, for who still holds it.
            self.socket.__class__ = ListeningSocket
        self._check_context()

    def _check_context(self) -> None:
        """Find out now what would be wrong with each connection."""
        if self.ssl_context is not None:
            self._contexts.check(self.ssl_context)

    def _close_listener(self) -> None:
        close_socket(self.socket)

    def _backlog(self) -> int:
        # A server that has not served yet has not made its socket ready for it either.
        if not self.drain_backlog or self._loop.fresh:
            return 0
        return self.request_queue_size

    async def get_request(self) -> tuple[Any, Any]:
        """Accept one connection, as the pair of a `StreamSocket` and the peer's address.

        No checkpoint: what is accepted has an owner at once. With an ``ssl_context``, hands
        are shaken later, where the handler runs.

        Raises:
            BlockingIOError: nothing is queued (any more).
            OSError: accept() failed; what follows of it is the loop's business.
        """
        if self.ssl_context is None:
            connection, client_address = self.socket.accept()
            return StreamSocket.accepted(connection), client_address
        context = self._contexts.current(self.ssl_context)
        connection, client_address = self.socket.accept()
        patience = self.ssl_handshake_timeout
        timeouts = math.inf if patience is None else patience, self.cleanup_timeout
        return TLSSocket.secured(connection, context, *timeouts), client_address

    _own_get_request: Any = get_request

    def _run_handler(self, request: Any, client_address: Any) -> Awaitable[None]:
        if type(request) is not StreamSocket and isinstance(request, TLSSocket):
            return self._run_secured(request, client_address)
        return super()._run_handler(request, client_address)

    async def _run_secured(self, request: TLSSocket, client_address: Any) -> None:
        if self._judge_handler() is not HandlerKind.BLOCKING:
            await request.do_handshake(self._drain)
        await super()._run_handler(request, client_address)

    async def shutdown_request(self, request: Any) -> None:
        """Shut down and close one connection.

        As in `socketserver` the connection ends even if the handler has given away a
        duplicate of the socket. No checkpoint if the request is a `StreamSocket`, unless
        it speaks TLS and the peer has to read before close_notify can leave. What it raises
        goes to `handle_error()`.
        """
        if isinstance(request, StreamSocket):
            if isinstance(request, TLSSocket):
                await request.say_goodbye()
            request.shutdown_now()
        elif isinstance(request, socketlib.socket):
            if isinstance(request, SecureSocket):
                request.say_goodbye(0)
            shut_down_sending(request)
        await self.close_request(request)

    async def close_request(self, request: Any) -> None:
        """Close one connection. No checkpoint if the request is a `StreamSocket`.

        What it raises goes to `handle_error()`.

        Args:
            request: a `StreamSocket`; any `trio.abc.AsyncResource` that an override of
                `get_request()` has put in its place; or the socket that a blocking handler
                has, which may call this itself.
        """
        if isinstance(request, StreamSocket):
            request.close_now()
        elif isinstance(request, socketlib.socket):
            request.close()
        else:
            await request.aclose()

    def _close_at_once(self, request: Any) -> bool:
        kind = type(request)
        if (
            kind not in (StreamSocket, TLSSocket)
            or getattr(self.shutdown_request, "__func__", None) is not _shutdown_request
            or getattr(self.close_request, "__func__", None) is not _close_request
            or (kind is TLSSocket and not request.say_goodbye_now())
        ):
            return False
        request.shutdown_now()
        request.close_now()
        return True

    def _abort(self, request: Any) -> None:
        if isinstance(request, StreamSocket):
            request.close_now()


_shutdown_request = TCPServer.shutdown_request
_close_request = TCPServer.close_request


if hasattr(socketlib, "AF_UNIX"):
    __all__ += ["UnixStreamServer"]

    class UnixSocketFile(TCPServer):
        """The file of a bound Unix socket, which is removed only by who has made it.

        Mixed into the Unix servers. Two starters that find the same stale file at the same
        moment can both bind: there is no lock on a path. Only the later one is reachable.
        """

        address_family: int = socketlib.AF_UNIX

        unlink_socket: bool = True
        """Whether to remove a stale socket file before binding and our own on closing.

        Stale is a socket that refuses a connection. What is not a socket is never removed,
        nor a file that has replaced ours. socketserver leaves files behind.
        """

        socket_mode: int | None = None
        """The file's permissions, for example ``0o660``; None for what the umask gives."""

        server_address: Any

        def _set_up(self) -> None:
            super()._set_up()
            self._bound_file: tuple[str | bytes, int, int] | None = None

        def server_bind(self) -> None:
            """Bind the socket to the path ``server_address``; abstract names work too.

            Raises:
                OSError: the path is in use, or cannot be bound.
                ValueError: the path has a zero byte in it.
            """
            path = self.server_address
            if isinstance(path, os.PathLike):
                path = os.fspath(path)
            if _is_path(path) and 0 in os.fsencode(path):
                # The system would take it for the path's end, and bind another one.
                raise ValueError(f"the path of a socket has a zero byte in it: {path!r}")
            if self.unlink_socket and _is_path(path) and self._is_stale(path):
                os.unlink(path)
            if self.socket_mode is not None:
                # Linux takes the mode over to the file it makes, so that it is never more
                # open than asked for.
                os.fchmod(self.socket.fileno(), self.socket_mode)
            self.socket.bind(path)
            self.server_address = self.socket.getsockname()
            if _is_path(self.server_address):
                made = os.lstat(path)
                self._bound_file = (os.path.abspath(path), made.st_dev, made.st_ino)
                if self.socket_mode is not None:
                    os.chmod(path, self.socket_mode)

        def _is_stale(self, path: str | bytes) -> bool:
            try:
                if not stat.S_ISSOCK(os.lstat(path).st_mode):
                    return False
            except FileNotFoundError:
                return False
            with socketlib.socket(socketlib.AF_UNIX, self.socket_type) as probe:
                probe.setblocking(False)
                return probe.connect_ex(path) == errno.ECONNREFUSED

        def _unlink_own_file(self) -> None:
            bound, self._bound_file = self._bound_file, None
            if bound is None or not self.unlink_socket:
                return
            path, device, inode = bound
            try:
                found = os.lstat(path)
                if (found.st_dev, found.st_ino) == (device, inode):
                    os.unlink(path)
            except FileNotFoundError:
                return  # Somebody has removed it for us.
            except OSError as error:
                # Rights may have been dropped since; closing must go on.
                log(logging.WARNING, "cannot remove the socket file %r: %s", path, error)

    class UnixStreamServer(UnixSocketFile, TCPServer):
        """A server of Unix stream connections, one at a time.

        As `socketserver.UnixStreamServer`, plus care for the socket's file.

        Args:
            server_address: a path, a `pathlib.Path` too, or an abstract name that begins
                with a zero byte.
            RequestHandlerClass: the handler, see `BaseServer`.
            bind_and_activate: see `TCPServer`.
        """

        async def _take_backlog(self) -> None:
            # Who comes between the last accept() and close() is refused now, not reset.
            self._unlink_own_file()
            await super()._take_backlog()

        def _close_listener(self) -> None:
            self._unlink_own_file()
            super()._close_listener()


def _is_path(address: str | bytes) -> bool:
    """Tell a path in the file system from an abstract or an automatic name."""
    return bool(address) and address[0] not in ("\0", 0)
