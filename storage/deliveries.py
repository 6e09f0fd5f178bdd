"""Deliveries: which event goes to which endpoint next, and what came of each try.

A delivery is claimed as a chunk is: with a lease on the database's time, and a token that only the
newest claim's outcome carries. A sender that dies leaves a lease that runs out, and the delivery is
made again under the same id: at least once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import sqlalchemy as sa
import uuid_utils.compat as uuids

from errors import Conflict, NotFound
from storage import events, idempotency, moves, tables, webhooks
from storage.database import Database, Row
from storage.events import DeliveryState
from storage.idempotency import Once
from storage.lifecycle import JobKind

_deliveries, _attempts, _webhooks = (
    tables.deliveries.c,
    tables.delivery_attempts.c,
    tables.webhooks.c,
)

PER_ENDPOINT = 4
"""Deliveries one endpoint may be sent at once, by all senders together."""
PER_TENANT = 8
"""The same for all of a tenant's endpoints: the slow ones of one tenant leave others room."""
SHOWN_ATTEMPTS = 20
"""The latest tries of one delivery that its log shows."""
_FIRST = sa.func.to_timestamp(0)
"""Due before whatever else waits for the endpoint: somebody is looking."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One claimed delivery: what to send, where, and the claim's token."""

    id: UUID
    webhook_id: UUID
    token: int
    attempt: int
    """Which try this is, from 1; crashed ones count."""
    event: str
    payload: dict[str, Any]
    sample: bool
    """A test, tried once."""
    url: str
    generations: tuple[int, ...]
    """Of the secrets that sign."""
    disabled_why: str | None
    """Set where the endpoint has been disabled since."""
    claimed_at: datetime


@dataclass(frozen=True, slots=True)
class Attempt:
    """What came of one try: a status, or an error where there was no answer."""

    duration_ms: int
    status: int | None = None
    error: str | None = None
    response: str | None = None
    """How the answer's body begins."""


