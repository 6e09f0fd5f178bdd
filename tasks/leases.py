"""Keeps the leases of running chunks alive, and tells their runners when one is lost."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import structlog

from errors import Unavailable
from inference.client import CancelToken
from storage.chunks import Chunks
from storage.work import Claim

log = structlog.get_logger(__name__)


class Leases:
    """One thread that renews all leases of this process, `every` so many seconds."""

    def __init__(self, chunks: Chunks, every: float):
        self._chunks = chunks
        self._every = every
        self._held: dict[tuple[int, int], tuple[Claim, CancelToken]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def holding(self, claims: Sequence[Claim]) -> Iterator[CancelToken]:
        """Renew these while the block runs. The token is cancelled once none of them is ours any
        more: cancelled, expired, or taken over by a newer attempt."""
        token = CancelToken()
        with self._lock:
            self._held |= {(claim.id, claim.token): (claim, token) for claim in claims}
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="leases", daemon=True)
                self._thread.start()
        try:
            yield token
        finally:
            with self._lock:
                for claim in claims:
                    self._held.pop((claim.id, claim.token), None)

    def renew(self) -> None:
        """One round."""
        with self._lock:
            held = dict(self._held)
        if not held:
            return
        lost = self._chunks.renew([claim for claim, _ in held.values()])
        living = {id(token) for claim, token in held.values() if claim.id not in lost}
        for claim, token in held.values():
            if claim.id in lost:
                log.info("lease lost", action="lease.lost", chunk=claim.id, job=str(claim.job_id))
                if id(token) not in living:
                    token.cancel()

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            try:
                self.renew()
            except Unavailable as error:
                log.warning("leases not renewed", action="lease.unrenewed", error=error.message)
            except Exception:
                log.exception("leases not renewed", action="lease.unrenewed")

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
