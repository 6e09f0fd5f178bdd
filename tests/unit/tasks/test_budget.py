"""The retry budget: a share of what succeeds, and a trickle."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tasks.budget import MOST, RATE, RATIO, RetryBudget


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drained(clock: Clock) -> RetryBudget:
    budget = RetryBudget(clock)
    while budget.allow("m", again=True):
        pass
    return budget


def test_new_work_of_a_healthy_model_is_free() -> None:
    budget = drained(Clock())
    assert all(budget.allow("m", again=False) for _ in range(1000))
    assert not budget.allow("m", again=True)


def test_a_model_that_is_away_is_asked_as_often_as_the_trickle_allows() -> None:
    clock = Clock()
    budget = drained(clock)
    budget.record("m", away=True)
    asked = 0
    for _ in range(1000):
        clock.now += 0.01
        if budget.allow("m", again=False):
            asked += 1
            budget.record("m", away=True)
    assert 10 * RATE - 1 <= asked <= 10 * RATE
    budget.record("m", away=False)
    assert budget.allow("m", again=False)


def test_successes_pay_for_retries() -> None:
    budget = drained(Clock())
    for _ in range(round(MOST / RATIO)):
        budget.record("m", away=False)
    retried = 0
    while budget.allow("m", again=True):
        retried += 1
    assert retried == MOST


def test_what_an_outage_left_behind_runs_at_full_speed_once_it_is_over() -> None:
    budget = drained(Clock())
    budget.record("m", away=False)
    for _ in range(1000):
        assert budget.allow("m", again=True)
        budget.record("m", away=False)


def test_models_have_accounts_of_their_own() -> None:
    budget = drained(Clock())
    assert budget.allow("other", again=True)


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.booleans()), max_size=200))
def test_there_are_never_more_retries_than_the_budget(
    steps: list[tuple[float, bool, bool]],
) -> None:
    clock = Clock()
    budget = RetryBudget(clock)
    retries = successes = 0
    for pause, again, away in steps:
        clock.now += pause
        allowed = budget.allow("m", again=again)
        retries += allowed and again
        if allowed:
            budget.record("m", away=away)
            successes += not away
    assert retries <= MOST + clock.now * RATE + successes * RATIO + 1e-6
