"""What the ledger lets go of when its time is over, and which objects nothing in it names.

The ledger forgets first: a key that is handed out here to be deleted is in no row any more, so
what a crash leaves is an object that nobody is promised, and the collector's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

import sqlalchemy as sa

from storage import moves
from storage.database import Database

_DAY = re.compile(r"realtime_records_(\d{8})")
_KEY = re.compile(r"(?:files/([0-9a-f]{32})|jobs/([0-9a-f]{32})/([0-9a-f]{32}))/.+")
CASCADE = 5000
"""Most chunks that one statement takes along with their jobs."""
WALK_LEASE = 120.0


@dataclass(frozen=True, slots=True)
class Walk:
    """The right to walk the store for a while, from where the last one stopped."""

    token: int
    after: str
    owner: UUID
    """Whose objects these are: made once per ledger."""


def ours(key: str) -> bool:
    """Could a ledger name this key? What else lies in a bucket is somebody else's."""
    return bool(_KEY.fullmatch(key))


@dataclass(frozen=True, slots=True)
class Retention:
    """Every method is one short transaction, and safe to run from many processes at once: each
    takes only rows that nobody else has. They return how much they did; less than `limit`, and
    there was no more. Times to live are seconds."""

    database: Database
    result_ttl: float
    job_ttl: float
    idempotency_ttl: float

    def purge_jobs(self, limit: int) -> tuple[int, list[str]]:
        """Forget inputs and results of jobs that ended long ago: how many, and the keys of
        objects to delete."""
        with self.database.transaction() as connection:
            # Two statements: who makes something new of a job's input holds the job's row, so
            # behind our lock every other user of it is there to be seen, and no new one can come.
            locked = list(
                connection.execute(
                    _OVER_JOBS, {"ttl": timedelta(seconds=self.result_ttl), "limit": limit}
                ).scalars()
            )
            if not locked:
                return 0, []
            rows = connection.execute(_PURGE_JOBS, {"ids": locked}).all()
        keys = [key for row in rows for key in (row.input_key, row.result_key) if key]
        return len(rows), keys

    def purge_files(self, limit: int) -> tuple[int, list[str]]:
        """The same for files that expired or were deleted, and that no batch reads any more."""
        with self.database.transaction() as connection:
            # Two statements, as above: who submits a batch holds the file's row.
            locked = list(connection.execute(_OVER_FILES, {"limit": limit}).scalars())
            if not locked:
                return 0, []
            keys = list(connection.execute(_PURGE_FILES, {"ids": locked}).scalars())
        return len(keys), keys

    def drop_jobs(self, limit: int) -> int:
        """Forget ended jobs altogether, chunks and batches included."""
        with self.database.transaction() as connection:
            return connection.execute(
                _DROP_JOBS,
                {
                    "ttl": timedelta(seconds=self.job_ttl),
                    "limit": limit,
                    "cascade": CASCADE,
                },
            ).rowcount

    def drop_files(self, limit: int) -> int:
        """Forget files whose bytes went long ago, once no batch names them."""
        return self._drop(_DROP_FILES, self.job_ttl, limit)

    def drop_idempotency_keys(self, limit: int) -> int:
        return self._drop(_DROP_IDEMPOTENCY_KEYS, self.idempotency_ttl, limit)

    def drop_records(self, limit: int) -> int:
        """Forget realtime requests: whole days at once, and row by row what fell between them."""
        with self.database.transaction() as connection:
            # Taking a day away locks the table that every gateway writes to: now or next time.
            connection.execute(sa.text("SET LOCAL lock_timeout = '250ms'"))
            now: datetime = connection.execute(sa.select(moves.now)).scalar_one()
            newest = f"{now - timedelta(seconds=self.job_ttl, days=1):%Y%m%d}"
            dropped = 0
            for name in connection.execute(_PARTITIONS).scalars():
                day = _DAY.fullmatch(name)
                if day and day[1] <= newest:
                    connection.execute(sa.text(f"DROP TABLE {name}"))
                    dropped += 1
        return dropped + self._drop(_DROP_RECORDS, self.job_ttl, limit)

    def _drop(self, statement: sa.TextClause, ttl: float, limit: int) -> int:
        with self.database.transaction() as connection:
            return connection.execute(
                statement, {"ttl": timedelta(seconds=ttl), "limit": limit}
            ).rowcount

    def unreferenced(self, keys: Sequence[str]) -> list[str]:
        """Those of `keys` that nothing names and nothing ever will, if they are older than
        anybody's bytes get before a row names them (see `moves.require_fresh`)."""
        found = [(key, match) for key in keys if (match := _KEY.fullmatch(key))]
        if not found:
            return []
        with self.database.transaction() as connection:
            return list(
                connection.execute(
                    _UNREFERENCED,
                    {
                        "keys": [key for key, _ in found],
                        "tenants": [UUID(match[1] or match[2]) for _, match in found],
                        "jobs": [UUID(match[3]) if match[3] else None for _, match in found],
                    },
                ).scalars()
            )

    def begin_walk(self) -> Walk | None:
        """Take the store's one walk; None: somebody has it. Who dies on it has it for as long as
        the lease lasts."""
        with self.database.transaction() as connection:
            row = connection.execute(
                _BEGIN_WALK, {"lease": timedelta(seconds=WALK_LEASE)}
            ).one_or_none()
        return Walk(row.lease_token, row.after, row.owner) if row else None

    def end_walk(self, walk: Walk, after: str) -> None:
        """Give it back; the next one begins behind `after`, "" being the beginning."""
        with self.database.transaction() as connection:
            connection.execute(_END_WALK, {"token": walk.token, "after": after})


