"""Requests for one model version, gathered into messages.

Those that arrive while messages are in flight travel together in the next one. An idle gateway
sends at once; a busy one spreads the cost of Redis, Celery and Triton over many requests. The
window is the one knob.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import structlog

from errors import Overloaded, TidegateError, Unavailable
from inference import frames
from inference.tensors import Outcome
from storage.redis_state import RedisState, Where
from tasks import messages
from web.flight import LOOK_AFTER, Answer, Flight, Move, Waiting
from web.pace import KEPT, Pace
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
"""Messages of one model version in flight, however slow it is, where nothing else is said."""
LOST_RETRY_AFTER = 5
"""Seconds a client is told to wait whose request was lost twice."""
CAUTION = 0.5
"""The part of its time that a request may have to wait, as far as one can tell: the wait can be
twice as long, and an answer that comes too late has cost as much as one in time."""
PATIENCE = 0.02
"""Seconds a full window holds back a message: a slow request delays the next ones this much."""


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
        max_wait: float = math.inf,
        max_flying: int = MAX_FLYING,
        patience: float = PATIENCE,
        clock: Callable[[], float] = time.monotonic,
        send: Callable[..., None] = messages.send,
        gone: Callable[[], None] = lambda: None,
    ):
        """`gone` is called when requests are over."""
        self._group = group
        self._state = state
        self._replies = replies
        self._window = window
        self._max_items = max_items
        self._max_wait = max_wait
        self._max_flying = max_flying
        self._patience = patience
        self._clock = clock
        self._send = send
        self._tell_gone = gone
        self._queue: deque[Waiting] = deque()
        self._bytes = 0
        self._flying: dict[bytes, Flight] = {}
        self._ahead = 0
        """Requests that wait or are in flight."""
        self._pace = Pace(clock)
        self._sent = 0.0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def depth(self) -> int:
        """Requests that wait for their answers."""
        return self._ahead

    def admit(self, timeout: float, held: int = 0) -> None:
        """Before anything is done for a request, with so many `held` before it: would its answer
        come within `timeout` seconds, and as soon as anybody is to wait? Raises `Overloaded`."""
        # Without the lock: who reads numbers of a moment ago is off by one.
        ahead = self._ahead + held
        together = min(KEPT, max(1, len(self._flying)))
        if ahead and self._pace.wait(ahead, together) > min(timeout * CAUTION, self._max_wait):
            raise self._overloaded(ahead)

    def _overloaded(self, ahead: int) -> Overloaded:
        return Overloaded(
            f"{ahead} requests wait for this model, more than it answers in time",
            retry_after=self._pace.retry_after(ahead),
        )

    def submit(self, waiting: Waiting) -> None:
        """Queue one request. Raises `Overloaded` where too many wait already."""
        with self._changed:
            full = self._bytes > 0 and self._bytes + waiting.size > MAX_WAITING_BYTES
            if full or len(self._queue) >= MAX_WAITING:
                raise self._overloaded(self._ahead)
            self._ahead += 1
            self._pace.busy()
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
        self._land_expired(now)
        return len(self._flying) < self._window or (
            len(self._flying) < self._max_flying and now - self._sent >= self._patience
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
                self._gone(1)
        return batch

    def _fly(self, batch: list[Waiting]) -> None:
        flight = Flight(secrets.token_bytes(16), batch, self._clock())
        with self._changed:
            self._flying[flight.message] = flight
            self._sent = flight.sent
        self._replies.expect(flight.message, lambda data: self._landed(flight, data))
        self._launch(flight)

    def _launch(self, flight: Flight) -> None:
        """Store and publish. Those who wait hear of it where that fails."""
        deadlines = flight.deadlines()
        try:
            data = frames.encode_requests([waiting.request for waiting in flight.batch])
            self._state.put_blob(flight.message, data, max(0.001, *deadlines))
            self._publish(flight, deadlines)
        except Exception as error:
            if not isinstance(error, TidegateError):
                log.exception("message not sent", action="lane.unsent")
                error = TidegateError("the gateway failed; its log says why")
            self._end(flight, [error] * len(flight.batch))

    def _publish(self, flight: Flight, deadlines: list[float]) -> None:
        self._send(
            messages.REALTIME,
            messages.realtime_queue(self._group),
            ttl=max(0.001, *deadlines),
            message=flight.message.hex(),
            gateway=self._replies.gateway,
            deadlines=deadlines,
        )

    def overdue(self) -> list[bytes]:
        """Messages that somebody should look after: their answers take long."""
        now = self._clock()
        with self._changed:
            self._land_expired(now)
            return [
                flight.message
                for flight in self._flying.values()
                if now - flight.sent >= LOOK_AFTER
            ]

    def seen(self, message: bytes, where: Where) -> None:
        """Somebody looked after a message: do what `web.flight` says. Called by one thread."""
        with self._changed:
            flight = self._flying.get(message)
            if flight is None:
                return
            move = flight.seen(where, self._clock())
            if move is Move.RESEND:
                flight.resent(self._clock())
        about = {"message_id": message.hex(), "requests": len(flight.batch)}
        if move is Move.NUDGE:
            log.info("message named again", action="lane.nudged", **about)
            # One that did not arrive is one more next time.
            self._publish(flight, flight.deadlines())
            flight.nudged = True
        elif move is Move.RESEND:
            log.warning("message lost; sent again", action="lane.resent", **about)
            self._launch(flight)
        elif move is Move.GIVE_UP:
            log.error("message lost twice", action="lane.given_up", **about)
            error = Unavailable(
                "this request was sent to a GPU worker twice, and lost with it both times",
                retry_after=LOST_RETRY_AFTER,
            )
            self._end(flight, [error] * len(flight.batch))

    def _landed(self, flight: Flight, data: bytes) -> None:
        outcomes: Sequence[Outcome | None]
        try:
            outcomes = frames.decode_part(data)
        except TidegateError as error:
            outcomes = [error] * len(flight.batch)
        except Exception:
            log.exception("reply not read", action="lane.unread")
            outcomes = []
        self._end(flight, outcomes)

    def _end(self, flight: Flight, outcomes: Sequence[Outcome | None]) -> None:
        """The end of a message, or of some of its requests: the others wait for another reply. The
        first end counts: a message that was sent again may be answered twice, and one whose
        publishing failed may have arrived all the same."""
        if len(outcomes) != len(flight.batch):
            error = TidegateError("the worker answered another number of requests")
            outcomes = [error] * len(flight.batch)
        with self._changed:
            if flight.message not in self._flying:
                return
            held = flight.size
            ended = flight.settle(outcomes)
            if not ended:
                return
            self._bytes -= held - flight.size
            self._pace.landed(len(ended))
            self._gone(len(ended))
            if not flight.open:
                self._land(flight)
            self._changed.notify()
        for waiting, outcome in ended:
            waiting.answer.set_result(Answer(outcome, len(flight.batch)))

    def _land_expired(self, now: float) -> None:
        """A message whose answer never comes gives its place back at its deadline."""
        for flight in [flight for flight in self._flying.values() if flight.until <= now]:
            self._gone(len(flight.open))
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        del self._flying[flight.message]
        self._bytes -= flight.size
        self._replies.forget(flight.message)

    def _gone(self, requests: int) -> None:
        self._ahead -= requests
        if not self._ahead:
            self._pace.idle()
        self._tell_gone()
