"""What is over goes, and nothing else does. Time is moved by moving the rows' times."""

from __future__ import annotations

import os
import random
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
import uuid_utils.compat as uuids

from config import DAY, Settings, parse_objects
from errors import Gone, ModelFailed, NotFound, TidegateError, Unavailable
from storage import ids
from storage.database import Database
from storage.dead_letters import LetterFilter
from storage.files import FileRow, file_key
from storage.jobs import Jobs
from storage.records import Record
from storage.retention import Retention
from storage.work import ChunkPlan, Claim, Done, NewBatch, NewJob
from tasks import retention
from tasks.bootstrap import Services, build_services

AGE = timedelta(hours=1)


@dataclass(frozen=True)
class Home:
    """A deployment with a tenant, whose clock can be moved."""

    services: Services
    folder: Path
    tenant: UUID

    def sql(self, text: str, **values: object) -> Any:
        with self.services.database.transaction() as connection:
            found = connection.execute(sa.text(text), values)
            return found.all() if found.returns_rows else None

    def older(self, table: str, column: str, seconds: float, **which: object) -> None:
        """As if this had happened so much earlier."""
        where = " AND ".join(f"{name} = :{name}" for name in which) or "true"
        self.sql(
            f"UPDATE {table} SET {column} = {column} - make_interval(secs => :by) WHERE {where}",
            by=seconds,
            **which,
        )

    def age(self, key: str, by: timedelta = 2 * AGE) -> None:
        """As if this object had been stored so much earlier."""
        moment = (datetime.now(UTC) - by).timestamp()
        os.utime(self.folder / key, (moment, moment))

    def stored(self) -> list[str]:
        found = self.services.objects.list()
        return [one.key for one in found if not one.key.startswith("collector/")]

    def job(self, **fields: Any) -> NewJob:
        job = NewJob(
            **{  # type: ignore[arg-type]
                "id": uuids.uuid7(),
                "tenant_id": self.tenant,
                "group": self.services.settings.group,
                "model": "identity",
                "version": "",
                "deadline": 600.0,
            }
            | fields
        )
        (outcome,) = self.services.jobs.submit([job])
        if isinstance(outcome, TidegateError):
            raise outcome
        return job

    def claim(self) -> list[Claim]:
        backlog = self.services.backlog.release(self.services.settings.group)
        return self.services.chunks.claim([n for hint in backlog for n in hint.ids], "w")

    def ended(self, *, large: bool = False) -> UUID:
        """A job that has ended, with its input and its result."""
        job_id = uuids.uuid7()
        key = f"jobs/{self.tenant.hex}/{job_id.hex}/input" if large else None
        if key:
            self.services.objects.put(key, b"input")
        self.job(id=job_id, input_key=key, input=None if key else b"input")
        (claim,) = self.claim()
        if large:
            self.services.objects.put(claim.key("result"), b"result")
            done = Done(claim, 1, 0, output_key=claim.key("result"))
        else:
            done = Done(claim, 1, 0, output=b"result")
        assert self.services.chunks.commit([done])
        return job_id

    def file(self, ttl: float | None = None) -> FileRow:
        file_id = uuids.uuid7()
        key = file_key(self.tenant, file_id)
        self.services.objects.put(key, b"{}\n")
        row = FileRow(file_id, self.tenant, "batch", "in.jsonl", 3, key)
        return self.services.files.add(row, ttl=ttl)

    def batch(self, file: FileRow, output_ttl: int | None = None) -> UUID:
        job = NewJob(
            id=uuids.uuid7(),
            tenant_id=self.tenant,
            group=self.services.settings.group,
            model="identity",
            version="",
            deadline=600.0,
        )
        batch = NewBatch("/v2/models/identity/infer", "24h", file.id, output_ttl)
        self.services.jobs.submit_batch(job, batch)
        return job.id

    def run_batch(self, job_id: UUID, *, finish: bool = True) -> FileRow | None:
        """Run a batch of one chunk, by hand; its output file."""
        (plan,) = self.claim()
        assert self.services.chunks.commit_plan(plan, [ChunkPlan(1, 1, 0, 3)])
        (claim,) = self.claim()
        key = claim.key("output.jsonl")
        self.services.objects.put(key, b"{}\n")
        self.services.chunks.commit([Done(claim, 1, 0, output_key=key)])
        (final,) = self.claim()
        key = final.key("output.jsonl")
        self.services.objects.put(key, b"{}\n")
        row = FileRow(uuids.uuid7(), self.tenant, "batch_output", "out", 3, key)
        if not finish:
            return None
        assert self.services.chunks.commit_files(final, row, None, ok=1, failed=0)
        assert self.services.jobs.get(self.tenant, job_id).state == "succeeded"
        return self.services.files.get(self.tenant, row.id)

    def purged(self, table: str, row_id: UUID) -> bool:
        ((found,),) = self.sql(
            f"SELECT purged_at IS NOT NULL FROM {table} WHERE id = :id", id=row_id
        )
        return bool(found)

    def there(self, table: str, row_id: UUID) -> bool:
        return bool(self.sql(f"SELECT FROM {table} WHERE id = :id", id=row_id))


