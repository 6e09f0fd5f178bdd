"""What counts as the same request, and what as a key."""

from __future__ import annotations

import pytest
from flask import Flask
from hypothesis import given as any_of
from hypothesis import strategies as st

from errors import BadRequest
from web.idempotency import fingerprint, given

app = Flask("keys")


def key(header: str) -> str | None:
    with app.test_request_context(headers={"Idempotency-Key": header}):
        return given()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("abc", "abc"),
        ('"abc"', "abc"),
        ("8e03978e-40d5-43dd-bc93-6894a57f9324", "8e03978e-40d5-43dd-bc93-6894a57f9324"),
        (r'"a\"b\\c"', r'a"b\c'),
        ('it"s', 'it"s'),
        ("~" * 255, "~" * 255),
        ('"' + "x" * 255 + '"', "x" * 255),
    ],
)
def test_a_key_is_taken_bare_or_in_quotes(header: str, expected: str) -> None:
    assert key(header) == expected


@pytest.mark.parametrize(
    "header",
    ["", '""', '"', '"abc', '"a"b"', '"a";x=1', "a b", "ä", "a\tb", "x" * 256, '"a b"', '"a\\"'],
)
def test_a_key_of_another_form_is_refused_by_name(header: str) -> None:
    with pytest.raises(BadRequest, match="Idempotency-Key") as caught:
        key(header)
    assert caught.value.param == "Idempotency-Key"


def test_a_request_without_a_key_has_none() -> None:
    with app.test_request_context():
        assert given() is None


def test_white_space_and_the_order_of_names_make_no_difference() -> None:
    one = fingerprint([b"p"], b'{"a": 1, "b": {"c": [1, 2], "d": null}}')

    assert fingerprint([b"p"], b'{"b":{"d":null,\n"c":[1,2]},"a":1}') == one
    for other in (
        b'{"a": 1, "b": {"c": [2, 1], "d": null}}',
        b'{"a": 1, "b": {"c": [1, 2]}}',
        b'{"a": "1", "b": {"c": [1, 2], "d": null}}',
        b'{"a": true, "b": {"c": [1, 2], "d": null}}',
    ):
        assert fingerprint([b"p"], other) != one
    assert fingerprint([b"q"], b'{"a": 1, "b": {"c": [1, 2], "d": null}}') != one


@any_of(st.lists(st.binary(max_size=8), max_size=5), st.lists(st.binary(max_size=8), max_size=5))
def test_different_parts_never_run_together(one: list[bytes], other: list[bytes]) -> None:
    assert (fingerprint(one) == fingerprint(other)) is (one == other)


def test_a_body_nested_deeper_than_is_written_again_stands_for_itself() -> None:
    deep = b'{"input": ' + b"[" * 500 + b"]" * 500 + b"}"

    assert fingerprint([], deep) == fingerprint([], deep)
    assert fingerprint([], deep) != fingerprint([], b"[]")


@any_of(st.binary(max_size=20))
def test_a_body_that_is_no_json_stands_for_itself(body: bytes) -> None:
    assert fingerprint([], body) == fingerprint([], body)
    assert fingerprint([], body + b"{") != fingerprint([], body + b"{{")
