"""The ledger on a real Postgres: who may run what, and what a commit is worth."""

from __future__ import annotations

import threading
from dataclasses import replace
from uuid import UUID

import pytest
import sqlalchemy as sa
import uuid_utils.compat as uuids
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from config import Settings
from errors import Conflict, ModelNotReady, NotFound, TidegateError
from storage import tables
from storage.backlog import HINT_CHUNKS
from storage.files import FileRow, file_key
from storage.lifecycle import ChunkKind, JobKind, JobState, Priority
from storage.work import ChunkPlan, Claim, Done, Fate, NewBatch, NewJob
from tasks.bootstrap import build_services
from tasks.pump import Pump
from tests.conftest import Ledger
from workers import sweeper


def submit(ledger: Ledger, count: int = 1, **fields: object) -> list[UUID]:
    jobs = [
        NewJob(
            **{  # type: ignore[arg-type]
                "id": uuids.uuid7(),
                "tenant_id": ledger.tenant,
                "group": ledger.group,
                "model": "digits",
                "version": "",
                "deadline": 60.0,
                "input": b"input",
            }
            | fields
        )
        for _ in range(count)
    ]
    ledger.jobs.submit(jobs)
    return [job.id for job in jobs]


def upload(ledger: Ledger) -> FileRow:
    file_id = uuids.uuid7()
    key = file_key(ledger.tenant, file_id)
    return ledger.files.add(FileRow(file_id, ledger.tenant, "batch", "in.jsonl", 10, key))


def submit_batch(ledger: Ledger, output_ttl: int | None = None) -> UUID:
    job = NewJob(
        id=uuids.uuid7(),
        tenant_id=ledger.tenant,
        group=ledger.group,
        model="digits",
        version="",
        deadline=60.0,
    )
    ledger.jobs.submit_batch(
        job, NewBatch("/v2/models/digits/infer", "24h", upload(ledger).id, output_ttl)
    )
    return job.id


def released(ledger: Ledger) -> list[int]:
    return [chunk for hint in ledger.backlog.release(ledger.group) for chunk in hint.ids]


def claimed(ledger: Ledger, worker: str = "w") -> list[Claim]:
    return ledger.chunks.claim(released(ledger), worker)


def planned(ledger: Ledger, *items: int) -> tuple[UUID, list[Claim]]:
    """A batch of chunks of so many items, all claimed."""
    job_id = submit_batch(ledger)
    (plan,) = claimed(ledger)
    line = 1
    plans = []
    for count in items:
        plans.append(ChunkPlan(count, line, line * 10, (line + count) * 10))
        line += count
    assert ledger.chunks.commit_plan(plan, plans)
    return job_id, claimed(ledger)


def state(ledger: Ledger, job_id: UUID) -> str:
    return str(ledger.jobs.get(ledger.tenant, job_id).state)


def lapse(ledger: Ledger) -> None:
    """Let every lease of this ledger's group run out."""
    ledger.sql(
        "UPDATE chunks SET lease_until = now() - interval '1 s'"
        " WHERE group_name = :group AND state = 'running'",
        group=ledger.group,
    )


