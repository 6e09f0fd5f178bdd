"""Lines read and written many at a time come to what each comes to by itself, byte for byte."""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import ModelFailed
from inference.client import CancelToken
from inference.metadata import ModelSpec, TensorSpec
from inference.tensors import InferRequest, InferResult, Tensor
from storage.lifecycle import ChunkKind, JobKind
from storage.objects import DirectoryStore
from storage.work import ChunkPlan, Claim
from tasks import batch_lines, line_format
from tasks.batch_lines import BadLine, request_id
from tasks.formats import Limits, Member, Pack, Refused, Source
from tasks.line_format import Lines, LineWriter

ENDPOINT = "/v2/models/m/infer"
LIMITS = Limits(
    chunk_items=1000, chunk_bytes=1 << 20, max_lines=1000, max_line_bytes=700, pack_bytes=200
)
SPECS = [
    ModelSpec(
        "m",
        "1",
        "",
        tuple(
            TensorSpec(name, datatype, (-1, -1), optional=True)
            for name, datatype in (("F", "FP32"), ("I", "INT8"), ("U", "UINT64"), ("T", "BYTES"))
        ),
        (TensorSpec("OUT", "FP32", (-1, -1)),),
        max_batch_size=most,
    )
    for most in (4, 1, 0)
]


def answer(request: InferRequest) -> InferResult:
    """What a model says that knows nothing of packs: row by row, of that row's bytes."""
    rows = request.inputs[0].shape[0]
    floats, wholes, texts = [], [], b""
    for row in range(rows):
        seed = 0
        for tensor in request.inputs:
            width = len(tensor.data) // rows
            if tensor.datatype == "BYTES":
                continue  # Its rows have no fixed width; the shape says enough here.
            seed = zlib.crc32(bytes(tensor.data[row * width : (row + 1) * width]), seed)
        floats += [seed / 7, float("nan") if seed % 3 else -0.0, 1e-30 * seed]
        wholes += [seed]
        texts += b"\x02\0\0\0a%" if request.inputs[0].datatype == "BYTES" else b""
    outputs = [
        Tensor("100% of it", "FP32", (rows, 3), np.array(floats, "<f4").tobytes()),
        Tensor("N", "INT64", (rows,), np.array(wholes, "<i8").tobytes()),
    ]
    if texts:
        outputs.append(Tensor("TEXT", "BYTES", (rows, 1), texts))
    return InferResult(request.model, "1", tuple(outputs), {"p": "50%"}, request.id)


def claim_of(text: bytes, duplicates: tuple[int, ...]) -> Claim:
    return Claim(
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
        first_line=1,
        byte_start=0,
        byte_end=len(text),
        duplicates=duplicates,
        remaining=60,
        input=None,
        input_key=None,
        endpoint=ENDPOINT,
        file_key="file",
        outcome=None,
    )


def each_by_itself(text: bytes, claim: Claim, spec: ModelSpec) -> tuple[list[bytes], list[Refused]]:
    outputs, refused = [], []
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            read = line_format._runnable(line, number, claim, spec, LIMITS)
        except BadLine as bad:
            refused.append(Refused(number, bad.custom_id, bad.reason, bad.message))
        else:
            named = request_id(claim, number)
            outputs.append(batch_lines.output_line(named, read.custom_id, answer(read.request)))
    return outputs, refused


def together(
    source: Source, claim: Claim, spec: ModelSpec
) -> tuple[list[bytes], list[Refused], list[Pack]]:
    writer = LineWriter(claim)
    refused, packs = [], []
    for found in Lines().read(source, claim, spec, LIMITS, lambda: False):
        if isinstance(found, Refused):
            refused.append(found)
        elif isinstance(found, Pack):
            packs.append(found)
            assert not writer.answered(found, answer(found.request))
    return list(writer.close()), sorted(refused, key=lambda one: one.number), packs


