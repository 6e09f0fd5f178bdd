"""Moves of jobs and chunks from state to state, each on a transaction of the caller's.

Lock order, everywhere: jobs before chunks, each by ascending id. Times are the database's. Every
UPDATE of a state names the states it may come from, from `lifecycle`'s tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from errors import DeadlineExceeded, TidegateError, Unavailable
from storage import events, tables
from storage.database import Row
from storage.lifecycle import (
    ChunkKind,
    ChunkState,
    JobKind,
    JobState,
    Priority,
    chunk_sources,
    sources,
)
from storage.work import ChunkPlan, Claim, Done, NewJob

_jobs, _chunks = tables.jobs.c, tables.chunks.c
MOST_DOUBLINGS = 5
"""Of the wait for somebody to follow a hint."""
clock = sa.func.clock_timestamp()
now = sa.func.now()


@dataclass(slots=True)
class Tally:
    chunks: int = 0
    ok: int = 0
    failed: int = 0


def seconds(value: float | sa.ColumnElement[Any]) -> Any:
    """So many seconds, as an interval."""
    return sa.func.make_interval(0, 0, 0, 0, 0, 0, value)


def require_fresh(
    connection: sa.Connection, since: Sequence[datetime | None], garbage_age: float
) -> None:
    """Objects that nothing names are the collector's once they are of age. So bytes that were
    stored before the row that names them began at `since` must be named long before; half the age
    is left for the commit. Raises `Unavailable`."""
    moments = [moment for moment in since if moment is not None]
    if not moments:
        return
    late = clock - sa.literal(min(moments)) > seconds(garbage_age / 2)
    if connection.execute(sa.select(late)).scalar_one():
        raise Unavailable("it took too long to store what came with this", retry_after=1)


def still(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    """A condition on rows that are found by their ids. Written so that no index answers to it: a
    queue fills before the planner hears of it, and what it takes for a few rows of one state may
    be all that wait."""
    return condition.is_(sa.true())


def table(
    name: str, rows: Sequence[Sequence[Any]], **columns: sa.types.TypeEngine[Any]
) -> sa.TableValuedAlias:
    """Rows of values to join with, as one array a column: the statement is the same, and compiled
    once, however many there are."""
    arrays = [
        sa.cast(sa.literal([row[at] for row in rows], sa.ARRAY(kind)), sa.ARRAY(kind))
        for at, kind in enumerate(columns.values())
    ]
    named = [sa.column(column, kind) for column, kind in columns.items()]
    return sa.func.unnest(*arrays).table_valued(*named, name=name).render_derived()


def fence(token: Any) -> sa.ColumnElement[bool]:
    """Nobody newer than the claim of this token has claimed, ended or buried the chunk."""
    return sa.and_(_chunks.lease_token == token, still(_chunks.state == ChunkState.RUNNING))


def held(claims: Sequence[Claim]) -> sa.ColumnElement[bool]:
    """Those chunks of these claims that are still theirs."""
    newest = newest_tokens(claims)
    theirs = table("held", [*newest.items()], id=sa.BigInteger(), token=sa.BigInteger())
    return sa.and_(
        sa.tuple_(_chunks.id, _chunks.lease_token).in_(sa.select(theirs.c.id, theirs.c.token)),
        still(_chunks.state == ChunkState.RUNNING),
    )


def newest_tokens(claims: Sequence[Claim]) -> dict[int, int]:
    """Of several claims of one chunk, only the newest can still be good: a process that slept
    through its lease may take the same chunk over from itself."""
    return {claim.id: claim.token for claim in sorted(claims, key=lambda claim: claim.token)}


def lapsed() -> sa.ColumnElement[bool]:
    """Somebody ran the chunk, and fell silent."""
    return sa.and_(_chunks.state == ChunkState.RUNNING, _chunks.lease_until < now)


def may_run_again(max_attempts: int) -> sa.ColumnElement[bool]:
    """It has attempts left. Putting answers together runs nothing that a client sent: that workers
    died of it is chance, and the answers are there. Its time is what bounds it."""
    return sa.or_(_chunks.attempts < max_attempts, _chunks.kind == ChunkKind.FINALIZE)


def claimable(max_attempts: int) -> sa.ColumnElement[bool]:
    """A chunk that may be run now: open, not held, with attempts and time left."""
    waiting = sa.and_(
        _chunks.state.in_([ChunkState.QUEUED, ChunkState.RELEASED]), _chunks.not_before <= now
    )
    return sa.and_(
        sa.or_(waiting, lapsed()),
        may_run_again(max_attempts),
        sa.or_(_jobs.deadline_at > now, _chunks.kind == ChunkKind.FINALIZE),
    )


def unclaimed(hint_timeout: float, *, doubled: bool = True) -> sa.ColumnElement[bool]:
    """The outbox: a hint went out, and nobody came. The wait doubles with each hint in vain, so
    that a group without a worker does not fill its queue with copies."""
    patience: Any = hint_timeout
    if doubled:
        patience *= sa.func.power(2, sa.func.least(_chunks.hints - 1, MOST_DOUBLINGS))
    return sa.and_(
        _chunks.state == ChunkState.RELEASED,
        _chunks.released_at < now - seconds(patience),
    )


def lock_jobs(
    connection: sa.Connection,
    which: sa.ColumnElement[bool],
    *,
    skip: bool = False,
    limit: int | None = None,
) -> Sequence[Row]:
    return connection.execute(
        sa.select(_jobs.id, _jobs.kind, _jobs.state)
        .where(which)
        .order_by(_jobs.id)
        .limit(limit)
        .with_for_update(key_share=True, skip_locked=skip)
    ).all()


def some(*conditions: sa.ColumnElement[bool], limit: int) -> sa.ColumnElement[bool]:
    """Up to `limit` chunks that nobody else is changing."""
    return _chunks.id.in_(
        sa.select(_chunks.id)
        .where(*conditions)
        .order_by(_chunks.id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )


def chunk_row(job: Any, *, seq: int, kind: ChunkKind, plan: ChunkPlan) -> dict[str, Any]:
    """`job` is a NewJob or a row of `jobs`: both name these fields alike but for the group."""
    return {
        "job_id": job.id,
        "seq": seq,
        "kind": kind.value,
        "tenant_id": job.tenant_id,
        "group_name": job.group if isinstance(job, NewJob) else job.group_name,
        "model": job.model,
        "version": job.version,
        # Reading a file in and putting one together are short, and a client waits for both.
        "priority": int(job.priority if kind is ChunkKind.INFER else Priority.CRITICAL),
        "state": ChunkState.QUEUED.value,
        "item_count": plan.items,
        "first_line": plan.first_line,
        "byte_start": plan.byte_start,
        "byte_end": plan.byte_end,
        "duplicates": list(plan.duplicates) or None,
    }


def insert_chunks(connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        connection.execute(sa.insert(tables.chunks), rows)


def add_chunks(connection: sa.Connection, job_id: UUID, plans: Sequence[ChunkPlan]) -> None:
    """More chunks for a batch that runs: parts of one it had."""
    if not plans:
        return
    job = connection.execute(
        sa.update(tables.jobs)
        .where(_jobs.id == job_id)
        .values(chunks_total=_jobs.chunks_total + len(plans))
        .returning(*tables.jobs.c)
    ).one()
    start = job.chunks_total - len(plans) + 1
    insert_chunks(
        connection,
        [
            chunk_row(job, seq=seq, kind=ChunkKind.INFER, plan=plan)
            for seq, plan in enumerate(plans, start=start)
        ],
    )


def _end_of(item: Done) -> JobState:
    """The state a one-item job ends in."""
    if isinstance(item.error, DeadlineExceeded):
        return JobState.EXPIRED
    return JobState.FAILED if item.error else JobState.SUCCEEDED


def finish_single(connection: sa.Connection, done: Sequence[Done]) -> None:
    if not done:
        return
    values = table(
        "done",
        [
            (
                item.claim.job_id,
                _end_of(item).value,
                item.output,
                item.output_key,
                item.error.to_wire() if item.error else None,
                item.items_ok,
            )
            for item in done
        ],
        id=sa.UUID(),
        state=sa.Text(),
        result=sa.LargeBinary(),
        result_key=sa.Text(),
        error=tables.JSON,
        ok=sa.BigInteger(),
    )
    ended = connection.execute(
        sa.update(tables.jobs)
        .where(_jobs.id == values.c.id, still(_jobs.state.in_(sources(JobState.SUCCEEDED))))
        .values(
            state=values.c.state,
            result=values.c.result,
            result_key=values.c.result_key,
            error=values.c.error,
            items_ok=values.c.ok,
            items_failed=1 - values.c.ok,
            chunks_done=1,
            finished_at=clock,
        )
        .returning(_jobs.id)
    )
    events.announce(connection, ended.scalars().all())


def fan_in(connection: sa.Connection, tallies: Mapping[UUID, Tally]) -> None:
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
            finalize(connection, job_id, JobState.FINALIZING, JobState.SUCCEEDED)


def finalize(connection: sa.Connection, job_id: UUID, state: JobState, outcome: JobState) -> None:
    """Stop running items of a batch and put its files together, to end in `outcome`."""
    entered = _jobs.finalizing_at if state is JobState.FINALIZING else _jobs.cancelling_at
    job = connection.execute(
        sa.update(tables.jobs)
        .where(_jobs.id == job_id, still(_jobs.state.in_(sources(state))))
        .values({"state": state.value, "outcome": outcome.value, entered.name: clock})
        .returning(*tables.jobs.c)
    ).one_or_none()
    if job is None:
        return
    plan = ChunkPlan(items=1, first_line=0, byte_start=0, byte_end=0)
    row = chunk_row(job, seq=job.chunks_total + 1, kind=ChunkKind.FINALIZE, plan=plan)
    insert_chunks(connection, [row])


def commit_control(connection: sa.Connection, claim: Claim) -> bool:
    return (
        connection.execute(
            sa.update(tables.chunks)
            .where(held([claim]))
            .values(state=ChunkState.DONE.value, finished_at=clock, lease_until=None)
        ).rowcount
        == 1
    )


def end_job(
    connection: sa.Connection,
    which: sa.ColumnElement[bool],
    state: JobState,
    error: dict[str, Any] | None,
) -> None:
    values: dict[str, Any] = {"state": state.value, "finished_at": clock}
    if error is not None:
        values["error"] = error
    ended = connection.execute(
        sa.update(tables.jobs)
        .where(which, still(_jobs.state.in_(sources(state))))
        .values(values)
        .returning(_jobs.id)
    )
    events.announce(connection, ended.scalars().all())


def bury(
    connection: sa.Connection, which: sa.ColumnElement[bool], error: TidegateError
) -> list[int]:
    """Declare chunks dead, with their jobs' rows locked, and let the jobs know."""
    rows = connection.execute(
        sa.update(tables.chunks)
        .where(which)
        .values(
            state=ChunkState.DEAD.value,
            finished_at=clock,
            lease_until=None,
            items_failed=_chunks.item_count,
            error=error.to_wire(),
            lease_token=_chunks.lease_token + 1,
        )
        .returning(_chunks.id, _chunks.job_id, _chunks.kind, _chunks.item_count.label("items"))
    ).all()
    kinds = {
        row.id: row.kind
        for row in connection.execute(
            sa.select(_jobs.id, _jobs.kind).where(_jobs.id.in_({row.job_id for row in rows}))
        )
    }
    tallies: dict[UUID, Tally] = {}
    for row in rows:
        if row.kind == ChunkKind.INFER and kinds[row.job_id] == JobKind.BATCH:
            tally = tallies.setdefault(row.job_id, Tally())
            tally.chunks += 1
            tally.failed += row.items
        else:
            end_job(connection, _jobs.id == row.job_id, JobState.FAILED, error.to_wire())
            if kinds[row.job_id] == JobKind.INFER:
                connection.execute(
                    sa.update(tables.jobs)
                    .where(_jobs.id == row.job_id)
                    .values(chunks_done=1, items_failed=1)
                )
    fan_in(connection, tallies)
    return [row.id for row in rows]


