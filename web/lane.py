"""The realtime lane at the gateway: requests out as messages, answers back to who waits.

Requests for one model version that arrive while messages are in flight travel together in the
next one. An idle gateway sends at once; a busy one spreads the cost of Redis, Celery and Triton
over many requests. The window is the one knob.

Everything here is plain threads and locks; under gevent's patches they are greenlets.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

import orjson
import structlog

from errors import (
    DeadlineExceeded,
    ModelNotReady,
    TidegateError,
    Unavailable,
    from_wire,
)
from inference import frames
from inference.tensors import InferRequest, InferResult
from storage.redis_state import RedisState
from tasks import messages

log = structlog.get_logger(__name__)

MAX_WAITING = 4096
"""Requests of one model version that may wait in one gateway process: beyond it, 503 at once."""
MAX_MESSAGE_BYTES = 16 << 20
"""A message that holds this much takes no more requests (a single larger one travels alone)."""
MAX_WAITING_BYTES = 256 << 20
"""Tensor bytes of one model version that may wait in one gateway process: beyond it, 503."""
MAX_FLYING = 64
"""Messages of one model version in flight, however slow it is."""
PATIENCE = 0.02
"""Seconds a full window holds back a message: a slow request delays the next ones this much."""
PRESENCE_TTL = 1.0
QUERY_TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request, and how many requests travelled with it."""

    outcome: InferResult | TidegateError
    batch_size: int


@dataclass(slots=True)
class _Waiting:
    request: InferRequest
    size: int
    until: float
    answer: Future[Answer] = field(default_factory=Future)


class Replies:
    """One Redis list per gateway process, one thread that reads it, one future per message."""

    def __init__(self, state: RedisState):
        self.gateway = secrets.token_hex(8)
        self._state = state
        self._pending: dict[bytes, Callable[[bytes], None]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def expect(self, message: bytes, deliver: Callable[[bytes], None]) -> None:
        """Call `deliver` with the reply to this message, from the listener's thread."""
        with self._lock:
            self._pending[message] = deliver
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="replies", daemon=True)
                self._thread.start()

    def forget(self, message: bytes) -> None:
        with self._lock:
            self._pending.pop(message, None)

    def _listen(self) -> None:
        while not self._stopped:
            try:
                found = self._state.next_reply(self.gateway)
            except Unavailable:
                # Those who wait have deadlines of their own.
                time.sleep(0.2)
                continue
            if found is None:
                continue
            with self._lock:
                deliver = self._pending.pop(found[0], None)
            if deliver is not None:
                try:
                    deliver(found[1])
                except Exception:
                    log.exception("reply not delivered", action="replies.failed")

    def stop(self) -> None:
        """End the listener, before what it reads from is closed."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join(timeout=2)


class Coalescer:
    """The requests of one group, model and version in this process."""

    def __init__(
        self,
        group: str,
        state: RedisState,
        replies: Replies,
        *,
        window: int,
        max_items: int,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        send: Callable[..., None] = messages.send,
    ):
        self._group = group
        self._state = state
        self._replies = replies
        self._window = window
        self._max_items = max_items
        self._patience = patience
        self._clock = clock
        self._send = send
        self._queue: deque[_Waiting] = deque()
        self._bytes = 0
        self._flying: dict[bytes, float] = {}
        self._sent = 0.0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, waiting: _Waiting) -> None:
        """Queue one request. Raises `Unavailable` where too many wait already."""
        with self._changed:
            full = self._queue and self._bytes + waiting.size > MAX_WAITING_BYTES
            if full or len(self._queue) >= MAX_WAITING:
                raise Unavailable("too many requests wait for this model", retry_after=1)
            self._queue.append(waiting)
            self._bytes += waiting.size
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="coalescer", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._queue and self._has_room()):
                    # Not for ever: a message in flight may end without an answer.
                    self._changed.wait(timeout=min(self._patience, 0.5) if self._queue else None)
                batch = self._take()
            if batch:
                try:
                    self._fly(batch)
                except Exception:
                    # This model's only sender: whatever happens, it sends the next message.
                    log.exception("message lost", action="lane.lost")

    def _has_room(self) -> bool:
        """May another message leave? While answers come quickly the window makes requests gather;
        where they don't, the next message leaves after a moment all the same."""
        if len(self._flying) < self._window:
            return True
        now = self._clock()
        # A message whose answer never comes gives its place back at its deadline.
        for message in [name for name, until in self._flying.items() if until <= now]:
            self._land(message)
        return len(self._flying) < self._window or (
            len(self._flying) < MAX_FLYING and now - self._sent >= self._patience
        )

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        now = self._clock()
        while self._queue and len(batch) < self._max_items:
            if batch and size + self._queue[0].size > MAX_MESSAGE_BYTES:
                break
            waiting = self._queue.popleft()
            self._bytes -= waiting.size
            if waiting.until > now:
                batch.append(waiting)
                size += waiting.size
        return batch

    def _fly(self, batch: list[_Waiting]) -> None:
        message = secrets.token_bytes(16)
        now = self._clock()
        deadlines = [round(waiting.until - now, 3) for waiting in batch]
        ttl = max(0.001, *deadlines)
        with self._changed:
            self._flying[message] = now + ttl
            self._sent = now
        self._replies.expect(message, lambda data: self._landed(message, batch, data))
        try:
            data = frames.encode_requests([waiting.request for waiting in batch])
            self._state.put_blob(message, data, ttl)
            self._send(
                messages.REALTIME,
                messages.realtime_queue(self._group),
                message=message.hex(),
                gateway=self._replies.gateway,
                deadlines=deadlines,
            )
        except Exception as error:
            if not isinstance(error, TidegateError):
                log.exception("message not sent", action="lane.unsent")
                error = TidegateError("the gateway failed; its log says why")
            self._end(message, batch, [error] * len(batch))

    def _landed(self, message: bytes, batch: list[_Waiting], data: bytes) -> None:
        try:
            outcomes = frames.decode_outcomes(data)
        except TidegateError as error:
            outcomes = [error] * len(batch)
        self._end(message, batch, outcomes)

    def _end(
        self, message: bytes, batch: list[_Waiting], outcomes: list[InferResult | TidegateError]
    ) -> None:
        with self._changed:
            self._land(message)
            self._changed.notify()
        if len(outcomes) != len(batch):
            error = TidegateError("the worker answered another number of requests")
            outcomes = [error] * len(batch)
        for waiting, outcome in zip(batch, outcomes, strict=True):
            # A publish that failed may have arrived all the same: the first answer counts.
            if not waiting.answer.done():
                waiting.answer.set_result(Answer(outcome, len(batch)))

    def _land(self, message: bytes) -> None:
        self._flying.pop(message, None)
        self._replies.forget(message)


