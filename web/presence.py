"""Is anybody there who would answer? Asked before a request is let in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from errors import ModelNotReady, Unavailable
from storage.redis_state import RedisState

TTL = 1.0
"""Seconds that a worker who was there is taken to be there."""


class Presence:
    """The workers of one group, as this process knows them. Requests that ask at the same time ask
    once, and none waits longer than it may: a Redis that hangs holds up all of them together, and
    each until its own deadline at most."""

    def __init__(self, state: RedisState, group: str, clock: Callable[[], float] = time.monotonic):
        self._state = state
        self._group = group
        self._clock = clock
        self._seen: float | None = None
        self._asking: Future[bool] | None = None
        self._lock = threading.Lock()

    def require(self, timeout: float) -> None:
        """Raises `ModelNotReady` where no worker is there, `Unavailable` where Redis is away, or
        has not answered within `timeout` seconds."""
        seen = self._seen
        if seen is not None and self._clock() - seen <= TTL:
            return
        with self._lock:
            asking = self._asking
            if asking is None:
                asking = self._asking = Future()
                # Not in this request: others may have longer to wait for the answer than it has.
                threading.Thread(
                    target=self._ask, args=(asking,), name="presence", daemon=True
                ).start()
        try:
            there = asking.result(timeout)
        except FutureTimeout:
            raise Unavailable("Redis did not answer in time", retry_after=1) from None
        if not there:
            raise ModelNotReady(
                f"no GPU worker of group {self._group!r} is ready: it is down, or its Triton is",
                retry_after=2,
            )

    def _ask(self, asking: Future[bool]) -> None:
        asked = self._clock()
        try:
            there = bool(self.workers())
        except BaseException as error:
            self._over()
            asking.set_exception(error)
            return
        self._seen = asked if there else None
        self._over()
        asking.set_result(there)

    def _over(self) -> None:
        """Before the answer is given: who has heard it asks anew."""
        with self._lock:
            self._asking = None

    def workers(self) -> list[str]:
        """GPU workers that are there now."""
        return self._state.workers(self._group)
