"""Dead letters: what was given up, why, and running it again."""

from __future__ import annotations

import re
from typing import Any
from uuid import UUID

from flask import Response, g, request

from errors import BadRequest, NotFound
from storage.dead_letters import LetterFilter
from web import described, idempotency, schemas, views
from web.context import gateway
from web.http import (
    chosen_by,
    limit_body,
    page_after,
    page_limit,
    read_uuid,
    require_json,
    require_key,
    tenant,
)
from web.json import ApiBlueprint, respond

blueprint = ApiBlueprint(
    "dead-letters", __name__, url_prefix="/v1/dead-letters", description="Dead letters"
)
blueprint.before_request(require_key)
blueprint.before_request(limit_body)
blueprint.before_request(require_json)

_LETTER = re.compile(r"dl_([1-9][0-9]{0,17})")


def _id(text: str) -> int:
    match = _LETTER.fullmatch(text)
    if not match:
        raise NotFound(f"no dead letter {text[:80]!r}")
    return int(match[1])


@blueprint.get("")
@blueprint.doc(parameters=[*described.LETTERS, *described.page(20, 100)])
@blueprint.alt_response(200, schema=schemas.DeadLetterPage)
def letters() -> Response:
    """What was given up, newest first. Filters: `job_id`, `model`, `code`, `redriven`; pages:
    `limit`, `after`."""
    limit = page_limit(20, 100)
    redriven = request.args.get("redriven")
    if redriven not in (None, "true", "false"):
        raise BadRequest("redriven: true or false", param="redriven")
    rows = gateway().services.dead_letters.list(
        tenant(),
        after=page_after(_id),
        limit=limit + 1,
        chosen=LetterFilter(
            job_id=_job_id(request.args.get("job_id"), "job_id"),
            model=request.args.get("model"),
            code=request.args.get("code"),
            redriven=None if redriven is None else redriven == "true",
        ),
    )
    return respond(views.page(rows, limit, views.dead_letter))


def _job_id(text: str | None, param: str) -> UUID | None:
    if text is None:
        return None
    with chosen_by(param):
        if text.startswith("batch_"):
            return read_uuid(text, "batch_", "batch")
        return read_uuid(text, "", "job")


@blueprint.get("/<letter_id>")
@blueprint.alt_response(200, schema=schemas.DeadLetter)
def letter(letter_id: str) -> Response:
    """One dead letter."""
    return respond(views.dead_letter(gateway().services.dead_letters.get(tenant(), _id(letter_id))))


@blueprint.post("/<letter_id>/redrive")
@blueprint.doc(parameters=[idempotency.PARAMETER])
@blueprint.arguments(schemas.Redrive)
@blueprint.alt_response(202, schema=schemas.Job, description="The job that runs it again.")
def redrive(body: dict[str, Any], letter_id: str) -> Response:
    """Run one dead letter again, as a new job; again is the same job."""
    services, found, once = gateway().services, _id(letter_id), idempotency.asked()
    job_id = idempotency.earlier(once) or services.dead_letters.redrive(
        tenant(), found, body.get("deadline"), once
    )
    with idempotency.still_there():
        row = services.jobs.get(tenant(), job_id)
    services.pump.kick(row.group_name)
    job = views.job(row)
    return respond(job, 202, {"Location": job["urls"]["self"], "Retry-After": "1"})


@blueprint.post("/redrive")
@blueprint.doc(parameters=[idempotency.PARAMETER])
@blueprint.arguments(schemas.RedriveMany)
@blueprint.alt_response(202, schema=schemas.Redriven)
def redrive_many(body: dict[str, Any]) -> Response:
    """Run the oldest dead letters that match again: one new job for each old one. Those that were
    run again before are left out; `has_more` says that another call would find more."""
    chosen = body["filter"]
    services = gateway().services
    made = services.dead_letters.redrive_all(
        tenant(),
        LetterFilter(
            job_id=_job_id(chosen.get("job_id"), "filter.job_id"),
            model=chosen.get("model"),
            code=chosen.get("code"),
        ),
        limit=body["limit"],
        deadline=body.get("deadline"),
        once=idempotency.asked(),
    )
    g.replayed = made.again
    services.pump.kick(services.settings.group)
    return respond(views.redriven(made), 202)
