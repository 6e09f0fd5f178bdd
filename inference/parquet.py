"""Parquet files of tensors: read batch by batch, carried in Arrow's stream format, written row
group by row group. Neither a file nor a row group is ever whole in memory."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from errors import BadFile, TidegateError, Unsupported
from inference import columns, parquet_pages

MAGIC: Final = b"PAR1"
MAX_FOOTER: Final = 16 << 20
"""Bytes: it is in memory as long as the file is read, several times over."""
MAX_ROW_GROUP: Final = 1 << 30
"""Bytes of one, decoded. What lies between two batches of it is not in memory, but one value may
be as large as all of it."""
BATCH: Final = 2 << 20
"""Bytes of one batch, by the row group's average row."""
BATCH_TEXTS: Final = 256
"""Most rows of a batch with BYTES: of a text that many rows share, each has a copy."""
WINDOW: Final = 1 << 20
"""Bytes of one column that are read at a time."""
ROW_GROUP: Final = 4 << 20
"""Bytes of one that is written."""


class RandomAccess(Protocol):
    """A file as pyarrow reads it. What it raises comes out of every function here."""

    @property
    def closed(self) -> bool: ...
    def read(self, size: int = -1, /) -> bytes: ...
    def seek(self, offset: int, whence: int = 0, /) -> int: ...
    def tell(self) -> int: ...
    def readable(self) -> bool: ...
    def seekable(self) -> bool: ...


