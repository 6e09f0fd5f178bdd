"""Batches over arrays, run eagerly on real stores against a fake Triton."""

from __future__ import annotations

import io
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uuid_utils.compat as uuids

from config import Settings
from errors import TidegateError
from inference.fake import FakeModel, FakeTriton, ModelError
from inference.tensors import InferRequest, Tensor, bytes_elements, pack_bytes
from storage.dead_letters import LetterFilter
from storage.files import FileRow, file_key
from storage.work import Hint, NewBatch, NewJob
from tasks import array_inputs, array_order, batches, bootstrap
from tasks.bootstrap import WorkerServices, build_worker_services
from tasks.chunks import run_chunks
from tasks.pump import Pump
from workers.app import build_app


def _array(tensor: Tensor) -> Any:
    kinds = {"FP32": "<f4", "INT64": "<i8", "INT32": "<i4"}
    return np.frombuffer(tensor.data, kinds[tensor.datatype]).reshape(tensor.shape)


def _run_table(request: InferRequest, sleep: Any) -> Iterable[Tensor]:
    """SUM and TWICE of A, NAME of NAME; fails at a negative number in A."""
    given = {tensor.name: tensor for tensor in request.inputs}
    a = _array(given["A"])
    if (a < 0).any():
        raise ModelError("no negatives")
    rows = len(a)
    made = [
        Tensor("SUM", "FP32", (rows, 1), a.sum(axis=1, dtype="<f4").tobytes()),
        Tensor("TWICE", "FP32", (rows, 2), (2 * a).tobytes()),
    ]
    if "NAME" in given:
        loud = pack_bytes([name.upper() for name in bytes_elements(given["NAME"])])
        made.append(Tensor("LOUD", "BYTES", (rows, 1), loud))
    wanted = request.outputs
    return [tensor for tensor in made if not wanted or tensor.name in wanted]


def _run_single(request: InferRequest, sleep: Any) -> Iterable[Tensor]:
    (x,) = request.inputs
    return [Tensor("Y", "INT32", x.shape, (_array(x) * 2).astype("<i4").tobytes())]


def _run_growing(request: InferRequest, sleep: Any) -> Iterable[Tensor]:
    """As many numbers a row as the first row says."""
    x = _array(request.inputs[0])
    y = np.repeat(x, int(x[0, 0]), axis=1)
    return [Tensor("Y", "INT64", y.shape, y.astype("<i8").tobytes())]


TABLE = FakeModel(
    "table",
    {
        "max_batch_size": 4,
        "input": [
            {"name": "A", "data_type": "TYPE_FP32", "dims": [2]},
            {"name": "NAME", "data_type": "TYPE_STRING", "dims": [1], "optional": True},
        ],
        "output": [
            {"name": "SUM", "data_type": "TYPE_FP32", "dims": [1]},
            {"name": "TWICE", "data_type": "TYPE_FP32", "dims": [2]},
            {"name": "LOUD", "data_type": "TYPE_STRING", "dims": [1]},
        ],
    },
    _run_table,
)
SINGLE = FakeModel(
    "single",
    {
        "input": [{"name": "X", "data_type": "TYPE_INT32", "dims": [3]}],
        "output": [{"name": "Y", "data_type": "TYPE_INT32", "dims": [3]}],
    },
    _run_single,
)
GROWING = FakeModel(
    "growing",
    {
        "max_batch_size": 2,
        "input": [{"name": "X", "data_type": "TYPE_INT64", "dims": [1]}],
        "output": [{"name": "Y", "data_type": "TYPE_INT64", "dims": [-1]}],
    },
    _run_growing,
)


