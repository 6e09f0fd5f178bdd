"""Requests are let in while somebody is there to answer, and ask about it together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from errors import ModelNotReady, TidegateError, Unavailable
from web.presence import TTL, Presence


class State:
    """Says who is there; waits with it while it is told to hang."""

    def __init__(self) -> None:
        self.names = ["worker"]
        self.away = False
        self.asked = 0
        self.reached = threading.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()

    def workers(self, group: str) -> list[str]:
        self.asked += 1
        self.reached.set()
        assert self.goes_on.wait(10)
        if self.away:
            raise Unavailable("away")
        return self.names


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def presence(state: State, clock: Clock) -> Presence:
    return Presence(state, "g", clock)  # type: ignore[arg-type]


def test_a_worker_who_was_there_is_trusted_for_a_moment(
    presence: Presence, state: State, clock: Clock
) -> None:
    presence.require(10)
    clock.now = TTL
    presence.require(10)
    assert state.asked == 1
    clock.now = TTL + 0.01
    presence.require(10)
    assert state.asked == 2


def test_without_a_worker_everybody_is_refused_until_one_is_there(
    presence: Presence, state: State
) -> None:
    state.names = []
    for _ in range(2):
        with pytest.raises(ModelNotReady, match="'g'"):
            presence.require(10)
    state.names = ["worker"]
    presence.require(10)


def test_without_redis_everybody_is_refused_until_it_is_back(
    presence: Presence, state: State
) -> None:
    state.away = True
    with pytest.raises(Unavailable):
        presence.require(10)
    state.away = False
    presence.require(10)


def test_those_who_come_while_redis_hangs_wait_once_and_together(
    presence: Presence, state: State
) -> None:
    state.away = True
    state.goes_on.clear()

    def refused() -> str:
        try:
            presence.require(10)
        except TidegateError as error:
            return error.code
        return "let in"

    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(refused)
        assert state.reached.wait(10)
        others = [pool.submit(refused) for _ in range(7)]
        asking = presence._asking
        assert asking is not None
        while len(asking._condition._waiters) < 8:  # type: ignore[attr-defined]
            assert not asking.done()
        state.goes_on.set()
        assert [one.result(10) for one in (first, *others)] == ["unavailable"] * 8
    assert state.asked == 1


def test_nobody_waits_longer_than_he_may_and_the_others_wait_on(
    presence: Presence, state: State
) -> None:
    state.goes_on.clear()
    with ThreadPoolExecutor(1) as pool:
        # The one who asked first gives up first.
        with pytest.raises(Unavailable, match="in time"):
            presence.require(0.01)
        patient = pool.submit(presence.require, 10)
        with pytest.raises(Unavailable, match="in time"):
            presence.require(0.01)
        state.goes_on.set()
        patient.result(10)
    assert state.asked == 1
    presence.require(0.01)
    assert state.asked == 1
