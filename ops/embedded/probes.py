"""Is it there? Small HTTP questions with a deadline; the answer, or an exception."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

TIMEOUT = 2.0
"""Seconds one question may take. A server that is still starting does not answer at all."""
EXCERPT = 300
"""Bytes of an unexpected answer that an error shows."""

# No proxies: everything asked here is on loopback, whatever the environment says.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NotReady(Exception):
    """The answer was not the expected one."""


def expect(url: str, expected: int) -> None:
    """Raise unless a GET is answered with this status."""
    try:
        with _OPENER.open(url, timeout=TIMEOUT) as response:
            status, text = response.status, ""
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read(EXCERPT).decode(errors="replace").strip()
    if status != expected:
        raise NotReady(f"{url} answers {status}, not {expected} {text}".rstrip())


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a JSON question. Raises for any status but success."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with _OPENER.open(request, timeout=TIMEOUT) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