def test_a_job_of_one_item_ends_with_its_commit(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    (claim,) = claimed(ledger)
    assert state(ledger, job_id) == "running"
    assert ledger.chunks.commit([Done(claim, 1, 0, output=b"answer")]) == {claim.id}
    assert state(ledger, job_id) == "succeeded"
    assert ledger.jobs.result(ledger.tenant, job_id) == (b"answer", None)


def test_a_chunk_is_claimed_by_one_of_many_who_try_at_once(ledger: Ledger) -> None:
    submit(ledger, 50)
    ids = released(ledger)
    won: list[list[Claim]] = []

    def claim(worker: str) -> None:
        won.append(ledger.chunks.claim(ids, worker))

    threads = [threading.Thread(target=claim, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [one.id for claims in won for one in claims]
    assert sorted(taken) == sorted(ids)


def test_a_hint_delivered_twice_claims_once(ledger: Ledger) -> None:
    submit(ledger)
    ids = released(ledger)
    assert len(ledger.chunks.claim(ids, "first")) == 1
    assert ledger.chunks.claim(ids, "second") == []


def test_an_expired_lease_is_taken_over_and_the_first_owner_cannot_commit(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    (first,) = claimed(ledger, "first")
    lapse(ledger)
    (second,) = ledger.chunks.claim([first.id], "second")
    assert second.token == first.token + 1
    assert ledger.chunks.commit([Done(first, 1, 0, output=b"stale")]) == set()
    assert ledger.chunks.commit([Done(second, 1, 0, output=b"fresh")]) == {first.id}
    assert ledger.chunks.commit([Done(first, 1, 0, output=b"stale")]) == set()
    assert ledger.jobs.result(ledger.tenant, job_id)[0] == b"fresh"


def test_a_commit_counts_once_however_often_it_is_sent(ledger: Ledger) -> None:
    job_id, (one, _two) = planned(ledger, 10, 5)
    assert ledger.chunks.commit([Done(one, 10, 0)]) == {one.id}
    assert ledger.chunks.commit([Done(one, 10, 0)]) == set()
    assert ledger.jobs.get(ledger.tenant, job_id).items_ok == 10


def test_renewing_keeps_a_lease_and_names_what_was_lost(ledger: Ledger) -> None:
    submit(ledger, 2)
    kept, lost = claimed(ledger)
    ledger.jobs.cancel(ledger.tenant, lost.job_id)
    ledger.chunks.renew([kept, lost])
    assert ledger.chunks.lost([kept, lost]) == [lost]
    assert ledger.backlog.sweep().leases == 0


def test_a_worker_that_took_a_chunk_over_from_itself_has_lost_it_once(ledger: Ledger) -> None:
    submit(ledger)
    (first,) = claimed(ledger)
    lapse(ledger)
    (second,) = ledger.chunks.claim([first.id], "w")
    for claims in ([first, second], [second, first]):
        ledger.chunks.renew(claims)
        assert ledger.chunks.lost(claims) == [first]
        assert ledger.backlog.sweep().leases == 0


def test_a_swept_lease_runs_again_until_its_attempts_are_used_up(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    for attempt in (1, 2, 3):
        (claim,) = claimed(ledger)
        assert claim.attempts == attempt
        lapse(ledger)
        swept = ledger.backlog.sweep()
        assert (swept.leases, swept.dead) == ((0, 1) if attempt == 3 else (1, 0))
    assert claimed(ledger) == []
    row = ledger.jobs.get(ledger.tenant, job_id)
    assert row.state == "failed"
    assert row.error["code"] == "model_failed"


def test_a_retry_waits_for_its_delay_and_counts_unless_the_server_was_away(ledger: Ledger) -> None:
    submit(ledger)
    (claim,) = claimed(ledger)
    error = ModelNotReady("away")
    assert ledger.chunks.retry([claim], error, 3600) == {claim.id: Fate.RETRIED}
    assert claimed(ledger) == []
    ledger.sql("UPDATE chunks SET not_before = now() WHERE id = :id", id=claim.id)
    (again,) = claimed(ledger)
    assert (again.attempts, again.token) == (1, claim.token + 1)
    assert ledger.chunks.retry([claim], error, 0) == {claim.id: Fate.STALE}


def test_the_last_attempt_that_fails_buries_the_chunk(ledger: Ledger) -> None:
    job_id, claims = planned(ledger, 4)
    for _ in range(2):
        ledger.chunks.retry(claims, TidegateError("boom"), 0)
        claims = claimed(ledger)
    assert ledger.chunks.retry(claims, TidegateError("boom"), 0) == {claims[0].id: Fate.DEAD}
    row = ledger.jobs.get(ledger.tenant, job_id)
    assert (row.state, row.items_failed) == ("finalizing", 4)


def test_the_last_chunk_starts_the_finalizer_and_the_finalizer_ends_the_batch(
    ledger: Ledger,
) -> None:
    job_id, (one, two) = planned(ledger, 3, 2)
    ledger.chunks.commit([Done(two, 2, 0, output_key="b")])
    assert state(ledger, job_id) == "running"
    ledger.chunks.commit([Done(one, 2, 1, output_key="a", error_key="e")])
    assert state(ledger, job_id) == "finalizing"
    (final,) = claimed(ledger)
    assert final.kind is ChunkKind.FINALIZE
    assert [part.output_key for part in ledger.chunks.chunk_outputs(final)] == ["a", "b"]
    file = FileRow(uuids.uuid7(), ledger.tenant, "batch_output", "o", 3, "k")
    assert ledger.chunks.commit_files(final, file, None, ok=4, failed=1)
    assert not ledger.chunks.commit_files(final, file, None, ok=4, failed=1)
    row = ledger.jobs.get(ledger.tenant, job_id)
    assert (row.state, row.output_file_id, row.items_ok) == ("succeeded", file.id, 4)


def test_a_job_cancelled_while_queued_never_runs(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    ids = released(ledger)
    assert ledger.jobs.cancel(ledger.tenant, job_id) is JobState.CANCELED
    assert ledger.chunks.claim(ids, "w") == []
    assert ledger.jobs.cancel(ledger.tenant, job_id) is JobState.CANCELED


def test_a_job_cancelled_while_running_keeps_no_result(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    (claim,) = claimed(ledger)
    ledger.jobs.cancel(ledger.tenant, job_id)
    assert ledger.chunks.commit([Done(claim, 1, 0, output=b"late")]) == set()
    assert ledger.jobs.result(ledger.tenant, job_id) == (None, None)


def test_a_job_that_ended_cannot_be_cancelled(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    ledger.chunks.commit([Done(claim, 1, 0, output=b"x") for claim in claimed(ledger)])
    with pytest.raises(Conflict):
        ledger.jobs.cancel(ledger.tenant, job_id)


def test_a_batch_cancelled_half_way_keeps_the_half_that_ran(ledger: Ledger) -> None:
    job_id, (one, two) = planned(ledger, 3, 2)
    ledger.chunks.commit([Done(one, 3, 0, output_key="a")])
    assert ledger.jobs.cancel(ledger.tenant, job_id) is JobState.CANCELLING
    assert ledger.chunks.commit([Done(two, 2, 0, output_key="b")]) == set()
    (final,) = claimed(ledger)
    parts = ledger.chunks.chunk_outputs(final)
    assert [(part.state, part.output_key) for part in parts] == [("done", "a"), ("canceled", None)]
    ledger.chunks.commit_files(final, None, None, ok=3, failed=2)
    assert state(ledger, job_id) == "canceled"


def test_a_passed_deadline_expires_what_has_not_ended(ledger: Ledger) -> None:
    batch, _ = planned(ledger, 3)
    (single,) = submit(ledger)
    ledger.sql(
        "UPDATE jobs SET deadline_at = now() - interval '1 s' WHERE tenant_id = :tenant",
        tenant=ledger.tenant,
    )
    assert claimed(ledger) == []
    ledger.backlog.sweep()
    assert state(ledger, single) == "expired"
    assert state(ledger, batch) == "finalizing"
    (final,) = claimed(ledger)
    ledger.chunks.commit_files(final, None, None, ok=0, failed=3)
    assert state(ledger, batch) == "expired"


def test_a_hint_nobody_heard_is_released_again(ledger: Ledger) -> None:
    submit(ledger)
    ids = released(ledger)
    assert released(ledger) == []
    ledger.sql(
        "UPDATE chunks SET released_at = now() - interval '1 min' WHERE group_name = :group",
        group=ledger.group,
    )
    assert ledger.backlog.sweep().hints == 1
    assert released(ledger) == ids


def test_the_broker_never_holds_more_than_the_groups_credit(ledger: Ledger) -> None:
    submit(ledger, 30)
    ledger_of_ten = type(ledger.backlog)(ledger.database, credit=10)
    first = [chunk for hint in ledger_of_ten.release(ledger.group) for chunk in hint.ids]
    assert len(first) == 10
    assert ledger_of_ten.release(ledger.group) == []
    ledger.chunks.claim(first[:4], "w")
    again = [chunk for hint in ledger_of_ten.release(ledger.group) for chunk in hint.ids]
    assert len(again) == 4


def about(ledger: Ledger) -> int:
    """Chunks that are in the broker or run."""
    with ledger.database.transaction() as connection:
        found = connection.execute(
            sa.text(
                "SELECT count(*) FROM chunks WHERE group_name = :group"
                " AND state IN ('released', 'running')"
            ),
            {"group": ledger.group},
        )
        return int(found.scalar_one())


def test_so_much_may_be_about_and_what_runs_counts_with_what_is_in_the_broker(
    ledger: Ledger,
) -> None:
    submit(ledger, 5 * HINT_CHUNKS)
    (hint,) = ledger.backlog.release(ledger.group, 1)
    assert len(hint.ids) == HINT_CHUNKS
    assert ledger.backlog.release(ledger.group, 1) == []
    claims = ledger.chunks.claim(hint.ids, "w")
    assert ledger.backlog.release(ledger.group, 1) == []
    assert len(ledger.backlog.release(ledger.group, 2)) == 1
    assert about(ledger) == 2 * HINT_CHUNKS
    ledger.chunks.commit([Done(claim, 1, 0, output=b"x") for claim in claims])
    # Less than is about already takes nothing back, and what ended makes room.
    assert ledger.backlog.release(ledger.group, 1) == []
    assert len(ledger.backlog.release(ledger.group, 2)) == 1
    # And in full.
    assert len(released(ledger)) == 2 * HINT_CHUNKS


def test_a_chunk_of_a_batch_is_all_that_is_about_where_no_more_may_be(ledger: Ledger) -> None:
    _job_id, (one, two) = planned(ledger, 3000, 3000)
    error = ModelNotReady("away")
    ledger.chunks.retry([one, two], error, 0)
    (first,) = ledger.backlog.release(ledger.group, 1)
    assert ledger.backlog.release(ledger.group, 1) == []
    ledger.chunks.commit([Done(claim, 3000, 0) for claim in ledger.chunks.claim(first.ids, "w")])
    (second,) = ledger.backlog.release(ledger.group, 1)
    assert first.ids + second.ids == (one.id, two.id)


def test_what_a_dead_worker_ran_holds_up_the_rest_for_a_lease(ledger: Ledger) -> None:
    submit(ledger, 2 * HINT_CHUNKS)
    (hint,) = ledger.backlog.release(ledger.group, 1)
    ledger.chunks.claim(hint.ids, "dies")
    assert ledger.backlog.release(ledger.group, 1) == []
    lapse(ledger)
    ledger.backlog.sweep()
    (again,) = ledger.backlog.release(ledger.group, 1)
    assert again.ids


def test_of_what_may_be_about_the_urgent_goes_first(ledger: Ledger) -> None:
    submit(ledger, HINT_CHUNKS, priority=Priority.LOW)
    fast = submit(ledger, HINT_CHUNKS, priority=Priority.CRITICAL)
    (hint,) = ledger.backlog.release(ledger.group, 1)
    assert [claim.job_id for claim in ledger.chunks.claim(hint.ids, "w")] == fast


def test_urgent_work_goes_first_and_one_items_share_a_hint(ledger: Ledger) -> None:
    slow = submit(ledger, 3, priority=Priority.LOW)
    fast = submit(ledger, 3, priority=Priority.CRITICAL)
    (hint,) = ledger.backlog.release(ledger.group)
    order = [claim.job_id for chunk in hint.ids for claim in ledger.chunks.claim([chunk], "w")]
    assert order == fast + slow


def test_a_tenant_with_little_work_does_not_wait_for_one_with_much(ledger: Ledger) -> None:
    submit(ledger, 2000)
    other = ledger.keys.tenant_of(ledger.keys.create(f"small-{ledger.group}"))
    small = submit(ledger, 5, tenant_id=other)
    backlog = type(ledger.backlog)(ledger.database, credit=600)
    ids = [chunk for hint in backlog.release(ledger.group) for chunk in hint.ids]
    claims = ledger.chunks.claim(ids, "w")
    assert {claim.job_id for claim in claims if claim.tenant_id == other} == set(small)


def test_another_tenants_job_is_not_found(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    stranger = uuids.uuid7()
    with pytest.raises(NotFound):
        ledger.jobs.get(stranger, job_id)
    with pytest.raises(NotFound):
        ledger.jobs.cancel(stranger, job_id)
    with pytest.raises(NotFound):
        ledger.jobs.result(stranger, job_id)
    assert ledger.jobs.list(stranger, after=None, limit=5, kinds=list(JobKind)) == []


def test_pages_of_jobs_join_without_gap_or_overlap(ledger: Ledger) -> None:
    ids = submit(ledger, 7)
    seen: list[UUID] = []
    after = None
    while page := ledger.jobs.list(ledger.tenant, after=after, limit=3, kinds=[JobKind.INFER]):
        seen += [row.id for row in page]
        after = seen[-1]
    assert seen == sorted(ids, reverse=True)


def test_work_and_commits_from_many_threads_finish_every_job_once(ledger: Ledger) -> None:
    """Two workers, the pump, the sweeper and a canceller at once: no deadlock, nothing left."""
    ids = submit(ledger, 200)
    cancelled: set[UUID] = set()
    stop = threading.Event()
    failures: list[BaseException] = []

    def worker(name: str) -> None:
        while not stop.is_set():
            claims = ledger.chunks.claim(released(ledger), name)
            ledger.chunks.renew(claims)
            ledger.chunks.commit([Done(claim, 1, 0, output=b"x") for claim in claims])

    def sweeper() -> None:
        while not stop.is_set():
            ledger.backlog.sweep()

    def guard(run, *args: object) -> None:  # type: ignore[no-untyped-def]
        try:
            run(*args)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=guard, args=(worker, "a")),
        threading.Thread(target=guard, args=(worker, "b")),
        threading.Thread(target=guard, args=(sweeper,)),
    ]
    for thread in threads:
        thread.start()
    for job_id in ids[::7]:
        try:
            ledger.jobs.cancel(ledger.tenant, job_id)
            cancelled.add(job_id)
        except Conflict:
            pass
    while not failures and not all(
        pulse.state.terminal for pulse in ledger.jobs.pulses(ids).values()
    ):
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    states = {job_id: state(ledger, job_id) for job_id in ids}
    assert {job_id for job_id, found in states.items() if found == "canceled"} == cancelled
    assert set(states.values()) <= {"canceled", "succeeded"}


def test_the_migrations_make_the_tables_the_code_expects(settings: Settings) -> None:
    engine = sa.create_engine(settings.database_url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection,
            opts={"include_object": lambda _, name, *__: not name.startswith("realtime_records_")},
        )
        assert compare_metadata(context, tables.metadata) == []


def test_the_output_files_of_a_batch_expire_when_it_says_so(ledger: Ledger) -> None:
    job_id = submit_batch(ledger, output_ttl=3600)
    (plan,) = claimed(ledger)
    ledger.chunks.commit_plan(plan, [ChunkPlan(1, 1, 0, 10)])
    ledger.chunks.commit([Done(claim, 1, 0, output_key="a") for claim in claimed(ledger)])
    (final,) = claimed(ledger)
    file = FileRow(uuids.uuid7(), ledger.tenant, "batch_output", "o", 3, "k")
    ledger.chunks.commit_files(final, file, None, ok=1, failed=0)
    found = ledger.files.get(ledger.tenant, file.id)
    assert found.created_at
    assert found.expires_at
    assert (found.expires_at - found.created_at).total_seconds() == pytest.approx(3600, abs=1)
    assert state(ledger, job_id) == "succeeded"


def test_one_sweep_ends_every_job_that_is_due_however_many(ledger: Ledger) -> None:
    jobs = submit(ledger, 25)
    ledger.sql(
        "UPDATE jobs SET deadline_at = now() - interval '1 s' WHERE group_name = :group",
        group=ledger.group,
    )
    ledger.backlog.sweep(limit=10)
    assert {state(ledger, job) for job in jobs} == {"expired"}


def test_workers_that_die_while_they_put_answers_together_cost_a_batch_nothing(
    ledger: Ledger,
) -> None:
    job_id, (chunk,) = planned(ledger, 2)
    ledger.chunks.commit([Done(chunk, 2, 0)])
    for _ in range(5):
        (final,) = claimed(ledger)
        lapse(ledger)
        assert ledger.backlog.sweep().dead == 0
    (final,) = claimed(ledger)
    assert ledger.chunks.commit_files(final, None, None, ok=2, failed=0)
    assert state(ledger, job_id) == "succeeded"


def test_hints_in_vain_become_rarer_and_a_worker_that_arrives_hears_them_at_once(
    ledger: Ledger,
) -> None:
    submit(ledger)

    def silent_for(seconds: int) -> bool:
        ledger.sql(
            "UPDATE chunks SET released_at = now() - make_interval(secs => :s)"
            " WHERE group_name = :group AND state = 'released'",
            s=seconds,
            group=ledger.group,
        )
        ledger.backlog.sweep()
        return bool(released(ledger))

    assert released(ledger)
    assert [silent_for(11), silent_for(11), silent_for(21)] == [True, False, True]
    assert not silent_for(30)
    ledger.backlog.rehint(ledger.group)
    assert len(released(ledger)) == 1
    assert silent_for(11)


def test_a_job_given_up_counts_its_item(ledger: Ledger) -> None:
    (job_id,) = submit(ledger)
    ledger.chunks.retry(claimed(ledger), NotFound("no such model"), 0)
    row = ledger.jobs.get(ledger.tenant, job_id)
    assert (row.state, row.items_failed, row.chunks_done) == ("failed", 1, 1)


def test_a_group_that_cannot_be_pumped_holds_up_no_other(
    settings: Settings, ledger: Ledger
) -> None:
    services = build_services(settings, pool_size=2)
    published: list[str] = []
    services = replace(
        services, pump=Pump(services.backlog, lambda hint: published.append(hint.group))
    )
    submit(ledger, group="a-" + ledger.group)
    submit(ledger, group="b-" + ledger.group)
    with ledger.database.transaction() as connection:
        connection.execute(
            sa.text("SELECT pg_advisory_xact_lock(hashtext(:name))"),
            {"name": f"pump:a-{ledger.group}"},
        )
        sweeper.sweep(services)
    services.close()
    assert f"b-{ledger.group}" in published
    assert f"a-{ledger.group}" not in published
