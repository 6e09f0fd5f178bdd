"""How long calls to the object store may take: said by whoever has a deadline, for all it calls.

By context and not by argument: between one who knows the time and the call lie generators, file
formats and a client library, to none of which it matters.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from errors import DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Limit:
    """A point on this process's monotonic clock."""

    at: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)

    def left(self) -> float:
        """Seconds left, more than none. Raises `DeadlineExceeded` once they are over: that is no
        failure of the store, and no reason to try again."""
        if self.at == math.inf:
            return math.inf
        left = self.at - self.clock()
        if left <= 0:
            raise over()
        return left


def over() -> DeadlineExceeded:
    return DeadlineExceeded("the time was over before the object store had done its part")


_NONE = Limit(math.inf)
_current: ContextVar[Limit] = ContextVar("limit", default=_NONE)


def current() -> Limit:
    """What holds here; without end where nobody has said anything."""
    return _current.get()


@contextmanager
def within(seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[Limit]:
    """Calls to the store in this block end, one way or the other, within so many seconds, and by
    what holds outside of it. A stream that is opened in it keeps this limit wherever it is read."""
    limit = min(current(), Limit(clock() + seconds, clock), key=lambda one: one.at)
    token = _current.set(limit)
    try:
        yield limit
    finally:
        _current.reset(token)
