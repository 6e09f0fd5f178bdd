"""How long the store may take: who says it, and for whom."""

from __future__ import annotations

import math
import threading

import pytest

from errors import DeadlineExceeded
from storage.time_limit import current, within


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_where_nobody_says_anything_there_is_no_end() -> None:
    assert current().left() == math.inf
    with within(math.inf):
        assert current().left() == math.inf


def test_time_goes_by_until_it_is_over(clock: Clock) -> None:
    with within(5, clock):
        clock.now += 4
        assert current().left() == 1
        clock.now += 1
        with pytest.raises(DeadlineExceeded):
            current().left()
    assert current().left() == math.inf


@pytest.mark.parametrize(("outer", "inner"), [(5, 60), (60, 5)])
def test_of_two_the_smaller_holds(clock: Clock, outer: float, inner: float) -> None:
    with within(outer, clock):
        with within(inner, clock) as limit:
            assert limit.left() == current().left() == 5
        assert current().left() == outer


def test_what_a_block_says_ends_with_it_whatever_happens(clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError), within(5, clock):
        raise ZeroDivisionError
    assert current().left() == math.inf


def test_one_threads_time_is_not_anothers(clock: Clock) -> None:
    seen: list[float] = []
    with within(5, clock):
        thread = threading.Thread(target=lambda: seen.append(current().left()))
        thread.start()
        thread.join()
    assert seen == [math.inf]
