"""The ledger: the only writer of job and chunk rows.

Lock order, everywhere: jobs before chunks, each by ascending id. Times are the database's.
A chunk row is its own outbox entry: until `released`, the pump finds it; released and silent, the
sweep finds it; claimed and silent, its lease runs out. So no message is ever needed.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from errors import Conflict, DeadlineExceeded, ModelFailed, NotFound, TidegateError
from storage import fairness, tables
from storage.database import Database
from storage.lifecycle import (
    ChunkKind,
    ChunkState,
    JobKind,
    JobState,
    Priority,
    chunk_sources,
    sources,
)

_jobs, _batches, _chunks = tables.jobs.c, tables.batches.c, tables.chunks.c
_now = sa.func.now()
_clock = sa.func.clock_timestamp()

CANDIDATES = 1024
"""Chunks of one tenant the pump looks at in one go."""
HINT_CHUNKS = 64
"""Most one-item chunks named by one hint: keeps the message far below 4 KiB."""


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a gateway hands over. `deadline` is seconds from now."""

    id: UUID
    tenant_id: UUID
    group: str
    model: str
    version: str
    deadline: float
    priority: Priority = Priority.NORMAL
    input: bytes | None = None
    input_key: str | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class NewBatch:
    """The batch half of a job over a file's lines."""

    endpoint: str
    completion_window: str
    input_file_id: UUID


@dataclass(frozen=True, slots=True)
class Hint:
    """Chunks to name in one broker message: of one group, model and version."""

    group: str
    model: str
    version: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one chunk until its lease ends, proved by `token`."""

    id: int
    token: int
    kind: ChunkKind
    job_id: UUID
    job_kind: JobKind
    tenant_id: UUID
    seq: int
    model: str
    version: str
    attempts: int
    items: int
    first_line: int
    byte_start: int
    byte_end: int
    duplicates: tuple[int, ...]
    remaining: float
    """Seconds to the job's deadline."""
    input: bytes | None
    input_key: str | None
    endpoint: str
    file_key: str
    outcome: str | None

    def key(self, name: str) -> str:
        """An object key only this attempt writes: a stale one can never overwrite a newer one's."""
        return f"jobs/{self.tenant_id.hex}/{self.job_id.hex}/{self.seq}/{self.token}/{name}"


@dataclass(frozen=True, slots=True)
class Done:
    """What an attempt at an infer chunk produced."""

    claim: Claim
    items_ok: int
    items_failed: int
    output: bytes | None = None
    output_key: str | None = None
    error_key: str | None = None
    error: TidegateError | None = None
    """One-item jobs: why the item failed."""


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One range of lines of the input file: `[byte_start, byte_end)`."""

    items: int
    first_line: int
    byte_start: int
    byte_end: int
    duplicates: tuple[int, ...] = ()
    """Line numbers whose custom_id an earlier line has."""


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file of a tenant; `key` is where its bytes are."""

    id: UUID
    tenant_id: UUID
    purpose: str
    filename: str
    bytes: int
    key: str
    created_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """A chunk as the finalizer sees it."""

    seq: int
    state: ChunkState
    items: int
    first_line: int
    byte_start: int
    byte_end: int
    output_key: str | None
    error_key: str | None
    items_ok: int
    items_failed: int
    error: Mapping[str, Any] | None


