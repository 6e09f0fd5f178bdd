"""The realtime messages this worker runs, said to Redis again and again: that is how a gateway
tells a message that takes long from one whose worker died."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from errors import Unavailable
from storage.redis_state import RedisState

log = structlog.get_logger(__name__)

EVERY = 1.0
TTL = 3.0
"""Seconds from what a worker said last to when nobody believes it any more."""


class Running:
    """One thread that names all messages of this process, `every` so many seconds. A message that
    is answered sooner is never named: most are, and cost nothing."""

    def __init__(self, state: RedisState, worker: str, every: float = EVERY):
        self._state = state
        self._worker = worker
        self._every = every
        self._messages: set[bytes] = set()
        self._none = threading.Event()
        self._none.set()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def message(self, message: bytes) -> Iterator[None]:
        """Name this one while the block runs."""
        with self._lock:
            self._messages.add(message)
            self._none.clear()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="running", daemon=True)
                self._thread.start()
        try:
            yield
        finally:
            with self._lock:
                self._messages.discard(message)
                if not self._messages:
                    self._none.set()

    def any(self) -> bool:
        """Does somebody wait for what this worker runs?"""
        return bool(self._messages)

    def until_none(self, timeout: float) -> None:
        """Wait until nobody does, so many seconds at most."""
        self._none.wait(timeout)

    def say(self) -> None:
        """One round."""
        with self._lock:
            messages = list(self._messages)
        if messages:
            self._state.runs(self._worker, messages, TTL)

    def _run(self) -> None:
        while not self._stopping.wait(self._every):
            try:
                self.say()
            except Unavailable as error:
                log.warning("running unsaid", action="running.unsaid", error=error.message)
            except Exception:
                log.exception("running unsaid", action="running.unsaid")

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
