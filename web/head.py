"""What the head of a request says, wherever it is looked at: in line, in front of Flask, behind
it."""

from __future__ import annotations

import re

from web.gate import Name

_INFER = re.compile(
    r"/v2/models/([A-Za-z0-9][A-Za-z0-9._-]{0,254})"
    r"(?:/versions/(?=[0-9]{1,18}/)0*([0-9]+))?/infer"
)


def asked_model(path: str) -> Name | None:
    """The model, and its version, that a request with this path would run; None of any other path.
    1 and 01 are one version."""
    match = _INFER.fullmatch(path)
    return None if match is None else (match[1], match[2] or "")


def api_key(authorization: str, x_api_key: str) -> str:
    """The key in these two headers; empty where there is none."""
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else x_api_key
