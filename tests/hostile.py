"""Plain clients in a process of their own, for the tests of load and of chaos.

So their descriptors are not the server's, no forked child keeps their connections open,
and what they do costs the server's interpreter nothing. `Peers` is that process: it is
asked one thing at a time, with a line of JSON, and answers with another. Everything random
is drawn from a seed that it is given.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, Self

PATIENCE = 60.0
"""Seconds for what has to happen: generous, because it is only reached by what hangs."""

SOURCES = 8
"""Addresses that connections come from, so that ports do not run out."""

AT_ONCE = 100
"""Connections that are made before the server is waited for: fewer than it queues."""

IP_BIND_ADDRESS_NO_PORT = 24
"""Linux: choose the port at connect(), when it need not differ for different peers."""

RESET = struct.pack("ii", 1, 0)


class Peers:
    """The process, for the length of a block."""

    def __enter__(self) -> Self:
        # Python 3.11 loses sockets that are reset while they are wrapped.
        flags = ["-W", "error", "-W", "ignore::ResourceWarning"]
        self._process = subprocess.Popen(
            [sys.executable, *flags, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._process:
            self._process.kill()

    def ask(self, what: str, *arguments: Any) -> Any:
        """Have the process call one of `COMMANDS`, and return what that does."""
        self.begin(what, *arguments)
        return self.result()

    def begin(self, what: str, *arguments: Any) -> None:
        """Have the process call one of `COMMANDS`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([what, *arguments]) + "\n")
        self._process.stdin.flush()

    def result(self) -> Any:
        """Return what it has returned."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(2 * PATIENCE, self._process.kill)
        watchdog.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watchdog.cancel()
            watchdog.join()
        assert line, f"the clients have ended: {self._process.wait()}"
        return json.loads(line)


# -- many clients that are alike -----------------------------------------------------------

_numbers = itertools.count()
_held: list[socket.socket] = []


def connect(address: Any) -> socket.socket:
    """Return a plain blocking socket, connected to *address*."""
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
    else:
        sock = socket.socket()
        address = tuple(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(PATIENCE)
    try:
        if isinstance(address, tuple) and sys.platform == "linux":
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((f"127.0.1.{1 + next(_numbers) % SOURCES}", 0))
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def close_with_reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # A Unix socket has no such thing.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


def receive_to_end(sock: socket.socket) -> bytes:
    received = b""
    while chunk := sock.recv(65536):
        received += chunk
    return received


def converse(address: Any, count: int, line: bytes) -> list[socket.socket]:
    """Have so many connections say a line and hear it, and return them."""
    clients = []
    for _ in range(count):
        client = connect(address)
        clients.append(client)
        client.sendall(line)
    for client in clients:
        received = b""
        while len(received) < len(line):
            chunk = client.recv(len(line))
            assert chunk
            received += chunk
        assert received == line
    return clients


def in_parts(count: int) -> Iterator[int]:
    for done in range(0, count, AT_ONCE):
        yield min(AT_ONCE, count - done)


def hold(address: Any, count: int) -> int:
    """Have connections that have been served once, and say no more."""
    for part in in_parts(count):
        _held.extend(converse(address, part, b"hello\n"))
    return len(_held)


def let_go() -> int:
    """Wait until the server has ended what is held; return how many ends were regular."""
    regular = 0
    while _held:
        with _held.pop() as sock, contextlib.suppress(ConnectionResetError):
            regular += sock.recv(1) == b""
    return regular


def scan(address: Any, count: int) -> int:
    """Connect and reset, *count* times; return how many others were served meanwhile."""
    served = 0
    for part in in_parts(count):
        for _ in range(part):
            close_with_reset(connect(address))
        # The kernel's queue is one: when this one is served, the others are out of it.
        for client in converse(address, 1, b"fresh\n"):
            client.close()
            served += 1
    return served


def short(address: Any, count: int) -> int:
    """Be served *count* times, each time over a connection of its own."""
    served = 0
    for part in in_parts(count):
        for client in converse(address, part, b"short\n"):
            client.shutdown(socket.SHUT_WR)
            assert client.recv(1) == b""
            client.close()
            served += 1
    return served


def request(address: Any, count: int, text: str) -> None:
    """Send *count* requests at once; `answers` tells of the replies."""
    for _ in range(count):
        client = connect(address)
        _held.append(client)
        client.sendall(text.encode())
        client.shutdown(socket.SHUT_WR)


def answers() -> list[str]:
    """Wait for the replies to what was sent by `request`."""
    received = []
    while _held:
        with _held.pop(0) as sock:
            received.append(receive_to_end(sock).decode())
    return received


def flood(address: Any, seconds: float) -> int:
    """Send datagrams as fast as possible; return how many."""
    sent = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.connect(tuple(address))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(100):
                sock.send(b"flood")
                sent += 1
    return sent


# -- clients of all kinds ------------------------------------------------------------------


class Client(threading.Thread):
    """A client that does one thing after another until the round is over.

    Attributes:
        complaints: what the server has done wrong.
        done: how often each behaviour was begun.
    """

    def __init__(self, seed: str, plan: dict[str, Any], stop: threading.Event) -> None:
        super().__init__(name=seed, daemon=True)
        self.rng = random.Random(seed)
        self.address = plan["address"]
        self.plan = plan
        self.stop = stop
        self.complaints: list[str] = []
        self.done: dict[str, int] = {}

    def run(self) -> None:
        kinds = DATAGRAM_BEHAVIOURS if self.plan["datagram"] else STREAM_BEHAVIOURS
        while not self.stop.is_set():
            behave = self.rng.choice(kinds)
            self.done[behave.__name__] = self.done.get(behave.__name__, 0) + 1
            try:
                behave(self)
            except OSError:
                self.pause(0.01)  # What servers that are being ended do to clients.
            except Exception as error:
                self.complaints.append(f"{behave.__name__}: {error!r}")
            self.pause(0.02)

    def pause(self, most: float) -> None:
        """Wait a little, or until the round is over."""
        self.stop.wait(self.rng.uniform(0, most))

    def stay(self) -> None:
        """Wait a little longer; or until the server has ended, which it must by itself."""
        self.stop.wait(PATIENCE if self.rng.random() < 0.5 else self.rng.uniform(0, 0.3))

    def complain(self, text: str) -> None:
        self.complaints.append(text)

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """Have a connection; in the end it must end, because the server has."""
        with connect(self.address) as sock:
            yield sock
            if self.stop.is_set() and sock.fileno() != -1:
                sock.settimeout(PATIENCE)
                try:
                    with contextlib.suppress(ConnectionError):
                        while sock.recv(65536):
                            pass
                except TimeoutError:
                    self.complain("a connection was left open")

    def secured(self, sock: socket.socket) -> socket.socket:
        """Shake hands, if that is the server's way."""
        if not self.plan["tls"]:
            return sock
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        duplicate = sock.dup()  # wrap_socket() takes it away from who looks at the end.
        duplicate.settimeout(PATIENCE)
        try:
            return context.wrap_socket(duplicate)
        except BaseException:
            duplicate.close()
            raise

    def data(self, most: int) -> bytes:
        return self.rng.randbytes(self.rng.choice((0, 1, 100, most)))


