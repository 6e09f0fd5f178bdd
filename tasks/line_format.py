"""Files of lines, as a format of batches: `batch_lines` says what a line is."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import orjson

from errors import BadTensor, ModelFailed, TidegateError
from inference import oip, packing
from inference.metadata import ModelSpec, check
from inference.tensors import InferRequest, InferResult, Tensor, json_values
from storage import objects
from storage.objects import ObjectStore
from storage.work import ChunkOutput, ChunkPlan, Claim
from tasks.batch_lines import (
    BadLine,
    Line,
    error_line,
    failed_line,
    output_line,
    parse_line,
    peek_custom_id,
    request_id,
    response_line,
)
from tasks.formats import Limits, Member, Output, Pack, Planned, Range, Refused, Source
from tasks.line_pattern import Alike, Bundle
from tasks.line_plan import plan_file

ASK_EVERY = 16
"""Lines between two looks at whether enough of a range has been read."""


class Lines:
    """`Format` of these files."""

    suffix = "jsonl"

    def plan(self, source: Source, limits: Limits) -> Planned:
        return Planned(
            plan_file(lambda: objects.lines(source.blocks(), limits.max_line_bytes), limits)
        )

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
        stops = False
        for done, (number, offset, text) in enumerate(_lines(source, claim, limits)):
            if stops:
                yield from reader.rest()
                later = tuple(one for one in claim.duplicates if one >= number)
                yield ChunkPlan(claim.items - done, number, offset, claim.byte_end, later)
                return
            found = reader.add(number, text)
            if found is not None:
                yield from found
            stops = (done + 1) % ASK_EVERY == 0 and enough()
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

    def add(self, number: int, text: bytes) -> Iterable[Pack | Refused] | None:
        """One line more; what is full with it, or refused."""
        if number not in self._duplicates:
            taken = self._alike.take(number, text)
            if taken is True:
                return None
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
    text = response_line(_MARK.decode(), orjson.Fragment(_MARK), 200, orjson.Fragment(body))
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
