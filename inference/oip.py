"""The Open Inference Protocol v2 over REST, as bytes in and bytes out; no web framework.

A body is JSON, then the raw tensors the JSON announces (`binary_data_size`), in its order and
without padding. `Inference-Header-Content-Length` says where the JSON ends; without it the body is
all JSON; 0 says that the body is the raw data of the model's one input. Bodies are inflated before
they are split: the header counts bytes of the uncompressed body.

Raw tensors are slices of the body, not copies.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import orjson

from errors import BadBody, BadRequest, BadTensor, TooLarge, Unsupported
from inference.metadata import ModelSpec, TensorSpec
from inference.tensors import (
    MAX_DIM,
    Buffer,
    InferRequest,
    InferResult,
    Parameter,
    Tensor,
    check_raw,
    check_shape,
    datatype,
    element_count,
    json_values,
    pack_bytes,
    pack_json,
)

HEADER_LENGTH: Final = "Inference-Header-Content-Length"


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """Which outputs the client wants in binary: a default, and what it said about single ones."""

    binary: bool = False
    overrides: Mapping[str, bool] = field(default_factory=dict)

    def is_binary(self, output: str) -> bool:
        return self.overrides.get(output, self.binary)


def header_length(text: str) -> int:
    """The value of `Inference-Header-Content-Length`. Raises BadBody."""
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise BadBody(f"{HEADER_LENGTH}: must be a number of bytes")
    return int(text)


def inflate(body: Buffer, encoding: str | None, limit: int) -> Buffer:
    """The body before its Content-Encoding (gzip, deflate, identity), at most `limit` bytes.

    Raises TooLarge as soon as more would come out, BadBody for a broken or cut stream,
    Unsupported for another encoding.
    """
    name = (encoding or "identity").strip().lower()
    if name in ("", "identity"):
        if len(body) > limit:
            raise _too_large(limit)
        return body
    if name in ("gzip", "x-gzip"):
        return _inflate(body, 16 + zlib.MAX_WBITS, name, limit)
    if name != "deflate":
        raise Unsupported(f"Content-Encoding {name!r}; supported are gzip, deflate and identity")
    try:
        return _inflate(body, zlib.MAX_WBITS, name, limit)
    except BadBody:
        # "deflate" means the zlib format; many clients send the raw stream inside it instead.
        return _inflate(body, -zlib.MAX_WBITS, name, limit)


def compress(body: bytes, encoding: str) -> bytes:
    """The body in a Content-Encoding: gzip, deflate (the zlib format) or identity.

    Raises Unsupported for another.
    """
    # Level 1: tensors hardly compress, and the gateway's CPU is what its throughput is made of.
    if encoding == "gzip":
        return gzip.compress(body, compresslevel=1, mtime=0)
    if encoding == "deflate":
        return zlib.compress(body, level=1)
    if encoding == "identity":
        return body
    raise Unsupported(f"Content-Encoding {encoding!r}; supported are gzip, deflate and identity")


def parse_infer(
    body: Buffer,
    header_length: int | None,
    *,
    model: str,
    version: str,
    spec: ModelSpec | None = None,
) -> tuple[InferRequest, ResponseFormat]:
    """An (inflated) infer body as a request, and how the client wants the answer.

    `header_length` is the value of `Inference-Header-Content-Length`, None where there is none.
    `spec` is needed for a raw body (length 0) only; whether the request fits the model is
    `metadata.check`'s question.

    Raises BadBody, BadTensor or Unsupported; the message names the tensor or the field.
    """
    if header_length == 0:
        return _parse_raw(body, model, version, spec), ResponseFormat(binary=True)
    end = len(body) if header_length is None else header_length
    if not 0 < end <= len(body):
        raise BadBody(f"{HEADER_LENGTH} is {end}; the body has {len(body)} bytes")
    return _parse_head(_load(memoryview(body)[:end]), _Raw(body, end), model, version)


def request_from_json(document: object, *, model: str, version: str) -> InferRequest:
    """An infer request that is already parsed JSON (a batch line's body, a job's input), all of
    whose tensors are in it. Raises as `parse_infer`."""
    return _parse_head(document, _Raw(b"", 0), model, version)[0]


def _parse_head(
    document: object, raw: _Raw, model: str, version: str
) -> tuple[InferRequest, ResponseFormat]:
    head = _Object(document, "the body")
    inputs = tuple(
        _parse_input(_Object(entry, f"inputs[{at}]"), raw)
        for at, entry in enumerate(head.array("inputs", required=True))
    )
    raw.finish()
    _refuse_duplicates("inputs", [tensor.name for tensor in inputs])
    outputs, overrides = _parse_outputs(head)
    parameters = head.object("parameters")
    binary = parameters.boolean("binary_data_output")
    request = InferRequest(
        model=model,
        version=version,
        inputs=inputs,
        outputs=outputs,
        parameters=_parse_parameters(parameters),
        id=head.text("id"),
    )
    return request, ResponseFormat(binary=bool(binary), overrides=overrides)


def render_infer(result: InferResult, fmt: ResponseFormat) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON; None where the body is all JSON.

    Non-finite numbers in JSON become null (see `tensors.unpack_json`). Raises Unsupported where
    an output has no JSON form and was not asked for in binary.
    """
    outputs, tail = [], []
    for tensor in result.outputs:
        entry = _entry(tensor)
        if fmt.is_binary(tensor.name):
            entry["parameters"] = {"binary_data_size": len(tensor.data)}
            tail.append(tensor.data)
        else:
            entry["data"] = json_values(tensor)
        outputs.append(entry)
    text = _answer(result, outputs)
    if not tail:
        return text, None
    return b"".join((text, *tail)), len(text)


