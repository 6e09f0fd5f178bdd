"""What clients say in headers: preferences, deadlines, page limits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from flask import Flask
from marshmallow import ValidationError

from errors import BadRequest, NotFound
from web.http import (
    Preference,
    deadline,
    page_after,
    page_limit,
    parse_deadline,
    preference,
    read_uuid,
)
from web.schemas import parse_window

app = Flask("headers")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("", Preference()),
        ("respond-async", Preference(respond_async=True)),
        ("Respond-Async, wait=5", Preference(respond_async=True, wait=5)),
        ("wait=10", Preference(wait=10)),
        ('wait="7"; foo=bar', Preference(wait=7)),
        ("wait=9999", Preference(wait=60)),
        ("wait=soon", Preference()),
        ("return=minimal", Preference()),
    ],
)
def test_preferences(header: str, expected: Preference) -> None:
    with app.test_request_context(headers={"Prefer": header}):
        assert preference(max_wait=60) == expected


def test_a_deadline_is_seconds_from_now() -> None:
    assert parse_deadline("2.5") == 2.5


def test_a_deadline_may_be_a_moment() -> None:
    ahead = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < parse_deadline(ahead.isoformat()) <= 100


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "-1",
        "0",
        "nan",
        "inf",
        "1_0",
        "1e3",
        "9" * 10,
        "2020-01-01T00:00:00Z",
        "2999-01-01T00:00:00",
    ],
)
def test_a_deadline_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="Tidegate-Deadline"):
        parse_deadline(text)


def test_a_deadline_beyond_the_most_is_cut_or_refused() -> None:
    with app.test_request_context(headers={"Tidegate-Deadline": "100"}):
        assert deadline(30, 60, cut=True) == 60
        assert deadline(30, 200) == 100
        with pytest.raises(BadRequest, match="60 seconds") as caught:
            deadline(30, 60)
    assert caught.value.param == "Tidegate-Deadline"
    with app.test_request_context():
        assert deadline(30, 60) == 30


def test_an_id_that_chooses_what_is_listed_is_a_parameter() -> None:
    wrong = app.test_request_context(query_string={"after": "x"})
    with wrong, pytest.raises(BadRequest) as caught:
        page_after(lambda text: read_uuid(text, "file-", "file"))
    assert caught.value.param == "after"
    with app.test_request_context(query_string={"after": ""}):
        assert page_after(lambda text: read_uuid(text, "file-", "file")) is None


@pytest.mark.parametrize("text", ["0", "101", "-1", "ten", "1.5"])
def test_a_page_limit_out_of_range_is_refused(text: str) -> None:
    with app.test_request_context(query_string={"limit": text}), pytest.raises(BadRequest):
        page_limit(20, 100)


@pytest.mark.parametrize("text", ["", "x", "file-zz", "batch_01a20a66455970c88240c4eaa44c9b8a"])
def test_an_id_of_another_form_is_not_found(text: str) -> None:
    with pytest.raises(NotFound):
        read_uuid(text, "file-", "file")


@pytest.mark.parametrize(
    ("text", "seconds"), [("24h", 86400), ("30m", 1800), ("5s", 5), ("7d", 604800)]
)
def test_completion_windows(text: str, seconds: float) -> None:
    assert parse_window(text) == seconds


@pytest.mark.parametrize("text", ["", "24", "h", "0h", "-1h", "24 h", "31d", "1w"])
def test_a_completion_window_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValidationError):
        parse_window(text)
