r"""A syslog collector over UDP: prints what programs report, and counts it by severity.

    python examples/syslog_collector.py [PORT]

Feed it with Python's own handler, or with the ``logger`` program:

    python -c "import logging.handlers as h; log = h.logging.getLogger(); \
        log.addHandler(h.SysLogHandler(('127.0.0.1', 5514))); log.error('disk full')"
    logger --udp --server 127.0.0.1 --port 5514 --priority mail.err "no route to host"

Anybody can send anything to a UDP port: what is no syslog message is shown as a notice (as
RFC 3164 has it), and control characters are shown as escapes, so nobody can fake a line.
"""

from __future__ import annotations

import re
import sys
from collections import Counter

from trio_socketserver import DatagramRequestHandler, UDPServer, run

SEVERITIES = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
PRIORITY = re.compile(rb"<(\d{1,3})>")  # RFC 3164, 4.1.1: facility * 8 + severity
LARGEST_PRIORITY = 191
USER_NOTICE = 13


def printable(data: bytes) -> str:
    text = data.rstrip(b"\0\r\n").decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Message(DatagramRequestHandler):
    """One datagram. It gets no reply."""

    server: Collector

    async def handle(self) -> None:
        priority, message = USER_NOTICE, self.packet
        match = PRIORITY.match(message)
        if match and (number := int(match[1])) <= LARGEST_PRIORITY:
            priority, message = number, message[match.end() :]
        severity = SEVERITIES[priority % 8]
        self.server.seen[severity] += 1
        print(f"{self.client_address[0]} {severity}: {printable(message)}", flush=True)


class Collector(UDPServer):
    """Plain, so one datagram after the other: the lines come in the order of arrival."""

    max_packet_size = 65507  # The largest there is over IPv4; socketserver's is 8192.

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Message)
        self.seen: Counter[str] = Counter()


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 5514
    collector = Collector(("127.0.0.1", port))
    host, port = collector.server_address
    run(collector, started=lambda: print(f"collecting on {host}:{port}", flush=True))
    print(", ".join(f"{n} {severity}" for severity, n in collector.seen.most_common()))


if __name__ == "__main__":
    main()
