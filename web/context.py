"""What routes work with: one `Gateway` per process, found on the Flask app."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from uuid import UUID

from flask import current_app

from errors import Unauthenticated, Unavailable
from storage.keys import Keys
from storage.objects import ObjectStore
from tasks.bootstrap import Services
from web import offload
from web.catalog import Catalog
from web.lane import RealtimeLane
from web.recorder import Recorder
from web.streams import Streams
from web.waiting import JobWaiter

GRACE = 600.0
"""Seconds a key that was good goes on to be while Postgres is away."""


@dataclass(frozen=True, slots=True)
class _KnownKey:
    tenant: UUID
    checked: float
    """When Postgres last said that it is good."""
    asked: float
    """When Postgres was last asked, in vain or not."""


class KeyCache:
    """API keys that were good a moment ago. Bad ones are asked for each time, and never kept."""

    def __init__(
        self,
        keys: Keys,
        ttl: float,
        most: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._keys = keys
        self._ttl = ttl
        self._most = most
        self._clock = clock
        self._known: dict[str, _KnownKey] = {}
        self._lock = threading.Lock()

    def tenant_of(self, key: str) -> UUID:
        """Raises `Unauthenticated`; `Unavailable` where Postgres is away and the key unknown."""
        now = self._clock()
        known = self._known.get(key)
        if known is not None and now - known.asked < self._ttl:
            return known.tenant
        try:
            found = _KnownKey(self._keys.tenant_of(key), checked=now, asked=now)
        except Unavailable:
            # Realtime needs no database: a key that was good is good for a while without. Not asked
            # for again at once, so that not every request waits for Postgres.
            if known is None or now - known.checked > GRACE:
                raise
            found = replace(known, asked=now)
        except Unauthenticated:
            with self._lock:
                self._known.pop(key, None)
            raise
        with self._lock:
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[key] = found
        return found.tenant


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of one gateway process. Made after fork."""

    services: Services
    objects: ObjectStore
    """The services' own, as a gateway may use it."""
    keys: KeyCache
    lane: RealtimeLane
    catalog: Catalog
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
        )
        return cls(
            services=services,
            objects=offload.guarded(services.objects),
            keys=KeyCache(services.keys, settings.key_ttl),
            lane=lane,
            catalog=Catalog(lane.query, settings.catalog_ttl),
            recorder=Recorder(services.records),
            waiter=JobWaiter(services.jobs),
            streams=Streams(settings.max_streams, settings.max_tenant_streams),
        )

    def close(self) -> None:
        """Write what is still to be written, and let go."""
        self.recorder.stop()
        self.lane.stop()
        self.services.close()


def gateway() -> Gateway:
    """This app's gateway."""
    found: Gateway = current_app.extensions["tidegate"]
    return found
