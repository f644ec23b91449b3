"""How long forking stops the event loop: ``python -m tests.benchmarks.stall``.

`os.fork` takes longer the more memory a process has, and nothing else of the program runs
meanwhile. A task that wants to run twice in a millisecond notes how late it was, while a
`ForkingTCPServer` of the same process forks for a hundred connections.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

import trio

from tests.benchmarks.servers import HOST
from tests.benchmarks.servers.with_socketserver import Echo
from trio_socketserver import ForkingTCPServer

FORKS = 100
TICK = 0.0005
"""Seconds."""

CLIENTS = """
import socket, sys, threading

def connect(times):
    for _ in range(times):
        with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as sock:
            sock.sendall(b"hello")
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(100):
                pass

clients = int(sys.argv[4])
times = int(sys.argv[3]) // clients
threads = [threading.Thread(target=connect, args=(times,)) for _ in range(clients)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


async def note_lateness(lateness: list[float]) -> None:
    """Note how many seconds too late each tick comes."""
    while True:
        due = time.perf_counter() + TICK
        await trio.sleep(TICK)
        lateness.append(time.perf_counter() - due)


async def worst_stall(clients: int) -> tuple[float, float]:
    """Serve a hundred connections; return the worst and the median lateness."""
    lateness: list[float] = []
    async with ForkingTCPServer((HOST, 0), Echo) as server, trio.open_nursery() as nursery:
        await nursery.start(server.serve_forever)
        command = [sys.executable, "-c", CLIENTS, HOST, str(server.server_address[1])]
        nursery.start_soon(note_lateness, lateness)
        await trio.run_process(
            [*command, str(FORKS), str(clients)], stdin=subprocess.DEVNULL
        )
        nursery.cancel_scope.cancel()
    return max(lateness), median(lateness)


def main() -> None:
    """Measure, and print a line for each size and number of clients."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.stall")
    parser.add_argument("--megabytes", type=int, default=0, help="memory to have besides")
    memory = bytearray(b"x") * (parser.parse_args().megabytes * 2**20)
    for clients in (1, 4, 20):
        worst, usual = trio.run(worst_stall, clients)
        print(
            f"{FORKS} forks, {clients} clients, {len(memory) >> 20} MB more: "
            f"worst stall {worst * 1000:.1f} ms, median {usual * 1000:.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
