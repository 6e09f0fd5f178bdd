"""Idempotency keys on a real Postgres: what is made with one is made once."""

from __future__ import annotations

import secrets
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from uuid import UUID

import pytest
import uuid_utils.compat as uuids
from sqlalchemy.exc import DataError

from errors import KeyReused, NotFound, TidegateError
from storage import idempotency
from storage.files import FileRow, file_key
from storage.idempotency import Idempotency, Once
from storage.lifecycle import JobKind
from storage.work import NewBatch, NewJob
from tests.conftest import Ledger

DAY = 24 * 3600.0


def once(ledger: Ledger, asked: bytes = b"this", **fields: object) -> Once:
    made = Once(ledger.tenant, "POST /v1/jobs", secrets.token_hex(8), asked, DAY)
    return replace(made, **fields)  # type: ignore[arg-type]


def new_job(ledger: Ledger, tenant: UUID | None = None) -> NewJob:
    return NewJob(
        id=uuids.uuid7(),
        tenant_id=tenant or ledger.tenant,
        group=ledger.group,
        model="digits",
        version="",
        deadline=60.0,
        input=b"input",
    )


def submit(ledger: Ledger, key: Once) -> UUID:
    job = new_job(ledger, key.tenant_id)
    (outcome,) = ledger.jobs.submit([job], {job.id: key})
    if isinstance(outcome, TidegateError):
        raise outcome
    return outcome.id


def jobs_of(ledger: Ledger, tenant: UUID | None = None) -> list[UUID]:
    found = ledger.jobs.list(tenant or ledger.tenant, after=None, limit=1000, kinds=list(JobKind))
    return [row.id for row in found]


def upload(ledger: Ledger, key: Once | None = None) -> FileRow:
    file_id = uuids.uuid7()
    row = FileRow(file_id, ledger.tenant, "batch", "in.jsonl", 10, file_key(ledger.tenant, file_id))
    return ledger.files.add(row, key)


def age(ledger: Ledger, key: Once, seconds: float) -> None:
    ledger.sql(
        "UPDATE idempotency_keys SET created_at = now() - make_interval(secs => :seconds)"
        " WHERE key = :key",
        seconds=seconds,
        key=key.key,
    )


def test_the_same_key_gives_the_same_job_and_another_key_another(ledger: Ledger) -> None:
    key = once(ledger)
    first = submit(ledger, key)

    assert submit(ledger, key) == first
    other = submit(ledger, once(ledger))
    assert jobs_of(ledger) == sorted([first, other], reverse=True)
    # One piece of work each, not more.
    hints = ledger.backlog.release(ledger.group)
    assert sum(len(hint.ids) for hint in hints) == 2


def test_a_job_without_a_key_is_made_each_time(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.jobs.submit([new_job(ledger)])

    assert len(jobs_of(ledger)) == 2


def test_the_same_key_for_something_else_is_refused_by_name(ledger: Ledger) -> None:
    key = once(ledger)
    first = submit(ledger, key)
    other = replace(key, fingerprint=b"that")

    for use in (partial(submit, ledger), Idempotency(ledger.database).earlier):
        with pytest.raises(KeyReused, match="Idempotency-Key") as caught:
            use(other)
        assert caught.value.param == "Idempotency-Key"
    assert jobs_of(ledger) == [first]


def test_a_key_belongs_to_its_tenant_and_its_route(ledger: Ledger) -> None:
    key = once(ledger)
    stranger = ledger.keys.tenant_of(ledger.keys.create(secrets.token_hex(4)))
    mine = submit(ledger, key)
    theirs = submit(ledger, replace(key, tenant_id=stranger))
    elsewhere = submit(ledger, replace(key, route="POST /v1/other"))

    assert len({mine, theirs, elsewhere}) == 3
    assert jobs_of(ledger, stranger) == [theirs]


def test_a_key_that_is_too_old_was_never_used(ledger: Ledger) -> None:
    key = once(ledger)
    first = submit(ledger, key)
    age(ledger, key, DAY - 60)
    assert submit(ledger, key) == first
    age(ledger, key, DAY + 60)

    assert Idempotency(ledger.database).earlier(key) is None
    second = submit(ledger, replace(key, fingerprint=b"that"))
    assert second != first
    # It counts from now.
    assert submit(ledger, replace(key, fingerprint=b"that")) == second


def test_of_many_who_try_at_once_one_makes_the_job(ledger: Ledger) -> None:
    key = once(ledger)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: submit(ledger, key), range(64)))

    assert len(set(found)) == 1
    assert jobs_of(ledger) == found[:1]


@pytest.mark.parametrize("commits", [True, False], ids=["commits", "rolls back"])
def test_who_comes_second_waits_for_the_first_to_end(ledger: Ledger, commits: bool) -> None:
    key, first = once(ledger), uuids.uuid7()
    begun, done = threading.Event(), threading.Event()

    class Crash(Exception):
        pass

    def slow() -> None:
        with ledger.database.transaction() as connection:
            assert idempotency.settle(connection, key, first) == first
            begun.set()
            done.wait(10)
            if not commits:
                raise Crash

    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(slow)
        assert begun.wait(10)
        two = pool.submit(submit, ledger, key)
        done.set()
        assert isinstance(one.exception(10), type(None) if commits else Crash)
        kept = two.result(10)

    # What was rolled back was never there.
    assert (kept == first) is commits
    assert jobs_of(ledger) == ([] if commits else [kept])


def test_a_job_that_cannot_be_made_leaves_its_key_unused(ledger: Ledger) -> None:
    key = once(ledger)
    bad = replace(new_job(ledger), metadata={"a": "\0"})
    with pytest.raises(DataError):
        ledger.jobs.submit([bad], {bad.id: key})

    assert Idempotency(ledger.database).earlier(key) is None
    made = submit(ledger, key)
    assert jobs_of(ledger) == [made]


def test_batches_and_files_are_made_once_too(ledger: Ledger) -> None:
    files, batches = once(ledger, route="POST /v1/files"), once(ledger, route="POST /v1/batches")
    file = upload(ledger, files)
    assert upload(ledger, files) == file
    listed = ledger.files.list(ledger.tenant, after=None, limit=10, purpose=None)
    assert [row.id for row in listed] == [file.id]

    batch = NewBatch("/v2/models/digits/infer", "24h", file.id)
    made = ledger.jobs.submit_batch(new_job(ledger), batch, batches)
    assert ledger.jobs.submit_batch(new_job(ledger), batch, batches) == made
    assert jobs_of(ledger) == [made]


def test_a_file_that_is_gone_is_not_made_again(ledger: Ledger) -> None:
    key = once(ledger, route="POST /v1/files")
    file = upload(ledger, key)
    ledger.files.delete(ledger.tenant, file.id)

    with pytest.raises(NotFound):
        upload(ledger, key)
    assert ledger.files.list(ledger.tenant, after=None, limit=10, purpose=None) == []
