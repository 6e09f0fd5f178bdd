"""What the ledger promises, checked at every move.

`Oracle` makes each move on the real ledger, reads all rows back and compares them with what it
worked out for itself: who holds what until when, what was acknowledged, what time is left. What
it shares with the ledger are tables: the legal moves, what is tried again, what an end is called.
The clock is the database's own; to let time pass, every time in the rows moves back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat as uuids

from errors import Conflict, ModelFailed, NotFound, Retry, TidegateError
from storage.backlog import FILES_GRACE
from storage.database import Row
from storage.dead_letters import DeadLetters, LetterFilter
from storage.events import OF_END
from storage.files import FileRow, file_key
from storage.lifecycle import (
    CHUNK_MOVES,
    JOB_MOVES,
    ChunkKind,
    ChunkState,
    JobKind,
    JobState,
    Priority,
)
from storage.work import ChunkPlan, Claim, Done, Fate, Hint, NewBatch, NewJob
from tests.conftest import Ledger


class Broken(AssertionError):
    """The ledger broke a promise."""


class Moment(NamedTuple):
    """A time of the database's, as narrowly as a read before it and a read after it tell."""

    first: float
    last: float

    def plus(self, seconds: float) -> Moment:
        return Moment(self.first + seconds, self.last + seconds)


@dataclass(slots=True)
class Hold:
    """A claim in a worker's memory, and when its lease ends."""

    claim: Claim
    lease: Moment


@dataclass(slots=True)
class JobNote:
    """What we know of a job without the ledger."""

    tenant: UUID
    window: float
    """Seconds it was given."""
    deadline: Moment
    ending: float = float("inf")
    """When it began to put its files together, at the earliest."""
    cancelled: bool = False
    rejected: bool = False
    output: UUID | None = None


@dataclass(slots=True)
class ChunkNote:
    """What we know of a chunk without the ledger."""

    attempts: int = 0
    token: int = 0
    held: Hold | None = None
    """Who may commit it: until given back, taken over or ended."""
    not_before: float = 0.0
    """It may not run earlier, at the least."""
    released: float = 0.0
    """When its hint went out, at the earliest."""
    given_up: bool = False
    """A worker said that it will never do."""
    redriven: UUID | None = None
    done: Done | None = None
    """The commit that was acknowledged. Control chunks: with no output."""