@pytest.fixture
def home(settings: Settings, tmp_path: Path) -> Iterator[Home]:
    own = replace(
        settings,
        group=f"g{secrets.token_hex(4)}",
        objects_url=(tmp_path / "objects").as_uri(),
        garbage_age=AGE.total_seconds(),
    )
    services = build_services(own, pool_size=4)
    services.pump.stop()
    folder = parse_objects(own.objects_url)
    assert isinstance(folder, Path)
    tenant = services.keys.tenant_of(services.keys.create(secrets.token_hex(4)))
    made = Home(services, folder, tenant)
    # A store of this test's own, and so a walk from its beginning.
    made.sql("DELETE FROM walks")
    yield made
    services.close()


# Results


@pytest.mark.parametrize("large", [False, True])
def test_a_result_is_kept_for_its_time_and_then_goes_with_the_input(
    home: Home, large: bool
) -> None:
    job = home.ended(large=large)
    retention.run(home.services)
    assert home.services.jobs.result(home.tenant, job) != (None, None)
    home.older("jobs", "finished_at", 7 * DAY + 1, id=job)
    retention.run(home.services)
    assert home.services.jobs.result(home.tenant, job) == (None, None)
    assert home.stored() == []
    row = home.services.jobs.get(home.tenant, job)
    assert (row.state, row.input_key, row.purged_at is None) == ("succeeded", None, False)


def test_a_job_that_has_not_ended_is_never_purged(home: Home) -> None:
    job = home.job(input=b"x").id
    home.older("jobs", "created_at", 1000 * DAY, id=job)
    retention.run(home.services)
    (claim,) = home.claim()
    assert claim.input == b"x"


def test_what_cannot_be_deleted_now_is_no_promise_any_more_and_goes_later(home: Home) -> None:
    """A crash between the ledger and the store leaves the same."""
    job = home.ended(large=True)
    home.older("jobs", "finished_at", 7 * DAY + 1, id=job)
    done, keys = home.services.retention.purge_jobs(10)
    assert (done, sorted(keys)) == (1, home.stored())
    assert home.services.jobs.result(home.tenant, job) == (None, None)
    retention.run(home.services)
    assert home.stored() == sorted(keys)
    for key in keys:
        home.age(key)
    retention.run(home.services)
    assert home.stored() == []


def dead(home: Home) -> tuple[UUID, int]:
    """A job that was given up, with its input in the store, and its letter."""
    job = uuids.uuid7()
    key = f"jobs/{home.tenant.hex}/{job.hex}/input"
    home.services.objects.put(key, b"input")
    home.job(id=job, input_key=key)
    for _ in range(home.services.settings.max_attempts):
        home.services.chunks.retry(home.claim(), ModelFailed("it can't"), 0)
    ((letter,),) = home.sql("SELECT id FROM chunks WHERE job_id = :job", job=job)
    return job, letter


