"""What one range of rows came to, at rest between the worker that ran it and who puts the output
together: runs of rows that are alike, with their tensors in raw form.

    header length, 4 bytes | header, JSON | raw tensors, in the header's order

The header lists `[first row, rows, [[name, datatype, shape of a row, bytes], ...]]`, in the order
of the rows; rows that are in no run have no answer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson

from errors import ModelFailed, TidegateError, Unsupported
from inference.metadata import TensorSpec
from inference.tensors import Buffer, InferResult, Tensor, check_raw
from storage import objects
from storage.objects import ObjectStore
from tasks.array_order import Order
from tasks.formats import Member, Pack

_LENGTH: Final = struct.Struct("<I")
_HEAD: Final = 1 << 16
"""Bytes that hold most headers."""


@dataclass(slots=True)
class Run:
    """Rows that lie together and are alike. Tensors have the shape of all their rows together, but
    for a model without a batch dimension too: the first dimension is rows."""

    first: int
    rows: int
    tensors: tuple[Tensor, ...]

    @property
    def end(self) -> int:
        return self.first + self.rows


@dataclass(slots=True)
class _Kept:
    first: int
    rows: int
    tensors: tuple[TensorSpec, ...]
    """Shapes are those of a row."""
    data: list[list[Buffer]] = field(default_factory=list)
    """Of each tensor, in pieces."""


class PartWriter:
    """`Writer` of such a part."""

    def __init__(self, order: Order):
        self._order = order
        self._kept: list[_Kept] = []

    def answered(self, pack: Pack, result: InferResult) -> Sequence[tuple[Member, TidegateError]]:
        members = pack.members
        found = {tensor.name: tensor for tensor in result.outputs}
        tensors = [found[one.name] for one in self._order.outputs if one.name in found]
        specs = {one.name: one for one in self._order.outputs}
        try:
            rows = tuple(self._row(tensor, specs[tensor.name], len(members)) for tensor in tensors)
            if not tensors:
                raise ModelFailed("the model answered none of the outputs that are kept")
        except TidegateError as error:
            return [(member, error) for member in members]
        data: list[list[Buffer]] = [[tensor.data] for tensor in tensors]
        self._kept.append(_Kept(members[0].number, len(members), rows, data))
        return ()

    def _row(self, tensor: Tensor, spec: TensorSpec, rows: int) -> TensorSpec:
        """What one row of an output is. Raises where it is not as the model says."""
        check_raw(tensor)
        shape = tensor.shape
        if self._order.max_rows:
            if not shape or shape[0] != rows:
                raise Unsupported(
                    f"output {tensor.name!r} has shape {list(shape)} for {rows} row; ask for "
                    "output_format jsonl"
                )
            shape = shape[1:]
        if (
            tensor.datatype != spec.datatype
            or len(shape) != len(spec.shape)
            or any(want not in (-1, have) for have, want in zip(shape, spec.shape, strict=True))
        ):
            raise ModelFailed(
                f"output {tensor.name!r} is {tensor.datatype} {list(shape)}; the model declares "
                f"{spec.datatype} {list(spec.shape)}"
            )
        return TensorSpec(tensor.name, tensor.datatype, shape)

    def missing(self, member: Member) -> None:
        """It is in no run."""

    def close(self) -> Sequence[bytes]:
        runs = self._merged()
        if not runs:
            return ()
        header = orjson.dumps(
            [
                [
                    run.first,
                    run.rows,
                    [
                        [spec.name, spec.datatype, spec.shape, sum(map(len, pieces))]
                        for spec, pieces in zip(run.tensors, run.data, strict=True)
                    ],
                ]
                for run in runs
            ]
        )
        pieces = [piece for run in runs for tensor in run.data for piece in tensor]
        return [_LENGTH.pack(len(header)), header, *(bytes(piece) for piece in pieces)]

    def _merged(self) -> list[_Kept]:
        merged: list[_Kept] = []
        for kept in sorted(self._kept, key=lambda kept: kept.first):
            last = merged[-1] if merged else None
            if last and last.first + last.rows == kept.first and last.tensors == kept.tensors:
                last.rows += kept.rows
                for pieces, more in zip(last.data, kept.data, strict=True):
                    pieces += more
            else:
                merged.append(kept)
        return merged


def read_part(store: ObjectStore, key: str) -> list[Run]:
    """The runs of a part; their tensors are slices of it."""
    data = memoryview(b"".join(objects.steadily(store, key)))
    (length,) = _LENGTH.unpack_from(data)
    at = _LENGTH.size + length
    runs: list[Run] = []
    for first, rows, described in orjson.loads(data[_LENGTH.size : at]):
        tensors: list[Tensor] = []
        for name, datatype, shape, size in described:
            tensors.append(Tensor(name, datatype, (rows, *shape), data[at : at + size]))
            at += size
        runs.append(Run(first, rows, tuple(tensors)))
    return runs


def read_shapes(store: ObjectStore, key: str) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(first row, rows, shape of a row of the only tensor) of each run of a part."""
    head = b"".join(objects.steadily(store, key, 0, _HEAD))
    end = _LENGTH.size + _LENGTH.unpack_from(head)[0]
    if len(head) < end:
        head += b"".join(objects.steadily(store, key, len(head), end))
    for first, rows, ((_, _, shape, _),) in orjson.loads(head[_LENGTH.size : end]):
        yield first, rows, tuple(shape)
