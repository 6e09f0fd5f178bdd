"""Open Inference Protocol v2: an unmodified `tritonclient.http` works against these routes.

Every request about a model goes through the group's realtime queue to a GPU worker.
"""

from __future__ import annotations

import re
import time
from uuid import UUID

from flask import Blueprint, Response, g, request
from werkzeug.exceptions import ClientDisconnected

from errors import (
    ModelNotFound,
    TidegateError,
    TooLarge,
)
from inference import oip
from inference.metadata import check
from inference.tensors import Buffer, InferRequest, InferResult
from web import durable, gate, idempotency, realtime
from web.bodies import WholeBody
from web.context import gateway
from web.http import deadline, preference, require_key, tenant
from web.json import respond
from web.lane import QUERY_TIMEOUT
from web.offload import offload
from web.schemas import MAX_WINDOW

blueprint = Blueprint("oip", __name__, url_prefix="/v2")
models = Blueprint("models", __name__, url_prefix="/v2")
models.before_request(require_key)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_VERSION = re.compile(r"[0-9]{0,18}")


def routes(path: str) -> tuple[str, str]:
    """The rule for the latest version of a model, and the one for a named version."""
    return f"/models/<model>{path}", f"/models/<model>/versions/<version>{path}"


def _checked(model: str, version: str) -> tuple[str, str]:
    if not _NAME.fullmatch(model) or not _VERSION.fullmatch(version):
        raise ModelNotFound(f"no model {model!r:.80} version {version!r:.20}")
    # 1 and 01 are one version to Triton, and so to whatever we keep by version.
    return model, str(int(version)) if version else ""


@blueprint.get("/health/live")
def live() -> Response:
    """The gateway is up."""
    return Response(status=200)


@blueprint.get("/health/ready")
def ready() -> Response:
    """A Triton behind a GPU worker would take requests now."""
    return Response(status=200 if _ready("", "") else 400)


def _ready(model: str, version: str) -> bool:
    try:
        return bool(gateway().lane.query("ready", model, version, timeout=2.0))
    except TidegateError:
        return False


@models.get("", strict_slashes=False)
def server() -> Response:
    """Triton's name, version and extensions."""
    return respond(gateway().lane.query("server"))


_METADATA, _METADATA_VERSION = routes("")


@models.get(_METADATA)
@models.get(_METADATA_VERSION)
def metadata(model: str, version: str = "") -> Response:
    return respond(gateway().catalog.get(*_checked(model, version)).metadata)


_CONFIG, _CONFIG_VERSION = routes("/config")


@models.get(_CONFIG)
@models.get(_CONFIG_VERSION)
def config(model: str, version: str = "") -> Response:
    return respond(gateway().catalog.get(*_checked(model, version)).config)


_READY, _READY_VERSION = routes("/ready")


@models.get(_READY)
@models.get(_READY_VERSION)
def model_ready(model: str, version: str = "") -> Response:
    """200, or 400 as Triton answers for a model that is not ready."""
    model, version = _checked(model, version)
    return Response(status=200 if _ready(model, version) else 400)


_STATS, _STATS_VERSION = routes("/stats")


@models.get("/models/stats")
def all_statistics() -> Response:
    return respond(gateway().lane.query("statistics"))


@models.get(_STATS)
@models.get(_STATS_VERSION)
def statistics(model: str, version: str = "") -> Response:
    return respond(gateway().lane.query("statistics", *_checked(model, version)))


@models.post("/repository/index")
def repository_index() -> Response:
    """The models of the group's Triton; `{"ready": true}` leaves out the others."""
    index = gateway().lane.query("index")
    asked = request.get_json(force=True, silent=True) if request.content_length else None
    if isinstance(asked, dict) and asked.get("ready"):
        index = [entry for entry in index if entry.get("state") == "READY"]
    return respond(index)


_INFER, _INFER_VERSION = routes("/infer")


