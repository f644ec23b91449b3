"""The command: ``python -m trio_socketserver [HANDLER] --bind ADDRESS``.

What a user can get wrong ends with one line on stderr and exit code 2, before anything is
served; a traceback is for our own faults only.

Its parts: `_cli_arguments` reads the arguments, `_cli_server` makes the server,
`_cli_output` says where it is, `_cli_log` writes the log, and `_cli_statistics` answers
SIGUSR1. None of them knows this module.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from ._cli_arguments import PROGRAM, UsageError, make_parser
from ._cli_log import configure_logging
from ._cli_output import numbers_of, say, shown, try_it, versions
from ._cli_server import make_server
from ._cli_statistics import StatisticsOnSignal
from ._run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what stands behind the program's name; None for `sys.argv`.

    Returns:
        The exit code: 0, or 2 for what the user can mend.
    """
    # Before the user's module is imported, so that its own choice takes precedence.
    with StatisticsOnSignal() as statistics:
        try:
            options = make_parser().parse_args(arguments)
            if options.version:
                say(versions())
                return 0
            server: Any = make_server(options)
        except UsageError as error:
            line = " ".join(str(error).split())
            print(f"{PROGRAM}: {line}", file=sys.stderr)
            return 2
        normal = logging.ERROR if options.quiet else logging.WARNING
        configure_logging(logging.INFO if options.verbose else normal)

        def started() -> None:
            statistics.show_those_of(server)
            if not options.quiet:
                what = options.handler or server.RequestHandlerClass.__name__
                say(f"serving {what} on {shown(server.server_address)}")
                say(f"try: {try_it(server)}")

        run(server, started=started)
        if not options.quiet:
            say(numbers_of(server))
        return 0
