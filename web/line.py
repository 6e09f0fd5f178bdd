"""A realtime request's place in the line for its model, before the application has seen it."""

from __future__ import annotations

import time
from typing import Any

import orjson
from gunicorn.util import unquote_to_wsgi_str

from errors import BadRequest, Overloaded
from web import gate
from web.context import Gateway
from web.error_handlers import told
from web.gate import Name, Place
from web.head import api_key, asked_model
from web.http import DEADLINE, parse_deadline
from web.request_id import request_id

HOLD = 1.0
"""The longest a request is held whose head doesn't say how long it may take: its body may, and is
read by the application."""

_DEADLINE = DEADLINE.upper()


class Line:
    """One request in line. What it finds wrong with the request is the application's to say."""

    __slots__ = ("_began", "_found", "_hold", "_limit", "_name", "_place", "_request_id")

    def __init__(
        self, found: Gateway, name: Name, limit: float, *, given: bool, request_id: str | None
    ):
        """`limit`: seconds it may take, where that was `given`, or what is usual."""
        self._found = found
        self._name = name
        self._limit = limit
        self._hold = limit if given else min(limit, HOLD)
        self._request_id = request_id
        self._began = time.monotonic()
        self._place: Place | None = None

    @classmethod
    def of(cls, app: Any, req: Any) -> Line | None:
        """A gunicorn request's place, where it is one that somebody we know waits for and a model
        has to run for. Who has no good key takes no place, and hears nothing about the line."""
        if req.method != "POST":
            return None
        name = asked_model(unquote_to_wsgi_str(req.path))
        if name is None:
            return None
        found: Gateway = app.extensions["tidegate"]
        headers = dict(req.headers)
        key = api_key(headers.get("AUTHORIZATION", ""), headers.get("X-API-KEY", ""))
        if "PREFER" in headers or found.keys.fresh(key) is None or found.catalog.is_cached(*name):
            return None
        settings = found.services.settings
        limit, given = settings.realtime_timeout, headers.get(_DEADLINE)
        if given is not None:
            try:
                limit = parse_deadline(given)
            except BadRequest:
                return None
        return cls(
            found,
            name,
            min(limit, settings.max_realtime_timeout),
            given=given is not None,
            request_id=headers.get("X-REQUEST-ID"),
        )

    def wait(self) -> Overloaded | None:
        """Until its turn; or why it is refused at once, where that would come too late."""
        lane = self._found.lane
        try:
            lane.admit(self._name, self._limit, last=True)
            self._place = lane.gate.wait(self._name, self._hold)
            gate.place.set(self._place)
            lane.admit(self._name, self._limit - (time.monotonic() - self._began))
        except Overloaded as error:
            # Those behind it need not wait until it has heard of it.
            self.leave()
            lane.refusals.wait(self._hold)
            self._found.metrics.refused(self._name[0])
            return error
        return None

    def leave(self) -> None:
        """It is over, one way or another."""
        if self._place is not None:
            self._place.leave()

    def refusal(self, error: Overloaded, *, close: bool) -> bytes:
        """The whole answer, as the application would give it. `close`: the connection ends."""
        body = orjson.dumps({"error": error.message})
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "X-Request-ID": request_id(self._request_id),
            "X-Content-Type-Options": "nosniff",
            **told(error)[1],
        }
        if close:
            headers["Connection"] = "close"
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n".encode() + body