@dataclass(frozen=True, slots=True)
class Deliveries:
    """Safe to run from many processes at once. Every method but `purge` is one transaction."""

    database: Database
    lease: float = 45.0
    """Seconds a sender may be silent before somebody else tries."""

    def claim(self, limit: int) -> list[Delivery]:
        """Take up to `limit` due deliveries, by turns between endpoints: one that has nothing under
        way comes before one that has, so that a slow one holds up only its own."""
        with self.database.transaction() as connection:
            chosen = list(
                connection.execute(
                    _TURNS, {"limit": limit, "each": PER_ENDPOINT, "tenant": PER_TENANT}
                ).scalars()
            )
            if not chosen:
                return []
            # Chosen without locks: whoever else chose them meanwhile has them.
            mine = (
                sa.select(_deliveries.id)
                .where(_deliveries.id.in_(chosen), _due())
                .with_for_update(skip_locked=True)
            )
            rows = connection.execute(
                sa.update(tables.deliveries)
                .where(_deliveries.id.in_(mine), _webhooks.id == _deliveries.webhook_id)
                .values(
                    attempts=_deliveries.attempts + 1,
                    lease_token=_deliveries.lease_token + 1,
                    lease_until=moves.clock + moves.seconds(self.lease),
                )
                .returning(
                    *tables.deliveries.c,
                    _webhooks.url,
                    _webhooks.generation,
                    sa.func.coalesce(_webhooks.previous_until > moves.now, False).label("previous"),
                    _webhooks.disabled_why,
                    moves.clock.label("claimed_at"),
                )
            ).all()
        order = {delivery: place for place, delivery in enumerate(chosen)}
        return sorted((_delivery(row) for row in rows), key=lambda found: order[found.id])

    def settle(
        self,
        delivery: Delivery,
        state: DeliveryState,
        attempt: Attempt | None = None,
        *,
        delay: float = 0.0,
        error: str | None = None,
        disable: str | None = None,
    ) -> bool:
        """Write down what came of a claim; to be tried again after `delay` where it is pending
        still. `disable` says why the endpoint takes no more. False where a newer claim has taken
        over: the try is logged, and changes nothing.
        """
        with self.database.transaction() as connection:
            if disable is not None:
                webhooks.lock(connection, delivery.webhook_id)
            over = state is not DeliveryState.PENDING
            held = connection.execute(
                sa.update(tables.deliveries)
                .where(
                    _deliveries.id == delivery.id,
                    _deliveries.lease_token == delivery.token,
                    _deliveries.state == DeliveryState.PENDING,
                )
                .values(
                    state=state.value,
                    error=error,
                    lease_until=None,
                    not_before=moves.clock + moves.seconds(delay),
                    finished_at=moves.clock if over else None,
                )
            ).rowcount
            if attempt is not None:
                _log(connection, delivery, attempt)
            if held and disable is not None:
                webhooks.disable(connection, delivery.webhook_id, disable)
            return bool(held)

    def sample(
        self,
        tenant_id: UUID,
        webhook_id: UUID,
        event: str,
        *,
        delivery_id: UUID | None = None,
        once: Once | None = None,
    ) -> UUID:
        """Make up an event and send it, once; or the one that `once` made before. Raises
        `NotFound`; `Conflict` where the endpoint is disabled; `KeyReused`."""
        ends = next(end for end, name in events.OF_END.items() if name == event)
        about = uuids.uuid7()
        data = (
            {"id": f"batch_{about.hex}"}
            if ends[0] is JobKind.BATCH
            else {"id": str(about), "status": ends[1].value}
        )
        delivery_id = delivery_id or uuids.uuid7()
        with self.database.transaction() as connection:
            made = idempotency.settle(connection, once, delivery_id)
            if made != delivery_id:
                return made
            _enabled(connection, tenant_id, webhook_id)
            seconds: int = connection.execute(
                sa.select(sa.cast(sa.func.floor(sa.extract("epoch", moves.now)), sa.BigInteger))
            ).scalar_one()
            payload = {
                "id": f"evt_{about.hex}",
                "object": "event",
                "type": event,
                "created_at": seconds,
                "data": data,
            }
            connection.execute(
                sa.insert(tables.deliveries).values(
                    id=delivery_id,
                    webhook_id=webhook_id,
                    tenant_id=tenant_id,
                    event=event,
                    payload=payload,
                    state=DeliveryState.PENDING.value,
                    not_before=_FIRST,
                )
            )
        return delivery_id

    def resend(
        self, tenant_id: UUID, webhook_id: UUID, delivery_id: UUID, once: Once | None = None
    ) -> bool:
        """Try a delivery once more at once, whatever came of it; one that is being tried this
        moment is not tried twice. True: `once` had that done before. Raises `NotFound`; `Conflict`
        where the endpoint is disabled; `KeyReused`."""
        with self.database.transaction() as connection:
            if idempotency.seen(connection, once):
                return True
            _enabled(connection, tenant_id, webhook_id)
            which = sa.and_(
                _deliveries.id == delivery_id,
                _deliveries.webhook_id == webhook_id,
                _deliveries.tenant_id == tenant_id,
            )
            found = connection.execute(
                sa.select(_deliveries.id).where(which).with_for_update(key_share=True)
            ).one_or_none()
            if found is None:
                raise NotFound("no such delivery")
            connection.execute(
                sa.update(tables.deliveries)
                .where(
                    which,
                    sa.or_(_deliveries.lease_until.is_(None), _deliveries.lease_until <= moves.now),
                )
                .values(
                    state=DeliveryState.PENDING.value,
                    not_before=_FIRST,
                    lease_until=None,
                    finished_at=None,
                )
            )
        return False

    def get(self, tenant_id: UUID, webhook_id: UUID, delivery_id: UUID) -> tuple[Row, list[Row]]:
        """A delivery and its tries. Raises `NotFound`."""
        with self.database.transaction() as connection:
            found = _logs(
                connection,
                sa.select(*_deliveries).where(
                    _deliveries.id == delivery_id,
                    _deliveries.webhook_id == webhook_id,
                    _deliveries.tenant_id == tenant_id,
                ),
            )
        if not found:
            raise NotFound("no such delivery")
        return found[0]

    def list(
        self,
        tenant_id: UUID,
        webhook_id: UUID,
        *,
        after: UUID | None,
        limit: int,
        state: DeliveryState | None = None,
    ) -> list[tuple[Row, list[Row]]]:
        """Newest first, those older than `after`, each with its tries."""
        query = sa.select(*_deliveries).where(
            _deliveries.webhook_id == webhook_id, _deliveries.tenant_id == tenant_id
        )
        if after is not None:
            query = query.where(_deliveries.id < after)
        if state is not None:
            query = query.where(_deliveries.state == state)
        with self.database.transaction() as connection:
            return _logs(connection, query.order_by(_deliveries.id.desc()).limit(limit))

    def end_disabled(self) -> int:
        """End a slice of what waits for endpoints that are disabled; how many."""
        with self.database.transaction() as connection:
            return webhooks.end_disabled(connection, sa.true())

    def purge(self, age: float) -> int:
        """Forget deliveries that began so many seconds ago and are over, slice by slice; how
        many. What is left after a hundred slices waits for the next call."""
        total = 0
        for _ in range(100):
            gone = self._purge_slice(age)
            total += gone
            if not gone:
                break
        return total

    def _purge_slice(self, age: float) -> int:
        with self.database.transaction() as connection:
            now: datetime = connection.execute(sa.select(moves.now)).scalar_one()
            # An id holds its time: see `storage.ids`.
            oldest = int((now - timedelta(seconds=age)).timestamp() * 1000)
            found = (
                sa.select(_deliveries.id)
                .where(
                    _deliveries.webhook_id == _webhooks.id,
                    _deliveries.id < UUID(int=max(0, oldest) << 80),
                    _deliveries.state != DeliveryState.PENDING,
                )
                .order_by(_deliveries.id)
                .limit(webhooks.SLICE)
                .lateral()
            )
            ids = sa.select(found.c.id).select_from(tables.webhooks).join(found, sa.true())
            return connection.execute(
                sa.delete(tables.deliveries).where(_deliveries.id.in_(ids.limit(webhooks.SLICE)))
            ).rowcount


