"""The slots of one GPU worker's batch lane: who runs beside whom, and for how long.

A chunk on its last attempt runs alone: where its earlier attempts took their worker along, nothing
else does now. And a slot that does not come back ends the process, whose supervisor starts a new
one: a thread cannot be killed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger(__name__)

LOOK = 1.0
STUCK = 70
"""Exit status (EX_SOFTWARE) of a process that ended itself."""


class Slots:
    """Shared by the threads of one worker process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._alone = False

    @contextmanager
    def taken(self, *, alone: bool) -> Iterator[None]:
        """Run beside others, or `alone`, for which newcomers wait as well."""
        with self._changed:
            if alone:
                self._waiting += 1
                self._changed.wait_for(lambda: not self._running and not self._alone)
                self._waiting -= 1
                self._alone = True
            else:
                self._changed.wait_for(lambda: not self._alone and not self._waiting)
                self._running += 1
        try:
            yield
        finally:
            with self._changed:
                if alone:
                    self._alone = False
                else:
                    self._running -= 1
                self._changed.notify_all()


class Watchdog:
    """Ends the process when something in it takes longer than it can."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], object] = os._exit,
    ):
        self._clock = clock
        self._end = end
        self._limits: dict[object, tuple[str, float]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, what: str, seconds: float) -> Iterator[None]:
        """The block ends within so many seconds, or the process does."""
        key = object()
        with self._lock:
            self._limits[key] = (what, self._clock() + seconds)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._limits.pop(key, None)

    def look(self) -> None:
        """Anything that overran?"""
        now = self._clock()
        with self._lock:
            stuck = [what for what, limit in self._limits.values() if limit < now]
        if stuck:
            log.critical("stuck; ending", action="worker.stuck", slots=sorted(set(stuck)))
            self._end(STUCK)

    def _run(self) -> None:
        while not self._stopping.wait(LOOK):
            self.look()

    def stop(self) -> None:
        self._stopping.set()