class Table:
    """A Parquet file's columns. Raises `BadFile` for one that is broken; `Unsupported`."""

    def __init__(self, file: RandomAccess, size: int):
        _check_ends(file, size)
        self._source = file
        with _translated():
            self._file = pq.ParquetFile(
                # All of a column in one read is what is fast from far away, and not bounded.
                pa.PythonFile(file, mode="r"),
                pre_buffer=False,
                buffer_size=WINDOW,
                thrift_string_size_limit=MAX_FOOTER,
                thrift_container_size_limit=1_000_000,
                page_checksum_verification=True,
            )
            schema = self._file.schema_arrow
        self.columns: Mapping[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))
        if len(self.columns) < len(schema.names):
            raise BadFile("two columns have the same name")

    @property
    def rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def batches(self, names: Sequence[str], most_rows: int) -> Iterator[pa.RecordBatch]:
        """The rows of these columns, in order, at most so many at a time."""
        texts = any(
            (columns.datatype_of(self.columns[name]) or ("", 0))[0] == "BYTES" for name in names
        )
        most = min(most_rows, BATCH_TEXTS) if texts else most_rows
        for group in range(self._file.metadata.num_row_groups):
            with _translated():
                each = self._batch_rows(group, names, most)
                found = iter(
                    self._file.iter_batches(
                        each, row_groups=[group], columns=list(names), use_threads=False
                    )
                )
            while True:
                with _translated():
                    batch = next(found, None)
                if batch is None:
                    break
                yield batch

    def _read(self, at: int, size: int) -> bytes:
        self._source.seek(at)
        return self._source.read(size)

    def _batch_rows(self, group: int, names: Sequence[str], most: int) -> int:
        told = self._file.metadata.row_group(group)
        size = 0
        for at in range(told.num_columns):
            column = told.column(at)
            if column.path_in_schema.split(".")[0] not in names:
                continue
            start = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                start = min(start, column.dictionary_page_offset)
            parquet_pages.check(self._read, start, column.total_compressed_size)
            # Levels of nesting are 2 bytes each while they are decoded; a text's own size is not
            # told, but that of its page.
            width = _WIDTHS.get(column.physical_type, 0) + 4
            size += max(column.num_values * width, column.total_uncompressed_size)
        if size > MAX_ROW_GROUP:
            fits = max(1, told.num_rows * (MAX_ROW_GROUP // 8) // size)
            raise Unsupported(
                f"row group {group} takes {size} bytes in memory, more than {MAX_ROW_GROUP}; "
                f"write the file with row_group_size={fits}"
            )
        fitting = BATCH * int(told.num_rows) // max(1, size)
        return max(1, min(most, fitting))


_WIDTHS: Final = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


def _check_ends(file: RandomAccess, size: int) -> None:
    if size < 12:
        raise BadFile("the Parquet file is cut short")
    file.seek(size - 8)
    tail = file.read(8)
    if tail[4:] == b"PARE":
        raise Unsupported("the Parquet file is encrypted")
    if tail[4:] != MAGIC:
        raise BadFile("the Parquet file is cut short: its footer is missing")
    footer = int.from_bytes(tail[:4], "little")
    if footer > size - 12:
        raise BadFile("the footer of the Parquet file is longer than the file")
    if footer > MAX_FOOTER:
        raise Unsupported(f"the footer of the Parquet file is longer than {MAX_FOOTER} bytes")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except TidegateError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError) as error:
        words = str(error).partition("\n")[0][:300]
        raise BadFile(f"the Parquet file cannot be read: {words}") from error


# Rows at rest, between the file and the model


def cut(batches: Iterable[pa.RecordBatch], rows: int, size: int) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `rows` rows, or of fewer with `size` bytes together."""
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        at = 0
        while at < batch.num_rows:
            # Not too many bytes either: a batch is as large as its average row says.
            held = sum(one.nbytes for one in waiting)
            take = batch.slice(at, rows - sum(one.num_rows for one in waiting))
            at += take.num_rows
            waiting.append(take)
            if sum(one.num_rows for one in waiting) >= rows or held + take.nbytes >= size:
                yield from _halved(pa.concat_batches(waiting), size)
                waiting = []
    if waiting:
        yield from _halved(pa.concat_batches(waiting), size)


def _halved(batch: pa.RecordBatch, size: int) -> Iterator[pa.RecordBatch]:
    if batch.num_rows > 1 and batch.nbytes > 2 * size:
        half = batch.num_rows // 2
        yield from _halved(batch.slice(0, half), size)
        yield from _halved(batch.slice(half), size)
    else:
        yield batch


_HEAD: Final = struct.Struct("<QQ")


def pack(batch: pa.RecordBatch, first: int) -> bytes:
    """Rows from number `first` on, as a block."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    body = sink.getvalue()
    return b"".join((_HEAD.pack(len(body), first), body))


@dataclass(frozen=True, slots=True)
class Block:
    """Rows from number `first` on; `start` and `end` are its place among the blocks it lies in."""

    first: int
    start: int
    end: int
    batch: pa.RecordBatch

    @property
    def rows(self) -> int:
        return int(self.batch.num_rows)

    def within(self, first: int, end: int) -> Block:
        """Those of its rows that have these numbers."""
        begin = max(first, self.first)
        rows = max(0, min(end, self.first + self.rows) - begin)
        return Block(begin, self.start, self.end, self.batch.slice(begin - self.first, rows))


def blocks(data: bytes) -> Iterator[Block]:
    """Blocks that lie one behind the other; their rows share the memory of `data`."""
    at, whole = 0, pa.py_buffer(data)
    while at < len(data):
        length, first = _HEAD.unpack_from(data, at)
        body = at + _HEAD.size
        with pa.ipc.open_stream(whole.slice(body, length)) as stream:
            batch = stream.read_next_batch()
        yield Block(first, at, body + length, batch)
        at = body + length


# Writing


class _Sink:
    """A file that keeps what is written to it until it is taken away."""

    closed = False

    def __init__(self) -> None:
        self._blocks: list[bytes] = []
        self._at = 0

    def write(self, data: Any) -> int:
        block = bytes(data)
        self._blocks.append(block)
        self._at += len(block)
        return len(block)

    def tell(self) -> int:
        return self._at

    def writable(self) -> bool:
        return True

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> list[bytes]:
        taken, self._blocks = self._blocks, []
        return taken


def write(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[bytes]:
    """A Parquet file of these rows. In memory is one row group."""
    sink = _Sink()
    writer = pq.ParquetWriter(pa.PythonFile(sink, mode="w"), schema)
    waiting: list[pa.RecordBatch] = []
    for batch in batches:
        waiting.append(batch)
        if sum(one.nbytes for one in waiting) >= ROW_GROUP:
            _write_group(writer, waiting)
            yield from sink.take()
    if waiting:
        _write_group(writer, waiting)
    writer.close()
    yield from sink.take()


def _write_group(writer: pq.ParquetWriter, waiting: list[pa.RecordBatch]) -> None:
    table = pa.Table.from_batches(waiting)
    waiting.clear()
    writer.write_table(table, row_group_size=max(1, table.num_rows))
