"""The ratios that are wanted, for the page and for whoever optimises.

They are to other servers in the same run, and by the rate. What the regression check holds
the package to is looser: see `check`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """Ours must serve ``at_least`` times the requests of ``peer``."""

    workload: str
    peer: str
    at_least: float


GOALS = (
    Goal("short", "trio", 3.3),
    Goal("short", "asyncio", 1.6),
    Goal("short", "gevent", 1.3),
    Goal("short", "socketserver threading", 3),
    Goal("short", "bare epoll", 0.5),
    Goal("pingpong", "trio", 1.85),
    Goal("pingpong", "asyncio", 2.2),
    Goal("pingpong", "asyncio, just started", 2.2),
    Goal("pingpong", "gevent", 1.1),
    Goal("pingpong", "uvloop", 0.9),
    Goal("pingpong", "bare epoll", 0.45),
    Goal("bulk", "trio", 1.6),
    Goal("bulk", "asyncio", 2.8),
    Goal("bulk", "asyncio, just started", 2.8),
    Goal("bulk", "gevent", 2.8),
    Goal("udp", "trio", 2.5),
    Goal("udp", "asyncio", 2),
    Goal("udp", "gevent", 1.6),
    Goal("udp", "socketserver threading", 4),
    Goal("blocking", "socketserver threading", 1.5),
    Goal("forking", "socketserver forking", 0.95),
    Goal("computing", "trio_socketserver, one worker", 1.6),
)

MEMORY_GOAL = 0.25
"""At most, for an idle connection, of what one takes in `MEMORY_PEER`."""

MEMORY_PEER = "socketserver threading"
