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
from storage import moves, tables
from storage.database import Database, Row
from storage.events import DeliveryState

_webhooks, _deliveries = tables.webhooks.c, tables.deliveries.c

MOST = 20
"""Endpoints of one tenant."""
OVERLAP = 24 * 3600.0
"""Seconds the secret before goes on signing after a rotation that keeps it."""
BY_HAND = "disabled by request"


@dataclass(frozen=True, slots=True)
class Webhooks:
    """Every method is one transaction; safe to share between threads."""

    database: Database
    secret: str

    def signing_secret(self, webhook_id: UUID, generation: int) -> str:
        """`whsec_` and 32 bytes in base64, as Standard Webhooks writes secrets."""
        text = webhook_id.bytes + generation.to_bytes(4, "big")
        key = hmac.digest(b"webhook:" + self.secret.encode(), text, "sha256")
        return f"whsec_{base64.b64encode(key).decode()}"

    def create(self, tenant_id: UUID, *, name: str, url: str, events: Sequence[str]) -> Row:
        """Raises `Conflict` where the tenant has as many as it may."""
        with self.database.transaction() as connection:
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
                .values(
                    id=uuids.uuid7(), tenant_id=tenant_id, name=name, url=url, events=list(events)
                )
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

    def rotate(self, tenant_id: UUID, webhook_id: UUID, *, keep: bool) -> Row:
        """Sign with a new secret; with the one before as well for a day, where it is kept.
        Raises `NotFound`."""
        with self.database.transaction() as connection:
            row = _locked(connection, tenant_id, webhook_id)
            until = moves.now + moves.seconds(OVERLAP) if keep else None
            return _changed(
                connection,
                webhook_id,
                {"generation": row.generation + 1, "previous_until": until},
            )

    def delete(self, tenant_id: UUID, webhook_id: UUID) -> None:
        """With everything that was to be delivered there. Raises `NotFound`."""
        with self.database.transaction() as connection:
            gone = connection.execute(
                sa.delete(tables.webhooks).where(_is(tenant_id, webhook_id))
            ).rowcount
            if not gone:
                raise NotFound("no such webhook endpoint")


def lock(connection: sa.Connection, webhook_id: UUID) -> None:
    """Endpoints are locked before their deliveries."""
    connection.execute(
        sa.select(_webhooks.id).where(_webhooks.id == webhook_id).with_for_update(key_share=True)
    )


def disable(connection: sa.Connection, webhook_id: UUID, why: str) -> Row:
    """Deliver nothing more to a locked endpoint; what waits has failed. What is being tried has its
    outcome yet to come."""
    connection.execute(
        sa.update(tables.deliveries)
        .where(
            _deliveries.webhook_id == webhook_id,
            _deliveries.state == DeliveryState.PENDING,
            sa.or_(_deliveries.lease_until.is_(None), _deliveries.lease_until <= moves.now),
        )
        .values(
            state=DeliveryState.FAILED.value,
            error=disabled(why),
            finished_at=moves.clock,
            lease_until=None,
            lease_token=_deliveries.lease_token + 1,
        )
    )
    return _changed(connection, webhook_id, {"disabled_at": moves.now, "disabled_why": why})


def disabled(why: str) -> str:
    """The error of a delivery that could not be made any more."""
    return f"the endpoint was disabled: {why}"


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
