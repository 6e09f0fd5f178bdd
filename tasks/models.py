"""What a GPU worker knows about the models of its Triton."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from inference.client import Deadline, ModelServer
from inference.metadata import ModelSpec

ASK_TIMEOUT = 5.0


class Models:
    """Metadata and configuration by model and version, trusted for `ttl` seconds."""

    def __init__(
        self, server: ModelServer, ttl: float, clock: Callable[[], float] = time.monotonic
    ):
        self._server = server
        self._ttl = ttl
        self._clock = clock
        self._known: dict[tuple[str, str], tuple[float, ModelSpec]] = {}
        self._lock = threading.Lock()

    def describe(self, model: str, version: str) -> dict[str, Any]:
        """`{"metadata": …, "config": …}` as Triton says now. Raises `ModelNotFound`,
        `ModelNotReady`."""
        deadline = Deadline.after(ASK_TIMEOUT)
        return {
            "metadata": self._server.metadata(model, version, deadline),
            "config": self._server.config(model, version, deadline),
        }

    def spec(self, model: str, version: str) -> ModelSpec:
        """The model's shapes. Raises as `describe`."""
        now = self._clock()
        with self._lock:
            known = self._known.get((model, version))
        if known is not None and now - known[0] < self._ttl:
            return known[1]
        told = self.describe(model, version)
        spec = ModelSpec.parse(told["metadata"], told["config"])
        with self._lock:
            self._known[model, version] = (now, spec)
        return spec
