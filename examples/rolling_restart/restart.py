r"""HAProxy and two replicas, which are restarted one after the other while clients ask on.

    python examples/rolling_restart/restart.py

Where HAProxy is not on the PATH, set HAPROXY to where it is. Enter restarts both replicas,
Ctrl-D ends everything. README.md says what is promised. Ask from another terminal:

    python -c "from socket import *; s = create_connection(('127.0.0.1', 9999)); \
        s.send(b'hello\n'); print(s.recv(99))"
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

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


def start(name: str) -> subprocess.Popen[str]:
    """Start a replica; return when it serves."""
    command = [sys.executable, str(FOLDER / "service.py"), HOST, PORTS[name]]
    # In a group of its own, since Ctrl-C is for this program to answer.
    replica = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    if replica.stdout is None or not replica.stdout.readline():
        sys.exit(f"replica {name} has not started")
    print(f"{name} is process {replica.pid}", flush=True)
    return replica


def stop(name: str, replica: subprocess.Popen[str]) -> None:
    """End a replica; return when its last client has been served."""
    replica.terminate()
    print(f"{name} has ended, {replica.communicate()[0].strip()}", flush=True)


def main(replicas: dict[str, subprocess.Popen[str]]) -> None:
    for name in PORTS:
        replicas[name] = start(name)
    command = [HAPROXY, "-D", "-p", "pid", "-f", str(FOLDER / "haproxy.cfg")]
    subprocess.run(command, check=True)  # It returns when HAProxy listens.
    print(f"serving on {HOST}:9999", flush=True)
    for _ in sys.stdin:
        for name in PORTS:
            tell_haproxy(f"set server replicas/{name} state maint")  # No new connections.
            stop(name, replicas[name])
            replicas[name] = start(name)
            tell_haproxy(f"set server replicas/{name} state ready")
        print("both have been restarted", flush=True)


if __name__ == "__main__":
    running: dict[str, subprocess.Popen[str]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        try:
            main(running)
        finally:
            for name, replica in running.items():
                stop(name, replica)
            if os.path.exists("pid"):
                os.kill(int(Path("pid").read_text()), signal.SIGTERM)
