"""Realtime messages that had to wait for a worker: who took one says so, and the pumps hear it.

A message tells how long it has waited by what is left of its tensors' time: on any broker, and
whatever its model takes, unless that takes all slots. A queue's depth tells less: beside a batch
that takes the worker's time messages are taken late, yet hardly one lies in the broker.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from errors import Unavailable
from storage.redis_state import RedisState

log = structlog.get_logger(__name__)

LONG = 0.01
"""Seconds that a message waits for nothing but its turn: to a worker that is free it takes 2 ms."""
EVERY = 0.25
"""Seconds between two times that a worker says so."""
TTL = 0.75
"""Seconds that it is believed: more than between two times, and less than between two sweeps."""
CHUNKS = 1
"""Hints' worth of batch work for each worker meanwhile, of the several it has slots for. A batch
keeps more than half of its speed by that, and is never held up for good."""


class Haste:
    """What one GPU worker says. Safe to share between threads."""

    def __init__(self, state: RedisState, group: str, clock: Callable[[], float] = time.monotonic):
        self._state = state
        self._group = group
        self._clock = clock
        self._next = 0.0

    def took(self, waited: float) -> None:
        """A message was taken that had waited so many seconds."""
        if waited < LONG:
            return
        now = self._clock()
        # Two threads may say it at once, which is once too often and no harm.
        if now < self._next:
            return
        self._next = now + EVERY
        try:
            self._state.hurry(self._group, TTL)
        except Unavailable as error:
            log.warning("haste unsaid", action="haste.unsaid", error=error.message)


def allowance(state: RedisState, group: str) -> int | None:
    """Hints' worth of batch work that may be about while realtime messages wait; None: any. Raises
    `Unavailable` where nobody can say."""
    if not state.hurried(group):
        return None
    # What waits for a worker that is gone, no batch holds up.
    return CHUNKS * len(state.workers(group)) or None
