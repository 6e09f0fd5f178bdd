"""Columns of Arrow as tensors, and back: whatever is nested in them, however they are sliced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadTensor, Unsupported
from inference import columns
from inference.tensors import DATATYPES, Tensor, bytes_elements

NUMERIC = [name for name, kind in DATATYPES.items() if kind.dtype is not None]
shapes = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(tuple)


def tensor_of(datatype: str, shape: tuple[int, ...]) -> Tensor:
    count = int(np.prod(shape))
    if datatype == "BYTES":
        data = b"".join(bytes([n % 5, 0, 0, 0]) + b"x" * (n % 5) for n in range(count))
        return Tensor("t", "BYTES", shape, data)
    dtype = DATATYPES[datatype].dtype
    return Tensor("t", datatype, shape, (np.arange(count) % 2).astype(dtype).tobytes())


@given(st.sampled_from([*NUMERIC, "BYTES"]), shapes, st.integers(0, 2), st.integers(0, 2))
def test_a_tensor_survives_the_way_through_a_column(
    datatype: str, shape: tuple[int, ...], before: int, behind: int
) -> None:
    tensor = tensor_of(datatype, shape)
    kind = columns.type_of(datatype, len(shape) - 1)
    column = columns.write([before, tensor, behind], kind)
    assert len(column) == before + shape[0] + behind

    rows = columns.read(column)
    assert columns.datatype_of(kind) == (datatype, len(shape) - 1)
    assert rows.good.tolist() == [False] * before + [True] * shape[0] + [False] * behind
    assert bytes(rows.raw(before, before + shape[0])) == tensor.data
    if shape[0] and all(shape[1:-1]):
        assert rows.shape(before) == shape[1:]
    if before or behind or not shape[0]:
        return
    # The same of a slice, whose values begin somewhere else.
    half = shape[0] // 2
    sliced = columns.read(column.slice(half))
    whole = rows.raw(half, shape[0])
    assert bytes(sliced.raw(0, shape[0] - half)) == bytes(whole)


@pytest.mark.parametrize("make", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 2)])
def test_every_kind_of_list_is_read(make: Any) -> None:
    column = pa.array([[1, 2], None, [3, 4], [5, 6]], make(pa.int64()))
    rows = columns.read(column)
    assert rows.good.tolist() == [True, False, True, True]
    assert np.frombuffer(rows.raw(2, 4), "<i8").tolist() == [3, 4, 5, 6]
    assert rows.shape(2) == (2,)
    assert np.frombuffer(columns.read(column[3:]).raw(0, 1), "<i8").tolist() == [5, 6]


def test_rows_that_hold_nulls_or_are_uneven_are_not_good() -> None:
    kind = pa.list_(pa.list_(pa.float32()))
    column = pa.array(
        [
            [[1, 2], [3, 4]],
            [[1, 2], [3]],  # uneven
            [[1, None], [3, 4]],
            [None, [3, 4]],
            None,
            [],
            [[], []],
            [[1], [2]],  # of another shape, but even
            [[3], [4]],
        ],
        kind,
    )
    rows = columns.read(column)
    assert rows.good.tolist() == [True, False, False, False, False, True, True, True, True]
    assert [rows.shape(n) for n in (0, 5, 6, 7)] == [(2, 2), (0, 0), (2, 0), (2, 1)]
    assert list(columns.runs([rows])) == [
        (0, 1, True),
        (1, 5, False),
        (5, 6, True),
        (6, 7, True),
        (7, 9, True),
    ]


def test_runs_are_cut_where_any_column_changes() -> None:
    one = columns.read(pa.array([1, 2, None, 4, 5]))
    two = columns.read(pa.array([[1], [1], [1], [1, 2], [1]]))
    assert list(columns.runs([one, two])) == [
        (0, 2, True),
        (2, 3, False),
        (3, 4, True),
        (4, 5, True),
    ]
    assert list(columns.runs([columns.read(pa.array([], pa.int64()))])) == []


@pytest.mark.parametrize("kind", [pa.string(), pa.binary(), pa.large_string(), pa.large_binary()])
def test_texts_are_bytes(kind: pa.DataType) -> None:
    rows = columns.read(pa.array([["é", ""], None, ["b"]], pa.list_(kind)))
    assert rows.datatype == "BYTES"
    packed = Tensor("t", "BYTES", (2,), rows.raw(0, 1))
    assert bytes_elements(packed) == ["é".encode(), b""]
    assert rows.good.tolist() == [True, False, True]


def test_a_dictionary_is_read_as_what_it_says() -> None:
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    assert columns.read(column).elements == [b"a", b"b", b"a"]


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.struct([("a", pa.int8())]), pa.date32()])
def test_what_is_no_tensor_is_refused(kind: pa.DataType) -> None:
    assert columns.datatype_of(kind) is None
    with pytest.raises(BadTensor, match="no tensor"):
        columns.read(pa.nulls(3, kind))


def test_bf16_has_no_column() -> None:
    with pytest.raises(Unsupported, match="BF16"):
        columns.type_of("BF16", 1)
