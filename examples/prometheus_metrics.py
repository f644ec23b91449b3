"""The numbers of a server, for Prometheus: its client's HTTP handler in the same program.

    python examples/prometheus_metrics.py [PORT] [METRICS_PORT]

It needs ``pip install prometheus-client``. Send a line, and look at the numbers:

    echo hello | nc -N 127.0.0.1 9999
    curl http://127.0.0.1:8000/metrics

The handler is prometheus_client's, unmodified, in a server of the standard library's that
`serve_blocking` runs. Numbers are read when Prometheus asks, so nothing is counted twice.
The metrics end last: one can watch the echo server drain.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from http.server import ThreadingHTTPServer

import trio
from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trio_socketserver import (
    BaseServer,
    NurseryTCPServer,
    StreamRequestHandler,
    serve_blocking,
)


class ServerCollector(Collector):
    """What a server's ``statistics()`` are when Prometheus asks."""

    def __init__(self, server: BaseServer) -> None:
        self.server = server

    def collect(self) -> Iterator[Metric]:
        # A thread asks. Read in trio's, the numbers are of one moment, and add up.
        seen = trio.from_thread.run_sync(self.server.statistics)
        yield CounterMetricFamily("echo_accepted", "Connections so far.", seen.accepted)
        yield GaugeMetricFamily("echo_active", "Connections now.", seen.active)
        ended = CounterMetricFamily("echo_ended", "Connections over.", labels=["outcome"])
        for outcome in ("completed", "failed", "rejected", "cancelled"):
            ended.add_metric([outcome], getattr(seen, outcome))
        yield ended


class Echo(StreamRequestHandler):
    timeout = 60

    async def handle(self) -> None:
        async for line in self.rfile:
            await self.wfile.write(line)


async def main(port: int, metrics_port: int) -> None:
    server = NurseryTCPServer(("127.0.0.1", port), Echo)
    server.graceful_timeout = 10
    registry = CollectorRegistry()
    registry.register(ServerCollector(server))
    handler = MetricsHandler.factory(registry)
    metrics = ThreadingHTTPServer(("127.0.0.1", metrics_port), handler)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            print("metrics on {}:{}".format(*await nursery.start(serve_blocking, metrics)))
            async with server:
                nursery.start_soon(server.serve_forever)
                print("echoing on {}:{}".format(*server.server_address), flush=True)
                await anext(signals)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    port, metrics_port = [*sys.argv[1:], *["9999", "8000"][len(sys.argv) - 1 :]]
    trio.run(main, int(port), int(metrics_port))
