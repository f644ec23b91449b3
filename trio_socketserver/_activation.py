"""Sockets that a service manager has opened before it started the program.

systemd's protocol, which others speak too: the variable ``LISTEN_FDS`` says how many there
are, from descriptor 3 on, and ``LISTEN_PID`` which process they are meant for.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Final

FIRST_DESCRIPTOR: Final = 3
"""SD_LISTEN_FDS_START."""

VARIABLES: Final = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "LISTEN_PIDFDID")


def take_listen_fds(environ: MutableMapping[str, str] | None = None) -> list[int]:
    """Return the descriptors that are meant for this process.

    The variables are removed, so that no program started by this one takes them too.

    Args:
        environ: the environment; None for that of this process.
    """
    environ = os.environ if environ is None else environ
    found = {name: environ.pop(name, "") for name in VARIABLES}
    if found["LISTEN_PID"] != str(os.getpid()) or not found["LISTEN_FDS"].isdecimal():
        return []
    return list(range(FIRST_DESCRIPTOR, FIRST_DESCRIPTOR + int(found["LISTEN_FDS"])))
