"""Jobs of many requests in one transaction, on a real Postgres: each comes to its own end."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import pytest
import uuid_utils.compat as uuids

from errors import KeyReused, Unavailable
from storage.database import Contended
from storage.idempotency import Once
from storage.jobs import Accepted
from storage.lifecycle import JobKind, Priority
from storage.work import NewJob
from tests.conftest import Ledger


def new_jobs(ledger: Ledger, count: int, **fields: object) -> list[NewJob]:
    job = NewJob(uuids.uuid7(), ledger.tenant, ledger.group, "digits", "", 60.0, input=b"input")
    return [replace(job, id=uuids.uuid7(), **fields) for _ in range(count)]  # type: ignore[arg-type]


def key(ledger: Ledger, name: str, asked: bytes = b"this") -> Once:
    return Once(ledger.tenant, "POST /v1/jobs", name, asked, 3600.0)


def ids(ledger: Ledger) -> list[UUID]:
    """The tenant's jobs, oldest first."""
    rows = ledger.jobs.list(ledger.tenant, after=None, limit=1000, kinds=list(JobKind))
    return [row.id for row in reversed(rows)]


def accepted(outcomes: Sequence[object]) -> list[UUID]:
    return [outcome.id for outcome in outcomes if isinstance(outcome, Accepted)]


def test_what_is_told_of_a_new_job_is_what_stands_there(ledger: Ledger) -> None:
    rich = replace(
        *new_jobs(ledger, 1),
        version="3",
        priority=Priority.HIGH,
        metadata={"a": 'quotes " and \\ and {braces}', "b": "é, \U0001f600, %s, :c"},
    )
    bare = replace(*new_jobs(ledger, 1), input=None, input_key="elsewhere")
    for job, outcome in zip((rich, bare), ledger.jobs.submit([rich, bare]), strict=True):
        assert isinstance(outcome, Accepted)
        told = outcome.row
        assert told is not None
        stands = ledger.jobs.get(ledger.tenant, job.id)._mapping
        assert dict(told._mapping).items() <= dict(stands).items()
        assert told.metadata == job.metadata
        assert (told.version, told.priority) == (job.version, job.priority)
        assert told.deadline_at - told.created_at == timedelta(seconds=60)


def test_any_bytes_come_back_as_they_were(ledger: Ledger) -> None:
    inputs = [bytes(range(256)), b"", b"\\x41", b"'", secrets.token_bytes(2000)]
    jobs = [replace(*new_jobs(ledger, 1), input=data) for data in inputs]
    ledger.jobs.submit(jobs)

    (hint,) = ledger.backlog.release(ledger.group)
    claims = ledger.chunks.claim(hint.ids, "worker")
    assert [(claim.job_id, claim.input) for claim in claims] == [
        (job.id, job.input) for job in jobs
    ]


def test_they_run_in_the_order_in_which_they_came(ledger: Ledger) -> None:
    jobs = new_jobs(ledger, 100)
    for group in (jobs[:40], jobs[40:]):
        ledger.jobs.submit(group)

    (hint,) = ledger.backlog.release(ledger.group)
    claims = ledger.chunks.claim(hint.ids, "worker")
    assert [claim.job_id for claim in claims] == [job.id for job in jobs]


def test_of_two_with_one_key_the_first_is_made_and_both_are_told_of_it(ledger: Ledger) -> None:
    first, again, other = new_jobs(ledger, 3)
    keys = {first.id: key(ledger, "k"), again.id: key(ledger, "k"), other.id: key(ledger, "l")}
    outcomes = ledger.jobs.submit([first, again, other], keys)

    assert accepted(outcomes) == [first.id, first.id, other.id]
    assert [one.row is None for one in outcomes if isinstance(one, Accepted)] == [
        False,
        True,
        False,
    ]
    assert ids(ledger) == [first.id, other.id]


def test_a_key_used_for_something_else_is_refused_among_others(ledger: Ledger) -> None:
    (before,) = new_jobs(ledger, 1)
    ledger.jobs.submit([before], {before.id: key(ledger, "k")})
    plain, misused, replay, twice, unlike = new_jobs(ledger, 5)
    outcomes = ledger.jobs.submit(
        [plain, misused, replay, twice, unlike],
        {
            misused.id: key(ledger, "k", b"that"),
            replay.id: key(ledger, "k"),
            twice.id: key(ledger, "l"),
            unlike.id: key(ledger, "l", b"that"),
        },
    )

    assert accepted(outcomes) == [plain.id, before.id, twice.id]
    assert [type(one) for one in outcomes if not isinstance(one, Accepted)] == [KeyReused] * 2
    assert ids(ledger) == [before.id, plain.id, twice.id]


def test_an_input_stored_too_long_ago_is_refused_alone_and_leaves_its_key_unused(
    ledger: Ledger,
) -> None:
    now = ledger.database.now()
    fine, stale, heir, fresh = new_jobs(ledger, 4)
    stale = replace(stale, input_key="old", stored_since=now - timedelta(hours=1))
    fresh = replace(fresh, input_key="new", stored_since=now)
    keys = {stale.id: key(ledger, "k"), heir.id: key(ledger, "k")}
    outcomes = ledger.jobs.submit([fine, stale, heir, fresh], keys)

    assert accepted(outcomes) == [fine.id, heir.id, fresh.id]
    assert isinstance(outcomes[1], Unavailable)
    assert ids(ledger) == [fine.id, heir.id, fresh.id]


def test_groups_with_the_same_keys_in_opposite_orders_do_not_lock_each_other_out(
    ledger: Ledger,
) -> None:
    names = [f"k{n}" for n in range(30)]

    def submit(order: Sequence[str]) -> list[UUID]:
        jobs = new_jobs(ledger, len(order))
        pairs = zip(jobs, order, strict=True)
        found = accepted(ledger.jobs.submit(jobs, {job.id: key(ledger, k) for job, k in pairs}))
        return [made for _, made in sorted(zip(order, found, strict=True))]

    with ThreadPoolExecutor(6) as pool:
        orders = [names, names[::-1]] * 10
        made = list(pool.map(submit, orders))

    assert all(one == made[0] for one in made)
    assert sorted(ids(ledger)) == sorted(made[0])


def test_a_key_that_somebody_holds_is_no_outage(ledger: Ledger) -> None:
    """Told apart, since the neighbours of who waits for it may be tried without it."""
    (job,) = new_jobs(ledger, 1)
    with ledger.database.transaction() as connection:
        ledger.jobs.submit([job], {job.id: key(ledger, "k")})
        connection.exec_driver_sql("SELECT key FROM idempotency_keys WHERE key = 'k' FOR UPDATE")
        (late,) = new_jobs(ledger, 1)
        with pytest.raises(Contended):
            ledger.jobs.submit([late], {late.id: key(ledger, "k")})
    assert ids(ledger) == [job.id]


def test_a_job_that_cannot_be_written_takes_the_whole_transaction_along(ledger: Ledger) -> None:
    """So that whoever shared it may try again, alone."""
    good, bad = new_jobs(ledger, 2)
    bad = replace(bad, metadata={"a": "\0"})
    with pytest.raises(Exception, match="Unicode"):
        ledger.jobs.submit([good, bad], {good.id: key(ledger, "k")})

    assert ids(ledger) == []
    assert accepted(ledger.jobs.submit([good], {good.id: key(ledger, "k")})) == [good.id]