@dataclass
class Worker:
    """One GPU worker without its process: hints go straight to the task."""

    services: WorkerServices
    tenant: UUID

    def release(self) -> list[Hint]:
        return self.services.backlog.release(self.services.group)

    def run(self, hints: Sequence[Hint]) -> None:
        for hint in hints:
            run_chunks.apply(kwargs={"ids": list(hint.ids), "alone": hint.alone}, throw=True)

    def work(self) -> None:
        """Release and run until nothing is left to release."""
        for _ in range(60):
            self.sql("UPDATE chunks SET not_before = now() WHERE state = 'queued'")
            hints = self.release()
            if not hints:
                return
            self.run(hints)
        raise AssertionError("the work does not end")

    def sql(self, text: str) -> list[Any]:
        with self.services.database.transaction() as connection:
            found = connection.exec_driver_sql(text)
            return list(found.all()) if found.returns_rows else []

    def submit(self, model: str, data: bytes, **asked: Any) -> UUID:
        """As the gateway does."""
        file_id = uuids.uuid7()
        key = file_key(self.tenant, file_id)
        self.services.objects.put(key, data)
        self.services.files.add(FileRow(file_id, self.tenant, "batch", "in", len(data), key))
        spec = self.services.models.spec(model, "")
        order = array_order.order(array_order.kind_of(data[:8]), spec, **asked)
        job = NewJob(uuids.uuid7(), self.tenant, self.services.group, model, "", 600)
        endpoint = f"/v2/models/{model}/infer"
        arrays = order.to_json() if order else None
        batch = NewBatch(endpoint, "24h", file_id, arrays=arrays)
        self.services.jobs.submit_batch(job, batch)
        return job.id

    def row(self, job_id: UUID) -> Any:
        return self.services.jobs.get(self.tenant, job_id)

    def counts(self, job_id: UUID) -> tuple[str, int, int, int]:
        row = self.row(job_id)
        return row.state, row.items_total, row.items_ok, row.items_failed

    def output(self, job_id: UUID, *, error: bool = False) -> bytes:
        row = self.row(job_id)
        file_id = row.error_file_id if error else row.output_file_id
        assert file_id is not None
        file = self.services.files.get(self.tenant, file_id)
        data = self.services.objects.get(file.key)
        assert len(data) == file.bytes
        return data

    def npy(self, job_id: UUID) -> Any:
        return np.load(io.BytesIO(self.output(job_id)), allow_pickle=False)

    def parquet(self, job_id: UUID) -> Any:
        return pq.read_table(io.BytesIO(self.output(job_id)))

    def lines(self, job_id: UUID) -> list[Any]:
        return [json.loads(line) for line in self.output(job_id).splitlines()]

    def errors(self, job_id: UUID) -> list[tuple[int, int, str]]:
        """(row, rows, code) of each."""
        found = [json.loads(line) for line in self.output(job_id, error=True).splitlines()]
        assert all(one["response"] is None for one in found)
        return [(e["error"]["row"], e["error"]["rows"], e["error"]["code"]) for e in found]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeTriton]:
    with FakeTriton([TABLE, SINGLE, GROWING]) as fake:
        yield fake


@pytest.fixture
def worker(settings: Settings, fake: FakeTriton) -> Iterator[Worker]:
    group = f"g{secrets.token_hex(4)}"
    own = replace(
        settings,
        group=group,
        triton_url=fake.address,
        # Ranges of ten rows of two floats.
        chunk_bytes=80,
        catalog_ttl=0.001,
    )
    build_app(own)
    services = build_worker_services(own, name="worker", group=group)
    services = replace(services, pump=Pump(services.backlog, lambda hint: None))
    services.pump.stop()
    bootstrap.install(services)
    tenant = services.keys.tenant_of(services.keys.create(secrets.token_hex(4)))
    yield Worker(services, tenant)
    services.close()


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def written(table: dict[str, Any] | pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), file, **options)
    return file.getvalue()


def pairs(rows: int) -> Any:
    return np.arange(2 * rows, dtype="<f4").reshape(rows, 2)


def as_lists(a: Any) -> pa.Array:
    return pa.array(list(a), pa.list_(pa.float32()))


# .npy


def test_every_row_of_an_array_becomes_the_row_of_the_answer(worker: Worker) -> None:
    a = pairs(33)
    job = worker.submit("table", saved(a), output_names=["TWICE"])
    worker.work()
    assert worker.counts(job) == ("succeeded", 33, 33, 0)
    found = worker.npy(job)
    assert found.dtype == np.dtype("<f4")
    assert (found == 2 * a).all()
    (chunks,) = worker.sql(f"SELECT count(*) FROM chunks WHERE job_id = '{job}' AND kind = 'infer'")
    assert chunks[0] == 4
    row = worker.row(job)
    file = worker.services.files.get(worker.tenant, row.output_file_id)
    assert file.filename.endswith("_output.npy")
    assert row.error_file_id is None


def test_a_model_without_batches_is_asked_row_by_row(worker: Worker) -> None:
    x = np.arange(60, dtype="<i4").reshape(20, 3)
    job = worker.submit("single", saved(x))
    worker.work()
    assert worker.counts(job) == ("succeeded", 20, 20, 0)
    assert (worker.npy(job) == 2 * x).all()


def test_flat_rows_are_laid_out_as_the_model_takes_them(worker: Worker) -> None:
    job = worker.submit("growing", saved(np.ones(7, "<i8")))
    worker.work()
    assert worker.npy(job).tolist() == [[1]] * 7