def check(client: Client, said: bytes, reply: bytes, heard: bytes) -> None:
    """What is heard is the reply, or the beginning of it where the server was ended.

    For some time the server may have had a handler that says all in capitals.
    """
    if not reply.startswith(heard) and not said.upper().startswith(heard):
        client.complain(f"to {said[:30]!r} the reply was {heard[:30]!r}")


def regular(client: Client) -> None:
    """Say something, hear it, and go."""
    data = client.data(200_000)
    with client.connection() as sock, client.secured(sock) as talk:
        received = b""
        try:
            talk.sendall(b"echo\n" + data)
            sock.shutdown(socket.SHUT_WR)
            received = receive_to_end(talk)
        finally:
            check(client, b"echo\n" + data, data, received)


def parked(client: Client) -> None:
    """Keep a handler waiting, then let it go on, or not."""
    with client.connection() as sock, client.secured(sock) as talk:
        talk.sendall(b"park\n")
        check(client, b"park\n", b"parked\n", talk.recv(7))
        client.stay()
        if client.rng.random() < 0.5 and not client.stop.is_set():
            close_with_reset(sock)


def commanding(client: Client) -> None:
    """Have the handler do something odd."""
    commands = (
        "leave",
        "tell",
        "fail now",
        "fail_together now and then",
        "no_such_thing",
        "",
        *client.plan["commands"],
    )
    with client.connection() as sock, client.secured(sock) as talk:
        talk.sendall(client.rng.choice(commands).encode() + b"\n")
        if client.rng.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
        receive_to_end(talk)


def silent(client: Client) -> None:
    """Say nothing."""
    with client.connection() as sock:
        client.stay()
        if not client.stop.is_set() and client.rng.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1)


def slow_loris(client: Client) -> None:
    """Say a byte now and then."""
    with client.connection() as sock, client.secured(sock) as talk:
        for _ in range(client.rng.randrange(30)):
            if client.stop.is_set():
                return
            talk.sendall(b"e")
            client.pause(0.03)
        client.stay()


def resetting(client: Client) -> None:
    """Reset in the middle of something."""
    with client.connection() as sock:
        sock.settimeout(0.05)
        sock.sendall(b"echo\n" + client.data(100_000))
        client.pause(0.02)
        close_with_reset(sock)


def never_reading(client: Client) -> None:
    """Have much to say and nobody to hear it."""
    with client.connection() as sock, client.secured(sock) as talk:
        talk.settimeout(0.1)
        for _ in range(40):
            talk.sendall(b"echo\n" + bytes(100_000))
        sock.shutdown(socket.SHUT_WR)
        client.stay()


def huge_line(client: Client) -> None:
    """Send more of a line than anybody should."""
    with client.connection() as sock, client.secured(sock) as talk:
        talk.settimeout(0.2)
        for _ in range(client.rng.randrange(40)):
            talk.sendall(b"x" * 65536)
        if client.rng.random() < 0.5:
            talk.sendall(b"\n")
            receive_to_end(talk)


