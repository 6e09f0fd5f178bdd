"""How long the next request would wait is told from how fast the last ones were answered."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from web.pace import KEPT, Pace


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nobody_waits_for_an_idle_model(clock: Clock) -> None:
    assert Pace(clock).wait(10) == 0


def test_a_model_that_has_not_answered_yet_may_take_its_time(clock: Clock) -> None:
    pace = Pace(clock)
    pace.busy()
    clock.now += 100
    assert pace.wait(1000) == 0


def test_who_comes_waits_for_those_before_at_the_pace_they_are_answered_at(clock: Clock) -> None:
    pace = Pace(clock)
    pace.busy()
    for _ in range(5):
        clock.now += 0.5
        pace.landed(10)
    assert pace.wait(40) == pytest.approx(2.0)
    assert pace.retry_after(40) == 1


def test_a_model_that_stops_answering_grows_slower_by_the_second(clock: Clock) -> None:
    pace = Pace(clock)
    pace.busy()
    clock.now += 1
    pace.landed(100)
    before = pace.wait(100)
    clock.now += 30
    assert before == pytest.approx(1.0)
    assert pace.wait(100) == pytest.approx(31.0)
    assert pace.retry_after(10_000) == 60


def test_what_was_is_forgotten_when_the_last_one_has_its_answer(clock: Clock) -> None:
    pace = Pace(clock)
    pace.busy()
    clock.now += 10
    pace.landed(1)
    pace.idle()
    pace.busy()
    assert pace.wait(100) == 0


@given(st.integers(1, 64), st.floats(0.001, 10.0), st.floats(0.001, 10.0), st.integers(0, 5000))
def test_only_the_latest_landings_count(
    requests: int, before: float, after: float, ahead: int
) -> None:
    """A model that was fast, or slow, is known for what it is now after a while."""
    clock = Clock()
    pace = Pace(clock)
    pace.busy()
    for _ in range(KEPT):
        clock.now += before
        pace.landed(requests)
    for _ in range(KEPT):
        clock.now += after
        pace.landed(requests)
    assert pace.wait(ahead) == pytest.approx(ahead * after / requests, rel=1e-6, abs=1e-9)
