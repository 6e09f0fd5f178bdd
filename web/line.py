"""A realtime request's place in the line for its model, before the application has seen it."""

from __future__ import annotations

import re
import time
from typing import Any

import orjson
import uuid_utils

from errors import BadRequest, Overloaded
from web.context import Gateway
from web.gate import Name
from web.http import DEADLINE, parse_deadline

_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/0*([0-9]+?))?/infer")
_DEADLINE = DEADLINE.upper()


class Line:
    """One request in line. What it finds wrong with the request is the application's to say."""

    __slots__ = ("_began", "_found", "_held", "_limit", "_name")

    def __init__(self, found: Gateway, name: Name, limit: float):
        self._found = found
        self._name = name
        self._limit = limit
        self._began = time.monotonic()
        self._held = False

    @classmethod
    def of(cls, app: Any, req: Any) -> Line | None:
        """A gunicorn request's place, where it is one that somebody waits for and a model has to
        run for."""
        if req.method != "POST" or (match := _INFER.fullmatch(req.path)) is None:
            return None
        found: Gateway = app.extensions["tidegate"]
        name = match[1], match[2] or ""
        settings = found.services.settings
        limit = settings.realtime_timeout
        for header, value in req.headers:
            if header == "PREFER":
                return None
            if header == _DEADLINE:
                try:
                    limit = parse_deadline(value)
                except BadRequest:
                    return None
        if found.catalog.is_cached(*name):
            return None
        return cls(found, name, min(limit, settings.max_realtime_timeout))

    def wait(self) -> bytes | None:
        """Until its turn; or what to answer at once where that would come too late."""
        lane = self._found.lane
        try:
            lane.admit(self._name, self._limit, last=True)
            self._held = lane.gate.wait(self._name, self._limit)
            lane.admit(self._name, self._limit - (time.monotonic() - self._began))
        except Overloaded as error:
            # Those behind it need not wait until it has heard of it.
            self.leave()
            lane.refusals.wait(self._limit)
            self._found.metrics.refused(self._name[0])
            return _answer(error)
        return None

    def leave(self) -> None:
        """It is over, one way or another."""
        if self._held:
            self._held = False
            self._found.lane.gate.freed(self._name)


def _answer(error: Overloaded) -> bytes:
    body = orjson.dumps({"error": error.message})
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\nRetry-After: %d\r\nX-Request-ID: req_%s\r\n\r\n%s"
        % (len(body), error.retry_after or 1, uuid_utils.uuid7().hex.encode(), body)
    )
