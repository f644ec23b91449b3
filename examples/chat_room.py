"""A chat room: tasks that share state through memory channels.

    python examples/chat_room.py [PORT]

Join it from several terminals with ``nc 127.0.0.1 9999`` or ``telnet 127.0.0.1 9999``. The
first line is your name. Everybody has an outbox, and a task that empties it, so nobody who
speaks ever waits for a slow reader; one who lags a hundred messages behind is dropped.
Ctrl-C says goodbye to everybody.
"""

from __future__ import annotations

import sys

import trio

from trio_socketserver import NurseryTCPServer, StreamRequestHandler, run

OUTBOX_SIZE = 100


class Visitor(StreamRequestHandler):
    """One connection: this task reads it, a second one writes to it."""

    server: ChatRoom
    max_line_size = 1000

    async def handle(self) -> None:
        await self.wfile.write(b"your name? ")
        # Iterating, by anext() too, is a wait that ends when the server drains.
        name = (await anext(self.rfile, b"")).strip()
        if not name:
            return
        self.outbox, self.inbox = trio.open_memory_channel[bytes](OUTBOX_SIZE)
        async with trio.open_nursery() as nursery:
            self.visit = nursery.cancel_scope
            nursery.start_soon(self.deliver)
            self.server.visitors.add(self)
            self.server.say(b"* %b is here" % name)
            try:
                async for line in self.rfile:
                    self.server.say(b"%b: %b" % (name, line.rstrip()))
            finally:
                self.server.visitors.discard(self)
                self.server.say(b"* %b has left" % name)
                self.outbox.close()  # deliver() ends when it is empty.

    async def deliver(self) -> None:
        async for message in self.inbox:
            await self.wfile.write(message + b"\r\n")

    async def finish(self) -> None:
        # Even a second Ctrl-C does not cancel this; it has cleanup_timeout seconds.
        if self.server.draining.is_set():
            await self.wfile.write(b"* the room closes, goodbye\r\n")
        await super().finish()


class ChatRoom(NurseryTCPServer):
    """The room is the server, which every handler sees as ``self.server``."""

    graceful_timeout = 5  # Seconds for slow readers when the room closes.

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Visitor)
        self.visitors: set[Visitor] = set()

    def say(self, message: bytes) -> None:
        for visitor in self.visitors:
            try:
                visitor.outbox.send_nowait(message)
            except trio.WouldBlock:
                visitor.visit.cancel()


if __name__ == "__main__":
    room = ChatRoom(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 9999))
    address = "{}:{}".format(*room.server_address)
    run(room, started=lambda: print(f"chatting on {address}", flush=True))