@dataclass
class Oracle:
    """Moves of the ledger's, each followed by a look at every row of the group."""

    ledger: Ledger
    listening: UUID
    """The tenant with a webhook for every event."""
    input_files: Mapping[UUID, UUID]
    """One of each tenant's."""
    jobs: dict[UUID, JobNote] = field(default_factory=dict)
    chunks: dict[int, ChunkNote] = field(default_factory=dict)
    job_rows: Mapping[UUID, Row] = field(default_factory=dict)
    chunk_rows: Mapping[int, Row] = field(default_factory=dict)
    midway: bool = False
    """A move failed: what follows proves nothing."""
    _passed: float = 0.0
    _since: float = 0.0
    _now: float = 0.0

    def __post_init__(self) -> None:
        with self._move():
            self._read()

    # Clients

    def submit(self, count: int, tenant: UUID, priority: Priority, deadline: float) -> None:
        """Accept one-item jobs."""
        jobs = [self._new(tenant, priority, deadline, input=b"input") for _ in range(count)]
        with self._move():
            self.ledger.jobs.submit(jobs)
            self._accepted(jobs)

    def submit_batch(self, tenant: UUID, priority: Priority, deadline: float) -> None:
        """Accept a batch."""
        job = self._new(tenant, priority, deadline)
        with self._move():
            self.ledger.jobs.submit_batch(
                job, NewBatch("/v2/models/digits/infer", "24h", self.input_files[tenant])
            )
            self._accepted([job])

    def _new(self, tenant: UUID, priority: Priority, deadline: float, **fields: Any) -> NewJob:
        return NewJob(
            id=uuids.uuid7(),
            tenant_id=tenant,
            group=self.ledger.group,
            model="digits",
            version="",
            deadline=deadline,
            priority=priority,
            **fields,
        )

    def _accepted(self, jobs: Sequence[NewJob]) -> None:
        self._read()
        for job in jobs:
            self._note(job.id, job.tenant_id, job.deadline)

    def _note(self, job_id: UUID, tenant: UUID, window: float) -> None:
        deadline = Moment(self._since, self._now).plus(window)
        self.jobs[job_id] = JobNote(tenant, window, deadline)

    def cancel(self, job_id: UUID, tenant: UUID) -> None:
        """Call a job off, as this tenant."""
        note, before = self.jobs[job_id], JobState(self.job_rows[job_id].state)
        with self._move():
            try:
                answer: JobState | None = self.ledger.jobs.cancel(tenant, job_id)
            except NotFound:
                self._read()
                self._expect(tenant != note.tenant, "a tenant's own job was not found")
                return
            except Conflict:
                self._read()
                over = before.terminal or before is JobState.FINALIZING
                self._expect(over, f"a job that is {before} could not be cancelled")
                return
            self._read()
            self._expect(tenant == note.tenant, "a stranger cancelled a job")
            self._expect(answer == self.job_rows[job_id].state, "cancel answered a wrong state")
            note.cancelled = True

    def redrive(self, chunk: int, tenant: UUID) -> None:
        """Run a dead letter again; it may be none."""
        old, note = self.chunk_rows[chunk], self.chunks[chunk]
        owner = self.jobs[old.job_id]
        theirs = old.state == "dead" and owner.tenant == tenant
        with self._move():
            try:
                made = self._letters.redrive(tenant, chunk)
            except NotFound:
                self._read()
                self._expect(not theirs, "a dead letter was not found")
                return
            self._read()
            self._expect(theirs, "what is no dead letter of theirs was run again")
            if note.redriven is None:
                self._redriven(old.job_id, [chunk], made)
            self._expect(made == note.redriven, "a dead letter was run again twice")

    def redrive_all(self, job_id: UUID, tenant: UUID) -> None:
        """Run the dead letters of a job again that have not been."""
        letters = [
            row.id
            for row in self.chunk_rows.values()
            if row.job_id == job_id and row.state == "dead" and not self.chunks[row.id].redriven
        ]
        due = letters if self.jobs[job_id].tenant == tenant else []
        with self._move():
            made = self._letters.redrive_all(tenant, LetterFilter(job_id=job_id), limit=100)
            self._read()
            self._expect(made.letters == len(due), "not every letter was run again once")
            for new in made.jobs:
                self._redriven(job_id, due, new)

    @property
    def _letters(self) -> DeadLetters:
        return DeadLetters(self.ledger.database)

    def _redriven(self, old: UUID, letters: Sequence[int], new: UUID) -> None:
        self._note(new, self.jobs[old].tenant, self.jobs[old].window)
        for chunk in letters:
            self.chunks[chunk].redriven = new
        asked = [self.chunk_rows[chunk] for chunk in letters]
        if all(row.kind == ChunkKind.INFER for row in asked):
            items = sum(row.items for row in asked)
            self._expect(self.job_rows[new].items_total == items, "a redrive asks something else")

    # The pump, the sweeper and time

    def release(self, limit: int | None = None) -> list[Hint]:
        """Pump once, with so many hints' worth about."""
        before, about = self._waiting_in_broker(), self._about()
        with self._move():
            hints = self.ledger.backlog.release(self.ledger.group, limit)
            self._read()
            named = [chunk for hint in hints for chunk in hint.ids]
            self._expect(len(named) == len(set(named)), "one release named a chunk twice")
            for chunk in named:
                self._expect(self.chunk_rows[chunk].state == "released", "hinted, not released")
                self.chunks[chunk].released = self._since
            # The last chunk may overdraw, so that a chunk larger than the credit gets its turn.
            largest = max((row.items for row in self.chunk_rows.values()), default=0)
            most = max(before, self.ledger.backlog.credit + largest - 1)
            self._expect(self._waiting_in_broker() <= most, "more released than the credit")
            if limit is not None and about >= limit:
                self._expect(not hints, "more about than may be")
        return hints

    def _about(self) -> int:
        """Parts of batches in the broker or running: each is worth a hint, whatever else is."""
        return sum(
            row.state in ("released", "running") and self.job_rows[row.job_id].kind == JobKind.BATCH
            for row in self.chunk_rows.values()
        )

    def _waiting_in_broker(self) -> int:
        return sum(row.items for row in self.chunk_rows.values() if row.state == "released")

    def sweep(self) -> None:
        """Sweep once: what is taken from somebody must have been silent."""
        before = self.chunk_rows
        with self._move():
            self.ledger.backlog.sweep()
            self._read()
            for chunk, old in before.items():
                note, state = self.chunks[chunk], self.chunk_rows[chunk].state
                if old.state == "running" and state in ("queued", "dead"):
                    assert note.held
                    self._expect(note.held.lease.first <= self._now, "a living lease was swept")
                    note.held = None
                if old.state == "released" and state == "queued":
                    silent = note.released + self.ledger.backlog.hint_timeout <= self._now
                    self._expect(silent, "a fresh hint was swept")

    def stranded(self) -> list[int]:
        """Control chunks that the sweeper would do itself."""
        found = self.ledger.backlog.stranded()
        return [chunk for chunk in found if chunk in self.chunk_rows]

    def advance(self, seconds: float) -> None:
        """Let time pass for this group."""
        with self._move():
            self.ledger.sql(_ADVANCE, seconds=seconds, group=self.ledger.group)
            self._passed += seconds
            self._read()

    # Workers

    def claim(self, ids: Iterable[int], worker: str) -> list[Hold]:
        """Claim what a message names."""
        wanted, before = set(ids), self.chunk_rows
        with self._move():
            claims = self.ledger.chunks.claim(wanted, worker)
            self._read()
            holds = []
            for claim in claims:
                self._expect(claim.id in wanted, "a chunk was claimed that nobody asked for")
                old, note = before[claim.id], self.chunks[claim.id]
                job = self.jobs[claim.job_id]
                self._expect(not ChunkState(old.state).terminal, f"a {old.state} chunk was claimed")
                self._expect(
                    note.held is None or note.held.lease.first <= self._now,
                    "two living leases on one chunk",
                )
                self._expect(claim.token > note.token, "a fencing token did not grow")
                self._expect(
                    claim.kind is ChunkKind.FINALIZE or job.deadline.last > self._since,
                    "a chunk was claimed after its deadline",
                )
                self._expect(note.not_before <= self._now, "a chunk was claimed before its time")
                note.attempts += 1
                last = note.attempts >= self.ledger.chunks.max_attempts
                self._expect(claim.last == last, "a claim is wrong about being the last")
                note.token = claim.token
                note.held = Hold(claim, self._lease())
                holds.append(note.held)
            for row in self.chunk_rows.values():
                claimed = row.state == "running" and row.attempts > self.chunks[row.id].attempts
                self._expect(not claimed, "a chunk was claimed and nobody told")
        return holds

    def _lease(self) -> Moment:
        return Moment(self._since, self._now).plus(self.ledger.chunks.lease)

    def renew(self, holds: Sequence[Hold]) -> None:
        """Renew leases: those still held are kept, the others named."""
        current = [hold for hold in holds if self._current(hold)]
        claims = [hold.claim for hold in holds]
        with self._move():
            self.ledger.chunks.renew(claims)
            lost = self.ledger.chunks.lost(claims)
            self._read()
            for hold in holds:
                if hold not in current:
                    kept = hold.claim not in lost
                    self._expect(not kept, "somebody was not told that their lease is lost")
            for hold in current:
                self._expect(hold.claim not in lost, "a lease was lost to nobody")
                hold.lease = self._lease()

    def retry(self, hold: Hold, error: TidegateError, delay: float) -> None:
        """Give a chunk back after a failed attempt."""
        current, note = self._current(hold), self.chunks[hold.claim.id]
        with self._move():
            fates = self.ledger.chunks.retry([hold.claim], error, delay)
            self._read()
            if not current:
                stale = fates == {hold.claim.id: Fate.STALE}
                self._expect(stale, "somebody gave back a chunk that was not theirs")
                return
            free = error.retry is Retry.FREE
            note.given_up = error.retry is Retry.NEVER
            spent = note.attempts >= self.ledger.chunks.max_attempts and not free
            fate = Fate.DEAD if note.given_up or spent else Fate.RETRIED
            self._expect(fates == {hold.claim.id: fate}, f"given back, and not {fate.value}")
            note.held = None
            note.attempts -= 1 if free else 0
            note.not_before = self._since + delay

    def split(self, hold: Hold, size: int) -> None:
        """Put chunks of so many items in the place of one that keeps failing."""
        claim, current = hold.claim, self._current(hold)
        end = claim.first_line + claim.items
        plans = _plans(
            claim.first_line,
            [min(size, end - line) for line in range(claim.first_line, end, size)],
        )
        before = len(self.chunk_rows)
        with self._move():
            ours = self.ledger.chunks.split(claim, plans)
            self._read()
            self._expect(ours == current, "a chunk was split by the wrong worker, or not at all")
            made = len(self.chunk_rows) - before
            self._expect(made == (len(plans) - 1 if ours else 0), "split into other pieces")
            if ours:
                note = self.chunks[claim.id]
                note.held, note.attempts = None, 0

    def commit(self, holds: Sequence[Hold], fail: bool) -> None:
        """Commit attempts at infer chunks, in one transaction: right, or with failed items."""
        # The newest last: a worker may hold a chunk that it took over from itself.
        holds = sorted(holds, key=lambda hold: hold.claim.token)
        done = [self._outcome(hold, fail) for hold in holds]
        current = {hold.claim.id for hold in holds if self._current(hold)}
        with self._move():
            acknowledged = self.ledger.chunks.commit(done)
            self._read()
            self._committed({item.claim.id: item for item in done}, current, acknowledged)

    def stop_early(self, hold: Hold, items: int, size: int) -> None:
        """Commit so many items of a batch's chunk, and leave the others as chunks of that size."""
        claim, current = hold.claim, self._current(hold)
        middle, end = claim.first_line + items, claim.first_line + claim.items
        sizes = [min(size, end - line) for line in range(middle, end, size)]
        rest = tuple(_plans(middle, sizes))
        done = Done(claim, items, 0, output_key=claim.key("output"), rest=rest)
        before = len(self.chunk_rows)
        with self._move():
            acknowledged = self.ledger.chunks.commit([done])
            self._read()
            self._committed({claim.id: done}, {claim.id} if current else set(), acknowledged)
            made = len(self.chunk_rows) - before
            # The last item of a batch brings its finalizer.
            self._expect(
                made == (len(rest) if current else 0) or not rest,
                "left other chunks than were asked for",
            )
            if current and rest:
                row = self.chunk_rows[claim.id]
                self._expect(row.items == items, "a chunk kept more items than were run")

    def _outcome(self, hold: Hold, fail: bool) -> Done:
        claim = hold.claim
        if claim.job_kind is JobKind.BATCH:
            failed = (claim.items + 1) // 2 if fail else 0
            ok = claim.items - failed
            return Done(claim, ok, failed, output_key=claim.key("output") if ok else None)
        if fail:
            return Done(claim, 0, 1, error=ModelFailed("not this item"))
        return Done(claim, 1, 0, output=claim.key("output").encode())

    def commit_plan(self, hold: Hold, sizes: Sequence[int]) -> None:
        """Cut a batch into chunks of so many items, or find that its file can't be read."""
        current = {hold.claim.id} if self._current(hold) else set()
        plans = _plans(1, sizes)
        with self._move():
            if plans:
                ours = self.ledger.chunks.commit_plan(hold.claim, plans)
            else:
                ours = self.ledger.chunks.reject_plan(hold.claim, [{"code": "empty_file"}])
            self._read()
            acknowledged = {hold.claim.id} if ours else set()
            self._committed({hold.claim.id: Done(hold.claim, 0, 0)}, current, acknowledged)
            if ours and not plans:
                self.jobs[hold.claim.job_id].rejected = True

    def commit_files(self, hold: Hold) -> None:
        """Put a batch's files together from what its chunks committed."""
        claim = hold.claim
        current = {claim.id} if self._current(hold) else set()
        parts = self.ledger.chunks.chunk_outputs(claim)
        for one, next_one in pairwise(parts):
            apart = one.first_line + one.items <= next_one.first_line
            self._expect(apart, "a batch's chunks are out of order, or overlap")
        ok = sum(part.items_ok for part in parts)
        failed = sum(part.items for part in parts) - ok
        file_id = uuids.uuid7()
        key = file_key(claim.tenant_id, file_id)
        file = FileRow(file_id, claim.tenant_id, "batch_output", self.ledger.group, 1, key)
        with self._move():
            ours = self.ledger.chunks.commit_files(claim, file, None, ok=ok, failed=failed)
            self._read()
            acknowledged = {claim.id} if ours else set()
            self._committed({claim.id: Done(claim, 0, 0)}, current, acknowledged)
            if ours:
                self.jobs[claim.job_id].output = file_id

    def _committed(
        self, done: Mapping[int, Done], current: set[int], acknowledged: set[int]
    ) -> None:
        for chunk in acknowledged:
            note = self.chunks[chunk]
            self._expect(note.done is None, "two commits of one chunk were acknowledged")
            self._expect(chunk in current, "a stale commit was acknowledged")
            note.done, note.held = done[chunk], None
        self._expect(acknowledged >= current, "the holder's commit was refused")

    def _current(self, hold: Hold) -> bool:
        """Nobody took the chunk over, and neither it nor its job has ended."""
        row = self.chunk_rows[hold.claim.id]
        return self.chunks[row.id].held is hold and row.state == "running"

    # What must hold after every move

    @contextmanager
    def _move(self) -> Iterator[None]:
        self.midway = True
        self._since = self._now
        yield
        for row in self.chunk_rows.values():
            self._check_chunk(row)
        for job in self.job_rows.values():
            self._check_job(job)
        self.midway = False

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise Broken(otherwise)

    def _read(self) -> None:
        jobs, chunks = self.job_rows, self.chunk_rows
        with self.ledger.database.transaction() as connection:
            found = connection.execute(_JOBS, {"group": self.ledger.group})
            self.job_rows = {row.id: row for row in found}
            found = connection.execute(_CHUNKS, {"group": self.ledger.group})
            self.chunk_rows = {row.id: row for row in found}
            clock: float = connection.execute(_CLOCK).scalar_one()
        self._now = clock + self._passed
        _check_moves("job", jobs, self.job_rows, JOB_MOVES)
        _check_moves("chunk", chunks, self.chunk_rows, CHUNK_MOVES)
        for chunk in self.chunk_rows:  # in their order, so that a seed means one walk
            self.chunks.setdefault(chunk, ChunkNote())
        for job_id, note in self.jobs.items():
            if self.job_rows[job_id].state in ("finalizing", "cancelling"):
                note.ending = min(note.ending, self._since)

    def _check_chunk(self, row: Row) -> None:
        note, done = self.chunks[row.id], self.chunks[row.id].done
        most = self.ledger.chunks.max_attempts
        # That workers died while they put answers together is chance: there is no cap on that.
        capped = row.kind != ChunkKind.FINALIZE
        self._expect(row.attempts <= most or not capped, "more attempts than the cap")
        self._expect(row.attempts == note.attempts, "attempts are counted wrongly")
        self._expect((row.state == "done") == (done is not None), "done without a commit")
        if row.state == "dead" and row.attempts < most and not note.given_up:
            job = self.jobs[row.job_id]
            late = max(job.deadline.first, job.ending) + FILES_GRACE <= self._now
            self._expect(row.kind == ChunkKind.FINALIZE and late, "dead with attempts left")
        if done:
            kept = (row.items_ok, row.items_failed, row.output_key)
            given = (done.items_ok, done.items_failed, done.output_key)
            self._expect(kept == given, "the chunk holds another result than was acknowledged")

    def _check_job(self, job: Row) -> None:
        note, state = self.jobs[job.id], JobState(job.state)
        parts = [row for row in self.chunk_rows.values() if row.job_id == job.id]
        still = {row.kind for row in parts if not ChunkState(row.state).terminal}
        self._expect(bool(still) != state.terminal, f"a job is {state} with open chunks {still}")
        if state in (JobState.FINALIZING, JobState.CANCELLING):
            self._expect(still == {"finalize"}, f"a job is {state} with open chunks {still}")
        if job.kind == JobKind.BATCH:
            self._check_batch(job, [row for row in parts if row.kind == ChunkKind.INFER])
        else:
            self._check_single(job, *parts)
        ended = [OF_END[JobKind(job.kind), state]] if state.terminal else []
        heard = ended if note.tenant == self.listening else []
        self._expect(job.events == heard, f"a job is {state}, and its events are {job.events}")
        self._expect(state != "canceled" or note.cancelled, "canceled, and nobody asked")
        over = note.deadline.first <= self._now
        self._expect(state != "expired" or over, "expired before its deadline")
        if state.terminal and note.cancelled:
            asked = state is JobState.CANCELED or any(row.state == "dead" for row in parts)
            self._expect(asked, f"a cancelled job ended {state}")

    def _check_single(self, job: Row, chunk: Row) -> None:
        done = self.chunks[chunk.id].done
        kept = bytes(job.result) if job.result is not None else None
        self._expect(
            kept == (done.output if done else None),
            "the job holds another result than was acknowledged",
        )
        if done:
            state = JobState.FAILED if done.error else JobState.SUCCEEDED
            self._expect(job.state == state, f"an item was committed, and its job is {job.state}")
            counted = (job.items_ok, job.items_failed, job.chunks_done)
            self._expect(counted == (done.items_ok, done.items_failed, 1), "counters are wrong")
        else:
            self._expect(job.state != "succeeded", "succeeded without a commit")
            dead = chunk.state == "dead"
            self._expect(job.state != "failed" or dead, "failed without a cause")

    def _check_batch(self, job: Row, parts: Sequence[Row]) -> None:
        note = self.jobs[job.id]
        done = [item for row in parts if (item := self.chunks[row.id].done)]
        dead = [row for row in parts if row.state == "dead"]
        ok = sum(item.items_ok for item in done)
        failed = sum(item.items_failed for item in done) + sum(row.items for row in dead)
        if note.output:
            # The finalizer counts what never ran as failed.
            failed = job.items_total - ok
        self._expect(
            (job.items_ok, job.items_failed) == (ok, failed), "a batch's items don't add up"
        )
        self._expect(job.chunks_done == len(done) + len(dead), "a batch's chunks don't add up")
        self._expect(job.output_file_id == note.output, "a batch has another file than was given")
        self._expect(
            sum(row.items for row in parts) == job.items_total, "a batch lost some of its items"
        )
        if job.state in ("succeeded", "finalizing") and job.outcome == "succeeded":
            self._expect(ok + failed == job.items_total, "a batch ended before its items did")
        control = [
            row for row in self.chunk_rows.values() if row.job_id == job.id and row not in parts
        ]
        if job.state == "failed":
            caused = note.rejected or any(row.state == "dead" for row in control)
            self._expect(caused, "failed without a cause")