def test_bad_rows_fail_alone_and_leave_their_place(worker: Worker) -> None:
    a = pairs(25)
    a[[0, 6, 24], 0] = -1
    job = worker.submit("table", saved(a), output_names=["SUM"])
    worker.work()
    assert worker.counts(job) == ("succeeded", 25, 22, 3)
    found = worker.npy(job)
    assert np.flatnonzero(np.isnan(found[:, 0])).tolist() == [0, 6, 24]
    good = ~np.isnan(found[:, 0])
    assert (found[good, 0] == a.sum(axis=1)[good]).all()
    assert worker.errors(job) == [(n, 1, "model_failed") for n in (0, 6, 24)]


def test_where_no_row_is_answered_there_is_no_output(worker: Worker) -> None:
    job = worker.submit("table", saved(pairs(5) - 100), output_names=["SUM"])
    worker.work()
    assert worker.counts(job) == ("succeeded", 5, 0, 5)
    assert worker.row(job).output_file_id is None


def test_answers_of_another_shape_than_the_first_have_no_place_in_an_array(worker: Worker) -> None:
    x = np.array([2, 2, 2, 2, 3, 3, 2, 2, 5, 5, 2], "<i8").reshape(-1, 1)
    job = worker.submit("growing", saved(x))
    worker.work()
    assert worker.counts(job) == ("succeeded", 11, 7, 4)
    assert worker.npy(job).tolist() == [
        [2, 2] if n in (0, 1, 2, 3, 6, 7, 10) else [0, 0] for n in range(11)
    ]
    assert worker.errors(job) == [(4, 2, "unsupported"), (8, 2, "unsupported")]

    whole = worker.submit("growing", saved(x), output="parquet")
    worker.work()
    assert worker.counts(whole) == ("succeeded", 11, 11, 0)
    assert worker.parquet(whole)["Y"].to_pylist() == [[int(n)] * int(n) for n in x[:, 0]]


def test_an_array_can_be_answered_in_lines(worker: Worker) -> None:
    job = worker.submit("table", saved(pairs(12)), output="jsonl")
    worker.work()
    assert worker.counts(job) == ("succeeded", 12, 12, 0)
    found = worker.lines(job)
    assert [one["custom_id"] for one in found] == [str(n) for n in range(12)]
    assert found[3]["response"]["body"]["outputs"][0]["data"] == [13.0]


def test_a_cancelled_batch_keeps_what_was_answered_where_it_belongs(worker: Worker) -> None:
    a = pairs(40)
    job = worker.submit("table", saved(a), output_names=["TWICE"])
    worker.run(worker.release())
    ids = [
        row[0] for row in worker.sql(f"SELECT id FROM chunks WHERE job_id = '{job}' ORDER BY seq")
    ]
    worker.sql(f"UPDATE chunks SET state = 'released' WHERE id = {ids[2]}")
    run_chunks.apply(kwargs={"ids": [ids[2]]}, throw=True)
    worker.services.jobs.cancel(worker.tenant, job)
    worker.work()
    assert worker.counts(job) == ("canceled", 40, 10, 30)
    found = worker.npy(job)
    assert (found[10:20] == 2 * a[10:20]).all()
    assert np.isnan(np.delete(found, slice(10, 20), axis=0)).all()
    assert worker.errors(job) == [
        (0, 10, "batch_cancelled"),
        (20, 10, "batch_cancelled"),
        (30, 10, "batch_cancelled"),
    ]


@pytest.mark.parametrize("source", ["npy", "parquet"])
def test_a_range_that_fails_again_and_again_is_split(worker: Worker, source: str) -> None:
    a = pairs(20)
    data = saved(a) if source == "npy" else written({"A": as_lists(a)})
    job = worker.submit("table", data, output_names=["TWICE"], output="npy")
    worker.run(worker.release())
    worker.sql(
        "UPDATE chunks SET attempts = 2 WHERE kind = 'infer' AND first_line = 0"
        f" AND job_id = '{job}'"
    )
    worker.work()
    assert worker.counts(job) == ("succeeded", 20, 20, 0)
    assert (worker.npy(job) == 2 * a).all()
    (chunks,) = worker.sql(f"SELECT count(*) FROM chunks WHERE job_id = '{job}' AND kind = 'infer'")
    assert chunks[0] == 11


