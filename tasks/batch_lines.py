"""The OpenAI batch file format with OIP requests in it. Pure.

Input line   {"custom_id", "method": "POST", "url": "/v2/models/m/infer", "body": {OIP request}}
Output line  {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}
Error line   the same with "response": null and "error": {"code", "message", "line"}, or with the
             status and body the model answered with
"""

from __future__ import annotations

import itertools
import re
import secrets
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from errors import BadRequest, BadTensor, ModelFailed, TidegateError
from inference import oip, packing
from inference.metadata import ModelSpec, check
from inference.tensors import InferRequest, InferResult, Tensor, json_values
from storage import objects
from storage.objects import ObjectStore
from storage.work import ChunkOutput, ChunkPlan, Claim
from tasks.formats import (
    FileErrors,
    Limits,
    Member,
    Output,
    Pack,
    Planned,
    Range,
    Refused,
    Source,
)
from tasks.line_pattern import Alike, Bundle

ENDPOINT = re.compile(r"/v2/models/([A-Za-z0-9._-]+)(?:/versions/([0-9]{1,18}))?/infer")
MAX_CUSTOM_ID = 512
ASK_EVERY = 16
"""Lines between two looks at whether enough of a range has been read."""


class BadLine(BadRequest):
    """A line that can't be run."""

    code = "invalid_line"

    def __init__(self, reason: str, message: str, custom_id: str | None = None):
        super().__init__(message)
        self.reason = reason
        self.custom_id = custom_id


@dataclass(frozen=True, slots=True)
class Line:
    """A line that can be run."""

    number: int
    custom_id: str
    request: InferRequest


def parse_endpoint(endpoint: str) -> tuple[str, str]:
    """(model, version) of an infer URL; version "" is the latest. Raises `BadRequest`."""
    match = ENDPOINT.fullmatch(endpoint)
    if not match:
        raise BadRequest(
            "endpoint: must read /v2/models/{model}/infer or /v2/models/{model}/versions/{n}/infer",
            param="endpoint",
        )
    return match[1], match[2] or ""


def parse_line(text: bytes, number: int, endpoint: str, max_bytes: int) -> Line:
    """One input line as a request. Raises `BadLine`, with the custom_id where one can be read."""
    if len(text) > max_bytes:
        raise BadLine("line_too_long", f"the line is longer than {max_bytes} bytes")
    document = _document(text)
    custom_id = _custom_id(document)
    if document.get("method") != "POST":
        raise BadLine("invalid_method", 'method: must be "POST"', custom_id)
    if document.get("url") != endpoint:
        raise BadLine("invalid_url", f"url: must be the batch's endpoint, {endpoint}", custom_id)
    model, version = parse_endpoint(endpoint)
    try:
        request = oip.request_from_json(document.get("body"), model=model, version=version)
        # The time of a line is the batch's window: at Triton a limit of its own would have the line
        # given back, again and again.
        request, _ = oip.take_timeout(request)
    except TidegateError as error:
        raise BadLine(error.code, error.message, custom_id) from error
    return Line(number, custom_id, request)


