"""Requests are let in in the order they came, as many at a time as are worth having under way."""

from __future__ import annotations

import threading
import time
from collections import Counter

import pytest

from web.gate import Gate, Name, Place

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
            place = self.gate.wait(name, 30)
            self.under_way[name] += 1
            place.leave()
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


def room(gate: Gate, name: Name) -> bool:
    return gate._room(name) > 0


def let_in(lane: Lane, name: Name) -> None:
    """One more, at once."""
    assert room(lane.gate, name)
    place = lane.gate.wait(name, 0)
    lane.under_way[name] += 1
    place.leave()


@pytest.fixture
def lane() -> Lane:
    return Lane(most=2)


def test_while_there_is_room_nobody_is_held(lane: Lane) -> None:
    let_in(lane, A)
    let_in(lane, A)


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


def test_who_comes_lets_in_those_before_it_where_nobody_is_under_way_any_more(lane: Lane) -> None:
    """The last of those who were may have been over before anybody was held."""
    for number in range(3):
        lane.ask(A, number)
    assert lane.held(A) == 1
    lane.under_way[A] = 0
    lane.gate.wait(A, 30)
    until(lambda: lane.came == [0, 1, 2])
    assert not lane.gate._held


def test_those_who_are_slow_to_send_are_counted_and_keep_out_nobody() -> None:
    under_way = Counter[Name]()
    gate = Gate(under_way.__getitem__, 4)
    slow = [gate.wait(A, 0) for _ in range(10)]
    assert gate.wait(A, 0)
    under_way[A] = 2
    assert not room(gate, A)
    under_way[A] = 1
    assert room(gate, A)
    for place in slow:
        place.leave()
        place.leave()
    assert gate._coming[A] == 1


def test_a_model_with_a_long_line_holds_up_no_other(lane: Lane) -> None:
    for number in range(4):
        lane.ask(A, number)
    let_in(lane, B)


def test_who_has_waited_long_enough_goes_on_and_leaves_no_place_behind(lane: Lane) -> None:
    lane.under_way[A] = 2
    lane.gate.wait(A, 0.01).leave()
    assert not lane.gate._held
    assert not lane.gate._coming


def test_places_that_were_not_taken_go_to_the_next(lane: Lane) -> None:
    """Who was let in may be gone by then, or be refused."""
    lane.under_way[A] = 2
    results: list[Place] = []

    def leave() -> None:
        place = lane.gate.wait(A, 30)
        results.append(place)
        place.leave()

    threads = [threading.Thread(target=leave, daemon=True) for _ in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: lane.held(A) == 8)
    lane.under_way[A] = 1
    lane.gate.freed(A)
    for thread in threads:
        thread.join(10)
    assert len(results) == 8
    assert not lane.gate._coming
