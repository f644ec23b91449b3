"""Access control: ``verify_request()`` decides before a byte is read.

    python examples/access_control.py [PORT] [NETWORK ...]

Clients from the networks (default: this machine) are told their number; others are hung up
on. Try it with ``nc 127.0.0.1 9999``, and see what Ctrl-C reports.

A forgotten ``async`` on ``verify_request()`` is an error when the class is created, so no
attacker finds it first. What the hook raises means "no".
"""

from __future__ import annotations

import sys
from ipaddress import ip_address, ip_network
from typing import Any

from trio_socketserver import NurseryTCPServer, StreamSocket, run


async def count(request: StreamSocket, client_address: Any, server: GuardedServer) -> None:
    statistics = server.statistics()
    number = statistics.accepted - statistics.rejected
    await request.send_all(f"you are number {number}\n".encode())


class GuardedServer(NurseryTCPServer):
    """A server for the clients of some networks."""

    def __init__(self, address: tuple[str, int], networks: list[str]) -> None:
        self.networks = [ip_network(network) for network in networks]
        super().__init__(address, count)

    async def verify_request(self, request: Any, client_address: Any) -> bool:
        client = ip_address(client_address[0])
        return any(client in network for network in self.networks)


def main() -> None:
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9999
    server = GuardedServer(("127.0.0.1", port), sys.argv[2:] or ["127.0.0.1/32"])
    address = "{}:{}".format(*server.server_address)
    run(server, started=lambda: print(f"guarding {address}", flush=True))
    statistics = server.statistics()
    print(f"{statistics.completed} clients served, {statistics.rejected} rejected")


if __name__ == "__main__":
    main()
