"""Requests merged and their answers cut apart: nobody can tell the difference."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.packing import Pack, UnsplittableError, plan, split
from inference.tensors import InferRequest, InferResult, Tensor, check_raw
from tests.unit.inference.strategies import identity, ints, scalars, tensors, texts


def run(request: InferRequest) -> InferResult:
    """The identity model; refuses what has the wrong size, as Triton would."""
    for tensor in request.inputs:
        check_raw(tensor)
    outputs = tuple(replace(tensor, name=f"{tensor.name}_OUT") for tensor in request.inputs)
    return InferResult(request.model, "1", outputs, id=request.id)


def run_packed(
    requests: list[InferRequest], max_batch_size: int, max_bytes: int | None = None
) -> list[InferResult | None]:
    outcomes: list[InferResult | None] = [None] * len(requests)
    for pack in plan(requests, max_batch_size, max_bytes):
        for member, result in zip(pack.members, split(pack, run(pack.request)), strict=True):
            assert outcomes[member.index] is None
            outcomes[member.index] = result
    return outcomes


def sizes(packs: list[Pack]) -> list[int]:
    return [len(pack.members) for pack in packs]


@st.composite
def similar_requests(draw: st.DrawFn) -> InferRequest:
    """Few kinds of requests, so that many can be merged; some that must not be."""
    rows = draw(st.integers(0, 3))
    inputs = [
        replace(
            draw(
                tensors(
                    st.tuples(st.just(rows), st.integers(1, 2)), st.sampled_from(["INT8", "BYTES"])
                )
            ),
            name="X",
        )
    ]
    if draw(st.booleans()):
        inputs.append(Tensor("Y", "UINT8", (rows,), bytes(rows)))
    parameters = draw(
        st.sampled_from([{}, {}, {"priority": 1}])
        | st.dictionaries(st.sampled_from(["sequence_id", "delay_ms"]), scalars, max_size=1)
    )
    name = draw(st.text(max_size=3))
    return InferRequest("m", "", tuple(inputs), parameters=parameters, id=name)


@given(st.lists(similar_requests(), max_size=12), st.integers(0, 6), st.none() | st.integers(0, 20))
def test_packed_or_one_by_one_the_outcomes_are_the_same(
    requests: list[InferRequest], max_batch_size: int, max_bytes: int | None
) -> None:
    assert run_packed(requests, max_batch_size, max_bytes) == [run(one) for one in requests]


@given(st.lists(similar_requests(), max_size=12), st.integers(0, 6), st.integers(0, 20))
def test_a_pack_keeps_the_limits_unless_it_is_one_request(
    requests: list[InferRequest], max_batch_size: int, max_bytes: int
) -> None:
    packs = plan(requests, max_batch_size, max_bytes)
    assert sorted(one.index for pack in packs for one in pack.members) == [*range(len(requests))]
    for pack in packs:
        if pack.merged:
            assert sum(member.rows for member in pack.members) <= max_batch_size
            assert sum(len(tensor.data) for tensor in pack.request.inputs) <= max_bytes


def test_like_requests_share_a_pack_over_unlike_ones_between_them() -> None:
    small, wide = identity(ints([[1, 2]])), identity(ints([[1, 2, 3]]))
    packs = plan([small, wide, small, wide, small], 64)
    assert [[member.index for member in pack.members] for pack in packs] == [[0, 2, 4], [1, 3]]


def test_a_full_pack_is_followed_by_the_next() -> None:
    assert sizes(plan([identity(ints([[1]]))] * 10, 4)) == [4, 4, 2]


def test_rows_are_cut_back_with_their_ids() -> None:
    first = identity(texts([["a", "bb"], ["", "ccc"]]), id="one")
    second = identity(texts([["ü", "x"]]), id="two")
    (pack,) = plan([first, second], 8)
    assert pack.request.inputs[0].shape == (3, 2)
    assert pack.request.id == ""
    assert split(pack, run(pack.request)) == [run(first), run(second)]


def test_a_request_alone_is_sent_as_it_came() -> None:
    request = identity(ints([[1]]), id="mine")
    (pack,) = plan([request], 8)
    assert pack.request is request


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (identity(ints([[1]]), parameters={"delay_ms": 1}), "a parameter may mean anything"),
        (identity(ints([[1]]), parameters={"priority": 1}), "another place in Triton's queue"),
        (identity(ints([[1]]), version="2"), "another version"),
        (identity(ints([[1]]), outputs=("A",)), "other outputs"),
        (identity(ints([[1]], "FLOATS")), "another input"),
        (identity(ints([[1, 2]])), "another width"),
        (identity(Tensor("INTS", "INT64", (), bytes(8))), "no rows"),
        (identity(ints([[1]]), ints([[1], [2]], "B")), "rows that disagree"),
        (identity(), "no inputs"),
    ],
)
def test_what_the_model_could_tell_apart_is_not_merged(other: InferRequest, why: str) -> None:
    plain = identity(ints([[1]]))
    assert sizes(plan([plain, other, plain, other], 64))[0] == 2, why
    assert all(
        {member.index % 2 for member in pack.members} in ({0}, {1})
        for pack in plan([plain, other, plain, other], 64)
    )


def test_without_batching_nothing_is_merged() -> None:
    assert sizes(plan([identity(ints([[1]]))] * 3, 0)) == [1, 1, 1]


@pytest.mark.parametrize(
    "output",
    [
        ints([[1]]),  # one row for two
        ints(3),  # no rows
        Tensor("X", "INT64", (2, 1), bytes(9)),  # data that does not fit
        Tensor("X", "BYTES", (2,), b"\x09\0\0\0"),  # lengths that overrun
        Tensor("X", "NEWTYPE", (2,), bytes(8)),  # a datatype from the future
    ],
)
def test_an_answer_without_a_row_per_row_cannot_be_split(output: Tensor) -> None:
    (pack,) = plan([identity(ints([[1]]))] * 2, 8)
    with pytest.raises(UnsplittableError):
        split(pack, InferResult("identity", "1", (output,)))
