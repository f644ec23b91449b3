"""The hooks of a server class: which there are, and what a port gets wrong with them.

All of these mistakes are found when the class is created. Found later, they would be a
request that is never verified, or a hook that is never called.
"""

from __future__ import annotations

from typing import Final

from ._colour import check_colours

PLAIN_HOOKS: Final = ("fileno", "server_bind", "server_activate")
"""What the constructor needs, and what never waits."""

COROUTINE_HOOKS: Final = (
    "serve_forever",
    "handle_request",
    "shutdown",
    "server_close",
    "get_request",
    "verify_request",
    "process_request",
    "finish_request",
    "shutdown_request",
    "close_request",
    "handle_error",
    "handle_timeout",
    "service_actions",
    "collect_children",
)
"""Everything else."""


def check_server_class(cls: type) -> None:
    """Refuse a server class that would not do what its author means.

    Raises:
        TypeError: it mixes in classes of the standard library's, overrides a hook that does
            not exist here, or overrides one in the wrong colour.
    """
    for base in cls.__mro__:
        if base.__module__ == "socketserver":
            raise TypeError(
                f"{cls.__qualname__} mixes trio_socketserver with "
                f"socketserver.{base.__name__}: derive from "
                f"trio_socketserver.{base.__name__} instead"
            )
        if "process_request_thread" in vars(base):
            raise TypeError(
                f"{cls.__qualname__}.process_request_thread would never be called: "
                "override 'async def finish_request' for what surrounds the handler, "
                "or 'async def shutdown_request' for the closing"
            )
    check_colours(cls, COROUTINE_HOOKS, PLAIN_HOOKS)
