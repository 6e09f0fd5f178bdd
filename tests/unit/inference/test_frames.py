"""The codec of what waits in Redis, Postgres and the object store."""

from __future__ import annotations

import struct

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BY_CODE, BadBody, ModelNotReady, TidegateError
from inference.frames import (
    MAGIC,
    decode_outcomes,
    decode_part,
    decode_requests,
    encode_outcomes,
    encode_requests,
)
from inference.tensors import InferRequest, InferResult
from tests.unit.inference.strategies import identity, ints, requests, results

failures = st.builds(
    lambda kind, message, param, after: kind(message, param=param, retry_after=after),
    st.sampled_from(sorted(BY_CODE.values(), key=lambda kind: kind.code)),
    st.text(),
    st.none() | st.text(),
    st.none() | st.floats(0, 100),
)


def told(outcome: InferResult | TidegateError) -> object:
    """Errors compare by identity; what they say is what must survive."""
    return outcome.to_wire() if isinstance(outcome, TidegateError) else outcome


@given(st.lists(requests, max_size=4))
def test_requests_survive_the_frame(given_requests: list[InferRequest]) -> None:
    assert decode_requests(encode_requests(given_requests)) == given_requests


@given(st.lists(results | failures, max_size=4))
def test_outcomes_survive_the_frame(outcomes: list[InferResult | TidegateError]) -> None:
    decoded = decode_outcomes(encode_outcomes(outcomes))
    assert [told(outcome) for outcome in decoded] == [told(outcome) for outcome in outcomes]
    assert [type(outcome) for outcome in decoded] == [type(outcome) for outcome in outcomes]


def test_decoded_tensors_are_slices_of_the_frame() -> None:
    frame = encode_requests([identity(ints([[1, 2]]))])
    (request,) = decode_requests(frame)
    data = request.inputs[0].data
    assert isinstance(data, memoryview)
    assert data.obj is frame


def test_an_error_comes_back_as_its_own_kind() -> None:
    (error,) = decode_outcomes(encode_outcomes([ModelNotReady("later", retry_after=2.0)]))
    assert isinstance(error, ModelNotReady)
    assert error.retry_after == 2.0


@given(st.lists(results | failures | st.none(), max_size=4))
def test_a_part_survives_the_frame_and_says_what_comes_later(
    outcomes: list[InferResult | TidegateError | None],
) -> None:
    decoded = decode_part(encode_outcomes(outcomes))
    assert [one and told(one) for one in decoded] == [one and told(one) for one in outcomes]


def test_a_part_does_not_pass_for_the_whole() -> None:
    with pytest.raises(BadBody):
        decode_outcomes(encode_outcomes([ModelNotReady("later", retry_after=2.0), None]))


@given(st.binary(max_size=60))
def test_garbage_is_a_bad_body(garbage: bytes) -> None:
    for decode in (decode_requests, decode_outcomes, decode_part):
        with pytest.raises(BadBody):
            decode(garbage)


json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["model", "version", "tensors", "outputs", "parameters", "id", "error", "code"]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=20,
)


@given(json, st.binary(max_size=8))
def test_a_frame_with_any_other_header_is_a_bad_body_at_worst(header: object, tail: bytes) -> None:
    text = orjson.dumps(header)
    frame = struct.pack("<4sI", MAGIC, len(text)) + text + tail
    for decode in (decode_requests, decode_outcomes, decode_part):
        try:
            decode(frame)
        except BadBody:
            pass


@given(st.lists(requests, min_size=1, max_size=2), st.data())
def test_a_frame_with_a_byte_missing_added_or_changed_never_raises_anything_else(
    given_requests: list[InferRequest], data: st.DataObject
) -> None:
    frame = encode_requests(given_requests)
    at = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(BadBody):
        decode_requests(frame[:at])
    with pytest.raises(BadBody):
        decode_requests(frame + b"\0")
    changed = bytearray(frame)
    changed[at] ^= data.draw(st.integers(1, 255))
    try:
        decode_requests(changed)
    except BadBody:
        pass
