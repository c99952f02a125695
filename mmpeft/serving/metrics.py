"""/metrics in Prometheus' format: requests and their times, and the engine's own numbers.

Nothing is told by finetune or tenant: the page needs no key, and thousands of finetunes would be as many series.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mmpeft.inference.live import LiveEngine

NOW = ("waiting", "running", "columns", "image_bytes", "prefix_bytes")
"""The engine's numbers that fall again; all others only grow."""
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
OTHER = "other"
GONE = 499
"""Status of a request whose client has closed its connection, as nginx has it."""


class Metrics:
    """The numbers of one server."""

    def __init__(self, live: LiveEngine):
        self.registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self.requests = Counter(
            "mmpeft_requests",
            "Requests that have ended; 499: their client had gone.",
            labels,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "mmpeft_request_seconds",
            "From a request's headers to the end of its answer.",
            ("endpoint",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "mmpeft_first_token_seconds",
            "From a request's submission to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.registry.register(_OfEngine(live))

    def page(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class _OfEngine(Collector):
    """`LiveEngine.statistics`, read when the page is."""

    def __init__(self, live: LiveEngine):
        self.live = live

    def collect(self) -> Iterator[Metric]:
        for name, value in self.live.statistics().items():
            kind = GaugeMetricFamily if name in NOW else CounterMetricFamily
            yield kind(f"mmpeft_engine_{name}", "See LiveEngine.statistics.", value=value)


class Observed:
    """ASGI middleware, outside of all others: counts and times every request.

    Args:
        app: answers.
        metrics: of the server.
        endpoints: the paths that have a name of their own.
    """

    def __init__(self, app: Any, metrics: Metrics, endpoints: set[str]):
        self.app, self.metrics, self.endpoints = app, metrics, endpoints

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, ended, start = GONE, False, time.monotonic()

        async def watched(event: Any) -> None:
            nonlocal status, ended
            if event["type"] == "http.response.start":
                status = event["status"]
            await send(event)
            ended = ended or (event["type"] == "http.response.body" and not event.get("more_body", False))

        try:
            await self.app(scope, receive, watched)
        finally:
            endpoint = scope["path"] if scope["path"] in self.endpoints else OTHER
            self.metrics.requests.labels(endpoint, str(status if ended else GONE)).inc()
            self.metrics.seconds.labels(endpoint).observe(time.monotonic() - start)
