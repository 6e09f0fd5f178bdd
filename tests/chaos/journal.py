"""The harness's own record of what the ledger went through, and what is left in the stores.

Triggers write a line for every change of a chunk's or a job's state, token or output, in the
transaction that makes it: what is committed is in the journal, and nothing else is. Workers of the
harness (`crashing`) add what they were told about their commits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from typing import Any
from uuid import UUID

import psycopg2
import redis
from psycopg2.extras import register_uuid

from tests.chaos.oracle import Entry, Rest, What

TABLES = """
CREATE TABLE IF NOT EXISTS chaos_journal (
    id bigserial PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    what text NOT NULL,
    job_id uuid NOT NULL,
    chunk_id bigint,
    kind text NOT NULL DEFAULT 'infer',
    before text,
    after text,
    token bigint NOT NULL DEFAULT 0,
    token_before bigint NOT NULL DEFAULT 0,
    items bigint NOT NULL DEFAULT 0,
    output_key text,
    worker text
);
CREATE OR REPLACE FUNCTION chaos_chunk() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (NEW.state, NEW.lease_token, NEW.output_key, NEW.error_key) IS DISTINCT FROM
       (OLD.state, OLD.lease_token, OLD.output_key, OLD.error_key) THEN
        INSERT INTO chaos_journal
            (what, job_id, chunk_id, kind, before, after, token, token_before, items, output_key,
             worker)
        VALUES
            ('chunk', NEW.job_id, NEW.id, NEW.kind, OLD.state, NEW.state, NEW.lease_token,
             OLD.lease_token, NEW.item_count, NEW.output_key, NEW.worker);
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE FUNCTION chaos_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.state IS DISTINCT FROM OLD.state
       OR (OLD.finished_at IS NOT NULL AND NEW.purged_at IS NULL AND
           (NEW.result, NEW.result_key) IS DISTINCT FROM (OLD.result, OLD.result_key)) THEN
        INSERT INTO chaos_journal (what, job_id, before, after, items)
        VALUES ('job', NEW.id, OLD.state, NEW.state, NEW.items_total);
    END IF;
    RETURN NULL;
END $$;
CREATE OR REPLACE TRIGGER chaos AFTER UPDATE ON chunks
    FOR EACH ROW EXECUTE FUNCTION chaos_chunk();
CREATE OR REPLACE TRIGGER chaos AFTER UPDATE ON jobs
    FOR EACH ROW EXECUTE FUNCTION chaos_job();
"""
SAID = "INSERT INTO chaos_journal (what, job_id, chunk_id, token, items, worker) VALUES "
"""What a worker adds."""

Holds = Callable[[str], bool]
"""Has the object store this key?"""
PATIENCE = 30.0
"""Seconds for a Postgres that somebody has just killed to come back."""
_OPEN = "('queued', 'released', 'running')"


class Journal:
    """Reads (and makes) the journal of one stack. A connection a call: the server may have died."""

    def __init__(self, env: Mapping[str, str], namespace: str = "tidegate"):
        self._dsn = env["TIDEGATE_DATABASE_URL"].replace("+psycopg2", "")
        self._redis_url = env["TIDEGATE_REDIS_URL"]
        self._namespace = namespace

    def install(self) -> None:
        self.sql(TABLES)

    def sql(self, text: str, *values: Any, patience: float = PATIENCE) -> list[tuple[Any, ...]]:
        """Run a statement; its rows, if it has any."""
        until = time.monotonic() + patience
        while True:
            try:
                with closing(psycopg2.connect(self._dsn, connect_timeout=3)) as connection:
                    register_uuid(conn_or_curs=connection)  # type: ignore[no-untyped-call]
                    with connection, connection.cursor() as cursor:
                        cursor.execute(text, values or None)
                        return list(cursor.fetchall()) if cursor.description else []
            except psycopg2.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def last(self) -> int:
        """The newest line: what comes after it is a scenario's own."""
        return int(self.sql("SELECT coalesce(max(id), 0) FROM chaos_journal")[0][0])

    def committed(self, since: int) -> int:
        """Items committed after a line."""
        (row,) = self.sql(
            "SELECT coalesce(sum(items), 0) FROM chaos_journal WHERE id > %s AND what = 'chunk'"
            " AND kind = 'infer' AND after = 'done' AND before <> 'done'",
            since,
        )
        return int(row[0])

    def entries(self, since: int, until: int | None = None) -> list[Entry]:
        rows = self.sql(
            "SELECT id, extract(epoch FROM at)::float8, what, job_id, chunk_id, kind, before,"
            " after, token, token_before, items, output_key, worker"
            " FROM chaos_journal WHERE id > %s AND id <= %s ORDER BY id",
            since,
            until or 2**62,
        )
        return [Entry(row[0], row[1], What(row[2]), *row[3:]) for row in rows]

    def unended(self, jobs: Collection[UUID]) -> int:
        """Those of `jobs` that are in the ledger and have not ended."""
        (row,) = self.sql(
            "SELECT count(*) FROM jobs WHERE id = ANY(%s::uuid[]) AND finished_at IS NULL",
            list(jobs),
        )
        return int(row[0])

    def rest(self, jobs: Collection[UUID], keys: Collection[str], holds: Holds) -> Rest:
        """What is left of these jobs, of the outbox and of the broker."""
        states = self.sql(
            "SELECT id, state FROM jobs WHERE id = ANY(%s::uuid[])", [str(job) for job in jobs]
        )
        by_key: dict[str, list[UUID]] = {}
        for key, job in self.sql(
            "SELECT metadata->>'chaos', id FROM jobs WHERE metadata->>'chaos' = ANY(%s)", list(keys)
        ):
            by_key.setdefault(key, []).append(job)
        ((outbox,),) = self.sql(f"SELECT count(*) FROM chunks WHERE state IN {_OPEN}")
        return Rest(
            states=dict(states),
            keys=by_key,
            missing=[key for key in self._objects(jobs) if not holds(key)],
            outbox=int(outbox),
            hints=self.hints(),
        )

    def _objects(self, jobs: Collection[UUID]) -> Iterator[str]:
        """The keys that the ledger names for these jobs."""
        rows = self.sql(
            """
            WITH mine AS (SELECT * FROM jobs WHERE id = ANY(%s::uuid[]) AND purged_at IS NULL)
            SELECT input_key FROM mine UNION ALL SELECT result_key FROM mine
            UNION ALL SELECT unnest(ARRAY[chunks.output_key, chunks.error_key])
              FROM chunks JOIN mine ON mine.id = chunks.job_id WHERE chunks.state = 'done'
            UNION ALL SELECT files.object_key FROM files JOIN batches
                ON files.id IN (batches.output_file_id, batches.error_file_id)
              JOIN mine ON mine.id = batches.job_id WHERE files.purged_at IS NULL
            """,
            [str(job) for job in jobs],
        )
        return (key for (key,) in rows if key is not None)

    def hints(self) -> int:
        """Messages in the broker's queues."""
        with redis.Redis.from_url(self._redis_url, socket_timeout=5) as client:
            queues = client.scan_iter(f"{self._namespace}:*.batch", count=1000, _type="LIST")
            return sum(int(client.llen(queue)) for queue in queues)
