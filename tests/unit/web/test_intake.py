"""Jobs are accepted alone while the gateway is idle, and together while it is busy; whatever
becomes of one of them is that one's alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from uuid import UUID

import pytest
import uuid_utils.compat as uuids

from errors import KeyReused, TidegateError, Unavailable
from storage.database import Contended
from storage.idempotency import Once
from storage.jobs import Accepted
from storage.work import NewJob
from web import intake
from web.intake import Intake

TENANT = uuids.uuid7()


@dataclass
class Ledger:
    """Stands in for the ledger: each transaction waits until the test lets it go."""

    arrived: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    may: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    groups: list[list[UUID]] = field(default_factory=list)
    keys: list[Mapping[UUID, Once]] = field(default_factory=list)
    refuses: Callable[[Sequence[NewJob]], Exception | None] = lambda _: None
    """The whole transaction, with this error."""
    reused: set[UUID] = field(default_factory=set)

    def submit(
        self, jobs: Sequence[NewJob], keys: Mapping[UUID, Once]
    ) -> list[Accepted | TidegateError]:
        self.groups.append([job.id for job in jobs])
        self.keys.append(keys)
        self.arrived.release()
        assert self.may.acquire(timeout=10)
        if (error := self.refuses(jobs)) is not None:
            raise error
        return [
            KeyReused("was used") if job.id in self.reused else Accepted(job.id) for job in jobs
        ]

    def go(self, transactions: int = 1) -> None:
        self.may.release(transactions)


@dataclass
class Gate:
    """An intake, and clients that each wait for their job."""

    ledger: Ledger
    intake: Intake
    kicked: list[str]
    clients: ThreadPoolExecutor

    def submit(
        self, count: int = 1, group: str = "g", once: Once | None = None
    ) -> list[tuple[UUID, Future[Accepted]]]:
        """Hand in jobs behind the one under way, each by a client of its own, in this order."""
        sent = []
        for _ in range(count):
            waiting = len(self.intake._queue)
            sent.append(self._hand_in(group, once))
            _until(lambda: len(self.intake._queue) > waiting)  # noqa: B023 - awaited right here
        return sent

    def begin(self) -> tuple[UUID, Future[Accepted]]:
        """One job, whose transaction is under way."""
        sent = self._hand_in("g", None)
        assert self.ledger.arrived.acquire(timeout=10)
        return sent

    def _hand_in(self, group: str, once: Once | None) -> tuple[UUID, Future[Accepted]]:
        job = NewJob(uuids.uuid7(), TENANT, group, "m", "", 60.0)
        return job.id, self.clients.submit(self.intake.submit, job, once)


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("never")


@pytest.fixture
def gate() -> Gate:
    ledger, kicked = Ledger(), list[str]()
    made = Intake(ledger, kicked.append, most=4)  # type: ignore[arg-type]
    return Gate(ledger, made, kicked, ThreadPoolExecutor(32))


def test_an_idle_gateway_writes_at_once(gate: Gate) -> None:
    job, answer = gate.begin()
    gate.ledger.go()

    assert answer.result(10) == Accepted(job)
    assert gate.kicked == ["g"]


def test_what_arrives_during_a_transaction_shares_the_next_one(gate: Gate) -> None:
    first, _ = gate.begin()
    sent = gate.submit(3)
    gate.ledger.go(2)

    assert [answer.result(10).id for _, answer in sent] == [job for job, _ in sent]
    assert gate.ledger.groups == [[first], [job for job, _ in sent]]
    # One word to the pump for all of them.
    assert gate.kicked == ["g", "g"]


def test_nobody_hears_anything_before_the_commit(gate: Gate) -> None:
    _, answer = gate.begin()

    assert not answer.done()
    gate.ledger.go()
    assert answer.result(10)


def test_a_transaction_takes_no_more_than_its_share(gate: Gate) -> None:
    gate.begin()
    sent = gate.submit(6)
    gate.ledger.go(3)

    for _, answer in sent:
        answer.result(10)
    assert [len(group) for group in gate.ledger.groups] == [1, 4, 2]


def test_each_group_hears_of_its_jobs_once(gate: Gate) -> None:
    gate.begin()
    sent = [*gate.submit(2, group="g"), *gate.submit(2, group="h")]
    gate.ledger.go(2)

    for _, answer in sent:
        answer.result(10)
    assert sorted(gate.kicked) == ["g", "g", "h"]


def test_a_key_that_was_used_for_something_else_is_its_own_requests_trouble(gate: Gate) -> None:
    gate.begin()
    (bad, refused), (good, accepted) = gate.submit(2)
    gate.ledger.reused = {bad}
    gate.ledger.go(2)

    assert isinstance(refused.exception(10), KeyReused)
    assert accepted.result(10) == Accepted(good)


@pytest.mark.parametrize("error", [ValueError("a NUL"), Contended("a lock")], ids=["bad", "lock"])
def test_a_job_that_the_database_refuses_is_refused_alone(gate: Gate, error: Exception) -> None:
    gate.begin()
    once = Once(TENANT, "POST /v1/jobs", "key", b"", 3600.0)
    ((bad, refused),) = gate.submit(once=once)
    good = gate.submit(2)
    gate.ledger.refuses = lambda jobs: error if bad in [job.id for job in jobs] else None
    gate.ledger.go(5)

    assert [answer.result(10).id for _, answer in good] == [job for job, _ in good]
    assert refused.exception(10) is error
    # Together, and then one by one; who may be waiting for somebody else comes last.
    assert [len(group) for group in gate.ledger.groups] == [1, 3, 1, 1, 1]
    assert gate.ledger.groups[-1] == [bad]
    assert gate.ledger.keys[-1] == {bad: once}


def test_a_database_that_is_away_is_asked_once(gate: Gate) -> None:
    gate.begin()
    sent = gate.submit(3)
    gate.ledger.refuses = lambda _: Unavailable("away")
    gate.ledger.go(2)

    for _, answer in sent:
        assert isinstance(answer.exception(10), Unavailable)
    assert len(gate.ledger.groups) == 2


def test_after_any_failure_the_next_ones_are_written(gate: Gate) -> None:
    _, failed = gate.begin()
    gate.ledger.refuses = lambda _: RuntimeError("a bug")
    gate.ledger.go()
    assert isinstance(failed.exception(10), RuntimeError)

    gate.ledger.refuses = lambda _: None
    _, answer = gate.begin()
    gate.ledger.go()
    assert answer.result(10)


def test_beyond_its_bound_the_queue_is_closed_at_once(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "MAX_WAITING", 2)
    gate.begin()
    sent = gate.submit(2)

    with pytest.raises(Unavailable, match="too many") as caught:
        gate.intake.submit(NewJob(uuids.uuid7(), TENANT, "g", "m", "", 60.0))
    assert caught.value.retry_after
    gate.ledger.go(2)
    for _, answer in sent:
        assert answer.result(10)


def test_who_has_given_up_is_not_accepted_any_more() -> None:
    ledger = Ledger()
    hasty = Intake(ledger, lambda _: None, patience=0.05)  # type: ignore[arg-type]
    for _ in range(2):
        with pytest.raises(Unavailable, match="in time"):
            hasty.submit(NewJob(uuids.uuid7(), TENANT, "g", "m", "", 60.0))
    # The first was on its way; the second still waited.
    ledger.go(2)
    hasty.stop()

    assert [len(group) for group in ledger.groups] == [1]


def test_who_stops_writes_what_waits_and_takes_no_more(gate: Gate) -> None:
    gate.begin()
    sent = gate.submit(2)
    gate.ledger.go(2)
    gate.intake.stop()

    assert all(answer.result(10) for _, answer in sent)
    with pytest.raises(Unavailable):
        gate.intake.submit(NewJob(uuids.uuid7(), TENANT, "g", "m", "", 60.0))
