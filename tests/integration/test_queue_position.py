"""How many come before a job that waits, on a real Postgres."""

from __future__ import annotations

import secrets
from dataclasses import replace
from uuid import UUID

import pytest
import sqlalchemy as sa
import uuid_utils.compat as uuids

from storage import backlog
from storage.lifecycle import Priority
from storage.work import Done, NewJob
from tests.conftest import Ledger


def submit(
    ledger: Ledger,
    count: int = 1,
    priority: Priority = Priority.NORMAL,
    tenant: UUID | None = None,
) -> list[UUID]:
    jobs = [
        NewJob(
            id=uuids.uuid7(),
            tenant_id=tenant or ledger.tenant,
            group=ledger.group,
            model="digits",
            version="",
            deadline=60.0,
            priority=priority,
            input=b"input",
        )
        for _ in range(count)
    ]
    ledger.jobs.submit(jobs)
    return [job.id for job in jobs]


def place(ledger: Ledger, job_id: UUID, tenant: UUID | None = None) -> int | None:
    return ledger.backlog.position(tenant or ledger.tenant, job_id)


def another_tenant(ledger: Ledger) -> UUID:
    return ledger.keys.tenant_of(ledger.keys.create(secrets.token_hex(4)))


def test_the_older_of_the_same_class_and_all_of_more_urgent_ones_come_before(
    ledger: Ledger,
) -> None:
    normal = submit(ledger, 3)
    low = submit(ledger, 2, Priority.LOW)
    high = submit(ledger, 2, Priority.HIGH)

    assert [place(ledger, job) for job in high] == [0, 1]
    assert [place(ledger, job) for job in normal] == [2, 3, 4]
    assert [place(ledger, job) for job in low] == [5, 6]


def test_other_tenants_count_and_other_groups_do_not(ledger: Ledger) -> None:
    stranger = another_tenant(ledger)
    (first,) = submit(ledger)
    (theirs,) = submit(ledger, tenant=stranger)
    (last,) = submit(ledger)
    elsewhere = replace(ledger, group=secrets.token_hex(4))
    submit(elsewhere, 5, Priority.CRITICAL)

    assert [place(ledger, job) for job in (first, last)] == [0, 2]
    assert place(ledger, theirs, stranger) == 1
    # And nobody sees where somebody else's job is.
    assert place(ledger, theirs) is None


def test_what_is_in_the_broker_comes_first_and_what_runs_has_no_place(ledger: Ledger) -> None:
    first, second, third = submit(ledger, 3)
    small = replace(ledger.backlog, credit=2)
    hints = small.release(ledger.group)
    (urgent,) = submit(ledger, priority=Priority.CRITICAL)
    assert [place(ledger, job) for job in (first, second)] == [0, 1]
    assert [place(ledger, job) for job in (urgent, third)] == [2, 3]

    claims = ledger.chunks.claim(hints[0].ids, "w")
    assert [place(ledger, job) for job in (first, second, third)] == [None, None, 1]
    ledger.chunks.commit([Done(claim, 1, 0, output=b"x") for claim in claims])
    assert [place(ledger, job) for job in (first, second, third)] == [None, None, 1]


def test_nobody_counts_further_than_there_is_a_point_to(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog, "MOST_AHEAD", 5)
    jobs = submit(ledger, 10)
    (low,) = submit(ledger, priority=Priority.LOW)

    assert [place(ledger, job) for job in jobs] == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert place(ledger, low) == 5


def test_the_place_is_found_without_walking_over_the_backlog(ledger: Ledger) -> None:
    """By plan and by pages read, not by time."""
    ids = submit(ledger, 5000)
    for tenant in (another_tenant(ledger), another_tenant(ledger)):
        submit(ledger, 5000, tenant=tenant)
    with ledger.database.transaction() as connection:
        connection.execute(sa.text("ANALYZE chunks"))
        for job_id in (ids[0], ids[-1]):
            mine = connection.execute(
                sa.text("SELECT id, priority FROM chunks WHERE job_id = :job"), {"job": job_id}
            ).one()
            told = connection.execute(
                sa.text(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {backlog._AHEAD_QUEUED.text}"),
                {
                    "group": ledger.group,
                    "priority": mine.priority,
                    "id": mine.id,
                    "most": backlog.MOST_AHEAD,
                },
            ).scalar_one()
            plan = told[0]["Plan"]
            assert set(indexes(plan)) <= {"ix_chunks_queued", "ix_chunks_active"}
            assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 400


def indexes(plan: dict) -> list[str]:  # type: ignore[type-arg]
    """What a plan reads of the table, by index; a scan of all of it counts as "all"."""
    found = [plan["Index Name"]] if "Index Name" in plan else []
    found += ["all"] if plan["Node Type"] == "Seq Scan" else []
    return found + [name for below in plan.get("Plans", []) for name in indexes(below)]
