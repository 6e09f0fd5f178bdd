"""Answers that all gateways share, in Redis.

One thread looks up and keeps, many at a time in one round trip: a busy gateway holds one connection
for it. A Redis that is away, full or slow costs hits and never a request: who asks waits a moment
at most, and after a failure nobody asks for another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import structlog

from errors import Unavailable
from storage.redis_state import Blob, RedisState

log = structlog.get_logger(__name__)

PATIENCE = 0.25
"""Seconds a request waits for a look into Redis: it would be run by then."""
PAUSE = 1.0
"""Seconds after a failure in which Redis is left alone."""
PARTS = 16
"""No answer takes more than this part of the room there is."""
MOST = 16
"""Looks in one round trip."""
MAX_BYTES = 16 << 20
"""Bytes of answers that wait to be kept; beyond it they are not."""

_Asked = tuple[bytes, Future[Blob | None]]


class SharedAnswers:
    """One thread per gateway process, from the first question on."""

    def __init__(
        self,
        state: RedisState,
        limit: int,
        *,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`state` with short timeouts, and nobody else's; `limit` is bytes in Redis."""
        self.most = limit // PARTS
        """Bytes of the largest answer it takes."""
        self._state = state
        self._limit = limit
        self._patience = patience
        self._clock = clock
        self._asked: deque[_Asked] = deque()
        self._given: deque[tuple[bytes, bytes, float]] = deque()
        """Key, data, and when it ends."""
        self._bytes = 0
        self._away_until = float("-inf")
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def get(self, key: bytes, timeout: float) -> Blob | None:
        """What is kept under a key; None also where Redis would not say within `timeout` seconds,
        or a moment."""
        asked: Future[Blob | None] = Future()
        with self._changed:
            if self._stopped or self._clock() < self._away_until:
                return None
            self._asked.append((key, asked))
            self._wake()
        try:
            return asked.result(max(0.0, min(timeout, self._patience)))
        except FutureTimeout:
            return None

    def put(self, key: bytes, data: bytes, ttl: float) -> bool:
        """Keep this, soon, for `ttl` seconds from now. Never waits. False where it won't be."""
        if len(data) > self.most:
            return False
        with self._changed:
            full = self._bytes + len(data) > MAX_BYTES
            if self._stopped or full or self._clock() < self._away_until:
                return False
            self._given.append((key, data, self._clock() + ttl))
            self._bytes += len(data)
            self._wake()
        return True

    def _wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
            self._thread.start()
        self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._asked or self._given or self._stopped):
                    self._changed.wait()
                if self._stopped and not self._asked:
                    return
                asked = [self._asked.popleft() for _ in range(min(MOST, len(self._asked)))]
                given = self._given.popleft() if self._given else None
                if given is not None:
                    self._bytes -= len(given[1])
            try:
                # First: somebody waits for it.
                self._look(asked)
                if given is not None:
                    self._keep(*given)
            except Exception as error:
                self._failed(error)
            finally:
                for _, answer in asked:
                    if not answer.done():
                        answer.set_result(None)

    def _look(self, asked: list[_Asked]) -> None:
        if asked:
            found = self._state.answers([key for key, _ in asked])
            for (_, answer), blob in zip(asked, found, strict=True):
                answer.set_result(blob)

    def _keep(self, key: bytes, data: bytes, until: float) -> None:
        left = until - self._clock()
        if left > 0:
            self._state.keep_answer(key, data, left, self._limit)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, Unavailable):
            log.warning("answers not shared", action="cache.away", error=error.message)
        else:
            log.exception("answers not shared", action="cache.failed")
        with self._changed:
            self._away_until = self._clock() + PAUSE
            self._given.clear()
            self._bytes = 0

    def stop(self) -> None:
        """End the thread. What waits to be kept is not."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=2)
        self._state.close()
