"""Files of arrays, read in: cut into ranges of rows, and ranges as packs for the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, overload

import pyarrow as pa

from errors import BadFile, BadRequest, BadTensor, TidegateError, Unsupported
from inference import columns, npy, parquet
from inference.metadata import ModelSpec, TensorSpec, check
from inference.tensors import Buffer, InferRequest, Tensor
from storage.work import ChunkPlan, Claim
from tasks.array_order import Order, fit
from tasks.formats import FileErrors, Limits, Member, Pack, Planned, Range, Refused, Source

RANGE_ROWS: Final = 16_384
"""Most rows of a range: what claiming and committing it costs is little next to running them. An
attempt for which they are too many leaves the rest."""
BLOCK_ROWS: Final = 256
"""Rows of Parquet that are staged together, if four requests don't take more: an attempt stops
between two blocks only."""
MAX_ROWS: Final = 100_000_000
"""Of a file."""
MOST_DECODED: Final = 16 << 30
"""Bytes of a Parquet file's rows, decoded: what they take of the object store meanwhile."""
CUSTOM_ID: Final = "custom_id"


class Members(Sequence[Member]):
    """Rows that lie together, each a `Member` only when it is looked at."""

    __slots__ = ("_count", "_first", "_ids")

    def __init__(self, first: int, count: int, ids: pa.Array | None = None):
        """`ids`: the custom_id of each."""
        self._first, self._count, self._ids = first, count, ids

    def __len__(self) -> int:
        return self._count

    def part(self, first: int, end: int) -> Members:
        ids = self._ids.slice(first) if self._ids is not None else None
        return Members(self._first + first, end - first, ids)

    @overload
    def __getitem__(self, at: int) -> Member: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Member]: ...
    def __getitem__(self, at: int | slice) -> Member | Sequence[Member]:
        if isinstance(at, slice):
            return [self[n] for n in range(*at.indices(self._count))]
        if not 0 <= at < self._count:
            raise IndexError(at)
        told = self._ids[at].as_py() if self._ids is not None else None
        # A row without a name is called by its number.
        return Member(self._first + at, told or str(self._first + at))


def rejected(error: TidegateError) -> FileErrors:
    """The whole file is no good."""
    code = error.code if isinstance(error, BadRequest) else "invalid_file"
    told = {"code": code, "line": None, "message": error.message, "param": "input_file_id"}
    return FileErrors([told])


def check_rows(rows: int) -> None:
    if rows > MAX_ROWS:
        told = f"the file has {rows} rows, more than {MAX_ROWS}"
        raise FileErrors([{"code": "too_many_rows", "line": None, "message": told, "param": None}])
    if not rows:
        told = "the file has no rows"
        raise FileErrors([{"code": "empty_file", "line": None, "message": told, "param": None}])


