"""How fast a model answers, and so how long the next request would wait for its turn."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

KEPT = 64
"""Landings that the pace is taken from: the latest."""


class Pace:
    """The pace of one model in one gateway process, since it was idle last.

    Not thread-safe. An idle model has no pace: nobody waits for it, so nobody needs one.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._since: float | None = None
        self._landed: deque[tuple[float, int]] = deque()
        self._count = 0

    def busy(self) -> None:
        """Somebody waits, or is waited for. Again and again, until `idle`."""
        if self._since is None:
            self._since = self._clock()

    def idle(self) -> None:
        """Nobody waits any more."""
        self._since = None
        self._landed.clear()
        self._count = 0

    def landed(self, requests: int) -> None:
        """So many were answered, together."""
        self._landed.append((self._clock(), requests))
        self._count += requests
        if len(self._landed) > KEPT:
            # From here on the count begins with what came after this one.
            self._since, gone = self._landed.popleft()
            self._count -= gone

    def wait(self, ahead: int) -> float:
        """Seconds until as many requests are answered, at the latest pace. A model that has not
        answered since it was idle has as long as it likes: 0."""
        if self._since is None or not self._count or not ahead:
            return 0.0
        passed = self._clock() - self._since
        return ahead * passed / self._count if passed > 0 else 0.0

    def retry_after(self, ahead: int) -> int:
        """Whole seconds after which it is worth asking again: half of those have had theirs."""
        return max(1, min(60, math.ceil(self.wait(ahead) / 2)))
