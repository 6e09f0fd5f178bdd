"""Tensors, inference requests and results, and their conversion to and from JSON values.

A tensor is carried in Triton's raw wire form, from the gateway to the model and back, and is
looked into only where somebody speaks JSON. The raw form is row major, little endian, without
padding: BOOL is one byte, and an element of BYTES is its length (4 bytes) and then its bytes.

JSON is read strictly: nothing is cast, cut or wrapped on the way (Triton wraps 3000000000 in an
INT32 to -1294967296, and stores 1e39 in an FP32 as infinity).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from errors import BadTensor, TidegateError, Unsupported

Parameter = bool | int | float | str
Buffer = bytes | bytearray | memoryview
"""Raw bytes; a memoryview is one-dimensional and of unsigned bytes."""

MAX_DIM: Final = 2**31 - 1
MAX_ELEMENTS: Final = 2**40
"""More than any machine holds; keeps products of hostile shapes small before they are checked."""


@dataclass(frozen=True, slots=True)
class Datatype:
    """One row of the protocol's datatype table."""

    name: str
    item_size: int
    """Bytes per element; 0 for BYTES, whose elements carry their length."""
    dtype: np.dtype[Any] | None
    """numpy's little-endian equivalent; None for BYTES and for BF16, which numpy does not have."""
    json_types: frozenset[type]
    """The Python types of the JSON values it is read from; empty: JSON has no form for it."""


_INT, _FLOAT = frozenset({int}), frozenset({int, float})

DATATYPES: Final[Mapping[str, Datatype]] = {
    row.name: row
    for row in (
        Datatype("BOOL", 1, np.dtype("?"), frozenset({bool})),
        Datatype("UINT8", 1, np.dtype("u1"), _INT),
        Datatype("UINT16", 2, np.dtype("<u2"), _INT),
        Datatype("UINT32", 4, np.dtype("<u4"), _INT),
        Datatype("UINT64", 8, np.dtype("<u8"), _INT),
        Datatype("INT8", 1, np.dtype("i1"), _INT),
        Datatype("INT16", 2, np.dtype("<i2"), _INT),
        Datatype("INT32", 4, np.dtype("<i4"), _INT),
        Datatype("INT64", 8, np.dtype("<i8"), _INT),
        Datatype("FP16", 2, np.dtype("<f2"), frozenset()),
        Datatype("BF16", 2, None, frozenset()),
        Datatype("FP32", 4, np.dtype("<f4"), _FLOAT),
        Datatype("FP64", 8, np.dtype("<f8"), _FLOAT),
        Datatype("BYTES", 0, None, frozenset({str})),
    )
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A named array in raw form. `shape` includes the batch dimension where the model has one."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer = field(repr=False)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One call of a model. `version` "" is the latest; `outputs` names those wanted, () all."""

    model: str
    version: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[str, ...] = ()
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True, slots=True)
class InferResult:
    """What the model answered. `version` is the one that ran; `id` is the request's."""

    model: str
    version: str
    outputs: tuple[Tensor, ...]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    id: str = ""


Outcome = InferResult | TidegateError
"""What becomes of a request among many: each has its own."""


def datatype(name: str, *, tensor: str = "") -> Datatype:
    """The table row of a datatype. Raises BadTensor for a name the protocol does not have."""
    found = DATATYPES.get(name)
    if found is None:
        raise _bad(tensor, f"unknown datatype {name!r}; known are {', '.join(DATATYPES)}")
    return found


def element_count(shape: Sequence[int]) -> int:
    """How many elements a shape without variable dimensions has; 1 for the scalar shape ()."""
    return math.prod(shape)


def check_shape(shape: object, *, tensor: str = "") -> tuple[int, ...]:
    """A client's `shape` as a tuple. Raises BadTensor for what no tensor can have."""
    if not isinstance(shape, list | tuple) or any(type(dim) is not int for dim in shape):
        raise _bad(tensor, "shape must be an array of integers")
    if any(dim < 0 or dim > MAX_DIM for dim in shape):
        raise _bad(tensor, f"shape {list(shape)} has a dimension outside 0..{MAX_DIM}")
    if len(shape) > 64 or element_count(shape) > MAX_ELEMENTS:
        raise _bad(tensor, f"shape of {len(shape)} dimensions has too many elements")
    return tuple(shape)


def check_raw(tensor: Tensor) -> None:
    """Raise BadTensor unless `tensor.data` has exactly the bytes its shape and datatype need."""
    kind = datatype(tensor.datatype, tensor=tensor.name)
    elements = element_count(tensor.shape)
    if kind.item_size:
        if len(tensor.data) != elements * kind.item_size:
            raise _bad(
                tensor.name,
                f"{elements} elements of {kind.name} take {elements * kind.item_size} bytes, "
                f"not {len(tensor.data)}",
            )
    elif (found := count_bytes_elements(tensor)) != elements:
        raise _bad(tensor.name, f"shape {list(tensor.shape)} has {elements} elements, not {found}")


_LENGTH = struct.Struct("<I")


def count_bytes_elements(tensor: Tensor) -> int:
    """How many elements a BYTES tensor's data holds. Raises BadTensor where a length overruns."""
    return len(bytes_offsets(tensor)) - 1


