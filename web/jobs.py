"""Jobs: submit, look, get the result, call off."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from flask import Response, request

from errors import BadRequest, Conflict, NotFound, TidegateError
from inference import oip
from inference.metadata import check
from storage import ids
from storage.idempotency import Once
from storage.jobs import Accepted
from storage.lifecycle import JobKind, JobState, Priority
from tasks.bootstrap import Services
from web import described, durable, etags, idempotency, schemas, streams, views
from web.context import gateway
from web.http import (
    about,
    deadline,
    limit_body,
    page_after,
    page_limit,
    preference,
    read_uuid,
    require_json,
    require_key,
    store_deadline,
    tenant,
)
from web.json import ApiBlueprint, respond

blueprint = ApiBlueprint("jobs", __name__, url_prefix="/v1/jobs", description="Jobs")
blueprint.before_request(require_key)
blueprint.before_request(require_json)

RECORD_PATIENCE = 1.0
"""Seconds a realtime record may lag behind its answer before we say that it is not there."""


@blueprint.before_request
def _limit() -> None:
    if request.endpoint != "jobs.submit":  # whose body holds tensors
        limit_body()


@blueprint.post("")
@blueprint.doc(parameters=[idempotency.PARAMETER, described.PREFER, described.DEADLINE])
@blueprint.arguments(schemas.JobSubmit())
@blueprint.alt_response(202, schema=schemas.Job, description="Accepted: the job is durable.")
@blueprint.alt_response(200, schema=schemas.Job, description="Ended within `Prefer: wait=n`.")
def submit(body: dict[str, Any]) -> Response:
    """Accept one inference to run in the background."""
    once = idempotency.asked()
    try:
        job = _accept(body, once)
    except TidegateError:
        # What the key made stands, whatever has become of its model since. Asked for only now: for
        # nearly every key there is nothing yet, and accepting notices where there is.
        if (earlier := idempotency.earlier(once)) is None:
            raise
        job = Accepted(earlier)
    return durable.accepted(job, preference(gateway().services.settings.max_wait))


def _accept(body: dict[str, Any], once: Once | None) -> Accepted:
    settings = gateway().services.settings
    with about("model"):
        entry = gateway().catalog.get(body["model"], body["version"])
    with about("input"):
        asked = oip.request_from_json(body["input"], model=body["model"], version=body["version"])
        check(asked, entry.spec)
        asked, given = oip.take_timeout(asked)
    within = deadline(body.get("deadline", settings.job_deadline), schemas.MAX_WINDOW)
    return durable.submit(
        asked,
        within=min(within, given or within),
        priority=Priority[body["priority"].upper()],
        metadata=body.get("metadata"),
        once=once,
    )


@blueprint.get("")
@blueprint.doc(parameters=[described.KIND, described.STATUS, *described.page(20, 100)])
@blueprint.alt_response(200, schema=schemas.JobPage)
def jobs() -> Response:
    """This tenant's jobs, newest first. Filters: `kind`, `status`; pages: `limit`, `after`."""
    limit = page_limit(20, 100)
    cursor = page_after(lambda text: read_uuid(text, "", "job"))
    kinds, state = _kinds(), _state()
    found: list[tuple[UUID, dict[str, Any]]] = []
    durable_kinds = [kind for kind in kinds if kind is not JobKind.REALTIME]
    if durable_kinds:
        rows = gateway().services.jobs.list(
            tenant(), after=cursor, limit=limit + 1, kinds=durable_kinds, state=state
        )
        found += [(row.id, views.job(row)) for row in rows]
    if JobKind.REALTIME in kinds:
        records = gateway().services.records.list(
            tenant(), after=cursor, limit=limit + 1, state=state.value if state else None
        )
        found += [(row.id, views.record(row)) for row in records]
    found.sort(key=lambda pair: pair[0], reverse=True)
    return respond(views.page([job for _, job in found[: limit + 1]], limit, lambda job: job))


def _kinds() -> list[JobKind]:
    text = request.args.get("kind")
    if text is None:
        return list(JobKind)
    if text not in {kind.value for kind in JobKind}:
        raise BadRequest(f"kind: one of {', '.join(JobKind)}", param="kind")
    return [JobKind(text)]


