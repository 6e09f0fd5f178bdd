"""Batches, with OpenAI's wire shapes: an unmodified `openai` SDK works against these routes."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import uuid_utils.compat as uuids
from flask import Response

from errors import BadRequest, Conflict, NotFound
from storage.idempotency import Once
from storage.lifecycle import JobKind, JobState, Priority
from storage.work import NewBatch, NewJob
from tasks import array_order
from tasks.batch_lines import parse_endpoint
from web import described, etags, files, idempotency, schemas, views
from web.context import gateway
from web.http import (
    about,
    limit_body,
    page_after,
    page_limit,
    read_uuid,
    require_json,
    require_key,
    tenant,
)
from web.json import ApiBlueprint, respond

blueprint = ApiBlueprint("batches", __name__, url_prefix="/v1/batches", description="Batches")
blueprint.before_request(require_key)
blueprint.before_request(limit_body)
blueprint.before_request(require_json)


@blueprint.post("")
@blueprint.doc(parameters=[idempotency.PARAMETER])
@blueprint.arguments(schemas.BatchCreate)
@blueprint.alt_response(200, schema=schemas.Batch, description="Accepted: the batch is durable.")
def create(body: dict[str, Any]) -> Response:
    """Run a model on every line, or row, of a file."""
    once = idempotency.asked()
    job_id = idempotency.earlier(once) or _accept(body, once)
    with idempotency.still_there():
        return _batch(job_id)


def _accept(body: dict[str, Any], once: Once | None) -> UUID:
    services = gateway().services
    with about("endpoint"):
        model, version = parse_endpoint(body["endpoint"])
        spec = gateway().catalog.get(model, version).spec
    with about("input_file_id"):
        file = files.find(body["input_file_id"])
        if file.purpose != "batch":
            raise BadRequest("input_file_id: the file's purpose must be batch")
        head = b"".join(gateway().objects.stream(file.key, 0, array_order.SNIFFED))
        kind = array_order.kind_of(head)
    order = array_order.order(
        kind,
        spec,
        output=body.get("output_format"),
        input_name=body.get("input_name"),
        output_names=body.get("output_names"),
    )
    job = NewJob(
        id=uuids.uuid7(),
        tenant_id=tenant(),
        group=services.settings.group,
        model=model,
        version=version,
        deadline=schemas.parse_window(body["completion_window"]),
        priority=Priority[body["priority"].upper()],
        metadata=body.get("metadata"),
    )
    batch = NewBatch(
        endpoint=body["endpoint"],
        completion_window=body["completion_window"],
        input_file_id=file.id,
        output_ttl=body.get("output_expires_after", {}).get("seconds"),
        arrays=order.to_json() if order else None,
    )
    kept = idempotency.keep(job.id, lambda: services.jobs.submit_batch(job, batch, once))
    services.pump.kick(services.settings.group)
    return kept


def _batch(job_id: UUID) -> Response:
    return respond(views.batch(_find(job_id)))


def _find(job_id: UUID) -> Any:
    try:
        return gateway().services.jobs.get(tenant(), job_id, [JobKind.BATCH])
    except NotFound:
        raise NotFound(f"no batch {views.batch_id(job_id)}") from None


@blueprint.get("")
@blueprint.doc(parameters=described.page(20, 100))
@blueprint.alt_response(200, schema=schemas.BatchPage)
def batches() -> Response:
    """This tenant's batches, newest first. `limit`, `after`."""
    limit = page_limit(20, 100)
    rows = gateway().services.jobs.list(
        tenant(),
        after=page_after(lambda text: read_uuid(text, "batch_", "batch")),
        limit=limit + 1,
        kinds=[JobKind.BATCH],
    )
    return respond(views.page(rows, limit, views.batch))


@blueprint.get("/<batch_id>")
@blueprint.doc(parameters=[etags.PARAMETER])
@blueprint.alt_response(200, schema=schemas.Batch, headers=etags.HEADERS)
@blueprint.alt_response(304, description="As it was.")
def retrieve(batch_id: str) -> Response:
    """How a batch is doing."""
    row = _find(read_uuid(batch_id, "batch_", "batch"))
    over = JobState(row.state).terminal
    return etags.respond(views.batch(row), {} if over else {"Retry-After": "1"})


@blueprint.post("/<batch_id>/cancel")
@blueprint.alt_response(200, schema=schemas.Batch)
def cancel(batch_id: str) -> Response:
    """Call a batch off; the lines answered so far are kept in its output file."""
    job_id = read_uuid(batch_id, "batch_", "batch")
    try:
        gateway().services.jobs.cancel(tenant(), job_id, [JobKind.BATCH])
    except NotFound:
        raise NotFound(f"no batch {batch_id}") from None
    except Conflict:
        status = views.BATCH_STATUS[JobState(_find(job_id).state)]
        raise Conflict(f"cannot cancel a batch that is {status}") from None
    gateway().services.pump.kick(gateway().services.settings.group)
    return _batch(job_id)
