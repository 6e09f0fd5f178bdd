"""Requests that wait for a durable job to end: one poll for all of a process's waiters."""

from __future__ import annotations

import threading
from uuid import UUID

import structlog

from errors import Unavailable
from storage.jobs import Jobs

log = structlog.get_logger(__name__)

FIRST = 0.02
SLOWEST = 0.25


class JobWaiter:
    """Whoever waits longest polls slowest: one statement names every job somebody waits for."""

    def __init__(self, jobs: Jobs):
        self._jobs = jobs
        self._waiters: dict[UUID, list[threading.Event]] = {}
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._thread: threading.Thread | None = None
        self._released = False

    def release(self) -> None:
        """Let everybody go, now and from now on: the process is about to end."""
        self._released = True
        with self._lock:
            for events in self._waiters.values():
                for event in events:
                    event.set()

    def wait(self, job_id: UUID, timeout: float) -> None:
        """Return once the job has ended, or `timeout` seconds are over."""
        ended = threading.Event()
        if self._released:
            return
        with self._lock:
            self._waiters.setdefault(job_id, []).append(ended)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="waiter", daemon=True)
                self._thread.start()
        self._arrived.set()
        try:
            ended.wait(timeout)
        finally:
            with self._lock:
                left = [event for event in self._waiters.get(job_id, ()) if event is not ended]
                if left:
                    self._waiters[job_id] = left
                else:
                    self._waiters.pop(job_id, None)

    def _run(self) -> None:
        pause = FIRST
        while True:
            if not self._waiters:
                self._arrived.wait()
            # A newcomer is looked at soon; those who have waited long can wait a little more.
            pause = FIRST if self._arrived.is_set() else min(SLOWEST, pause * 1.5)
            self._arrived.clear()
            self._arrived.wait(pause)
            with self._lock:
                wanted = list(self._waiters)
            if not wanted:
                continue
            try:
                ended = self._jobs.ended(wanted)
            except Unavailable:
                continue
            except Exception:
                # Everybody's only thread: whatever happens, it asks again.
                log.exception("poll failed", action="waiter.failed")
                continue
            with self._lock:
                for job_id in ended:
                    for event in self._waiters.get(job_id, ()):
                        event.set()