NUMERALS = (
    "0 1 -1 7 127 128 -129 1.5 -0.0 -0 1e3 1e38 3.5e38 1e400 16777217 9007199254740993 01 +1 1. .5"
    ' 18446744073709551615 18446744073709551616 NaN Infinity true null [1] 1,2 "x"'
)
numerals = st.sampled_from([*NUMERALS.split(), "", " 1 ", "1\t", "1 2"])
inputs = st.fixed_dictionaries(
    {
        "tensor": st.sampled_from([("F", "FP32"), ("F", "FP32"), ("I", "INT8"), ("U", "UINT64")]),
        "rows": st.sampled_from([1, 1, 1, 2]),
        "width": st.sampled_from([1, 2, 2]),
        "nested": st.booleans(),
        "shape": st.sampled_from(["", "", "", "", "[1.0,2]", "[true,2]", "[1, 2]", "[01,2]", "2"]),
        "data_first": st.booleans(),
    }
)
BYTES = '{"name":"T","shape":[1,1],"datatype":"BYTES","data":["[1]"]}'
EXTRAS = [
    ',"id":"q"',
    ',"parameters":{"priority":1}',
    ',"parameters":{"data":[1]}',
    ',"parameters":{"timeout":5}',
    ',"outputs":[{"name":"OUT"}]',
    ',"custom_id":"z"',
]
styles = st.fixed_dictionaries(
    {
        "inputs": st.lists(inputs, min_size=1, max_size=2),
        "extra": st.sampled_from([*[""] * 10, *EXTRAS]),
        "end": st.sampled_from(["", "", "", "\r", " ", "}"]),
        "url": st.sampled_from([ENDPOINT] * 12 + ["/v2/models/n/infer"]),
        "id_last": st.booleans(),
    }
)
IDS = ["a", "row-1", "100%", "a/b", "\\u0041", "", "\u00e9", "x" * 513, "\x7f"]
ODD = [b"", b"  ", b"garbage", b"[1]", b"{}", b"x" * 800, b"\xff"]


@st.composite
def lines(draw: st.DrawFn, style: dict[str, Any]) -> bytes:
    """One of this style, or nearly."""
    parts = []
    for one in style["inputs"]:
        rows, width = one["rows"], one["width"]
        if draw(st.integers(0, 9)) == 0:
            width += 1
        count = rows * width - (draw(st.integers(0, 30)) == 0)
        mostly = st.integers(0, 100).map(str)
        values = [
            draw(numerals) if draw(st.integers(0, 40)) == 0 else draw(mostly) for _ in range(count)
        ]
        if one["nested"]:
            cut = [values[row * width : (row + 1) * width] for row in range(rows)]
            data = ",".join(f"[{','.join(row)}]" for row in cut)
        else:
            data = ", ".join(values)
        name, datatype = one["tensor"]
        shape = one["shape"] or f"[{rows},{width}]"
        fields = [f'"shape":{shape}', f'"datatype":"{datatype}"', f'"data":[{data}]']
        if one["data_first"]:
            fields.reverse()
        parts.append(f'{{"name":"{name}",{",".join(fields)}}}')
    odd = draw(st.integers(0, 30))
    if odd == 0:
        return draw(st.sampled_from(ODD))
    if odd == 1:
        parts = [BYTES]
    custom_id = draw(st.sampled_from(IDS[:4] if draw(st.integers(0, 5)) else IDS))
    body = f'"body":{{"inputs":[{",".join(parts)}]{style["extra"]}}}'
    fields = [f'"custom_id":"{custom_id}"', f'"method":"POST","url":"{style["url"]}"', body]
    if style["id_last"]:
        fields.reverse()
    return f"{{{','.join(fields)}}}{style['end']}".encode()


@st.composite
def files(draw: st.DrawFn) -> list[bytes]:
    some = draw(st.lists(styles, min_size=1, max_size=2))
    return [draw(lines(draw(st.sampled_from(some)))) for _ in range(draw(st.integers(1, 20)))]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DirectoryStore:
    return DirectoryStore(tmp_path_factory.mktemp("objects"))