def test_the_input_of_a_job_that_was_redriven_stays_for_the_new_one(home: Home) -> None:
    job, letter = dead(home)
    again = home.services.dead_letters.redrive(home.tenant, letter)
    home.older("jobs", "finished_at", 31 * DAY, id=job)
    retention.run(home.services)
    assert not home.there("jobs", job)
    (key,) = home.stored()
    home.age(key)
    retention.run(home.services)
    (claim,) = home.claim()
    assert (claim.job_id, claim.input_key) == (again, key)
    assert home.services.objects.get(key) == b"input"
    home.services.chunks.commit([Done(claim, 1, 0, output=b"x")])
    home.older("jobs", "finished_at", 31 * DAY, id=again)
    retention.run(home.services)
    assert home.stored() == []


def test_a_letter_whose_input_is_gone_is_not_redriven(home: Home) -> None:
    job, letter = dead(home)
    home.older("jobs", "finished_at", 7 * DAY + 1, id=job)
    retention.run(home.services)
    with pytest.raises(Gone):
        home.services.dead_letters.redrive(home.tenant, letter)
    made = home.services.dead_letters.redrive_all(home.tenant, LetterFilter(), limit=10)
    assert (made.jobs, made.gone) == ((), (letter,))


def test_a_letter_that_is_redriven_while_its_input_goes_has_it_or_is_refused(home: Home) -> None:
    for _ in range(20):
        job, letter = dead(home)
        home.older("jobs", "finished_at", 31 * DAY, id=job)
        gate = threading.Barrier(2)
        made: list[UUID] = []

        def redrive(letter: int = letter, gate: Any = gate, made: list[UUID] = made) -> None:
            gate.wait()
            try:
                made.append(home.services.dead_letters.redrive(home.tenant, letter))
            except (Gone, NotFound):
                pass

        thread = threading.Thread(target=redrive)
        thread.start()
        gate.wait()
        retention.run(home.services)
        thread.join()
        for again in made:
            (claim,) = home.claim()
            assert claim.job_id == again
            assert claim.input_key
            assert home.services.objects.get(claim.input_key) == b"input"
            home.services.chunks.commit([Done(claim, 1, 0, output=b"x")])


