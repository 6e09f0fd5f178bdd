"""Handing one inference to the durable lane, and waiting for it as long as the client prefers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import UUID

import uuid_utils.compat as uuids
from flask import Response, g

from errors import Conflict, Gone, TidegateError, from_wire
from inference import frames
from inference.tensors import InferRequest, InferResult
from storage import time_limit
from storage.idempotency import Once
from storage.jobs import Accepted
from storage.lifecycle import JobState, Priority
from storage.work import NewJob
from web import idempotency, views
from web.context import gateway
from web.http import Preference, tenant
from web.json import respond

LAST_READ = 2.0
"""Seconds to read an answer that came when the client had waited almost long enough."""


def submit(
    asked: InferRequest,
    *,
    within: float,
    priority: Priority = Priority.NORMAL,
    metadata: Mapping[str, str] | None = None,
    once: Once | None = None,
) -> Accepted:
    """Accept one inference as a job to end within so many seconds. It is durable on return. With
    `once`, the job may be one that was accepted earlier."""
    services = gateway().services
    job_id = uuids.uuid7()
    frame: bytes | None = (encoded := frames.encode_requests([asked]))
    key = since = None
    if len(encoded) > services.settings.inline_bytes:
        if (earlier := idempotency.earlier(once)) is not None:
            # Before anything is stored for nothing.
            return Accepted(earlier)
        key = f"jobs/{tenant().hex}/{job_id.hex}/input"
        since = services.database.now()
        with time_limit.within(within) as limit:
            gateway().objects.put(key, encoded)
            # What storing it took is gone.
            within = limit.left()
        frame = None
    job = NewJob(
        id=job_id,
        tenant_id=tenant(),
        group=services.settings.group,
        model=asked.model,
        version=asked.version,
        deadline=within,
        priority=priority,
        input=frame,
        input_key=key,
        stored_since=since,
        metadata=metadata,
    )
    return idempotency.keep(job_id, lambda: gateway().intake.submit(job, once), key)


def infer(
    job: Accepted, preferred: Preference, *, render: Callable[[InferResult], Response]
) -> Response:
    """202 with the job, or, where it ends while the client waits, its answer."""
    until = time.monotonic() + (preferred.wait or 0.0)
    row = _awaited(job, preferred)
    if preferred.waits and JobState(row.state).terminal:
        with time_limit.within(max(LAST_READ, until - time.monotonic())):
            found = result(job.id, row)
        response = render(found)
        response.headers.update(preferred.applied())
        return response
    return _shown(row, preferred, ended=202)


def accepted(job: Accepted, preferred: Preference) -> Response:
    """The job, and where to look: 202, or 200 where it ends while the client waits."""
    return _shown(_awaited(job, preferred), preferred, ended=200 if preferred.waits else 202)


def _shown(row: Any, preferred: Preference, *, ended: int) -> Response:
    job = views.job(row)
    headers = {"Location": job["urls"]["self"], **preferred.applied()}
    terminal = JobState(row.state).terminal
    if not terminal:
        headers["Retry-After"] = "1"
    return respond(job, ended if terminal else 202, headers)


def _awaited(job: Accepted, preferred: Preference) -> Any:
    """The job's row, once the client has waited as long as it prefers. What has just been accepted
    need not be read again."""
    g.job_id = job.id
    if preferred.waits:
        assert preferred.wait is not None
        gateway().waiter.wait(job.id, preferred.wait)
    elif job.row is not None:
        return job.row
    with idempotency.still_there():
        return gateway().services.jobs.get(tenant(), job.id)


def result(job_id: UUID, row: Any) -> InferResult:
    """What an ended one-item job came to. Raises the job's own error, `Gone`, or `Conflict` where
    it was called off."""
    services = gateway().services
    if row.state == JobState.CANCELED:
        raise Conflict("the job was canceled: it has no result")
    if row.error is not None:
        raise from_wire(row.error)
    frame, key = services.jobs.result(tenant(), job_id)
    if frame is None:
        if key is None:
            kept = services.settings.result_ttl
            raise Gone(f"results are kept for {kept:g} s after a job's end; this one is gone")
        frame = gateway().objects.get(key)
    outcome = frames.decode_outcomes(frame)[0]
    if isinstance(outcome, TidegateError):
        raise outcome
    return outcome
