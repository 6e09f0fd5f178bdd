"""Files of arrays, put together of what the ranges came to. Row i of the output is row i of the
input, always: one without an answer is NaN (0 where there is no NaN) in a `.npy` file, and null in
Parquet, and the error file says why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from errors import Unsupported
from inference import columns, npy, parquet
from inference.metadata import TensorSpec
from inference.tensors import DATATYPES, Tensor
from storage.objects import BLOCK, ObjectStore
from storage.work import ChunkOutput
from tasks import array_parts
from tasks.array_inputs import CUSTOM_ID, Inputs
from tasks.array_order import Order
from tasks.array_parts import Run
from tasks.formats import Output, Refused, Source, nothing

ROW: Final = "row"
"""Column with the row's number."""


def npy_output(order: Order, parts: Sequence[ChunkOutput], objects: ObjectStore) -> Output:
    """One array of one output. All rows have one shape: where the model leaves it open, the first
    answer's, and answers of another one are dropped."""
    spec = order.outputs[0]
    if -1 not in spec.shape:
        return Output(_npy(spec, spec.shape, parts, objects))
    shape = next(
        shape
        for part in parts
        if part.output_key
        for _, _, shape in array_parts.read_shapes(objects, part.output_key)
    )

    def dropped(part: ChunkOutput) -> Iterator[Refused]:
        if not part.output_key:
            return
        for first, rows, found in array_parts.read_shapes(objects, part.output_key):
            if found != shape:
                words = (
                    f"the answer has shape {list(found)}, and the array's rows {list(shape)}; ask "
                    "for output_format parquet or jsonl"
                )
                yield Refused(first, None, Unsupported.code, words, rows)

    return Output(_npy(spec, shape, parts, objects), dropped)


def _npy(
    spec: TensorSpec,
    shape: tuple[int, ...],
    parts: Sequence[ChunkOutput],
    objects: ObjectStore,
) -> Iterator[bytes]:
    yield npy.header(spec.datatype, (sum(part.items for part in parts), *shape))
    dtype = DATATYPES[spec.datatype].dtype
    assert dtype is not None
    hole = np.full(shape, np.nan if dtype.kind == "f" else 0, dtype).tobytes()
    for part in parts:
        at = part.first_line
        for run in _runs(objects, part):
            yield from _holes(hole, run.first - at)
            data = run.tensors[0].data
            if run.tensors[0].shape[1:] == shape:
                for begin in range(0, len(data), BLOCK):
                    yield bytes(data[begin : begin + BLOCK])
            else:
                yield from _holes(hole, run.rows)
            at = run.end
        yield from _holes(hole, part.first_line + part.items - at)


def _holes(hole: bytes, count: int) -> Iterator[bytes]:
    each = max(1, BLOCK // max(1, len(hole)))
    while count > 0:
        yield hole * min(each, count)
        count -= each


def _runs(objects: ObjectStore, part: ChunkOutput) -> list[Run]:
    return array_parts.read_part(objects, part.output_key) if part.output_key else []


def parquet_output(
    order: Order, inputs: Inputs, source: Source, parts: Sequence[ChunkOutput], objects: ObjectStore
) -> Output:
    """A column an output, the row's number, and its custom_id where the input had one."""
    names = {one.name for one in order.outputs}
    fields = [pa.field(one.name, _type(one)) for one in order.outputs]
    if CUSTOM_ID not in names and inputs.has_ids:
        fields.insert(0, pa.field(CUSTOM_ID, pa.string()))
    if ROW not in names:
        fields.insert(0, pa.field(ROW, pa.int64()))
    schema = pa.schema(fields)

    def batches() -> Iterator[pa.RecordBatch]:
        for part in parts:
            runs = _runs(objects, part)
            made = {one.name: _column(one, part, runs) for one in order.outputs}
            if ROW not in made:
                end = part.first_line + part.items
                made[ROW] = pa.array(np.arange(part.first_line, end, dtype=np.int64))
            if CUSTOM_ID in schema.names and CUSTOM_ID not in made:
                made[CUSTOM_ID] = inputs.ids(source, part)
            yield pa.record_batch([made[name] for name in schema.names], schema)

    return Output(parquet.write(batches(), schema), nothing)


def _type(spec: TensorSpec) -> pa.DataType:
    # One number a row is a number; one that may be several is a list.
    return columns.type_of(spec.datatype, 0 if spec.shape in ((), (1,)) else len(spec.shape))


def _column(spec: TensorSpec, part: ChunkOutput, runs: Sequence[Run]) -> pa.Array:
    pieces: list[Tensor | int] = []
    at = part.first_line
    for run in runs:
        for tensor in run.tensors:
            if tensor.name == spec.name:
                pieces += [run.first - at, tensor]
                at = run.end
    return columns.write([*pieces, part.first_line + part.items - at], _type(spec))
