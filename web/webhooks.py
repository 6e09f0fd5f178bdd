"""Webhook endpoints, with OpenAI's wire shapes: an unmodified `openai` SDK manages them.

The log of deliveries is ours. Nothing is sent from here: the sweeper sends, tests included.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import uuid_utils.compat as uuids
from flask import Response, g, request

from errors import BadRequest, Unavailable
from storage import events
from storage.events import DeliveryState
from tasks import egress
from web import described, idempotency, schemas, views
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

blueprint = ApiBlueprint("webhooks", __name__, url_prefix="/v1", description="Webhooks")
blueprint.before_request(require_key)
blueprint.before_request(limit_body)
blueprint.before_request(require_json)

PATIENCE = 5.0
"""Seconds a test may wait for a sweeper, besides what its delivery takes."""


@blueprint.get("/webhook_event_types")
@blueprint.alt_response(200, schema=schemas.EventTypes)
def event_types() -> Response:
    """The events there are."""
    return respond({"object": "list", "data": events.TYPES})


@blueprint.post("/webhook_endpoints")
@blueprint.doc(parameters=[idempotency.PARAMETER])
@blueprint.arguments(schemas.WebhookCreate)
@blueprint.alt_response(200, schema=schemas.WebhookWithSecret)
def create(body: dict[str, Any]) -> Response:
    """Make an endpoint. Its signing secret is in this answer, and in no other."""
    _check(body["url"])
    services, once, webhook_id = gateway().services, idempotency.asked(), uuids.uuid7()
    with idempotency.still_there():
        row = idempotency.keep(
            webhook_id,
            lambda: services.webhooks.create(
                tenant(),
                name=body["name"],
                url=body["url"],
                events=_distinct(body["event_types"]),
                webhook_id=webhook_id,
                once=once,
            ),
        )
    return _with_secret(row)


def _check(url: str) -> None:
    with about("url"):
        egress.parse(url, insecure=gateway().services.settings.webhook_insecure)


def _distinct(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _view(row: Any) -> dict[str, Any]:
    return views.webhook(row, gateway().services.webhooks.signing_secret(row.id, row.generation))


def _with_secret(row: Any) -> Response:
    secret = gateway().services.webhooks.signing_secret(row.id, row.generation)
    shown = views.webhook(row, secret) | {"signing_secret": secret}
    return respond(shown, headers={"Cache-Control": "no-store"})


def _read(webhook_id: str) -> UUID:
    return read_uuid(webhook_id, "we_", "webhook endpoint")


@blueprint.get("/webhook_endpoints")
@blueprint.doc(parameters=described.page(20, 100))
@blueprint.alt_response(200, schema=schemas.WebhookPage)
def webhooks() -> Response:
    """This tenant's endpoints, newest first. `limit`, `after`."""
    limit = page_limit(20, 100)
    rows = gateway().services.webhooks.list(tenant(), after=page_after(_read), limit=limit + 1)
    return respond(views.page(rows, limit, _view))


@blueprint.get("/webhook_endpoints/<webhook_id>")
@blueprint.alt_response(200, schema=schemas.Webhook)
def retrieve(webhook_id: str) -> Response:
    """One endpoint."""
    return respond(_view(gateway().services.webhooks.get(tenant(), _read(webhook_id))))


@blueprint.post("/webhook_endpoints/<webhook_id>")
@blueprint.arguments(schemas.WebhookUpdate)
@blueprint.alt_response(200, schema=schemas.Webhook)
def update(body: dict[str, Any], webhook_id: str) -> Response:
    """Change what is given. `enabled` (ours) ends deliveries, or takes them up after a 410."""
    found = _read(webhook_id)
    if "url" in body:
        _check(body["url"])
    row = gateway().services.webhooks.update(
        tenant(),
        found,
        name=body.get("name"),
        url=body.get("url"),
        events=_distinct(body["event_types"]) if "event_types" in body else None,
        enabled=body.get("enabled"),
    )
    return respond(_view(row))


@blueprint.delete("/webhook_endpoints/<webhook_id>")
@blueprint.alt_response(200, schema=schemas.Deleted)
def delete(webhook_id: str) -> Response:
    """Remove an endpoint, and what was to be delivered there."""
    gateway().services.webhooks.delete(tenant(), _read(webhook_id))
    return respond({"id": webhook_id, "object": "webhook_endpoint.deleted", "deleted": True})