@models.post(_INFER)
@models.post(_INFER_VERSION)
def infer(model: str, version: str = "") -> Response:
    """Run a model. 200 with the answer; 202 with a job where the client preferred that."""
    began = gate.arrived.get() or time.monotonic()
    found, settings = gateway(), gateway().services.settings
    _refuse_too_large(request.content_length or 0)
    # Known before the body is: what the model is like must not take longer than the answer may.
    limit = deadline(settings.realtime_timeout, settings.max_realtime_timeout, cut=True)
    model, version = _checked(model, version)
    entry = found.catalog.get(model, version, timeout=min(limit, QUERY_TIMEOUT))
    preferred = preference(settings.max_wait)
    if not preferred.durable and not entry.spec.cache_ttl:
        found.lane.admit((model, version), limit - (time.monotonic() - began))
    # A job's time begins when it is there.
    most = settings.max_realtime_timeout if preferred.durable else limit
    body, header_length = _body(most - (time.monotonic() - began)), _header_length()
    asked, fmt = oip.parse_infer(body, header_length, model=model, version=version, spec=entry.spec)
    check(asked, entry.spec)
    asked, given = oip.take_timeout(asked)
    if preferred.durable:
        job = durable.submit(
            asked,
            within=deadline(given or settings.job_deadline, MAX_WINDOW),
            # Inflated: compressed again, the same body has other bytes.
            once=idempotency.asked(body, str(header_length).encode()),
        )
        return durable.infer(job, preferred, render=lambda result: _rendered(result, fmt))
    timeout = deadline(given or settings.realtime_timeout, settings.max_realtime_timeout, cut=True)
    job_id = found.services.ids.mint(tenant())
    # What finding out about the model took is gone.
    left = max(0.001, timeout - (time.monotonic() - began))
    return _realtime(asked, fmt, left, job_id, cached=entry.spec.cache_ttl > 0)


def _realtime(
    asked: InferRequest, fmt: oip.ResponseFormat, timeout: float, job_id: UUID, *, cached: bool
) -> Response:
    # On the answer, whatever it is: see `app._end`.
    g.job_id = job_id
    keeping = None
    if cached:
        control = request.cache_control
        fresh = bool(control.no_cache) or control.max_age == 0
        keeping = realtime.Keeping(fresh=fresh, store=not control.no_store)
    answer = realtime.run(
        gateway(), asked, timeout, tenant=tenant(), job_id=job_id, keeping=keeping
    )
    if isinstance(answer.outcome, TidegateError):
        raise answer.outcome
    response = _rendered(answer.outcome, fmt)
    if answer.cache_status:
        response.headers["Cache-Status"] = answer.cache_status
    return response


def _body(seconds: float) -> Buffer:
    """The request's body, received within so many seconds and inflated. `_refuse_too_large` has
    seen the length it announced."""
    limit = gateway().services.settings.max_body_bytes
    stream = request.environ["wsgi.input"]
    if isinstance(stream, WholeBody):
        stream.within(seconds)
    if (length := request.content_length) and isinstance(stream, WholeBody):
        body = stream.whole()
        if body is not None:
            if len(body) < length:
                raise ClientDisconnected
            return oip.inflate(body, request.headers.get("Content-Encoding"), limit)
    # A body of unknown length is cut at the limit without a word; one byte more is the proof.
    request.max_content_length = limit + 1
    data = request.get_data(cache=False, parse_form_data=False)
    _refuse_too_large(len(data))
    return oip.inflate(data, request.headers.get("Content-Encoding"), limit)


def _refuse_too_large(size: int) -> None:
    limit = gateway().services.settings.max_body_bytes
    if size > limit:
        raise TooLarge(f"the body has more than {limit} bytes")


def _header_length() -> int | None:
    text = request.headers.get(oip.HEADER_LENGTH)
    return None if text is None else oip.header_length(text)


def _accepts(encoding: str) -> bool:
    """Named, and not with a weight of 0; `*` names none."""
    return any(name == encoding and weight > 0 for name, weight in request.accept_encodings)


def _rendered(result: InferResult, fmt: oip.ResponseFormat) -> Response:
    body, header_length = oip.render_infer(result, fmt)
    headers = {}
    if header_length is not None:
        headers[oip.HEADER_LENGTH] = str(header_length)
    # In Triton's order of preference; it compresses whatever the size.
    wanted = request.headers.get("Accept-Encoding", "").lower()
    for encoding in ("gzip", "deflate"):
        if encoding in wanted and _accepts(encoding):
            body = offload(oip.compress, body, encoding)
            headers["Content-Encoding"] = encoding
            break
    kind = "application/json" if header_length is None else "application/octet-stream"
    return Response(body, headers=headers, content_type=kind)
