"""Idempotency keys: what is made with a key is made once.

The key's row is written in the transaction that makes the thing, so that there is never one without
the other, and whoever comes second waits for that transaction and finds what it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat as uuids

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
    (kept,) = settle_all(connection, [(once, made)])
    if isinstance(kept, KeyReused):
        raise kept
    return kept


def settle_all(
    connection: sa.Connection, asked: Sequence[tuple[Once, UUID]]
) -> list[UUID | KeyReused]:
    """The same for several requests whose work one transaction does: the first of those with one
    key is the earlier one of the others. All keys live equally long."""
    if not asked:
        return []
    (ttl,) = {once.ttl for once, _ in asked}
    first: dict[_Name, tuple[Once, UUID]] = {}
    for once, made in asked:
        first.setdefault(_name(once), (once, made))
    # In one order everywhere, as with every other row that is locked.
    names = sorted(first)
    ours = {
        (row.tenant_id, row.route, row.key)
        for row in connection.execute(
            _SETTLE,
            {
                **_named(names),
                "fingerprints": [first[name][0].fingerprint for name in names],
                "made": [str(first[name][1]) for name in names],
                "ttl": ttl,
            },
        )
    }
    kept = {name: (once.fingerprint, made) for name, (once, made) in first.items()}
    others = [name for name in names if name not in ours]
    if others:
        # The insert has locked the rows that it ran into: they are there.
        for row in connection.execute(_KEPT, _named(others)):
            kept[row.tenant_id, row.route, row.key] = (bytes(row.fingerprint), row.resource_id)
    return [_answer(once, *kept[_name(once)]) for once, _ in asked]


def _answer(once: Once, fingerprint: bytes, made: UUID) -> UUID | KeyReused:
    if fingerprint == once.fingerprint:
        return made
    return KeyReused(
        "Idempotency-Key: was used for another request; take a new one for this",
        param="Idempotency-Key",
    )


_Name = tuple[UUID, str, str]


def _name(once: Once) -> _Name:
    return once.tenant_id, once.route, once.key


def _named(names: Sequence[_Name]) -> dict[str, list[str]]:
    tenants, routes, keys = zip(*names, strict=True)
    return {"tenants": [str(one) for one in tenants], "routes": [*routes], "keys": [*keys]}


_NAMES = "CAST(:tenants AS uuid[]), CAST(:routes AS text[]), CAST(:keys AS text[])"
# The conflicting row is locked whether or not it is replaced: retention can't take it from under
# the question what it says.
_SETTLE = sa.text(
    f"""
    INSERT INTO idempotency_keys AS known (tenant_id, route, key, fingerprint, resource_id)
    SELECT *
      FROM unnest({_NAMES}, CAST(:fingerprints AS bytea[]), CAST(:made AS uuid[]))
        ON CONFLICT (tenant_id, route, key) DO UPDATE
       SET fingerprint = excluded.fingerprint,
           resource_id = excluded.resource_id,
           created_at = now()
     WHERE known.created_at <= now() - make_interval(secs => :ttl)
    RETURNING tenant_id, route, key
    """  # noqa: S608 - constants of ours
)
_KEPT = sa.text(
    f"""
    SELECT known.tenant_id, known.route, known.key, known.fingerprint, known.resource_id
      FROM idempotency_keys AS known
      JOIN unnest({_NAMES}) AS asked (tenant_id, route, key) USING (tenant_id, route, key)
    """  # noqa: S608 - constants of ours
)


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
    found = _answer(once, bytes(row.fingerprint), row.resource_id)
    if isinstance(found, KeyReused):
        raise found
    return found


@dataclass(frozen=True, slots=True)
class Idempotency:
    """The keys, outside of what makes something. Safe to share between threads."""

    database: Database

    def earlier(self, once: Once) -> UUID | None:
        """What an earlier request with this key made, if it has. Raises `KeyReused`."""
        with self.database.transaction() as connection:
            return _earlier(connection, once)