def render_form(result: InferResult, data: bytes) -> bytes:
    """The body of an answer all of whose outputs are in JSON, with `data` in place of the values of
    each."""
    values = orjson.Fragment(data)
    return _answer(result, [_entry(tensor) | {"data": values} for tensor in result.outputs])


def _answer(result: InferResult, outputs: list[dict[str, Any]]) -> bytes:
    head: dict[str, Any] = {"id": result.id} if result.id else {}
    head |= {"model_name": result.model, "model_version": result.version}
    if result.parameters:
        head["parameters"] = dict(result.parameters)
    return orjson.dumps(head | {"outputs": outputs}, option=orjson.OPT_SERIALIZE_NUMPY)


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}


# Parsing


class _Object:
    """A JSON object with typed access; every refusal names the field by its path."""

    __slots__ = ("fields", "path")

    def __init__(self, fields: object, path: str):
        if not isinstance(fields, dict):
            raise BadBody(f"{path} must be a JSON object", param=path)
        self.fields: dict[str, Any] = fields
        self.path = path

    def text(self, name: str, *, required: bool = False) -> str:
        value = self.fields.get(name, None if required else "")
        if not isinstance(value, str) or (required and not value):
            raise self.wrong(name, "a string")
        return value

    def boolean(self, name: str) -> bool | None:
        value = self.fields.get(name)
        if name in self.fields and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def integer(self, name: str) -> int | None:
        value = self.fields.get(name)
        if name in self.fields and (type(value) is not int or value < 0):
            raise self.wrong(name, "an integer from 0")
        return value

    def array(self, name: str, *, required: bool = False) -> list[Any]:
        value = self.fields.get(name, None if required else [])
        if not isinstance(value, list):
            raise self.wrong(name, "an array")
        return value

    def object(self, name: str) -> _Object:
        return _Object(self.fields.get(name, {}), f"{self.path}: {name}")

    def wrong(self, name: str, kind: str) -> BadBody:
        return BadBody(f"{self.path}: {name} must be {kind}", param=name)


class _Raw:
    """The binary part of a body, taken tensor by tensor."""

    __slots__ = ("_at", "_view")

    def __init__(self, body: Buffer, at: int):
        self._view = memoryview(body)
        self._at = at

    def take(self, size: int, tensor: str) -> memoryview:
        end = self._at + size
        if end > len(self._view):
            raise BadTensor(
                f"tensor {tensor!r}: binary_data_size is {size}; "
                f"the body has {len(self._view) - self._at} bytes left",
                param=tensor,
            )
        data, self._at = self._view[self._at : end], end
        return data

    def finish(self) -> None:
        if left := len(self._view) - self._at:
            raise BadBody(f"the body has {left} bytes that belong to no input")


def _load(text: memoryview) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadBody(f"the body is not JSON: {error}") from error


def _parse_input(entry: _Object, raw: _Raw) -> Tensor:
    name = entry.text("name", required=True)
    kind = entry.text("datatype", required=True)
    datatype(kind, tensor=name)
    if "shape" not in entry.fields:
        raise BadTensor(f"tensor {name!r}: shape is missing", param=name)
    shape = check_shape(entry.fields["shape"], tensor=name)
    parameters = entry.object("parameters")
    _refuse_shared_memory(parameters, name)
    size = parameters.integer("binary_data_size")
    if (size is None) != ("data" in entry.fields):
        raise BadTensor(
            f"tensor {name!r}: give either data or the parameter binary_data_size", param=name
        )
    if size is None:
        return Tensor(name, kind, shape, pack_json(kind, shape, entry.fields["data"], tensor=name))
    tensor = Tensor(name, kind, shape, raw.take(size, name))
    check_raw(tensor)
    return tensor


def _parse_outputs(head: _Object) -> tuple[tuple[str, ...], dict[str, bool]]:
    names: list[str] = []
    overrides: dict[str, bool] = {}
    for at, fields in enumerate(head.array("outputs")):
        entry = _Object(fields, f"outputs[{at}]")
        name = entry.text("name", required=True)
        parameters = entry.object("parameters")
        _refuse_shared_memory(parameters, name)
        if parameters.integer("classification"):
            raise Unsupported(
                f"output {name!r}: classification is not supported; ask for the plain output",
                param=name,
            )
        binary = parameters.boolean("binary_data")
        if binary is not None:
            overrides[name] = binary
        names.append(name)
    _refuse_duplicates("outputs", names)
    return tuple(names), overrides