class Fate(enum.Enum):
    """What becomes of a chunk whose attempt failed."""

    RETRIED = "retried"
    DEAD = "dead"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep found."""

    leases: int = 0
    dead: int = 0
    hints: int = 0
    expired: int = 0


@dataclass(slots=True)
class _Tally:
    chunks: int = 0
    ok: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Ledger:
    """Jobs and their chunks. Every method is one transaction; safe to share between threads."""

    database: Database
    lease: float = 30.0
    max_attempts: int = 3
    credit: int = 4096
    hint_timeout: float = 10.0

    # ---- accept ----------------------------------------------------------------------------

    def submit(self, jobs: Sequence[NewJob]) -> None:
        """Accept one-item jobs; when this returns they are durable."""
        with self.database.transaction() as connection:
            self._insert(connection, jobs, JobKind.INFER)
            self._insert_chunks(
                connection,
                [
                    _chunk_row(job.id, job, seq=1, kind=ChunkKind.INFER, plan=ChunkPlan(1, 1, 0, 0))
                    for job in jobs
                ],
            )

    def submit_batch(self, job: NewJob, batch: NewBatch) -> None:
        """Accept a batch. Its first chunk reads the file."""
        with self.database.transaction() as connection:
            self._insert(connection, [job], JobKind.BATCH)
            connection.execute(
                sa.insert(tables.batches),
                {
                    "job_id": job.id,
                    "tenant_id": job.tenant_id,
                    "endpoint": batch.endpoint,
                    "completion_window": batch.completion_window,
                    "input_file_id": batch.input_file_id,
                },
            )
            self._insert_chunks(
                connection,
                [_chunk_row(job.id, job, seq=0, kind=ChunkKind.PLAN, plan=ChunkPlan(1, 0, 0, 0))],
            )

    def _insert(self, connection: sa.Connection, jobs: Sequence[NewJob], kind: JobKind) -> None:
        one = kind is JobKind.INFER
        connection.execute(
            sa.insert(tables.jobs).values(
                deadline_at=_now + sa.bindparam("deadline", type_=sa.Interval)
            ),
            [
                {
                    "id": job.id,
                    "tenant_id": job.tenant_id,
                    "kind": kind.value,
                    "group_name": job.group,
                    "model": job.model,
                    "version": job.version,
                    "priority": int(job.priority),
                    "state": JobState.QUEUED.value,
                    "input": job.input,
                    "input_key": job.input_key,
                    "metadata": dict(job.metadata) if job.metadata else None,
                    "chunks_total": 1 if one else 0,
                    "items_total": 1 if one else 0,
                    "deadline": timedelta(seconds=job.deadline),
                }
                for job in jobs
            ],
        )

    def _insert_chunks(self, connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> None:
        if rows:
            connection.execute(sa.insert(tables.chunks), rows)

    # ---- release ---------------------------------------------------------------------------

    def release(self, group: str) -> list[Hint]:
        """Move work from the ledger towards the broker: as much as the group's credit allows, by
        priority class, then fairly between tenants. Publish the hints after this returns; one that
        gets lost is found by `sweep`."""
        with self.database.transaction() as connection:
            # One pump per group at a time. Waiting for it, not skipping, because its snapshot may be
            # older than the row that made us call.
            connection.execute(
                sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"pump:{group}")))
            )
            budget = (
                self.credit
                - connection.execute(
                    sa.select(sa.func.coalesce(sa.func.sum(_chunks.item_count), 0)).where(
                        _chunks.group_name == group, _chunks.state == ChunkState.RELEASED
                    )
                ).scalar_one()
            )
            picked: list[int] = []
            for priority in Priority:
                if budget <= 0:
                    break
                ids, spent = self._choose(connection, group, priority, int(budget))
                budget -= spent
                picked += ids
            if not picked:
                return []
            rows = connection.execute(
                sa.update(tables.chunks)
                .where(_chunks.id.in_(picked), _chunks.state == ChunkState.QUEUED)
                .values(state=ChunkState.RELEASED.value, released_at=_clock)
                .returning(
                    _chunks.id,
                    _chunks.model,
                    _chunks.version,
                    _chunks.kind,
                    _chunks.item_count.label("items"),
                )
            ).all()
        order = {chunk: place for place, chunk in enumerate(picked)}
        return _hints(group, sorted(rows, key=lambda row: order[row.id]))

    def _choose(
        self, connection: sa.Connection, group: str, priority: Priority, budget: int
    ) -> tuple[list[int], int]:
        rows = connection.execute(
            _CANDIDATES, {"group": group, "priority": int(priority), "limit": CANDIDATES}
        ).all()
        if not rows:
            return [], 0
        backlog: dict[UUID, list[fairness.Waiting]] = {}
        weights: dict[UUID, int] = {}
        items: dict[int, int] = {}
        for row in rows:
            backlog.setdefault(row.tenant_id, []).append(fairness.Waiting(row.id, row.items))
            weights[row.tenant_id] = row.weight
            items[row.id] = row.items
        share = tables.shares.c
        mine = sa.and_(share.group_name == group, share.priority == int(priority))
        deficits = {
            row.tenant_id: row.deficit
            for row in connection.execute(sa.select(share.tenant_id, share.deficit).where(mine))
        }
        choice = fairness.choose(backlog, deficits, weights, budget)
        if dict(choice.deficits) != deficits:
            connection.execute(sa.delete(tables.shares).where(mine))
            if choice.deficits:
                connection.execute(
                    sa.insert(tables.shares),
                    [
                        {
                            "group_name": group,
                            "priority": int(priority),
                            "tenant_id": tenant,
                            "deficit": deficit,
                        }
                        for tenant, deficit in choice.deficits.items()
                    ],
                )
        return list(choice.picked), sum(items[chunk] for chunk in choice.picked)

    def groups(self) -> list[str]:
        """Groups with work that could be released."""
        with self.database.transaction() as connection:
            return list(connection.execute(_GROUPS).scalars())

    # ---- claim, renew, give back -------------------------------------------------------------

    def claim(self, ids: Iterable[int], worker: str) -> list[Claim]:
        """Take those of `ids` that may run now. A chunk finished, cancelled, expired, held by a
        live lease or out of attempts is left out: a message about it is only a message."""
        wanted = sorted(set(ids))
        if not wanted:
            return []
        with self.database.transaction() as connection:
            of_chunks = sa.select(_chunks.job_id).where(_chunks.id.in_(wanted))
            _lock_jobs(connection, _jobs.id.in_(of_chunks))
            claimed = connection.execute(
                sa.update(tables.chunks)
                .where(
                    _chunks.id.in_(wanted),
                    _chunks.job_id == _jobs.id,
                    sa.or_(
                        sa.and_(
                            _chunks.state.in_([ChunkState.QUEUED, ChunkState.RELEASED]),
                            _chunks.not_before <= _now,
                        ),
                        sa.and_(_chunks.state == ChunkState.RUNNING, _chunks.lease_until < _now),
                    ),
                    _chunks.attempts < self.max_attempts,
                    sa.or_(_jobs.deadline_at > _now, _chunks.kind == ChunkKind.FINALIZE),
                )
                .values(
                    state=ChunkState.RUNNING.value,
                    attempts=_chunks.attempts + 1,
                    lease_token=_chunks.lease_token + 1,
                    lease_until=_clock + _seconds(self.lease),
                    released_at=None,
                    worker=worker,
                )
                .returning(_chunks.id)
            ).scalars()
            held = sorted(claimed)
            if not held:
                return []
            rows = connection.execute(_CLAIMED, {"ids": held}).all()
            connection.execute(
                sa.update(tables.jobs)
                .where(
                    _jobs.id.in_({row.job_id for row in rows}),
                    _jobs.kind == JobKind.INFER,
                    _jobs.state.in_([JobState.QUEUED, JobState.RUNNING]),
                )
                .values(
                    state=JobState.RUNNING.value,
                    started_at=sa.func.coalesce(_jobs.started_at, _now),
                    attempts=_jobs.attempts + 1,
                    worker=worker,
                )
            )
            connection.execute(
                sa.update(tables.jobs)
                .where(
                    _jobs.id.in_({row.job_id for row in rows}),
                    _jobs.kind == JobKind.BATCH,
                    _jobs.started_at.is_(None),
                )
                .values(started_at=_now)
            )
        return [_claim(row) for row in rows]

    def renew(self, claims: Sequence[Claim]) -> set[int]:
        """Lengthen leases; the ids that were lost to a newer owner, a cancel or a deadline."""
        if not claims:
            return set()
        with self.database.transaction() as connection:
            # A row that somebody has locked is being committed or ended: no need to wait for it.
            connection.execute(
                sa.update(tables.chunks)
                .where(_some(_held(claims), limit=len(claims)))
                .values(lease_until=_clock + _seconds(self.lease))
            )
            held = connection.execute(sa.select(_chunks.id).where(_held(claims))).scalars()
            return {claim.id for claim in claims} - set(held)

    def retry(
        self, claims: Sequence[Claim], error: TidegateError, delay: float, *, counted: bool = True
    ) -> dict[int, Fate]:
        """Give chunks back after a failed attempt, to run again after `delay` seconds, or declare
        them dead where their attempts are used up. `counted=False` takes the attempt back: the
        chunk was not to blame (its model server was away)."""
        if not claims:
            return {}
        fates = {claim.id: Fate.STALE for claim in claims}
        spent = [claim for claim in claims if counted and claim.attempts >= self.max_attempts]
        again = [claim for claim in claims if not counted or claim.attempts < self.max_attempts]
        with self.database.transaction() as connection:
            _lock_jobs(connection, _jobs.id.in_({claim.job_id for claim in claims}))
            if again:
                rows = connection.execute(
                    sa.update(tables.chunks)
                    .where(_held(again))
                    .values(
                        state=ChunkState.QUEUED.value,
                        attempts=_chunks.attempts - (0 if counted else 1),
                        not_before=_clock + _seconds(delay),
                        lease_until=None,
                        error=error.to_wire(),
                    )
                    .returning(_chunks.id)
                )
                fates |= dict.fromkeys(rows.scalars(), Fate.RETRIED)
            if spent:
                dead = self._bury(connection, _held(spent), error)
                fates |= dict.fromkeys(dead, Fate.DEAD)
        return fates

    # ---- commit ----------------------------------------------------------------------------

    def commit(self, done: Sequence[Done]) -> set[int]:
        """Commit attempts at infer chunks: the ids that were still ours. The last chunk of a job
        finishes it, or starts putting its files together, in the same transaction."""
        if not done:
            return set()
        with self.database.transaction() as connection:
            _lock_jobs(connection, _jobs.id.in_({item.claim.job_id for item in done}))
            values = sa.values(
                sa.column("id", sa.BigInteger),
                sa.column("token", sa.BigInteger),
                sa.column("output_key", sa.Text),
                sa.column("error_key", sa.Text),
                sa.column("items_ok", sa.BigInteger),
                sa.column("items_failed", sa.BigInteger),
                name="done",
            ).data(
                [
                    (
                        d.claim.id,
                        d.claim.token,
                        d.output_key,
                        d.error_key,
                        d.items_ok,
                        d.items_failed,
                    )
                    for d in done
                ]
            )
            committed = set(
                connection.execute(
                    sa.update(tables.chunks)
                    .where(
                        _chunks.id == values.c.id,
                        _chunks.lease_token == values.c.token,
                        _chunks.state == ChunkState.RUNNING,
                    )
                    .values(
                        state=ChunkState.DONE.value,
                        finished_at=_clock,
                        lease_until=None,
                        output_key=sa.cast(values.c.output_key, sa.Text),
                        error_key=sa.cast(values.c.error_key, sa.Text),
                        items_ok=values.c.items_ok,
                        items_failed=values.c.items_failed,
                    )
                    .returning(_chunks.id)
                ).scalars()
            )
            mine = [item for item in done if item.claim.id in committed]
            self._finish_single(connection, [d for d in mine if d.claim.job_kind is JobKind.INFER])
            tallies: dict[UUID, _Tally] = {}
            for item in mine:
                if item.claim.job_kind is JobKind.BATCH:
                    tally = tallies.setdefault(item.claim.job_id, _Tally())
                    tally.chunks += 1
                    tally.ok += item.items_ok
                    tally.failed += item.items_failed
            self._fan_in(connection, tallies)
        return committed

    def _finish_single(self, connection: sa.Connection, done: Sequence[Done]) -> None:
        if not done:
            return
        values = sa.values(
            sa.column("id", sa.UUID),
            sa.column("state", sa.Text),
            sa.column("result", sa.LargeBinary),
            sa.column("result_key", sa.Text),
            sa.column("error", tables.JSON),
            sa.column("ok", sa.BigInteger),
            name="done",
        ).data(
            [
                (
                    item.claim.job_id,
                    (JobState.FAILED if item.error else JobState.SUCCEEDED).value,
                    item.output,
                    item.output_key,
                    item.error.to_wire() if item.error else None,
                    item.items_ok,
                )
                for item in done
            ]
        )
        connection.execute(
            sa.update(tables.jobs)
            .where(_jobs.id == values.c.id, _jobs.state.in_(sources(JobState.SUCCEEDED)))
            .values(
                state=values.c.state,
                result=sa.cast(values.c.result, sa.LargeBinary),
                result_key=sa.cast(values.c.result_key, sa.Text),
                error=sa.cast(values.c.error, tables.JSON),
                items_ok=values.c.ok,
                items_failed=1 - values.c.ok,
                chunks_done=1,
                finished_at=_clock,
            )
        )

    def _fan_in(self, connection: sa.Connection, tallies: Mapping[UUID, _Tally]) -> None:
        for job_id in sorted(tallies):
            tally = tallies[job_id]
            row = connection.execute(
                sa.update(tables.jobs)
                .where(_jobs.id == job_id)
                .values(
                    chunks_done=_jobs.chunks_done + tally.chunks,
                    items_ok=_jobs.items_ok + tally.ok,
                    items_failed=_jobs.items_failed + tally.failed,
                )
                .returning(_jobs.chunks_done, _jobs.chunks_total, _jobs.state)
            ).one()
            if row.chunks_done == row.chunks_total and row.state == JobState.RUNNING:
                self._finalize(connection, job_id, JobState.FINALIZING, JobState.SUCCEEDED)

    def _finalize(
        self, connection: sa.Connection, job_id: UUID, state: JobState, outcome: JobState
    ) -> None:
        """Stop running items of a batch and put its files together, to end in `outcome`."""
        entered = _jobs.finalizing_at if state is JobState.FINALIZING else _jobs.cancelling_at
        job = connection.execute(
            sa.update(tables.jobs)
            .where(_jobs.id == job_id, _jobs.state.in_(sources(state)))
            .values({"state": state.value, "outcome": outcome.value, entered.name: _clock})
            .returning(*tables.jobs.c)
        ).one_or_none()
        if job is None:
            return
        plan = ChunkPlan(items=1, first_line=0, byte_start=0, byte_end=0)
        row = _chunk_row(job.id, job, seq=job.chunks_total + 1, kind=ChunkKind.FINALIZE, plan=plan)
        self._insert_chunks(connection, [row])

    def commit_plan(self, claim: Claim, plans: Sequence[ChunkPlan]) -> bool:
        """Commit what reading the input file found: its chunks. False: somebody newer owns it."""
        with self.database.transaction() as connection:
            _lock_jobs(connection, _jobs.id == claim.job_id)
            if not self._commit_control(connection, claim):
                return False
            job = connection.execute(
                sa.update(tables.jobs)
                .where(_jobs.id == claim.job_id, _jobs.state == JobState.QUEUED)
                .values(
                    state=JobState.RUNNING.value,
                    running_at=_clock,
                    chunks_total=len(plans),
                    items_total=sum(plan.items for plan in plans),
                )
                .returning(*tables.jobs.c)
            ).one()
            self._insert_chunks(
                connection,
                [
                    _chunk_row(job.id, job, seq=seq, kind=ChunkKind.INFER, plan=plan)
                    for seq, plan in enumerate(plans, start=1)
                ],
            )
            return True

    def reject_plan(self, claim: Claim, errors: Sequence[Mapping[str, Any]]) -> bool:
        """The input file cannot be read: the batch failed validation."""
        with self.database.transaction() as connection:
            _lock_jobs(connection, _jobs.id == claim.job_id)
            if not self._commit_control(connection, claim):
                return False
            connection.execute(
                sa.update(tables.batches)
                .where(_batches.job_id == claim.job_id)
                .values(errors=[dict(error) for error in errors])
            )
            self._end(connection, _jobs.id == claim.job_id, JobState.FAILED, dict(errors[0]))
            return True

    def chunk_outputs(self, claim: Claim) -> list[ChunkOutput]:
        """All infer chunks of the job, in the order of their lines."""
        with self.database.transaction() as connection:
            rows = connection.execute(
                sa.select(
                    _chunks.item_count.label("items"),
                    *(
                        _chunks[name]
                        for name in ChunkOutput.__dataclass_fields__
                        if name != "items"
                    ),
                )
                .where(_chunks.job_id == claim.job_id, _chunks.kind == ChunkKind.INFER)
                .order_by(_chunks.seq)
            ).all()
        return [ChunkOutput(**{**row._mapping, "state": ChunkState(row.state)}) for row in rows]

    def commit_files(
        self, claim: Claim, output: FileRow | None, errors: FileRow | None, *, ok: int, failed: int
    ) -> bool:
        """Commit the files a batch ends with, and end it as its outcome says."""
        with self.database.transaction() as connection:
            _lock_jobs(connection, _jobs.id == claim.job_id)
            if not self._commit_control(connection, claim):
                return False
            for row in (output, errors):
                if row is not None:
                    insert_file(connection, row)
            connection.execute(
                sa.update(tables.batches)
                .where(_batches.job_id == claim.job_id)
                .values(
                    output_file_id=output.id if output else None,
                    error_file_id=errors.id if errors else None,
                )
            )
            connection.execute(
                sa.update(tables.jobs)
                .where(_jobs.id == claim.job_id)
                .values(items_ok=ok, items_failed=failed)
            )
            self._end(
                connection,
                _jobs.id == claim.job_id,
                JobState(claim.outcome or JobState.SUCCEEDED),
                None,
            )
            return True

    def _commit_control(self, connection: sa.Connection, claim: Claim) -> bool:
        return (
            connection.execute(
                sa.update(tables.chunks)
                .where(_held([claim]))
                .values(state=ChunkState.DONE.value, finished_at=_clock, lease_until=None)
            ).rowcount
            == 1
        )

    def _end(
        self,
        connection: sa.Connection,
        which: sa.ColumnElement[bool],
        state: JobState,
        error: dict[str, Any] | None,
    ) -> None:
        values: dict[str, Any] = {"state": state.value, "finished_at": _clock}
        if error is not None:
            values["error"] = error
        connection.execute(
            sa.update(tables.jobs).where(which, _jobs.state.in_(sources(state))).values(values)
        )

    def _bury(
        self, connection: sa.Connection, which: sa.ColumnElement[bool], error: TidegateError
    ) -> list[int]:
        """Declare chunks dead, with their jobs' rows locked, and let the jobs know."""
        rows = connection.execute(
            sa.update(tables.chunks)
            .where(which)
            .values(
                state=ChunkState.DEAD.value,
                finished_at=_clock,
                lease_until=None,
                items_failed=_chunks.item_count,
                error=error.to_wire(),
                lease_token=_chunks.lease_token + 1,
            )
            .returning(_chunks.id, _chunks.job_id, _chunks.kind, _chunks.item_count.label("items"))
        ).all()
        kinds = dict(
            connection.execute(
                sa.select(_jobs.id, _jobs.kind).where(_jobs.id.in_({row.job_id for row in rows}))
            )
            .tuples()
            .all()
        )
        tallies: dict[UUID, _Tally] = {}
        for row in rows:
            if row.kind == ChunkKind.INFER and kinds[row.job_id] == JobKind.BATCH:
                tally = tallies.setdefault(row.job_id, _Tally())
                tally.chunks += 1
                tally.failed += row.items
            else:
                self._end(connection, _jobs.id == row.job_id, JobState.FAILED, error.to_wire())
        self._fan_in(connection, tallies)
        return [row.id for row in rows]

    # ---- cancel and sweep ------------------------------------------------------------------

    def cancel(self, tenant_id: UUID, job_id: UUID) -> JobState:
        """Call a job off: its state afterwards. Nothing of it commits from here on. Raises
        `NotFound`; `Conflict` where it has already ended otherwise."""
        with self.database.transaction() as connection:
            which = sa.and_(_jobs.id == job_id, _jobs.tenant_id == tenant_id)
            rows = _lock_jobs(connection, which)
            if not rows:
                raise NotFound(f"no job {job_id}")
            state = JobState(rows[0].state)
            if state in (JobState.CANCELED, JobState.CANCELLING):
                return state
            if state.terminal or state is JobState.FINALIZING:
                raise Conflict(f"the job is {state.value}: too late to cancel it")
            return self._stop(connection, rows[0], ChunkState.CANCELED, JobState.CANCELED)

    def _stop(
        self, connection: sa.Connection, job: sa.Row[Any], chunk: ChunkState, outcome: JobState
    ) -> JobState:
        """End a locked job's open chunks and the job; a batch that ran first gathers its files."""
        connection.execute(
            sa.update(tables.chunks)
            .where(_chunks.job_id == job.id, _chunks.state.in_(chunk_sources(chunk)))
            .values(
                state=chunk.value,
                finished_at=_clock,
                lease_until=None,
                lease_token=_chunks.lease_token + 1,
            )
        )
        if job.kind == JobKind.BATCH and job.state == JobState.RUNNING:
            entering = JobState.CANCELLING if outcome is JobState.CANCELED else JobState.FINALIZING
            self._finalize(connection, job.id, entering, outcome)
            return entering
        error = (
            DeadlineExceeded("the job's deadline passed") if outcome is JobState.EXPIRED else None
        )
        self._end(connection, _jobs.id == job.id, outcome, error.to_wire() if error else None)
        return outcome

    def sweep(self, limit: int = 500) -> Swept:
        """Find what nobody is working on: expired leases, silent hints, passed deadlines."""
        with self.database.transaction() as connection:
            lapsed = sa.and_(_chunks.state == ChunkState.RUNNING, _chunks.lease_until < _now)
            leases = connection.execute(
                sa.update(tables.chunks)
                .where(_some(lapsed, _chunks.attempts < self.max_attempts, limit=limit))
                .values(state=ChunkState.QUEUED.value, not_before=_now, lease_until=None)
            ).rowcount
            hints = connection.execute(
                sa.update(tables.chunks)
                .where(
                    _some(
                        _chunks.state == ChunkState.RELEASED,
                        _chunks.released_at < _now - _seconds(self.hint_timeout),
                        limit=limit,
                    )
                )
                .values(state=ChunkState.QUEUED.value, released_at=None)
            ).rowcount
        return Swept(
            leases=leases,
            hints=hints,
            dead=self._sweep_dead(limit),
            expired=self._sweep_deadlines(limit),
        )

    def _sweep_dead(self, limit: int) -> int:
        lapsed = sa.and_(
            _chunks.state == ChunkState.RUNNING,
            _chunks.lease_until < _now,
            _chunks.attempts >= self.max_attempts,
        )
        with self.database.transaction() as connection:
            found = sa.select(_chunks.job_id).where(lapsed).limit(limit)
            jobs = _lock_jobs(connection, _jobs.id.in_(found), skip=True)
            if not jobs:
                return 0
            mine = sa.and_(lapsed, _chunks.job_id.in_([job.id for job in jobs]))
            error = ModelFailed(f"every worker that tried this died: {self.max_attempts} attempts")
            return len(self._bury(connection, mine, error))

    def _sweep_deadlines(self, limit: int) -> int:
        with self.database.transaction() as connection:
            jobs = _lock_jobs(
                connection,
                sa.and_(
                    _jobs.deadline_at < _now, _jobs.state.in_([JobState.QUEUED, JobState.RUNNING])
                ),
                skip=True,
                limit=limit,
            )
            for job in jobs:
                self._stop(connection, job, ChunkState.EXPIRED, JobState.EXPIRED)
        return len(jobs)

    # ---- read ------------------------------------------------------------------------------

    def get(self, tenant_id: UUID, job_id: UUID) -> sa.Row[Any]:
        """The job's row, batch columns included (null for others). Raises `NotFound`."""
        with self.database.transaction() as connection:
            row = connection.execute(
                _VIEW.where(_jobs.id == job_id, _jobs.tenant_id == tenant_id)
            ).one_or_none()
        if row is None:
            raise NotFound(f"no job {job_id}")
        return row

    def list(
        self,
        tenant_id: UUID,
        *,
        after: UUID | None,
        limit: int,
        kinds: Sequence[JobKind],
        state: JobState | None = None,
    ) -> Sequence[sa.Row[Any]]:
        """Newest first, those older than `after`."""
        query = _VIEW.where(_jobs.tenant_id == tenant_id, _jobs.kind.in_(kinds))
        if after is not None:
            query = query.where(_jobs.id < after)
        if state is not None:
            query = query.where(_jobs.state == state)
        with self.database.transaction() as connection:
            return connection.execute(query.order_by(_jobs.id.desc()).limit(limit)).all()

    def ended(self, ids: Iterable[UUID]) -> set[UUID]:
        """Those of `ids` in a terminal state."""
        with self.database.transaction() as connection:
            return set(
                connection.execute(
                    sa.select(_jobs.id).where(
                        _jobs.id.in_(list(ids)), _jobs.finished_at.is_not(None)
                    )
                ).scalars()
            )

    def result(self, tenant_id: UUID, job_id: UUID) -> tuple[bytes | None, str | None]:
        """Where a one-item job's result is: its bytes, or its object key. Raises `NotFound`."""
        with self.database.transaction() as connection:
            row = connection.execute(
                sa.select(_jobs.result, _jobs.result_key).where(
                    _jobs.id == job_id, _jobs.tenant_id == tenant_id
                )
            ).one_or_none()
        if row is None:
            raise NotFound(f"no job {job_id}")
        return row.result, row.result_key


