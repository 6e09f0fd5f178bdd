"""What the gateway knows about models, asked of the workers and trusted for a few seconds."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

from errors import TidegateError
from inference.metadata import ModelSpec
from web.lane import RealtimeLane


@dataclass(frozen=True, slots=True)
class Entry:
    """A model version as its Triton describes it."""

    metadata: dict[str, Any]
    config: dict[str, Any]
    spec: ModelSpec


class Catalog:
    """Single flight: of many requests for a model nobody has asked about lately, one asks."""

    def __init__(self, lane: RealtimeLane, ttl: float):
        self._lane = lane
        self._ttl = ttl
        self._known: dict[tuple[str, str], tuple[float, Entry | TidegateError]] = {}
        self._asking: dict[tuple[str, str], threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, model: str, version: str = "") -> Entry:
        """Raises `ModelNotFound`, `ModelNotReady`, `Unavailable`."""
        key = (model, version)
        found = self._fresh(key)
        if found is None:
            with self._lock:
                asking = self._asking.setdefault(key, threading.Lock())
            with asking:
                found = self._fresh(key)
                if found is None:
                    found = self._ask(key)
        if isinstance(found, TidegateError):
            raise found
        return found

    def forget(self, model: str, version: str = "") -> None:
        """Ask again next time: a worker said that this model is not what it was."""
        self._known.pop((model, version), None)

    def _fresh(self, key: tuple[str, str]) -> Entry | TidegateError | None:
        known = self._known.get(key)
        if known is None or time.monotonic() - known[0] > self._ttl:
            return None
        return known[1]

    def _ask(self, key: tuple[str, str]) -> Entry | TidegateError:
        found: Entry | TidegateError
        try:
            told = self._lane.query("describe", *key)
            spec = ModelSpec.parse(told["metadata"], told["config"])
            found = Entry(told["metadata"], told["config"], spec)
        except TidegateError as error:
            # A name nobody has is not kept: names are the client's, and memory is ours.
            with self._lock:
                self._known.pop(key, None)
                self._asking.pop(key, None)
            return error
        with self._lock:
            self._known[key] = (time.monotonic(), found)
        return found
