"""What this gateway counts, and how Prometheus reads it.

Counters of several gunicorn processes lie in files and are added up when they are read
(`PROMETHEUS_MULTIPROC_DIR`, which `web/gunicorn.py` sets). They are read on a listener of their own
(`TIDEGATE_METRICS_BIND`), which tenants don't reach: which models are asked for, and how often, is
the operator's to know.

prometheus-flask-exporter writes them down; its own hooks are not used. They take 23 µs a request
where these take 10, and count by the method as the client wrote it: any word a stranger likes would
be kept for good.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_flask_exporter import PrometheusMetrics

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """One per gateway process; what is registered is its own, so that tests may make several."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._exporter = PrometheusMetrics(
            None, path=None, export_defaults=False, registry=registry
        )
        self._requests = Histogram(
            "tidegate_http_request_duration_seconds",
            "Requests by route and status, to the moment their answer begins.",
            ("method", "route", "status"),
            buckets=BUCKETS,
            registry=registry,
        )
        self._observers: dict[tuple[str, str, int], Callable[[float], None]] = {}
        """By labels: to look them up takes longer than to count."""
        self._in_flight = Gauge(
            "tidegate_http_requests_in_flight",
            "Requests being worked on.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._refused = Counter(
            "tidegate_realtime_refused",
            "Realtime requests refused before anything was done for them: they would have waited"
            " too long for their turn.",
            ("model",),
            registry=registry,
        )
        self._asked = Counter(
            "tidegate_cache_requests",
            "Requests for models whose answers may be given again: hit, collapsed, miss, bypass.",
            ("model", "outcome"),
            registry=registry,
        )
        self._stored = Counter(
            "tidegate_cache_stored_bytes",
            "Bytes of answers that were kept.",
            ("model",),
            registry=registry,
        )
        self._held = Gauge(
            "tidegate_cache_bytes",
            "Bytes of answers in the gateways' memory.",
            multiprocess_mode="livesum",
            registry=registry,
        )

    def install(self, app: Flask) -> None:
        """Count every request of this app, refused ones among them."""
        app.before_request(self._begin)
        app.after_request(self._end)
        app.teardown_request(self._over)

    def began(self) -> None:
        """One more request is worked on."""
        self._in_flight.inc()

    def over(self) -> None:
        """One less."""
        self._in_flight.dec()

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request's answer begins."""
        labels = (method, route, status)
        observe = self._observers.get(labels)
        if observe is None:
            observe = self._observers[labels] = self._requests.labels(*labels).observe
        observe(seconds)

    def _begin(self) -> None:
        g.began = time.perf_counter()
        self.began()

    def _end(self, response: Response) -> Response:
        if "began" in g:
            # What no route is for has no name of ours, and none of the client's.
            rule = request.url_rule
            named = (request.method, rule.rule) if rule else ("", "")
            self.observe(*named, response.status_code, time.perf_counter() - g.began)
        return response

    def _over(self, _error: BaseException | None) -> None:
        if g.pop("began", None) is not None:
            self.over()

    def refused(self, model: str) -> None:
        self._refused.labels(model).inc()

    def cache_asked(self, model: str, outcome: str) -> None:
        self._asked.labels(model, outcome).inc()

    def cache_stored(self, model: str, size: int) -> None:
        self._stored.labels(model).inc(size)

    def cache_holds(self, size: int) -> None:
        self._held.set(size)

    def render(self, accept: str | None) -> tuple[str, str]:
        """All of it, and its content type."""
        text, kind = self._exporter.generate_metrics(accept)
        return str(text), str(kind)
