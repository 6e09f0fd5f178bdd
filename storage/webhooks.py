"""Webhook endpoints: where a tenant wants to hear of its jobs, and the secrets that sign it.

A signing secret is derived, of the deployment's secret, the endpoint and its generation: the table
holds nothing that signs, and rotating is counting on.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat as uuids

from errors import Conflict, NotFound
from storage import idempotency, moves, tables
from storage.database import Database, Row
from storage.events import DeliveryState
from storage.idempotency import Once

_webhooks, _deliveries = tables.webhooks.c, tables.deliveries.c

MOST = 20
"""Endpoints of one tenant."""
OVERLAP = 24 * 3600.0
"""Seconds the secret before goes on signing after a rotation that keeps it."""
SLICE = 1000
"""Deliveries that one statement ends or deletes."""
BY_HAND = "by request"
DISABLED = "the endpoint was disabled: "


@dataclass(frozen=True, slots=True)
class Webhooks:
    """Safe to share between threads. Every method but `delete` is one transaction."""

    database: Database
    secret: str

    def signing_secret(self, webhook_id: UUID, generation: int) -> str:
        """`whsec_` and 32 bytes in base64, as Standard Webhooks writes secrets."""
        text = webhook_id.bytes + generation.to_bytes(4, "big")
        key = hmac.digest(b"webhook:" + self.secret.encode(), text, "sha256")
        return f"whsec_{base64.b64encode(key).decode()}"

    def create(
        self,
        tenant_id: UUID,
        *,
        name: str,
        url: str,
        events: Sequence[str],
        webhook_id: UUID | None = None,
        once: Once | None = None,
    ) -> Row:
        """Where `once` was there before, the answer is what it made then. Raises `Conflict` where
        the tenant has as many as it may, `KeyReused`, and `NotFound` where the earlier one is
        gone."""
        webhook_id = webhook_id or uuids.uuid7()
        with self.database.transaction() as connection:
            made = idempotency.settle(connection, once, webhook_id)
            if made != webhook_id:
                return _one(connection.execute(sa.select(*_webhooks).where(_is(tenant_id, made))))
            # Creates of one tenant take turns: none is counted too few.
            connection.execute(
                sa.select(tables.tenants.c.id)
                .where(tables.tenants.c.id == tenant_id)
                .with_for_update(key_share=True)
            )
            count = connection.execute(
                sa.select(sa.func.count()).where(_webhooks.tenant_id == tenant_id)
            ).scalar_one()
            if count >= MOST:
                raise Conflict(f"there are {MOST} webhook endpoints, the most: delete one first")
            return connection.execute(
                sa.insert(tables.webhooks)
                .values(id=webhook_id, tenant_id=tenant_id, name=name, url=url, events=list(events))
                .returning(*_webhooks)
            ).one()

    def get(self, tenant_id: UUID, webhook_id: UUID) -> Row:
        """Raises `NotFound`."""
        with self.database.transaction() as connection:
            return _one(connection.execute(sa.select(*_webhooks).where(_is(tenant_id, webhook_id))))

    def list(self, tenant_id: UUID, *, after: UUID | None, limit: int) -> Sequence[Row]:
        """Newest first, those older than `after`."""
        query = sa.select(*_webhooks).where(_webhooks.tenant_id == tenant_id)
        if after is not None:
            query = query.where(_webhooks.id < after)
        with self.database.transaction() as connection:
            return connection.execute(query.order_by(_webhooks.id.desc()).limit(limit)).all()

    def update(
        self,
        tenant_id: UUID,
        webhook_id: UUID,
        *,
        name: str | None = None,
        url: str | None = None,
        events: Sequence[str] | None = None,
        enabled: bool | None = None,
    ) -> Row:
        """Change what is given. Raises `NotFound`."""
        with self.database.transaction() as connection:
            row = _locked(connection, tenant_id, webhook_id)
            wanted = {"name": name, "url": url, "events": None if events is None else list(events)}
            changes: dict[str, Any] = {
                field: value
                for field, value in wanted.items()
                if value is not None and value != getattr(row, field)
            }
            if enabled is True and row.disabled_at is not None:
                changes |= {"disabled_at": None, "disabled_why": None}
            if changes:
                row = _changed(connection, webhook_id, changes)
            if enabled is False and row.disabled_at is None:
                row = disable(connection, webhook_id, BY_HAND)
            return row

    def rotate(
        self, tenant_id: UUID, webhook_id: UUID, *, keep: bool, once: Once | None = None
    ) -> tuple[Row, bool]:
        """Sign with a new secret; with the one before as well for a day, where it is kept. Where
        `once` was there before, nothing is rotated, and True says so: the secret that it made may
        be the one kept. Raises `NotFound`, `KeyReused`."""
        with self.database.transaction() as connection:
            again = idempotency.seen(connection, once)
            row = _locked(connection, tenant_id, webhook_id)
            if again:
                return row, True
            until = moves.now + moves.seconds(OVERLAP) if keep else None
            changes = {"generation": row.generation + 1, "previous_until": until}
            return _changed(connection, webhook_id, changes), False

    def delete(self, tenant_id: UUID, webhook_id: UUID) -> None:
        """With everything that was to be delivered there, in slices: it may be a lot. Nothing more
        is announced meanwhile. Raises `NotFound`."""
        self.update(tenant_id, webhook_id, enabled=False)
        some = sa.select(_deliveries.id).where(_deliveries.webhook_id == webhook_id).limit(SLICE)
        while True:
            with self.database.transaction() as connection:
                lock(connection, webhook_id)
                if connection.execute(
                    sa.delete(tables.deliveries).where(_deliveries.id.in_(some))
                ).rowcount:
                    continue
                connection.execute(sa.delete(tables.webhooks).where(_is(tenant_id, webhook_id)))
                return


def lock(connection: sa.Connection, webhook_id: UUID) -> None:
    """Endpoints are locked before their deliveries."""
    connection.execute(
        sa.select(_webhooks.id).where(_webhooks.id == webhook_id).with_for_update(key_share=True)
    )


def disable(connection: sa.Connection, webhook_id: UUID, why: str) -> Row:
    """Deliver nothing more to a locked endpoint. What waits has failed: a slice of it at once, the
    rest as soon as a sender looks."""
    row = _changed(connection, webhook_id, {"disabled_at": moves.now, "disabled_why": why})
    end_disabled(connection, _webhooks.id == webhook_id)
    return row


def end_disabled(connection: sa.Connection, which: sa.ColumnElement[bool]) -> int:
    """End a slice of what waits for endpoints that are disabled; how many. What is being tried has
    its outcome yet to come."""
    waiting = (
        sa.select(_deliveries.id, _webhooks.disabled_why)
        .join(tables.webhooks, _webhooks.id == _deliveries.webhook_id)
        .where(
            which,
            _webhooks.disabled_at.is_not(None),
            _deliveries.state == DeliveryState.PENDING,
            sa.or_(_deliveries.lease_until.is_(None), _deliveries.lease_until <= moves.now),
        )
        .limit(SLICE)
        .with_for_update(of=tables.deliveries, skip_locked=True)
        .cte("waiting")
    )
    return connection.execute(
        sa.update(tables.deliveries)
        .where(_deliveries.id == waiting.c.id)
        .values(
            state=DeliveryState.FAILED.value,
            error=sa.literal(DISABLED).concat(waiting.c.disabled_why),
            finished_at=moves.clock,
            lease_until=None,
            lease_token=_deliveries.lease_token + 1,
        )
    ).rowcount


def _is(tenant_id: UUID, webhook_id: UUID) -> sa.ColumnElement[bool]:
    return sa.and_(_webhooks.id == webhook_id, _webhooks.tenant_id == tenant_id)


def _one(result: sa.CursorResult[Any]) -> Row:
    row = result.one_or_none()
    if row is None:
        raise NotFound("no such webhook endpoint")
    return row


def _locked(connection: sa.Connection, tenant_id: UUID, webhook_id: UUID) -> Row:
    return _one(
        connection.execute(
            sa.select(*_webhooks).where(_is(tenant_id, webhook_id)).with_for_update(key_share=True)
        )
    )


def _changed(connection: sa.Connection, webhook_id: UUID, changes: dict[str, Any]) -> Row:
    return connection.execute(
        sa.update(tables.webhooks)
        .where(_webhooks.id == webhook_id)
        .values(**changes, updated_at=moves.now)
        .returning(*_webhooks)
    ).one()
