"""One binary codec for requests and outcomes at rest: in Redis, in Postgres, in the object store.

    magic "TGF1" | u32 header length, little endian | header, JSON | raw tensors, back to back

The header lists the tensors in the order of their bytes, so that decoding takes no copy: the
tensors are slices of the frame. A frame has exactly the bytes its header says.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import orjson

from errors import BadBody, TidegateError, from_wire
from inference.tensors import (
    DATATYPES,
    Buffer,
    InferRequest,
    InferResult,
    Outcome,
    Parameter,
    Tensor,
)

MAGIC: Final = b"TGF1"
_PREFIX: Final = struct.Struct("<4sI")


def encode_requests(requests: Sequence[InferRequest]) -> bytes:
    """Requests as one frame."""
    header = [
        {
            "model": request.model,
            "version": request.version,
            "tensors": _describe(request.inputs),
            "outputs": request.outputs,
            "parameters": dict(request.parameters),
            "id": request.id,
        }
        for request in requests
    ]
    return _frame(header, (tensor for request in requests for tensor in request.inputs))


def decode_requests(frame: Buffer) -> list[InferRequest]:
    """The requests of a frame; their tensors are slices of it. Raises BadBody if it is corrupt."""
    reader = _Reader(frame)
    requests = [
        InferRequest(
            model=entry.text("model"),
            version=entry.text("version"),
            inputs=reader.tensors(entry),
            outputs=entry.texts("outputs"),
            parameters=entry.parameters(),
            id=entry.text("id"),
        )
        for entry in reader.entries
    ]
    reader.finish()
    return requests


def encode_outcomes(outcomes: Sequence[Outcome | None]) -> bytes:
    """Results and errors, in their order, as one frame. None: it comes in another one."""
    header = [
        {"pending": True}
        if outcome is None
        else {"error": outcome.to_wire()}
        if isinstance(outcome, TidegateError)
        else {
            "model": outcome.model,
            "version": outcome.version,
            "tensors": _describe(outcome.outputs),
            "parameters": dict(outcome.parameters),
            "id": outcome.id,
        }
        for outcome in outcomes
    ]
    results = (outcome for outcome in outcomes if isinstance(outcome, InferResult))
    return _frame(header, (tensor for result in results for tensor in result.outputs))


def decode_outcomes(frame: Buffer) -> list[Outcome]:
    """The outcomes of a frame that holds them all; tensors are slices of it. Raises BadBody if it
    is corrupt."""
    part = decode_part(frame)
    outcomes = [outcome for outcome in part if outcome is not None]
    if len(outcomes) != len(part):
        raise _corrupt("an outcome is missing")
    return outcomes


def decode_part(frame: Buffer) -> list[Outcome | None]:
    """The outcomes of a frame, None for those that come in another one; tensors are slices of it.
    Raises BadBody if it is corrupt."""
    reader = _Reader(frame)
    outcomes: list[Outcome | None] = []
    for entry in reader.entries:
        if "pending" in entry.fields:
            outcomes.append(None)
            continue
        if "error" in entry.fields:
            outcomes.append(entry.error())
            continue
        outcomes.append(
            InferResult(
                model=entry.text("model"),
                version=entry.text("version"),
                outputs=reader.tensors(entry),
                parameters=entry.parameters(),
                id=entry.text("id"),
            )
        )
    reader.finish()
    return outcomes


def _describe(tensors: Iterable[Tensor]) -> list[tuple[str, str, tuple[int, ...], int]]:
    return [(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in tensors]


def _frame(header: list[dict[str, Any]], tensors: Iterable[Tensor]) -> bytes:
    text = orjson.dumps(header)
    prefix = _PREFIX.pack(MAGIC, len(text))
    return b"".join((prefix, text, *(tensor.data for tensor in tensors)))


class _Entry:
    """One object of the header, read with suspicion: a frame may come from anywhere."""

    __slots__ = ("fields",)

    def __init__(self, fields: object):
        if not isinstance(fields, dict):
            raise _corrupt("an entry is not an object")
        self.fields: dict[str, Any] = fields

    def text(self, name: str) -> str:
        value = self.fields.get(name)
        if not isinstance(value, str):
            raise _corrupt(f"{name} is not a string")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        values = self.fields.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise _corrupt(f"{name} is not an array of strings")
        return tuple(values)

    def parameters(self) -> Mapping[str, Parameter]:
        values = self.fields.get("parameters")
        if not isinstance(values, dict) or not all(
            isinstance(value, bool | int | float | str) for value in values.values()
        ):
            raise _corrupt("parameters is not an object of scalars")
        return values

    def error(self) -> TidegateError:
        wire = self.fields["error"]
        if not isinstance(wire, dict) or not (
            isinstance(wire.get("message"), str)
            and isinstance(wire.get("code"), str)
            and isinstance(wire.get("param"), str | None)
            and isinstance(wire.get("retry_after"), int | float | None)
        ):
            raise _corrupt("error is not one of ours")
        return from_wire(wire)


class _Reader:
    """Walks a frame: entries from the header, and for each the next bytes of the payload."""

    __slots__ = ("_at", "_view", "entries")

    def __init__(self, frame: Buffer):
        self._view = memoryview(frame)
        if len(self._view) < _PREFIX.size:
            raise _corrupt("shorter than its prefix")
        magic, length = _PREFIX.unpack_from(self._view)
        self._at = _PREFIX.size + length
        if magic != MAGIC:
            raise _corrupt("not a frame of this version")
        if self._at > len(self._view):
            raise _corrupt("cut within its header")
        try:
            header = orjson.loads(self._view[_PREFIX.size : self._at])
        except orjson.JSONDecodeError as error:
            raise _corrupt("the header is not JSON") from error
        if not isinstance(header, list):
            raise _corrupt("the header is not an array")
        self.entries = [_Entry(fields) for fields in header]

    def tensors(self, entry: _Entry) -> tuple[Tensor, ...]:
        rows = entry.fields.get("tensors")
        if not isinstance(rows, list):
            raise _corrupt("tensors is not an array")
        return tuple(self._tensor(row) for row in rows)

    def _tensor(self, row: object) -> Tensor:
        match row:
            case [str(name), str(datatype), list(shape), int(size)]:
                pass
            case _:
                raise _corrupt("a tensor is not [name, datatype, shape, size]")
        if datatype not in DATATYPES:
            raise _corrupt("a tensor has an unknown datatype")
        if not all(type(dim) is int and dim >= 0 for dim in shape):
            raise _corrupt("a shape has something else than sizes")
        end = self._at + size
        if size < 0 or end > len(self._view):
            raise _corrupt("cut within its tensors")
        data, self._at = self._view[self._at : end], end
        return Tensor(name, datatype, tuple(shape), data)

    def finish(self) -> None:
        if self._at != len(self._view):
            raise _corrupt("longer than its tensors")


def _corrupt(message: str) -> BadBody:
    return BadBody(f"corrupt frame: {message}")
