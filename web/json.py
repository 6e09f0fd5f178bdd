"""orjson for Flask's own JSON and ours."""

from __future__ import annotations

from typing import Any

import orjson
from flask import Response
from flask.json.provider import JSONProvider


def dumps(value: Any) -> bytes:
    """`value` as JSON text; times as RFC 3339 in UTC."""
    return orjson.dumps(value, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS)


def respond(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON response."""
    return Response(dumps(value), status=status, headers=headers, content_type="application/json")


class OrjsonProvider(JSONProvider):
    """What `request.get_json` and flask-smorest use."""

    def dumps(self, obj: Any, **_: Any) -> str:
        return dumps(obj).decode()

    def loads(self, s: str | bytes, **_: Any) -> Any:
        return orjson.loads(s)