@blueprint.post("/webhook_endpoints/<webhook_id>/rotate_secret")
@blueprint.doc(parameters=[idempotency.PARAMETER])
@blueprint.arguments(schemas.WebhookRotate)
@blueprint.alt_response(200, schema=schemas.WebhookWithSecret)
def rotate_secret(body: dict[str, Any], webhook_id: str) -> Response:
    """A new secret; where the old one is kept, both sign for 24 hours."""
    row, g.replayed = gateway().services.webhooks.rotate(
        tenant(),
        _read(webhook_id),
        keep=body["keep_old_secret_active_for_24_hours"],
        once=idempotency.asked(),
    )
    return _with_secret(row)


@blueprint.post("/webhook_endpoints/<webhook_id>/test")
@blueprint.doc(parameters=[idempotency.PARAMETER])
@blueprint.arguments(schemas.WebhookTest)
@blueprint.alt_response(200, schema=schemas.WebhookTested)
def test(body: dict[str, Any], webhook_id: str) -> Response:
    """Send a sample event, once, and wait for what the endpoint answers."""
    found = _read(webhook_id)
    services = gateway().services
    once, new = idempotency.asked(), uuids.uuid7()
    sample = idempotency.keep(
        new,
        lambda: services.deliveries.sample(
            tenant(), found, body["event_type"], delivery_id=new, once=once
        ),
    )
    until = time.monotonic() + services.settings.webhook_timeout + PATIENCE
    pause = 0.05
    while True:
        row, attempts = services.deliveries.get(tenant(), found, sample)
        if row.state != DeliveryState.PENDING:
            break
        if time.monotonic() > until:
            raise Unavailable("no sweeper has sent the test yet", retry_after=5)
        time.sleep(pause)
        pause = min(0.5, pause * 1.5)
    if not attempts or attempts[-1].status is None:
        raise BadRequest(f"the endpoint did not answer: {row.error}", param="url")
    return respond(
        {
            "object": "webhook_endpoint.test",
            "webhook_endpoint_id": webhook_id,
            "event_type": body["event_type"],
            "status_code": attempts[-1].status,
            "success": True,
        }
    )


@blueprint.get("/webhook_endpoints/<webhook_id>/deliveries")
@blueprint.doc(parameters=[described.STATE, *described.page(20, 100)])
@blueprint.alt_response(200, schema=schemas.DeliveryPage)
def deliveries(webhook_id: str) -> Response:
    """What was to be delivered, newest first, with each try. `state`, `limit`, `after`."""
    limit = page_limit(20, 100)
    state = request.args.get("state")
    if state is not None and state not in set(DeliveryState):
        raise BadRequest(f"state: one of {', '.join(DeliveryState)}", param="state")
    found = gateway().services.webhooks.get(tenant(), _read(webhook_id)).id
    rows = gateway().services.deliveries.list(
        tenant(),
        found,
        after=page_after(_read_delivery),
        limit=limit + 1,
        state=DeliveryState(state) if state else None,
    )
    return respond(views.page(rows, limit, lambda pair: views.delivery(*pair)))


def _read_delivery(delivery_id: str) -> UUID:
    return read_uuid(delivery_id, "msg_", "delivery")


@blueprint.get("/webhook_endpoints/<webhook_id>/deliveries/<delivery_id>")
@blueprint.alt_response(200, schema=schemas.Delivery)
def delivery(webhook_id: str, delivery_id: str) -> Response:
    """One delivery, with each try."""
    return respond(_delivery(webhook_id, delivery_id))


def _delivery(webhook_id: str, delivery_id: str) -> dict[str, Any]:
    found = gateway().services.deliveries.get(
        tenant(), _read(webhook_id), _read_delivery(delivery_id)
    )
    return views.delivery(*found)


@blueprint.post("/webhook_endpoints/<webhook_id>/deliveries/<delivery_id>/resend")
@blueprint.doc(parameters=[idempotency.PARAMETER])
@blueprint.alt_response(202, schema=schemas.Delivery)
def resend(webhook_id: str, delivery_id: str) -> Response:
    """Try once more, now, under the same id; 409 where the endpoint is disabled."""
    g.replayed = gateway().services.deliveries.resend(
        tenant(), _read(webhook_id), _read_delivery(delivery_id), idempotency.asked()
    )
    return respond(_delivery(webhook_id, delivery_id), 202)
