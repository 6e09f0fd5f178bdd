"""What routes work with: one `Gateway` per process, found on the Flask app."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from uuid import UUID

from flask import current_app

from errors import Unauthenticated, Unavailable
from storage.keys import Keys
from tasks.bootstrap import Services
from web.catalog import Catalog
from web.lane import RealtimeLane
from web.recorder import Recorder
from web.waiting import JobWaiter


class KeyCache:
    """API keys that were good a moment ago. Bad ones are asked for each time, and never kept."""

    def __init__(self, keys: Keys, ttl: float, most: int = 10_000):
        self._keys = keys
        self._ttl = ttl
        self._most = most
        self._known: dict[str, tuple[float, UUID]] = {}
        self._lock = threading.Lock()

    def tenant_of(self, key: str) -> UUID:
        """Raises `Unauthenticated`."""
        now = time.monotonic()
        known = self._known.get(key)
        if known is not None and now - known[0] < self._ttl:
            return known[1]
        try:
            tenant = self._keys.tenant_of(key)
        except Unavailable:
            # Realtime needs no database: a key that was good a moment ago is good while Postgres
            # is away. Not asked again for a while, so that not every request waits for it.
            if known is None:
                raise
            tenant = known[1]
        except Unauthenticated:
            with self._lock:
                self._known.pop(key, None)
            raise
        with self._lock:
            if len(self._known) >= self._most:
                self._known.clear()
            self._known[key] = (now, tenant)
        return tenant


@dataclass(frozen=True, slots=True)
class Gateway:
    """The parts of one gateway process. Made after fork."""

    services: Services
    keys: KeyCache
    lane: RealtimeLane
    catalog: Catalog
    recorder: Recorder
    waiter: JobWaiter

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
            keys=KeyCache(services.keys, settings.key_ttl),
            lane=lane,
            catalog=Catalog(lane.query, settings.catalog_ttl),
            recorder=Recorder(services.records),
            waiter=JobWaiter(services.jobs),
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
