"""A message in flight, and what is to be done about one that takes long.

    it is        because                           then
    waiting      its tensors lie in Redis          named to the workers again, once: the broker may
                                                   have lost it, and tensors are claimed only once
    running      a worker says so every second     nothing
    nowhere      neither, look after look: its     stored and sent again, once; the second time
                 worker died, or Redis forgot it   those who wait for it are told to come again

So a message is run twice at most: what kills workers kills two of them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from enum import Enum, auto

from inference.tensors import InferRequest, Outcome
from storage.redis_state import Where

LOOK_AFTER = 1.0
"""Seconds for an answer in which nobody wonders where a message is."""
NUDGE_AFTER = 2.0
"""Seconds a message may wait for a worker before it is named again. A long queue takes as long, and
costs a worker a look at something that is gone."""
LOST_LOOKS = 5
"""Looks in a row that find a message nowhere before it is lost: four pauses of the lookout, twice
as long as a living worker takes to say what it runs."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one request, and how many requests travelled in its message; 0: none."""

    outcome: Outcome
    batch_size: int
    cached: bool = False
    """It was not run for this request: it had been kept, or was run for another one just like
    it."""
    cache_status: str = ""
    """What the response cache did, in the words of RFC 9211; "": it was not asked."""


class Promise:
    """An answer to come, for one who waits: a `Future` without what nobody needs here, at a third
    of its price."""

    __slots__ = ("_answer", "_given")

    def __init__(self) -> None:
        self._answer: Answer | None = None
        self._given = threading.Lock()
        self._given.acquire()

    def set_result(self, answer: Answer) -> None:
        """Once."""
        self._answer = answer
        self._given.release()

    def done(self) -> bool:
        return self._answer is not None

    def result(self, timeout: float) -> Answer:
        """Raises `concurrent.futures.TimeoutError` where there is none within so many seconds."""
        if not self._given.acquire(timeout=timeout):
            raise FutureTimeout
        assert self._answer is not None
        return self._answer


@dataclass(slots=True)
class Waiting:
    """A request on its way; `until` is on the process's monotonic clock, `size` in bytes."""

    request: InferRequest
    size: int
    until: float
    answer: Promise = field(default_factory=Promise)


class Move(Enum):
    """What is to be done about a message."""

    NONE = auto()
    NUDGE = auto()
    RESEND = auto()
    GIVE_UP = auto()


@dataclass(slots=True)
class Flight:
    """A message and the requests in it, since it was sent last."""

    message: bytes
    batch: list[Waiting]
    sent: float
    open: set[int] = field(init=False)
    """The places of the requests that have no answer yet."""
    until: float = field(init=False)
    """When the last of these is over."""
    size: int = field(init=False)
    """Theirs, in bytes."""
    asked: set[int] = field(init=False)
    """The places of those that had none when it was sent."""
    again: bool = False
    """This is its second time."""
    nudged: bool = False
    missing: int = 0
    """Looks in a row that found it nowhere."""

    def __post_init__(self) -> None:
        self.open = set(range(len(self.batch)))
        self.asked = set(self.open)
        self._measure()

    def _measure(self) -> None:
        waiting = [self.batch[place] for place in self.open]
        self.until = max((one.until for one in waiting), default=self.sent)
        self.size = sum(one.size for one in waiting)

    def settle(self, outcomes: Sequence[Outcome | None]) -> list[tuple[Waiting, Outcome]]:
        """Take note of a reply, which may leave some to a later one: the requests that it ends.
        The first answer counts."""
        ended = {
            place: outcome
            for place, outcome in enumerate(outcomes)
            if outcome is not None and place in self.open
        }
        self.open.difference_update(ended)
        self._measure()
        return [(self.batch[place], outcome) for place, outcome in ended.items()]

    def deadlines(self) -> list[float]:
        """Seconds from `sent`, when the tensors are stored, to the end of each request; of one
        that had its answer by then, none: it is not run again."""
        return [
            round(waiting.until - self.sent, 3) if place in self.asked else 0.0
            for place, waiting in enumerate(self.batch)
        ]

    def seen(self, where: Where, now: float) -> Move:
        """Take note of where it is."""
        self.missing = self.missing + 1 if where is Where.NOWHERE else 0
        if self.missing >= LOST_LOOKS:
            return Move.GIVE_UP if self.again else Move.RESEND
        overdue = where is Where.WAITING and now - self.sent >= NUDGE_AFTER
        return Move.NUDGE if overdue and not self.nudged else Move.NONE

    def resent(self, now: float) -> None:
        """Take note that it starts anew, with what is left of its deadlines."""
        self.sent, self.again, self.nudged, self.missing = now, True, False, 0
        self.asked = set(self.open)
