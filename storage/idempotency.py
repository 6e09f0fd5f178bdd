"""Idempotency keys: what is made with a key is made once.

The key's row is written in the transaction that makes the thing, so that there is never one without
the other, and whoever comes second waits for that transaction and finds what it made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat as uuids
from sqlalchemy.dialects.postgresql import insert

from errors import KeyReused
from storage import moves, tables
from storage.database import Database

_keys = tables.idempotency_keys.c


@dataclass(frozen=True, slots=True)
class Once:
    """A request that must not do its work twice. A key that is older than `ttl`, in seconds, was
    never used."""

    tenant_id: UUID
    route: str
    key: str
    fingerprint: bytes
    """Of all that was asked: the same key with another one is another request."""
    ttl: float


def settle(connection: sa.Connection, once: Once | None, made: UUID) -> UUID:
    """Give the key to `made`, first thing on the transaction that makes it. Where an earlier
    request has it, the answer is what that one made, and the caller makes nothing. Raises
    `KeyReused`."""
    if once is None:
        return made
    row = insert(tables.idempotency_keys).values(
        tenant_id=once.tenant_id,
        route=once.route,
        key=once.key,
        fingerprint=once.fingerprint,
        resource_id=made,
    )
    ours = connection.execute(
        # The conflicting row is locked whether or not it is replaced: retention can't take it from
        # under the question what it says.
        row.on_conflict_do_update(
            index_elements=[_keys.tenant_id, _keys.route, _keys.key],
            set_={
                "fingerprint": row.excluded.fingerprint,
                "resource_id": row.excluded.resource_id,
                "created_at": moves.now,
            },
            where=~_fresh(once),
        ).returning(_keys.resource_id)
    ).one_or_none()
    if ours is not None:
        return made
    # The insert has locked the row that it ran into: it is there.
    return _earlier(connection, once) or made


def seen(connection: sa.Connection, once: Once | None) -> bool:
    """Whether an earlier request with the key has done what this transaction is about to do, which
    makes nothing of its own. Raises `KeyReused`."""
    mark = uuids.uuid7()
    return settle(connection, once, mark) != mark


def keep_answer(connection: sa.Connection, once: Once | None, answer: dict[str, Any]) -> None:
    """Write down what was answered, on the transaction that settled the key."""
    if once is not None:
        connection.execute(
            sa.update(tables.idempotency_keys).where(_is(once)).values(answer=answer)
        )


def answer(connection: sa.Connection, once: Once | None) -> dict[str, Any]:
    """What `keep_answer` wrote down."""
    assert once is not None
    found: dict[str, Any] = connection.execute(
        sa.select(_keys.answer).where(_is(once))
    ).scalar_one()
    return found


def _is(once: Once) -> sa.ColumnElement[bool]:
    return sa.and_(
        _keys.tenant_id == once.tenant_id, _keys.route == once.route, _keys.key == once.key
    )


def _fresh(once: Once) -> sa.ColumnElement[bool]:
    fresh: sa.ColumnElement[bool] = _keys.created_at > moves.now - moves.seconds(once.ttl)
    return fresh


def _earlier(connection: sa.Connection, once: Once) -> UUID | None:
    row = connection.execute(
        sa.select(_keys.fingerprint, _keys.resource_id).where(_is(once), _fresh(once))
    ).one_or_none()
    if row is None:
        return None
    if bytes(row.fingerprint) != once.fingerprint:
        raise KeyReused(
            "Idempotency-Key: was used for another request; take a new one for this",
            param="Idempotency-Key",
        )
    found: UUID = row.resource_id
    return found


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The keys, outside of what makes something. Safe to share between threads."""

    database: Database

    def earlier(self, once: Once) -> UUID | None:
        """What an earlier request with this key made, if it has. Raises `KeyReused`."""
        with self.database.transaction() as connection:
            return _earlier(connection, once)
