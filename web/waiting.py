"""Requests that wait for a durable job to end, or to change: one poll for all of a process's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import structlog

from errors import Unavailable
from storage.jobs import Jobs
from storage.work import Pulse

log = structlog.get_logger(__name__)

FIRST = 0.02
SLOWEST = 0.25
CHANGES = 0.5
"""Seconds between two looks for those who want to hear of every change: they hear of so many."""


class Watch:
    """Somebody who wants to hear of one job: of `each` change, or of its end only."""

    def __init__(self, *, each: bool):
        self.each = each
        self.released = False
        """Nobody will call any more: the process is about to end."""
        self._called = threading.Event()

    def wait(self, timeout: float) -> None:
        """Return when there is something new since the last call, or `timeout` seconds are over."""
        if not self.released:
            self._called.wait(timeout)
        self._called.clear()

    def call(self) -> None:
        self._called.set()

    def release(self) -> None:
        self.released = True
        self.call()


class JobWaiter:
    """Whoever waits longest polls slowest: one statement names every job somebody waits for."""

    def __init__(self, jobs: Jobs):
        self._jobs = jobs
        self._watches: dict[UUID, list[Watch]] = {}
        self._pulses: dict[UUID, Pulse] = {}
        """Of jobs that somebody watches, as the watchers last heard of them."""
        self._lock = threading.Lock()
        self._arrived = threading.Event()
        self._thread: threading.Thread | None = None
        self._released = False

    def release(self) -> None:
        """Let everybody go, now and from now on: the process is about to end."""
        with self._lock:
            self._released = True
            for watches in self._watches.values():
                for watch in watches:
                    watch.release()

    def wait(self, job_id: UUID, timeout: float) -> None:
        """Return once the job has ended, or `timeout` seconds are over."""
        with self.watch(job_id, each=False) as watch:
            watch.wait(timeout)

    @contextmanager
    def watch(self, job_id: UUID, *, each: bool = True) -> Iterator[Watch]:
        """Hear of a job inside the block. Look at it after entering: what happens from there on is
        not missed."""
        watch = Watch(each=each)
        with self._lock:
            if self._released:
                watch.release()
            self._watches.setdefault(job_id, []).append(watch)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="waiter", daemon=True)
                self._thread.start()
        self._arrived.set()
        try:
            yield watch
        finally:
            with self._lock:
                left = [other for other in self._watches[job_id] if other is not watch]
                if left:
                    self._watches[job_id] = left
                else:
                    del self._watches[job_id]
                    self._pulses.pop(job_id, None)

    def _run(self) -> None:
        pause = FIRST
        due = 0.0
        while True:
            if not self._watches:
                self._arrived.wait()
            # A newcomer is looked at soon; those who have waited long can wait a little more.
            pause = FIRST if self._arrived.is_set() else min(SLOWEST, pause * 1.5)
            self._arrived.clear()
            self._arrived.wait(pause)
            changes = time.monotonic() >= due
            if changes:
                due = time.monotonic() + CHANGES
            with self._lock:
                wanted = [
                    job_id
                    for job_id, watches in self._watches.items()
                    if changes or not all(watch.each for watch in watches)
                ]
            if not wanted:
                continue
            try:
                pulses = self._jobs.pulses(wanted)
            except Unavailable:
                continue
            except Exception:
                # Everybody's only thread: whatever happens, it asks again.
                log.exception("poll failed", action="waiter.failed")
                continue
            with self._lock:
                for job_id, pulse in pulses.items():
                    self._tell(job_id, pulse, changes=changes)

    def _tell(self, job_id: UUID, pulse: Pulse, *, changes: bool) -> None:
        watches = self._watches.get(job_id, [])
        # What nobody has heard of yet counts as new: better a look in vain than none.
        changed = changes and self._pulses.get(job_id) != pulse
        if changed and watches:
            self._pulses[job_id] = pulse
        for watch in watches:
            if changed if watch.each else pulse.state.terminal:
                watch.call()
