"""Answers that a client may keep, and need not be sent again while nothing has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from flask import Response, request

from web.json import dumps

PARAMETER: dict[str, Any] = {
    "in": "header",
    "name": "If-None-Match",
    "schema": {"type": "string"},
    "description": "ETags of answers that the client has, or `*`.",
}
HEADERS: dict[str, Any] = {
    "ETag": {"schema": {"type": "string"}, "description": "Changes with every byte of the answer."}
}
"""Both as OpenAPI says them."""
CACHING = "private, no-cache"
"""A client may keep the answer, which is what makes a 304 worth something, and asks each time
whether it still holds; a cache shared between clients may not: nothing tells it whose it is."""


def tag(body: bytes) -> str:
    """What stands between the quotes of an answer's ETag."""
    return hashlib.sha256(body).hexdigest()[:32]


def respond(value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """`value` in JSON with its ETag: 200, or 304 without a body where the client names the tag."""
    body = dumps(value)
    named = tag(body)
    known = request.if_none_match.contains_weak(named)
    response = Response(
        b"" if known else body, 304 if known else 200, headers, content_type="application/json"
    )
    response.set_etag(named)
    response.headers["Cache-Control"] = CACHING
    return response
