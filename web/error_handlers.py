"""What an error means in HTTP: one table for the status, three shapes for the body.

`/v2` answers as Triton does, files, batches and webhooks as OpenAI does, everything else with RFC
9457 problem details. No shape ever holds a traceback.
"""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import structlog
from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

import errors
from errors import TidegateError
from web.json import dumps

log = structlog.get_logger(__name__)

STATUS: dict[type[TidegateError], int] = {
    errors.TidegateError: 500,
    errors.BadRequest: 400,
    errors.BadBody: 400,
    errors.BadTensor: 400,
    errors.Unsupported: 400,
    errors.BadFile: 400,
    errors.KeyReused: 422,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.ModelNotFound: 404,
    errors.Conflict: 409,
    errors.Cancelled: 409,
    errors.Gone: 410,
    errors.TooLarge: 413,
    errors.ModelFailed: 500,
    errors.Unavailable: 503,
    errors.Overloaded: 503,
    errors.ModelNotReady: 503,
    errors.ServerLost: 503,
    errors.DeadlineExceeded: 504,
    errors.Overran: 504,
}

BUG = "the gateway failed; its log says why"
MOST_ERRORS, MOST_PATH = 20, 200
"""Wrong fields that one answer lists, and characters of each one's name."""

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_OPENAI_PATHS = ("/v1/files", "/v1/batches", "/v1/webhook_")


def install(app: Flask) -> None:
    """Answer every error of this app in the shape of its path."""
    app.register_error_handler(TidegateError, on_error)
    app.register_error_handler(HTTPException, on_http_exception)
    app.register_error_handler(Exception, on_bug)


def status_of(error: TidegateError) -> int:
    """The status of an error, or of its nearest ancestor in the table."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def told(error: TidegateError) -> tuple[int, dict[str, str]]:
    """The status of an error, and the headers that go with it."""
    headers: dict[str, str] = {}
    status = status_of(error)
    if status == 503 or error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after or 1)))
    if status == 401:
        headers["WWW-Authenticate"] = 'Bearer error="invalid_token"'
    if status == 409 and error.retry_after is None:
        # The openai SDK retries a 409; but for one that says when, ours never go away.
        headers["x-should-retry"] = "false"
    return status, headers


def line(status: int) -> str:
    """`200 OK`, as WSGI wants it."""
    return f"{status} {HTTP_STATUS_CODES[status]}"


def on_error(error: TidegateError) -> Response:
    status, headers = told(error)
    return _response(status, error.code, error.message, error.param, headers)


def on_http_exception(error: HTTPException) -> Response:
    """Werkzeug's own: no such route, wrong method, body too large, a field that is wrong."""
    status = error.code or 500
    if status == 422 and request.path.startswith(_OPENAI_PATHS):
        status = 400  # what OpenAI answers
    kept = {name: value for name, value in error.get_headers() if name in ("Allow", "Location")}
    data: dict[str, Any] = getattr(error, "data", None) or {}
    detail, pointers = error.description or error.name, None
    if "messages" in data:
        pointers = list(islice(_pointers(data["messages"]), MOST_ERRORS))
        detail = "; ".join(f"{pointer}: {text}" for pointer, text in pointers) or detail
    code = error.name.lower().replace(" ", "_")
    param = pointers[0][0] if pointers else None
    return _response(status, code, detail, param, kept, pointers)


def on_bug(error: Exception) -> Response:
    log.exception("a request failed", action="request.failed", path=request.path)
    return _response(500, "internal", BUG, None, {})


def _pointers(messages: Any, path: str = "") -> Any:
    """marshmallow's nested messages as (field path, text) pairs."""
    if isinstance(messages, dict):
        for name, below in messages.items():
            whole = name == "_schema" or (name == "json" and not path)
            yield from _pointers(below, path if whole else f"{path}.{name}".lstrip(".")[:MOST_PATH])
    else:
        for text in messages if isinstance(messages, list) else [messages]:
            yield path or "body", str(text)


def _response(
    status: int,
    code: str,
    detail: str,
    param: str | None,
    headers: dict[str, str],
    pointers: list[tuple[str, str]] | None = None,
) -> Response:
    body: dict[str, Any]
    content_type = "application/json"
    if request.path.startswith("/v2"):
        body = {"error": detail}
    elif request.path.startswith(_OPENAI_PATHS):
        kind = _OPENAI_TYPES.get(
            status, "invalid_request_error" if status < 500 else "server_error"
        )
        body = {"error": {"message": detail, "type": kind, "param": param, "code": code}}
    else:
        content_type = "application/problem+json"
        body = {
            "type": f"urn:tidegate:error:{code}",
            "title": code.replace("_", " ").capitalize(),
            "status": status,
            "detail": detail,
            "instance": request.path,
            "code": code,
            "request_id": g.get("request_id"),
        }
        if pointers:
            body["errors"] = [
                {"pointer": "#/" + path.replace(".", "/"), "detail": text}
                for path, text in pointers
            ]
        elif param:
            body["errors"] = [{"pointer": "#/" + param.replace(".", "/"), "detail": detail}]
    return Response(dumps(body), status=status, headers=headers, content_type=content_type)
