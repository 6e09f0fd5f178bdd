"""Columns of Arrow, which is what Parquet holds, as rows of tensors, and tensors as columns. Pure.

A column has one value a row: a scalar, or lists nested as deep as the tensor has dimensions. Its
elements lie one behind the other whatever the nesting, so that a run of rows is a slice of them:
nothing here is done row by row but for BYTES.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from errors import BadTensor, Unsupported
from inference.tensors import DATATYPES, Buffer, Tensor, bytes_elements, pack_bytes

_TYPES: Final[dict[str, pa.DataType]] = {
    "BOOL": pa.bool_(),
    "UINT8": pa.uint8(),
    "UINT16": pa.uint16(),
    "UINT32": pa.uint32(),
    "UINT64": pa.uint64(),
    "INT8": pa.int8(),
    "INT16": pa.int16(),
    "INT32": pa.int32(),
    "INT64": pa.int64(),
    "FP16": pa.float16(),
    "FP32": pa.float32(),
    "FP64": pa.float64(),
    "BYTES": pa.binary(),
}
"""Arrow has no BF16."""

Offsets = npt.NDArray[np.int64]


def type_of(datatype: str, rank: int) -> pa.DataType:
    """The type of a column of tensors of so many dimensions. Raises `Unsupported`."""
    if datatype not in _TYPES:
        raise Unsupported(f"a Parquet file cannot hold {datatype}")
    made = _TYPES[datatype]
    for _ in range(rank):
        made = pa.list_(made)
    return made


def datatype_of(kind: pa.DataType) -> tuple[str, int] | None:
    """(datatype, how deep its lists are nested) of a column's type; None where it holds no
    tensors."""
    rank = 0
    while _is_list(kind):
        kind, rank = kind.value_type, rank + 1
    if is_text(kind):
        return "BYTES", rank
    return next(((name, rank) for name, one in _TYPES.items() if one == kind), None)


@dataclass(frozen=True, slots=True)
class Rows:
    """A column's rows: which have a value, what shape each value has, and where it lies."""

    datatype: str
    good: npt.NDArray[np.bool_]
    dims: tuple[Offsets, ...]
    """One array a dimension: each row's size in it."""
    starts: Offsets
    """Where each row's elements begin among all, and the last one's end."""
    elements: npt.NDArray[Any] | list[bytes]

    def __len__(self) -> int:
        return len(self.good)

    @property
    def item_size(self) -> int:
        """Bytes of an element; 0 for BYTES."""
        return DATATYPES[self.datatype].item_size

    def shape(self, row: int) -> tuple[int, ...]:
        return tuple(int(sizes[row]) for sizes in self.dims)

    def raw(self, first: int, end: int) -> Buffer:
        """The elements of a range of good rows, in Triton's raw form."""
        at, to = int(self.starts[first]), int(self.starts[end])
        if isinstance(self.elements, list):
            return pack_bytes(self.elements[at:to])
        return self.elements[at:to].data.cast("B") if to > at else b""


