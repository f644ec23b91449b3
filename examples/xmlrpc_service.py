r"""A whole server of the standard library's, XML-RPC, beside the tasks of a trio program.

    python examples/xmlrpc_service.py [PORT]

Ask it for a forecast, which a task of the program changes:

    python -c "from xmlrpc.client import ServerProxy; \
        print(ServerProxy('http://127.0.0.1:9999').forecast('tomorrow'))"

The functions run in the server's thread, one call at a time. What belongs to trio they
reach by ``trio.from_thread``. A client may call ``stop()``, which ends the server, and so
the program; Ctrl-C does the same, by cancellation.
"""

from __future__ import annotations

import itertools
import signal
import sys
from typing import Any
from xmlrpc.server import SimpleXMLRPCRequestHandler, SimpleXMLRPCServer

import trio

from trio_socketserver import serve_blocking

WEATHER = itertools.cycle(["sun", "rain", "fog"])


class Call(SimpleXMLRPCRequestHandler):
    timeout = 5  # Seconds that a silent client may hold up the others.


class Forecast:
    """What the tasks of the program share. Only trio's thread touches it."""

    def __init__(self) -> None:
        self.weather = next(WEATHER)
        self.asked = 0

    async def change(self) -> None:
        while True:
            await trio.sleep(60)
            self.weather = next(WEATHER)

    def answer(self, day: str) -> str:
        self.asked += 1
        return f"{day}: {self.weather}"


async def main(port: int) -> None:
    forecast = Forecast()
    server = SimpleXMLRPCServer(
        ("127.0.0.1", port), Call, logRequests=False, allow_none=True
    )

    def ask(day: Any) -> str:
        return trio.from_thread.run_sync(forecast.answer, day)

    server.register_function(ask, "forecast")
    server.register_function(server.shutdown, "stop")

    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(forecast.change)
            nursery.start_soon(cancel_on_signal, signals, nursery.cancel_scope)
            print("forecasting on {}:{}".format(*server.server_address), flush=True)
            await serve_blocking(server)
            nursery.cancel_scope.cancel()
    print(f"{forecast.asked} calls answered")


async def cancel_on_signal(signals: Any, scope: trio.CancelScope) -> None:
    await anext(signals)
    scope.cancel()


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if len(sys.argv) > 1 else 9999)
