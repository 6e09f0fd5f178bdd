"""Chunks in the hands of workers: claim, renew, give back, commit.

A claim carries a fencing token; a commit whose token somebody newer has replaced changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from config import DAY
from errors import Retry, TidegateError
from storage import moves, tables
from storage.database import Database, Row
from storage.files import FileRow, insert_file
from storage.lifecycle import ChunkKind, ChunkState, JobKind, JobState
from storage.work import ChunkOutput, ChunkPlan, Claim, Done, Fate

_jobs, _batches, _chunks = tables.jobs.c, tables.batches.c, tables.chunks.c


@dataclass(frozen=True, slots=True)
class Chunks:
    """Every method is one transaction; safe to share between threads. `lease` is seconds."""

    database: Database
    lease: float = 30.0
    max_attempts: int = 3
    file_ttl: float = 30 * DAY

    def claim(self, ids: Iterable[int], worker: str) -> list[Claim]:
        """Take those of `ids` that may run now. A chunk finished, cancelled, expired, held by a
        live lease or out of attempts is left out: a message about it is only a message."""
        wanted = sorted(set(ids))
        if not wanted:
            return []
        with self.database.transaction() as connection:
            of_chunks = sa.select(_chunks.job_id).where(_chunks.id.in_(wanted))
            moves.lock_jobs(connection, _jobs.id.in_(of_chunks))
            claimed = connection.execute(
                sa.update(tables.chunks)
                .where(
                    _chunks.id.in_(wanted),
                    _chunks.job_id == _jobs.id,
                    moves.claimable(self.max_attempts),
                )
                .values(
                    state=ChunkState.RUNNING.value,
                    attempts=_chunks.attempts + 1,
                    lease_token=_chunks.lease_token + 1,
                    lease_until=moves.clock + moves.seconds(self.lease),
                    released_at=None,
                    hints=0,
                    worker=worker,
                )
                .returning(_chunks.id)
            ).scalars()
            held = sorted(claimed)
            if not held:
                return []
            rows = connection.execute(_CLAIMED, {"ids": held}).all()
            singles = {row.job_id for row in rows if row.job_kind == JobKind.INFER}
            if singles:
                connection.execute(
                    sa.update(tables.jobs)
                    .where(
                        _jobs.id.in_(singles),
                        moves.still(_jobs.state.in_([JobState.QUEUED, JobState.RUNNING])),
                    )
                    .values(
                        state=JobState.RUNNING.value,
                        started_at=sa.func.coalesce(_jobs.started_at, moves.now),
                        attempts=_jobs.attempts + 1,
                        worker=worker,
                    )
                )
            batches = {row.job_id for row in rows if row.job_kind == JobKind.BATCH}
            if batches:
                connection.execute(
                    sa.update(tables.jobs)
                    .where(_jobs.id.in_(batches), _jobs.started_at.is_(None))
                    .values(started_at=moves.now)
                )
        return [_claim(row, self.max_attempts) for row in rows]

    def renew(self, claims: Sequence[Claim]) -> None:
        """Lengthen the leases of those of these claims that still hold."""
        if not claims:
            return
        with self.database.transaction() as connection:
            # A row that somebody has locked is being committed or ended: no need to wait for it.
            connection.execute(
                sa.update(tables.chunks)
                .where(moves.some(moves.held(claims), limit=len(claims)))
                .values(lease_until=moves.clock + moves.seconds(self.lease))
            )

    def lost(self, claims: Sequence[Claim]) -> list[Claim]:
        """Those claims that hold no more: a newer owner, a cancel or a deadline."""
        if not claims:
            return []
        newest = moves.newest_tokens(claims)
        with self.database.transaction() as connection:
            rows = connection.execute(sa.select(_chunks.id).where(moves.held(claims)))
            held = set(rows.scalars())
        return [
            claim for claim in claims if claim.id not in held or claim.token != newest[claim.id]
        ]

    def retry(self, claims: Sequence[Claim], error: TidegateError, delay: float) -> dict[int, Fate]:
        """Give chunks back after a failed attempt, to run again after `delay` seconds, or declare
        them dead: as `errors.RETRIES` says of this error, and where attempts are used up."""
        if not claims:
            return {}
        fates = {claim.id: Fate.STALE for claim in claims}
        free = error.retry is Retry.FREE
        over = error.retry is Retry.NEVER
        spent = [claim for claim in claims if over or (claim.last and not free)]
        again = [claim for claim in claims if not over and (free or not claim.last)]
        with self.database.transaction() as connection:
            moves.lock_jobs(connection, _jobs.id.in_({claim.job_id for claim in claims}))
            if again:
                rows = connection.execute(
                    sa.update(tables.chunks)
                    .where(moves.held(again))
                    .values(
                        state=ChunkState.QUEUED.value,
                        attempts=_chunks.attempts - (1 if free else 0),
                        not_before=moves.clock + moves.seconds(delay),
                        lease_until=None,
                        error=error.to_wire(),
                    )
                    .returning(_chunks.id)
                )
                fates |= dict.fromkeys(rows.scalars(), Fate.RETRIED)
            if spent:
                dead = moves.bury(connection, moves.held(spent), error)
                fates |= dict.fromkeys(dead, Fate.DEAD)
        return fates

    def split(self, claim: Claim, plans: Sequence[ChunkPlan]) -> bool:
        """Put smaller chunks in the place of one whose attempts failed, each with attempts of its
        own, so that what is wrong with one of its items becomes the fate of that one only. `plans`
        are its items, in order. False: somebody newer owns it."""
        first, *rest = plans
        with self.database.transaction() as connection:
            moves.lock_jobs(connection, _jobs.id == claim.job_id)
            shrunk = connection.execute(
                sa.update(tables.chunks)
                .where(moves.held([claim]))
                .values(
                    state=ChunkState.QUEUED.value,
                    attempts=0,
                    not_before=moves.clock,
                    lease_until=None,
                    item_count=first.items,
                    first_line=first.first_line,
                    byte_start=first.byte_start,
                    byte_end=first.byte_end,
                    duplicates=list(first.duplicates) or None,
                )
            ).rowcount
            if not shrunk:
                return False
            moves.add_chunks(connection, claim.job_id, rest)
            return True

    def commit(self, done: Sequence[Done]) -> set[int]:
        """Commit attempts at infer chunks: the ids that were still ours. In the same transaction,
        what an attempt has left over becomes chunks of the job, and the last chunk of a job
        finishes it, or starts putting its files together."""
        if not done:
            return set()
        with self.database.transaction() as connection:
            moves.lock_jobs(connection, _jobs.id.in_({item.claim.job_id for item in done}))
            values = moves.table(
                "done",
                [
                    (
                        d.claim.id,
                        d.claim.token,
                        d.output_key,
                        d.error_key,
                        d.items_ok,
                        d.items_failed,
                        d.items_ok + d.items_failed if d.rest else d.claim.items,
                        d.rest[0].byte_start if d.rest else d.claim.byte_end,
                    )
                    for d in done
                ],
                id=sa.BigInteger(),
                token=sa.BigInteger(),
                output_key=sa.Text(),
                error_key=sa.Text(),
                items_ok=sa.BigInteger(),
                items_failed=sa.BigInteger(),
                item_count=sa.BigInteger(),
                byte_end=sa.BigInteger(),
            )
            committed = set(
                connection.execute(
                    sa.update(tables.chunks)
                    .where(
                        _chunks.id == values.c.id,
                        moves.fence(values.c.token),
                    )
                    .values(
                        state=ChunkState.DONE.value,
                        finished_at=moves.clock,
                        lease_until=None,
                        output_key=values.c.output_key,
                        error_key=values.c.error_key,
                        items_ok=values.c.items_ok,
                        items_failed=values.c.items_failed,
                        item_count=values.c.item_count,
                        byte_end=values.c.byte_end,
                    )
                    .returning(_chunks.id)
                ).scalars()
            )
            mine = [item for item in done if item.claim.id in committed]
            moves.finish_single(connection, [d for d in mine if d.claim.job_kind is JobKind.INFER])
            tallies: dict[UUID, moves.Tally] = {}
            for item in mine:
                if item.claim.job_kind is JobKind.BATCH:
                    tally = tallies.setdefault(item.claim.job_id, moves.Tally())
                    tally.chunks += 1
                    tally.ok += item.items_ok
                    tally.failed += item.items_failed
                    moves.add_chunks(connection, item.claim.job_id, item.rest)
            moves.fan_in(connection, tallies)
        return committed

    def commit_plan(
        self,
        claim: Claim,
        plans: Sequence[ChunkPlan],
        layout: Mapping[str, Any] | None = None,
        staged_key: str | None = None,
    ) -> bool:
        """Commit what reading the input file found: its chunks, what each has to know of it, and
        the object that their bytes are in where that is not the file. False: somebody newer owns
        it."""
        with self.database.transaction() as connection:
            moves.lock_jobs(connection, _jobs.id == claim.job_id)
            if not moves.commit_control(connection, claim):
                return False
            if layout is not None or staged_key is not None:
                connection.execute(
                    sa.update(tables.batches)
                    .where(_batches.job_id == claim.job_id)
                    .values(layout=layout, staged_key=staged_key)
                )
            job = connection.execute(
                sa.update(tables.jobs)
                .where(_jobs.id == claim.job_id, _jobs.state == JobState.QUEUED)
                .values(
                    state=JobState.RUNNING.value,
                    running_at=moves.clock,
                    chunks_total=len(plans),
                    items_total=sum(plan.items for plan in plans),
                )
                .returning(*tables.jobs.c)
            ).one()
            moves.insert_chunks(
                connection,
                [
                    moves.chunk_row(job, seq=seq, kind=ChunkKind.INFER, plan=plan)
                    for seq, plan in enumerate(plans, start=1)
                ],
            )
            return True

    def reject_plan(self, claim: Claim, errors: Sequence[Mapping[str, Any]]) -> bool:
        """The input file cannot be read: the batch failed validation."""
        with self.database.transaction() as connection:
            moves.lock_jobs(connection, _jobs.id == claim.job_id)
            if not moves.commit_control(connection, claim):
                return False
            connection.execute(
                sa.update(tables.batches)
                .where(_batches.job_id == claim.job_id)
                .values(errors=[dict(error) for error in errors])
            )
            moves.end_job(connection, _jobs.id == claim.job_id, JobState.FAILED, dict(errors[0]))
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
                # Not by `seq`: what a split made comes later, but stands between its neighbours.
                .order_by(_chunks.first_line)
            ).all()
        return [ChunkOutput(**{**row._mapping, "state": ChunkState(row.state)}) for row in rows]

    def commit_files(
        self, claim: Claim, output: FileRow | None, errors: FileRow | None, *, ok: int, failed: int
    ) -> bool:
        """Commit the files a batch ends with, and end it as its outcome says."""
        with self.database.transaction() as connection:
            moves.lock_jobs(connection, _jobs.id == claim.job_id)
            if not moves.commit_control(connection, claim):
                return False
            asked = connection.execute(
                sa.select(_batches.output_ttl).where(_batches.job_id == claim.job_id)
            ).scalar_one()
            for row in (output, errors):
                if row is not None:
                    insert_file(connection, row, self.file_ttl if asked is None else asked)
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
            moves.end_job(
                connection,
                _jobs.id == claim.job_id,
                JobState(claim.outcome or JobState.SUCCEEDED),
                None,
            )
            return True


def _claim(row: Row, max_attempts: int) -> Claim:
    values = dict(row._mapping)
    values["last"] = row.attempts >= max_attempts
    values["kind"] = ChunkKind(values["kind"])
    values["job_kind"] = JobKind(values["job_kind"])
    values["duplicates"] = tuple(values["duplicates"] or ())
    values["input"] = bytes(values["input"]) if values["input"] is not None else None
    values["remaining"] = float(values["remaining"])
    return Claim(**values)


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
        sa.extract("epoch", _jobs.deadline_at - moves.clock).label("remaining"),
        _jobs.input,
        _jobs.input_key,
        sa.func.coalesce(_batches.endpoint, "").label("endpoint"),
        sa.func.coalesce(_batches.staged_key, tables.files.c.object_key, "").label("file_key"),
        _jobs.outcome,
        (_jobs.chunks_total - _jobs.chunks_done).label("open_chunks"),
        _batches.arrays,
        _batches.layout,
    )
    .join(tables.jobs, _jobs.id == _chunks.job_id)
    .outerjoin(tables.batches, _batches.job_id == _jobs.id)
    .outerjoin(tables.files, tables.files.c.id == _batches.input_file_id)
    .where(_chunks.id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(_chunks.id)
)
