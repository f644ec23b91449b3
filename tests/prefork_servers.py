"""Servers and handlers that worker processes import.

A request is an expression, which is evaluated where the request is handled; so a test asks
a worker for what it wants to know, and has it do what it wants done. Of a connection the
reply begins with a line, the process's number, which is sent before the evaluation.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import ssl
import sys
import threading
import time
from typing import Any

import trio

from trio_socketserver import (
    ForkingTCPServer,
    ForkingUDPServer,
    ForkingUnixStreamServer,
    NurseryTCPServer,
    NurseryUDPServer,
    NurseryUnixDatagramServer,
    NurseryUnixStreamServer,
    PreforkingMixIn,
    StreamRequestHandler,
    TCPServer,
    ThreadingTCPServer,
    ThreadingUnixDatagramServer,
    UDPServer,
)

# What expressions may name.
MODULES = (logging, os, resource, signal, sys, threading, time, trio)


def value_of(expression: bytes, server: Any) -> Any:
    return eval(expression.decode(), globals() | {"server": server})


async def evaluate(request: Any, client_address: Any, server: Any) -> None:
    """Handle a request for an expression; if that is an awaitable, await it."""
    expression = request[0] if isinstance(request, tuple) else b""
    if not isinstance(request, tuple):
        async for chunk in request:
            expression += chunk
        # Without a checkpoint: who has read it knows that the evaluation goes on.
        request.socket.send(b"%d\n" % os.getpid())
    value = value_of(expression, server)
    if hasattr(value, "__await__"):
        value = await value
    reply = repr(value).encode()
    if isinstance(request, tuple):
        await request[1].sendto(b"%d\n" % os.getpid() + reply, client_address)
    else:
        await request.send_all(reply)


def evaluate_blocking(request: Any, client_address: Any, server: Any) -> None:
    """Handle a request for an expression in a blocking world."""
    expression = request[0] if isinstance(request, tuple) else b""
    if not isinstance(request, tuple):
        while chunk := request.recv(65536):
            expression += chunk
        request.sendall(b"%d\n" % os.getpid())
    reply = repr(value_of(expression, server)).encode()
    if isinstance(request, tuple):
        request[1].sendto(b"%d\n" % os.getpid() + reply, client_address)
    else:
        request.sendall(reply)


class Finishing(StreamRequestHandler):
    """Waits for ever; its `finish` leaves a file."""

    async def handle(self) -> None:
        self.request.socket.send(b"%d\n" % os.getpid())
        await trio.sleep_forever()

    async def finish(self) -> None:
        await trio.sleep(0)
        with open(self.server.finished, "x"):
            await super().finish()


# -- what expressions call -----------------------------------------------------------------


async def shielded() -> None:
    """Ignore cancellation."""
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


def descriptors() -> dict[int, str]:
    """Return what each descriptor stands for."""
    found = {}
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            found[number] = os.readlink(f"/proc/self/fd/{number}")
        except FileNotFoundError:
            continue  # The descriptor of the listing itself.
    return found


class OnlyThere:
    """An object that does not leave the process that has made it."""

    def __reduce__(self) -> Any:
        return _made_in, (os.getpid(),)


def _made_in(pid: int) -> OnlyThere:
    if pid != os.getpid():
        raise LookupError("this is not where it was made")
    return OnlyThere()


class OnlyTherePlain(OnlyThere, int):
    """The same, but it is a number."""


# -- the servers ---------------------------------------------------------------------------


class OneWorker(PreforkingMixIn):
    """One, because each takes a third of a second to start."""

    workers = 1


class Sequential(OneWorker, TCPServer): ...


class Tasks(OneWorker, NurseryTCPServer): ...


class Threads(OneWorker, ThreadingTCPServer): ...


class Forks(OneWorker, ForkingTCPServer): ...


class UnixTasks(OneWorker, NurseryUnixStreamServer): ...


class UnixForks(OneWorker, ForkingUnixStreamServer): ...


class DatagramsInTurn(OneWorker, UDPServer): ...


class DatagramTasks(OneWorker, NurseryUDPServer): ...


class DatagramForks(OneWorker, ForkingUDPServer): ...


class UnixDatagramTasks(OneWorker, NurseryUnixDatagramServer): ...


class UnixDatagramThreads(OneWorker, ThreadingUnixDatagramServer): ...


class Initialized(Tasks):
    """Tells whether its ``__init__`` has been called in this process."""

    initialized_here = False

    def __init__(self, *arguments: Any) -> None:
        type(self).initialized_here = True
        super().__init__(*arguments)


class WithLock(Tasks):
    """Has something that does not pickle, and a new one in each worker."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lock: Any = threading.Lock()
        self.kind = "taken along"

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        del state["lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.RLock()


class Slotted(Tasks):
    """Has an attribute that is in no dictionary."""

    __slots__ = ("colour",)


class BadState(Tasks):
    """Says nothing of itself."""

    def __getstate__(self) -> dict[str, Any]:
        raise LookupError("no state")


class Stateless(Tasks):
    """Has a state of another kind than ours."""

    def __getstate__(self) -> Any:
        return [super().__getstate__(), threading.Lock()]


class Breaks(Tasks):
    """Cannot be copied."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise LookupError("no luck")


class Ticks(Tasks):
    """Counts the calls of `service_actions`."""

    ticks = 0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.second_tick = trio.Event()

    async def service_actions(self) -> None:
        self.ticks += 1
        if self.ticks == 2:
            self.second_tick.set()


class FailsAtWork(Tasks):
    """Has an error of its own, not of a request's."""

    async def service_actions(self) -> None:
        raise LookupError("tick")


class EndsItself(Tasks):
    """Ends the server from a hook of the loop."""

    async def service_actions(self) -> None:
        await self.shutdown()


class Verifying(Tasks):
    """Ends the server when a request comes, and handles that one still."""

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        await self.shutdown()
        return True


class LogsElsewhere(Tasks):
    """Configures logging where it is copied to."""

    log_file = ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        logging.basicConfig(filename=self.log_file, format="%(message)s", force=True)


# -- TLS -----------------------------------------------------------------------------------


def tls_context(path: str) -> ssl.SSLContext:
    """Make a context of the certificate and the key in a file."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    return context


async def tell_pid(request: Any, client_address: Any, server: Any) -> None:
    await request.send_all(b"%d" % os.getpid())


def tell_pid_blocking(request: Any, client_address: Any, server: Any) -> None:
    request.sendall(b"%d" % os.getpid())