_OVER_JOBS = sa.text(
    """
    SELECT id FROM jobs
     WHERE finished_at < now() - :ttl AND purged_at IS NULL
     ORDER BY finished_at LIMIT :limit
     FOR UPDATE SKIP LOCKED
    """
).bindparams(sa.bindparam("ttl", type_=sa.Interval))
# What a redriven job reads as well is left to it. Where both go at once, both leave it to the
# collector.
_PURGE_JOBS = sa.text(
    """
    WITH over AS (
        SELECT id, result_key,
               CASE WHEN NOT EXISTS (
                   SELECT FROM jobs AS other
                    WHERE other.input_key = jobs.input_key AND other.id <> jobs.id)
               THEN input_key END AS input_key
          FROM jobs WHERE id = ANY(:ids)
    )
    UPDATE jobs
       SET input = NULL, input_key = NULL, result = NULL, result_key = NULL, purged_at = now()
      FROM over WHERE jobs.id = over.id
    RETURNING over.input_key, over.result_key
    """
).bindparams(sa.bindparam("ids", type_=sa.ARRAY(sa.UUID)))

_OVER_FILES = sa.text(
    """
    SELECT id FROM files
     WHERE purged_at IS NULL AND (expires_at < now() OR deleted_at IS NOT NULL)
       AND NOT EXISTS (
           SELECT FROM batches JOIN jobs ON jobs.id = batches.job_id
            WHERE batches.input_file_id = files.id AND jobs.finished_at IS NULL)
     ORDER BY id LIMIT :limit
     FOR UPDATE SKIP LOCKED
    """
)
_PURGE_FILES = sa.text(
    """
    UPDATE files SET purged_at = now()
     WHERE id = ANY(:ids)
       AND NOT EXISTS (
           SELECT FROM batches JOIN jobs ON jobs.id = batches.job_id
            WHERE batches.input_file_id = files.id AND jobs.finished_at IS NULL)
    RETURNING object_key
    """
).bindparams(sa.bindparam("ids", type_=sa.ARRAY(sa.UUID)))

