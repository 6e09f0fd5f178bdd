"""The backlog: what may go to the broker next, and what nobody is working on.

A chunk row is its own outbox entry: until `released`, `release` finds it; released and silent,
`sweep` finds it; claimed and silent, its lease runs out. So no message is ever needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa

from errors import ModelFailed, Unavailable
from storage import fairness, moves, tables
from storage.database import Database, Row
from storage.lifecycle import ChunkKind, ChunkState, JobKind, JobState
from storage.work import Hint, Swept

_jobs, _chunks = tables.jobs.c, tables.chunks.c

CANDIDATES = 1024
"""Chunks of one tenant the pump looks at in one go."""
HINT_CHUNKS = 128
"""Most one-item chunks named by one hint: keeps the message below 4 KiB, whatever their ids."""
MOST_AHEAD = 1000
"""Chunks counted before one that waits: what is further away than this is just far away."""
LEAST_ROOM = 8 * HINT_CHUNKS
"""Room for hints in the broker, in shares of a hint, where nothing runs yet."""


EXPIRE_PAGES = 40
"""Most times that one sweep looks for more jobs whose deadline has passed."""
FILES_GRACE = 60.0
"""Seconds in which a batch's files may still be put together, after its deadline and after its
last item."""


@dataclass(frozen=True, slots=True)
class _Load:
    """What chunks of one state weigh: their items, and their shares of hints. `taken`: of the hints
    they came by, where a claim has counted as an attempt since."""

    items: int
    room: int
    taken: int


@dataclass(frozen=True, slots=True)
class Backlog:
    """Every method is safe to run from many processes at once."""

    database: Database
    max_attempts: int = 3
    credit: int = 4096
    """Items per group that may wait in the broker."""
    hint_timeout: float = 10.0
    """Seconds a released chunk may stay unclaimed."""

    def release(self, group: str, most: int | None = None) -> list[Hint]:
        """Move work from the ledger towards the broker: as much as the group's credit allows, by
        priority class, then fairly between tenants. Publish the hints after this returns; one that
        gets lost is found by `sweep`.

        `most`: hints' worth that may run or be in the broker, both together.
        """
        with self.database.transaction() as connection:
            if not self._priorities(connection, group):
                return []
            # One pump per group at a time. Waiting for it, not skipping: its snapshot may be older
            # than the row that made us call.
            connection.execute(
                sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext(f"pump:{group}")))
            )
            released, running = self._loads(connection, group)
            budget = self.credit - released.items
            # Twice what runs now: a few seconds of work, whatever a chunk takes and however many
            # workers there are. More would only make the urgent wait behind the released.
            room = max(LEAST_ROOM, 2 * running.room) - released.room
            if most is not None:
                room = min(room, most * HINT_CHUNKS - running.taken - released.room)
            picked: list[int] = []
            for priority in self._priorities(connection, group):
                if budget <= 0 or room <= 0:
                    break
                chosen = self._choose(connection, group, priority, budget, room)
                budget -= sum(chunk.items for chunk in chosen)
                room -= sum(chunk.room for chunk in chosen)
                picked += [chunk.id for chunk in chosen]
            if not picked:
                return []
            rows = connection.execute(
                sa.update(tables.chunks)
                .where(_chunks.id.in_(picked), moves.still(_chunks.state == ChunkState.QUEUED))
                .values(
                    state=ChunkState.RELEASED.value,
                    released_at=moves.clock,
                    hints=_chunks.hints + 1,
                )
                .returning(
                    _chunks.id,
                    _chunks.model,
                    _chunks.version,
                    (_ROOM == 1).label("shares"),
                    sa.and_(_chunks.attempts > 0, _chunks.attempts >= self.max_attempts - 1).label(
                        "alone"
                    ),
                )
            ).all()
        order = {chunk: place for place, chunk in enumerate(picked)}
        return _hints(group, sorted(rows, key=lambda row: order[row.id]))

    def _priorities(self, connection: sa.Connection, group: str) -> Sequence[int]:
        """The classes in which something waits, the most urgent one first."""
        return connection.execute(_PRIORITIES, {"group": group}).scalars().all()

    def _loads(self, connection: sa.Connection, group: str) -> tuple[_Load, _Load]:
        """What is in the broker, and what runs."""
        rows = connection.execute(
            sa.select(
                _chunks.state,
                sa.func.sum(_chunks.item_count).label("items"),
                sa.func.sum(_ROOM).label("room"),
                sa.func.sum(_TAKEN).label("taken"),
            )
            .where(
                _chunks.group_name == group,
                _chunks.state.in_([ChunkState.RELEASED, ChunkState.RUNNING]),
            )
            .group_by(_chunks.state)
        )
        loads = {row.state: _Load(int(row.items), int(row.room), int(row.taken)) for row in rows}
        nothing = _Load(0, 0, 0)
        return loads.get(ChunkState.RELEASED, nothing), loads.get(ChunkState.RUNNING, nothing)

    def _choose(
        self, connection: sa.Connection, group: str, priority: int, budget: int, room: int
    ) -> list[fairness.Waiting]:
        rows = connection.execute(
            _CANDIDATES,
            {
                "group": group,
                "priority": priority,
                # Each is locked, so not many more than can be picked; but one more, so that nobody
                # seems to have nothing left who has.
                "limit": min(CANDIDATES, budget, room) + 1,
                "whole": HINT_CHUNKS,
            },
        ).all()
        if not rows:
            return []
        backlog: dict[UUID, list[fairness.Waiting]] = {}
        waiting: dict[int, fairness.Waiting] = {}
        for row in rows:
            waiting[row.id] = fairness.Waiting(row.id, row.items, row.room)
            backlog.setdefault(row.tenant_id, []).append(waiting[row.id])
        share = tables.shares.c
        mine = sa.and_(share.group_name == group, share.priority == priority)
        deficits = {
            row.tenant_id: row.deficit
            for row in connection.execute(sa.select(share.tenant_id, share.deficit).where(mine))
        }
        weights = {row.tenant_id: row.weight for row in rows}
        choice = fairness.choose(backlog, deficits, weights, budget, room)
        if dict(choice.deficits) != deficits:
            connection.execute(sa.delete(tables.shares).where(mine))
            if choice.deficits:
                connection.execute(
                    sa.insert(tables.shares),
                    [
                        {
                            "group_name": group,
                            "priority": priority,
                            "tenant_id": tenant,
                            "deficit": deficit,
                        }
                        for tenant, deficit in choice.deficits.items()
                    ],
                )
        return [waiting[chunk] for chunk in choice.picked]

    def groups(self) -> list[str]:
        """Groups with work that could be released."""
        with self.database.transaction() as connection:
            return list(connection.execute(_GROUPS).scalars())

    def position(self, tenant_id: UUID, job_id: UUID) -> int | None:
        """How many chunks of its group would run before this job begins, up to `MOST_AHEAD`, as if
        all were one tenant's: those of a more urgent class, and the older ones of its own. None
        where nothing of it waits."""
        with self.database.transaction() as connection:
            mine = connection.execute(
                sa.select(_chunks.id, _chunks.state, _chunks.group_name, _chunks.priority)
                .where(
                    _chunks.job_id == job_id,
                    _chunks.tenant_id == tenant_id,
                    _chunks.state.in_([ChunkState.QUEUED, ChunkState.RELEASED]),
                )
                .order_by(_chunks.seq)
                .limit(1)
            ).one_or_none()
            if mine is None:
                return None
            place = {"group": mine.group_name, "priority": mine.priority, "id": mine.id}
            ahead = _AHEAD_QUEUED if mine.state == ChunkState.QUEUED else _AHEAD_RELEASED
            return int(connection.execute(ahead, place | {"most": MOST_AHEAD}).scalar_one())

    def stranded(self, limit: int = 8) -> list[int]:
        """Chunks that need no model, and that no GPU worker comes for: nobody has claimed them for
        as long as a hint may be silent, or their job's deadline has passed."""
        with self.database.transaction() as connection:
            return list(
                connection.execute(
                    sa.select(_chunks.id)
                    .join(tables.jobs, _jobs.id == _chunks.job_id)
                    .where(
                        _chunks.kind.in_([ChunkKind.PLAN, ChunkKind.FINALIZE]),
                        _chunks.state.in_([ChunkState.QUEUED, ChunkState.RELEASED]),
                        _chunks.not_before <= moves.now,
                        sa.or_(
                            _chunks.created_at < moves.now - moves.seconds(self.hint_timeout),
                            _jobs.deadline_at < moves.now,
                        ),
                    )
                    .order_by(_chunks.id)
                    .limit(limit)
                ).scalars()
            )

    def rehint(self, group: str) -> None:
        """A worker has arrived: what it may not have heard of, it is told again."""
        with self.database.transaction() as connection:
            connection.execute(
                sa.update(tables.chunks)
                .where(
                    moves.some(
                        _chunks.group_name == group,
                        moves.unclaimed(self.hint_timeout, doubled=False),
                        limit=self.credit,
                    )
                )
                .values(state=ChunkState.QUEUED.value, released_at=None, hints=0)
            )

    def sweep(self, limit: int = 500) -> Swept:
        """Find what nobody is working on: expired leases, silent hints, passed deadlines. One kind
        that can't be dealt with holds up no other; then it is raised at the end."""
        found: dict[str, int] = {}
        failed: Unavailable | None = None
        for name, stage in (
            ("leases", self._sweep_leases),
            ("hints", self._sweep_hints),
            ("dead", self._sweep_dead),
            ("expired", self._sweep_deadlines),
        ):
            try:
                found[name] = stage(limit)
            except Unavailable as error:
                failed = error
        if failed is not None:
            raise failed
        return Swept(**found)

    def _sweep_leases(self, limit: int) -> int:
        with self.database.transaction() as connection:
            again = moves.may_run_again(self.max_attempts)
            return connection.execute(
                sa.update(tables.chunks)
                .where(moves.some(moves.lapsed(), again, limit=limit))
                .values(state=ChunkState.QUEUED.value, not_before=moves.now, lease_until=None)
            ).rowcount

    def _sweep_hints(self, limit: int) -> int:
        with self.database.transaction() as connection:
            return connection.execute(
                sa.update(tables.chunks)
                .where(moves.some(moves.unclaimed(self.hint_timeout), limit=limit))
                .values(state=ChunkState.QUEUED.value, released_at=None)
            ).rowcount

    def _sweep_dead(self, limit: int) -> int:
        lapsed = sa.and_(moves.lapsed(), sa.not_(moves.may_run_again(self.max_attempts)))
        with self.database.transaction() as connection:
            found = sa.select(_chunks.job_id).where(lapsed).limit(limit)
            jobs = moves.lock_jobs(connection, _jobs.id.in_(found), skip=True)
            if not jobs:
                return 0
            mine = sa.and_(lapsed, _chunks.job_id.in_([job.id for job in jobs]))
            error = ModelFailed(f"every worker that tried this died: {self.max_attempts} attempts")
            return len(moves.bury(connection, mine, error))

    def _sweep_deadlines(self, limit: int) -> int:
        return self._expire(limit) + self._give_up(limit)

    def _give_up(self, limit: int) -> int:
        """Fail batches whose files nobody could put together though their time is over: a store
        that stays away must not keep a job from its end. What the sweep ends late, because nobody
        swept for long, has its time for that too."""
        grace = moves.now - moves.seconds(FILES_GRACE)
        late = sa.and_(
            _jobs.deadline_at < grace,
            sa.func.coalesce(_jobs.cancelling_at, _jobs.finalizing_at) < grace,
            _jobs.state.in_([JobState.FINALIZING, JobState.CANCELLING]),
        )
        idle = sa.and_(
            _chunks.kind == ChunkKind.FINALIZE,
            _chunks.state.in_([ChunkState.QUEUED, ChunkState.RELEASED]),
        )
        with self.database.transaction() as connection:
            jobs = moves.lock_jobs(connection, _first(late, limit), skip=True)
            if not jobs:
                return 0
            mine = sa.and_(idle, _chunks.job_id.in_([job.id for job in jobs]))
            error = Unavailable("its files could not be put together before its time was over")
            return len(moves.bury(connection, mine, error))

    def _expire(self, limit: int) -> int:
        """However many are due: a deadline is a promise."""
        due = sa.and_(
            _jobs.deadline_at < moves.now, _jobs.state.in_([JobState.QUEUED, JobState.RUNNING])
        )
        gathers = sa.and_(_jobs.kind == JobKind.BATCH, _jobs.state == JobState.RUNNING)
        expired = 0
        for _ in range(EXPIRE_PAGES):
            with self.database.transaction() as connection:
                page = _first(sa.and_(due, sa.not_(gathers)), limit)
                jobs = [job.id for job in moves.lock_jobs(connection, page, skip=True)]
                if jobs:
                    moves.stop_jobs(connection, jobs, ChunkState.EXPIRED, JobState.EXPIRED)
            expired += len(jobs)
            if len(jobs) < limit:
                break
        with self.database.transaction() as connection:
            running = sa.and_(due, gathers)
            batches = (
                connection.execute(
                    sa.select(_jobs.id).where(running).order_by(_jobs.deadline_at).limit(limit)
                )
                .scalars()
                .all()
            )
        # One by one: a batch that can't be ended right now keeps none of the others.
        failed: Unavailable | None = None
        for batch in batches:
            try:
                with self.database.transaction() as connection:
                    mine = sa.and_(running, _jobs.id == batch)
                    for job in moves.lock_jobs(connection, mine, skip=True):
                        moves.stop_job(connection, job, ChunkState.EXPIRED, JobState.EXPIRED)
                        expired += 1
            except Unavailable as error:
                failed = error
        if failed is not None:
            raise failed
        return expired


