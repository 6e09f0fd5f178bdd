"""Records of realtime requests: append-only, a partition a day, written behind the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import orjson
import sqlalchemy as sa

from storage import ids, tables
from storage.database import Database, Row

_records = tables.realtime_records.c
DAYS_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Record:
    """One realtime request that got its answer."""

    id: UUID
    tenant_id: UUID
    model: str
    version: str
    state: str
    duration_ms: int
    batch_size: int = 1
    """Requests that travelled in the same message."""
    error: dict[str, Any] | None = None
    cached: bool = False


@dataclass(frozen=True, slots=True)
class Records:
    """The table of realtime records. Safe to share between threads."""

    database: Database

    def add(self, records: Sequence[Record]) -> None:
        """Write many at once; one that is there already stays as it is."""
        rows = [
            {
                "id": record.id,
                "created_at": ids.created_at(record.id),
                "tenant_id": record.tenant_id,
                "model": record.model,
                "version": record.version,
                "state": record.state,
                "error": record.error,
                "duration_ms": record.duration_ms,
                "batch_size": record.batch_size,
                "cached": record.cached,
            }
            for record in records
        ]
        with self.database.transaction() as connection:
            connection.execute(_INSERT, {"rows": orjson.dumps(rows).decode()})

    def get(self, tenant_id: UUID, record_id: UUID) -> Row | None:
        with self.database.transaction() as connection:
            return connection.execute(
                sa.select(tables.realtime_records).where(
                    _records.id == record_id,
                    # Names the partition: the id holds the time.
                    _records.created_at == ids.created_at(record_id),
                    _records.tenant_id == tenant_id,
                )
            ).one_or_none()

    def list(
        self, tenant_id: UUID, *, after: UUID | None, limit: int, state: str | None = None
    ) -> Sequence[Row]:
        """Newest first, those older than `after`."""
        query = sa.select(tables.realtime_records).where(_records.tenant_id == tenant_id)
        if after is not None:
            query = query.where(_records.id < after)
        if state is not None:
            query = query.where(_records.state == state)
        with self.database.transaction() as connection:
            return connection.execute(query.order_by(_records.id.desc()).limit(limit)).all()

    def ensure_partitions(self) -> None:
        """Make today's partition and the next ones; where that can't be, the default one serves."""
        with self.database.transaction() as connection:
            # Two sweepers may come at once.
            connection.execute(
                sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtext("partitions")))
            )
            today: datetime = connection.execute(sa.select(sa.func.now())).scalar_one()
            start = today.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
            for day in (start + timedelta(days=ahead) for ahead in range(DAYS_AHEAD + 1)):
                name = f"realtime_records_{day:%Y%m%d}"
                if connection.execute(sa.select(sa.func.to_regclass(name))).scalar_one() is None:
                    connection.execute(
                        sa.text(
                            f"CREATE TABLE {name} PARTITION OF realtime_records "
                            f"FOR VALUES FROM ('{day:%Y-%m-%d}') "
                            f"TO ('{day + timedelta(days=1):%Y-%m-%d}')"
                        )
                    )


# As one document: a gateway writes thousands a second, and a parameter each is what that would cost
# it most.
_INSERT = sa.text("""
    INSERT INTO realtime_records
        (id, created_at, tenant_id, model, version, state, error, duration_ms, batch_size, cached)
    SELECT id, created_at, tenant_id, model, version, state, error, duration_ms, batch_size, cached
    FROM json_to_recordset(CAST(:rows AS json)) AS r (
        id uuid, created_at timestamptz, tenant_id uuid, model text, version text, state text,
        error jsonb, duration_ms integer, batch_size integer, cached boolean
    )
    ON CONFLICT DO NOTHING
""")
