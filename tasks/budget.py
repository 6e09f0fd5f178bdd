"""How often a model that fails is tried again: a retry budget, so that a sick one is not stormed.

A. Ledford et al. in "Site Reliability Engineering" (2016), ch. 21-22: retries as a share of what
succeeds, and a little besides so that somebody notices when it is well again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

RATIO = 1.0
"""Retries a success pays for: what an outage left behind runs at full speed once it is over, and a
model that fails half the time is asked twice as often as it answers at most."""
RATE = 2.0
"""Retries a second that nobody has to pay for."""
MOST = 10.0
"""Retries that can be saved up."""


@dataclass(slots=True)
class _Account:
    tokens: float
    at: float
    ailing: bool = False
    """Its last call found it away: new work counts as a retry, too."""


class RetryBudget:
    """By model, for one process and its model server. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._lock = threading.Lock()

    def allow(self, model: str, *, again: bool) -> bool:
        """May the model be called now? `again`: for something that it was called for before."""
        with self._lock:
            account = self._account(model)
            if not again and not account.ailing:
                return True
            if account.tokens < 1:
                return False
            account.tokens -= 1
            return True

    def record(self, model: str, *, away: bool) -> None:
        """How a call went: did the model, or its server, turn out to be away?"""
        with self._lock:
            account = self._account(model)
            account.ailing = away
            if not away:
                account.tokens = min(MOST, account.tokens + RATIO)

    def _account(self, model: str) -> _Account:
        now = self._clock()
        account = self._accounts.setdefault(model, _Account(MOST, now))
        account.tokens = min(MOST, account.tokens + (now - account.at) * RATE)
        account.at = now
        return account
