"""One poll for all who wait for jobs or watch them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from uuid import UUID, uuid4

import pytest

from errors import Unavailable
from storage.lifecycle import JobState
from storage.work import Pulse
from web.waiting import JobWaiter

BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
QUEUED = Pulse(JobState.QUEUED, None, 0, 1, 0, 0)
RUNNING = Pulse(JobState.RUNNING, BEGUN, 1, 1, 0, 0)
DONE = Pulse(JobState.SUCCEEDED, BEGUN, 1, 1, 1, 0)
LONG = 10.0


class Ledger:
    """A ledger of pulses; says when it has been asked."""

    def __init__(self) -> None:
        self.known: dict[UUID, Pulse] = {}
        self.away = False
        self.asked: list[set[UUID]] = []
        self._changed = threading.Condition()

    def pulses(self, ids: Iterable[UUID]) -> dict[UUID, Pulse]:
        with self._changed:
            self.asked.append(set(ids))
            self._changed.notify_all()
        if self.away:
            raise Unavailable("away")
        return {job: self.known[job] for job in self.asked[-1] if job in self.known}

    def asked_again(self, times: int = 1) -> None:
        with self._changed:
            so_far = len(self.asked)
            assert self._changed.wait_for(lambda: len(self.asked) >= so_far + times, LONG)


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def waiter(ledger: Ledger) -> JobWaiter:
    return JobWaiter(ledger)  # type: ignore[arg-type]


def waiting(waiter: JobWaiter, job: UUID) -> threading.Thread:
    thread = threading.Thread(target=waiter.wait, args=(job, 60.0))
    thread.start()
    return thread


def test_who_waits_for_the_end_is_not_bothered_before(waiter: JobWaiter, ledger: Ledger) -> None:
    job = uuid4()
    ledger.known[job] = QUEUED
    thread = waiting(waiter, job)
    ledger.asked_again(2)
    ledger.known[job] = RUNNING
    ledger.asked_again(3)
    assert thread.is_alive()
    ledger.known[job] = DONE
    thread.join(LONG)
    assert not thread.is_alive()


def test_who_watches_hears_of_each_change_and_then_no_more(
    waiter: JobWaiter, ledger: Ledger
) -> None:
    job = uuid4()
    ledger.known[job] = QUEUED
    with waiter.watch(job) as watch:
        for pulse in (QUEUED, RUNNING, DONE):
            ledger.known[job] = pulse
            assert told(watch, LONG)
        # Twice asked, and nothing new.
        ledger.asked_again(2)
        assert not told(watch, 0.01)


def told(watch: object, timeout: float) -> bool:
    called: threading.Event = watch._called  # type: ignore[attr-defined]
    found = called.wait(timeout)
    called.clear()
    return found


def test_one_question_is_about_everybody(waiter: JobWaiter, ledger: Ledger) -> None:
    jobs = {uuid4() for _ in range(50)}
    ledger.known = dict.fromkeys(jobs, QUEUED)
    threads = [waiting(waiter, job) for job in jobs]
    with waiter.watch(next(iter(jobs))):
        while not ledger.asked or ledger.asked[-1] != jobs:
            ledger.asked_again()
    ledger.known = dict.fromkeys(jobs, DONE)
    for thread in threads:
        thread.join(LONG)
    assert not any(thread.is_alive() for thread in threads)


def test_a_ledger_that_is_away_is_asked_again(waiter: JobWaiter, ledger: Ledger) -> None:
    job = uuid4()
    ledger.known[job] = DONE
    ledger.away = True
    thread = waiting(waiter, job)
    ledger.asked_again(3)
    assert thread.is_alive()
    ledger.away = False
    thread.join(LONG)
    assert not thread.is_alive()


def test_everybody_is_let_go_now_and_from_now_on(waiter: JobWaiter, ledger: Ledger) -> None:
    job = uuid4()
    ledger.known[job] = QUEUED
    thread = waiting(waiter, job)
    with waiter.watch(job) as watch:
        waiter.release()
        watch.wait(LONG)
        assert watch.released
    thread.join(LONG)
    assert not thread.is_alive()
    with waiter.watch(job) as late:
        late.wait(LONG)
        assert late.released
    waiter.wait(job, LONG)


def test_nothing_is_remembered_of_a_job_nobody_watches(waiter: JobWaiter, ledger: Ledger) -> None:
    job = uuid4()
    ledger.known[job] = QUEUED
    with waiter.watch(job) as watch:
        assert told(watch, LONG)
    assert waiter._watches == {}
    assert waiter._pulses == {}
