r"""Count primes: requests that compute, each in a process of its own.

    python examples/cpu_bound.py [PORT] [SECONDS]

Ask it how many primes there are below a number:

    python -c "from socket import *; s = create_connection(('127.0.0.1', 9999)); \
        s.send(b'100000\n'); print(s.recv(99))"

In a thread, such a handler would slow down all others, and nothing could stop it. A process
uses a core of its own, and can be stopped: after SECONDS (10), or when Ctrl-C has been
pressed twice. The handler is one of ``socketserver``, and sees that as a `SystemExit`.
"""

from __future__ import annotations

import itertools
import math
import os
import socketserver
import sys
from typing import Any

from trio_socketserver import ForkingTCPServer, run

LONGEST_LINE = 20


def is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


class CountPrimes(socketserver.StreamRequestHandler):
    """One question. It is computed in the main thread of a child process."""

    timeout = 10  # For the question; the answer has ``request_timeout``.

    def handle(self) -> None:
        line = self.rfile.readline(LONGEST_LINE).strip()
        if not line.isdigit():
            self.wfile.write(b"a number, please\n")
            return
        try:
            count = sum(map(is_prime, range(2, int(line))))
        except SystemExit:
            self.wfile.write(b"stopped\n")
            raise
        self.wfile.write(b"%d\n" % count)


class PrimeServer(ForkingTCPServer):
    max_children = 2 * (os.cpu_count() or 1)  # Some are waiting for their question.

    def __init__(self, port: int, seconds: float) -> None:
        super().__init__(("127.0.0.1", port), CountPrimes)
        self.request_timeout = seconds
        self.numbers = itertools.count(1)

    async def finish_request(self, request: Any, client_address: Any) -> None:
        # Hooks run here, not in the child, so what they count stays counted.
        await super().finish_request(request, client_address)
        print(f"answer {next(self.numbers)}", flush=True)


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9999
    server = PrimeServer(port, float(sys.argv[2]) if len(sys.argv) > 2 else 10)
    host, port = server.server_address
    run(server, started=lambda: print(f"counting primes on {host}:{port}", flush=True))
    seen = server.statistics()
    print(f"{seen.completed} answered, {seen.failed} took too long")


if __name__ == "__main__":
    main()
