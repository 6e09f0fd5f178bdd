"""Batches over arrays: `.npy` and Parquet files in and out, with no Python object a row.

Input    a `.npy` file is one input of the model; the columns of a Parquet file are its inputs
Output   one of the same kind, or the other, or lines as a batch of lines has them
Errors   {"id", "custom_id", "response": null, "error": {"code", "message", "row", "rows"}}: so many
         rows from this one on, counted from 0
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import orjson

from errors import TidegateError
from inference.metadata import ModelSpec
from storage.objects import ObjectStore
from storage.work import ChunkOutput, ChunkPlan, Claim
from tasks.array_inputs import Inputs, NpyInput, ParquetInput
from tasks.array_order import LINES, NPY, Order
from tasks.array_outputs import npy_output, parquet_output
from tasks.array_parts import PartWriter
from tasks.batch_lines import request_id
from tasks.formats import (
    Limits,
    Member,
    Output,
    Pack,
    Planned,
    Range,
    Refused,
    Source,
    Writer,
)
from tasks.line_format import LineWriter, joined


@dataclass(frozen=True, slots=True)
class Arrays:
    """`Format` of such a batch."""

    order: Order
    inputs: Inputs

    @classmethod
    def of(cls, claim: Claim) -> Arrays:
        """The format of the batch that a claim is of."""
        order = Order.from_json(claim.arrays or {})
        kind = NpyInput if order.source == NPY else ParquetInput
        return cls(order, kind(order, claim.layout or {}))

    @property
    def suffix(self) -> str:
        return self.order.output

    def plan(self, source: Source, limits: Limits) -> Planned:
        return self.inputs.plan(source, limits)

    def pieces(
        self, source: Source, whole: ChunkPlan, each: int, limits: Limits
    ) -> list[ChunkPlan]:
        return self.inputs.pieces(source, whole, each)

    def read(
        self,
        source: Source,
        claim: Claim,
        spec: ModelSpec,
        limits: Limits,
        enough: Callable[[], bool],
    ) -> Iterator[Pack | Refused | ChunkPlan]:
        return self.inputs.read(source, claim, spec, limits, enough)

    def undone(
        self, source: Source, part: Range, limits: Limits, code: str, message: str
    ) -> Iterator[Refused]:
        # One line for all: a client that cancels ten million rows does not want as many.
        yield Refused(part.first_line, None, code, message, part.items)

    def writer(self, claim: Claim, spec: ModelSpec) -> Writer:
        return LineWriter(claim) if self.order.output == LINES else PartWriter(self.order)

    def output(self, source: Source, parts: Sequence[ChunkOutput], objects: ObjectStore) -> Output:
        if self.order.output == LINES:
            return Output(joined(parts, objects))
        if self.order.output == NPY:
            return npy_output(self.order, parts, objects)
        return parquet_output(self.order, self.inputs, source, parts, objects)

    def refused_line(self, claim: Claim, item: Refused) -> bytes:
        error = {
            "code": item.code,
            "message": item.message,
            "row": item.number,
            "rows": item.items,
        }
        return orjson.dumps(
            {
                "id": request_id(claim, item.number),
                "custom_id": item.custom_id,
                "response": None,
                "error": error,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )

    def failed_line(self, claim: Claim, member: Member, error: TidegateError) -> bytes:
        return self.refused_line(
            claim, Refused(member.number, member.custom_id, error.code, error.message)
        )
