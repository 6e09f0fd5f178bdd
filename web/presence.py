"""Is anybody there who would answer? Asked before a request is let in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from errors import ModelNotReady
from storage.redis_state import RedisState

TTL = 1.0
"""Seconds that a worker who was there is taken to be there."""


class Presence:
    """The workers of one group, as this process knows them. Requests that ask at the same time ask
    once: a Redis that hangs holds up all of them together, and not one after the other."""

    def __init__(self, state: RedisState, group: str, clock: Callable[[], float] = time.monotonic):
        self._state = state
        self._group = group
        self._clock = clock
        self._seen: float | None = None
        self._asking: Future[bool] | None = None
        self._lock = threading.Lock()

    def require(self) -> None:
        """Raises `ModelNotReady` where no worker is there, `Unavailable` where Redis is away."""
        seen = self._seen
        if seen is not None and self._clock() - seen <= TTL:
            return
        with self._lock:
            asking = self._asking
            mine = asking is None
            if asking is None:
                asking = self._asking = Future()
        if mine:
            self._ask(asking)
        if not asking.result():
            raise ModelNotReady(
                f"no GPU worker of group {self._group!r} is ready: it is down, or its Triton is",
                retry_after=2,
            )

    def _ask(self, asking: Future[bool]) -> None:
        asked = self._clock()
        try:
            there = bool(self.workers())
            self._seen = asked if there else None
            asking.set_result(there)
        except BaseException as error:
            asking.set_exception(error)
        finally:
            with self._lock:
                self._asking = None

    def workers(self) -> list[str]:
        """GPU workers that are there now."""
        return self._state.workers(self._group)
