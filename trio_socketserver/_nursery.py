"""`NurseryMixIn`: a task for each request.

All that a dispatcher of tasks adds to the plain server is the limit: how many requests may
be active before the loop stops accepting and leaves the rest to the kernel's queue.
"""

from __future__ import annotations

from typing import Any

from ._server import BaseServer

__all__ = ["NurseryMixIn"]


class NurseryMixIn(BaseServer):
    """Handle each request in a task of its own.

    It takes the place of `socketserver.ThreadingMixIn` for asynchronous handlers. Put it in
    front of a server class: ``class Server(NurseryMixIn, TCPServer)``.
    """

    max_tasks: int | None = None
    """Requests handled at once; at the limit the server stops accepting.

    None means no limit, and is the default of stream servers; that of datagram servers is
    1,000, because nothing else slows their senders down.
    """

    _one_at_a_time = False
    _max_tasks_is_default: bool

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        chosen = next(
            base
            for base in cls.__mro__
            if "max_tasks" in vars(base) and "_max_tasks_is_default" not in vars(base)
        )
        if chosen is NurseryMixIn:
            cls.max_tasks = cls._default_max_tasks
            cls._max_tasks_is_default = True

    def _limit(self) -> int | None:
        return self.max_tasks
