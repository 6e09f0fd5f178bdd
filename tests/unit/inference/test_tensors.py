"""Raw tensors, and their strict conversion to and from JSON values."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadTensor, Unsupported
from inference.tensors import (
    DATATYPES,
    Tensor,
    bytes_elements,
    check_raw,
    check_shape,
    element_count,
    pack_bytes,
    pack_json,
    unpack_json,
)
from tests.unit.inference.strategies import tensors

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "BOOL": st.booleans(),
    "FP32": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "FP64": st.floats(allow_nan=False, allow_infinity=False),
    "BYTES": st.text(max_size=6),
} | {
    f"{sign}INT{bits}": st.integers(low, high)
    for bits in (8, 16, 32, 64)
    for sign, low, high in (
        ("", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        ("U", 0, 2**bits - 1),
    )
}


def test_every_datatype_with_a_numpy_twin_has_its_size() -> None:
    for kind in DATATYPES.values():
        if kind.dtype is not None:
            assert kind.dtype.itemsize == kind.item_size


@given(st.data())
def test_json_values_survive_the_way_through_the_raw_form(data: st.DataObject) -> None:
    datatype = data.draw(st.sampled_from(sorted(VALUES)))
    values = data.draw(st.lists(VALUES[datatype], max_size=8))
    raw = pack_json(datatype, (len(values),), values, tensor="x")
    assert unpack_json(Tensor("x", datatype, (len(values),), raw)) == values


@given(tensors())
def test_data_built_to_fit_passes_the_check(tensor: Tensor) -> None:
    check_raw(tensor)


@given(tensors(), st.integers(0, 40))
def test_data_of_another_size_does_not_pass(tensor: Tensor, cut: int) -> None:
    for data in (bytes(tensor.data)[:cut], bytes(tensor.data) + b"\0"):
        if len(data) != len(tensor.data):
            with pytest.raises(BadTensor, match="x"):
                check_raw(Tensor("x", tensor.datatype, tensor.shape, data))


@given(st.lists(st.binary(max_size=8)))
def test_bytes_elements_are_those_that_were_packed(elements: list[bytes]) -> None:
    assert bytes_elements(Tensor("x", "BYTES", (len(elements),), pack_bytes(elements))) == elements


@given(st.binary(max_size=40))
def test_garbage_in_a_bytes_tensor_is_a_bad_tensor_at_worst(data: bytes) -> None:
    with contextlib.suppress(BadTensor):
        assert pack_bytes(bytes_elements(Tensor("x", "BYTES", (1,), data))) == data


def test_nested_data_is_read_in_row_major_order() -> None:
    nested = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert pack_json("INT8", (2, 2, 2), nested) == bytes(range(1, 9))


def test_a_scalar_shape_has_one_element() -> None:
    assert element_count(()) == 1
    assert pack_json("UINT8", (), [7]) == b"\x07"


@pytest.mark.parametrize(
    ("datatype", "shape", "data", "says"),
    [
        ("INT8", (2,), [1, 1.5], "a number that is not"),
        ("INT8", (2,), [1, True], "true or false"),
        ("INT8", (2,), [1, None], "null"),
        ("INT8", (2,), [1, "2"], "a string"),
        ("INT8", (2,), [1, 128], "out of INT8's range"),
        ("UINT8", (1,), [-1], "out of UINT8's range"),
        ("UINT64", (1,), [2**64], "out of UINT64's range"),
        ("INT64", (1,), [2**63], "out of INT64's range"),
        ("FP32", (1,), [1e39], "out of FP32's range"),  # Triton stores infinity
        ("FP32", (1,), [True], "true or false"),
        ("FP32", (1,), ["NaN"], "a string"),
        ("FP64", (1,), [None], "null"),
        ("BOOL", (1,), [1], "an integer"),
        ("BYTES", (1,), [1], "an integer"),
        ("BYTES", (1,), [{}], "an object"),
        ("INT8", (2,), [1], "data has 1"),
        ("INT8", (2,), [1, 2, 3], "data has 3"),
        ("INT8", (2**31 - 1, 2), [1], "data has 1"),  # nothing is allocated for the shape
        ("INT8", (3,), [[1, 2], [3]], "nested unevenly"),
        ("INT8", (3,), [[1, 2], 3], "nested unevenly"),
        ("INT8", (3,), [1, [2, 3]], "data has 2"),
        ("INT8", (2,), [1, [2]], "uneven nesting"),
        ("INT8", (1,), 1, "must be an array"),
        ("INT8", (1,), {"0": 1}, "must be an array"),
        ("INT9", (1,), [1], "unknown datatype 'INT9'"),
    ],
)
def test_a_value_that_would_have_to_be_changed_is_refused(
    datatype: str, shape: tuple[int, ...], data: object, says: str
) -> None:
    with pytest.raises(BadTensor, match=says) as caught:
        pack_json(datatype, shape, data, tensor="pixels")
    assert caught.value.param == "pixels"
    assert "'pixels'" in caught.value.message


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_have_no_json_form_in_either_direction(datatype: str) -> None:
    with pytest.raises(Unsupported, match="binary form"):
        pack_json(datatype, (1,), [1.0], tensor="x")
    with pytest.raises(Unsupported, match="binary form"):
        unpack_json(Tensor("x", datatype, (1,), b"\0\0"))


def test_bytes_that_are_not_text_have_to_be_asked_for_in_binary() -> None:
    with pytest.raises(Unsupported, match=r"'x'.*binary form"):
        unpack_json(Tensor("x", "BYTES", (1,), pack_bytes([b"\xff"])))


def test_what_json_has_no_number_for_becomes_null() -> None:
    data = np.array([1.5, math.nan, math.inf, -math.inf], dtype="<f4").tobytes()
    values = unpack_json(Tensor("x", "FP32", (4,), data))
    assert values == [1.5, None, None, None]
    json.dumps(values, allow_nan=False)


@pytest.mark.parametrize(
    "shape", [None, "3", 3, [1.0], [True], [-1], [2**31], [2**31 - 1] * 2, [1] * 65, {}, [[1]]]
)
def test_a_shape_that_no_tensor_has_is_refused(shape: object) -> None:
    with pytest.raises(BadTensor, match="'x'"):
        check_shape(shape, tensor="x")