def _check_moves(
    what: str, before: Mapping[Any, Row], after: Mapping[Any, Row], moves: Mapping[Any, Any]
) -> None:
    for key, old in before.items():
        new = after.get(key)
        if new is None:
            raise Broken(f"a {what} vanished")
        if not moves[old.state] and new != old:
            raise Broken(f"a {what} that was {old.state} changed: {old} became {new}")
        if new.state != old.state and new.state not in moves[old.state]:
            raise Broken(f"a {what} went from {old.state} to {new.state}")
    for key in after.keys() - before.keys():
        # Dead letters of a batch become a job whose file has been read in.
        begun = ("queued", "running") if what == "job" and after[key].redrive_of else ("queued",)
        if after[key].state not in begun:
            raise Broken(f"a {what} began as {after[key].state}")


def _plans(line: int, sizes: Iterable[int]) -> list[ChunkPlan]:
    plans = []
    for items in sizes:
        plans.append(ChunkPlan(items, line, line * 10, (line + items) * 10))
        line += items
    return plans


_CLOCK = sa.text("SELECT extract(epoch FROM clock_timestamp())::float8")
_JOBS = sa.text(
    "SELECT id, kind, state, outcome, result, chunks_done, items_total, items_ok, items_failed,"
    " redrive_of, batches.output_file_id,"
    " ARRAY(SELECT event FROM deliveries WHERE deliveries.job_id = jobs.id) AS events"
    " FROM jobs LEFT JOIN batches ON batches.job_id = jobs.id WHERE group_name = :group"
)
_CHUNKS = sa.text(
    "SELECT id, job_id, kind, state, attempts, item_count AS items, items_ok, items_failed,"
    " output_key FROM chunks WHERE group_name = :group ORDER BY id"
)
_ADVANCE = """
    WITH step AS (SELECT make_interval(secs => :seconds) AS step),
    moved AS (
        UPDATE chunks
           SET created_at = created_at - step, not_before = not_before - step,
               released_at = released_at - step, lease_until = lease_until - step,
               finished_at = finished_at - step
          FROM step WHERE group_name = :group
    )
    UPDATE jobs
       SET created_at = created_at - step, deadline_at = deadline_at - step,
           finalizing_at = finalizing_at - step, cancelling_at = cancelling_at - step,
           finished_at = finished_at - step
      FROM step WHERE group_name = :group
"""
