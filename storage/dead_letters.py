"""Dead letters: chunks that were given up, with their reasons, and running them again.

A redrive makes a new job out of what the old one could not do: an ended job stays as it ended, for
whoever has read it. A letter is redriven once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat as uuids

from errors import Gone, NotFound
from storage import idempotency, moves, tables
from storage.database import Database, Row
from storage.idempotency import Once
from storage.lifecycle import ChunkKind, ChunkState, JobKind, JobState
from storage.work import ChunkPlan

_jobs, _batches, _chunks = tables.jobs.c, tables.batches.c, tables.chunks.c


@dataclass(frozen=True, slots=True)
class LetterFilter:
    """Which dead letters; None is any."""

    job_id: UUID | None = None
    model: str | None = None
    code: str | None = None
    """Of the error they died of."""
    redriven: bool | None = None


@dataclass(frozen=True, slots=True)
class Redriven:
    """What a redrive made."""

    jobs: tuple[UUID, ...] = ()
    letters: int = 0
    gone: tuple[int, ...] = ()
    """Letters whose input is not kept any more."""
    more: bool = False
    """There are more letters than one call takes."""
    again: bool = field(default=False, compare=False)
    """It was made earlier, by a request with the same key."""

    def to_json(self) -> dict[str, Any]:
        told = asdict(self) | {"jobs": [str(job) for job in self.jobs]}
        del told["again"]
        return told

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Redriven:
        """What `to_json` made, again."""
        jobs = tuple(UUID(job) for job in told["jobs"])
        return cls(jobs, told["letters"], tuple(told["gone"]), told["more"], again=True)


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """Every method is one transaction; safe to share between threads. Another tenant's letter is
    not found."""

    database: Database

    def list(
        self, tenant_id: UUID, *, after: int | None, limit: int, chosen: LetterFilter
    ) -> Sequence[Row]:
        """Newest first, those older than `after`."""
        query = _VIEW.where(_mine(tenant_id, chosen)).order_by(_chunks.id.desc()).limit(limit)
        if after is not None:
            query = query.where(_chunks.id < after)
        with self.database.transaction() as connection:
            return connection.execute(query).all()

    def get(self, tenant_id: UUID, letter: int) -> Row:
        """Raises `NotFound`."""
        query = _VIEW.where(_mine(tenant_id, LetterFilter()), _chunks.id == letter)
        with self.database.transaction() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFound(f"no dead letter dl_{letter}")
        return row

    def redrive(
        self,
        tenant_id: UUID,
        letter: int,
        deadline: float | None = None,
        once: Once | None = None,
    ) -> UUID:
        """Run one letter again: the new job, or the one that an earlier redrive made. `deadline` is
        seconds from now; None gives it as long as the old job had. Raises `NotFound`; `Gone` where
        its input is not kept any more; `KeyReused`."""
        mine = _mine(tenant_id, LetterFilter())
        with self.database.transaction() as connection:
            row = connection.execute(
                sa.select(*_LETTER).where(mine, _chunks.id == letter).with_for_update()
            ).one_or_none()
            if row is None:
                raise NotFound(f"no dead letter dl_{letter}")
            job_id: UUID | None = row.redriven_as
            if job_id is None:
                made = _redrive(connection, [row], deadline)
                if not made.jobs:
                    raise Gone("the input of this dead letter is not kept any more")
                job_id = made.jobs[0]
            return idempotency.settle(connection, once, job_id)

    def redrive_all(
        self,
        tenant_id: UUID,
        chosen: LetterFilter,
        *,
        limit: int,
        deadline: float | None = None,
        once: Once | None = None,
    ) -> Redriven:
        """Run the oldest `limit` letters again that have not been, one new job for each old one.
        Those that another call is redriving right now are left to it. Raises `KeyReused`."""
        with self.database.transaction() as connection:
            if idempotency.seen(connection, once):
                return Redriven.from_json(idempotency.answer(connection, once))
            rows = connection.execute(
                sa.select(*_LETTER)
                .where(_mine(tenant_id, chosen), _chunks.redriven_as.is_(None))
                .order_by(_chunks.id)
                .limit(limit + 1)
                .with_for_update(skip_locked=True)
            ).all()
            made = replace(_redrive(connection, rows[:limit], deadline), more=len(rows) > limit)
            idempotency.keep_answer(connection, once, made.to_json())
            return made


_LETTER = (_chunks.id, _chunks.job_id, _chunks.kind, _chunks.redriven_as)

_VIEW = sa.select(
    *(column for column in tables.chunks.c if column.name != "duplicates"),
    _jobs.kind.label("job_kind"),
).join(tables.jobs, _jobs.id == _chunks.job_id)


def _mine(tenant_id: UUID, chosen: LetterFilter) -> sa.ColumnElement[bool]:
    conditions = [_chunks.tenant_id == tenant_id, _chunks.state == ChunkState.DEAD]
    if chosen.job_id is not None:
        conditions.append(_chunks.job_id == chosen.job_id)
    if chosen.model is not None:
        conditions.append(_chunks.model == chosen.model)
    if chosen.code is not None:
        conditions.append(_chunks.error["code"].astext == chosen.code)
    if chosen.redriven is not None:
        again = _chunks.redriven_as.is_not(None)
        conditions.append(again if chosen.redriven else sa.not_(again))
    return sa.and_(*conditions)


@dataclass(slots=True)
class _Again:
    """The letters of one job, and the job they become."""

    id: UUID
    letters: list[int] = field(default_factory=list)
    whole: bool = False
    """Its file was not read in, or its answers not put together: everything runs again."""


def _hold_inputs(connection: sa.Connection, jobs: Sequence[UUID]) -> set[UUID]:
    """Those of `jobs` whose input is there and, until the transaction ends, stays there: retention
    asks for the same rows. What it has in hand this moment is gone; it is not waited for, since it
    may be waiting for our letters."""
    held = list(_held(connection, _jobs.id, jobs))
    inputs = sa.select(_batches.input_file_id).where(_batches.job_id.in_(held))
    files = _held(connection, tables.files.c.id, inputs)
    return set(connection.execute(_KEPT, {"ids": held, "files": list(files)}).scalars())


def _held(connection: sa.Connection, column: sa.Column[Any], ids: Any) -> sa.ScalarResult[UUID]:
    return connection.execute(
        sa.select(column)
        .where(column.in_(ids))
        .with_for_update(read=True, key_share=True, skip_locked=True)
    ).scalars()


def _redrive(connection: sa.Connection, letters: Sequence[Row], deadline: float | None) -> Redriven:
    again: dict[UUID, _Again] = {}
    for letter in letters:
        one = again.setdefault(letter.job_id, _Again(uuids.uuid7()))
        one.letters.append(letter.id)
        one.whole = one.whole or letter.kind != ChunkKind.INFER
    kept = _hold_inputs(connection, list(again))
    gone = tuple(n for job, one in again.items() if job not in kept for n in one.letters)
    again = {job: one for job, one in again.items() if job in kept}
    for job_id, one in again.items():
        _copy_job(connection, job_id, one, deadline)
        connection.execute(
            sa.update(tables.chunks).where(_chunks.id.in_(one.letters)).values(redriven_as=one.id)
        )
    return Redriven(
        jobs=tuple(one.id for one in again.values()),
        letters=sum(len(one.letters) for one in again.values()),
        gone=gone,
    )


def _copy_job(
    connection: sa.Connection, job_id: UUID, again: _Again, deadline: float | None
) -> None:
    """A new job that asks what these letters of the old one asked."""
    old = connection.execute(sa.select(tables.jobs).where(_jobs.id == job_id)).one()
    rows = connection.execute(
        sa.select(tables.chunks).where(_chunks.id.in_(again.letters)).order_by(_chunks.first_line)
    ).all()
    batch = _batch_of(connection, old)
    # What was staged for the old job goes with it: the file is read in again, for these rows only.
    staged = batch is not None and batch.staged_key is not None
    planned = old.kind == JobKind.INFER or not (again.whole or staged)
    runs = old.kind == JobKind.BATCH and planned
    window = moves.seconds(deadline) if deadline is not None else old.deadline_at - old.created_at
    new = connection.execute(
        sa.insert(tables.jobs)
        .values(
            {name: getattr(old, name) for name in _COPIED}
            | {
                "id": again.id,
                "state": (JobState.RUNNING if runs else JobState.QUEUED).value,
                "running_at": moves.clock if runs else None,
                "deadline_at": moves.now + window,
                "redrive_of": job_id,
                "chunks_total": len(rows) if planned else 0,
                "items_total": sum(row.item_count for row in rows) if planned else 0,
            }
        )
        .returning(*tables.jobs.c)
    ).one()
    if batch is not None:
        values = {name: getattr(batch, name) for name in _COPIED_BATCH} | {"job_id": again.id}
        if planned:
            values["layout"] = batch.layout
        elif staged and not again.whole:
            only = [(row.first_line, row.item_count) for row in rows]
            values["arrays"] = batch.arrays | {"only": only}
        connection.execute(sa.insert(tables.batches), values)
    if planned:
        plans: list[tuple[int, ChunkKind, ChunkPlan]] = [
            (seq, ChunkKind.INFER, _plan(row)) for seq, row in enumerate(rows, start=1)
        ]
    else:
        plans = [(0, ChunkKind.PLAN, ChunkPlan(1, 0, 0, 0))]
    moves.insert_chunks(
        connection,
        [moves.chunk_row(new, seq=seq, kind=kind, plan=plan) for seq, kind, plan in plans],
    )


def _batch_of(connection: sa.Connection, job: Row) -> Row | None:
    return connection.execute(
        sa.select(tables.batches).where(_batches.job_id == job.id)
    ).one_or_none()


def _plan(row: Row) -> ChunkPlan:
    duplicates: Sequence[int] = row.duplicates or ()
    return ChunkPlan(
        row.item_count, row.first_line, row.byte_start, row.byte_end, tuple(duplicates)
    )


_COPIED: tuple[str, ...] = (
    *("tenant_id", "kind", "group_name", "model", "version"),
    *("priority", "input", "input_key", "metadata"),
)
_COPIED_BATCH: tuple[str, ...] = (
    *("tenant_id", "endpoint", "completion_window", "output_ttl", "arrays", "input_file_id"),
)

_KEPT = (
    sa.select(_jobs.id)
    .outerjoin(tables.batches, _batches.job_id == _jobs.id)
    .outerjoin(tables.files, tables.files.c.id == _batches.input_file_id)
    .where(
        _jobs.id.in_(sa.bindparam("ids", expanding=True)),
        _jobs.purged_at.is_(None),
        sa.or_(
            _jobs.kind == JobKind.INFER,
            sa.and_(
                tables.files.c.id.in_(sa.bindparam("files", expanding=True)),
                tables.files.c.deleted_at.is_(None),
                tables.files.c.purged_at.is_(None),
                sa.or_(tables.files.c.expires_at.is_(None), tables.files.c.expires_at > moves.now),
            ),
        ),
    )
)
"""Jobs whose input is still there."""
