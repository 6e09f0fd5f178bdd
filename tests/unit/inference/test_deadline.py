"""Deadlines and cancellation."""

from __future__ import annotations

import threading

import pytest

from errors import Cancelled, DeadlineExceeded
from inference.deadline import CancelToken, Deadline


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_deadline_is_over_exactly_at_its_time() -> None:
    clock = Clock()
    deadline = Deadline.after(5.0, clock)
    assert deadline.require() == 5.0
    clock.now = 104.5
    assert deadline.remaining() == 0.5
    assert not deadline.expired()
    clock.now = 105.0
    assert deadline.expired()
    with pytest.raises(DeadlineExceeded):
        deadline.require()


def test_the_time_remaining_is_never_negative() -> None:
    assert Deadline.after(-1.0, Clock()).remaining() == 0.0


def test_cancel_runs_what_is_registered_once() -> None:
    token, ran = CancelToken(), []
    with token.calling(lambda: ran.append("ended")):
        token.cancel()
        token.cancel()
    assert ran == ["ended"]
    with pytest.raises(Cancelled):
        token.check()


def test_cancel_does_not_run_what_is_already_over() -> None:
    token, ran = CancelToken(), []
    with token.calling(lambda: ran.append("ended")):
        pass
    token.cancel()
    assert ran == []


def test_what_starts_after_cancel_is_ended_at_once() -> None:
    token, ran = CancelToken(), []
    token.cancel()
    with token.calling(lambda: ran.append("ended")):
        assert ran == ["ended"]


def test_a_callback_may_wait_for_a_thread_that_unregisters() -> None:
    token, released, left = CancelToken(), threading.Event(), threading.Event()

    def work() -> None:
        with token.calling(release_and_wait):
            released.wait(5)
        left.set()

    def release_and_wait() -> None:
        released.set()
        left.wait(5)

    worker = threading.Thread(target=work)
    worker.start()
    while not token._callbacks:
        pass
    token.cancel()
    worker.join(5)
    assert left.is_set()
