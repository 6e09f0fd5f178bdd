"""One-item jobs on their way into the ledger.

Those that arrive while a transaction is under way travel together in the next one: an idle gateway
commits at once, a busy one spreads the cost of a commit over many jobs. Each comes to its own end:
one that the database refuses is refused alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

import structlog

from errors import TidegateError, Unavailable
from storage.database import Contended
from storage.idempotency import Once
from storage.jobs import Accepted, Jobs
from storage.work import NewJob

log = structlog.get_logger(__name__)

MAX_WAITING = 2048
"""Jobs that may wait in one gateway process, each with an input of `TIDEGATE_INLINE_BYTES` at most:
beyond it, 503 at once."""
MOST = 256
"""Jobs in one transaction: more would make the last one wait, and save nothing."""
PATIENCE = 8.0
"""Seconds a job may take to be accepted: a little longer than the longest statement."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    job: NewJob
    once: Once | None
    answer: Future[Accepted] = field(default_factory=Future)


class Intake:
    """One writer per gateway process: a thread, which under gevent is a greenlet."""

    def __init__(
        self,
        jobs: Jobs,
        kick: Callable[[str], None],
        *,
        most: int = MOST,
        patience: float = PATIENCE,
    ):
        """`kick` is told each group in which something has been accepted."""
        self._jobs = jobs
        self._kick = kick
        self._most = most
        self._patience = patience
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def submit(self, job: NewJob, once: Once | None = None) -> Accepted:
        """Accept a job: it is durable on return. With `once`, it may be one that was accepted
        earlier. Raises `KeyReused`; `Unavailable` where it was not accepted, or nobody can tell."""
        waiting = _Waiting(job, once)
        with self._changed:
            if self._stopped:
                raise Unavailable("the gateway is stopping", retry_after=1)
            if len(self._queue) >= MAX_WAITING:
                raise Unavailable("too many jobs wait to be accepted", retry_after=1)
            self._queue.append(waiting)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="intake", daemon=True)
                self._thread.start()
            self._changed.notify()
        try:
            return waiting.answer.result(self._patience)
        except FutureTimeout:
            # One that still waits is not accepted any more.
            waiting.answer.cancel()
            raise Unavailable("the ledger did not take the job in time", retry_after=1) from None

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    if self._stopped:
                        return
                    self._changed.wait()
                count = min(self._most, len(self._queue))
                taken = [self._queue.popleft() for _ in range(count)]
            batch = [one for one in taken if one.answer.set_running_or_notify_cancel()]
            try:
                if batch:
                    self._write(batch)
            except Exception as error:
                # This process's only writer: whatever happens, it writes the next ones.
                log.exception("jobs in doubt", action="intake.failed", jobs=len(batch))
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)

    def _write(self, batch: Sequence[_Waiting]) -> None:
        keys = {one.job.id: one.once for one in batch if one.once is not None}
        try:
            outcomes = self._jobs.submit([one.job for one in batch], keys)
        except Exception as error:
            # Postgres being away is everybody's trouble, and what has become of them is unknown.
            shared = isinstance(error, Unavailable) and not isinstance(error, Contended)
            if shared or len(batch) == 1:
                for one in batch:
                    one.answer.set_exception(error)
            else:
                log.warning("jobs refused; one by one", action="intake.split", jobs=len(batch))
                # Only who has a key can be waiting for somebody else's transaction.
                for one in sorted(batch, key=lambda one: one.once is not None):
                    self._write([one])
            return
        for group in {one.job.group for one in batch}:
            self._kick(group)
        for one, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, TidegateError):
                one.answer.set_exception(outcome)
            else:
                one.answer.set_result(outcome)

    def stop(self) -> None:
        """Write what waits, take no more, and end."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=5)
