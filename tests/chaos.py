"""Chaos: a server, clients of all kinds, faults, and an end at any moment; round by round.

``python chaos.py DISPATCHER SEED FIRST COUNT`` runs rounds of one dispatcher of `contract`
and says what it does. What happens in a round is drawn from the seed, the dispatcher and
the round's number, so a round can be run again alone. (The moments are of real time; what
they meet, is not quite the same each time.)

After each round nothing may be left of it, and nobody may have anything to complain of: see
`Round.check`. A round that does not end says where all tasks and threads are, and ends the
program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import functools
import itertools
import logging
import os
import random
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio
import trustme
from conftest import children, live_threads, open_descriptors
from contract import (
    DISPATCHERS,
    AskedFor,
    Dispatcher,
    assert_adds_up,
    errors,
)
from hostile import Peers

from trio_socketserver import UDPServer

CLIENTS = 8
"""Clients of a round, each of which does one thing after another."""

LENGTH = 0.3
"""Seconds before a round is ended, at most."""

WORKERS_LENGTH = 1.0
"""The same where workers have to start first, each of which takes a third of a second."""

GUARD = 45.0
"""Seconds that a round may take before it is said to hang; it takes about half of one."""

EXPECTED_ERRORS = {
    # What was asked for, or follows from it.
    "AskedFor",
    "ExceptionGroup",
    "AttributeError",  # A command that there is not.
    "UnicodeDecodeError",  # A command that is no text.
    "ChildFailed",
    # What clients do.
    "BrokenPipeError",
    "ConnectionBroken",
    "ConnectionResetError",
    "FileNotFoundError",  # A Unix client that has gone is the system's error.
    "ConnectionRefusedError",
    "LineTooLong",
    "RequestTimeout",
    "SSLError",
    "SSLEOFError",
    "SSLZeroReturnError",
    "TimeoutError",
    "OSError",
}
"""The names of errors that may reach ``handle_error()``."""

NOBODY = "TypeError: a bytes-like object is required, not 'NoneType'"
"""What `socket.sendto` says in a blocking handler, of a Unix client without a name."""

PLACES = (
    "setup",
    "finish",
    "verify_request",
    "process_request",
    "finish_request",
    "shutdown_request",
    "close_request",
    "handle_error",
    "service_actions",
)


ENDS = ("leave", "cancel", "shutdown", "server_close", "raise", "serve again")

WAYS = ("block", "block", "block", "no block", "handle_request")
"""Of serving; most servers are entered."""

COMMANDS = ((), (), ("stop shutdown",), ("stop server_close",), ("exit 1", "interrupt x"))
"""What clients may make handlers do that ends the server."""


class Stop(Exception):
    """How the body of the server's block ends in some rounds."""