def _due() -> sa.ColumnElement[bool]:
    return sa.and_(
        _deliveries.state == DeliveryState.PENDING,
        _deliveries.not_before <= moves.now,
        sa.or_(_deliveries.lease_until.is_(None), _deliveries.lease_until <= moves.now),
    )


def _delivery(row: Row) -> Delivery:
    return Delivery(
        id=row.id,
        webhook_id=row.webhook_id,
        token=row.lease_token,
        attempt=row.attempts,
        event=row.event,
        payload=row.payload,
        sample=row.job_id is None,
        url=row.url,
        generations=(row.generation, row.generation - 1) if row.previous else (row.generation,),
        disabled_why=row.disabled_why,
        claimed_at=row.claimed_at,
    )


def _enabled(connection: sa.Connection, tenant_id: UUID, webhook_id: UUID) -> None:
    row = connection.execute(
        sa.select(_webhooks.disabled_why)
        .where(_webhooks.id == webhook_id, _webhooks.tenant_id == tenant_id)
        .with_for_update(read=True, key_share=True)
    ).one_or_none()
    if row is None:
        raise NotFound("no such webhook endpoint")
    if row.disabled_why is not None:
        raise Conflict(f"the endpoint is disabled ({row.disabled_why}): enable it first")


def _log(connection: sa.Connection, delivery: Delivery, attempt: Attempt) -> None:
    # Of the row, where it is there still: the endpoint may have been deleted meanwhile.
    values = {
        "attempt": delivery.attempt,
        "status": attempt.status,
        "error": attempt.error,
        "response": attempt.response,
        "duration_ms": attempt.duration_ms,
    }
    columns = [tables.delivery_attempts.c[name] for name in values]
    connection.execute(
        sa.insert(tables.delivery_attempts).from_select(
            ["delivery_id", *values],
            sa.select(
                _deliveries.id,
                *(
                    sa.cast(value, column.type)
                    for column, value in zip(columns, values.values(), strict=True)
                ),
            ).where(_deliveries.id == delivery.id),
        )
    )


def _logs(connection: sa.Connection, query: sa.Select[Any]) -> list[tuple[Row, list[Row]]]:
    rows: Sequence[Row] = connection.execute(query).all()
    tries: dict[UUID, list[Row]] = {row.id: [] for row in rows}
    found = connection.execute(
        sa.select(*_attempts)
        .join(tables.deliveries, _deliveries.id == _attempts.delivery_id)
        .where(
            _deliveries.id.in_(list(tries)),
            _attempts.attempt > _deliveries.attempts - SHOWN_ATTEMPTS,
        )
        .order_by(_attempts.delivery_id, _attempts.attempt)
    )
    for attempt in found:
        tries[attempt.delivery_id].append(attempt)
    return [(row, tries[row.id]) for row in rows]


# A loose index scan, one probe per endpoint with something pending, then its oldest due ones. An
# endpoint's turn counts what it has under way, and so does its tenant's.
_TURNS = sa.text(
    """
    WITH RECURSIVE waiting AS (
        (SELECT webhook_id FROM deliveries WHERE state = 'pending' ORDER BY webhook_id LIMIT 1)
        UNION ALL
        SELECT (SELECT d.webhook_id FROM deliveries d
                 WHERE d.state = 'pending' AND d.webhook_id > waiting.webhook_id
                 ORDER BY d.webhook_id LIMIT 1)
          FROM waiting WHERE waiting.webhook_id IS NOT NULL
    ), flying AS (
        SELECT webhook_id, tenant_id, count(*) AS flights FROM deliveries
         WHERE lease_until > now() AND state = 'pending'
         GROUP BY webhook_id, tenant_id
    ), turns AS (
        SELECT due.id, due.tenant_id, due.not_before,
               coalesce(flying.flights, 0)
               + row_number() OVER (PARTITION BY waiting.webhook_id ORDER BY due.not_before) AS turn
          FROM waiting
          LEFT JOIN flying ON flying.webhook_id = waiting.webhook_id
         CROSS JOIN LATERAL (
            SELECT d.id, d.tenant_id, d.not_before FROM deliveries d
             WHERE d.state = 'pending' AND d.webhook_id = waiting.webhook_id
               AND d.not_before <= now() AND (d.lease_until IS NULL OR d.lease_until <= now())
             ORDER BY d.not_before LIMIT :each
         ) due
    ), fair AS (
        SELECT turns.*,
               coalesce((SELECT sum(flights) FROM flying WHERE tenant_id = turns.tenant_id), 0)
               + row_number() OVER (PARTITION BY tenant_id ORDER BY turn, not_before) AS tenant_turn
          FROM turns WHERE turn <= :each
    )
    SELECT id FROM fair
     WHERE tenant_turn <= :tenant
     ORDER BY turn, tenant_turn, not_before LIMIT :limit
    """
)
