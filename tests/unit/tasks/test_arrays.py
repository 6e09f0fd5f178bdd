"""Batches over arrays, apart from running them: what may be asked, how files are cut, and that
neither reading one in nor putting one together takes memory that grows with it."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadRequest, Unsupported
from inference import npy
from inference.deadline import CancelToken
from inference.metadata import ModelSpec, TensorSpec
from inference.tensors import InferRequest, InferResult, Tensor
from storage.lifecycle import ChunkKind, ChunkState, JobKind
from storage.objects import DirectoryStore
from storage.work import ChunkOutput, ChunkPlan, Claim
from tasks import array_order
from tasks.array_inputs import RANGE_ROWS, Members
from tasks.array_order import Order, fit, kind_of, order
from tasks.array_outputs import npy_output
from tasks.array_parts import PartWriter, read_part, read_shapes
from tasks.arrays import Arrays
from tasks.formats import Limits, Pack, Refused, Source

MODEL = ModelSpec(
    "m",
    "1",
    "python",
    (TensorSpec("A", "FP32", (-1, 4)), TensorSpec("B", "INT64", (-1, 1), optional=True)),
    (TensorSpec("Y", "FP32", (-1, 4)), TensorSpec("Z", "BYTES", (-1, 1))),
    max_batch_size=8,
)
LIMITS = Limits(chunk_items=256, chunk_bytes=4 << 20, max_lines=1000, max_line_bytes=1 << 20)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path)


def asked(source: str = "npy", **fields: Any) -> Order:
    made = order(source, MODEL, **{"output_names": ["Y"], **fields})
    assert made is not None
    return made


def claim_of(made: Order, **fields: Any) -> Claim:
    claim = Claim(
        id=1,
        token=1,
        kind=ChunkKind.INFER,
        job_id=UUID(int=7),
        job_kind=JobKind.BATCH,
        tenant_id=UUID(int=8),
        seq=1,
        model="m",
        version="",
        attempts=1,
        last=False,
        items=1,
        first_line=0,
        byte_start=0,
        byte_end=0,
        duplicates=(),
        remaining=60,
        input=None,
        input_key=None,
        endpoint="",
        file_key="file",
        outcome=None,
        arrays=made.to_json(),
    )
    return replace(claim, **fields)


# What is asked


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\x93NUMPY\1\0", "npy"),
        (b"PAR1....", "parquet"),
        (b'{"custom', "jsonl"),
        (b"", "jsonl"),
        (b"\x93NUM", "jsonl"),
    ],
)
def test_a_files_kind_is_told_by_its_first_bytes(head: bytes, kind: str) -> None:
    assert kind_of(head) == kind


@pytest.mark.parametrize("head", [b"PARE....", b"PK\3\4...."])
def test_closed_and_packed_files_are_refused(head: bytes) -> None:
    with pytest.raises(Unsupported):
        kind_of(head)


def test_an_order_survives_the_ledger() -> None:
    for made in (asked(), replace(asked("parquet"), only=((3, 4), (9, 1)))):
        assert Order.from_json(made.to_json()) == made


def test_lines_need_no_order() -> None:
    assert order("jsonl", MODEL) is None
    assert order("jsonl", MODEL, output="jsonl") is None


def test_the_only_required_input_is_the_array() -> None:
    assert asked().inputs == (TensorSpec("A", "FP32", (4,)),)


@pytest.mark.parametrize(
    ("source", "fields", "param"),
    [
        ("jsonl", {"output": "npy"}, "output_format"),
        ("jsonl", {"output_names": ["Y"]}, "output_names"),
        ("npy", {"output_names": None}, "output_names"),
        ("npy", {"output_names": ["Z"]}, "output_format"),
        ("npy", {"output_names": ["Y", "Y"]}, "output_names"),
        ("npy", {"output_names": ["X"]}, "output_names"),
        ("npy", {"input_name": "C"}, "input_name"),
        ("npy", {"input_name": "B"}, "input_file_id"),
        ("parquet", {"input_name": "A"}, "input_name"),
        ("parquet", {"output": "npy", "output_names": None}, "output_names"),
    ],
)
def test_what_cannot_be_is_refused_by_the_fields_name(
    source: str, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        order(source, MODEL, **({"output_names": ["Y"]} if source != "jsonl" else {}) | fields)
    assert caught.value.param == param


def test_bf16_can_be_answered_in_neither() -> None:
    model = replace(MODEL, outputs=(TensorSpec("Y", "BF16", (-1, 4)),))
    for kind in ("npy", "parquet"):
        with pytest.raises(BadRequest, match="BF16"):
            order(kind, model)


@pytest.mark.parametrize(
    ("found", "wanted", "shape"),
    [
        ((4,), (4,), (4,)),
        ((5,), (4,), None),
        ((5,), (-1,), (5,)),
        ((), (1,), (1,)),
        ((), (), ()),
        ((), (-1,), (1,)),
        ((), (2,), None),
        ((12,), (3, 4), (3, 4)),
        ((12,), (-1, 4), (3, 4)),
        ((13,), (-1, 4), None),
        ((12,), (-1, -1), None),
        ((3, 4), (12,), None),
        ((3, 4), (-1, -1), (3, 4)),
        ((4,), (0, -1), None),
    ],
)
def test_flat_rows_are_laid_out_and_others_have_to_fit(
    found: tuple[int, ...], wanted: tuple[int, ...], shape: tuple[int, ...] | None
) -> None:
    assert fit(found, wanted) == shape


def test_members_are_numbered_and_named_only_when_looked_at() -> None:
    members = Members(1 << 40, 1 << 40)
    assert len(members) == 1 << 40
    assert members[5].number == (1 << 40) + 5
    assert members.part(10, 12)[1] == members[11]
    assert len(members[:3]) == 3
    with pytest.raises(IndexError):
        members[1 << 40]


# Reading in


class _Counting(DirectoryStore):
    """Counts the bytes that are read of it."""

    read = 0

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        for block in super().stream(key, start, end):
            self.read += len(block)
            yield block


def test_of_ten_million_rows_only_the_header_is_read(tmp_path: Path) -> None:
    store = _Counting(tmp_path)
    rows = 10_000_000
    with (tmp_path / "file").open("wb") as file:
        file.write(npy.header("FP32", (rows, 4)))
        # A hole: it takes no room on the disk.
        file.truncate(file.tell() + rows * 16)
    planned = Arrays.of(claim_of(asked())).plan(Source(store, "file", CancelToken()), LIMITS)
    assert store.read <= npy.HEAD
    assert len(planned.ranges) == -(-rows // RANGE_ROWS)
    assert sum(plan.items for plan in planned.ranges) == rows
    last = planned.ranges[-1]
    assert last.byte_end == store.size("file")
    assert last.first_line + last.items == rows
    assert planned.layout == {"shape": (4,)}


@given(st.integers(1, 50), st.integers(1, 20))
def test_pieces_cover_a_range(rows: int, each: int) -> None:
    whole = ChunkPlan(rows, 100, 64, 64 + 16 * rows)
    inputs = Arrays.of(claim_of(asked())).inputs
    pieces = inputs.pieces(Source(None, "", CancelToken()), whole, each)  # type: ignore[arg-type]
    assert sum(piece.items for piece in pieces) == rows
    at, start = 100, 64
    for piece in pieces:
        assert (piece.first_line, piece.byte_start) == (at, start)
        assert piece.byte_end - piece.byte_start == 16 * piece.items
        at, start = at + piece.items, piece.byte_end


def test_requests_are_slices_of_what_was_read(store: DirectoryStore) -> None:
    values = np.arange(80, dtype="<f4").reshape(20, 4)
    store.put("file", values.tobytes())
    claim = claim_of(asked(), items=20, first_line=40, byte_end=320, layout={"shape": [4]})
    packs = list(
        Arrays.of(claim).read(
            Source(store, "file", CancelToken()), claim, MODEL, LIMITS, lambda: False
        )
    )
    assert all(isinstance(pack, Pack) for pack in packs)
    shapes = [pack.request.inputs[0].shape for pack in packs if isinstance(pack, Pack)]
    assert shapes == [(8, 4), (8, 4), (4, 4)]
    numbers = [m.number for pack in packs if isinstance(pack, Pack) for m in pack.members]
    assert numbers == list(range(40, 60))
    data = b"".join(pack.request.inputs[0].data for pack in packs if isinstance(pack, Pack))
    assert data == values.tobytes()


def test_a_model_that_has_changed_refuses_ranges_in_one_line_a_request(
    store: DirectoryStore,
) -> None:
    store.put("file", bytes(320))
    claim = claim_of(asked(), items=20, byte_end=320, layout={"shape": [4]})
    changed = replace(MODEL, inputs=(TensorSpec("A", "FP32", (-1, 5)),))
    found = list(
        Arrays.of(claim).read(
            Source(store, "file", CancelToken()), claim, changed, LIMITS, lambda: False
        )
    )
    assert [(one.number, one.items) for one in found if isinstance(one, Refused)] == [
        (0, 8),
        (8, 8),
        (16, 4),
    ]


# Putting together


def part_of(first: int, rows: int, key: str | None) -> ChunkOutput:
    state = ChunkState.DONE if key else ChunkState.CANCELED
    return ChunkOutput(1, state, rows, first, 0, 0, key, None, rows, 0, None)


def answer(first: int, values: Any) -> tuple[Pack, InferResult]:
    rows = len(values)
    request = InferRequest("m", "", ())
    result = InferResult("m", "1", (Tensor("Y", "FP32", values.shape, values.tobytes()),))
    return Pack(request, Members(first, rows), rows), result


def stored(store: DirectoryStore, made: Order, *answers: tuple[Pack, InferResult]) -> str:
    writer = PartWriter(made)
    for pack, result in answers:
        assert not writer.answered(pack, result)
    store.put("part", b"".join(writer.close()))
    return "part"


@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_answers_in_any_order_with_any_holes_are_found_at_their_rows(
    tmp_path_factory: pytest.TempPathFactory, places: list[int], missing: set[int]
) -> None:
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    made = asked()
    values = np.arange(48, dtype="<f4").reshape(12, 4)
    answers = [
        answer(10 + 2 * at, values[2 * at : 2 * at + 2]) for at in places if at not in missing
    ]
    key = stored(store, made, *answers) if answers else None
    blocks = npy_output(made, [part_of(10, 12, key)], store).blocks
    found = np.load(io.BytesIO(b"".join(blocks)))
    for at in range(6):
        rows = found[2 * at : 2 * at + 2]
        if at in missing:
            assert np.isnan(rows).all()
        else:
            assert (rows == values[2 * at : 2 * at + 2]).all()
    if key:
        runs = read_part(store, key)
        assert sum(run.rows for run in runs) == 2 * (6 - len(missing))
        assert [(r.first, r.rows, (4,)) for r in runs] == list(read_shapes(store, key))


def test_an_answer_that_is_not_as_the_model_says_has_no_place() -> None:
    writer = PartWriter(asked())
    for values in (np.zeros((2, 5), "<f4"), np.zeros((3, 4), "<f4"), np.zeros((2,), "<f4")):
        pack, result = answer(0, values)
        pack = replace(pack, members=Members(0, 2))
        assert len(writer.answered(pack, result)) == 2
    pack, result = answer(0, np.zeros((2, 4), "<f4"))
    short = replace(result.outputs[0], data=b"")
    assert len(writer.answered(pack, replace(result, outputs=(short,)))) == 2
    assert len(writer.answered(pack, replace(result, outputs=()))) == 2
    assert writer.close() == ()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<i8", "|u1", "|b1"])
def test_what_was_not_run_is_nan_or_zero(dtype: str, store: DirectoryStore) -> None:
    name = {"f": "FP", "i": "INT", "u": "UINT", "b": "BOOL"}[dtype[1]]
    bits = "" if name == "BOOL" else str(8 * np.dtype(dtype).itemsize)
    made = replace(asked(), outputs=(TensorSpec("Y", name + bits, (2, 3)),))
    blocks = list(npy_output(made, [part_of(0, 400_000, None)], store).blocks)
    assert max(map(len, blocks)) <= 1 << 20
    found = np.load(io.BytesIO(b"".join(blocks)))
    assert (found.dtype, found.shape) == (np.dtype(dtype), (400_000, 2, 3))
    assert (np.isnan(found) if dtype[1] == "f" else found == 0).all()


def test_an_output_is_put_together_in_little_memory(store: DirectoryStore) -> None:
    made = asked()
    values = np.ones((RANGE_ROWS, 4), "<f4")
    key = stored(store, made, answer(0, values))
    # A million and a half rows: each part is the same object, at its own rows.
    parts = [part_of(0, RANGE_ROWS, key)] * 100

    def size(blocks: Iterable[bytes]) -> int:
        return sum(map(len, blocks))

    tracemalloc.start()
    try:
        written = size(npy_output(made, parts, store).blocks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert written == 128 + 100 * values.nbytes
    assert peak < 20 * values.nbytes


def test_unknown_kinds_are_none_of_ours() -> None:
    assert array_order.KINDS == ("jsonl", "npy", "parquet")
