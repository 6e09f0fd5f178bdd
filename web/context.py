"""What routes work with: one `Gateway` per process, found on the Flask app."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from uuid import UUID

import structlog
from flask import current_app

from errors import TidegateError, Unauthenticated, Unavailable
from storage.keys import Keys
from storage.objects import ObjectStore
from storage.redis_state import RedisState
from tasks.bootstrap import Services
from web import offload
from web.answers import SharedAnswers
from web.cache import ResponseCache
from web.catalog import Catalog
from web.intake import Intake
from web.lane import RealtimeLane
from web.metrics import Metrics
from web.recorder import Recorder
from web.streams import Streams
from web.waiting import JobWaiter

log = structlog.get_logger(__name__)

GRACE = 600.0
"""Seconds a key that was good goes on to be while Postgres is away."""
PATIENCE = 0.5
"""Seconds a request whose key was good waits for Postgres to say that it still is."""


@dataclass(frozen=True, slots=True)
class _KnownKey:
    tenant: UUID
    checked: float
    """When Postgres last said that it is good."""
    asked: float
    """When Postgres was last asked, in vain or not."""


class KeyCache:
    """API keys that were good a moment ago. Bad ones are asked for each time, and never kept.

    Asked for again once half their time is over, by one thread for all requests that come with the
    key, none of which waits. Past their time they wait for the answer, a moment: a revoked key
    works for its time at most, unless Postgres is away or slow.
    """

    def __init__(
        self,
        keys: Keys,
        ttl: float,
        most: int = 10_000,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._keys = keys
        self._ttl = ttl
        self._most = most
        self._patience = patience
        self._clock = clock
        self._known: dict[str, _KnownKey] = {}
        self._asking: dict[str, tuple[float, Future[UUID]]] = {}
        """Keys that are being asked for again, and since when."""
        self._lock = threading.Lock()

    def fresh(self, key: str) -> UUID | None:
        """The tenant of a key that was good so short a time ago that nobody need be asked."""
        known = self._known.get(key)
        if known is None or self._clock() - known.asked >= self._ttl / 2:
            return None
        return known.tenant

    def tenant_of(self, key: str) -> UUID:
        """Raises `Unauthenticated`; `Unavailable` where Postgres is away and the key unknown."""
        now = self._clock()
        known = self._known.get(key)
        if known is None or now - known.checked > GRACE:
            return self._ask(key, now, known)
        age = now - known.asked
        if age < self._ttl / 2:
            return known.tenant
        began, asking = self._again(key, now, known)
        if age < self._ttl:
            return known.tenant
        try:
            return asking.result(max(0.0, began + self._patience - now))
        except (FutureTimeout, Unavailable):
            # Realtime needs no database: a key that was good is good for a while without.
            return known.tenant

    def _again(self, key: str, now: float, known: _KnownKey) -> tuple[float, Future[UUID]]:
        """Ask for a known key, unless that is being done."""
        with self._lock:
            found = self._asking.get(key)
            if found is None:
                found = self._asking[key] = (now, Future())
                threading.Thread(
                    target=self._refresh, args=(key, known, *found), name="key", daemon=True
                ).start()
        return found

    def _refresh(self, key: str, known: _KnownKey, began: float, asking: Future[UUID]) -> None:
        try:
            tenant = self._ask(key, began, known)
        except Exception as error:
            if not isinstance(error, TidegateError):
                log.exception("key not checked", action="keys.unchecked")
                error = Unavailable("the key could not be checked")
            self._over(key)
            asking.set_exception(error)
        else:
            self._over(key)
            asking.set_result(tenant)

    def _over(self, key: str) -> None:
        with self._lock:
            del self._asking[key]

    def _ask(self, key: str, now: float, known: _KnownKey | None) -> UUID:
        """What Postgres says."""
        try:
            found = _KnownKey(self._keys.tenant_of(key), checked=now, asked=now)
        except Unavailable:
            # Not asked for again at once, so that not every request waits for Postgres.
            if known is not None and self._known.get(key) is known:
                self._keep(key, replace(known, asked=now))
            raise
        except Unauthenticated:
            with self._lock:
                self._known.pop(key, None)
            raise
        self._keep(key, found)
        return found.tenant

    def _keep(self, key: str, found: _KnownKey) -> None:
        with self._lock:
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[key] = found


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of one gateway process. Made after fork."""

    services: Services
    objects: ObjectStore
    """The services' own, as a gateway may use it."""
    keys: KeyCache
    lane: RealtimeLane
    catalog: Catalog
    cache: ResponseCache
    metrics: Metrics
    intake: Intake
    recorder: Recorder
    waiter: JobWaiter
    streams: Streams

    @classmethod
    def build(cls, services: Services) -> Gateway:
        settings = services.settings
        lane = RealtimeLane(
            services.state,
            group=settings.group,
            window=settings.coalesce_window,
            max_items=settings.coalesce_items,
            max_wait=settings.max_queue_time,
            # One slow model leaves other models half of a worker.
            max_flying=max(settings.coalesce_window, settings.realtime_slots // 2),
        )
        catalog = Catalog(lane.query, settings.catalog_ttl)
        metrics = Metrics()
        # What is looked up here is a shortcut, and not worth a wait.
        state = RedisState(settings.redis_url, settings.namespace, timeout=0.5)
        return cls(
            services=services,
            objects=offload.guarded(services.objects),
            keys=KeyCache(services.keys, settings.key_ttl),
            lane=lane,
            catalog=catalog,
            cache=ResponseCache(
                lane,
                catalog,
                SharedAnswers(state, settings.cache_redis_bytes),
                metrics,
                group=settings.group,
                limit=settings.cache_bytes,
            ),
            metrics=metrics,
            intake=Intake(services.jobs, services.pump.kick),
            recorder=Recorder(services.records),
            waiter=JobWaiter(services.jobs),
            streams=Streams(settings.max_streams, settings.max_tenant_streams),
        )

    def close(self) -> None:
        """Write what is still to be written, and let go."""
        self.intake.stop()
        self.recorder.stop()
        self.cache.stop()
        self.lane.stop()
        self.services.close()


def gateway() -> Gateway:
    """This app's gateway."""
    found: Gateway = current_app.extensions["tidegate"]
    return found