def _is_whole(value: object) -> bool:
    return type(value) is int and value >= 0


_RESERVED: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "priority": (_is_whole, "an integer from 0"),
    "timeout": (_is_whole, "an integer from 0: microseconds"),
    "sequence_id": (lambda value: _is_whole(value) or type(value) is str, "an integer or a string"),
    "sequence_start": (lambda value: type(value) is bool, "true or false"),
    "sequence_end": (lambda value: type(value) is bool, "true or false"),
}


def _parse_parameters(given: _Object) -> dict[str, Parameter]:
    """What goes on to the model: all but what only said how to answer."""
    parameters: dict[str, Parameter] = {}
    for name, value in given.fields.items():
        if name == "binary_data_output":
            continue
        if name.startswith("triton_"):
            raise BadBody(f"parameter {name!r}: names in triton_ are reserved", param=name)
        if not isinstance(value, bool | int | float | str):
            raise given.wrong(name, "a number, a string, true or false")
        is_valid, kind = _RESERVED.get(name, (None, ""))
        if is_valid is not None and not is_valid(value):
            raise given.wrong(name, kind)
        parameters[name] = value
    return parameters


def _refuse_shared_memory(parameters: _Object, name: str) -> None:
    if any(key.startswith("shared_memory_") for key in parameters.fields):
        raise Unsupported(
            f"tensor {name!r}: shared memory is not offered; send the data in the body", param=name
        )


def _refuse_duplicates(where: str, names: list[str]) -> None:
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise BadTensor(f"tensor {twice!r} is in {where} more than once", param=twice)


# A raw body


def _parse_raw(body: Buffer, model: str, version: str, spec: ModelSpec | None) -> InferRequest:
    """Length 0: the body is the one input of the model, as a batch of one."""
    if spec is None or len(spec.inputs) != 1:
        raise BadBody(
            f"{HEADER_LENGTH} is 0: a body without JSON is for models with exactly one input"
        )
    (wanted,) = spec.inputs
    shape = (1, *wanted.shape[1:]) if spec.max_batch_size else wanted.shape
    data = memoryview(body)
    if wanted.datatype == "BYTES":
        # The whole body is the one element; its length is what the body does not say.
        data, count = memoryview(pack_bytes([bytes(body)])), 1
    else:
        item = datatype(wanted.datatype, tensor=wanted.name).item_size
        count = len(body) // item
    tensor = Tensor(wanted.name, wanted.datatype, _deduce_shape(shape, count, wanted), data)
    check_raw(tensor)
    return InferRequest(model=model, version=version, inputs=(tensor,))


def _deduce_shape(shape: tuple[int, ...], count: int, wanted: TensorSpec) -> tuple[int, ...]:
    """Fill in the one variable dimension so that the shape has `count` elements."""
    variable = [at for at, dim in enumerate(shape) if dim < 0]
    if not variable:
        return shape
    known = element_count([dim for dim in shape if dim >= 0])
    if len(variable) > 1 or not known or count % known or count // known > MAX_DIM:
        raise BadTensor(
            f"tensor {wanted.name!r}: its shape {list(wanted.shape)} cannot be told from the "
            f"{count} elements of a raw body",
            param=wanted.name,
        )
    (at,) = variable
    return (*shape[:at], count // known, *shape[at + 1 :])


# Compression


def _inflate(body: Buffer, wbits: int, name: str, limit: int) -> bytes:
    parts: list[bytes] = []
    total, rest = 0, body
    while True:
        stream = zlib.decompressobj(wbits)
        try:
            # One byte over the limit is asked for, never more: that byte is the proof.
            part = stream.decompress(rest, limit - total + 1)
        except zlib.error as error:
            raise BadBody(f"the body is not {name}: {error}") from error
        total += len(part)
        if total > limit:
            raise _too_large(limit)
        parts.append(part)
        if not stream.eof:
            raise BadBody(f"the body is {name} that ends too early")
        rest = stream.unused_data
        if not rest:
            return b"".join(parts)
        if wbits <= zlib.MAX_WBITS:
            raise BadBody(f"the body has bytes after its {name} stream")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"the body has more than {limit} bytes")


def take_timeout(asked: InferRequest) -> tuple[InferRequest, float | None]:
    """OIP's own `timeout`, in microseconds, is the request's deadline: what is left of it goes
    with the request all the way, so the model needs no second one. Seconds; None: not given.
    Raises `BadRequest`."""
    given = asked.parameters.get("timeout", 0)
    if "timeout" not in asked.parameters:
        return asked, None
    rest = {name: value for name, value in asked.parameters.items() if name != "timeout"}
    if not isinstance(given, int):
        raise BadRequest("timeout: must be microseconds", param="timeout")
    return replace(asked, parameters=rest), given / 1e6 or None
