"""Requests are let in in the order they came, as many at a time as are worth having under way."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from web.gate import Gate, Name

A, B = ("a", ""), ("b", "")


class Lane:
    """Requests under way, by model."""

    def __init__(self, most: int) -> None:
        self.under_way: Counter[Name] = Counter()
        self.gate = Gate(self.under_way.__getitem__, most)
        self.came: list[int] = []
        self._threads: list[threading.Thread] = []

    def ask(self, name: Name, number: int) -> None:
        """In a thread of its own; returns when it is let in or held."""
        before = self.held(name) + self.under_way[name]

        def run() -> None:
            self.gate.wait(name, 30)
            self.under_way[name] += 1
            self.came.append(number)

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        until(lambda: self.held(name) + self.under_way[name] > before)

    def held(self, name: Name) -> int:
        return len(self.gate._held.get(name, ()))

    def over(self, name: Name, count: int = 1) -> None:
        self.under_way[name] -= count
        expected = len(self.came) + min(count, self.held(name))
        self.gate.freed(name)
        until(lambda: len(self.came) >= expected)


def until(condition: object) -> None:
    assert callable(condition)
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.fixture
def lane() -> Lane:
    return Lane(most=2)


def test_while_there_is_room_nobody_is_held(lane: Lane) -> None:
    assert not lane.gate.wait(A, 0)
    lane.under_way[A] = 1
    assert not lane.gate.wait(A, 0)


def test_who_is_held_comes_in_when_others_are_over_in_order(lane: Lane) -> None:
    for number in range(6):
        lane.ask(A, number)
    assert (lane.came, lane.held(A)) == ([0, 1], 4)
    lane.over(A)
    assert lane.came == [0, 1, 2]
    lane.over(A, 2)
    assert sorted(lane.came) == [0, 1, 2, 3, 4]
    lane.over(A, 2)
    assert sorted(lane.came) == list(range(6))
    assert not lane.gate._held


def test_nobody_overtakes_those_who_are_held(lane: Lane) -> None:
    for number in range(3):
        lane.ask(A, number)
    lane.under_way[A] = 0
    lane.ask(A, 3)
    assert lane.held(A) == 2
    lane.gate.freed(A)
    until(lambda: sorted(lane.came) == [0, 1, 2, 3])


def test_a_model_with_a_long_line_holds_up_no_other(lane: Lane) -> None:
    for number in range(4):
        lane.ask(A, number)
    assert not lane.gate.wait(B, 0)


def test_who_has_waited_long_enough_goes_on_and_leaves_no_place_behind(lane: Lane) -> None:
    lane.under_way[A] = 2
    assert lane.gate.wait(A, 0.01)
    assert not lane.gate._held


def test_places_that_were_not_taken_go_to_the_next(lane: Lane) -> None:
    """Who was let in may be gone by then, or be refused."""
    lane.under_way[A] = 2
    results: list[bool] = []

    def leave() -> None:
        results.append(lane.gate.wait(A, 30))
        lane.gate.freed(A)

    threads = [threading.Thread(target=leave, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: lane.held(A) == 8)
    lane.under_way[A] = 1
    lane.gate.freed(A)
    for thread in threads:
        thread.join(10)
    assert results == [True] * 8
