"""Hypothesis strategies for the values of `inference`, and short ways to build them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from inference.tensors import DATATYPES, InferRequest, InferResult, Tensor, pack_bytes

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
scalars = (
    st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
)
_datatypes = st.sampled_from(sorted(DATATYPES))
parameters = st.dictionaries(names, scalars, max_size=3)


def shapes(*, min_dims: int = 0, max_dims: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 4), min_size=min_dims, max_size=max_dims).map(tuple)


@st.composite
def tensors(
    draw: st.DrawFn,
    shape: st.SearchStrategy[tuple[int, ...]] | None = None,
    datatype: st.SearchStrategy[str] | None = None,
) -> Tensor:
    """Any tensor whose data fits its shape and datatype."""
    dims = draw(shapes() if shape is None else shape)
    kind = DATATYPES[draw(_datatypes if datatype is None else datatype)]
    count = math.prod(dims)
    if kind.item_size:
        size = count * kind.item_size
        data = draw(st.binary(min_size=size, max_size=size))
    else:
        elements = st.lists(st.binary(max_size=6), min_size=count, max_size=count)
        data = pack_bytes(draw(elements))
    return Tensor(draw(names), kind.name, dims, data)


requests = st.builds(
    InferRequest,
    model=names,
    version=st.sampled_from(["", "1", "12"]),
    inputs=st.lists(tensors(), max_size=3).map(tuple),
    outputs=st.lists(names, max_size=2).map(tuple),
    parameters=parameters,
    id=st.text(max_size=8),
)
results = st.builds(
    InferResult,
    model=names,
    version=st.sampled_from(["1", "12"]),
    outputs=st.lists(tensors(), max_size=3).map(tuple),
    parameters=parameters,
    id=st.text(max_size=8),
)


def ints(values: Any, name: str = "INTS") -> Tensor:
    """An INT64 tensor of (nested) Python integers."""
    array = np.array(values, dtype="<i8")
    return Tensor(name, "INT64", array.shape, array.tobytes())


def texts(rows: list[list[str]], name: str = "TEXT") -> Tensor:
    """A BYTES tensor of rows of strings of one length."""
    data = pack_bytes([text.encode() for row in rows for text in row])
    return Tensor(name, "BYTES", (len(rows), len(rows[0])), data)


def identity(*inputs: Tensor, **fields: Any) -> InferRequest:
    """A request to the identity model."""
    return InferRequest("identity", fields.pop("version", ""), inputs, **fields)
