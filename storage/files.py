"""Files a tenant uploaded or a batch produced: rows here, bytes in the object store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

import sqlalchemy as sa

from errors import NotFound
from storage import idempotency, tables
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
_live = sa.and_(
    _files.deleted_at.is_(None),
    sa.or_(_files.expires_at.is_(None), _files.expires_at > sa.func.now()),
)


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


def insert_file(connection: sa.Connection, row: FileRow) -> None:
    """Add a file's row on a transaction of the caller's."""
    connection.execute(
        sa.insert(tables.files),
        {
            "id": row.id,
            "tenant_id": row.tenant_id,
            "purpose": row.purpose,
            "filename": row.filename,
            "bytes": row.bytes,
            "object_key": row.key,
            "expires_at": row.expires_at,
        },
    )


@dataclass(frozen=True, slots=True)
class Files:
    """The rows of files. Another tenant's file is not found."""

    database: Database

    def add(self, row: FileRow, once: Once | None = None) -> FileRow:
        """Record a file whose bytes are already stored; the row with its times. Where `once` was
        there before, that is the earlier file's, and nothing has been recorded. Raises `KeyReused`,
        and `NotFound` where the earlier one is gone."""
        with self.database.transaction() as connection:
            made = idempotency.settle(connection, once, row.id)
            if made == row.id:
                insert_file(connection, row)
        return self.get(row.tenant_id, made)

    def get(self, tenant_id: UUID, file_id: UUID) -> FileRow:
        """Raises `NotFound`."""
        with self.database.transaction() as connection:
            row = connection.execute(
                sa.select(*_COLUMNS).where(
                    _files.id == file_id, _files.tenant_id == tenant_id, _live
                )
            ).one_or_none()
        if row is None:
            raise NotFound(f"no file file-{file_id.hex}")
        return FileRow(**row._mapping)

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
        query = sa.select(*_COLUMNS).where(_files.tenant_id == tenant_id, _live)
        if after is not None:
            query = query.where(_files.id > after if ascending else _files.id < after)
        if purpose is not None:
            query = query.where(_files.purpose == purpose)
        order = _files.id.asc() if ascending else _files.id.desc()
        with self.database.transaction() as connection:
            rows = connection.execute(query.order_by(order).limit(limit)).all()
        return [FileRow(**row._mapping) for row in rows]

    def delete(self, tenant_id: UUID, file_id: UUID) -> bool:
        """Forget the file. True: nothing reads its bytes any more, they may go; False: a batch
        still runs over it. Raises `NotFound`."""
        self.get(tenant_id, file_id)
        reads = (
            sa.select(tables.batches.c.job_id)
            .join(tables.jobs, tables.jobs.c.id == tables.batches.c.job_id)
            .where(tables.batches.c.input_file_id == file_id, tables.jobs.c.finished_at.is_(None))
        )
        with self.database.transaction() as connection:
            connection.execute(
                sa.update(tables.files)
                .where(_files.id == file_id, _files.tenant_id == tenant_id)
                .values(deleted_at=sa.func.now())
            )
            return connection.execute(reads.limit(1)).first() is None
