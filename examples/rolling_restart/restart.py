"""HAProxy and two replicas, which are restarted one after the other while clients ask on.

    python examples/rolling_restart/restart.py

Enter restarts both, Ctrl-D or Ctrl-C ends all. One more Ctrl-C cuts short the replica that
is just ending. README.md has a client to ask with, and says what is promised.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from subprocess import PIPE, Popen, run

HAPROXY = os.environ.get("HAPROXY", "haproxy")
FOLDER = Path(__file__).resolve().parent
HOST = os.environ.get("HOST", "127.0.0.1")
PORTS = {"a": "7001", "b": "7002"}


def tell_haproxy(command: str) -> None:
    """Send a command to HAProxy; it has taken effect when this returns."""
    with socket.socket(socket.AF_UNIX) as admin, admin.makefile() as answers:
        admin.connect("admin.socket")
        admin.sendall(f"{command}\n".encode())
        if answer := answers.read().strip():
            sys.exit(f"HAProxy: {answer}")


def end_haproxy() -> None:
    with suppress(FileNotFoundError):  # It has not been started.
        os.kill(int(Path("pid").read_text()), signal.SIGTERM)


def start(name: str, place: ExitStack) -> ExitStack:
    """Start a replica, which ends when its place is left; return when it serves."""
    command = [sys.executable, str(FOLDER / "service.py"), HOST, PORTS[name]]
    replica = Popen(command, stdout=PIPE, text=True, process_group=0)  # Ctrl-C is for us.
    place.callback(stop, name, replica)
    if replica.stdout is None or not replica.stdout.readline():
        sys.exit(f"replica {name} has not started")
    print(f"{name} is process {replica.pid}", flush=True)
    return place


def stop(name: str, replica: Popen[str]) -> None:
    """End a replica; return when its last client has been served, or at Ctrl-C."""
    try:
        replica.terminate()
        print(f"{name} has ended, {replica.communicate()[0].strip()}", flush=True)
    finally:
        replica.terminate()  # If it is still there: the second signal cancels.
        replica.wait()


def main(stack: ExitStack) -> None:
    stack.callback(end_haproxy)  # Last. Each is ended, whatever becomes of the others.
    places = {name: start(name, stack.enter_context(ExitStack())) for name in PORTS}
    command = [HAPROXY, "-D", "-p", "pid", "-f", str(FOLDER / "haproxy.cfg")]
    run(command, check=True)  # It returns when HAProxy listens.
    print(f"serving on {HOST}:9999", flush=True)
    for _ in sys.stdin:
        for name, place in places.items():
            tell_haproxy(f"set server replicas/{name} state maint")  # No new connections.
            place.close()
            start(name, place)
            tell_haproxy(f"set server replicas/{name} state ready")
        print("both have been restarted", flush=True)


if __name__ == "__main__":
    with ExitStack() as stack:
        os.chdir(stack.enter_context(tempfile.TemporaryDirectory()))
        main(stack)
