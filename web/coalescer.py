"""Requests for one model version, gathered into messages.

Those that arrive while messages are in flight travel together in the next one. An idle gateway
sends at once; a busy one spreads the cost of Redis, Celery and Triton over many requests. The
window is the one knob.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import structlog

from errors import TidegateError, Unavailable
from inference import frames
from inference.tensors import InferRequest, InferResult
from storage.redis_state import RedisState
from tasks import messages
from web.replies import Replies

log = structlog.get_logger(__name__)

MAX_WAITING = 4096
"""Requests of one model version that may wait in one gateway process: beyond it, 503 at once."""
MAX_MESSAGE_BYTES = 16 << 20
"""A message that holds this much takes no more requests (a single larger one travels alone)."""
MAX_WAITING_BYTES = 256 << 20
"""Tensor bytes of one model version that one gateway process holds, waiting or in flight: beyond
it, 503."""
MAX_FLYING = 64
"""Messages of one model version in flight, however slow it is."""
PATIENCE = 0.02
"""Seconds a full window holds back a message: a slow request delays the next ones this much."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request, and how many requests travelled with it."""

    outcome: InferResult | TidegateError
    batch_size: int


@dataclass(slots=True)
class Waiting:
    """A request on its way; `until` is on the process's monotonic clock, `size` in bytes."""

    request: InferRequest
    size: int
    until: float
    answer: Future[Answer] = field(default_factory=Future)


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
        self._queue: deque[Waiting] = deque()
        self._bytes = 0
        self._flying: dict[bytes, tuple[float, int]] = {}
        """Messages in flight: when they end without an answer, and their bytes."""
        self._sent = 0.0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, waiting: Waiting) -> None:
        """Queue one request. Raises `Unavailable` where too many wait already."""
        with self._changed:
            full = self._bytes > 0 and self._bytes + waiting.size > MAX_WAITING_BYTES
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
        for message in [name for name, (until, _) in self._flying.items() if until <= now]:
            self._land(message)
        return len(self._flying) < self._window or (
            len(self._flying) < MAX_FLYING and now - self._sent >= self._patience
        )

    def _take(self) -> list[Waiting]:
        batch: list[Waiting] = []
        size = 0
        now = self._clock()
        while self._queue and len(batch) < self._max_items:
            if batch and size + self._queue[0].size > MAX_MESSAGE_BYTES:
                break
            waiting = self._queue.popleft()
            if waiting.until > now:
                batch.append(waiting)
                size += waiting.size
            else:
                self._bytes -= waiting.size
        return batch

    def _fly(self, batch: list[Waiting]) -> None:
        message = secrets.token_bytes(16)
        now = self._clock()
        deadlines = [round(waiting.until - now, 3) for waiting in batch]
        ttl = max(0.001, *deadlines)
        with self._changed:
            self._flying[message] = (now + ttl, sum(waiting.size for waiting in batch))
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

    def _landed(self, message: bytes, batch: list[Waiting], data: bytes) -> None:
        try:
            outcomes = frames.decode_outcomes(data)
        except TidegateError as error:
            outcomes = [error] * len(batch)
        except Exception:
            log.exception("reply not read", action="lane.unread")
            outcomes = []
        self._end(message, batch, outcomes)

    def _end(
        self, message: bytes, batch: list[Waiting], outcomes: list[InferResult | TidegateError]
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
        self._bytes -= self._flying.pop(message, (0.0, 0))[1]
        self._replies.forget(message)
