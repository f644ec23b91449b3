"""A server's ``ssl_context``: what it may be, and when it is looked at.

It is a context, or a callable that makes one. Mistakes are found when the server is made,
or begins to serve, and not with each request. It is read again for each connection, so
that another context can take its place. One that cannot do so is reported, once, and those
who come go on to be served with the one before it.
"""

from __future__ import annotations

import inspect
import logging
import ssl
from collections.abc import Callable

from ._log import log


def make_context(source: object) -> ssl.SSLContext:
    """Return the context that *source* is, or makes.

    Raises:
        TypeError: it is none, and makes none.
        ValueError: the context is one for clients.
    """
    made = source
    if not isinstance(source, ssl.SSLContext) and callable(source):
        made = _without_self(source)()
    if not isinstance(made, ssl.SSLContext):
        made_by = "" if made is source else f", made by {source!r},"
        raise TypeError(
            f"ssl_context must be an ssl.SSLContext or a callable that makes one; {made!r}"
            f"{made_by} is neither"
        )
    if made.protocol == ssl.PROTOCOL_TLS_CLIENT:
        raise ValueError(
            "ssl_context is one for clients; make one for servers by "
            "ssl.create_default_context(ssl.Purpose.CLIENT_AUTH) and its load_cert_chain()"
        )
    return made


def _without_self(source: Callable[..., object]) -> Callable[..., object]:
    """Undo what Python does to a plain function that is an attribute of a class."""
    if inspect.ismethod(source) and not inspect.signature(source.__func__).parameters:
        function: Callable[..., object] = source.__func__
        return function
    return source


class Contexts:
    """The contexts of one server."""

    __slots__ = ("_context", "_source")

    def __init__(self) -> None:
        self._source: object = None
        self._context: ssl.SSLContext | None = None

    def check(self, source: object) -> None:
        """Make the context of *source*, if that has not been done.

        Raises as `make_context` does, and whatever a callable raises.
        """
        if not _is_same(source, self._source):
            self._context = make_context(source)
            self._source = source

    def current(self, source: object) -> ssl.SSLContext:
        """Return the context of *source*, or the one before it if that makes none."""
        try:
            self.check(source)
        except Exception as error:
            if self._context is None:
                raise
            message = "ssl_context cannot be %r; the one before it serves on"
            log(logging.ERROR, message, source, error=error)
            self._source = source
        assert self._context is not None
        return self._context


def _is_same(source: object, other: object) -> bool:
    """Tell whether it is the same object, or the same object's method read again."""
    return source is other or (inspect.ismethod(source) and source == other)