def insert_file(connection: sa.Connection, row: FileRow) -> None:
    """Add a file's row on a transaction of the caller's."""
    connection.execute(
        sa.insert(tables.files),
        {
            "id": row.id,
            "tenant_id": row.tenant_id,
            "purpose": row.purpose,
            "filename": row.filename,
            "bytes": row.bytes,
            "object_key": row.key,
            "expires_at": row.expires_at,
        },
    )


def _seconds(value: float) -> Any:
    return sa.func.make_interval(0, 0, 0, 0, 0, 0, value)


def _held(claims: Sequence[Claim]) -> sa.ColumnElement[bool]:
    """The fence: these chunks, while nobody newer has claimed, ended or buried them."""
    pairs = [(claim.id, claim.token) for claim in claims]
    return sa.and_(
        sa.tuple_(_chunks.id, _chunks.lease_token).in_(pairs), _chunks.state == ChunkState.RUNNING
    )


def _lock_jobs(
    connection: sa.Connection,
    which: sa.ColumnElement[bool],
    *,
    skip: bool = False,
    limit: int | None = None,
) -> Sequence[sa.Row[Any]]:
    return connection.execute(
        sa.select(_jobs.id, _jobs.kind, _jobs.state)
        .where(which)
        .order_by(_jobs.id)
        .limit(limit)
        .with_for_update(key_share=True, skip_locked=skip)
    ).all()