_DROP_JOBS = sa.text(
    """
    WITH over AS (
        SELECT id, finished_at, chunks_total FROM jobs
         WHERE finished_at < now() - :ttl AND purged_at IS NOT NULL
         ORDER BY finished_at LIMIT :limit
         FOR UPDATE SKIP LOCKED
    ), weighed AS (
        SELECT id, sum(chunks_total + 2) OVER (ORDER BY finished_at, id) - chunks_total AS before
          FROM over
    )
    DELETE FROM jobs USING weighed WHERE jobs.id = weighed.id AND weighed.before < :cascade
    """
).bindparams(sa.bindparam("ttl", type_=sa.Interval))

_DROP_FILES = sa.text(
    """
    DELETE FROM files WHERE id IN (
        SELECT id FROM files
         WHERE purged_at < now() - :ttl
           AND NOT EXISTS (SELECT FROM batches WHERE input_file_id = files.id)
           AND NOT EXISTS (SELECT FROM batches WHERE output_file_id = files.id)
           AND NOT EXISTS (SELECT FROM batches WHERE error_file_id = files.id)
         ORDER BY purged_at LIMIT :limit
         FOR UPDATE SKIP LOCKED
    )
    """
).bindparams(sa.bindparam("ttl", type_=sa.Interval))

_DROP_IDEMPOTENCY_KEYS = sa.text(
    """
    DELETE FROM idempotency_keys WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM idempotency_keys WHERE created_at < now() - :ttl
         ORDER BY created_at LIMIT :limit
         FOR UPDATE SKIP LOCKED))
    """
).bindparams(sa.bindparam("ttl", type_=sa.Interval))

_PARTITIONS = sa.text(
    """
    SELECT inhrelid::regclass::text FROM pg_inherits
     WHERE inhparent = 'realtime_records'::regclass ORDER BY 1
    """
)
_DROP_RECORDS = sa.text(
    """
    DELETE FROM realtime_records_default WHERE ctid = ANY(ARRAY(
        SELECT ctid FROM realtime_records_default WHERE created_at < now() - :ttl LIMIT :limit
         FOR UPDATE SKIP LOCKED))
    """
).bindparams(sa.bindparam("ttl", type_=sa.Interval))

# A job that has not ended keeps everything below its name, whatever attempt wrote it: no attempt
# can commit what is not there. An ended one keeps its input and its result; the parts of a batch
# are in its files then, which have names of their own.
_UNREFERENCED = sa.text(
    """
    SELECT asked.key
      FROM unnest(:keys, :tenants, :jobs) AS asked (key, tenant_id, job_id)
     WHERE NOT EXISTS (
           SELECT FROM files
            WHERE files.object_key = asked.key AND files.tenant_id = asked.tenant_id
              AND files.purged_at IS NULL)
       AND NOT EXISTS (
           SELECT FROM jobs
            WHERE jobs.id = asked.job_id AND jobs.tenant_id = asked.tenant_id
              AND (jobs.finished_at IS NULL OR jobs.result_key = asked.key))
       AND NOT EXISTS (
           SELECT FROM jobs
            WHERE jobs.input_key = asked.key AND jobs.tenant_id = asked.tenant_id)
    """
).bindparams(
    sa.bindparam("keys", type_=sa.ARRAY(sa.Text)),
    sa.bindparam("tenants", type_=sa.ARRAY(sa.UUID)),
    sa.bindparam("jobs", type_=sa.ARRAY(sa.UUID)),
)

_BEGIN_WALK = sa.text(
    """
    INSERT INTO walks (name, lease_token, lease_until) VALUES ('objects', 1, now() + :lease)
    ON CONFLICT (name) DO UPDATE
       SET lease_token = walks.lease_token + 1, lease_until = now() + :lease
     WHERE walks.lease_until IS NULL OR walks.lease_until < now()
    RETURNING lease_token, after, owner
    """
).bindparams(sa.bindparam("lease", type_=sa.Interval))
_END_WALK = sa.text(
    """
    UPDATE walks SET after = :after, lease_until = NULL
     WHERE name = 'objects' AND lease_token = :token
    """
)
