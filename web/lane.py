"""The realtime lane at the gateway: requests out as messages, answers back to who waits."""

from __future__ import annotations

import contextlib
import functools
import math
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import orjson

from errors import DeadlineExceeded, Unavailable, from_wire
from inference.tensors import InferRequest
from storage.redis_state import RedisState
from tasks import messages
from web.coalescer import MAX_FLYING, Coalescer
from web.flight import Answer, Waiting
from web.gate import Gate, Name, place
from web.lookout import Lookout
from web.presence import Presence
from web.refusals import Refusals
from web.replies import Replies

QUERY_TIMEOUT = 5.0


class RealtimeLane:
    """What the gateway's routes call. Made after fork."""

    def __init__(
        self,
        state: RedisState,
        *,
        group: str,
        window: int,
        max_items: int,
        max_wait: float = math.inf,
        max_flying: int = MAX_FLYING,
    ):
        self._state = state
        self._group = group
        self._window = window
        self._max_items = max_items
        self._max_wait = max_wait
        self._max_flying = max_flying
        self._replies = Replies(state)
        self._coalescers: dict[Name, Coalescer] = {}
        self._lock = threading.Lock()
        self._presence = Presence(state, group)
        # Enough to fill every message that may be in flight, and the ones after them.
        self.refusals = Refusals()
        self.gate = Gate(self._depth, most=2 * window * max_items)
        self._lookout = Lookout(state, lambda: list(self._coalescers.values()))

    def _depth(self, name: Name) -> int:
        coalescer = self._coalescers.get(name)
        return coalescer.depth if coalescer is not None else 0

    def admit(self, name: Name, timeout: float, *, last: bool = False) -> None:
        """Before a request is even read: would it have its answer in time, or would it if it were
        the `last` in line? Raises `Overloaded`."""
        coalescer = self._coalescers.get(name)
        if coalescer is not None:
            coalescer.admit(timeout, self.gate.held(name) if last else 0)

    def infer(self, request: InferRequest, timeout: float) -> Answer:
        """Run one request within `timeout` seconds; the model's refusal is in the answer. Raises
        `DeadlineExceeded`, `Unavailable`, `ModelNotReady`."""
        until = time.monotonic() + timeout
        self._presence.require(timeout)
        key = (request.model, request.version)
        with self._lock:
            coalescer = self._coalescers.get(key)
            if coalescer is None:
                coalescer = self._coalescers[key] = Coalescer(
                    self._group,
                    self._state,
                    self._replies,
                    window=self._window,
                    max_items=self._max_items,
                    max_wait=self._max_wait,
                    max_flying=self._max_flying,
                    gone=functools.partial(self.gate.freed, key),
                )
                self._lookout.start()
        size = sum(len(tensor.data) for tensor in request.inputs)
        waiting = Waiting(request, size, until)
        coalescer.admit(timeout)
        coalescer.submit(waiting)
        if (coming := place.get()) is not None:
            coming.leave()
        try:
            return waiting.answer.result(_left(until))
        except FutureTimeout:
            raise DeadlineExceeded(f"no answer within {timeout:g} s") from None

    def query(
        self, op: str, model: str = "", version: str = "", timeout: float = QUERY_TIMEOUT
    ) -> Any:
        """Ask a worker's Triton. Raises what it raised, `Unavailable` without an answer within
        `timeout` seconds."""
        until = time.monotonic() + timeout
        self._presence.require(timeout)
        message = secrets.token_bytes(16)
        answer: Future[bytes] = Future()
        self._replies.expect(message, functools.partial(_end, answer.set_result))
        # Not in this request: a broker that hangs takes its time to say so.
        threading.Thread(
            target=self._publish,
            args=(answer, _left(until)),
            kwargs={"message": message.hex(), "op": op, "model": model, "version": version},
            name="query",
            daemon=True,
        ).start()
        try:
            told = orjson.loads(answer.result(_left(until)))
        except FutureTimeout:
            raise Unavailable("no GPU worker answered in time", retry_after=1) from None
        finally:
            self._replies.forget(message)
        if "error" in told:
            raise from_wire(told["error"])
        return told["value"]

    def _publish(self, answer: Future[bytes], ttl: float, **asked: str) -> None:
        """Send a query; who waits for its answer hears of it where that fails."""
        try:
            messages.send(
                messages.QUERY,
                messages.realtime_queue(self._group),
                ttl=ttl,
                gateway=self._replies.gateway,
                **asked,
            )
        except Exception as error:
            _end(answer.set_exception, error)

    def workers(self) -> list[str]:
        """GPU workers that are there now."""
        return self._presence.workers()

    def stop(self) -> None:
        self._lookout.stop()
        self._replies.stop()


def _left(until: float) -> float:
    return max(0.001, until - time.monotonic())


def _end(end: Callable[[Any], None], value: Any) -> None:
    """The first end counts: what could not be sent for certain may have arrived, and be answered
    all the same."""
    with contextlib.suppress(InvalidStateError):
        end(value)