def _some(*conditions: sa.ColumnElement[bool], limit: int) -> sa.ColumnElement[bool]:
    """Up to `limit` chunks that nobody else is changing."""
    return _chunks.id.in_(
        sa.select(_chunks.id)
        .where(*conditions)
        .order_by(_chunks.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )


def _chunk_row(
    job_id: UUID, job: Any, *, seq: int, kind: ChunkKind, plan: ChunkPlan
) -> dict[str, Any]:
    """`job` is a NewJob or a row of `jobs`: both name these fields alike but for the group."""
    return {
        "job_id": job_id,
        "seq": seq,
        "kind": kind.value,
        "tenant_id": job.tenant_id,
        "group_name": job.group if isinstance(job, NewJob) else job.group_name,
        "model": job.model,
        "version": job.version,
        "priority": int(job.priority),
        "state": ChunkState.QUEUED.value,
        "item_count": plan.items,
        "first_line": plan.first_line,
        "byte_start": plan.byte_start,
        "byte_end": plan.byte_end,
        "duplicates": list(plan.duplicates) or None,
    }


def _claim(row: sa.Row[Any]) -> Claim:
    values = dict(row._mapping)
    values["kind"] = ChunkKind(values["kind"])
    values["job_kind"] = JobKind(values["job_kind"])
    values["duplicates"] = tuple(values["duplicates"] or ())
    values["input"] = bytes(values["input"]) if values["input"] is not None else None
    values["remaining"] = float(values["remaining"])
    return Claim(**values)


def _hints(group: str, rows: Sequence[sa.Row[Any]]) -> list[Hint]:
    """One hint per chunk, but one-item chunks of one model version share hints."""
    hints: list[Hint] = []
    singles: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if row.kind != ChunkKind.INFER or row.items > 1:
            hints.append(Hint(group, row.model, row.version, (row.id,)))
            continue
        waiting = singles.setdefault((row.model, row.version), [])
        waiting.append(row.id)
        if len(waiting) == HINT_CHUNKS:
            hints.append(Hint(group, row.model, row.version, tuple(waiting)))
            waiting.clear()
    hints += [Hint(group, *model, tuple(ids)) for model, ids in singles.items() if ids]
    return hints


_VIEW = sa.select(
    *(column for column in tables.jobs.c if column.name not in ("input", "result")),
    (_jobs.result.is_not(None)).label("inline_result"),
    _batches.endpoint,
    _batches.completion_window,
    _batches.input_file_id,
    _batches.output_file_id,
    _batches.error_file_id,
    _batches.errors,
).outerjoin(tables.batches, _batches.job_id == _jobs.id)

_CLAIMED = (
    sa.select(
        _chunks.id,
        _chunks.lease_token.label("token"),
        _chunks.kind,
        _chunks.job_id,
        _jobs.kind.label("job_kind"),
        _chunks.tenant_id,
        _chunks.seq,
        _chunks.model,
        _chunks.version,
        _chunks.attempts,
        _chunks.item_count.label("items"),
        _chunks.first_line,
        _chunks.byte_start,
        _chunks.byte_end,
        _chunks.duplicates,
        sa.extract("epoch", _jobs.deadline_at - _clock).label("remaining"),
        _jobs.input,
        _jobs.input_key,
        sa.func.coalesce(_batches.endpoint, "").label("endpoint"),
        sa.func.coalesce(tables.files.c.object_key, "").label("file_key"),
        _jobs.outcome,
    )
    .join(tables.jobs, _jobs.id == _chunks.job_id)
    .outerjoin(tables.batches, _batches.job_id == _jobs.id)
    .outerjoin(tables.files, tables.files.c.id == _batches.input_file_id)
    .where(_chunks.id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(_chunks.id)
)

# A loose index scan: one probe per tenant with work, then that tenant's oldest rows, so that the
# cost follows the number of tenants and not the backlog.
_CANDIDATES = sa.text(
    """
    WITH RECURSIVE waiting AS (
        (SELECT tenant_id FROM chunks
          WHERE state = 'queued' AND group_name = :group AND priority = :priority
          ORDER BY tenant_id LIMIT 1)
        UNION ALL
        SELECT (SELECT c.tenant_id FROM chunks c
                 WHERE c.state = 'queued' AND c.group_name = :group AND c.priority = :priority
                   AND c.tenant_id > waiting.tenant_id
                 ORDER BY c.tenant_id LIMIT 1)
          FROM waiting WHERE waiting.tenant_id IS NOT NULL
    )
    SELECT oldest.id, oldest.items, tenants.id AS tenant_id, tenants.weight
      FROM waiting
      JOIN tenants ON tenants.id = waiting.tenant_id
     CROSS JOIN LATERAL (
        SELECT c.id, c.item_count AS items FROM chunks c
         WHERE c.state = 'queued' AND c.group_name = :group AND c.priority = :priority
           AND c.tenant_id = waiting.tenant_id AND c.not_before <= now()
         ORDER BY c.id LIMIT :limit
         FOR UPDATE SKIP LOCKED
     ) oldest
    """
)

_GROUPS = sa.text(
    """
    WITH RECURSIVE found AS (
        (SELECT group_name FROM chunks WHERE state = 'queued' ORDER BY group_name LIMIT 1)
        UNION ALL
        SELECT (SELECT c.group_name FROM chunks c
                 WHERE c.state = 'queued' AND c.group_name > found.group_name
                 ORDER BY c.group_name LIMIT 1)
          FROM found WHERE found.group_name IS NOT NULL
    )
    SELECT group_name FROM found WHERE group_name IS NOT NULL
    """
)
