"""A check while building: every public member of every public class is described."""

from __future__ import annotations

import inspect

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

import trio_socketserver

LEFT_OUT = {"receive_idle"}
"""What is for the package's own modules: `StreamReader` calls it on a `StreamSocket`."""

logger = logging.getLogger(__name__)


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of what is missing (``env-check-consistency``)."""
    described = env.domains["py"].objects  # type: ignore[attr-defined]
    public = [getattr(trio_socketserver, name) for name in trio_socketserver.__all__]
    classes = [found for found in public if inspect.isclass(found)]
    for owner in {base for found in classes for base in found.__mro__}:
        heirs = [found for found in classes if issubclass(found, owner)]
        for name in vars(owner) if owner.__module__.startswith("trio_socketserver") else ():
            if not name.startswith("_") and name not in LEFT_OUT:
                names = [f"trio_socketserver.{heir.__name__}.{name}" for heir in heirs]
                if not any(candidate in described for candidate in names):
                    logger.warning("%s.%s is not described", owner.__qualname__, name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
