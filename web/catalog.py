"""What the gateway knows about models, asked of the workers and trusted for a few seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

from errors import TidegateError, Unavailable
from inference.metadata import ModelSpec

STALE_FACTOR = 12
"""How many times its lifetime an entry still serves while a newer one is asked for."""

Name = tuple[str, str]
"""A model and its version; "" is the latest."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A model version as its Triton describes it."""

    metadata: dict[str, Any]
    config: dict[str, Any]
    spec: ModelSpec


class Catalog:
    """Single flight: of many requests for a model nobody has asked about lately, one asks, and all
    of them get its answer, error or not. An entry that has just grown old serves on while somebody
    asks again, so a busy worker holds up nobody who has been served before."""

    def __init__(
        self,
        query: Callable[..., Any],
        ttl: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`query(op, model, version)` asks a worker; `ttl` is seconds."""
        self._query = query
        self._ttl = ttl
        self._clock = clock
        self._known: dict[Name, tuple[float, Entry]] = {}
        self._asking: dict[Name, Future[Entry]] = {}
        self._lock = threading.Lock()

    def get(self, model: str, version: str = "", *, timeout: float = 5.0) -> Entry:
        """Raises `ModelNotFound`, `ModelNotReady`, and `Unavailable` without an answer within
        `timeout` seconds."""
        known, age, asking = self._look((model, version), self._ttl)
        if known and asking is None:
            return known[1]
        assert asking is not None
        if known and age <= self._ttl * STALE_FACTOR:
            return known[1]
        try:
            return asking.result(timeout)
        except (FutureTimeout, Unavailable) as error:
            if known:
                # Nobody is there to ask: what it was like is the best guess, and jobs that are
                # accepted on it wait for workers anyway.
                return known[1]
            if isinstance(error, Unavailable):
                raise
            raise Unavailable("no GPU worker answered in time", retry_after=1) from None

    def fresh(self, model: str, version: str = "") -> Entry | None:
        """The entry of a model that somebody asked about so short a time ago that nobody need ask
        again."""
        known = self._known.get((model, version))
        if known is None or self._clock() - known[0] > self._ttl:
            return None
        return known[1]

    def is_cached(self, model: str, version: str = "") -> bool:
        """May answers of this model be given again, as far as anybody has asked about it?"""
        known = self._known.get((model, version))
        return known is not None and known[1].spec.cache_ttl > 0

    def current(self, model: str, version: str = "", *, timeout: float = 5.0) -> Entry:
        """As `get`, for those to whom an old entry is worth nothing: they wait for the new one.
        It is asked for early, so that they seldom do."""
        known, age, asking = self._look((model, version), self._ttl / 2)
        if known and age <= self._ttl:
            return known[1]
        assert asking is not None
        try:
            return asking.result(timeout)
        except FutureTimeout:
            raise Unavailable("no GPU worker answered in time", retry_after=1) from None

    def _look(
        self, name: Name, lifetime: float
    ) -> tuple[tuple[float, Entry] | None, float, Future[Entry] | None]:
        """What is known of a model, and how old that is; where it is older than `lifetime`, the
        question that is being asked, too."""
        with self._lock:
            known = self._known.get(name)
            age = self._clock() - known[0] if known else 0.0
            if known and age <= lifetime:
                return known, age, None
            asking = self._asking.get(name)
            if asking is None:
                asking = self._asking[name] = Future()
                threading.Thread(
                    target=self._ask, args=(name, asking), name="catalog", daemon=True
                ).start()
        return known, age, asking

    def forget(self, model: str, version: str = "") -> None:
        """Ask again next time: a worker said that this model is not what it was."""
        with self._lock:
            self._known.pop((model, version), None)
            # Who is being asked right now may have answered before.
            self._asking.pop((model, version), None)

    def _ask(self, name: Name, asking: Future[Entry]) -> None:
        try:
            told = self._query("describe", *name)
            spec = ModelSpec.parse(told["metadata"], told["config"])
            entry = Entry(told["metadata"], told["config"], spec)
        except Exception as error:
            with self._lock:
                # A name nobody has is not kept: names are the client's, and memory is ours.
                self._done(name, asking)
                if not isinstance(error, Unavailable):
                    self._known.pop(name, None)
            asking.set_exception(
                error if isinstance(error, TidegateError) else Unavailable("no sensible answer")
            )
            return
        with self._lock:
            if self._done(name, asking):
                self._known[name] = (self._clock(), entry)
        asking.set_result(entry)

    def _done(self, name: Name, asking: Future[Entry]) -> bool:
        """False where the answer has been called off meanwhile."""
        if self._asking.get(name) is not asking:
            return False
        del self._asking[name]
        return True
