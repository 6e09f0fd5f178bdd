"""Plain realtime requests, served in front of Flask.

Of what a request cost the gateway, more than a third was Flask's and Werkzeug's: contexts, routing,
header objects, hooks. A request that asks for nothing unusual needs none of it. Whatever else a
request has in it (a preference, an encoding, a key or model we have not seen lately) goes on to the
application, which can do everything that is done here, and says what is wrong with a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import structlog
from flask import Flask

from errors import BadRequest, TidegateError
from inference import oip
from inference.metadata import check
from inference.tensors import InferResult
from web import error_handlers, gate, realtime
from web.bodies import WholeBody
from web.catalog import Entry
from web.context import Gateway
from web.head import api_key, asked_model
from web.http import parse_deadline
from web.json import dumps
from web.request_id import request_id

log = structlog.get_logger(__name__)

Environ = dict[str, Any]
Start = Callable[[str, list[tuple[str, str]]], Any]

_RULES = (
    "/v2/models/<model>/infer",
    "/v2/models/<model>/versions/<version>/infer",
)
_UNUSUAL = frozenset(
    {
        "HTTP_PREFER",
        "HTTP_CONTENT_ENCODING",
        "HTTP_TRANSFER_ENCODING",
        "HTTP_IDEMPOTENCY_KEY",
        "HTTP_EXPECT",
        "HTTP_X_HTTP_METHOD_OVERRIDE",
    }
)


@dataclass(frozen=True, slots=True)
class _Plain:
    """A request that is served here."""

    tenant: UUID
    model: str
    version: str
    entry: Entry
    limit: float
    """Seconds it may take where its body says nothing else."""
    given: bool
    """That is what its header says, and goes before what its body says."""
    header_length: int | None
    rule: str


class Express:
    """A WSGI application in front of a Flask one."""

    def __init__(self, app: Flask):
        self._next = app.wsgi_app
        self._found: Gateway = app.extensions["tidegate"]

    def __call__(self, environ: Environ, start: Start) -> Iterable[bytes]:
        plain = self._plain(environ)
        if plain is None:
            return self._next(environ, start)  # type: ignore[arg-type]
        return self._serve(plain, environ, start)

    def _plain(self, environ: Environ) -> _Plain | None:
        """The request as far as its head says, if all of that is as usual."""
        if environ["REQUEST_METHOD"] != "POST":
            return None
        name = asked_model(environ["PATH_INFO"])
        if name is None or environ.get("QUERY_STRING") or not _UNUSUAL.isdisjoint(environ):
            return None
        found, settings = self._found, self._found.services.settings
        accepted = environ.get("HTTP_ACCEPT_ENCODING")
        length = environ.get("CONTENT_LENGTH", "")
        if (
            (accepted and accepted != "identity")
            or not length.isdecimal()
            or not 0 < int(length) <= settings.max_body_bytes
            or not isinstance(environ["wsgi.input"], WholeBody)
        ):
            return None
        tenant = found.keys.fresh(
            api_key(environ.get("HTTP_AUTHORIZATION", ""), environ.get("HTTP_X_API_KEY", ""))
        )
        entry = found.catalog.fresh(*name)
        if tenant is None or entry is None or entry.spec.cache_ttl:
            return None
        limit, header = settings.realtime_timeout, environ.get("HTTP_TIDEGATE_DEADLINE")
        head = environ.get("HTTP_INFERENCE_HEADER_CONTENT_LENGTH")
        try:
            if header is not None:
                limit = parse_deadline(header)
            if head is not None:
                head = oip.header_length(head)
        except BadRequest:
            return None
        # Whether it would have its answer in time has been asked in line, a moment ago.
        limit = min(limit, settings.max_realtime_timeout)
        return _Plain(tenant, *name, entry, limit, header is not None, head, _RULES[name[1] != ""])

    def _serve(self, plain: _Plain, environ: Environ, start: Start) -> Iterable[bytes]:
        began = time.perf_counter()
        found = self._found
        found.metrics.began()
        headers = [
            ("X-Request-ID", request_id(environ.get("HTTP_X_REQUEST_ID"))),
            ("X-Content-Type-Options", "nosniff"),
        ]
        try:
            length = int(environ["CONTENT_LENGTH"])
            status, body = self._answer(plain, environ["wsgi.input"], length, headers)
        except TidegateError as error:
            status, more = error_handlers.told(error)
            headers += more.items()
            body = dumps({"error": error.message})
            headers.append(("Content-Type", "application/json"))
        except Exception:
            log.exception("a request failed", action="request.failed", path=environ["PATH_INFO"])
            status, body = 500, dumps({"error": error_handlers.BUG})
            headers.append(("Content-Type", "application/json"))
        finally:
            found.metrics.over()
        headers.append(("Content-Length", str(len(body))))
        found.metrics.observe("POST", plain.rule, status, time.perf_counter() - began)
        start(error_handlers.line(status), headers)
        return [body]

    def _answer(
        self, plain: _Plain, stream: WholeBody, length: int, headers: list[tuple[str, str]]
    ) -> tuple[int, bytes]:
        found, settings = self._found, self._found.services.settings
        stream.within(plain.limit - _passed())
        body = stream.whole()
        if body is None or len(body) < length:
            raise BadRequest("the body ended before its announced length")
        asked, fmt = oip.parse_infer(
            body,
            plain.header_length,
            model=plain.model,
            version=plain.version,
            spec=plain.entry.spec,
        )
        check(asked, plain.entry.spec)
        asked, given = oip.take_timeout(asked)
        timeout = plain.limit
        if given and not plain.given:
            timeout = min(given, settings.max_realtime_timeout)
        job_id = found.services.ids.mint(plain.tenant)
        headers.append(("Tidegate-Job-Id", str(job_id)))
        answer = realtime.run(
            found, asked, max(0.001, timeout - _passed()), tenant=plain.tenant, job_id=job_id
        )
        outcome = answer.outcome
        if not isinstance(outcome, InferResult):
            raise outcome
        rendered, header_length = oip.render_infer(outcome, fmt)
        if header_length is None:
            headers.append(("Content-Type", "application/json"))
        else:
            headers.append((oip.HEADER_LENGTH, str(header_length)))
            headers.append(("Content-Type", "application/octet-stream"))
        return 200, rendered


def _passed() -> float:
    """Seconds since the request came in."""
    arrived = gate.arrived.get()
    return time.monotonic() - arrived if arrived is not None else 0.0