def tls_context(file: str) -> ssl.SSLContext:
    """Return a server's context; workers call it, too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


def make_certificate(folder: Path) -> str:
    """Make a certificate and its key, in one file; return the path."""
    leaf = trustme.CA().issue_cert("127.0.0.1")
    file = folder / "certificate.pem"
    leaf.private_key_and_cert_chain_pem.write_to_path(file)
    return str(file)


# -- one round -----------------------------------------------------------------------------


class Belongings:
    """What there is of this process outside of its memory."""

    def __init__(self) -> None:
        self.descriptors = open_descriptors()
        self.threads = {thread.name for thread in live_threads()}
        self.children = children()
        self.tasks = trio.lowlevel.current_statistics().tasks_living

    def more_than(self, before: Belongings) -> Iterator[str]:
        """Tell what there is that was not there before."""
        new = self.descriptors.items() - before.descriptors.items()
        if new:
            yield f"descriptors: {sorted(new)}"
        if self.threads - before.threads:
            yield f"threads: {self.threads - before.threads}"
        if self.children - before.children:
            yield f"children: {self.children - before.children}"
        if self.tasks > before.tasks:
            yield f"{self.tasks - before.tasks} tasks:\n{task_stacks()}"


class Round:
    """A server's life, and all that comes in its way.

    Args:
        seed: of the whole run.
        dispatcher: where handlers run.
        number: of the round.
        certificate: for TLS.
        log: where errors are logged.
    """

    def __init__(
        self,
        seed: str,
        dispatcher: Dispatcher,
        number: int,
        certificate: str,
        log: ErrorLog,
    ) -> None:
        self.seed = f"{seed}/{dispatcher}/{number}"
        self.dispatcher = dispatcher
        self.log = log
        self.problems: list[str] = []
        self.left: list[str] = []
        rng = random.Random(self.seed)
        self.kind = rng.choice(sorted(dispatcher.kinds))
        self.datagram = issubclass(dispatcher.servers[self.kind], UDPServer)
        self.folder = Path(tempfile.mkdtemp(prefix="chaos"))
        self.length = WORKERS_LENGTH if dispatcher.workers else LENGTH
        self.is_calm = rng.random() < 0.3
        self.has_tls = "tcp" in self.kind and rng.random() < 0.4
        self.commands = () if self.is_calm else rng.choice(COMMANDS)
        if self.datagram:  # Handlers of which know less.
            self.commands = tuple(one for one in self.commands if "stop" in one)
        self.way = rng.choice(WAYS)
        self.ends = rng.sample(ENDS, 2 if not self.is_calm and rng.random() < 0.4 else 1)
        self.attributes = self._choose_attributes(rng, certificate)
        self.disturbances = 0 if self.is_calm else rng.randrange(6)
        # From here on tasks take turns, and each that needs chance has its own.
        until = self.length / 3 if self.is_calm else self.length
        self.moments = rng.uniform(0, until), rng.uniform(0, until / 5)
        self.nursery: trio.Nursery
        self.hard = trio.CancelScope()

    def __str__(self) -> str:
        shown = {
            name: value for name, value in self.attributes.items() if name != "ssl_context"
        }
        return (
            f"{self.seed}: {self.kind}{', TLS' * self.has_tls}{', calm' * self.is_calm}, "
            f"{self.way}, {' and '.join(self.ends)}, {self.commands}, {shown}"
        )

    def _choose_attributes(self, rng: random.Random, certificate: str) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "cleanup_timeout": 0.3,
            "graceful_timeout": rng.choice((0, 0.05, 0.2)),
            "timeout": 0.05,
        }
        if self.has_tls:
            attributes["ssl_context"] = functools.partial(tls_context, certificate)
        if not self.datagram:
            attributes["drain_backlog"] = rng.random() < 0.3
        if not self.is_calm:
            attributes |= {
                "request_timeout": rng.choice((None, None, 0.05, 0.2)),
                "ssl_handshake_timeout": rng.choice((60, 0.05)),
                "block_on_close": rng.random() < 0.75,
                self.dispatcher.limit: rng.choice((1, 3, 20, 100)),
            }
            if self.dispatcher.limit == "max_threads":
                attributes["daemon_threads"] = rng.random() < 0.3
        return attributes

    # -- its life --------------------------------------------------------------------

    async def run(self, peers: Peers) -> None:
        """Run the round, then check what is left of it."""
        before = Belongings()
        self.server = server = self.dispatcher.make(
            self.kind, self.folder, **self.attributes
        )
        self.peers = peers
        address = server.server_address
        plan = {
            "address": address,
            "datagram": self.datagram,
            "tls": self.has_tls,
            "commands": self.commands,
        }
        await trio.to_thread.run_sync(peers.ask, "begin_chaos", self.seed, CLIENTS, plan)
        block = contextlib.nullcontext() if self.way == "no block" else server
        try:
            with self.hard:
                async with block, trio.open_nursery() as self.nursery:
                    self.nursery.start_soon(self.serve)
                    for number in range(self.disturbances):
                        rng = random.Random(f"{self.seed}/{number}")
                        self.nursery.start_soon(self.disturb, rng)
                    await self.end()
        except BaseException as error:
            self.judge(error)
        if server.fileno() != -1:
            if self.way != "no block":
                self.problems.append("the listener is open")
            await server.server_close()
        if self.attributes.get("daemon_threads"):
            # What they have is theirs until they end.
            while left := list(Belongings().more_than(before)):
                self.left = left
                await trio.sleep(0.01)
        self.problems += Belongings().more_than(before)
        complaints, self.done = await trio.to_thread.run_sync(peers.ask, "end_chaos")
        self.problems += complaints
        self.check(address)

    async def serve(self) -> None:
        while self.way == "handle_request":
            await self.server.handle_request()
        await self.server.serve_forever(0.02)

    async def end(self) -> None:
        """End the round, at some moment."""
        begin, pause = self.moments
        await trio.sleep(begin)
        if self.is_calm and not self.has_tls and not self.datagram:
            await self.be_served()
        first, *second = self.ends
        if second:
            self.nursery.start_soon(self.make_end, first)
            await trio.sleep(pause)
            [first] = second
        await self.make_end(first)
        self.nursery.cancel_scope.cancel()

    async def be_served(self) -> None:
        """A fresh client of a server that nothing has ended is served, whoever else is."""
        ask = functools.partial(trio.to_thread.run_sync, self.peers.ask)
        await ask("request", self.server.server_address, 1, "echo\nfresh")
        answers = await ask("answers")
        if answers != ["fresh"]:
            self.problems.append(f"a fresh client was told {answers}")

    async def make_end(self, name: str) -> None:
        match name:
            case "leave":
                self.nursery.cancel_scope.cancel()
            case "cancel":
                self.hard.cancel()
            case "shutdown":
                await self.server.shutdown()
            case "server_close":
                await self.server.server_close()
            case "raise":
                raise Stop
            case "serve again":
                await self.server.shutdown()
                if self.way == "block":
                    self.nursery.start_soon(self.serve)
                await trio.sleep(self.length / 10)

    async def disturb(self, rng: random.Random) -> None:
        """Be in the way, once."""
        chance = rng.random()
        await trio.sleep(rng.uniform(0, self.length))
        if chance < 0.5:
            path = self.folder / f"fail in {rng.choice(PLACES)}"
            path.touch()
            await trio.sleep(rng.uniform(0, self.length))
            path.unlink(missing_ok=True)
        elif chance < 0.6:
            (self.folder / "deny").touch()
            await trio.sleep(rng.uniform(0, self.length / 3))
            (self.folder / "deny").unlink(missing_ok=True)
        elif chance < 0.7:
            handler = self.server.RequestHandlerClass
            self.server.RequestHandlerClass = self.dispatcher.function
            await trio.sleep(rng.uniform(0, self.length / 3))
            self.server.RequestHandlerClass = handler
        elif chance < 0.8:
            setattr(self.server, self.dispatcher.limit, rng.randrange(1, 10))
        elif chance < 0.9:
            for pid in sorted(getattr(self.server, "active_children", None) or ())[:1]:
                os.kill(pid, signal.SIGKILL)
        else:
            for _ in range(100):
                assert_adds_up(self.server)
                await trio.sleep(0.001)

    # -- what is left of it ----------------------------------------------------------

    def judge(self, error: BaseException) -> None:
        """See whether the server may raise *error*."""
        if isinstance(error, BaseExceptionGroup):
            for leaf in error.exceptions:
                self.judge(leaf)
            return
        expected = (
            isinstance(error, Stop)
            or (isinstance(error, AskedFor) and "ticking" in self.kind)
            # Who wants to serve again may come too late, or too early.
            or (
                isinstance(error, RuntimeError)
                and ("serve again" in self.ends or self.way == "handle_request")
                and ("closing or has been" in str(error) or "not possible" in str(error))
            )
            or (
                isinstance(error, (SystemExit, KeyboardInterrupt))
                and "interrupt x" in self.commands
            )
        )
        if not expected:
            self.problems += traceback.format_exception(error)

    def check(self, address: Any) -> None:
        """See whether something is wrong that is not seen before."""
        seen = dataclasses.asdict(self.server.statistics())
        ended = sum(seen[name] for name in ("completed", "failed", "rejected", "cancelled"))
        if seen["active"] or seen["accepted"] != ended or min(seen.values()) < 0:
            self.problems.append(f"the statistics are {seen}")
        self.seen = {name: value for name, value in seen.items() if value}
        if isinstance(address, str):
            if os.path.lexists(address):
                self.problems.append("the socket's file is there")
        else:
            try:
                bind_again(tuple(address), datagram=self.datagram)
            except OSError as error:
                self.problems.append(f"the port is not free: {error}")
        for text in errors(self.server):
            if text.partition(":")[0] not in EXPECTED_ERRORS and text != NOBODY:
                self.problems.append(f"handle_error() was given {text}")
        self.problems += self.log.take()
        shutil.rmtree(self.folder)


def bind_again(address: Any, *, datagram: bool) -> None:
    """Bind and listen at *address*."""
    kind = socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        if not datagram:
            # The rest of old connections does not matter; a listener does.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        if not datagram:
            sock.listen()


class ErrorLog(logging.Handler):
    """Keeps what is logged as our fault."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        # handle_error() that fails, or finish() after a handler that has failed already.
        if AskedFor.__name__ not in text.splitlines()[-1]:
            self._found.append(f"logged: {text}")

    def take(self) -> list[str]:
        """Return what there is, and forget it."""
        found, self._found = self._found, []
        return found


