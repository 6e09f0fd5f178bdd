"""A hundred thousand queued jobs change nothing: every hot statement finds its rows by an index and
reads about as many as it needs, and the broker holds a few hints."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
import uuid_utils.compat as uuids
from celery import current_app

from config import Settings
from errors import Unavailable
from storage.backlog import CANDIDATES, HINT_CHUNKS, LEAST_ROOM, MOST_AHEAD, Backlog
from storage.chunks import Chunks
from storage.database import Database
from storage.files import Files
from storage.idempotency import Idempotency, Once
from storage.jobs import Jobs
from storage.keys import Keys
from storage.lifecycle import JobKind, JobState
from storage.records import Records
from storage.work import Claim, Done, NewJob
from tasks import messages
from tasks.pump import Pump
from tests.conftest import Ledger
from workers.app import build_app

QUEUED = 100_000
ENDED = 20_000
LARGE = {"jobs", "chunks"}
"""Tables that a statement must not read through."""
FEW = 50
"""Rows of large tables that a look at one thing may read."""

_FILL = """
    WITH made AS (
        INSERT INTO jobs (id, tenant_id, kind, group_name, model, version, priority, state, input,
                          chunks_total, items_total, deadline_at, finished_at)
        SELECT uuidv7(), :tenant, 'infer', :group, 'digits', '', :priority, :state, 'input',
               1, 1, now() + interval '1 hour', CASE WHEN :state = 'queued' THEN NULL ELSE now() END
          FROM generate_series(1, :count)
        RETURNING *
    )
    INSERT INTO chunks (job_id, seq, kind, tenant_id, group_name, model, version, priority, state,
                        item_count, first_line)
    SELECT id, 1, 'infer', tenant_id, group_name, model, version, priority, :chunk, 1, 1 FROM made
