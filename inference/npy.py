"""numpy's `.npy` format: one array, row major, as Triton takes its bytes. Pure.

    "\\x93NUMPY" | version, 2 bytes | header length, 2 or 4 bytes | header | the elements

The header is a Python literal, and is read by its letters instead: nothing that a file says is
ever evaluated, and an array of Python objects, which is a pickle, is never loaded.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from errors import BadFile, Unsupported
from inference.tensors import DATATYPES, MAX_DIM, MAX_ELEMENTS

MAGIC: Final = b"\x93NUMPY"
MAX_HEADER: Final = 4096
"""Bytes; numpy writes 128."""
HEAD: Final = len(MAGIC) + 2 + 4 + MAX_HEADER
"""As many bytes from the beginning hold every header that is taken."""

_ALIGNED: Final = 64
_BY_DESCR: Final[Mapping[str, str]] = {
    f"{order}{kind.dtype.str[1:]}": kind.name
    for kind in DATATYPES.values()
    if kind.dtype is not None
    # Where an element is one byte, its order is written in any way.
    for order in ("<|=" if kind.item_size == 1 else "<")
}

_STRING = r"(?:'[^'\\\n]*'|\"[^\"\\\n]*\")"
_TUPLE = r"\([0-9L,\s]*\)"
_ENTRY = rf"\s*{_STRING}\s*:\s*(?:{_STRING}|True|False|{_TUPLE})\s*"
_DICT = re.compile(rf"\{{{_ENTRY},{_ENTRY},{_ENTRY},?\s*\}}\s*", re.ASCII)
_ITEM = re.compile(rf"({_STRING})\s*:\s*({_STRING}|True|False|{_TUPLE})", re.ASCII)
_DIMS = re.compile(r"\(\s*\)|\(\s*[0-9]{1,19}L?\s*(?:,\s*[0-9]{1,19}L?\s*)*,?\s*\)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Header:
    """What a `.npy` file says of its array. `start`: its first element's first byte."""

    datatype: str
    shape: tuple[int, ...]
    start: int

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1:]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * DATATYPES[self.datatype].item_size


def read_header(head: bytes, size: int) -> Header:
    """The header of a file of `size` bytes that begins with `head`, which has `HEAD` bytes or is
    the whole file. Raises `BadFile` for what is no .npy
    file, `Unsupported` for an array that is none of rows of a datatype of ours."""
    start, text = _split(head)
    found = _entries(text)
    descr, order, dims = found["descr"], found["fortran_order"], found["shape"]
    if order not in ("True", "False") or not _DIMS.fullmatch(dims):
        raise BadFile("the header of the .npy file cannot be read")
    datatype = _datatype(_unquoted(descr))
    shape = tuple(int(dim) for dim in re.findall(r"[0-9]+", dims))
    if not shape:
        raise Unsupported("the array has no dimensions; its first one must be the rows")
    if math.prod(shape) > MAX_ELEMENTS or max(shape) > MAX_DIM or len(shape) > 32:
        raise BadFile(f"the array's shape {list(shape)} is too large")
    if order == "True" and sum(dim != 1 for dim in shape) > 1:
        raise Unsupported("the array is in Fortran order; save numpy.ascontiguousarray(array)")
    header = Header(datatype, shape, start)
    if header.rows and not header.row_bytes:
        raise Unsupported(f"the rows of an array of shape {list(shape)} are empty")
    expected = start + header.rows * header.row_bytes
    if size != expected:
        raise BadFile(
            f"the file has {size} bytes; an array of shape {list(shape)} and datatype {datatype} "
            f"takes {expected}"
        )
    return header


def header(datatype: str, shape: Sequence[int]) -> bytes:
    """The bytes before the elements. Raises `Unsupported` for what numpy has no datatype for."""
    descr = descr_of(datatype)
    dims = f"({shape[0]},)" if len(shape) == 1 else f"({', '.join(map(str, shape))})"
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {dims}, }}".encode()
    # Readers map the elements into memory: they begin at a multiple of 64.
    fixed = len(MAGIC) + 2 + 2 + 1
    text += b" " * (-(fixed + len(text)) % _ALIGNED) + b"\n"
    return MAGIC + b"\x01\x00" + struct.pack("<H", len(text)) + text


def descr_of(datatype: str) -> str:
    """numpy's name for a datatype. Raises `Unsupported` where it has none."""
    dtype = DATATYPES[datatype].dtype
    if dtype is None:
        raise Unsupported(f"a .npy file cannot hold {datatype}")
    return dtype.str


def _split(head: bytes) -> tuple[int, str]:
    """(where the elements begin, the header's text)."""
    if head[: len(MAGIC)] != MAGIC:
        raise BadFile("not a .npy file")
    version = head[len(MAGIC) : len(MAGIC) + 2]
    kind = {b"\x01\x00": "<H", b"\x02\x00": "<I", b"\x03\x00": "<I"}.get(version)
    if len(version) == 2 and kind is None:
        raise Unsupported(f".npy version {version[0]}.{version[1]} is not known")
    at = len(MAGIC) + 2
    end = at + struct.calcsize(kind or "<H")
    if len(head) < end:
        raise BadFile("the .npy file ends within its header")
    length = struct.unpack(kind or "<H", head[at:end])[0]
    if length > MAX_HEADER:
        raise BadFile(f"the header of the .npy file is longer than {MAX_HEADER} bytes")
    if len(head) < end + length:
        raise BadFile("the .npy file ends within its header")
    # Field names may be of any alphabet; such arrays are refused further on.
    return end + length, head[end : end + length].decode("utf-8", "replace")


def _entries(text: str) -> dict[str, str]:
    if re.search(r"['\"]descr['\"]\s*:\s*\[", text):
        raise Unsupported(
            "the array has fields (a structured dtype); save each as a file of its own, or use "
            "Parquet"
        )
    found = {_unquoted(name): value for name, value in _ITEM.findall(text)}
    if not _DICT.fullmatch(text) or found.keys() != {"descr", "fortran_order", "shape"}:
        raise BadFile("the header of the .npy file cannot be read")
    return found


def _unquoted(text: str) -> str:
    return text[1:-1]


def _datatype(descr: str) -> str:
    if name := _BY_DESCR.get(descr):
        return name
    if descr[1:2] == "O":
        raise Unsupported("an array of Python objects is never loaded")
    if descr[:1] == ">" and f"<{descr[1:]}" in _BY_DESCR:
        raise Unsupported(f"the array is big endian; save array.astype('<{descr[1:]}')")
    if descr[1:2] in ("S", "U"):
        raise Unsupported("an array of text: use Parquet or JSONL for BYTES")
    raise Unsupported(f"dtype {descr!r} is no datatype of Triton's")
