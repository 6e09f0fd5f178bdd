"""Jobs: accept, read, call off. With `chunks` and `backlog` the only writers of the ledger."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

import sqlalchemy as sa

from errors import Conflict, Gone, NotFound
from storage import idempotency, moves, tables
from storage.database import Database, Row
from storage.files import require_file
from storage.idempotency import Once
from storage.lifecycle import ChunkKind, ChunkState, JobKind, JobState
from storage.work import ChunkPlan, NewBatch, NewJob, Pulse

_jobs, _batches = tables.jobs.c, tables.batches.c


@dataclass(frozen=True, slots=True)
class Jobs:
    """Every method is one transaction; safe to share between threads."""

    database: Database
    garbage_age: float = 3600.0

    def submit(self, jobs: Sequence[NewJob], once: Once | None = None) -> UUID:
        """Accept one-item jobs; when this returns they are durable. The first one's id, or, where
        `once` was there before, the earlier job's, and nothing has been accepted. Raises
        `KeyReused`."""
        with self.database.transaction() as connection:
            first = idempotency.settle(connection, once, jobs[0].id)
            if first != jobs[0].id:
                return first
            moves.require_fresh(connection, [job.stored_since for job in jobs], self.garbage_age)
            self._insert(connection, jobs, JobKind.INFER)
            moves.insert_chunks(
                connection,
                [
                    moves.chunk_row(job, seq=1, kind=ChunkKind.INFER, plan=ChunkPlan(1, 1, 0, 0))
                    for job in jobs
                ],
            )
        return first

    def submit_batch(self, job: NewJob, batch: NewBatch, once: Once | None = None) -> UUID:
        """Accept a batch: its id, or, as with `submit`, an earlier one's. Its first chunk reads
        the file. Raises `NotFound` and `Gone` about `input_file_id`."""
        with self.database.transaction() as connection:
            made = idempotency.settle(connection, once, job.id)
            if made != job.id:
                return made
            try:
                require_file(connection, job.tenant_id, batch.input_file_id, keep=True)
            except (NotFound, Gone) as error:
                error.param = "input_file_id"
                raise
            self._insert(connection, [job], JobKind.BATCH)
            connection.execute(
                sa.insert(tables.batches),
                {
                    "job_id": job.id,
                    "tenant_id": job.tenant_id,
                    "endpoint": batch.endpoint,
                    "completion_window": batch.completion_window,
                    "output_ttl": batch.output_ttl,
                    "arrays": dict(batch.arrays) if batch.arrays is not None else None,
                    "input_file_id": batch.input_file_id,
                },
            )
            moves.insert_chunks(
                connection,
                [moves.chunk_row(job, seq=0, kind=ChunkKind.PLAN, plan=ChunkPlan(1, 0, 0, 0))],
            )
        return made

    def _insert(self, connection: sa.Connection, jobs: Sequence[NewJob], kind: JobKind) -> None:
        one = kind is JobKind.INFER
        connection.execute(
            sa.insert(tables.jobs).values(
                deadline_at=moves.now + sa.bindparam("deadline", type_=sa.Interval)
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

    def cancel(
        self, tenant_id: UUID, job_id: UUID, kinds: Sequence[JobKind] = tuple(JobKind)
    ) -> JobState:
        """Call a job off: its state afterwards. Nothing of it commits from here on. Raises
        `NotFound`, also for one of another kind; `Conflict` where it has already ended otherwise.
        """
        with self.database.transaction() as connection:
            which = sa.and_(_jobs.id == job_id, _jobs.tenant_id == tenant_id, _jobs.kind.in_(kinds))
            rows = moves.lock_jobs(connection, which)
            if not rows:
                raise NotFound(f"no job {job_id}")
            state = JobState(rows[0].state)
            if state in (JobState.CANCELED, JobState.CANCELLING):
                return state
            if state.terminal or state is JobState.FINALIZING:
                raise Conflict(f"the job is {state.value}: too late to cancel it")
            return moves.stop_job(connection, rows[0], ChunkState.CANCELED, JobState.CANCELED)

    def get(self, tenant_id: UUID, job_id: UUID, kinds: Sequence[JobKind] = tuple(JobKind)) -> Row:
        """The job's row, batch columns included (null for others). Raises `NotFound`."""
        with self.database.transaction() as connection:
            row = connection.execute(
                _VIEW.where(_jobs.id == job_id, _jobs.tenant_id == tenant_id, _jobs.kind.in_(kinds))
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
    ) -> Sequence[Row]:
        """Newest first, those older than `after`."""
        query = _VIEW.where(_jobs.tenant_id == tenant_id, _jobs.kind.in_(kinds))
        if after is not None:
            query = query.where(_jobs.id < after)
        if state is not None:
            query = query.where(_jobs.state == state)
        with self.database.transaction() as connection:
            return connection.execute(query.order_by(_jobs.id.desc()).limit(limit)).all()

    def pulses(self, ids: Iterable[UUID]) -> dict[UUID, Pulse]:
        """How these jobs are doing, as far as they exist."""
        with self.database.transaction() as connection:
            rows = connection.execute(
                sa.select(
                    _jobs.id,
                    _jobs.state,
                    _jobs.started_at,
                    _jobs.attempts,
                    _jobs.items_total,
                    _jobs.items_ok,
                    _jobs.items_failed,
                ).where(_jobs.id.in_(list(ids)))
            ).all()
        return {job_id: Pulse(JobState(state), *rest) for job_id, state, *rest in rows}

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


_VIEW = sa.select(
    *(column for column in tables.jobs.c if column.name not in ("input", "result")),
    _batches.endpoint,
    _batches.completion_window,
    _batches.input_file_id,
    _batches.output_file_id,
    _batches.error_file_id,
    _batches.errors,
).outerjoin(tables.batches, _batches.job_id == _jobs.id)