def _document(text: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadLine("invalid_json", f"the line is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadLine("invalid_json", "the line is not a JSON object")
    return document


def _custom_id(document: dict[str, Any]) -> str:
    custom_id = document.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise BadLine(
            "invalid_custom_id", f"custom_id: must be a string of 1 to {MAX_CUSTOM_ID} characters"
        )
    return custom_id


def peek_custom_id(text: bytes) -> str | None:
    """The line's custom_id, whatever else is wrong with it."""
    try:
        return _custom_id(_document(text))
    except BadLine:
        return None


def output_line(request_id: str, custom_id: str, result: InferResult) -> bytes:
    """A line of the output file."""
    return _response(
        request_id,
        custom_id,
        200,
        orjson.Fragment(oip.render_infer(result, oip.ResponseFormat())[0]),
    )


def failed_line(request_id: str, custom_id: str | None, status: int, error: TidegateError) -> bytes:
    """A line of the error file: the model, or the protocol, said no."""
    return _response(request_id, custom_id, status, {"error": error.message})


def _response(request_id: str, custom_id: Any, status: int, body: Any) -> bytes:
    return orjson.dumps(
        {
            "id": request_id,
            "custom_id": custom_id,
            "response": {"status_code": status, "request_id": request_id, "body": body},
            "error": None,
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def error_line(
    request_id: str, custom_id: str | None, number: int, code: str, message: str
) -> bytes:
    """A line of the error file: it was never run."""
    return orjson.dumps(
        {
            "id": request_id,
            "custom_id": custom_id,
            "response": None,
            "error": {"code": code, "message": message, "line": number},
        },
        option=orjson.OPT_APPEND_NEWLINE,
    )


def plan_file(lines: Iterable[tuple[int, bytes]], limits: Limits) -> list[ChunkPlan]:
    """Cut a file into chunks in one pass. `lines` are (offset, line) pairs; blank lines are passed
    over. A line that is wrong is left to its chunk, which puts it in the error file; what is
    noticed here is what only a view of the whole file shows. Raises `FileErrors`."""
    plans: list[ChunkPlan] = []
    seen: set[int] = set()
    good = total = number = 0
    first_error: dict[str, Any] | None = None
    chunk = _Chunk()
    for offset, text in lines:
        number += 1
        if chunk.full(offset, limits):
            plans.append(chunk.cut(offset))
            chunk = _Chunk()
        if not text.strip():
            continue
        if chunk.items == 0:
            chunk.start, chunk.first_line = offset, number
        chunk.items += 1
        chunk.end = offset + len(text)
        total += 1
        if total > limits.max_lines:
            raise FileErrors(
                [_file_error("too_many_lines", number, f"over {limits.max_lines} lines")]
            )
        try:
            custom_id = _custom_id(_document(text)) if len(text) <= limits.max_line_bytes else None
        except BadLine as error:
            first_error = first_error or _file_error(error.reason, number, error.message)
            if error.reason == "invalid_json":
                continue
            custom_id = None
        good += 1
        if custom_id is not None:
            # 64 bits of hash instead of the text: 10^6 lines collide with odds of 3 in 10^8.
            mark = hash(custom_id)
            if mark in seen:
                chunk.duplicates.append(number)
            seen.add(mark)
    if chunk.items:
        plans.append(chunk.cut(chunk.end))
    if not plans:
        raise FileErrors([_file_error("empty_file", None, "the file has no lines")])
    if not good:
        raise FileErrors([first_error or _file_error("invalid_json", 1, "no line is JSON")])
    return plans


def _file_error(code: str, line: int | None, message: str) -> dict[str, Any]:
    return {"code": code, "line": line, "message": message, "param": None}


@dataclass(slots=True)
class _Chunk:
    items: int = 0
    first_line: int = 0
    start: int = 0
    end: int = 0
    duplicates: list[int] = field(default_factory=list)

    def full(self, offset: int, limits: Limits) -> bool:
        return self.items >= limits.chunk_items or (
            self.items > 0 and offset - self.start >= limits.chunk_bytes
        )

    def cut(self, end: int) -> ChunkPlan:
        return ChunkPlan(self.items, self.first_line, self.start, end, tuple(self.duplicates))


class Lines:
    """`Format` of these files."""

    suffix = "jsonl"

    def plan(self, source: Source, limits: Limits) -> Planned:
        found = objects.lines(source.blocks(), limits.max_line_bytes)
        return Planned(plan_file(found, limits))

    def pieces(
        self, source: Source, whole: ChunkPlan, each: int, limits: Limits
    ) -> list[ChunkPlan]:
        lines = [(number, offset) for number, offset, _ in _lines(source, whole, limits)]
        plans: list[ChunkPlan] = []
        for at in range(0, len(lines), each):
            piece = lines[at : at + each]
            numbers = [number for number, _ in piece]
            end = lines[at + each][1] if at + each < len(lines) else whole.byte_end
            duplicates = tuple(sorted(set(numbers).intersection(whole.duplicates)))
            plans.append(ChunkPlan(len(piece), numbers[0], piece[0][1], end, duplicates))
        return plans

    def read(
        self,
        source: Source,
        claim: Claim,
        spec: ModelSpec,
        limits: Limits,
        enough: Callable[[], bool],
    ) -> Iterator[Pack | Refused | ChunkPlan]:
        reader = _Reader(claim, spec, limits)
        left, stops = claim.items, False
        for number, offset, text in _lines(source, claim, limits):
            if stops:
                yield from reader.rest()
                later = tuple(one for one in claim.duplicates if one >= number)
                yield ChunkPlan(left, number, offset, claim.byte_end, later)
                return
            left -= 1
            yield from reader.add(number, text)
            stops = left % ASK_EVERY == 0 and enough()
        yield from reader.rest()

    def undone(
        self, source: Source, part: Range, limits: Limits, code: str, message: str
    ) -> Iterator[Refused]:
        for number, _, text in _lines(source, part, limits):
            yield Refused(number, peek_custom_id(text), code, message)

    def writer(self, claim: Claim, spec: ModelSpec) -> LineWriter:
        return LineWriter(claim)

    def output(self, source: Source, parts: Sequence[ChunkOutput], objects: ObjectStore) -> Output:
        return Output(joined(parts, objects))

    def refused_line(self, claim: Claim, item: Refused) -> bytes:
        named = request_id(claim, item.number)
        return error_line(named, item.custom_id, item.number, item.code, item.message)

    def failed_line(self, claim: Claim, member: Member, error: TidegateError) -> bytes:
        status = 500 if isinstance(error, ModelFailed) else 400
        return failed_line(request_id(claim, member.number), member.custom_id, status, error)


def joined(parts: Sequence[ChunkOutput], store: ObjectStore) -> Iterator[bytes]:
    """The lines of the parts, one behind the other."""
    for part in parts:
        if part.output_key:
            yield from objects.steadily(store, part.output_key)


def request_id(claim: Claim, number: int) -> str:
    """The same for every attempt: a client may tell by it that two files hold one answer."""
    return f"batch_req_{claim.job_id.hex}_{number}"


def _lines(source: Source, items: Range, limits: Limits) -> Iterator[tuple[int, int, bytes]]:
    """(line number, offset in the file, line) of a range, blank lines left out."""
    start = items.byte_start
    found = objects.lines(source.blocks(start, items.byte_end), limits.max_line_bytes)
    for number, (offset, text) in enumerate(found, start=items.first_line):
        if text.strip():
            yield number, start + offset, text


def _runnable(text: bytes, number: int, claim: Claim, spec: ModelSpec, limits: Limits) -> Line:
    """The line, which the model would take. Raises `BadLine`."""
    line = parse_line(text, number, claim.endpoint, limits.max_line_bytes)
    if number in claim.duplicates:
        raise BadLine(
            "duplicate_custom_id", "custom_id: an earlier line has the same", line.custom_id
        )
    try:
        check(line.request, spec)
    except BadTensor as error:
        raise BadLine(error.code, error.message, line.custom_id) from error
    return line


class _Reader:
    """Makes packs of one range's lines: of those that are alike by their pattern, of the others one
    by one."""

    def __init__(self, claim: Claim, spec: ModelSpec, limits: Limits):
        self._claim = claim
        self._spec = spec
        self._limits = limits
        self._alike = Alike(spec.max_batch_size, limits.pack_bytes, limits.max_line_bytes)
        self._packer = _Packer(spec.max_batch_size, limits.pack_bytes)
        self._duplicates = frozenset(claim.duplicates)

    def add(self, number: int, text: bytes) -> Iterable[Pack | Refused]:
        """One line more; what is full with it, or refused."""
        if number not in self._duplicates:
            taken = self._alike.take(number, text)
            if taken is True:
                return ()
            if taken is not False:
                return self._bundled(taken)
        return self._read(number, text)

    def rest(self) -> Iterator[Pack | Refused]:
        for bundle in self._alike.rest():
            yield from self._bundled(bundle)
        yield from self._packer.rest()

    def _bundled(self, bundle: Bundle) -> Iterable[Pack | Refused]:
        pack = bundle.pack()
        if pack is not None:
            return (pack,)
        return itertools.chain.from_iterable(itertools.starmap(self._read, bundle.lines))

    def _read(self, number: int, text: bytes) -> Iterator[Pack | Refused]:
        try:
            line = _runnable(text, number, self._claim, self._spec, self._limits)
        except BadLine as bad:
            yield Refused(number, bad.custom_id, bad.reason, bad.message)
        else:
            self._alike.learn(text, line.request)
            yield from self._packer.add(line)


class _Packer:
    """Gathers lines of one signature in one request each."""

    def __init__(self, max_rows: int, max_bytes: int):
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._open: dict[Hashable, _Gathered] = {}

    def add(self, line: Line) -> Iterator[Pack]:
        """One line more; the packs that are full with it."""
        request = line.request
        rows = packing.rows_of(request) if self._max_rows > 1 else None
        member = Member(line.number, line.custom_id, rows or 1, request.id)
        if rows is None:
            yield Pack(request, (member,), member.rows)
            return
        size = sum(len(tensor.data) for tensor in request.inputs)
        key = packing.signature(request)
        group = self._open.get(key)
        if group is not None and (
            group.rows + rows > self._max_rows or group.size + size > self._max_bytes
        ):
            yield group.pack()
            group = None
        if group is None:
            group = self._open[key] = _Gathered()
        group.requests.append(request)
        group.members.append(member)
        group.rows += rows
        group.size += size
        if group.rows >= self._max_rows:
            yield self._open.pop(key).pack()

    def rest(self) -> Iterator[Pack]:
        for group in self._open.values():
            yield group.pack()


@dataclass(slots=True)
class _Gathered:
    requests: list[InferRequest] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    rows: int = 0
    size: int = 0

    def pack(self) -> Pack:
        return Pack(packing.merge(self.requests), tuple(self.members), self.rows)


class LineWriter:
    """`Writer` of output lines."""

    def __init__(self, claim: Claim):
        self._claim = claim
        self._lines: list[tuple[int, bytes]] = []

    def answered(self, pack: Pack, result: InferResult) -> Sequence[tuple[Member, TidegateError]]:
        texts = self._together(pack, result) if len(pack.members) > 1 else None
        if texts is not None:
            self._lines += zip((member.number for member in pack.members), texts, strict=True)
            return ()
        refused: list[tuple[Member, TidegateError]] = []
        for member, share in zip(pack.members, pack.shares(result), strict=True):
            try:
                self._lines.append((member.number, self._line(member, share)))
            except TidegateError as error:
                refused.append((member, error))
        return refused

    def _line(self, member: Member, share: InferResult) -> bytes:
        return output_line(request_id(self._claim, member.number), member.custom_id or "", share)

    def _together(self, pack: Pack, result: InferResult) -> list[bytes] | None:
        """The lines of a pack, where they differ in their numbers and custom_ids only: the first
        one's text, with others' in their places. None where they differ in more."""
        first = pack.members[0]
        rows, name = first.rows, first.request_id
        if any(one.rows != rows or one.request_id != name for one in pack.members):
            return None
        columns = []
        for tensor in result.outputs:
            column = _columns(tensor, len(pack.members))
            if column is None:
                return None
            columns.append(column)
        names = [request_id(self._claim, member.number).encode() for member in pack.members]
        custom_ids = [orjson.dumps(member.custom_id) for member in pack.members]
        form = _form(result, rows, name)
        return [form % values for values in zip(names, custom_ids, names, *columns, strict=True)]

    def missing(self, member: Member) -> None:
        """Its line is in the error file."""

    def close(self) -> Sequence[bytes]:
        self._lines.sort()
        return [b"".join(text for _, text in self._lines)] if self._lines else []


_MARK = secrets.token_hex(16).encode()
"""What nobody writes."""


def _form(result: InferResult, rows: int, name: str) -> bytes:
    """The text of an output line, for bytes to be formatted into: the request's id, the custom_id,
    the request's id again, each output's values."""
    outputs = tuple(replace(one, shape=(rows, *one.shape[1:])) for one in result.outputs)
    body = oip.render_form(replace(result, id=name, outputs=outputs), b"[" + _MARK + b"]")
    text = _response(_MARK.decode(), orjson.Fragment(_MARK), 200, orjson.Fragment(body))
    return text.replace(b"%", b"%%").replace(_MARK, b"%b")


def _columns(tensor: Tensor, count: int) -> list[bytes] | None:
    """An output's values as JSON, for each of so many lines. None where they are no numbers."""
    if tensor.datatype == "BYTES":
        return None
    try:
        values = json_values(tensor)
    except TidegateError:
        return None
    if isinstance(values, list) or not values.size:
        return None
    rows = values.reshape(count, -1)
    return orjson.dumps(rows, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].split(b"],[")
