"""Jobs: accept, read, call off. With `chunks` and `backlog` the only writers of the ledger."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from errors import Conflict, Gone, KeyReused, NotFound, TidegateError, Unavailable
from storage import idempotency, moves, tables
from storage.database import Database, Row
from storage.files import require_file
from storage.idempotency import Once
from storage.lifecycle import ChunkKind, ChunkState, JobKind, JobState
from storage.work import ChunkPlan, NewBatch, NewJob, Pulse

_jobs, _batches = tables.jobs.c, tables.batches.c


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that is durable."""

    id: UUID
    row: Row | None = None
    """As `Jobs.get` reads it, but for a batch's columns. None for one that was there before."""


@dataclass(frozen=True, slots=True)
class Jobs:
    """Every method is one transaction; safe to share between threads."""

    database: Database
    garbage_age: float = 3600.0

    def submit(
        self, jobs: Sequence[NewJob], keys: Mapping[UUID, Once] | None = None
    ) -> list[Accepted | KeyReused | Unavailable]:
        """Accept one-item jobs; when this returns, those accepted are durable. `keys`, by job id:
        where a key was there before, the earlier job is what has been accepted. A job that may not
        be accepted comes to its own error and keeps none of the others from it; an error of the
        database's is everybody's, and is raised.
        """
        with self.database.transaction() as connection:
            refused = self._stale(connection, jobs)
            asked = [
                (once, job.id)
                for job in jobs
                if (once := (keys or {}).get(job.id)) and job.id not in refused
            ]
            settled = dict(
                zip(
                    [made for _, made in asked],
                    idempotency.settle_all(connection, asked),
                    strict=True,
                )
            )
            outcomes = refused | settled
            fresh = [job for job in jobs if outcomes.get(job.id, job.id) == job.id]
            rows = self._insert(connection, fresh, JobKind.INFER)
            if rows:
                connection.execute(_SINGLES, {"ids": [str(job_id) for job_id in rows]})
        return [
            found
            if isinstance(found := outcomes.get(job.id, job.id), TidegateError)
            else Accepted(found, rows.get(found) if found == job.id else None)
            for job in jobs
        ]

    def _stale(
        self, connection: sa.Connection, jobs: Sequence[NewJob]
    ) -> dict[UUID, UUID | KeyReused | Unavailable]:
        """Jobs whose input was stored too long ago."""
        stored = [job for job in jobs if job.stored_since is not None]
        try:
            moves.require_fresh(connection, [job.stored_since for job in stored], self.garbage_age)
        except Unavailable as error:
            if len(stored) == 1:
                return {stored[0].id: error}
            return {
                name: why for job in stored for name, why in self._stale(connection, [job]).items()
            }
        return {}

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

    def _insert(
        self, connection: sa.Connection, jobs: Sequence[NewJob], kind: JobKind
    ) -> dict[UUID, Row]:
        """The rows, by id, as they read from now on."""
        if not jobs:
            return {}
        rows = connection.execute(
            _INSERT,
            {
                "kind": kind.value,
                "one": int(kind is JobKind.INFER),
                "ids": [str(job.id) for job in jobs],
                "tenants": [str(job.tenant_id) for job in jobs],
                "groups": [job.group for job in jobs],
                "models": [job.model for job in jobs],
                "versions": [job.version for job in jobs],
                "priorities": [int(job.priority) for job in jobs],
                "inputs": [job.input for job in jobs],
                "input_keys": [job.input_key for job in jobs],
                "metadata": [
                    json.dumps(dict(job.metadata)) if job.metadata else None for job in jobs
                ],
                "deadlines": [job.deadline for job in jobs],
            },
        )
        return {row.id: row for row in rows}

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
        place: dict[sa.ColumnElement[Any], Any]
        if tuple(kinds) == (JobKind.BATCH,):
            # Few among many jobs: found by their own table.
            place = {_batches.tenant_id: tenant_id, _batches.job_id: after or _LAST}
            query = _VIEW.where(_jobs.tenant_id == tenant_id, _batches.job_id.is_not(None))
            if state is not None:
                query = query.where(_jobs.state == state)
        else:
            place = {_jobs.tenant_id: tenant_id}
            if state is not None:
                place[_jobs.state] = state.value
            place[_jobs.id] = after or _LAST
            query = _VIEW.where(_jobs.kind.in_(kinds))
        with self.database.transaction() as connection:
            return connection.execute(_older(query, place).limit(limit)).all()

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


_LAST = UUID(int=2**128 - 1)
"""No id comes after it."""


def _older(query: sa.Select[Any], place: Mapping[sa.ColumnElement[Any], Any]) -> sa.Select[Any]:
    """The rows before a place in an index, backwards: those alike in all of its columns but the
    last. As a range of that index, in its order, so that no other will do: one by id alone would
    walk over everybody's newer rows."""
    columns = [*place]
    values = [sa.literal(value, column.type) for column, value in place.items()]
    return query.where(
        sa.tuple_(*columns) < sa.tuple_(*values),
        sa.tuple_(*columns[:-1]) >= sa.tuple_(*values[:-1]),
    ).order_by(*(column.desc() for column in columns))


_SHOWN = [column for column in tables.jobs.c if column.name not in ("input", "result")]
_VIEW = sa.select(
    *_SHOWN,
    _batches.endpoint,
    _batches.completion_window,
    _batches.input_file_id,
    _batches.output_file_id,
    _batches.error_file_id,
    _batches.errors,
).outerjoin(tables.batches, _batches.job_id == _jobs.id)

# One statement for however many: the server reads arrays faster than as many rows of values.
_INSERT = sa.text(
    f"""
    INSERT INTO jobs (
        id, tenant_id, kind, group_name, model, version, priority, state, input, input_key,
        metadata, chunks_total, items_total, deadline_at
    )
    SELECT id, tenant_id, :kind, group_name, model, version, priority, '{JobState.QUEUED}', input,
           input_key, metadata, :one, :one, now() + make_interval(secs => deadline)
      FROM unnest(
        CAST(:ids AS uuid[]), CAST(:tenants AS uuid[]), CAST(:groups AS text[]),
        CAST(:models AS text[]), CAST(:versions AS text[]), CAST(:priorities AS smallint[]),
        CAST(:inputs AS bytea[]), CAST(:input_keys AS text[]), CAST(:metadata AS jsonb[]),
        CAST(:deadlines AS float8[])
      ) AS asked (
        id, tenant_id, group_name, model, version, priority, input, input_key, metadata, deadline
      )
    RETURNING {", ".join(column.name for column in _SHOWN)}
    """  # noqa: S608 - constants of ours
)

# Of one-item jobs; in the order in which they came: their ids are.
_SINGLES = sa.text(
    f"""
    INSERT INTO chunks (
        job_id, seq, kind, tenant_id, group_name, model, version, priority, state, item_count,
        first_line
    )
    SELECT id, 1, '{ChunkKind.INFER}', tenant_id, group_name, model, version, priority,
           '{ChunkState.QUEUED}', 1, 1
      FROM jobs
     WHERE id = ANY(CAST(:ids AS uuid[]))
     ORDER BY id
    """  # noqa: S608 - constants of ours
)
