"""`Idempotency-Key`: who sends a POST again gets what the first one made.

A route that makes something needs `once = idempotency.asked()`, handed to the ledger, which writes
the key down with what it makes, and `keep` around that, which notices what was there before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from uuid import UUID

import orjson
import structlog
from flask import g, request

from config import KIB
from errors import BadRequest, DeadlineExceeded, Gone, NotFound, Unavailable
from inference.tensors import Buffer
from storage.idempotency import Once
from web.context import gateway
from web.http import DEADLINE, tenant
from web.offload import offload

log = structlog.get_logger(__name__)
T = TypeVar("T")

HEADER = "Idempotency-Key"
PARAMETER: dict[str, Any] = {
    "in": "header",
    "name": HEADER,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255},
    "description": "Send the request again with the same key, and it is done once.",
}
"""As OpenAPI says it."""

SMALL = 32 * KIB
"""Bytes of a request that are looked at sooner than another thread is asked to."""

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


def asked(*told: Buffer) -> Once | None:
    """The request's key, where it has one, with a fingerprint of what was asked: of `told`, or else
    of the JSON body, and of what else decides what is made. `Prefer` does not: it is about the
    answer, and who asks again may have more patience. Raises `BadRequest`."""
    key = given()
    if key is None:
        return None
    deadline = request.headers.get(DEADLINE, "")
    parts = (request.path.encode(), request.query_string, deadline.encode(), *told)
    body = None if told else request.get_data()
    size = sum(map(len, told)) + len(body or b"")
    return Once(
        tenant_id=tenant(),
        route=f"{request.method} {request.url_rule}",
        key=key,
        fingerprint=(
            fingerprint(parts, body) if size <= SMALL else offload(fingerprint, parts, body)
        ),
        ttl=gateway().services.settings.idempotency_ttl,
    )


def given() -> str | None:
    """The request's key, bare or quoted as in the IETF's draft. Raises `BadRequest`."""
    text = request.headers.get(HEADER)
    if text is None:
        return None
    quoted = _QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not _KEY.fullmatch(key) or (key.startswith('"') and not quoted):
        raise BadRequest(
            f"{HEADER}: 1 to 255 visible ASCII characters, in double quotes or without",
            param=HEADER,
        )
    return key


def fingerprint(parts: Sequence[Buffer], body: bytes | None = None) -> bytes:
    """SHA-256 over all parts, and over a JSON body without what makes no difference in it: white
    space, and the order of names."""
    digest = hashlib.sha256()
    for part in (*parts, *(() if body is None else (_canonical(body),))):
        # With its length: no two requests run together into one.
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def _canonical(body: bytes) -> bytes:
    try:
        return orjson.dumps(orjson.loads(body), option=orjson.OPT_SORT_KEYS)
    except (ValueError, TypeError):
        # No JSON, or nested deeper than is written again: it stands for itself.
        return body


def earlier(once: Once | None) -> UUID | None:
    """What an earlier request with this key made, whatever has changed since: nothing is asked of
    models or files again. Raises `KeyReused`."""
    found = gateway().services.idempotency.earlier(once) if once else None
    g.replayed = found is not None
    return found


def keep(made: UUID, write: Callable[[], T], stored: str | None = None) -> T:
    """`write` what has been `made` to the ledger, and hear what it keeps, by id or as a row: this,
    or what the key made earlier. The object that was `stored` for it goes again where it is for
    nothing."""
    try:
        kept = write()
    except Unavailable:
        # It may have been written after all. The sweep of unreferenced objects will know.
        raise
    except Exception:
        _discard(stored)
        raise
    g.replayed = made not in (kept, getattr(kept, "id", None))
    if g.replayed:
        _discard(stored)
    return kept


@contextmanager
def still_there() -> Iterator[None]:
    """What a key made may be gone by now. It is not made again: who asks would not expect it."""
    try:
        yield
    except NotFound as error:
        raise Gone(f"{HEADER}: what it made is no longer kept", param=HEADER) from error


def _discard(key: str | None) -> None:
    try:
        if key is not None:
            gateway().objects.delete(key)
    except (Unavailable, DeadlineExceeded) as error:
        log.warning("object left behind", action="object.left", key=key, error=error.message)
