"""Files a tenant uploaded or a batch produced: rows here, bytes in the object store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from config import DAY
from errors import Gone, NotFound
from storage import idempotency, moves, tables
from storage.database import Database
from storage.idempotency import Once

_files = tables.files.c
_COLUMNS = (
    _files.id,
    _files.tenant_id,
    _files.purpose,
    _files.filename,
    _files.bytes,
    _files.object_key.label("key"),
    _files.created_at,
    _files.expires_at,
)
# Purged as well: by the time of a transaction that had to wait it may not have expired yet.
_expired = sa.or_(
    _files.purged_at.is_not(None),
    sa.and_(_files.expires_at.is_not(None), _files.expires_at <= sa.func.now()),
)
# A file that is over is told from one that never was until its row goes, too.
_known = sa.and_(_files.deleted_at.is_(None), _files.tenant_id == sa.bindparam("tenant_id"))


def file_key(tenant_id: UUID, file_id: UUID) -> str:
    """Where an uploaded file's bytes go."""
    return f"files/{tenant_id.hex}/{file_id.hex}"


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file of a tenant; `key` is where its bytes are."""

    id: UUID
    tenant_id: UUID
    purpose: str
    filename: str
    bytes: int
    key: str
    created_at: datetime | None = None
    expires_at: datetime | None = None


def insert_file(connection: sa.Connection, row: FileRow, ttl: Any) -> FileRow:
    """Add a file's row, to expire after so many seconds, on a transaction of the caller's."""
    return FileRow(
        **connection.execute(
            sa.insert(tables.files)
            .values(
                id=row.id,
                tenant_id=row.tenant_id,
                purpose=row.purpose,
                filename=row.filename,
                bytes=row.bytes,
                object_key=row.key,
                expires_at=moves.now + moves.seconds(ttl),
            )
            .returning(*_COLUMNS)
        )
        .one()
        ._mapping
    )


def require_file(
    connection: sa.Connection, tenant_id: UUID, file_id: UUID, *, keep: bool = False
) -> FileRow:
    """This tenant's file. `keep`: until the transaction ends, nobody takes its bytes away. Raises
    `NotFound`, `Gone` where it has expired."""
    query = sa.select(*_COLUMNS, _expired.label("expired")).where(_files.id == file_id, _known)
    if keep:
        query = query.with_for_update(read=True, key_share=True)
    row = connection.execute(query, {"tenant_id": tenant_id}).one_or_none()
    if row is None:
        raise NotFound(f"no file file-{file_id.hex}")
    found = dict(row._mapping)
    if found.pop("expired"):
        raise Gone(f"file-{file_id.hex} has expired: it is no longer kept")
    return FileRow(**found)


@dataclass(frozen=True, slots=True)
class Files:
    """The rows of files. Another tenant's file is not found. `ttl` is the seconds that a file is
    kept which says nothing of its own."""

    database: Database
    ttl: float = 30 * DAY
    garbage_age: float = 3600.0

    def add(
        self,
        row: FileRow,
        once: Once | None = None,
        *,
        ttl: float | None = None,
        since: datetime | None = None,
    ) -> FileRow:
        """Record a file whose bytes are already stored, since a moment of the database's; the row
        with its times. Where `once` was there before, that is the earlier file's, and nothing has
        been recorded. Raises `KeyReused`; `NotFound` and `Gone` where the earlier one is gone;
        `Unavailable` where storing took so long that the bytes may be gone."""
        with self.database.transaction() as connection:
            made = idempotency.settle(connection, once, row.id)
            if made != row.id:
                return require_file(connection, row.tenant_id, made)
            moves.require_fresh(connection, [since], self.garbage_age)
            return insert_file(connection, row, self.ttl if ttl is None else ttl)

    def get(self, tenant_id: UUID, file_id: UUID) -> FileRow:
        """Raises `NotFound`, `Gone` where the file has expired."""
        with self.database.transaction() as connection:
            return require_file(connection, tenant_id, file_id)

    def list(
        self,
        tenant_id: UUID,
        *,
        after: UUID | None,
        limit: int,
        purpose: str | None,
        ascending: bool = False,
    ) -> Sequence[FileRow]:
        """By time, newest first unless `ascending`; those behind `after`."""
        query = sa.select(*_COLUMNS).where(_known, sa.not_(_expired))
        if after is not None:
            query = query.where(_files.id > after if ascending else _files.id < after)
        if purpose is not None:
            query = query.where(_files.purpose == purpose)
        order = _files.id.asc() if ascending else _files.id.desc()
        with self.database.transaction() as connection:
            rows = connection.execute(
                query.order_by(order).limit(limit), {"tenant_id": tenant_id}
            ).all()
        return [FileRow(**row._mapping) for row in rows]

    def delete(self, tenant_id: UUID, file_id: UUID) -> bool:
        """Forget the file. True: nothing reads its bytes any more, they may go; False: a batch
        still runs over it, and retention takes them later. Raises `NotFound`, `Gone`."""
        reads = (
            sa.select(tables.batches.c.job_id)
            .join(tables.jobs, tables.jobs.c.id == tables.batches.c.job_id)
            .where(tables.batches.c.input_file_id == file_id, tables.jobs.c.finished_at.is_(None))
        )
        mine = sa.and_(_files.id == file_id, _files.tenant_id == tenant_id)
        with self.database.transaction() as connection:
            # Behind this lock no batch can come that we don't see: see `require_file`.
            connection.execute(sa.select(_files.id).where(mine).with_for_update())
            require_file(connection, tenant_id, file_id)
            unread = connection.execute(reads.limit(1)).first() is None
            connection.execute(
                sa.update(tables.files)
                .where(mine)
                .values(deleted_at=moves.now, purged_at=moves.now if unread else None)
            )
        return unread
