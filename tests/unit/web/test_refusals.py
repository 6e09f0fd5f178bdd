"""A few refusals come at once; many come at a pace, and none later than its request could wait."""

from __future__ import annotations

from web.refusals import AHEAD, BURST, RATE, Refusals


class Time:
    def __init__(self) -> None:
        self.now = 10.0
        self.slept: list[float] = []


def refusals(time: Time) -> Refusals:
    return Refusals(clock=lambda: time.now, sleep=time.slept.append)


def test_a_few_are_refused_at_once() -> None:
    time = Time()
    one = refusals(time)
    for _ in range(int(RATE * BURST)):
        one.wait(1.0)
    assert time.slept == []


def test_each_of_many_waits_for_those_before_it() -> None:
    time = Time()
    one = refusals(time)
    for _ in range(int(RATE * BURST) + 4):
        one.wait(1.0)
    assert [round(seconds * RATE) for seconds in time.slept[-3:]] == [1, 2, 3]


def test_nobody_waits_longer_than_for_an_answer() -> None:
    time = Time()
    one = refusals(time)
    for _ in range(int(10 * RATE)):
        one.wait(0.25)
    assert max(time.slept) == 0.25


def test_who_comes_after_a_flood_need_not_wait_for_it_to_have_been_paced() -> None:
    time = Time()
    one = refusals(time)
    for _ in range(int(10 * RATE)):
        one.wait(0.25)
    time.now += 0.25
    time.slept.clear()
    one.wait(1.0)
    assert max(time.slept) < 0.3


def test_who_cannot_wait_takes_no_turn_and_changes_nobody_elses() -> None:
    time = Time()
    one = refusals(time)
    for _ in range(int(RATE * BURST) + 100):
        one.wait(1.0)
    time.slept.clear()
    one.wait(0.001)
    one.wait(1.0)
    assert round(time.slept[0], 6) == 0.001
    assert round(time.slept[1] * RATE) == 100


def test_the_line_does_not_grow_without_end() -> None:
    time = Time()
    one = refusals(time)
    for _ in range(int((AHEAD + 10) * RATE)):
        one.wait(300.0)
    assert max(time.slept) == AHEAD
