"""orjson for Flask's own JSON and ours."""

from __future__ import annotations

from typing import Any

import orjson
from flask import Response
from flask.json.provider import JSONProvider
from flask_smorest import Blueprint
from webargs.core import is_json, missing
from webargs.flaskparser import FlaskParser
from werkzeug.exceptions import RequestEntityTooLarge

from web.bodies import WholeBody

RECEIVE = 300.0
"""Seconds a JSON body may take to come."""


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


class _Parser(FlaskParser):
    """webargs, reading JSON as strictly as everything else here: what is no Unicode is no JSON."""

    def _raw_load_json(self, req: Any) -> Any:
        if not is_json(req.mimetype):
            return missing
        if isinstance(stream := req.environ["wsgi.input"], WholeBody):
            stream.within(RECEIVE)
        body = req.get_data()
        if req.content_length is None and len(body) >= (req.max_content_length or len(body) + 1):
            # One of unknown length is cut at the limit without a word.
            raise RequestEntityTooLarge
        return orjson.loads(body)


class ApiBlueprint(Blueprint):  # type: ignore[misc]
    """A blueprint of routes that OpenAPI describes."""

    ARGUMENTS_PARSER = _Parser()
