"""Events: what webhooks may subscribe to, and the one place where the end of a job becomes one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from uuid import UUID

import sqlalchemy as sa

from storage.lifecycle import JobKind, JobState

OF_END = {
    (JobKind.BATCH, JobState.SUCCEEDED): "batch.completed",
    (JobKind.BATCH, JobState.FAILED): "batch.failed",
    (JobKind.BATCH, JobState.EXPIRED): "batch.expired",
    (JobKind.BATCH, JobState.CANCELED): "batch.cancelled",
    (JobKind.INFER, JobState.SUCCEEDED): "job.succeeded",
    (JobKind.INFER, JobState.FAILED): "job.failed",
    (JobKind.INFER, JobState.EXPIRED): "job.expired",
    (JobKind.INFER, JobState.CANCELED): "job.canceled",
}
"""A batch is told of as a batch only: in OpenAI's words, and once."""
TYPES = tuple(OF_END.values())


class DeliveryState(StrEnum):
    PENDING = "pending"
    """To be tried, for the first time or again."""
    DELIVERED = "delivered"
    FAILED = "failed"


def announce(connection: sa.Connection, ended: Sequence[UUID]) -> None:
    """Write down, in the transaction that ended these jobs, who is to hear of it.

    An endpoint that is being deleted this moment is passed over, not waited for: no job's end hangs
    on it, nor fails with it.
    """
    if ended:
        connection.execute(_ANNOUNCE, {"ended": list(ended)})


_ENDS = ", ".join(f"('{kind}', '{state}', '{event}')" for (kind, state), event in OF_END.items())

# A job ends once, so its id makes the event's: whoever hears of it twice can tell.
_ANNOUNCE = sa.text(
    f"""
    INSERT INTO deliveries (id, webhook_id, tenant_id, event, job_id, state, payload)
    SELECT uuidv7(), webhooks.id, jobs.tenant_id, ends.event, jobs.id, 'pending',
           jsonb_build_object(
               'id', 'evt_' || bare.id,
               'object', 'event',
               'type', ends.event,
               'created_at', CAST(floor(extract(epoch FROM jobs.finished_at)) AS bigint),
               'data', CASE jobs.kind
                   WHEN 'batch'
                   THEN jsonb_build_object('id', 'batch_' || bare.id)
                   ELSE jsonb_build_object('id', jobs.id, 'status', jobs.state)
               END
           )
      FROM jobs
      JOIN (VALUES {_ENDS}) AS ends (kind, state, event)
        ON ends.kind = jobs.kind AND ends.state = jobs.state
      JOIN webhooks
        ON webhooks.tenant_id = jobs.tenant_id
       AND webhooks.disabled_at IS NULL
       AND webhooks.events ? ends.event
     CROSS JOIN LATERAL (SELECT replace(CAST(jobs.id AS text), '-', '') AS id) AS bare
     WHERE jobs.id = ANY(:ended)
       FOR KEY SHARE OF webhooks SKIP LOCKED
    """  # noqa: S608 - constants of ours
).bindparams(sa.bindparam("ended", type_=sa.ARRAY(sa.UUID)))
