"""The batch file format: what a good line gives, and what each bad one is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadRequest
from inference.tensors import InferResult, Tensor
from tasks import batch_lines, line_plan
from tasks.batch_lines import BadLine, parse_line
from tasks.formats import FileErrors, Limits
from tasks.line_plan import plan_file

ENDPOINT = "/v2/models/identity/infer"
LIMITS = Limits(chunk_items=3, chunk_bytes=10_000, max_lines=100, max_line_bytes=1000)


def line(number: int = 1, **changes: Any) -> bytes:
    """A good line, with fields replaced; `...` leaves one out."""
    document = {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": ENDPOINT,
        "body": {
            "inputs": [{"name": "INTS", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}]
        },
    } | changes
    return json.dumps({name: v for name, v in document.items() if v is not ...}).encode()


def offsets(texts: list[bytes]) -> list[tuple[int, bytes]]:
    found, at = [], 0
    for text in texts:
        found.append((at, text))
        at += len(text) + 1
    return found


def test_a_good_line_becomes_a_request() -> None:
    parsed = parse_line(line(7), 7, ENDPOINT, 1000)
    assert (parsed.custom_id, parsed.request.model, parsed.request.version) == (
        "row-7",
        "identity",
        "",
    )
    assert parsed.request.inputs[0].shape == (1, 2)


@pytest.mark.parametrize(
    ("text", "reason", "custom_id"),
    [
        (b"garbage", "invalid_json", None),
        (b"[1]", "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (line(custom_id=...), "invalid_custom_id", None),
        (line(custom_id=7), "invalid_custom_id", None),
        (line(custom_id=""), "invalid_custom_id", None),
        (line(custom_id="x" * 513), "invalid_custom_id", None),
        (line(method="GET"), "invalid_method", "row-1"),
        (line(url="/v2/models/other/infer"), "invalid_url", "row-1"),
        (line(body=...), "bad_body", "row-1"),
        (line(body={"inputs": []}, url=ENDPOINT, extra="x" * 1000), "line_too_long", None),
        (line(body={"inputs": [{"name": "INTS"}]}), "bad_body", "row-1"),
    ],
)
def test_a_bad_line_is_told_what_is_wrong(text: bytes, reason: str, custom_id: str | None) -> None:
    with pytest.raises(BadLine) as refused:
        parse_line(text, 1, ENDPOINT, 1000)
    assert (refused.value.reason, refused.value.custom_id) == (reason, custom_id)


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "/v1/chat/completions",
        "/v2/models//infer",
        "/v2/models/a b/infer",
        "x/v2/models/a/infer",
    ],
)
def test_an_endpoint_of_another_form_is_refused(endpoint: str) -> None:
    with pytest.raises(BadRequest):
        batch_lines.parse_endpoint(endpoint)


def test_an_endpoint_may_name_a_version() -> None:
    assert batch_lines.parse_endpoint("/v2/models/m/versions/3/infer") == ("m", "3")


def test_a_file_is_cut_into_chunks_of_the_largest_size() -> None:
    texts = [line(number) for number in range(1, 8)]
    plans = plan_file(lambda: offsets(texts), LIMITS)
    assert [plan.items for plan in plans] == [3, 3, 1]
    assert [plan.first_line for plan in plans] == [1, 4, 7]


def test_a_chunk_ends_before_it_weighs_too_much() -> None:
    limits = Limits(chunk_items=100, chunk_bytes=300, max_lines=100, max_line_bytes=1000)
    plans = plan_file(lambda: offsets([line(number) for number in range(1, 7)]), limits)
    assert len(plans) > 1
    assert sum(plan.items for plan in plans) == 6


@given(st.lists(st.sampled_from(["good", "bad", "blank"]), min_size=1, max_size=30))
def test_every_line_that_is_not_blank_is_in_exactly_one_chunk(kinds: list[str]) -> None:
    texts = [
        {"good": line(number), "bad": b"{", "blank": b"  "}[kind]
        for number, kind in enumerate(kinds, start=1)
    ]
    text = b"\n".join(texts)
    if "good" not in kinds:
        with pytest.raises(FileErrors):
            plan_file(lambda: offsets(texts), LIMITS)
        return
    found: list[tuple[int, bytes]] = []
    for plan in plan_file(lambda: offsets(texts), LIMITS):
        part = text[plan.byte_start : plan.byte_end]
        rows = list(enumerate(part.split(b"\n"), start=plan.first_line))
        mine = [(number, row) for number, row in rows if row.strip()]
        assert len(mine) == plan.items
        found += mine
    assert found == [(n, row) for n, row in enumerate(texts, start=1) if row.strip()]


def test_a_custom_id_given_twice_is_noticed_across_chunks() -> None:
    texts = [line(number) for number in (1, 2, 3, 4, 1, 2)]
    plans = plan_file(lambda: offsets(texts), LIMITS)
    assert [plan.duplicates for plan in plans] == [(), (5, 6)]


@pytest.mark.parametrize(
    ("texts", "code", "number"),
    [
        ([], "empty_file", None),
        ([b"", b"  "], "empty_file", None),
        ([b"\x89PNG", b"\x00\x01"], "invalid_json", 1),
        ([line(number) for number in range(1, 102)], "too_many_lines", 101),
        ([line(1), *[b"x"] * 100], "too_many_lines", 101),
    ],
)
def test_a_file_that_cannot_be_used_says_why(
    texts: list[bytes], code: str, number: int | None
) -> None:
    with pytest.raises(FileErrors) as refused:
        plan_file(lambda: offsets(texts), LIMITS)
    (error,) = refused.value.errors
    assert (error["code"], error["line"]) == (code, number)


def test_lines_of_the_output_and_error_files_have_openais_shape() -> None:
    result = InferResult(
        "m", "1", (Tensor("OUT", "INT64", (1,), (7).to_bytes(8, "little")),), {}, ""
    )
    good = json.loads(batch_lines.output_line("r1", "row-1", result))
    assert good["response"]["body"]["outputs"][0]["data"] == [7]
    assert (good["custom_id"], good["response"]["status_code"], good["error"]) == (
        "row-1",
        200,
        None,
    )
    bad = json.loads(batch_lines.error_line("r2", None, 9, "invalid_json", "why"))
    assert bad["response"] is None
    assert bad["error"] == {"code": "invalid_json", "message": "why", "line": 9}


def duplicates_of(texts: list[bytes]) -> list[int]:
    plans = plan_file(lambda: offsets(texts), LIMITS)
    return [number for plan in plans for number in plan.duplicates]


def naive_duplicates(texts: list[bytes]) -> list[int]:
    seen: set[str] = set()
    found = []
    for number, text in enumerate(texts, start=1):
        custom_id = batch_lines.peek_custom_id(text) if len(text) <= 1000 else None
        if custom_id in seen:
            found.append(number)
        if custom_id is not None:
            seen.add(custom_id)
    return found


@given(
    st.lists(
        st.one_of(
            st.builds(line, st.integers(1, 4)),
            st.builds(line, custom_id=st.sampled_from(["row-1", "é", "\\", "a\\b", "x" * 512, ""])),
            st.builds(line, st.integers(1, 3), body=st.just({"custom_id": "row-1"})),
            st.builds(line, custom_id=st.just(...), body=st.just({"custom_id": "row-2"})),
            st.builds(line, st.integers(1, 3), extra=st.just("x" * 1000)),
            st.sampled_from(
                [
                    b'{"custom_id": "row-1"',
                    b'{"custom_id": "row-1"} x',
                    b'{"custom\\u005fid": "row-1"}',
                    b'{"custom_id": "row\\u002d1"}',
                    b'{"custom_id": "row-1", "custom_id": "row-2"}',
                    b'{"a": "custom_id", "custom_id" : "row-2"}',
                    b"  ",
                ]
            ),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_what_is_given_twice_is_found_and_nothing_else(texts: list[bytes]) -> None:
    texts = [line(99), *texts]
    assert duplicates_of(texts) == naive_duplicates(texts)


def test_custom_ids_of_one_number_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_plan, "_mark", lambda *_: 7)
    assert duplicates_of([line(1), line(2), b"{", line(1)]) == [4]


def test_many_repeated_ids_are_looked_at_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_plan, "SUSPECTS", 2)
    texts = [line(number) for number in (1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 1)]
    assert duplicates_of(texts) == [6, 7, 8, 9, 10, 11]
