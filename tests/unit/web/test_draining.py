"""An answer says that its connection ends, where it will because of what was left of the body."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn.http.body import LengthReader

from web.bodies import WholeBody
from web.draining import FORGIVEN, _Honest


class Answer:
    def __init__(self) -> None:
        self.did: list[str] = []

    def force_close(self) -> None:
        self.did.append("close")

    def start_response(self, status: str, headers: list[tuple[str, str]]) -> None:
        self.did.append(status)


def app(environ: dict[str, Any], start: Any) -> list[bytes]:
    start("401 Unauthorized", [])
    return []


@pytest.mark.parametrize(
    ("unread", "failed", "closes"),
    [(FORGIVEN, False, False), (FORGIVEN + 1, False, True), (0, True, True)],
)
def test_what_is_left_of_a_body_ends_its_connection_and_the_answer_says_so(
    unread: int, failed: bool, closes: bool
) -> None:
    body, answer = WholeBody(LengthReader(SimpleNamespace(), unread), None), Answer()
    body.failed = failed
    _Honest(app)({"wsgi.input": body}, answer.start_response)
    assert answer.did == ["close"] * closes + ["401 Unauthorized"]
