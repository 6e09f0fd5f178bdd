"""Requests that have come, but would only stand in line: they are held before anything is done for
them, so that the process's time goes to those whose turn it is."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextvars import ContextVar

Name = tuple[str, str]
"""A model and a version of it; "" is the latest."""

arrived: ContextVar[float | None] = ContextVar("arrived", default=None)
"""When the request that is worked on came in, on the monotonic clock, where that is known."""


class Gate:
    """For each model lets in as many requests as are worth having under way, in the order they
    came; the others are held. Thread-safe, and under gevent a held request costs a greenlet."""

    def __init__(self, depth: Callable[[Name], int], most: int):
        """`depth`: how many of a model's requests wait for their answers now. At `most` of them,
        the next is held."""
        self._depth = depth
        self._most = most
        self._held: dict[Name, deque[threading.Lock]] = {}
        self._lock = threading.Lock()

    def wait(self, name: Name, timeout: float) -> bool:
        """Until there is room, `timeout` seconds at most. Was it held? Then say `freed` once its
        request is over, since it may not have taken the place it was let in for."""
        if self._depth(name) < self._most and name not in self._held:
            return False
        turn = threading.Lock()
        turn.acquire()
        with self._lock:
            held = self._held.setdefault(name, deque())
            held.append(turn)
        if not turn.acquire(timeout=timeout):
            with self._lock:
                # Let in at the last moment, it is gone from there.
                if turn in held:
                    held.remove(turn)
                    self._tidy(name)
        return True

    def held(self, name: Name) -> int:
        """How many are held now."""
        return len(self._held.get(name, ()))

    def freed(self, name: Name) -> None:
        """Some of a model's requests are over: let others in."""
        if name not in self._held:
            return
        with self._lock:
            held = self._held.get(name, ())
            room = self._most - self._depth(name)
            while held and room > 0:
                assert isinstance(held, deque)
                held.popleft().release()
                room -= 1
            self._tidy(name)

    def _tidy(self, name: Name) -> None:
        if not self._held.get(name):
            self._held.pop(name, None)
