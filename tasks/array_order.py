"""What a batch over a file of arrays is to do: which input its rows are, which outputs are kept,
and in what kind of file. Fixed when the batch is made, by the model as it is then. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from errors import BadRequest, Unsupported
from inference.metadata import ModelSpec, TensorSpec
from inference.tensors import DATATYPES

LINES: Final = "jsonl"
NPY: Final = "npy"
PARQUET: Final = "parquet"
KINDS: Final = (LINES, NPY, PARQUET)
SNIFFED: Final = 8
"""Bytes at the beginning of a file by which its kind is told."""


def kind_of(head: bytes) -> str:
    """The kind of a file that begins so. What is nothing else may be lines. Raises `Unsupported`
    for an archive of arrays."""
    if head.startswith(b"\x93NUMPY"):
        return NPY
    if head.startswith(b"PAR1"):
        return PARQUET
    if head.startswith(b"PAR"):
        raise Unsupported("the Parquet file is encrypted")
    if head.startswith(b"PK\x03\x04"):
        raise Unsupported("an archive (.npz, .zip): upload one .npy file, or Parquet")
    return LINES


@dataclass(frozen=True, slots=True)
class Order:
    """What to do with a file of arrays. Shapes are those of one row: without a batch dimension."""

    source: str
    output: str
    inputs: tuple[TensorSpec, ...]
    """That the file may hold: of a `.npy` file, the one that it is."""
    outputs: tuple[TensorSpec, ...]
    """That are kept."""
    named: bool
    """They are asked of the model by name: the client chose them."""
    max_rows: int
    """Of one request; 0: a request is one row, without a batch dimension."""
    only: tuple[tuple[int, int], ...] = ()
    """Ranges of rows, (first, how many), where not all of the file is to be run."""

    def to_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "output": self.output,
            "inputs": [_told(one) for one in self.inputs],
            "outputs": [_told(one) for one in self.outputs],
            "named": self.named,
            "max_rows": self.max_rows,
            "only": [list(pair) for pair in self.only],
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Order:
        return cls(
            source=told["source"],
            output=told["output"],
            inputs=tuple(_spec(*one) for one in told["inputs"]),
            outputs=tuple(_spec(*one) for one in told["outputs"]),
            named=told["named"],
            max_rows=told["max_rows"],
            only=tuple((first, count) for first, count in told.get("only", ())),
        )


def _told(spec: TensorSpec) -> list[Any]:
    return [spec.name, spec.datatype, list(spec.shape), spec.optional]


def _spec(name: str, datatype: str, shape: Sequence[int], optional: bool) -> TensorSpec:
    return TensorSpec(name, datatype, tuple(shape), optional)


def order(
    source: str,
    spec: ModelSpec,
    *,
    output: str | None = None,
    input_name: str | None = None,
    output_names: Sequence[str] | None = None,
) -> Order | None:
    """What to do with a file of kind `source`, by what the client asked for; None: lines say it
    themselves. Raises `BadRequest`, naming the field."""
    if source == LINES:
        asked = {"input_name": input_name, "output_names": output_names}
        if output not in (None, LINES):
            raise _bad("output_format", "the output of JSONL is JSONL; upload .npy or Parquet")
        for field, value in asked.items():
            if value is not None:
                raise _bad(field, "the lines of JSONL name their own; it is for .npy and Parquet")
        return None
    if spec.decoupled:
        raise Unsupported(
            f"model {spec.name!r} answers more than once (decoupled): not offered", param="endpoint"
        )
    inputs = tuple(_row(spec, one) for one in spec.inputs)
    outputs = tuple(_row(spec, one) for one in spec.outputs)
    if source == NPY:
        inputs = (_one_input(spec.name, inputs, input_name),)
    elif input_name is not None:
        raise _bad("input_name", "is for .npy; the columns of Parquet have names")
    chosen = outputs if output_names is None else _chosen(spec.name, outputs, output_names)
    made = Order(
        source=source,
        output=output or source,
        inputs=inputs,
        outputs=chosen,
        named=output_names is not None,
        max_rows=spec.max_batch_size,
    )
    if made.output != LINES:
        _check_outputs(made)
    return made


def _row(spec: ModelSpec, tensor: TensorSpec) -> TensorSpec:
    shape = tensor.shape[1:] if spec.max_batch_size else tensor.shape
    return TensorSpec(tensor.name, tensor.datatype, shape, tensor.optional)


def _one_input(model: str, inputs: Sequence[TensorSpec], name: str | None) -> TensorSpec:
    known = _names(inputs)
    if name is not None and name not in {one.name for one in inputs}:
        raise _bad("input_name", f"model {model!r} has the inputs {known}")
    required = [one for one in inputs if not one.optional]
    candidates = [one for one in inputs if one.name == name] if name else required or list(inputs)
    if len(candidates) != 1 and not required:
        raise _bad("input_name", f"which of the inputs {known} is the array?")
    if len(candidates) != 1 or any(one not in candidates for one in required):
        raise _bad(
            "input_file_id",
            f"a .npy file is one input, and model {model!r} needs {_names(required)}; use Parquet",
        )
    return candidates[0]


def _chosen(
    model: str, outputs: Sequence[TensorSpec], names: Sequence[str]
) -> tuple[TensorSpec, ...]:
    by_name = {one.name: one for one in outputs}
    if len(set(names)) < len(names):
        raise _bad("output_names", "the same name twice")
    for name in names:
        if name not in by_name:
            raise _bad("output_names", f"model {model!r} has the outputs {_names(outputs)}")
    return tuple(by_name[name] for name in names)


def _check_outputs(made: Order) -> None:
    if made.output == NPY and len(made.outputs) != 1:
        raise _bad(
            "output_names",
            f"a .npy file holds one output: name one of {_names(made.outputs)}, or ask for "
            "output_format parquet or jsonl",
        )
    for one in made.outputs:
        if DATATYPES[one.datatype].dtype is None and (
            made.output == NPY or one.datatype != "BYTES"
        ):
            raise _bad(
                "output_format", f"{made.output} cannot hold output {one.name!r}: {one.datatype}"
            )


def _names(tensors: Sequence[TensorSpec]) -> str:
    return ", ".join(repr(one.name) for one in tensors)


def _bad(field: str, message: str) -> BadRequest:
    return BadRequest(f"{field}: {message}", param=field)


def fit(found: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """The shape that a row of shape `found` has for the model, which takes `wanted` (-1 is any
    size): its own, or, of a flat one, what its elements can be laid out in; None where it does not
    fit."""
    if len(found) == len(wanted) and all(
        want in (-1, have) for have, want in zip(found, wanted, strict=True)
    ):
        return tuple(found)
    if len(found) > 1:
        return None
    elements = math.prod(found)
    fixed = math.prod(size for size in wanted if size >= 0)
    match list(wanted).count(-1):
        case 0 if fixed == elements:
            return tuple(wanted)
        case 1 if fixed and elements % fixed == 0:
            return tuple(elements // fixed if size < 0 else size for size in wanted)
    return None
