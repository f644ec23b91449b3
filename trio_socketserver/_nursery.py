"""`NurseryMixIn`: a task for each request.

All that a dispatcher of tasks adds to the plain server is the limit: how many requests may
be active before the loop stops accepting and leaves the rest to the kernel's queue.
"""

from __future__ import annotations

from typing import cast

from ._handlers import HandlerKind
from ._server import BaseServer, Handler

__all__ = ["NurseryMixIn"]


class _DefaultLimit:
    """The default of ``max_tasks``, which is the server's to say, not the mix-in's."""

    def __get__(self, server: BaseServer | None, owner: type[BaseServer]) -> int | None:
        return owner._default_max_tasks


class NurseryMixIn(BaseServer):
    """Handle each request in a task of its own.

    It takes the place of `socketserver.ThreadingMixIn` for asynchronous handlers, and runs
    no others. Put it in front of a server class: ``class Server(NurseryMixIn, TCPServer)``.
    """

    max_tasks: int | None = cast("int | None", _DefaultLimit())
    """Requests handled at once; at the limit the server stops accepting.

    None means no limit, and is the default of stream servers; that of datagram servers is
    1,000, because nothing else slows their senders down.
    """

    _one_at_a_time = False

    def _limit(self) -> int | None:
        return self.max_tasks

    def _check_handler(self, handler: Handler, kind: HandlerKind) -> None:
        super()._check_handler(handler, kind)
        if kind is HandlerKind.BLOCKING:
            raise TypeError(
                f"{handler!r} is a blocking handler, and {type(self).__qualname__} handles "
                "requests in tasks: take ThreadingMixIn (as in ThreadingTCPServer), which "
                "runs it as it is, in threads; or make it asynchronous, by deriving it "
                "from trio_socketserver.StreamRequestHandler (or another of its handler "
                "classes) with 'async def handle(self)'"
            )
