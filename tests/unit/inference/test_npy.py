"""`.npy` headers: what numpy writes is read, what it could not have written is refused."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadFile, Unsupported
from inference import npy
from inference.tensors import DATATYPES

NUMERIC = [name for name, kind in DATATYPES.items() if kind.dtype is not None]
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


def saved(array: Any, version: Any = None) -> bytes:
    file = io.BytesIO()
    if version:
        np.lib.format.write_array(file, array, version)
    else:
        np.save(file, array)
    return file.getvalue()


def read(data: bytes) -> npy.Header:
    return npy.read_header(data[: npy.HEAD], len(data))


def forged(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    length = len(header).to_bytes(2 if version[0] == 1 else 4, "little")
    return npy.MAGIC + version + length + header.encode() + data


@pytest.mark.parametrize("version", [None, (1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("datatype", NUMERIC)
@given(shape=shapes)
def test_what_numpy_saves_is_read(datatype: str, version: Any, shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, DATATYPES[datatype].dtype)
    data = saved(array, version)
    header = read(data)
    assert (header.datatype, header.shape) == (datatype, shape)
    assert data[header.start :] == array.tobytes()
    assert header.row_bytes * header.rows == array.nbytes


@pytest.mark.parametrize("datatype", NUMERIC)
@given(shape=shapes)
def test_numpy_reads_what_is_written(datatype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).astype(DATATYPES[datatype].dtype).reshape(shape)
    head = npy.header(datatype, shape)
    assert len(head) % 64 == 0
    found = np.load(io.BytesIO(head + array.tobytes()), allow_pickle=False)
    assert (found.dtype, found.shape) == (array.dtype, shape)
    assert found.tobytes() == array.tobytes()


def test_ten_million_rows_have_a_header_numpy_reads() -> None:
    head = npy.header("FP32", (10_000_000, 3))
    assert np.lib.format.read_array_header_1_0(io.BytesIO(head[8:]))[0] == (10_000_000, 3)


def test_other_writers_headers_are_read() -> None:
    for text in (
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
        '{"descr": "<f4", "fortran_order": false, "shape": (2, 3)}'.replace("false", "False"),
        "{'shape':(2,3),'fortran_order':False,'descr':'<f4'}\n",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (6L,), }   ",
    ):
        assert read(forged(text, bytes(24))).datatype == "FP32"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([{}, []], object), "never loaded"),
        (np.zeros(3, ">f4"), "big endian"),
        (np.asfortranarray(np.zeros((3, 4))), "Fortran"),
        (np.zeros((), "f4"), "no dimensions"),
        (np.zeros(3, [("a", "f4")]), "structured"),
        (np.zeros(3, "S5"), "text"),
        (np.zeros(3, "U5"), "text"),
        (np.zeros(3, "c8"), "no datatype"),
        (np.zeros(3, "m8[s]"), "no datatype"),
        (np.zeros(3, "V4"), "no datatype"),
        (np.zeros((3, 0), "f4"), "empty"),
    ],
)
def test_arrays_that_are_no_rows_for_triton_are_refused(array: Any, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        read(saved(array) if array.dtype != object else forged_object())


def forged_object() -> bytes:
    return forged("{'descr': '|O', 'fortran_order': False, 'shape': (2,), }", b"cos\nsystem\n.")


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        npy.MAGIC[:3],
        npy.MAGIC,
        npy.MAGIC + b"\1\0\x10",
        npy.MAGIC + b"\2\0\xff\xff\xff\xff" + b"{" * 100,
        npy.MAGIC + b"\1\0\xff\xff" + b" " * 65535,
        forged(GOOD)[:-5],
        forged(GOOD, bytes(23)),
        forged(GOOD, bytes(25)),
        forged(GOOD.replace("(2, 3)", "(2, -3)"), bytes(24)),
        forged(GOOD.replace("(2, 3)", "(2,,3)"), bytes(24)),
        forged(GOOD.replace("(2, 3)", "(99999999999999999999,)"), bytes(24)),
        forged(GOOD.replace("(2, 3)", "(4294967296, 4294967296)"), bytes(24)),
        forged(GOOD.replace("(2, 3)", "(" + "1," * 40 + ")"), bytes(4)),
        forged(GOOD.replace("False", "None"), bytes(24)),
        forged(GOOD.replace("'shape'", "'descr'"), bytes(24)),
        forged(GOOD + "; import os", bytes(24)),
        forged("[" * 4000),
        forged("{'descr': __import__('os').system('x'), 'fortran_order': False, 'shape': (2,)}"),
        forged("{" + " " * 4090),
    ],
)
def test_broken_files_are_refused(data: bytes) -> None:
    with pytest.raises(BadFile):
        read(data)


def test_versions_of_the_future_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"version 9\.0"):
        read(forged(GOOD, bytes(24), b"\x09\0"))


@given(st.binary(max_size=200), st.integers(0, 120), st.integers(0, 10**6))
def test_no_bytes_raise_anything_else(noise: bytes, keep: int, size: int) -> None:
    for data in (noise, npy.MAGIC + noise, saved(np.zeros((2, 3)))[:keep] + noise):
        with suppress(BadFile, Unsupported):
            header = npy.read_header(data, size)
            assert header.start + header.rows * header.row_bytes == size


@pytest.mark.parametrize("datatype", ["BYTES", "BF16"])
def test_datatypes_numpy_does_not_have_are_refused(datatype: str) -> None:
    with pytest.raises(Unsupported, match=datatype):
        npy.header(datatype, (1,))