@given(
    files(),
    st.sampled_from(SPECS),
    st.sets(st.integers(1, 25), max_size=2),
)
def test_what_lines_come_to_together_is_what_each_comes_to_by_itself(
    store: DirectoryStore, texts: list[bytes], spec: ModelSpec, duplicates: set[int]
) -> None:
    text = b"\n".join(texts)
    store.put("file", text)
    claim = claim_of(text, tuple(duplicates))
    outputs, refused, packs = together(Source(store, "file", CancelToken()), claim, spec)
    expected, expected_refused = each_by_itself(text, claim, spec)

    assert b"".join(outputs) == b"".join(expected)
    assert refused == expected_refused
    for pack in packs:
        rows = sum(member.rows for member in pack.members)
        assert len(pack.members) == 1 or rows == pack.request.inputs[0].shape[0] <= 4


def test_alike_lines_are_read_by_their_pattern(store: DirectoryStore) -> None:
    def line(number: int, width: int) -> bytes:
        body = {
            "inputs": [
                {
                    "name": "F",
                    "shape": [1, width],
                    "datatype": "FP32",
                    "data": [number + 0.5] * width,
                }
            ]
        }
        document = {"custom_id": f"{number}", "method": "POST", "url": ENDPOINT, "body": body}
        return json.dumps(document).encode()

    text = b"\n".join(line(number, 1 + number % 3) for number in range(1, 41))
    store.put("file", text)
    claim, spec = claim_of(text, ()), replace(SPECS[0], max_batch_size=4)
    source = Source(store, "file", CancelToken())
    read: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        careful = line_format._runnable

        def noted(text: bytes, number: int, *rest: Any) -> Any:
            read.append(number)
            return careful(text, number, *rest)

        patch.setattr(line_format, "_runnable", noted)
        outputs, refused, packs = together(source, claim, spec)

    # One of each width, and the others as those.
    assert (read, refused) == ([1, 2, 3], [])
    assert b"".join(outputs) == b"".join(each_by_itself(text, claim, spec)[0])
    assert sum(len(pack.members) for pack in packs) == 40
    assert max(len(pack.members) for pack in packs) == 4


def test_an_answer_without_form_in_json_is_named_and_its_neighbours_are_kept(
    store: DirectoryStore,
) -> None:
    request = InferRequest("m", "", (Tensor("F", "FP32", (2, 1), bytes(8)),))
    members = (Member(1, "a"), Member(2, "b"))
    bad = b"\x02\0\0\0\xff\xfe\x04\0\0\0fine"
    result = InferResult("m", "1", (Tensor("T", "BYTES", (2, 1), bad),))
    writer = LineWriter(claim_of(b"", ()))
    ((member, error),) = writer.answered(Pack(request, members, 2), result)

    assert (member.number, isinstance(error, ModelFailed)) == (1, False)
    (text,) = writer.close()
    assert json.loads(text)["custom_id"] == "b"


@given(files(), st.sampled_from(SPECS), st.sets(st.integers(1, 25), max_size=2))
def test_a_range_that_is_left_again_and_again_is_read_once(
    store: DirectoryStore, texts: list[bytes], spec: ModelSpec, duplicates: set[int]
) -> None:
    text = b"\n".join(texts)
    store.put("file", text)
    claim = claim_of(text, tuple(sorted(duplicates)))
    claim = replace(claim, items=sum(1 for line in texts if line.strip()))
    source = Source(store, "file", CancelToken())
    outputs, refused, _ = together(source, claim, spec)
    writer, again = LineWriter(claim), []
    rest: ChunkPlan | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_format, "ASK_EVERY", 3)
        while claim.items:
            rest = None
            for found in Lines().read(source, claim, spec, LIMITS, lambda: True):
                assert rest is None
                if isinstance(found, ChunkPlan):
                    rest = found
                elif isinstance(found, Refused):
                    again.append(found)
                else:
                    assert not writer.answered(found, answer(found.request))
            if rest is None:
                break
            assert rest.items < claim.items
            claim = replace(
                claim,
                items=rest.items,
                first_line=rest.first_line,
                byte_start=rest.byte_start,
                byte_end=rest.byte_end,
                duplicates=rest.duplicates,
            )

    assert list(writer.close()) == outputs
    assert sorted(again, key=lambda one: one.number) == refused