@dataclass(frozen=True, slots=True)
class Column:
    """Rows of one input that have one shape."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    """Of a row, as the model takes it."""
    raw: Callable[[int, int], Buffer]
    """The bytes of rows `[first, end)`."""
    size: int
    """Bytes of all."""


def packs(
    order: Order,
    claim: Claim,
    given: Sequence[Column],
    members: Members,
    spec: ModelSpec,
    limits: Limits,
) -> Iterator[Pack | Refused]:
    """Rows as requests that the model takes. Those it would not take are refused: it is not the
    model any more that the batch was made for."""
    rows = len(members)
    outputs = tuple(one.name for one in order.outputs) if order.named else ()
    row_bytes = max(1, sum(column.size for column in given) // rows)
    each = max(1, min(spec.max_batch_size, limits.pack_bytes // row_bytes))
    texts = any(one.datatype == "BYTES" for one in given)
    fitting = 0
    for first in range(0, rows, each):
        end = min(first + each, rows)
        batch = (end - first,) if spec.max_batch_size else ()
        request = InferRequest(
            claim.model,
            claim.version,
            tuple(
                Tensor(one.name, one.datatype, (*batch, *one.shape), one.raw(first, end))
                for one in given
            ),
            outputs,
        )
        here = members.part(first, end)
        try:
            # Numbers of as many rows as the last ones fit as those did.
            if texts or end - first != fitting:
                check(request, spec)
        except TidegateError as error:
            yield Refused(here[0].number, None, error.code, error.message, len(here))
        else:
            fitting = end - first
            yield Pack(request, here, len(here))


class Inputs(Protocol):
    """One kind of input file."""

    @property
    def has_ids(self) -> bool:
        """Its rows have a custom_id."""

    def plan(self, source: Source, limits: Limits) -> Planned: ...
    def pieces(self, source: Source, whole: ChunkPlan, each: int) -> list[ChunkPlan]: ...
    def read(
        self,
        source: Source,
        claim: Claim,
        spec: ModelSpec,
        limits: Limits,
        enough: Callable[[], bool],
    ) -> Iterator[Pack | Refused | ChunkPlan]: ...

    def ids(self, source: Source, part: Range) -> pa.Array:
        """The custom_id of each row of a range, where it has one."""


@dataclass(frozen=True, slots=True)
class NpyInput:
    """A `.npy` file: a range is a range of its bytes."""

    order: Order
    layout: Mapping[str, Any]

    def plan(self, source: Source, limits: Limits) -> Planned:
        size = source.size()
        head = b"".join(source.blocks(0, npy.HEAD))
        wanted = self.order.inputs[0]
        try:
            found = npy.read_header(head, size)
            if found.datatype != wanted.datatype:
                raise _misfit(wanted, f"the array is {found.datatype}")
            if (shape := fit(found.row_shape, wanted.shape)) is None:
                raise _misfit(wanted, f"rows of the array have shape {list(found.row_shape)}")
        except TidegateError as error:
            raise rejected(error) from error
        check_rows(found.rows)
        each = max(1, min(RANGE_ROWS, limits.chunk_bytes // found.row_bytes))
        ranges = _cut(0, found.rows, found.start, found.row_bytes, each)
        return Planned(ranges, {"shape": shape})

    def pieces(self, source: Source, whole: ChunkPlan, each: int) -> list[ChunkPlan]:
        row_bytes = (whole.byte_end - whole.byte_start) // whole.items
        return _cut(whole.first_line, whole.items, whole.byte_start, row_bytes, each)

    def read(
        self,
        source: Source,
        claim: Claim,
        spec: ModelSpec,
        limits: Limits,
        enough: Callable[[], bool],
    ) -> Iterator[Pack | Refused | ChunkPlan]:
        data = memoryview(b"".join(source.blocks(claim.byte_start, claim.byte_end)))
        width = len(data) // claim.items
        wanted, shape = self.order.inputs[0], tuple(self.layout["shape"])
        column = Column(
            wanted.name,
            wanted.datatype,
            shape,
            lambda first, end: data[first * width : end * width],
            len(data),
        )
        members = Members(claim.first_line, claim.items)
        done = 0
        for found in packs(self.order, claim, [column], members, spec, limits):
            yield found
            done += found.items
            if done < claim.items and enough():
                start = claim.byte_start + done * width
                yield ChunkPlan(claim.items - done, claim.first_line + done, start, claim.byte_end)
                return

    @property
    def has_ids(self) -> bool:
        return False

    def ids(self, source: Source, part: Range) -> pa.Array:
        return pa.nulls(part.items, pa.string())


def _cut(first: int, rows: int, start: int, row_bytes: int, each: int) -> list[ChunkPlan]:
    return [
        ChunkPlan(
            count := min(each, rows - at),
            first + at,
            start + at * row_bytes,
            start + (at + count) * row_bytes,
        )
        for at in range(0, rows, each)
    ]


def _misfit(wanted: TensorSpec, found: str) -> BadTensor:
    return BadTensor(
        f"{found}; input {wanted.name!r} takes {wanted.datatype} {list(wanted.shape)} (-1 is any "
        "size)",
        param=wanted.name,
    )


@dataclass(frozen=True, slots=True)
class ParquetInput:
    """A Parquet file: its rows are staged in an object in which a range is a range of bytes, since
    nothing can be read from the middle of a row group."""

    order: Order
    layout: Mapping[str, Any]

    def plan(self, source: Source, limits: Limits) -> Planned:
        try:
            table = parquet.Table(_File(source), source.size())
            names = self._columns(table)
            check_rows(table.rows)
            ranges: list[ChunkPlan] = []
            staged = source.stage(self._staged(table, names, limits, ranges))
        except (BadFile, BadTensor, Unsupported) as error:
            raise rejected(error) from error
        check_rows(len(ranges))
        return Planned(ranges, {CUSTOM_ID: CUSTOM_ID in names}, staged)

    def _columns(self, table: parquet.Table) -> list[str]:
        """Those that are inputs, and what the client calls the rows."""
        names: list[str] = []
        for wanted in self.order.inputs:
            kind = table.columns.get(wanted.name)
            if kind is None:
                if not wanted.optional:
                    known = ", ".join(map(repr, list(table.columns)[:20]))
                    raise _misfit(wanted, f"the file has no column {wanted.name!r}, but {known}")
                continue
            names.append(wanted.name)
            found = columns.datatype_of(kind)
            if found is None or found[0] != wanted.datatype:
                raise _misfit(wanted, f"column {wanted.name!r} is {kind}")
            if found[1] > 1 and found[1] != len(wanted.shape):
                raise _misfit(wanted, f"column {wanted.name!r} has lists {found[1]} deep")
        if not names:
            raise BadTensor("the file has no column that is an input of the model")
        if CUSTOM_ID in table.columns and CUSTOM_ID not in names:
            kind = table.columns[CUSTOM_ID]
            if not (columns.is_text(kind) or pa.types.is_integer(kind)):
                raise BadTensor(f"column custom_id is {kind}; it holds strings or integers")
            names.append(CUSTOM_ID)
        return names

    def _staged(
        self, table: parquet.Table, names: Sequence[str], limits: Limits, ranges: list[ChunkPlan]
    ) -> Iterator[bytes]:
        """The rows, range by range; `ranges` grows with them."""
        at = row = 0
        block_rows = max(BLOCK_ROWS, 4 * self.order.max_rows)
        found = (_plain(batch) for batch in table.batches(names, RANGE_ROWS))
        for batch in parquet.cut(found, RANGE_ROWS, limits.chunk_bytes):
            for begin, count in self._wanted(row, batch.num_rows):
                start = at
                for first in range(begin, begin + count, block_rows):
                    rows = min(block_rows, begin + count - first)
                    block = parquet.pack(batch.slice(first - row, rows), first)
                    at += len(block)
                    yield block
                if at > MOST_DECODED:
                    raise Unsupported(f"the rows take more than {MOST_DECODED} bytes, decoded")
                ranges.append(ChunkPlan(count, begin, start, at))
            row += batch.num_rows

    def _wanted(self, first: int, count: int) -> list[tuple[int, int]]:
        """What of a range is to be run, as (first row, rows)."""
        if not self.order.only:
            return [(first, count)]
        cuts = [
            (max(first, begin), min(first + count, begin + rows)) for begin, rows in self.order.only
        ]
        return [(begin, end - begin) for begin, end in cuts if begin < end]

    def pieces(self, source: Source, whole: ChunkPlan, each: int) -> list[ChunkPlan]:
        pieces: list[ChunkPlan] = []
        for block in self._blocks(source, whole):
            start, end = whole.byte_start + block.start, whole.byte_start + block.end
            last = pieces[-1] if pieces else None
            if last and last.items + block.rows <= each:
                items = last.items + block.rows
                pieces[-1] = ChunkPlan(items, last.first_line, last.byte_start, end)
                continue
            # A part of a block lies in the same bytes as all of it.
            pieces += [
                ChunkPlan(min(each, block.rows - at), block.first + at, start, end)
                for at in range(0, block.rows, each)
            ]
        return pieces

    def _blocks(self, source: Source, part: Range) -> Iterator[parquet.Block]:
        """The rows of a range, as far as they are its own."""
        data = b"".join(source.blocks(part.byte_start, part.byte_end))
        for block in parquet.blocks(data):
            yield block.within(part.first_line, part.first_line + part.items)

    def read(
        self,
        source: Source,
        claim: Claim,
        spec: ModelSpec,
        limits: Limits,
        enough: Callable[[], bool],
    ) -> Iterator[Pack | Refused | ChunkPlan]:
        left = claim.items
        for block in self._blocks(source, claim):
            yield from self._read_block(block, claim, spec, limits)
            left -= block.rows
            if left and enough():
                start = claim.byte_start + block.end
                yield ChunkPlan(left, block.first + block.rows, start, claim.byte_end)
                return

    def _read_block(
        self, block: parquet.Block, claim: Claim, spec: ModelSpec, limits: Limits
    ) -> Iterator[Pack | Refused]:
        batch = block.batch
        ids = batch.column(CUSTOM_ID) if self.has_ids else None
        wanted = [one for one in self.order.inputs if one.name in batch.schema.names]
        found = [columns.read(batch.column(one.name)) for one in wanted]
        for first, end, good in columns.runs(found):
            members = Members(block.first + first, end - first, _sliced(ids, first))
            if not good:
                for at, member in enumerate(members, start=first):
                    bad = [w.name for w, one in zip(wanted, found, strict=True) if not one.good[at]]
                    words = f"{', '.join(bad)}: null, or lists of uneven lengths"
                    yield Refused(member.number, member.custom_id, BadTensor.code, words)
                continue
            try:
                given = [
                    _column(one, rows, first, end) for one, rows in zip(wanted, found, strict=True)
                ]
            except BadTensor as error:
                for member in members:
                    yield Refused(member.number, member.custom_id, error.code, error.message)
            else:
                yield from packs(self.order, claim, given, members, spec, limits)

    @property
    def has_ids(self) -> bool:
        return bool(self.layout[CUSTOM_ID])

    def ids(self, source: Source, part: Range) -> pa.Array:
        found = [block.batch.column(CUSTOM_ID) for block in self._blocks(source, part)]
        return pa.concat_arrays(found)


def _column(wanted: TensorSpec, rows: columns.Rows, first: int, end: int) -> Column:
    """Rows of one shape. Raises `BadTensor` where that is none the model takes."""
    found = rows.shape(first)
    shape = fit(found, wanted.shape)
    if shape is None:
        raise _misfit(wanted, f"the row has shape {list(found)}")
    whole = rows.raw(first, end) if wanted.datatype == "BYTES" else b""
    size = len(whole) or int(rows.starts[end] - rows.starts[first]) * rows.item_size
    return Column(
        wanted.name,
        wanted.datatype,
        shape,
        lambda begin, to: rows.raw(first + begin, first + to),
        size,
    )


def _sliced(ids: pa.Array | None, first: int) -> pa.Array | None:
    return ids.slice(first) if ids is not None else None


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch with custom_ids that are strings."""
    if CUSTOM_ID not in batch.schema.names:
        return batch
    at = batch.schema.get_field_index(CUSTOM_ID)
    try:
        text = batch.column(at).cast(pa.string())
        text.validate(full=True)
    except pa.ArrowException as error:
        raise BadFile(f"column custom_id: {error}") from error
    return batch.set_column(at, pa.field(CUSTOM_ID, pa.string()), text)


class _File:
    """The input file as pyarrow reads it."""

    closed = False

    def __init__(self, source: Source):
        self._source = source
        self._size = source.size()
        self._at = 0

    def read(self, size: int = -1, /) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        data = b"".join(self._source.blocks(self._at, end))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