def _state() -> JobState | None:
    text = request.args.get("status")
    if text is None:
        return None
    if text not in {state.value for state in JobState}:
        raise BadRequest(f"status: one of {', '.join(JobState)}", param="status")
    return JobState(text)


@blueprint.get("/<job_id>")
@blueprint.doc(parameters=[etags.PARAMETER])
@blueprint.alt_response(200, schema=schemas.Job, headers=etags.HEADERS)
@blueprint.alt_response(304, description="As it was.")
def status(job_id: str) -> Response:
    """One job, durable or realtime."""
    job = _find(gateway().services, tenant(), read_uuid(job_id, "", "job"))
    over = JobState(job["status"]).terminal
    return etags.respond(job, {} if over else {"Retry-After": "1"})


@blueprint.get("/<job_id>/events")
@blueprint.doc(parameters=[streams.PARAMETER])
@blueprint.alt_response(200, **streams.RESPONSE)
def stream(job_id: str) -> Response:
    """One job's progress, as server-sent events."""
    found, owner = read_uuid(job_id, "", "job"), tenant()
    look = partial(_find, gateway().services, owner, found)
    return streams.respond(gateway().streams, gateway().waiter, owner, found, look)


def _find(services: Services, owner: UUID, job_id: UUID) -> dict[str, Any]:
    """The job's view. An id we gave is never unknown, whatever died: see `storage.ids`."""
    if not services.ids.minted(job_id, owner):
        row = services.jobs.get(owner, job_id)
        waits = row.state == JobState.QUEUED
        position = services.backlog.position(owner, job_id) if waits else None
        return views.job(row) | {"queue_position": position}
    over_at = time.monotonic() + RECORD_PATIENCE
    while True:
        record = services.records.get(owner, job_id)
        if record is not None:
            return views.record(record)
        if time.monotonic() >= over_at:
            break
        time.sleep(0.05)
    age = datetime.now(UTC) - ids.created_at(job_id)
    if age > timedelta(seconds=services.settings.job_ttl):
        raise NotFound(f"no job {job_id}")
    longest = timedelta(seconds=services.settings.max_realtime_timeout)
    return views.lost_record(job_id, over=age > longest)


@blueprint.get("/<job_id>/result")
@blueprint.doc(parameters=[described.STORE_DEADLINE])
@blueprint.alt_response(200, description="The Open Inference Protocol answer.")
@store_deadline()
def result(job_id: str) -> Response:
    """What the model answered: JSON, or with `Accept: application/octet-stream` binary tensors."""
    services = gateway().services
    found = read_uuid(job_id, "", "job")
    if services.ids.minted(found, tenant()):
        raise NotFound("a realtime request's answer went to the connection; it is not kept")
    row = services.jobs.get(tenant(), found)
    if row.kind == JobKind.BATCH:
        raise Conflict(f"a batch's results are files: see /v1/batches/{views.batch_id(row.id)}")
    if not JobState(row.state).terminal:
        raise Conflict(f"the job is {row.state}: it has no result yet", retry_after=1)
    outcome = durable.result(found, row)
    binary = "application/octet-stream" in request.headers.get("Accept", "")
    body, header_length = oip.render_infer(outcome, oip.ResponseFormat(binary=binary))
    if header_length is None:
        return Response(body, content_type="application/json")
    headers = {oip.HEADER_LENGTH: str(header_length)}
    return Response(body, headers=headers, content_type="application/octet-stream")


@blueprint.post("/<job_id>/cancel")
@blueprint.alt_response(202, schema=schemas.Job)
def cancel(job_id: str) -> Response:
    """Call a job off; again is fine. 409 where it has ended otherwise, or is a realtime request."""
    found = read_uuid(job_id, "", "job")
    if gateway().services.ids.minted(found, tenant()):
        raise Conflict("a realtime request is not called off: close its connection")
    gateway().services.jobs.cancel(tenant(), found)
    gateway().services.pump.kick(gateway().services.settings.group)
    return respond(views.job(gateway().services.jobs.get(tenant(), found)), 202)