def read(column: pa.Array) -> Rows:
    """A column's rows. Rows that are null, or hold a null, or lists of uneven lengths within one
    dimension, are not good. Raises `BadTensor` for a column of something else than tensors."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    found = datatype_of(column.type)
    if found is None:
        raise BadTensor(f"a column of {column.type} is no tensor")
    count = len(column)
    good = np.ones(count, np.bool_)
    dims: list[Offsets] = []
    starts: Offsets = np.arange(count + 1, dtype=np.int64)
    array = column
    while True:
        _clear(good, starts, _nulls(array))
        if not _is_list(array.type):
            break
        offsets = _offsets(array)
        sizes = np.diff(offsets)
        if dims:
            # Within one row all lists are as long as the first.
            steps = np.zeros(len(sizes), np.bool_)
            steps[1:] = sizes[1:] != sizes[:-1]
            steps[starts[:-1][starts[:-1] < len(sizes)]] = False
            _clear(good, starts, steps)
            full = np.append(sizes, 0)
            dims.append(np.where(starts[1:] > starts[:-1], full[starts[:-1]], 0))
        else:
            dims.append(sizes)
        # From here on what lies in this level's range only, so that offsets begin at 0.
        array = array.values[int(offsets[0]) : int(offsets[-1])]
        starts = (offsets - offsets[0])[starts]
    return Rows(found[0], good, tuple(dims), starts, _elements(array, found[0]))


def _clear(good: npt.NDArray[np.bool_], starts: Offsets, flags: npt.NDArray[np.bool_]) -> None:
    """No row is good that has a flag among its elements."""
    if flags.any():
        before = np.concatenate(([0], np.cumsum(flags)))
        good &= before[starts[1:]] == before[starts[:-1]]


def _nulls(array: pa.Array) -> npt.NDArray[np.bool_]:
    if not array.null_count:
        return np.zeros(0, np.bool_)
    nulls: npt.NDArray[np.bool_] = array.is_null().to_numpy(zero_copy_only=False)
    return nulls


def _offsets(array: pa.Array) -> Offsets:
    if pa.types.is_fixed_size_list(array.type):
        size, begin = int(array.type.list_size), int(array.offset)
        return np.arange(begin, begin + len(array) + 1, dtype=np.int64) * size
    offsets: Offsets = array.offsets.to_numpy().astype(np.int64)
    return offsets if len(offsets) else np.zeros(1, np.int64)


def _elements(array: pa.Array, datatype: str) -> npt.NDArray[Any] | list[bytes]:
    if datatype == "BYTES":
        return [
            b"" if value is None else value
            for value in array.cast(
                pa.large_binary() if _is_large(array.type) else pa.binary()
            ).to_pylist()
        ]
    dtype = DATATYPES[datatype].dtype
    assert dtype is not None
    if datatype == "BOOL":
        # Arrow's are bits.
        bits = array.fill_null(False) if array.null_count else array
        return np.ascontiguousarray(bits.to_numpy(zero_copy_only=False), np.bool_).view("u1")
    if not len(array):
        return np.zeros(0, dtype)
    values = np.frombuffer(array.buffers()[1], dtype)
    return values[array.offset : array.offset + len(array)]


def _is_list(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def is_text(kind: pa.DataType) -> bool:
    """A text, or bytes."""
    return bool(pa.types.is_binary(kind) or pa.types.is_string(kind) or _is_large(kind))


def _is_large(kind: pa.DataType) -> bool:
    return bool(pa.types.is_large_binary(kind) or pa.types.is_large_string(kind))


def runs(columns: Sequence[Rows]) -> Iterator[tuple[int, int, bool]]:
    """Ranges of rows that are alike, in order, `(first, end, good)`: good in every column, and of
    one shape in each; or else not good in one of them."""
    count = len(columns[0])
    if not count:
        return
    good = np.logical_and.reduce([column.good for column in columns])
    changes = np.zeros(count, np.bool_)
    changes[1:] = good[1:] != good[:-1]
    for column in columns:
        for sizes in column.dims:
            changes[1:] |= (sizes[1:] != sizes[:-1]) & good[1:] & good[:-1]
    cuts = [0, *np.flatnonzero(changes).tolist(), count]
    for first, end in itertools.pairwise(cuts):
        yield first, end, bool(good[first])


def write(parts: Sequence[Tensor | int], kind: pa.DataType) -> pa.Array:
    """A column of this type: the rows of each tensor, whose first dimension they are, and where an
    integer stands so many nulls. A tensor has one dimension more than the type has lists, or as
    many elements as rows."""
    rank, leaf = 0, kind
    while pa.types.is_list(leaf):
        leaf, rank = leaf.value_type, rank + 1
    return pa.concat_arrays(
        [
            pa.nulls(part, kind) if isinstance(part, int) else _column(part, leaf, rank)
            for part in parts
        ]
        or [pa.nulls(0, kind)]
    )


def _column(tensor: Tensor, leaf: pa.DataType, rank: int) -> pa.Array:
    array = _leaf(tensor, leaf)
    if not rank:
        return array
    for at in range(rank, 0, -1):
        # Of so many lists of this size the level above is made.
        size = tensor.shape[at]
        count = int(np.prod(tensor.shape[:at], dtype=np.int64))
        offsets = np.arange(count + 1, dtype=np.int64) * size
        array = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), array)
    return array


def _leaf(tensor: Tensor, kind: pa.DataType) -> pa.Array:
    if tensor.datatype == "BYTES":
        return pa.array(bytes_elements(tensor), kind)
    dtype = DATATYPES[tensor.datatype].dtype
    assert dtype is not None
    values = np.frombuffer(tensor.data, dtype)
    if tensor.datatype == "BOOL":
        return pa.array(values, kind)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(tensor.data)])
