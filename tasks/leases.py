"""Keeps the leases of running chunks alive, and calls off what should not run any longer."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import structlog

from errors import Cancelled, DeadlineExceeded, Overran, TidegateError, Unavailable
from inference.client import CancelToken, Deadline
from storage.chunks import Chunks
from storage.lifecycle import ChunkKind
from storage.work import Claim

log = structlog.get_logger(__name__)

LOOK = 0.25
"""Seconds between two looks at whether what runs should still run: a job called off frees its slot
within a second."""


@dataclass(slots=True)
class Held:
    """A chunk that this process runs."""

    claim: Claim
    deadline: Deadline
    """The job's."""
    limit: Deadline
    """When this attempt has taken longer than an attempt may."""
    token: CancelToken = field(default_factory=CancelToken)
    why: TidegateError | None = None
    """Why it was called off. Cancelled: the chunk is somebody else's, or nobody's, by now."""

    @property
    def until(self) -> Deadline:
        return min(self.deadline, self.limit, key=lambda deadline: deadline.at)

    def call_off(self, why: TidegateError) -> None:
        if self.why is None:
            self.why = why
            self.token.cancel()

    def judge(self) -> None:
        """Call it off where its time is over."""
        if self.deadline.expired():
            self.call_off(DeadlineExceeded("the job's deadline passed"))
        elif self.limit.expired():
            self.call_off(Overran("the attempt took longer than an attempt may"))

    def blame(self, error: TidegateError) -> TidegateError:
        """What a call that ended with `error` means for the chunk."""
        if not isinstance(error, Cancelled | DeadlineExceeded):
            return error
        self.judge()
        if self.why is not None:
            return self.why
        # Nobody here called it off: the model server's own time limit, or the connection's end.
        return Unavailable("the model server gave it up before its time", retry_after=1)


class Leases:
    """One thread for all leases of this process."""

    def __init__(
        self,
        chunks: Chunks,
        *,
        every: float,
        attempt_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Renew `every` so many seconds; call an attempt off after `attempt_timeout`."""
        self._chunks = chunks
        self._every = every
        self._attempt_timeout = attempt_timeout
        self._clock = clock
        self._renewed = clock()
        self._held: dict[tuple[int, int], Held] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._draining: TidegateError | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def holding(self, claims: Sequence[Claim]) -> Iterator[list[Held]]:
        """Renew these, which have just been claimed, while the block runs."""
        limit = Deadline.after(self._attempt_timeout, self._clock)
        held = [Held(claim, self._deadline(claim), limit) for claim in claims]
        with self._lock:
            self._held |= {(one.claim.id, one.claim.token): one for one in held}
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()
        if self._draining is not None:
            for one in held:
                one.call_off(self._draining)
        try:
            yield held
        finally:
            self.let_go(held)

    def let_go(self, held: Sequence[Held]) -> None:
        """Of what has been committed or given back, though the block still runs others."""
        with self._lock:
            for one in held:
                self._held.pop((one.claim.id, one.claim.token), None)

    def _deadline(self, claim: Claim) -> Deadline:
        # What was answered by the job's deadline is put together after it.
        left = math.inf if claim.kind is ChunkKind.FINALIZE else claim.remaining
        return Deadline.after(left, self._clock)

    def drain(self) -> None:
        """Call off what still runs, to be given back: this process is about to end."""
        self._draining = Unavailable("the worker is stopping")
        for one in self._all():
            one.call_off(self._draining)

    def _all(self) -> list[Held]:
        with self._lock:
            return list(self._held.values())

    def renew(self) -> None:
        """Lengthen the leases. Not of what has overrun: should its runner never come back, somebody
        else may have it."""
        now = self._clock()
        self._chunks.renew([one.claim for one in self._all() if not one.limit.expired()])
        self._renewed = now

    def look(self) -> None:
        """Call off what is lost, or has taken too long."""
        for one in self._all():
            one.judge()
        running = [one for one in self._all() if one.why is None]
        lost = self._chunks.lost([one.claim for one in running])
        for one in running:
            if one.claim in lost and self._is_held(one):
                log.info("lease lost", action="lease.lost", chunk=one.claim.id)
                one.call_off(Cancelled("the chunk is not this attempt's any more"))

    def _is_held(self, one: Held) -> bool:
        """Or has it just been committed?"""
        with self._lock:
            return (one.claim.id, one.claim.token) in self._held

    def _run(self) -> None:
        while not self._stopping.wait(min(LOOK, self._every)):
            # Time limits first: they need no database.
            for one in self._all():
                one.judge()
            try:
                if self._clock() - self._renewed >= self._every:
                    self.renew()
                self.look()
            except Unavailable as error:
                log.warning("leases not renewed", action="lease.unrenewed", error=error.message)
            except Exception:
                log.exception("leases not renewed", action="lease.unrenewed")

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