# -- the watch -----------------------------------------------------------------------------


def task_stacks() -> str:
    """Tell where all tasks are."""
    lines: list[str] = []

    def walk(task: trio.lowlevel.Task, depth: int) -> None:
        indent = "  " * depth
        lines.append(f"{indent}{task.name}")
        for frame, line in task.iter_await_frames():
            code = frame.f_code
            lines.append(f"{indent}  {code.co_filename}:{line} {code.co_name}")
        for nursery in task.child_nurseries:
            for child in nursery.child_tasks:
                walk(child, depth + 1)

    root = trio.lowlevel.current_root_task()
    if root is not None:
        walk(root, 0)
    return "\n".join(lines)


@contextlib.contextmanager
def watched(one: Round) -> Iterator[None]:
    """End the program if the block does not end, and say where it is."""
    token = trio.lowlevel.current_trio_token()

    def tell() -> None:
        print("HANGS", one.left, file=sys.stderr)
        faulthandler.dump_traceback()
        with contextlib.suppress(trio.RunFinishedError):
            token.run_sync_soon(lambda: print(task_stacks(), file=sys.stderr, flush=True))
        threading.Event().wait(2)
        os._exit(3)

    timer = threading.Timer(GUARD, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()


async def run_round(one: Round, peers: Peers) -> None:
    with watched(one):
        await one.run(peers)


def main() -> None:
    """Run the rounds that the command line names."""
    name, seed, first, count = sys.argv[1:5]
    [dispatcher] = [one for one in DISPATCHERS if one.name == name]
    # A forking server has the threads of trio beside it.
    warnings.filterwarnings("ignore", ".*multi-threaded.*fork", DeprecationWarning)
    # A child may be ended between making something and keeping it.
    ignore = functools.partial(warnings.simplefilter, "ignore", ResourceWarning)
    os.register_at_fork(after_in_child=ignore)
    log = ErrorLog()
    logging.getLogger().addHandler(log)
    numbers = itertools.count(int(first))
    with Peers() as peers, tempfile.TemporaryDirectory() as folder:
        certificate = make_certificate(Path(folder))
        for number in itertools.islice(numbers, int(count)):
            one = Round(seed, dispatcher, number, certificate, log)
            print(one, flush=True)
            trio.run(run_round, one, peers)
            print("   ", one.seen, one.done, flush=True)
            if one.problems:
                print("\n".join(["PROBLEMS", *one.problems]), flush=True)
                sys.exit(1)


if __name__ == "__main__":
    main()
