"""Writes realtime records behind the answers, many in one statement."""

from __future__ import annotations

import threading
from collections import deque

import structlog

from errors import Unavailable
from storage.records import Record, Records

log = structlog.get_logger(__name__)

EVERY = 0.2
MOST = 1000
MAX_KEPT = 50_000
"""Records kept while Postgres is away; beyond it the oldest go, and their ids say `record_lost`."""


class Recorder:
    """One thread per gateway process. `add` never waits."""

    def __init__(self, records: Records):
        self._records = records
        self._kept: deque[Record] = deque(maxlen=MAX_KEPT)
        self._wake = threading.Event()
        self._stopped = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        self._kept.append(record)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait(EVERY)
            self.flush()

    def flush(self) -> None:
        """Write what is kept; what can't be written now stays for the next time."""
        while self._kept:
            batch = [self._kept.popleft() for _ in range(min(MOST, len(self._kept)))]
            try:
                self._records.add(batch)
            except Unavailable as error:
                room = MAX_KEPT - len(self._kept)
                self._kept.extendleft(reversed(batch[max(0, len(batch) - room) :] if room else []))
                log.warning("records kept back", action="records.late", error=error.message)
                return
            except Exception:
                log.exception("records lost", action="records.lost", count=len(batch))

    def stop(self) -> None:
        """Write the rest and end."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.flush()
