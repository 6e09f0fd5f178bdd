"""A worker says that realtime messages had to wait: seldom, and only where they did."""

from __future__ import annotations

from typing import Any

from errors import Unavailable
from tasks.haste import CHUNKS, EVERY, LONG, TTL, Haste, allowance


class State:
    """What is said in Redis, or that it is away."""

    def __init__(self, *, away: bool = False, hurried: bool = False, workers: int = 0):
        self.said: list[tuple[str, float]] = []
        self._away = away
        self._hurried = hurried
        self._workers = workers

    def hurry(self, group: str, ttl: float) -> None:
        if self._away:
            raise Unavailable("away")
        self.said.append((group, ttl))

    def hurried(self, group: str) -> bool:
        return self._hurried

    def workers(self, group: str) -> list[str]:
        return [f"{group}-{n}" for n in range(self._workers)]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def haste(state: Any, clock: Clock | None = None) -> Haste:
    return Haste(state, "g", clock or Clock())


def test_a_message_that_had_to_wait_is_told_of_and_one_that_was_taken_at_once_is_not() -> None:
    state = State()
    one = haste(state)
    for waited in (-1.0, 0.0, LONG / 2):
        one.took(waited)
    assert state.said == []
    one.took(LONG)
    assert state.said == [("g", TTL)]


def test_many_that_wait_are_told_of_now_and_then_and_before_the_last_word_is_forgotten() -> None:
    state, clock = State(), Clock()
    one = haste(state, clock)
    for _ in range(100):
        one.took(1.0)
    assert len(state.said) == 1
    clock.now += EVERY
    one.took(1.0)
    assert len(state.said) == 2
    assert EVERY < TTL


def test_a_redis_that_is_away_does_not_hold_up_who_takes_a_message() -> None:
    haste(State(away=True)).took(1.0)


def allowed(**known: Any) -> int | None:
    state: Any = State(**known)
    return allowance(state, "g")


def test_while_messages_wait_each_worker_is_left_so_much_and_else_any() -> None:
    assert allowed(hurried=True, workers=3) == 3 * CHUNKS
    assert allowed(hurried=False, workers=3) is None


def test_a_batch_holds_up_nobody_where_no_worker_is_left_to_wait_for() -> None:
    assert allowed(hurried=True, workers=0) is None
