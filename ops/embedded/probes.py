"""Is it there? Small HTTP questions with a deadline; the answer, or an exception."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

TIMEOUT = 2.0
"""Seconds one question may take. A server that is still starting does not answer at all."""

# No proxies: everything asked here is on loopback, whatever the environment says.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NotReady(Exception):
    """The answer was not the expected one."""


def status(url: str) -> int:
    """The status that a GET is answered with, errors included."""
    try:
        with _OPENER.open(url, timeout=TIMEOUT) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def expect(url: str, expected: int) -> None:
    found = status(url)
    if found != expected:
        raise NotReady(f"{url} answers {found}, not {expected}")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The JSON answer to a JSON question. Raises for any status but success."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with _OPENER.open(request, timeout=TIMEOUT) as response:
        answer: dict[str, Any] = json.load(response)
    return answer