def test_many_replicas_share_the_work(home: Home) -> None:
    while home.services.retention.purge_jobs(100)[0]:
        pass  # What other tests left.
    jobs = [home.ended() for _ in range(60)]
    home.older("jobs", "finished_at", 7 * DAY + 1, tenant_id=home.tenant)
    counts: list[int] = []

    def purge() -> None:
        while done := home.services.retention.purge_jobs(7)[0]:
            counts.append(done)

    threads = [threading.Thread(target=purge) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == len(jobs)


def test_the_record_of_a_job_goes_after_its_own_time_with_all_that_hangs_on_it(
    home: Home,
) -> None:
    single, batch = home.ended(), home.batch(home.file())
    home.run_batch(batch)
    young = home.ended()
    for job in (single, batch):
        home.older("jobs", "finished_at", 30 * DAY + 1, id=job)
    retention.run(home.services)
    assert [home.there("jobs", job) for job in (single, batch, young)] == [False, False, True]
    left = home.sql("SELECT DISTINCT job_id FROM chunks WHERE tenant_id = :t", t=home.tenant)
    assert [row.job_id for row in left] == [young]
    assert home.sql("SELECT FROM batches WHERE job_id = :job", job=batch) == []


def test_a_large_batch_does_not_make_one_endless_statement(home: Home) -> None:
    jobs = [home.ended() for _ in range(4)]
    home.older("jobs", "finished_at", 30 * DAY + 1, tenant_id=home.tenant)
    home.sql("UPDATE jobs SET chunks_total = 4000 WHERE tenant_id = :t", t=home.tenant)
    while home.services.retention.purge_jobs(100)[0]:
        pass
    assert home.services.retention.drop_jobs(100) == 2
    assert home.services.retention.drop_jobs(100) == 2
    assert not any(home.there("jobs", job) for job in jobs)


# Files


def test_a_file_says_when_it_will_expire(home: Home) -> None:
    for row, seconds in ((home.file(), 30 * DAY), (home.file(ttl=3600), 3600)):
        assert row.created_at
        assert row.expires_at
        assert (row.expires_at - row.created_at).total_seconds() == seconds


@pytest.mark.parametrize(("asked", "kept"), [(None, 30 * DAY), (3600, 3600)])
def test_the_files_of_a_batch_expire_as_it_says_or_as_any_file(
    home: Home, asked: int | None, kept: float
) -> None:
    output = home.run_batch(home.batch(home.file(), output_ttl=asked))
    assert output
    assert output.created_at
    assert output.expires_at
    assert (output.expires_at - output.created_at).total_seconds() == kept


def test_an_expired_file_is_gone_and_a_deleted_one_was_never_there(home: Home) -> None:
    expired, deleted, kept = home.file(), home.file(), home.file()
    home.older("files", "expires_at", 31 * DAY, id=expired.id)
    assert home.services.files.delete(home.tenant, deleted.id)

    def told() -> None:
        with pytest.raises(Gone):
            home.services.files.get(home.tenant, expired.id)
        for tenant, file in ((home.tenant, deleted), (uuids.uuid7(), expired)):
            with pytest.raises(NotFound):
                home.services.files.get(tenant, file.id)

    told()
    retention.run(home.services)
    told()
    assert home.purged("files", expired.id)
    home.services.files.get(home.tenant, kept.id)
    listed = home.services.files.list(home.tenant, after=None, limit=10, purpose=None)
    assert [row.id for row in listed] == [kept.id]
    # The deleted one's bytes are for whoever deleted it to take, and for the collector.
    assert home.stored() == sorted([deleted.key, kept.key])


def test_a_batch_keeps_its_file_until_it_has_ended(home: Home) -> None:
    for over in ("expired", "deleted"):
        file = home.file()
        job = home.batch(file)
        if over == "expired":
            home.older("files", "expires_at", 31 * DAY, id=file.id)
        else:
            assert not home.services.files.delete(home.tenant, file.id)
        retention.run(home.services)
        assert not home.purged("files", file.id)
        home.age(file.key)
        retention.run(home.services)
        assert file.key in home.stored()
        home.run_batch(job)
        retention.run(home.services)
        assert home.purged("files", file.id)
        assert file.key not in home.stored()


def test_a_batch_on_a_file_that_is_over_is_refused_by_name(home: Home) -> None:
    expired, deleted = home.file(), home.file()
    home.older("files", "expires_at", 31 * DAY, id=expired.id)
    home.services.files.delete(home.tenant, deleted.id)
    for file, error in ((expired, Gone), (deleted, NotFound)):
        with pytest.raises(error) as refused:
            home.batch(file)
        assert refused.value.param == "input_file_id"
    assert home.claim() == []


def test_a_batch_that_comes_while_its_file_goes_has_it_or_is_refused(home: Home) -> None:
    """Many times, both at once: never a batch over a file whose bytes were taken."""
    taken = 0
    for _ in range(20):
        file = home.file()
        # Alive for the batch as long as its clock stands before the end; dead for retention.
        home.sql(
            "UPDATE files SET expires_at = clock_timestamp() + interval '3 ms' WHERE id = :id",
            id=file.id,
        )
        gate = threading.Barrier(2)
        submitted: list[bool] = []

        def submit(
            file: FileRow = file, gate: Any = gate, submitted: list[bool] = submitted
        ) -> None:
            gate.wait()
            try:
                home.batch(file)
                submitted.append(True)
            except Gone:
                submitted.append(False)

        thread = threading.Thread(target=submit)
        thread.start()
        gate.wait()
        for _ in range(4):
            home.services.retention.purge_files(10)
        thread.join()
        if submitted == [True]:
            assert not home.purged("files", file.id)
            taken += 1
    assert 0 <= taken <= 20


def test_a_file_that_a_batch_is_being_submitted_on_is_left_alone(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    while home.services.retention.purge_files(100)[0]:
        pass  # What other tests left.
    file = home.file()
    inside, go = threading.Event(), threading.Event()
    insert = Jobs._insert

    def pausing(*args: Any) -> None:
        insert(*args)
        inside.set()
        assert go.wait(10)

    monkeypatch.setattr(Jobs, "_insert", pausing)
    thread = threading.Thread(target=home.batch, args=(file,))
    thread.start()
    assert inside.wait(10)
    home.older("files", "expires_at", 31 * DAY, id=file.id)
    assert home.services.retention.purge_files(10) == (0, [])
    go.set()
    thread.join()
    assert home.services.retention.purge_files(10) == (0, [])
    assert home.services.objects.get(file.key) == b"{}\n"


def test_the_row_of_a_file_goes_once_nothing_names_it(home: Home) -> None:
    alone, named = home.file(), home.file()
    job = home.batch(named)
    output = home.run_batch(job)
    assert output
    home.older("files", "expires_at", 31 * DAY, tenant_id=home.tenant)
    retention.run(home.services)
    home.older("files", "purged_at", 31 * DAY, tenant_id=home.tenant)
    retention.run(home.services)
    there = [home.there("files", file.id) for file in (alone, named, output)]
    assert there == [False, True, True]
    with pytest.raises(NotFound):
        home.services.files.get(home.tenant, alone.id)
    home.older("jobs", "finished_at", 31 * DAY, id=job)
    retention.run(home.services)
    retention.run(home.services)
    assert not any(home.there("files", file.id) for file in (alone, named, output))
    assert not home.there("jobs", job)


def test_an_output_file_outlives_the_record_of_its_batch(home: Home) -> None:
    job = home.batch(home.file())
    output = home.run_batch(job)
    assert output
    home.older("jobs", "finished_at", 31 * DAY, id=job)
    retention.run(home.services)
    assert not home.there("jobs", job)
    home.age(output.key)
    retention.run(home.services)
    assert home.services.objects.get(output.key) == b"{}\n"
    home.older("files", "expires_at", 31 * DAY, id=output.id)
    retention.run(home.services)
    assert output.key not in home.stored()


# Other rows


def test_an_idempotency_key_is_forgotten_after_its_time(home: Home) -> None:
    for key in ("old", "new"):
        home.sql(
            "INSERT INTO idempotency_keys (tenant_id, route, key, fingerprint, resource_id)"
            " VALUES (:tenant, 'r', :key, '', :id)",
            tenant=home.tenant,
            key=key,
            id=uuids.uuid7(),
        )
    home.older("idempotency_keys", "created_at", 2 * DAY + 1, key="old")
    retention.run(home.services)
    left = home.sql("SELECT key FROM idempotency_keys WHERE tenant_id = :t", t=home.tenant)
    assert left == [("new",)]


def test_realtime_records_go_by_whole_days(home: Home) -> None:
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    home.services.records.ensure_partitions()
    made: dict[int, UUID] = {}
    for days in (0, 29, 30, 31, 33, 40):
        moment = (today - timedelta(days=days)).timestamp()
        made[days] = ids.IdMint("0" * 16, clock=partial(float, moment)).mint(home.tenant)
    for days in (31, 33):
        day = today - timedelta(days=days)
        home.sql(
            f"CREATE TABLE realtime_records_{day:%Y%m%d} PARTITION OF realtime_records"
            f" FOR VALUES FROM ('{day:%Y-%m-%d}') TO ('{day + timedelta(days=1):%Y-%m-%d}')"
        )
    home.services.records.add(
        [Record(made[days], home.tenant, "m", "1", "succeeded", 1) for days in made]
    )
    retention.run(home.services)
    left = home.sql("SELECT id FROM realtime_records WHERE tenant_id = :t", t=home.tenant)
    found = {days for days in made if made[days] in {row.id for row in left}}
    # Those of 30 and of 40 days ago lay between the partitions, and went row by row.
    assert found == {0, 29}
    partitions = home.sql(
        "SELECT inhrelid::regclass::text AS name FROM pg_inherits"
        " WHERE inhparent = 'realtime_records'::regclass"
    )
    assert not {f"realtime_records_{today - timedelta(days=n):%Y%m%d}" for n in (31, 33)} & {
        row.name for row in partitions
    }
    home.services.records.ensure_partitions()


# Garbage


def test_a_batchs_parts_are_garbage_once_its_files_are_put_together(home: Home) -> None:
    file = home.file()
    output = home.run_batch(home.batch(file))
    assert output
    assert len(home.stored()) == 3
    for key in home.stored():
        home.age(key)
    retention.run(home.services)
    assert home.stored() == sorted([file.key, output.key])


def test_nothing_below_the_name_of_a_job_that_runs_is_garbage(home: Home) -> None:
    """Nor what an attempt has written and not committed, however slow it is."""
    file = home.file()
    home.run_batch(home.batch(file), finish=False)
    before = home.stored()
    assert len(before) == 3
    for key in before:
        home.age(key, timedelta(days=300))
    retention.run(home.services)
    assert home.stored() == before


@pytest.mark.parametrize("seed", range(5))
def test_exactly_what_is_old_and_unnamed_goes(home: Home, seed: int) -> None:
    chance = random.Random(seed)
    stays: set[str] = set()
    goes: set[str] = set()

    def lay(key: str) -> None:
        home.services.objects.put(key, b"1")
        if chance.random() < 0.5:
            home.age(key)
            goes.add(key)
        else:
            stays.add(key)

    def keep(key: str) -> None:
        stays.add(key)
        if chance.random() < 0.7:
            home.age(key, timedelta(days=chance.randint(1, 300)))

    stranger = uuids.uuid7()
    for _ in range(chance.randint(20, 40)):
        match chance.randrange(9):
            case 0:
                keep(home.file().key)
            case 1:
                lay(file_key(home.tenant, uuids.uuid7()))
            case 2:
                # The same file, but another tenant's.
                lay(home.file().key.replace(home.tenant.hex, stranger.hex))
                stays.update(set(home.stored()) - stays - goes)
            case 3:
                row = home.services.jobs.get(home.tenant, home.ended(large=True))
                keep(row.input_key)
                keep(row.result_key)
                lay(f"jobs/{home.tenant.hex}/{row.id.hex}/1/99/result")
                lay(f"jobs/{stranger.hex}/{row.id.hex}/input")
            case 4:
                job = uuids.uuid7()
                lay(f"jobs/{home.tenant.hex}/{job.hex}/input")
                lay(f"jobs/{home.tenant.hex}/{job.hex}/1/1/output.jsonl")
            case 5:
                # Called off: what its attempt wrote will never be committed.
                job = home.job(input=b"x").id
                lay(f"jobs/{home.tenant.hex}/{job.hex}/1/7/output.jsonl")
                home.services.jobs.cancel(home.tenant, job)
            case 6:
                job = home.job(input=b"x").id
                key = f"jobs/{home.tenant.hex}/{job.hex}/1/7/output.jsonl"
                home.services.objects.put(key, b"1")
                keep(key)
                # Out of the way of the jobs that are run to their end here.
                home.sql("UPDATE chunks SET not_before = 'infinity' WHERE job_id = :id", id=job)
            case 7:
                key = chance.choice(["stray", "files/readme.txt", "jobs/x/y/z", "backup/jobs/1"])
                home.services.objects.put(key, b"1")
                keep(key)
            case 8:
                file = home.file()
                home.services.files.delete(home.tenant, file.id)
                home.services.objects.delete(file.key)
                lay(file.key)
    assert set(home.stored()) == stays | goes
    retention.run(home.services)
    assert set(home.stored()) == stays


def test_a_walk_goes_on_where_the_last_one_stopped(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "ROWS", 3)
    monkeypatch.setattr(retention, "STRETCH", 10)
    keys = [file_key(home.tenant, uuids.uuid7()) for _ in range(35)]
    for key in keys:
        home.services.objects.put(key, b"")
        home.age(key)
    left = [len(keys)]
    while left[-1]:
        assert retention.collect(home.services) <= 10
        left.append(len(home.stored()))
        assert len(left) < 8
    assert left[1] < 35


def test_one_walks_at_a_time_and_a_walker_that_died_is_not_waited_for(home: Home) -> None:
    key = file_key(home.tenant, uuids.uuid7())
    home.services.objects.put(key, b"")
    home.age(key)
    first = home.services.retention.begin_walk()
    assert first
    assert home.services.retention.begin_walk() is None
    assert retention.collect(home.services) == 0
    home.older("walks", "lease_until", 3600)
    second = home.services.retention.begin_walk()
    assert second
    home.services.retention.end_walk(first, "stale")
    assert home.services.retention.begin_walk() is None
    home.services.retention.end_walk(second, "")
    assert retention.collect(home.services) == 1


def test_a_store_that_another_ledger_has_marked_is_left_alone(home: Home) -> None:
    """Two deployments that were given one bucket by mistake must not delete each other's work."""
    key = file_key(home.tenant, uuids.uuid7())
    home.services.objects.put(key, b"")
    home.age(key)
    home.services.objects.put(f"collector/{uuids.uuid7().hex}", b"")
    assert retention.collect(home.services) == 0
    assert home.stored() == [key]


def test_what_a_writer_that_died_left_half_written_goes(home: Home) -> None:
    part = home.folder / ".parts" / "abandoned"
    part.write_bytes(b"half")
    assert retention.collect(home.services) == 0
    home.age(".parts/abandoned")
    assert retention.collect(home.services) == 1
    assert not part.exists()


def test_bytes_that_took_too_long_to_be_named_are_not_named_any_more(home: Home) -> None:
    """They may have been collected: half of the age is for the commit."""
    begun = home.services.database.now()
    late = begun - timedelta(minutes=31)
    key = file_key(home.tenant, uuids.uuid7())
    row = FileRow(uuids.uuid7(), home.tenant, "batch", "in", 1, key)
    with pytest.raises(Unavailable):
        home.services.files.add(row, since=late)
    with pytest.raises(Unavailable):
        home.job(input_key=key, stored_since=late)
    assert home.claim() == []
    home.services.files.add(row, since=begun)
    home.job(input_key=key, stored_since=begun)


def test_a_store_that_is_away_leaves_the_ledgers_own_work_alone(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, old = home.ended(large=True), home.ended()
    home.older("jobs", "finished_at", 7 * DAY + 1, id=job)
    home.older("jobs", "finished_at", 31 * DAY, id=old)

    def away(*_: object) -> None:
        raise Unavailable("the object store is away")

    with monkeypatch.context() as patch:
        for name in ("delete", "list", "put"):
            patch.setattr(type(home.services.objects), name, away)
        retention.run(home.services)
        retention.run(home.services)
    assert home.services.jobs.result(home.tenant, job) == (None, None)
    assert not home.there("jobs", old)
    retention.run(home.services)
    assert len(home.stored()) >= 1


def test_two_ledgers_have_two_owners(database: Database) -> None:
    kept = Retention(database, 1, 1, 1)
    first = kept.begin_walk()
    assert first
    kept.end_walk(first, "x")
    again = kept.begin_walk()
    assert again
    assert (again.owner, again.after) == (first.owner, "x")
    kept.end_walk(again, "")