def bytes_offsets(tensor: Tensor) -> list[int]:
    """Where each element of a BYTES tensor begins (at its length), and the end of the last.

    Raises BadTensor if a length points past the end of the data.
    """
    data, end, at = tensor.data, len(tensor.data), 0
    read = _LENGTH.unpack_from
    offsets = [0]
    try:
        while at < end:
            at += 4 + read(data, at)[0]
            offsets.append(at)
    except struct.error:
        at = end + 1
    if at != end:
        raise _bad(tensor.name, "the length of a BYTES element points past the end of the data")
    return offsets


def bytes_elements(tensor: Tensor) -> list[bytes]:
    """The elements of a BYTES tensor, copied out. Raises BadTensor for broken framing."""
    view = memoryview(tensor.data)
    pairs = itertools.pairwise(bytes_offsets(tensor))
    return [bytes(view[begin + 4 : end]) for begin, end in pairs]


def pack_bytes(elements: Sequence[bytes]) -> bytes:
    """Raw form of a BYTES tensor's elements."""
    pack = _LENGTH.pack
    return b"".join(part for element in elements for part in (pack(len(element)), element))


def pack_json(
    datatype_name: str, shape: tuple[int, ...], data: object, *, tensor: str = ""
) -> bytes:
    """Raw form of a tensor given as JSON values, flat or regularly nested, in row-major order.

    Raises BadTensor, naming the tensor, where a value is not of the datatype, does not fit it, or
    the values are not as many as the shape says; Unsupported where JSON has no form for the
    datatype.
    """
    kind = datatype(datatype_name, tensor=tensor)
    if not kind.json_types:
        raise Unsupported(
            f"tensor {tensor!r}: {kind.name} has no JSON form; use the binary form", param=tensor
        )
    values = _flatten(data, tensor)
    if len(values) != (expected := element_count(shape)):
        raise _bad(tensor, f"shape {list(shape)} has {expected} elements, data has {len(values)}")
    # One pass in C instead of a check per element: what is in the list, not where.
    if strangers := set(map(type, values)) - kind.json_types:
        names = ", ".join(sorted(_json_name(stranger) for stranger in strangers))
        raise _bad(tensor, f"data of a {kind.name} tensor holds {names}")
    if kind.dtype is None:
        return pack_bytes([value.encode() for value in values])
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=kind.dtype)
    except OverflowError as error:
        raise _bad(tensor, f"data holds a number out of {kind.name}'s range") from error
    if kind.dtype.kind == "f" and not np.isfinite(array).all():
        raise _bad(tensor, f"data holds a number out of {kind.name}'s range")
    return array.tobytes()


def unpack_json(tensor: Tensor) -> list[Any]:
    """A tensor's elements as a flat list of JSON values, in row-major order.

    NaN and the infinities become null, as in JavaScript: JSON has no form for them (Triton prints
    `NaN` and `Infinity`, which most parsers refuse). Raises BadTensor for data that does not fit
    the shape, Unsupported where there is no JSON form; both say to ask for binary.
    """
    values = json_values(tensor)
    if isinstance(values, list):
        return values
    flat: list[Any] = values.tolist()
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        return [value if math.isfinite(value) else None for value in flat]
    return flat


def json_values(tensor: Tensor) -> npt.NDArray[Any] | list[str]:
    """As `unpack_json`, but numbers as an array, which orjson prints without a Python object each.

    The array may share the tensor's memory; non-finite numbers are still in it (orjson prints
    null).
    """
    kind = datatype(tensor.datatype, tensor=tensor.name)
    if not kind.json_types:
        raise Unsupported(
            f"tensor {tensor.name!r}: {kind.name} has no JSON form; ask for it in the binary form",
            param=tensor.name,
        )
    if kind.dtype is not None:
        check_raw(tensor)
        array = np.frombuffer(tensor.data, dtype=kind.dtype)
        return array if array.flags.aligned else array.copy()
    elements = bytes_elements(tensor)
    if len(elements) != element_count(tensor.shape):
        check_raw(tensor)
    try:
        return [element.decode() for element in elements]
    except UnicodeDecodeError as error:
        raise Unsupported(
            f"tensor {tensor.name!r} holds bytes that are not UTF-8; ask for it in the binary form",
            param=tensor.name,
        ) from error


def _flatten(data: object, tensor: str) -> list[Any]:
    if not isinstance(data, list):
        raise _bad(tensor, "data must be an array")
    level = data
    while level and isinstance(level[0], list):
        width = len(level[0])
        if any(type(row) is not list or len(row) != width for row in level):
            raise _bad(tensor, "data is nested unevenly")
        level = list(itertools.chain.from_iterable(level))
    return level


_JSON_NAMES: Final = {
    bool: "true or false",
    int: "an integer",
    float: "a number that is not a 64-bit integer",
    str: "a string",
    list: "uneven nesting",
    dict: "an object",
    type(None): "null",
}


def _json_name(kind: type) -> str:
    return _JSON_NAMES.get(kind, kind.__name__)


def _bad(tensor: str, message: str) -> BadTensor:
    return BadTensor(f"tensor {tensor!r}: {message}", param=tensor)