def _first(which: sa.ColumnElement[bool], limit: int) -> sa.ColumnElement[bool]:
    """The `limit` jobs of these that have been due the longest: by the index of what has not ended,
    where an order by id would read everything that ever ran."""
    due = sa.select(_jobs.id).where(which).order_by(_jobs.deadline_at).limit(limit)
    return sa.and_(which, _jobs.id.in_(due))


def _hints(group: str, rows: Sequence[Row]) -> list[Hint]:
    """One hint per chunk, but fresh one-item jobs of one model version share hints."""
    hints: list[Hint] = []
    singles: dict[tuple[str, str], list[int]] = {}
    for row in rows:
        if not row.shares:
            hints.append(Hint(group, row.model, row.version, (row.id,), alone=row.alone))
            continue
        waiting = singles.setdefault((row.model, row.version), [])
        waiting.append(row.id)
        if len(waiting) == HINT_CHUNKS:
            hints.append(Hint(group, row.model, row.version, tuple(waiting)))
            waiting.clear()
    hints += [Hint(group, *model, tuple(ids)) for model, ids in singles.items() if ids]
    return hints


def _shares(claims: int) -> sa.ColumnElement[int]:
    # Only a one-item job reads no file. One that has failed before may take its company along.
    single = sa.and_(_chunks.kind == ChunkKind.INFER, _chunks.byte_end == 0)
    return sa.case((sa.and_(single, _chunks.attempts <= claims), 1), else_=HINT_CHUNKS)