@pytest.mark.parametrize("source", ["npy", "parquet"])
def test_dead_rows_are_run_again_alone(worker: Worker, source: str) -> None:
    a = pairs(40)
    data = saved(a) if source == "npy" else written({"A": as_lists(a)})
    job = worker.submit("table", data, output_names=["TWICE"], output="parquet")
    worker.run(worker.release())
    claims = worker.sql(f"SELECT id FROM chunks WHERE job_id = '{job}' AND first_line IN (10, 30)")
    held = worker.services.chunks.claim([row[0] for row in claims], "w")
    for claim in held:
        worker.services.chunks.retry([replace(claim, last=True)], TidegateError("it died"), 0)
    worker.work()
    assert worker.counts(job) == ("succeeded", 40, 20, 20)
    nulls = [n for n, value in enumerate(worker.parquet(job)["TWICE"].to_pylist()) if value is None]
    assert nulls == [*range(10, 20), *range(30, 40)]
    assert worker.errors(job) == [(10, 10, "internal"), (30, 10, "internal")]

    made = worker.services.dead_letters.redrive_all(
        worker.tenant, LetterFilter(job_id=job), limit=10
    )
    (again,) = made.jobs
    worker.work()
    assert worker.counts(again) == ("succeeded", 20, 20, 0)
    table = worker.parquet(again)
    assert table["row"].to_pylist() == nulls
    assert table["TWICE"].to_pylist() == (2 * a)[nulls].tolist()


# Parquet


def test_columns_become_inputs_and_outputs_become_columns(worker: Worker) -> None:
    a = pairs(37)
    data = written(
        {
            "extra": list(range(37)),
            "NAME": [f"n{n}" for n in range(37)],
            "A": as_lists(a),
            "custom_id": [f"row-{n}" for n in range(37)],
        },
        row_group_size=5,
    )
    job = worker.submit("table", data)
    worker.work()
    assert worker.counts(job) == ("succeeded", 37, 37, 0)
    table = worker.parquet(job)
    assert table.column_names == ["row", "custom_id", "SUM", "TWICE", "LOUD"]
    assert table["row"].to_pylist() == list(range(37))
    assert table["custom_id"].to_pylist() == [f"row-{n}" for n in range(37)]
    assert table["SUM"].to_pylist() == a.sum(axis=1).tolist()
    assert table["TWICE"].to_pylist() == (2 * a).tolist()
    assert table["LOUD"].to_pylist() == [f"N{n}".encode() for n in range(37)]
    row = worker.row(job)
    file = worker.services.files.get(worker.tenant, row.output_file_id)
    assert file.filename.endswith("_output.parquet")


def test_rows_that_are_null_uneven_or_of_another_shape_fail_alone(worker: Worker) -> None:
    rows = [[1.0, 2.0], None, [1.0, None], [1.0], [3.0, 4.0], [-1.0, 0.0], [5.0, 6.0]]
    data = written(
        {
            "A": pa.array(rows, pa.list_(pa.float32())),
            "custom_id": [None, "b", "c", "d", "e", "f", "g"],
        }
    )
    job = worker.submit("table", data, output_names=["SUM", "TWICE"])
    worker.work()
    assert worker.counts(job) == ("succeeded", 7, 3, 4)
    table = worker.parquet(job)
    assert table["SUM"].to_pylist() == [3.0, None, None, None, 7.0, None, 11.0]
    assert table["custom_id"].to_pylist() == [None, "b", "c", "d", "e", "f", "g"]
    assert sorted(worker.errors(job)) == [
        (1, 1, "bad_tensor"),
        (2, 1, "bad_tensor"),
        (3, 1, "bad_tensor"),
        (5, 1, "model_failed"),
    ]


def test_parquet_can_be_answered_as_an_array_or_in_lines(worker: Worker) -> None:
    a = pairs(13)
    # Lists of one size, as pyarrow and polars write them.
    flat = pa.FixedSizeListArray.from_arrays(pa.array(a.reshape(-1)), 2)
    data = written({"A": flat, "custom_id": list(range(100, 113))})
    array = worker.submit("table", data, output="npy", output_names=["TWICE"])
    lines = worker.submit("table", data, output="jsonl", output_names=["SUM"])
    worker.work()
    assert (worker.npy(array) == 2 * a).all()
    assert [one["custom_id"] for one in worker.lines(lines)] == [str(n) for n in range(100, 113)]


def test_scalars_are_rows_of_one(worker: Worker) -> None:
    job = worker.submit("growing", written({"X": np.ones(9, "<i8")}))
    worker.work()
    assert worker.parquet(job)["Y"].to_pylist() == [[1]] * 9


