"""One server, alone, for the suite or for a profiler.

``python -m tests.benchmarks.servers "bare epoll" tcp`` prints its port and serves until it
is killed.
"""

from __future__ import annotations

import argparse
import resource
import sys
from importlib import import_module
from typing import cast, get_args

from tests.benchmarks.servers import PEERS, Serve
from tests.benchmarks.workloads import Server


def announce(port: int) -> None:
    """Tell whoever started this process where to connect."""
    print(port, flush=True)


def allow_descriptors() -> None:
    """Raise the limit as far as it may be: the usual 1,024 are too few connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main() -> None:
    """Serve as the named peer."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.servers")
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("server", choices=get_args(Server))
    options = parser.parse_args()
    peer = PEERS[options.peer]
    entry = getattr(peer, options.server)
    if entry is None:
        sys.exit(f"{peer.name} has no {options.server} server")
    if absent := peer.absent():
        sys.exit(f"{peer.name} needs {', '.join(absent)}, which is not installed")
    allow_descriptors()
    module, function = entry.split(":")
    serve = cast(Serve, getattr(import_module(f"{__package__}.{module}"), function))
    serve(announce)


if __name__ == "__main__":
    main()