def garbage(client: Client) -> None:
    """Send any bytes: to a server with TLS, something that is not TLS."""
    with client.connection() as sock:
        sock.sendall(client.data(5_000) + b"\n")
        if client.rng.random() < 0.5:
            sock.shutdown(socket.SHUT_WR)
        sock.settimeout(0.2)
        receive_to_end(sock)


def plain_text(client: Client) -> None:
    """Speak to a server with TLS as to one without."""
    with client.connection() as sock:
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        sock.settimeout(0.2)
        receive_to_end(sock)


def aborted_handshake(client: Client) -> None:
    """Begin to shake hands, and do not go on."""
    with client.connection() as sock:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        end = context.wrap_bio(incoming, outgoing)
        with contextlib.suppress(ssl.SSLWantReadError):
            end.do_handshake()
        hello = outgoing.read()
        sock.sendall(hello[: client.rng.randrange(len(hello) + 1)])
        if client.rng.random() < 0.5:
            client.pause(0.1)
        match client.rng.randrange(3):
            case 0:
                close_with_reset(sock)
            case 1:
                sock.shutdown(socket.SHUT_WR)
            case _:
                client.stay()


def ragged_end(client: Client) -> None:
    """Leave in the middle, without a word."""
    with client.connection() as sock, client.secured(sock) as talk:
        talk.sendall(b"echo\nhalf of what")
        client.pause(0.02)


STREAM_BEHAVIOURS = (
    regular,
    regular,
    regular,
    parked,
    parked,
    commanding,
    commanding,
    silent,
    slow_loris,
    resetting,
    resetting,
    never_reading,
    huge_line,
    garbage,
    plain_text,
    aborted_handshake,
    ragged_end,
)


@contextlib.contextmanager
def datagrams(client: Client, *, named: bool = True) -> Iterator[socket.socket]:
    unix = isinstance(client.address, str)
    family = socket.AF_UNIX if unix else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.1)
        if unix and named:
            sock.bind("")
        sock.connect(client.address if unix else tuple(client.address))
        yield sock


def regular_datagram(client: Client) -> None:
    """Ask, and be answered or not."""
    # Our name may have been another's before, whose answers come late.
    data = f"<{client.rng.getrandbits(64)}>".encode() + client.data(2_000)
    with datagrams(client) as sock:
        sock.send(b"echo\n" + data)
        while not (reply := sock.recv(65536)).removeprefix(b"ECHO\n").startswith(data[:18]):
            pass
        if reply not in (data, (b"echo\n" + data).upper()):
            client.complain(f"to {data[:30]!r} the reply was {reply[:30]!r}")


def gone_datagram(client: Client) -> None:
    """Ask, and be gone when the answer comes."""
    for _ in range(10):
        with datagrams(client) as sock:
            sock.send(b"echo\nanybody?")


def nameless_datagram(client: Client) -> None:
    """Ask without a name, where there is such a thing."""
    with datagrams(client, named=False) as sock:
        sock.send(b"echo\nnobody")


def odd_datagram(client: Client) -> None:
    """Send any bytes, or have the handler do something odd."""
    commands = ("fail now", "tell", "no_such_thing", *client.plan["commands"])
    with datagrams(client) as sock:
        for _ in range(5):
            if client.rng.random() < 0.5:
                sock.send(client.data(60_000))
            else:
                sock.send(client.rng.choice(commands).encode() + b"\n")


def unread_datagrams(client: Client) -> None:
    """Ask much, and read no answer."""
    with datagrams(client) as sock:
        for _ in range(100):
            sock.send(b"echo\n" + bytes(2_000))
        client.pause(0.1)


DATAGRAM_BEHAVIOURS = (
    regular_datagram,
    regular_datagram,
    gone_datagram,
    nameless_datagram,
    odd_datagram,
    unread_datagrams,
)

_clients: list[Client] = []
_stop = threading.Event()


def begin_chaos(seed: str, count: int, plan: dict[str, Any]) -> None:
    """Let clients of all kinds loose on a server."""
    _stop.clear()
    _clients[:] = [Client(f"{seed}/{number}", plan, _stop) for number in range(count)]
    for client in _clients:
        client.start()


def end_chaos() -> list[Any]:
    """End them; return what they have to complain of, and what they have done."""
    _stop.set()
    complaints: list[str] = []
    done: dict[str, int] = {}
    for client in _clients:
        client.join(PATIENCE)
        if client.is_alive():
            complaints.append(f"a client hangs: {stack_of(client)}")
        complaints += client.complaints
        for name, count in client.done.items():
            done[name] = done.get(name, 0) + count
    return [complaints, done]


def stack_of(thread: threading.Thread) -> list[str]:
    frame = sys._current_frames().get(thread.ident or 0)
    return [] if frame is None else traceback.format_stack(frame)[-4:]


COMMANDS = {
    command.__name__: command
    for command in (
        hold,
        let_go,
        scan,
        short,
        request,
        answers,
        flood,
        begin_chaos,
        end_chaos,
    )
}


def main() -> None:
    answer = functools.partial(print, flush=True)
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        answer(json.dumps(COMMANDS[what](*arguments)))


if __name__ == "__main__":
    main()
