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
) -> UUID:
    """Accept one inference as a job to end within so many seconds. It is durable on return. With
    `once`, the job may be one that was accepted earlier."""
    services = gateway().services
    job_id = uuids.uuid7()
    frame: bytes | None = (encoded := frames.encode_requests([asked]))
    key = since = None
    if len(encoded) > services.settings.inline_bytes:
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
    kept = idempotency.keep(job_id, lambda: services.jobs.submit([job], once), key)
    services.pump.kick(services.settings.group)
    return kept


def infer(
    job_id: UUID, preferred: Preference, *, render: Callable[[InferResult], Response]
) -> Response:
    """202 with the job, or, where it ends while the client waits, its answer."""
    if preferred.wait is not None and not preferred.respond_async:
        until = time.monotonic() + preferred.wait
        gateway().waiter.wait(job_id, preferred.wait)
        row = _row(job_id)
        if JobState(row.state).terminal:
            with time_limit.within(max(LAST_READ, until - time.monotonic())):
                found = result(job_id, row)
            response = render(found)
            response.headers.update(preferred.applied())
            return response
    return accepted(job_id, preferred)


def accepted(job_id: UUID, preferred: Preference, *, ended: int = 202) -> Response:
    """The job, and where to look; status `ended` where it has reached its end."""
    row = _row(job_id)
    job = views.job(row)
    headers = {"Location": job["urls"]["self"], **preferred.applied()}
    terminal = JobState(row.state).terminal
    if not terminal:
        headers["Retry-After"] = "1"
    return respond(job, ended if terminal else 202, headers)


def _row(job_id: UUID) -> Any:
    """The job that a request was about, which may be one that it had made before."""
    g.job_id = job_id
    with idempotency.still_there():
        return gateway().services.jobs.get(tenant(), job_id)


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