def test_what_is_staged_is_garbage_once_the_batch_has_ended(worker: Worker) -> None:
    job = worker.submit("table", written({"A": as_lists(pairs(9))}))
    worker.run(worker.release())
    ((key,),) = worker.sql(f"SELECT staged_key FROM batches WHERE job_id = '{job}'")
    assert worker.services.objects.size(key) > 0
    assert worker.services.retention.unreferenced([key]) == []
    worker.work()
    assert worker.services.retention.unreferenced([key]) == [key]


@pytest.mark.parametrize("source", ["npy", "parquet"])
@pytest.mark.parametrize("model", ["table", "single"])
def test_an_attempt_whose_time_is_up_leaves_the_rest_of_its_rows(
    worker: Worker, source: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "TARGET", 0.0)
    monkeypatch.setattr(array_inputs, "BLOCK_ROWS", 2)
    a = pairs(33) if model == "table" else np.arange(99, dtype="<i4").reshape(33, 3)
    name, chosen = ("A", "TWICE") if model == "table" else ("X", "Y")
    ids = [f"id-{n}" for n in range(33)]
    data = saved(a) if source == "npy" else written({name: list(a), "custom_id": ids})
    job = worker.submit(model, data, output_names=[chosen], output="parquet")
    worker.work()
    assert worker.counts(job) == ("succeeded", 33, 33, 0)
    found = worker.parquet(job)
    assert found[chosen].to_pylist() == (2 * a).tolist()
    assert found["row"].to_pylist() == list(range(33))
    if source == "parquet":
        assert found["custom_id"].to_pylist() == ids
    rows = worker.sql(
        f"SELECT first_line, item_count FROM chunks WHERE job_id = '{job}' AND kind = 'infer'"
        " ORDER BY first_line"
    )
    ends = [first + items for first, items in rows]
    assert [first for first, _ in rows] == [0, *ends[:-1]]
    most = 16 if (source, model) == ("parquet", "table") else 4
    assert max(items for _, items in rows) <= max(most, 2)


# Files that are no good


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (saved(pairs(3))[:-1], "invalid_file", "takes 152"),
        (saved(pairs(3)) + b"x", "invalid_file", "has 153 bytes"),
        (saved(pairs(3).astype("<f8")), "bad_tensor", "FP64"),
        (saved(np.zeros((3, 5), "<f4")), "bad_tensor", r"\[5\]"),
        (saved(pairs(3).astype(">f4")), "unsupported", "big endian"),
        (saved(np.zeros((0, 2), "<f4")), "empty_file", "no rows"),
        (b"\x93NUMPY\1\0", "invalid_file", "ends"),
        (b"PAR1" + bytes(100), "invalid_file", "footer"),
        (b"PAR1", "invalid_file", "cut short"),
        (b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1", "invalid_file", "longer"),
        (b"PAR1" + bytes(20) + b"\x14\0\0\0PAR1", "invalid_file", "cannot be read"),
        (written({"A": as_lists(pairs(3))})[:-9] + b"\0PAR1", "invalid_file", ""),
        (written({"B": as_lists(pairs(3))}), "bad_tensor", "no column 'A', but 'B'"),
        (written({"A": np.zeros(3)}), "bad_tensor", "double"),
        (written({"A": pa.array([{"x": 1}])}), "bad_tensor", "struct"),
        (written({"A": as_lists(pairs(0))}), "empty_file", "no rows"),
        (
            written({"A": as_lists(pairs(2)), "custom_id": [1.5, 2.5]}),
            "bad_tensor",
            "custom_id is double",
        ),
        (
            written({"A": pa.array([[[[1.0]]]], pa.list_(pa.list_(pa.list_(pa.float32()))))}),
            "bad_tensor",
            "3 deep",
        ),
    ],
)
def test_a_file_that_is_no_good_fails_the_batch_with_the_reason(
    worker: Worker, data: bytes, code: str, words: str
) -> None:
    job = worker.submit("table", data, output_names=["TWICE"])
    worker.work()
    row = worker.row(job)
    assert row.state == "failed"
    (error,) = row.errors
    assert error.keys() == {"code", "line", "message", "param"}
    assert error["code"] == code
    assert re.search(words, error["message"])


def test_damage_in_the_middle_of_a_parquet_file_fails_the_batch(worker: Worker) -> None:
    good = written(
        {"A": as_lists(pairs(2000))}, row_group_size=100, write_page_checksum=True, compression=None
    )
    for at in (len(good) // 2, len(good) // 3, 4):
        data = good[:at] + bytes(255 - byte for byte in good[at : at + 40]) + good[at + 40 :]
        job = worker.submit("table", data)
        worker.work()
        row = worker.row(job)
        assert row.state == "failed"
        assert row.errors[0]["code"] == "invalid_file"
