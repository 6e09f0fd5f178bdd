"""Requests that have come, but would only stand in line: they are held before anything is done for
them, so that the process's time goes to those whose turn it is."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from contextvars import ContextVar

Name = tuple[str, str]
"""A model and a version of it; "" is the latest."""

arrived: ContextVar[float | None] = ContextVar("arrived", default=None)
"""When the request that is worked on came in, on the monotonic clock, where that is known."""
place: ContextVar[Place | None] = ContextVar("place", default=None)
"""The place of the request that is worked on, where it was let in through a gate."""


class Place:
    """One request that was let in and is not under way yet."""

    __slots__ = ("_gate", "_left", "_name")

    def __init__(self, gate: Gate, name: Name):
        self._gate = gate
        self._name = name
        self._left = False

    def leave(self) -> None:
        """It is under way now, or over. The first time counts."""
        if not self._left:
            self._left = True
            self._gate._leave(self._name)


class Gate:
    """For each model lets in as many requests as are worth having under way, in the order they
    came; the others are held. Thread-safe, and under gevent a held request costs a greenlet."""

    def __init__(self, depth: Callable[[Name], int], most: int):
        """`depth`: how many of a model's requests wait for their answers now. At `most` of them,
        and of those that are on their way there, the next is held."""
        self._depth = depth
        self._most = most
        self._coming: Counter[Name] = Counter()
        """Let in, and neither under way yet nor over: their bodies are being received."""
        self._held: dict[Name, deque[threading.Lock]] = {}
        self._lock = threading.Lock()

    def wait(self, name: Name, timeout: float) -> Place:
        """Until there is room, `timeout` seconds at most; past them it is let in without."""
        with self._lock:
            if name not in self._held and self._room(name) > 0:
                self._coming[name] += 1
                return Place(self, name)
            turn = threading.Lock()
            turn.acquire()
            held = self._held.setdefault(name, deque())
            held.append(turn)
        # Nobody else may come by: those who were under way may be over by now.
        self.freed(name)
        if not turn.acquire(timeout=timeout):
            with self._lock:
                # Let in at the last moment, it is gone from there, and counted.
                if turn in held:
                    held.remove(turn)
                    self._tidy(name)
                    self._coming[name] += 1
        return Place(self, name)

    def held(self, name: Name) -> int:
        """How many are held now."""
        return len(self._held.get(name, ()))

    def freed(self, name: Name) -> None:
        """Some of a model's requests are over: let others in."""
        if name not in self._held:
            return
        with self._lock:
            self._let_in(name)

    def _leave(self, name: Name) -> None:
        with self._lock:
            self._coming[name] -= 1
            if not self._coming[name]:
                del self._coming[name]
            self._let_in(name)

    def _let_in(self, name: Name) -> None:
        held = self._held.get(name)
        room = self._room(name) if held else 0
        while held and room > 0:
            self._coming[name] += 1
            held.popleft().release()
            room -= 1
        self._tidy(name)

    def _room(self, name: Name) -> int:
        """Those who are on their way take half of it at most: clients who are slow to send must not
        keep out everybody else."""
        return self._most - self._depth(name) - min(self._coming[name], self._most // 2)

    def _tidy(self, name: Name) -> None:
        if not self._held.get(name):
            self._held.pop(name, None)
