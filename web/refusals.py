"""Refusals at a pace: those who are refused and come again at once must not take the time of those
who are served."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

RATE = 1000.0
"""Refusals a second that one process gives: about a tenth of its time."""
BURST = 0.2
"""Seconds of them that may come at once."""
AHEAD = 60.0
"""Seconds that nobody waits longer than."""


class Refusals:
    """The first come at once; where many are to be refused, each has to wait for the ones before
    it, as long as it would have waited for its answer at most."""

    def __init__(
        self,
        rate: float = RATE,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._gap = 1 / rate
        self._clock = clock
        self._sleep = sleep
        self._next = -math.inf

    def wait(self, most: float) -> None:
        """Until it is this one's turn to be refused, `most` seconds at most."""
        now = self._clock()
        # Greenlets don't interrupt each other here; threads that did would be off by one gap.
        turn = max(self._next + self._gap, now - BURST)
        if turn - now <= min(most, AHEAD):
            self._next = turn
        else:
            # Who won't wait for its turn takes none, and changes nobody else's.
            turn = now + min(most, AHEAD)
        if turn > now:
            self._sleep(turn - now)
