"""When an answer is no longer wanted: because the time is over, or because somebody said so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from errors import Cancelled, DeadlineExceeded


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point on this process's monotonic clock. Between processes, send the seconds remaining."""

    at: float
    clock: Callable[[], float] = field(default=time.monotonic, repr=False, compare=False)

    @classmethod
    def after(cls, seconds: float, clock: Callable[[], float] = time.monotonic) -> Deadline:
        return cls(clock() + seconds, clock)

    def remaining(self) -> float:
        """Seconds left; 0.0 once it is over."""
        return max(0.0, self.at - self.clock())

    def expired(self) -> bool:
        return self.remaining() <= 0.0

    def require(self) -> float:
        """Seconds left, more than none. Raises DeadlineExceeded once it is over."""
        left = self.remaining()
        if left <= 0.0:
            raise DeadlineExceeded("the time for this request is over")
        return left


class CancelToken:
    """Calls off what is being done under it. Thread-safe; cancelling twice is cancelling once."""

    __slots__ = ("_callbacks", "_cancelled", "_lock")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._callbacks: dict[object, Callable[[], object]] = {}

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def cancel(self) -> None:
        """Run every registered callback, in this thread, and refuse what starts later."""
        with self._lock:
            self._cancelled = True
            callbacks = list(self._callbacks.values())
            self._callbacks.clear()
        # Outside the lock: a callback may end a call whose owner then unregisters.
        for callback in callbacks:
            callback()

    @classmethod
    def all_of(cls, tokens: Iterable[CancelToken]) -> CancelToken:
        """A token that is cancelled once all of these are: what is done for several at once goes on
        while one of them wants it."""
        waiting = {id(token): token for token in tokens}
        if len(waiting) == 1:
            return next(iter(waiting.values()))
        together = cls()

        def one_less() -> None:
            if all(token.cancelled for token in waiting.values()):
                together.cancel()

        for token in waiting.values():
            token.then(one_less)
        return together

    def then(self, callback: Callable[[], object]) -> None:
        """Run `callback` on `cancel`, at once if that has been called already."""
        with self._lock:
            late = self._cancelled
            if not late:
                self._callbacks[object()] = callback
        if late:
            callback()

    def check(self) -> None:
        """Raise Cancelled once `cancel` has been called."""
        if self._cancelled:
            raise Cancelled("the request was called off")

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Within the block `cancel` runs `callback`, at once if it has been called already."""
        key = object()
        with self._lock:
            late = self._cancelled
            if not late:
                self._callbacks[key] = callback
        if late:
            callback()
        try:
            yield
        finally:
            with self._lock:
                self._callbacks.pop(key, None)
