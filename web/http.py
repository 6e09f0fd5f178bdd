"""Reading headers: keys, preferences, deadlines, page limits."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

from flask import g, request
from werkzeug.exceptions import UnsupportedMediaType

from config import MIB
from errors import BadRequest, Gone, NotFound, Unauthenticated
from storage import time_limit
from web.context import gateway
from web.head import api_key

T = TypeVar("T")

MOST_FIELDS = MIB
"""Bytes of a JSON body that holds no tensors."""

DEADLINE = "Tidegate-Deadline"

_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
_HEX = re.compile(r"[0-9a-f]{32}")
_DASHED = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def refuse_nul() -> None:
    """A `before_request`: no value of ours holds a NUL, and Postgres stores none."""
    if not request.query_string:
        return
    for name, value in request.args.items(multi=True):
        if "\0" in value:
            raise BadRequest(f"{name}: holds a NUL character", param=name)


def limit_body() -> None:
    """A `before_request`: a body of fields is small, and while it is read nobody is answered."""
    request.max_content_length = MOST_FIELDS


def require_json() -> None:
    """A `before_request`: a body that says it is something else is not read as if it were empty."""
    sent = request.content_length or "Transfer-Encoding" in request.headers
    if request.method == "POST" and sent and not request.is_json:
        raise UnsupportedMediaType("the body must be JSON: Content-Type: application/json")


def require_key() -> None:
    """A `before_request`: who is asking. Raises `Unauthenticated`."""
    headers = request.headers
    key = api_key(headers.get("Authorization", ""), headers.get("X-API-Key", ""))
    if not key:
        raise Unauthenticated("give an API key: Authorization: Bearer <key>, or X-API-Key: <key>")
    g.tenant = gateway().keys.tenant_of(key)


def tenant() -> UUID:
    """The tenant of the request's key."""
    found: UUID = g.tenant
    return found


@dataclass(frozen=True, slots=True)
class Preference:
    """RFC 7240 as far as we honour it. `wait` is seconds, None where not asked for."""

    respond_async: bool = False
    wait: float | None = None

    @property
    def durable(self) -> bool:
        return self.respond_async or self.wait is not None

    @property
    def waits(self) -> bool:
        return self.wait is not None and not self.respond_async

    def applied(self) -> dict[str, str]:
        """The headers of an answer that depends on it."""
        if self.respond_async:
            return {"Vary": "Prefer", "Preference-Applied": "respond-async"}
        if self.wait is not None:
            return {"Vary": "Prefer", "Preference-Applied": f"wait={self.wait:g}"}
        return {"Vary": "Prefer"}


def preference(max_wait: float) -> Preference:
    """The request's `Prefer` headers; what we don't know is passed over, as the RFC asks."""
    respond_async, wait = False, None
    for part in request.headers.get("Prefer", "").split(","):
        token = part.split(";")[0].strip()
        name, _, value = (text.strip().strip('"') for text in token.partition("="))
        if name.lower() == "respond-async":
            respond_async = True
        elif name.lower() == "wait" and re.fullmatch(r"[0-9]{1,9}", value):
            wait = min(float(value), max_wait)
    return Preference(respond_async, wait)


def deadline(default: float, maximum: float, *, cut: bool = False) -> float:
    """Seconds the request may take: `Tidegate-Deadline`, as seconds from now or as a moment in
    RFC 3339, before what the body says. More than the maximum is cut or refused. Raises
    `BadRequest`."""
    text = request.headers.get(DEADLINE)
    if text is None:
        return min(default, maximum)
    seconds = parse_deadline(text)
    if seconds > maximum and not cut:
        raise BadRequest(f"{DEADLINE}: {maximum:.0f} seconds from now at most", param=DEADLINE)
    return min(seconds, maximum)


def parse_deadline(text: str) -> float:
    """Seconds from now. Raises `BadRequest` for what is neither a number nor a moment ahead."""
    if _SECONDS.fullmatch(text):
        seconds = float(text)
    else:
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise BadRequest(
                f"{DEADLINE}: seconds from now (2.5) or a moment in RFC 3339 with its zone",
                param=DEADLINE,
            ) from None
        seconds = (moment - datetime.now(UTC)).total_seconds()
    if seconds <= 0:
        raise BadRequest(f"{DEADLINE}: must lie ahead", param=DEADLINE)
    return seconds


@contextmanager
def store_deadline() -> Iterator[None]:
    """Around a route that reads or writes objects: the store has until the request's
    `Tidegate-Deadline`, where it names one. Raises `BadRequest`."""
    text = request.headers.get(DEADLINE)
    with time_limit.within(math.inf if text is None else parse_deadline(text)):
        yield


@contextmanager
def about(param: str) -> Iterator[None]:
    """What is wrong inside the block is wrong with this field of the request."""
    try:
        yield
    except (BadRequest, NotFound, Gone) as error:
        # A new one: the old may be somebody else's as well.
        raise type(error)(error.message, param=param) from error


@contextmanager
def chosen_by(param: str) -> Iterator[None]:
    """An id inside the block chooses what is listed: where it is of no form of ours, the parameter
    is wrong, and nothing was looked for."""
    try:
        yield
    except NotFound as error:
        raise BadRequest(f"{param}: {error.message}", param=param) from error


def page_after(read: Callable[[str], T]) -> T | None:
    """The `after` of a list, as `read` reads the ids in it. Raises `BadRequest`."""
    text = request.args.get("after")
    if not text:
        return None
    with chosen_by("after"):
        return read(text)


def page_limit(default: int, most: int) -> int:
    """The `limit` of a list. Raises `BadRequest`."""
    text = request.args.get("limit")
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= most:
        raise BadRequest(f"limit: a number from 1 to {most}", param="limit")
    return int(text)


def read_uuid(text: str, prefix: str, what: str) -> UUID:
    """An id of ours as its UUID. Raises `NotFound`: an id of another form names nothing."""
    digits = text.removeprefix(prefix)
    if not text.startswith(prefix) or not (_HEX if prefix else _DASHED).fullmatch(digits):
        raise NotFound(f"no {what} {text[:80]!r}")
    return UUID(digits)