_ROOM = _shares(0)
"""What a chunk takes of a hint, in shares of `HINT_CHUNKS`."""
_TAKEN = _shares(1)
"""What one that runs has taken of its hint."""

# A loose index scan: one probe per class with work.
_PRIORITIES = sa.text(
    """
    WITH RECURSIVE waiting AS (
        (SELECT priority FROM chunks WHERE state = 'queued' AND group_name = :group
          ORDER BY priority LIMIT 1)
        UNION ALL
        SELECT (SELECT c.priority FROM chunks c
                 WHERE c.state = 'queued' AND c.group_name = :group
                   AND c.priority > waiting.priority
                 ORDER BY c.priority LIMIT 1)
          FROM waiting WHERE waiting.priority IS NOT NULL
    )
    SELECT priority FROM waiting WHERE priority IS NOT NULL ORDER BY priority
    """
)

# One probe per tenant with work, then that tenant's oldest rows, so that the cost follows the
# number of tenants and not the backlog. A tenant's rows are a range of the backlog's own index, in
# its order, so that no other will do: one over all chunks would walk over everything that ever ran.
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
    SELECT oldest.id, oldest.items, oldest.room, tenants.id AS tenant_id, tenants.weight
      FROM waiting
      JOIN tenants ON tenants.id = waiting.tenant_id
     CROSS JOIN LATERAL (
        SELECT c.id, c.item_count AS items,
               CASE WHEN c.kind = 'infer' AND c.byte_end = 0 AND c.attempts = 0
                    THEN 1 ELSE :whole END AS room
          FROM chunks c
         WHERE c.state = 'queued' AND c.group_name = :group AND c.priority = :priority
           AND (c.tenant_id, c.id) >= (waiting.tenant_id, 0) AND c.tenant_id <= waiting.tenant_id
           AND c.not_before <= now()
         ORDER BY c.tenant_id, c.id LIMIT :limit
         FOR UPDATE SKIP LOCKED
     ) oldest
    """
)

# What is in the broker runs first.
_AHEAD_RELEASED = sa.text(
    """
    SELECT count(*) FROM (
        SELECT FROM chunks
         WHERE state = 'released' AND group_name = :group AND (priority, id) < (:priority, :id)
         LIMIT :most
    ) ahead
    """
)

# Then the more urgent classes, then the older ones of its own class: those by tenant, as above, for
# the index to find them without walking over the younger ones. Written so that no other index than
# the backlog's own will do: one over all chunks would walk over everything that ever ran.
_AHEAD_QUEUED = sa.text(
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
    SELECT count(*) FROM (
        (SELECT 1 FROM chunks WHERE state = 'released' AND group_name = :group LIMIT :most)
        UNION ALL
        (SELECT 1 FROM chunks
          WHERE state = 'queued' AND group_name = :group AND priority < :priority
          ORDER BY priority, tenant_id, id LIMIT :most)
        UNION ALL
        (SELECT 1 FROM waiting CROSS JOIN LATERAL (
            SELECT 1 FROM chunks c
             WHERE c.state = 'queued' AND c.group_name = :group AND c.priority = :priority
               AND (c.tenant_id, c.id) >= (waiting.tenant_id, 0)
               AND (c.tenant_id, c.id) < (waiting.tenant_id, :id)
             LIMIT :most
         ) older)
        LIMIT :most
    ) ahead
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
