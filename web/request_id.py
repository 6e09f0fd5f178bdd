"""The name of a request, in its answer and in the logs."""

from __future__ import annotations

import re

import uuid_utils

from workers import logs

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def request_id(given: str | None) -> str:
    """The client's own, where it is one, or a new one; from here on in the logs of this request."""
    found = given if given and _REQUEST_ID.fullmatch(given) else f"req_{uuid_utils.uuid7().hex}"
    logs.request_id.set(found)
    return found