class RealtimeLane:
    """What the gateway's routes call. Made after fork."""

    def __init__(self, state: RedisState, *, group: str, window: int, max_items: int):
        self._state = state
        self._group = group
        self._window = window
        self._max_items = max_items
        self._replies = Replies(state)
        self._coalescers: dict[tuple[str, str], Coalescer] = {}
        self._lock = threading.Lock()
        self._present = (0.0, False)

    def infer(self, request: InferRequest, timeout: float) -> Answer:
        """Run one request within `timeout` seconds; the model's refusal is in the answer. Raises
        `DeadlineExceeded`, `Unavailable`, `ModelNotReady`."""
        self._require_workers()
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
                )
        size = sum(len(tensor.data) for tensor in request.inputs)
        waiting = _Waiting(request, size, time.monotonic() + timeout)
        coalescer.submit(waiting)
        try:
            return waiting.answer.result(timeout)
        except FutureTimeout:
            raise DeadlineExceeded(f"no answer within {timeout:g} s") from None

    def query(
        self, op: str, model: str = "", version: str = "", timeout: float = QUERY_TIMEOUT
    ) -> Any:
        """Ask a worker's Triton. Raises what it raised, `Unavailable` without an answer."""
        self._require_workers()
        message = secrets.token_bytes(16)
        answer: Future[bytes] = Future()
        self._replies.expect(message, answer.set_result)
        try:
            messages.send(
                messages.QUERY,
                messages.realtime_queue(self._group),
                message=message.hex(),
                gateway=self._replies.gateway,
                op=op,
                model=model,
                version=version,
            )
            told = orjson.loads(answer.result(timeout))
        except FutureTimeout:
            raise Unavailable("no GPU worker answered in time", retry_after=1) from None
        finally:
            self._replies.forget(message)
        if "error" in told:
            raise from_wire(told["error"])
        return told["value"]

    def workers(self) -> list[str]:
        """GPU workers that are there now."""
        return self._state.workers(self._group)

    def _require_workers(self) -> None:
        """Say no at once where nobody would ever answer."""
        asked, present = self._present
        now = time.monotonic()
        if now - asked > PRESENCE_TTL or not present:
            present = bool(self.workers())
            self._present = (now, present)
        if not present:
            raise ModelNotReady(
                f"no GPU worker of group {self._group!r} is ready: it is down, or its Triton is",
                retry_after=2,
            )

    def stop(self) -> None:
        self._replies.stop()
