"""Parquet files of tensors: read piece by piece, refused where they can't be, written in groups."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import BadFile, Cancelled, Unsupported
from inference import parquet, parquet_pages


def written(table: pa.Table | dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), file, **options)
    return file.getvalue()


def opened(data: bytes) -> parquet.Table:
    return parquet.Table(io.BytesIO(data), len(data))


def numbers(count: int) -> pa.Table:
    return pa.table({"x": np.arange(count), "other": np.zeros(count)})


@given(st.integers(1, 300), st.integers(1, 100), st.integers(1, 120))
def test_all_rows_come_in_their_order_whatever_the_row_groups(
    rows: int, group: int, most: int
) -> None:
    table = opened(written(numbers(rows), row_group_size=group))
    assert table.rows == rows
    cut = list(parquet.cut(table.batches(["x"], 64), most, 1 << 20))
    assert [n for batch in cut for n in batch.column("x").to_pylist()] == list(range(rows))
    assert all(batch.num_rows == most for batch in cut[:-1])
    assert all(batch.schema.names == ["x"] for batch in cut)


def test_batches_are_cut_by_bytes_too() -> None:
    texts = ["a" * 1000] * 50 + ["b" * 100_000] * 10 + ["c"] * 50
    table = opened(written({"x": texts}))
    cut = list(parquet.cut(table.batches(["x"], 1000), 1000, 50_000))
    assert [text for batch in cut for text in batch.column("x").to_pylist()] == texts
    assert max(batch.nbytes for batch in cut) < 2 * 100_000 + 1000


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 100))
def test_blocks_are_found_again_with_their_rows(sizes: list[int], start: int) -> None:
    first, data = start, b""
    for size in sizes:
        batch = pa.record_batch({"x": np.arange(first, first + size)})
        data += parquet.pack(batch, first)
        first += size
    found = list(parquet.blocks(data))
    assert [block.rows for block in found] == sizes
    assert [block.batch.column("x")[0].as_py() for block in found] == [b.first for b in found]
    assert found[-1].end == len(data)
    assert [block.start for block in found[1:]] == [block.end for block in found[:-1]]
    part = found[0].within(start + 1, start + 5)
    assert part.batch.column("x").to_pylist() == list(range(start, start + sizes[0]))[1:5]


def test_files_that_are_broken_or_closed_are_refused() -> None:
    good = written(numbers(1000), row_group_size=100, write_page_checksum=True)
    for data in (b"PAR1", b"PAR1" * 3, good[:-1], good[:-500], good[:-8] + b"\xff" * 4 + b"PAR1"):
        with pytest.raises(BadFile):
            list(opened(data).batches(["x"], 10))
    with pytest.raises(Unsupported, match="encrypted"):
        opened(good[:-4] + b"PARE")
    with pytest.raises(BadFile, match="same name"):
        opened(written(pa.table([[1], [2]], names=["x", "x"])))


@given(st.integers(0, 3000), st.binary(min_size=1, max_size=60))
def test_no_damage_raises_anything_else(at: int, noise: bytes) -> None:
    good = written(
        {"x": [[n, n] for n in range(200)], "t": [str(n % 7) for n in range(200)]},
        row_group_size=50,
        write_page_checksum=True,
    )
    at %= len(good)
    data = good[:at] + noise + good[at + len(noise) :]
    with suppress(BadFile, Unsupported):
        for _ in opened(data).batches(["x", "t"], 10):
            pass


def test_a_row_group_too_large_to_be_read_is_refused_with_the_size_to_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP", 100_000)
    data = written(numbers(50_000))
    with pytest.raises(Unsupported, match=r"row_group_size=(\d+)") as caught:
        list(opened(data).batches(["x"], 100))
    size = int(str(caught.value).rpartition("=")[2])
    again = written(numbers(50_000), row_group_size=size)
    assert sum(batch.num_rows for batch in opened(again).batches(["x"], 100)) == 50_000


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip", "lz4", "brotli"])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_files_of_every_kind_pass_the_look_at_their_pages(
    compression: str, version: str, dictionary: bool
) -> None:
    rows = {
        "x": [[n, n + 1] for n in range(5000)],
        "text": [f"a rather long text, number {n % 900}" for n in range(5000)],
        "bits": [n % 3 == 0 for n in range(5000)],
        "none": pa.nulls(5000, pa.float64()),
    }
    data = written(
        rows,
        row_group_size=1700,
        compression=compression,
        data_page_version=version,
        use_dictionary=dictionary,
        data_page_size=1000,
        write_page_index=True,
        write_page_checksum=True,
    )
    found = opened(data).batches(list(rows), 1000)
    assert [x for batch in found for x in batch.column("x").to_pylist()] == rows["x"]


def test_pages_that_are_too_large_are_refused_before_room_is_made_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parquet_pages, "MAX_PAGE", 100_000)
    data = written({"x": np.zeros(20_000)}, use_dictionary=False, compression="zstd")
    assert len(data) < 10_000
    with pytest.raises(Unsupported, match="smaller pages"):
        next(opened(data).batches(["x"], 10))


@given(st.binary(max_size=300), st.integers(1, 400))
def test_no_bytes_keep_the_look_at_pages(noise: bytes, size: int) -> None:
    with suppress(BadFile, Unsupported):
        parquet_pages.check(lambda at, most: noise[at : at + most], 0, size)


def test_a_list_that_claims_to_be_long_keeps_nobody() -> None:
    # Field 1: a list of 2^40 booleans.
    noise = b"\x19\xf1" + b"\x80" * 5 + b"\x20" + bytes(100)
    with pytest.raises(BadFile, match="header"):
        parquet_pages.check(lambda at, most: noise[at : at + most], 0, 100)


def test_a_footer_too_large_to_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_FOOTER", 200)
    with pytest.raises(Unsupported, match="footer"):
        opened(written(numbers(10)))


class _CalledOff(io.BytesIO):
    """Raises once it has been read so often."""

    left = 6

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise Cancelled("called off")
        return super().read(size)


def test_what_the_file_raises_is_raised_as_it_is() -> None:
    data = written(numbers(1000), row_group_size=10)
    table = parquet.Table(_CalledOff(data), len(data))
    with pytest.raises(Cancelled):
        list(table.batches(["x"], 10))


def test_rows_are_written_in_groups_and_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP", 10_000)
    schema = pa.schema({"x": pa.list_(pa.float32())})
    batch = pa.record_batch(
        [pa.array([[1.0, 2.0], None, []] * 100, schema.field("x").type)], schema
    )
    blocks = list(parquet.write(iter([batch] * 30), schema))
    data = b"".join(blocks)
    found = pq.ParquetFile(io.BytesIO(data))
    assert found.metadata.num_row_groups > 2
    assert found.read().to_pylist() == batch.to_pylist() * 30
    assert pq.read_table(io.BytesIO(b"".join(parquet.write([], schema)))).num_rows == 0


def test_a_large_row_group_is_read_and_written_in_little_memory() -> None:
    rows, width = 500_000, 64
    values = np.zeros(rows * width, "<f4")
    values[::7] = np.arange(len(values[::7]))
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(values, width)})
    data = written(table)
    assert pq.ParquetFile(io.BytesIO(data)).metadata.num_row_groups == 1
    del table
    pool = pa.default_memory_pool()
    before, peak, most = pool.bytes_allocated(), 0, 0

    class File(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            nonlocal most
            found = super().read(size)
            most = max(most, len(found))
            return found

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal peak
        for batch in parquet.Table(File(data), len(data)).batches(["x"], 16_384):
            peak = max(peak, pool.bytes_allocated() - before)
            yield batch

    size = 0
    schema = pa.schema({"x": pa.list_(pa.float32(), width)})
    for block in parquet.write(parquet.cut(batches(), 16_384, 4 << 20), schema):
        peak = max(peak, pool.bytes_allocated() - before)
        size += len(block)
    assert size > len(data) / 2
    assert most <= 2 * parquet.WINDOW
    # Of 128 MB: what one batch takes, and one row group that is written.
    assert peak < 56 << 20
