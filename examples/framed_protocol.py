"""A protocol of length-prefixed frames: send a block of bytes, get its SHA-256 back.

    python examples/framed_protocol.py [PORT]

Each frame is four bytes of length (big-endian), then so many bytes. Try it:

    python -c "from socket import *; s = create_connection(('127.0.0.1', 9999)); \
        s.send(b'\\0\\0\\0\\5hello'); print(s.recv(99))"

A length is a promise of the peer's, so it is checked before memory is spent on it. A stream
may end anywhere: between two frames that is the end, inside of one an error. And a client
that is between two frames when the server drains is idle, and sent away.
"""

from __future__ import annotations

import hashlib
import struct
import sys

import trio

from trio_socketserver import IncompleteRead, NurseryTCPServer, StreamRequestHandler, run

LENGTH = struct.Struct("!I")
LARGEST_FRAME = 1024 * 1024
FRAME_TIMEOUT = 10  # Seconds from a frame's length to its last byte.


class FrameError(ValueError):
    """The client does not keep to the protocol; it is told so."""


class Digests(StreamRequestHandler):
    async def handle(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.dismiss_when_draining)
            try:
                while (size := await self.receive_size()) is not None:
                    frame = await self.receive_frame(size)
                    await self.send_frame(hashlib.sha256(frame).digest())
            except FrameError as error:
                await self.send_frame(b"error: " + str(error).encode())
            nursery.cancel_scope.cancel()

    async def dismiss_when_draining(self) -> None:
        await self.server.draining.wait()
        self.idle.cancel()

    async def receive_size(self) -> int | None:
        """Return a frame's size, or None when the client or the server has had enough."""
        with trio.CancelScope() as self.idle:
            if self.server.draining.is_set():
                self.idle.cancel()
            try:
                (size,) = LENGTH.unpack(await self.rfile.readexactly(LENGTH.size))
                return int(size)
            except IncompleteRead as error:
                if error.partial:
                    raise
        return None

    async def receive_frame(self, size: int) -> bytes:
        if size > LARGEST_FRAME:
            raise FrameError(f"a frame may have {LARGEST_FRAME} bytes, not {size}")
        with trio.move_on_after(FRAME_TIMEOUT):
            return await self.rfile.readexactly(size)
        raise FrameError(f"a frame must be complete within {FRAME_TIMEOUT} s")

    async def send_frame(self, frame: bytes) -> None:
        await self.wfile.write(LENGTH.pack(len(frame)) + frame)


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9999
    server = NurseryTCPServer(("127.0.0.1", port), Digests)
    address = "{}:{}".format(*server.server_address)
    run(server, started=lambda: print(f"hashing on {address}", flush=True))
