r"""A blocking handler that calls back into trio, and publishes on a memory channel.

    python examples/blocking_handler.py [PORT]

Send it lines, each of which a task of the program numbers and prints:

    python -c "from socket import *; s = create_connection(('127.0.0.1', 9999)); \
        s.send(b'hello\n'); print(s.recv(99))"

``Publisher`` is a handler of ``socketserver``, but for the line that sends. There it may
wait: if the channel is full, its thread waits, and so does its client. Ctrl-C gives clients
three seconds to say their last lines, then wakes the threads that wait for them.
"""

from __future__ import annotations

import signal
import socketserver
import sys
from typing import Any, cast

import trio

from trio_socketserver import ThreadingTCPServer

CHANNEL_SIZE = 10  # Lines under way before handlers wait.
LONGEST_LINE = 1000  # Of a longer one, each piece is taken for a line.


class Publisher(socketserver.StreamRequestHandler):
    """One client, in a thread of its own."""

    timeout = 60

    def handle(self) -> None:
        server = cast(PublishingServer, self.server)
        while line := self.rfile.readline(LONGEST_LINE):
            trio.from_thread.run(server.lines.send, line.decode(errors="replace"))
            self.wfile.write(b"published\n")


class PublishingServer(ThreadingTCPServer):
    graceful_timeout = 3  # Seconds.

    def __init__(self, port: int, lines: trio.MemorySendChannel[str]) -> None:
        super().__init__(("127.0.0.1", port), Publisher)
        self.lines = lines


async def number(lines: trio.MemoryReceiveChannel[str]) -> None:
    count = 0
    async for line in lines:
        count += 1
        print(f"{count}: {line.rstrip()!r}", flush=True)


async def cancel_on_signal(signals: Any, scope: trio.CancelScope) -> None:
    await anext(signals)
    scope.cancel()


async def main(port: int) -> None:
    sender, receiver = trio.open_memory_channel[str](CHANNEL_SIZE)
    accepting = trio.CancelScope()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(number, receiver)
            nursery.start_soon(cancel_on_signal, signals, accepting)
            async with sender, PublishingServer(port, sender) as server:
                print("publishing on {}:{}".format(*server.server_address), flush=True)
                with accepting:
                    await server.serve_forever()
            # The server has no threads any more, so that was the last line.


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 9999)