def stop_job(connection: sa.Connection, job: Row, chunk: ChunkState, outcome: JobState) -> JobState:
    """End a locked job's open chunks and the job; a batch that ran first gathers its files."""
    _stop_chunks(connection, [job.id], chunk)
    if job.kind == JobKind.BATCH and job.state == JobState.RUNNING:
        entering = JobState.CANCELLING if outcome is JobState.CANCELED else JobState.FINALIZING
        finalize(connection, job.id, entering, outcome)
        return entering
    _stop_jobs(connection, [job.id], outcome)
    return outcome


def stop_jobs(
    connection: sa.Connection, ids: Sequence[UUID], chunk: ChunkState, outcome: JobState
) -> None:
    """End locked jobs that have no files to gather, and their open chunks."""
    _stop_chunks(connection, ids, chunk)
    _stop_jobs(connection, ids, outcome)


def _stop_chunks(connection: sa.Connection, ids: Sequence[UUID], chunk: ChunkState) -> None:
    connection.execute(
        sa.update(tables.chunks)
        .where(_chunks.job_id.in_(ids), still(_chunks.state.in_(chunk_sources(chunk))))
        .values(
            state=chunk.value,
            finished_at=clock,
            lease_until=None,
            lease_token=_chunks.lease_token + 1,
        )
    )


def _stop_jobs(connection: sa.Connection, ids: Sequence[UUID], outcome: JobState) -> None:
    error = DeadlineExceeded("the job's deadline passed") if outcome is JobState.EXPIRED else None
    end_job(connection, _jobs.id.in_(ids), outcome, error.to_wire() if error else None)
