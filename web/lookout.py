"""Looks after the messages of this process that have been in flight for long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import structlog

from errors import Unavailable
from storage.redis_state import RedisState
from web.coalescer import Coalescer

log = structlog.get_logger(__name__)

EVERY = 0.5


class Lookout:
    """One thread, and one question to Redis for all messages together: none while answers come
    quickly."""

    def __init__(
        self,
        state: RedisState,
        coalescers: Callable[[], Sequence[Coalescer]],
        every: float = EVERY,
    ):
        self._state = state
        self._coalescers = coalescers
        self._every = every
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Idempotent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lookout", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Once. Raises `Unavailable`: then nothing is known, and nothing follows from it."""
        late = [(one, name) for one in self._coalescers() for name in one.overdue()]
        if late:
            found = self._state.whereabouts([name for _, name in late])
            for (coalescer, name), where in zip(late, found, strict=True):
                coalescer.seen(name, where)

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            try:
                self.look()
            except Unavailable as error:
                log.warning("not looked", action="lookout.blind", error=error.message)
            except Exception:
                log.exception("not looked", action="lookout.blind")

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