"""


@dataclass
class Plans:
    """What Postgres did for each statement, as it says itself."""

    statements: list[str] = field(default_factory=list)
    scans: list[dict[str, Any]] = field(default_factory=list)

    @property
    def read(self) -> int:
        """Rows of large tables and of their indexes that were looked at."""
        return sum(
            round(scan["Actual Loops"] * sum(scan.get(name, 0) for name in _READ))
            for scan in self.scans
        )

    @property
    def through(self) -> list[str]:
        """Large tables that were read from end to end."""
        return [scan["Relation Name"] for scan in self.scans if scan["Node Type"] == "Seq Scan"]

    def add(self, statement: str, plan: dict[str, Any]) -> None:
        self.statements.append(" ".join(statement.split()))
        self._walk(plan)

    def _walk(self, node: dict[str, Any]) -> None:
        if "Scan" in node["Node Type"] and node.get("Relation Name") in LARGE:
            self.scans.append(node)
        for child in node.get("Plans", []):
            self._walk(child)


_READ = ("Actual Rows", "Rows Removed by Filter", "Rows Removed by Index Recheck")


@contextmanager
def explained(database: Database) -> Iterator[Plans]:
    """Every statement in the block is run twice: to be explained, and undone; then in earnest."""
    plans = Plans()

    def look(_: Any, cursor: Any, statement: str, parameters: Any, *__: Any) -> None:
        if statement.split()[0] not in ("SELECT", "WITH", "INSERT", "UPDATE", "DELETE"):
            return
        cursor.execute("SAVEPOINT look")
        cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON) {statement}", parameters)
        plans.add(statement, cursor.fetchone()[0][0]["Plan"])
        cursor.execute("ROLLBACK TO look")

    engine = database._engine
    sa.event.listen(engine, "before_cursor_execute", look)
    try:
        yield plans
    finally:
        sa.event.remove(engine, "before_cursor_execute", look)


@pytest.fixture(scope="module", params=["known", "unheard of"])
def full(database: Database, settings: Settings, request: pytest.FixtureRequest) -> Ledger:
    """One tenant's long queue, another's short one, and what has ended before them. The planner
    knows what there is, or still believes that nothing waits: a queue fills in less time than
    autovacuum takes to notice."""
    keys = Keys(database, settings.secret)
    crowd, mine = (keys.tenant_of(keys.create(secrets.token_hex(4))) for _ in range(2))
    ledger = Ledger(
        database=database,
        jobs=Jobs(database),
        chunks=Chunks(database),
        backlog=Backlog(database),
        files=Files(database),
        records=Records(database),
        keys=keys,
        tenant=crowd,
        group=secrets.token_hex(4),
    )
    fill = {"group": ledger.group, "priority": 2}
    ended = {"state": "succeeded", "chunk": "done"}
    queued = {"state": "queued", "chunk": "queued"}
    for name in LARGE:
        ledger.sql(f"ALTER TABLE {name} SET (autovacuum_enabled = off)")
        ledger.sql(f"TRUNCATE {name} CASCADE")
    for tenant, count, states in (
        (crowd, ENDED, ended),
        (mine, 1000, ended),
        (crowd, QUEUED, queued),
        (mine, 100, queued),
    ):
        for _ in range(0, count, 20_000):
            ledger.sql(_FILL, **fill, **states, tenant=tenant, count=min(count, 20_000))
        if states is ended or request.param == "known":
            for name in LARGE:
                ledger.sql(f"ANALYZE {name}")
    return ledger


def new_job(full: Ledger) -> NewJob:
    return NewJob(
        id=uuids.uuid7(),
        tenant_id=full.tenant,
        group=full.group,
        model="digits",
        version="",
        deadline=60.0,
        input=b"input",
    )


def newest(full: Ledger, state: JobState = JobState.QUEUED) -> Any:
    (row,) = full.jobs.list(full.tenant, after=None, limit=1, kinds=[JobKind.INFER], state=state)
    return row


def claimed(full: Ledger) -> list[Claim]:
    (hint, *_) = full.backlog.release(full.group)
    return full.chunks.claim(hint.ids, "worker")


def listed(full: Ledger, state: JobState | None, kinds: Sequence[JobKind]) -> None:
    first = full.jobs.list(full.tenant, after=None, limit=21, kinds=kinds, state=state)
    if first:
        full.jobs.list(full.tenant, after=first[-1].id, limit=21, kinds=kinds, state=state)


def submitted(full: Ledger) -> None:
    jobs = [new_job(full) for _ in range(10)]
    once = Once(full.tenant, "POST /v1/jobs", secrets.token_hex(8), b"this", 3600.0)
    full.jobs.submit(jobs, {jobs[0].id: once})
    assert Idempotency(full.database).earlier(once) == jobs[0].id


def committed(full: Ledger, claims: Sequence[Claim]) -> None:
    full.chunks.renew(claims)
    assert full.chunks.lost(claims) == []
    fates = full.chunks.retry(claims[:5], Unavailable("again"), 3600)
    done = [Done(claim, items_ok=1, items_failed=0, output=b"out") for claim in claims[5:]]
    assert len(full.chunks.commit(done)) + len(fates) == len(claims)


ALL = (JobKind.INFER, JobKind.BATCH)
LOOKS: dict[str, tuple[int, Callable[[Ledger], object]]] = {
    "submit": (FEW, submitted),
    "status": (FEW, lambda full: full.jobs.get(full.tenant, newest(full).id)),
    "result": (FEW, lambda full: full.jobs.result(full.tenant, newest(full).id)),
    "progress of those waited for": (FEW, lambda full: full.jobs.pulses([newest(full).id])),
    "position": (
        3 * MOST_AHEAD,
        lambda full: full.backlog.position(full.tenant, newest(full).id),
    ),
    "cancel": (FEW, lambda full: full.jobs.cancel(full.tenant, newest(full).id)),
    "list": (2 * FEW, lambda full: listed(full, None, ALL)),
    "list of the queued": (2 * FEW, lambda full: listed(full, JobState.QUEUED, ALL)),
    "list of the ended, behind all that wait": (
        2 * FEW,
        lambda full: listed(full, JobState.SUCCEEDED, ALL),
    ),
    "list of the failed, of which there are none": (
        2 * FEW,
        lambda full: listed(full, JobState.FAILED, ALL),
    ),
    "list of batches, of which there are none": (
        2 * FEW,
        lambda full: listed(full, None, [JobKind.BATCH]),
    ),
    "groups with work": (FEW, lambda full: full.backlog.groups()),
    "sweep that finds nothing": (LEAST_ROOM * 8, lambda full: full.backlog.sweep()),
    "stranded": (FEW, lambda full: full.backlog.stranded()),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_hot_statement_reads_about_what_it_needs(full: Ledger, name: str) -> None:
    most, run = LOOKS[name]
    with explained(full.database) as plans:
        run(full)

    assert plans.statements
    assert plans.through == []
    assert plans.read <= most, "\n".join(plans.statements)


def test_the_way_of_a_hint_reads_about_what_it_names(full: Ledger) -> None:
    with explained(full.database) as pumped:
        (hint, *others) = full.backlog.release(full.group)
    assert len(hint.ids) == HINT_CHUNKS
    with explained(full.database) as again:
        full.backlog.release(full.group)
    with explained(full.database) as taken:
        claims = full.chunks.claim(hint.ids, "worker")
    with explained(full.database) as finished:
        committed(full, claims)

    for plans in (pumped, again, taken, finished):
        assert plans.through == []
    released = sum(len(one.ids) for one in (hint, *others))
    # Looked for, locked, moved on; and of the others' tenant one more each.
    assert pumped.read <= 4 * (released + CANDIDATES)
    # The broker is full: what is there is counted, and nothing is looked for.
    assert again.read <= 2 * released
    assert taken.read <= 12 * HINT_CHUNKS
    assert finished.read <= 30 * HINT_CHUNKS


def test_what_the_broker_holds_does_not_grow_with_the_backlog(
    full: Ledger, settings: Settings
) -> None:
    """Pumped again and again, and swept, with nobody there to take a hint."""
    full.sql("UPDATE chunks SET state = 'queued', released_at = NULL WHERE state = 'released'")
    build_app(settings)
    patient = Backlog(full.database, hint_timeout=3600)
    pump = Pump(patient)
    for _ in range(20):
        pump.pump(full.group)
        patient.sweep()
    with current_app.connection_for_read() as connection:
        queue = messages.queue(messages.batch_queue(full.group))(connection.default_channel)
        hints = list(iter(partial(queue.get, no_ack=True), None))

    named = [chunk for hint in hints for chunk in json.loads(hint.body)[1]["ids"]]
    assert LEAST_ROOM <= len(set(named)) == len(named) <= patient.credit
    assert len(hints) <= LEAST_ROOM / HINT_CHUNKS + 1
    assert max(len(hint.body) for hint in hints) < messages.MAX_BYTES / 2


def test_a_statement_names_however_many_jobs_there_are(full: Ledger) -> None:
    """As many statements for a thousand as for one: from the submit to the commit."""
    counts = []
    for count in (1, 200):
        with explained(full.database) as plans:
            jobs = [new_job(full) for _ in range(count)]
            keys = {
                job.id: Once(full.tenant, "POST /v1/jobs", secrets.token_hex(8), b"", 3600.0)
                for job in jobs
            }
            full.jobs.submit(jobs, keys)
            with full.database.transaction() as connection:
                chunks = list(
                    connection.execute(
                        sa.text("SELECT id FROM chunks WHERE job_id = ANY(:jobs)"),
                        {"jobs": [job.id for job in jobs]},
                    ).scalars()
                )
            claims = full.chunks.claim(chunks, "worker")
            full.chunks.renew(claims)
            full.chunks.lost(claims)
            done = [Done(claim, items_ok=1, items_failed=0, output=b"out") for claim in claims]
            assert len(full.chunks.commit(done)) == count
        counts.append(len(plans.statements))
    assert counts[0] == counts[1]
