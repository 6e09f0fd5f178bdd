"""Tasks, run eagerly on real stores against a fake Triton that can be told to misbehave."""

from __future__ import annotations

import base64
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from types import NoneType, SimpleNamespace
from typing import Any
from uuid import UUID

import grpc
import kombu
import pytest
import uuid_utils.compat as uuids
from celery import current_app
from kombu.utils.encoding import bytes_to_str

from config import MIB, Settings
from errors import (
    Cancelled,
    DeadlineExceeded,
    ModelFailed,
    ModelNotReady,
    ServerLost,
    TidegateError,
    Unavailable,
)
from inference import frames
from inference.client import CancelToken, TritonServer
from inference.fake import Delay, Fail, FakeTriton
from inference.metadata import ModelSpec
from inference.tensors import InferRequest, InferResult, Outcome, Tensor
from storage.chunks import Chunks
from storage.dead_letters import LetterFilter
from storage.files import FileRow, file_key
from storage.redis_state import RedisState, Where
from storage.work import Done, Hint, NewBatch, NewJob
from tasks import attempts, batches, bootstrap, messages, pipeline
from tasks.batch_lines import Line
from tasks.bootstrap import WorkerServices, build_worker_services
from tasks.budget import RetryBudget
from tasks.chunks import run_chunks
from tasks.line_format import _Packer
from tasks.pump import Pump, publish
from tasks.realtime import run_query, run_realtime
from tasks.running import Running
from workers import sweeper
from workers.app import build_app

ENDPOINT = "/v2/models/identity/infer"


@dataclass
class Worker:
    """One GPU worker without its process: hints go straight to the task."""

    services: WorkerServices
    fake: FakeTriton
    tenant: UUID
    hints: list[Hint]

    def work(self, rounds: int = 20) -> None:
        """Release and run until nothing is left to release."""
        for _ in range(rounds):
            released = self.services.backlog.release(self.services.group)
            if not released:
                return
            for hint in released:
                run_chunks.apply(kwargs={"ids": list(hint.ids), "alone": hint.alone}, throw=True)
        raise AssertionError("the work does not end")

    def release(self) -> list[int]:
        return [n for hint in self.services.backlog.release(self.services.group) for n in hint.ids]

    def submit(self, request: InferRequest, deadline: float = 60) -> UUID:
        job = NewJob(
            id=uuids.uuid7(),
            tenant_id=self.tenant,
            group=self.services.group,
            model=request.model,
            version=request.version,
            deadline=deadline,
            input=frames.encode_requests([request]),
        )
        self.services.jobs.submit([job])
        return job.id

    def upload(self, text: bytes) -> UUID:
        file_id = uuids.uuid7()
        key = file_key(self.tenant, file_id)
        self.services.objects.put(key, text)
        self.services.files.add(FileRow(file_id, self.tenant, "batch", "in", len(text), key))
        return file_id

    def batch(self, lines: list[Any]) -> UUID:
        """Submit a batch; a line is a document or raw bytes."""
        text = b"\n".join(
            line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines
        )
        job = NewJob(
            id=uuids.uuid7(),
            tenant_id=self.tenant,
            group=self.services.group,
            model="identity",
            version="",
            deadline=600,
        )
        self.services.jobs.submit_batch(job, NewBatch(ENDPOINT, "24h", self.upload(text)))
        return job.id

    def row(self, job_id: UUID) -> Any:
        return self.services.jobs.get(self.tenant, job_id)

    def result(self, job_id: UUID) -> InferResult | TidegateError:
        frame, key = self.services.jobs.result(self.tenant, job_id)
        return frames.decode_outcomes(frame or self.services.objects.get(key or ""))[0]

    def file(self, file_id: UUID | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        row = self.services.files.get(self.tenant, file_id)
        text = self.services.objects.get(row.key)
        assert len(text) == row.bytes
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeTriton]:
    with FakeTriton() as fake:
        yield fake


@pytest.fixture
def worker(
    settings: Settings, fake: FakeTriton, request: pytest.FixtureRequest
) -> Iterator[Worker]:
    """A worker with a tenant and a group of the test's own; `settings` may be changed by a mark."""
    group = f"g{secrets.token_hex(4)}"
    own = replace(
        settings,
        group=group,
        triton_url=fake.address,
        chunk_items=4,
        max_batch_lines=1000,
        catalog_ttl=0.001,
    )
    own = replace(own, **getattr(request, "param", {}))
    build_app(own)
    hints: list[Hint] = []
    services = build_worker_services(own, name="worker", group=group)
    services = replace(services, pump=Pump(services.backlog, hints.append))
    # What is left to release is released by the test.
    services.pump.stop()
    bootstrap.install(services)
    tenant = services.keys.tenant_of(services.keys.create(secrets.token_hex(4)))
    fake.script("identity", [])
    yield Worker(services, fake, tenant, hints)
    services.close()


def ints(*values: int, **parameters: Any) -> InferRequest:
    data = b"".join(value.to_bytes(8, "little") for value in values)
    tensor = Tensor("INTS", "INT64", (1, len(values)), data)
    return InferRequest("identity", "", (tensor,), (), parameters, "")


def line(number: int, **parameters: Any) -> dict[str, Any]:
    return {
        "custom_id": f"row-{number}",
        "method": "POST",
        "url": ENDPOINT,
        "body": {
            "inputs": [
                {"name": "INTS", "shape": [1, 1], "datatype": "INT64", "data": [number]},
            ],
            "parameters": parameters,
        },
    }


def test_one_item_jobs_named_by_one_hint_share_triton_calls(worker: Worker) -> None:
    before = worker.fake.counts("identity").received
    jobs = [worker.submit(ints(n)) for n in range(30)]
    worker.work()
    for n, job in enumerate(jobs):
        outcome = worker.result(job)
        assert isinstance(outcome, InferResult)
        assert bytes(outcome.outputs[0].data) == n.to_bytes(8, "little")
    assert worker.fake.counts("identity").received - before < 5


@pytest.mark.parametrize("worker", [{"inline_bytes": 1000}], indirect=True)
def test_a_large_result_goes_to_the_object_store(worker: Worker) -> None:
    job = worker.submit(ints(*range(1000)))
    worker.work()
    frame, key = worker.services.jobs.result(worker.tenant, job)
    assert frame is None
    assert key
    assert isinstance(worker.result(job), InferResult)


def test_a_job_the_model_fails_at_fails_alone_and_with_the_models_words(worker: Worker) -> None:
    good, bad = worker.submit(ints(1)), worker.submit(ints(2, fail="no threes"))
    worker.work()
    assert worker.row(good).state == "succeeded"
    row = worker.row(bad)
    assert (row.state, row.error["code"]) == ("failed", ModelFailed.code)
    assert "no threes" in row.error["message"]


def test_a_job_whose_input_is_gone_fails_alone(worker: Worker) -> None:
    good = [worker.submit(ints(n)) for n in range(3)]
    bad = worker.submit(ints(9))
    with worker.services.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE jobs SET input = NULL, input_key = 'nothing/there' WHERE id = %s", (bad,)
        )
    worker.work()
    assert [worker.row(job).state for job in good] == ["succeeded"] * 3
    row = worker.row(bad)
    assert (row.state, row.error["code"]) == ("failed", "gone")


def test_a_job_the_database_cannot_keep_fails_alone(worker: Worker) -> None:
    good, bad = worker.submit(ints(1)), worker.submit(ints(2, fail="a NUL: \0"))
    worker.work()
    assert (worker.row(good).state, worker.row(bad).state) == ("succeeded", "failed")


def test_a_line_whose_answer_has_no_form_in_json_fails_alone(worker: Worker) -> None:
    lines = [line(n) for n in range(1, 5)]
    for n in (1, 2):
        lines[n]["body"]["inputs"] = [
            {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["fine"]}
        ]
    job = worker.batch(lines)
    run_chunks.apply(kwargs={"ids": worker.release()}, throw=True)
    with pytest.MonkeyPatch.context() as patch:
        start = worker.services.server.start

        def spoilt(request: Any, *args: Any) -> Any:
            outcome = start(request, *args)()
            if isinstance(outcome, InferResult) and outcome.outputs[0].datatype == "BYTES":
                assert outcome.outputs[0].shape == (2, 1)
                bad = b"\x02\0\0\0\xff\xfe\x04\0\0\0fine"
                outcome = replace(outcome, outputs=(Tensor("TEXT_OUT", "BYTES", (2, 1), bad),))
            return lambda: outcome

        patch.setattr(worker.services.server, "start", spoilt)
        worker.work()
    row = worker.row(job)
    assert (row.state, row.items_ok, row.items_failed) == ("succeeded", 3, 1)
    (failed,) = worker.file(row.error_file_id)
    assert failed["custom_id"] == "row-2"
    assert "binary" in failed["response"]["body"]["error"]


def lying(queue: str) -> list[kombu.Message]:
    """Takes what lies in a queue of the broker."""
    with current_app.connection_for_read() as connection:
        bound = messages.queue(queue)(connection.default_channel)
        bound.declare()
        return list(iter(partial(bound.get, no_ack=True), None))


def test_a_hint_for_a_group_of_somebody_elses_is_sent_too(worker: Worker) -> None:
    publish(Hint("elsewhere", "m", "", (1, 2)))
    (hint,) = lying(messages.batch_queue("elsewhere"))
    assert json.loads(hint.body)[1]["ids"] == [1, 2]


def test_a_triton_that_is_away_costs_no_attempt(worker: Worker) -> None:
    job = worker.submit(ints(1))
    worker.fake.script("identity", [Fail(grpc.StatusCode.UNAVAILABLE, "shutting down")])
    (chunk,) = worker.release()
    run_chunks.apply(kwargs={"ids": [chunk]}, throw=True)
    assert worker.row(job).state == "running"
    with worker.services.database.transaction() as connection:
        row = connection.exec_driver_sql(
            f"SELECT state, attempts, error ->> 'code' AS code FROM chunks WHERE id = {chunk}"
        ).one()
        connection.exec_driver_sql(f"UPDATE chunks SET not_before = now() WHERE id = {chunk}")
    assert tuple(row) == ("queued", 0, ModelNotReady.code)
    worker.work()
    assert worker.row(job).state == "succeeded"


def test_a_batch_answers_every_good_line_once_and_names_every_bad_one(worker: Worker) -> None:
    lines: list[Any] = [line(n) for n in range(1, 23)]
    lines[2] = b"garbage"
    lines[7] = line(8) | {"url": "/v2/models/other/infer"}
    lines[11] = line(1)
    lines[15] = line(16, fail="not this one")
    lines[18] = b""
    lines[20]["body"]["inputs"][0]["datatype"] = "FP32"
    job = worker.batch(lines)
    worker.work()
    row = worker.row(job)
    assert row.state == "succeeded"
    answers = {
        found["custom_id"]: found["response"]["body"]["outputs"][0]["data"][0]
        for found in worker.file(row.output_file_id)
    }
    bad = {3, 8, 12, 16, 19, 21}
    assert answers == {f"row-{n}": n for n in range(1, 23) if n not in bad}
    errors = worker.file(row.error_file_id)
    told = {e["error"]["line"]: (e["custom_id"], e["error"]["code"]) for e in errors if e["error"]}
    assert told == {
        3: (None, "invalid_json"),
        8: ("row-8", "invalid_url"),
        12: ("row-1", "duplicate_custom_id"),
        21: ("row-21", "bad_tensor"),
    }
    (failed,) = [e for e in errors if e["error"] is None]
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("row-16", 500)
    assert "not this one" in failed["response"]["body"]["error"]
    assert (row.items_total, row.items_ok, row.items_failed) == (21, 16, 5)


@pytest.mark.parametrize("worker", [{"chunk_items": 1000}], indirect=True)
def test_what_a_worker_does_not_get_to_in_time_becomes_chunks_of_their_own(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "TARGET", 0.0)
    lines: list[Any] = [line(n) for n in range(1, 101)]
    lines[49] = b"garbage"
    lines[89] = line(1)
    lines[97] = b" "
    job = worker.batch(lines)
    run_chunks.apply(kwargs={"ids": worker.release()}, throw=True)  # reads the file in
    run_chunks.apply(kwargs={"ids": worker.release()}, throw=True)
    row = worker.row(job)
    # The first lines are done, and the others wait in pieces as large.
    assert (row.items_ok, row.items_total, row.chunks_done, row.chunks_total) == (16, 99, 1, 7)
    worker.work()
    row = worker.row(job)
    assert (row.state, row.items_ok, row.items_failed) == ("succeeded", 97, 2)
    answers = [answer["custom_id"] for answer in worker.file(row.output_file_id)]
    assert answers == [f"row-{n}" for n in range(1, 101) if n not in (50, 90, 98)]
    errors = worker.file(row.error_file_id)
    assert [(one["error"]["line"], one["error"]["code"]) for one in errors] == [
        (50, "invalid_json"),
        (90, "duplicate_custom_id"),
    ]


@pytest.mark.parametrize("worker", [{"chunk_items": 1000}], indirect=True)
def test_a_batch_of_many_chunks_is_not_cut_finer(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "TARGET", 0.0)
    monkeypatch.setattr(batches, "BUSY", 1)
    job = worker.batch([line(n) for n in range(1, 101)])
    run_chunks.apply(kwargs={"ids": worker.release()}, throw=True)
    run_chunks.apply(kwargs={"ids": worker.release()}, throw=True)
    assert (worker.row(job).chunks_done, worker.row(job).chunks_total) == (1, 2)
    worker.work()
    assert (worker.row(job).state, worker.row(job).items_ok) == ("succeeded", 100)


@pytest.mark.parametrize("worker", [{"chunk_items": 1000}], indirect=True)
def test_lines_of_different_shapes_share_calls_with_their_like_and_keep_their_order(
    worker: Worker,
) -> None:
    def ragged(n: int) -> dict[str, Any]:
        rows, width = 1 + n % 2, 1 + n % 3
        data = [n] * (rows * width)
        entry = {"name": "INTS", "shape": [rows, width], "datatype": "INT64", "data": data}
        if n % 7 == 0:
            entry = {"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": [f"{n}"]}
        return line(n) | {"body": {"inputs": [entry]}}

    before = worker.fake.counts("identity").received
    job = worker.batch([ragged(n) for n in range(1, 121)])
    worker.work()
    row = worker.row(job)
    assert (row.state, row.items_ok) == ("succeeded", 120)
    answers = worker.file(row.output_file_id)
    assert [one["custom_id"] for one in answers] == [f"row-{n}" for n in range(1, 121)]
    for n, one in enumerate(answers, start=1):
        (output,) = one["response"]["body"]["outputs"]
        assert output["data"] == (ragged(n)["body"]["inputs"][0]["data"])
        assert output["shape"] == ragged(n)["body"]["inputs"][0]["shape"]
    # Seven kinds, of which the first of each is read with care and so goes apart.
    assert worker.fake.counts("identity").received - before <= 14


@pytest.mark.parametrize(
    ("somebody_waits", "expected"),
    [(False, pipeline.AHEAD_ALONE), (True, pipeline.AHEAD_ALONE // pipeline.LESS)],
    ids=["alone", "beside realtime requests"],
)
def test_a_model_that_takes_one_item_at_a_time_runs_several_at_once(
    somebody_waits: bool, expected: int
) -> None:
    """In the pipeline, without the ledger: who is under way when the first is answered?"""
    under_way: list[int] = []
    most = 0

    def start(request: InferRequest, *_: Any) -> Callable[[], Outcome]:
        nonlocal most
        under_way.append(1)
        most = max(most, len(under_way))

        def wait() -> Outcome:
            under_way.pop()
            return InferResult("m", "1", request.inputs)

        return wait

    packer = _Packer(max_rows=0, max_bytes=MIB)
    packs = [pack for n in range(200) for pack in packer.add(Line(n, str(n), ints(n)))]
    held = SimpleNamespace(
        token=CancelToken(), until=None, claim=SimpleNamespace(token=1), blame=lambda error: error
    )
    spec = ModelSpec("m", "1", "python", (), ())
    services = SimpleNamespace(
        server=SimpleNamespace(start=start),
        budget=RetryBudget(),
        models=SimpleNamespace(spec=lambda *_: spec),
        running=SimpleNamespace(any=lambda: somebody_waits, until_none=lambda _: None),
    )
    found = list(pipeline.run(services, held, iter(packs)))  # type: ignore[arg-type]
    assert [answered.pack for answered in found] == packs
    assert most == expected


@pytest.mark.parametrize("text", [b"", b"\n\n", b"\x89PNG\r\n\x00", b"not json\nnor this"])
def test_a_file_nobody_can_read_fails_validation(worker: Worker, text: bytes) -> None:
    job = worker.batch([text])
    worker.work()
    row = worker.row(job)
    assert row.state == "failed"
    assert row.errors[0]["message"]


def test_a_cancelled_batch_keeps_what_ran_and_says_what_did_not(worker: Worker) -> None:
    job = worker.batch([line(n) for n in range(1, 11)])
    run_chunks.apply(kwargs={"ids": worker.release()}, throw=True)
    first, *_ = worker.release()
    run_chunks.apply(kwargs={"ids": [first]}, throw=True)
    worker.services.jobs.cancel(worker.tenant, job)
    worker.work()
    row = worker.row(job)
    assert row.state == "canceled"
    assert len(worker.file(row.output_file_id)) == 4
    errors = worker.file(row.error_file_id)
    assert [error["custom_id"] for error in errors] == [f"row-{n}" for n in range(5, 11)]
    assert {error["error"]["code"] for error in errors} == {"batch_cancelled"}


@pytest.mark.parametrize("worker", [{"hint_timeout": 0.001}], indirect=True)
def test_a_batch_ends_by_its_deadline_though_every_worker_is_gone(worker: Worker) -> None:
    job = worker.batch([line(n) for n in range(1, 6)])
    until(lambda: sweeper.finish(worker.services, worker.services.leases, "sweeper") == 1)
    assert worker.row(job).state == "running"
    with worker.services.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE jobs SET deadline_at = now() - interval '1 s' WHERE id = %s", (job,)
        )
    sweeper.sweep(worker.services)
    assert worker.row(job).state == "finalizing"
    sweeper.finish(worker.services, worker.services.leases, "sweeper")
    row = worker.row(job)
    assert row.state == "expired"
    codes = [error["error"]["code"] for error in worker.file(row.error_file_id)]
    assert codes == ["batch_expired"] * 5


def test_the_sweeper_leaves_fresh_work_to_the_workers(worker: Worker) -> None:
    worker.batch([line(1)])
    assert sweeper.finish(worker.services, worker.services.leases, "sweeper") == 0


@pytest.mark.parametrize("worker", [{"lease": 0.6, "sweep_interval": 0.2}], indirect=True)
def test_a_lease_is_renewed_while_the_model_is_slow(worker: Worker) -> None:
    job = worker.submit(ints(1))
    worker.fake.script("identity", [Delay(1.5)])
    (chunk,) = worker.release()
    running = threading.Thread(target=run_chunks.apply, kwargs={"kwargs": {"ids": [chunk]}})
    running.start()
    stolen = 0
    while running.is_alive():
        stolen += worker.services.backlog.sweep().leases
        running.join(0.05)
    assert stolen == 0
    assert (worker.row(job).state, worker.row(job).attempts) == ("succeeded", 1)


@pytest.mark.parametrize("worker", [{"lease": 0.6, "sweep_interval": 0.2}], indirect=True)
def test_a_job_cancelled_while_it_runs_is_called_off_at_the_model(worker: Worker) -> None:
    before = worker.fake.counts("identity").cancelled
    job = worker.submit(ints(1))
    worker.fake.script("identity", [Delay(30)])
    (chunk,) = worker.release()
    running = threading.Thread(target=run_chunks.apply, kwargs={"kwargs": {"ids": [chunk]}})
    running.start()
    until(lambda: worker.row(job).state == "running")
    worker.services.jobs.cancel(worker.tenant, job)
    running.join(20)
    assert not running.is_alive()
    assert worker.row(job).state == "canceled"
    until(lambda: worker.fake.counts("identity").cancelled == before + 1)


def test_of_two_jobs_at_the_model_the_one_called_off_ends_alone(worker: Worker) -> None:
    before = worker.fake.counts("identity").cancelled
    kept, gone = (worker.submit(ints(n, n=n)) for n in range(2))
    worker.fake.script("identity", [Delay(30), Delay(30)])
    ids = worker.release()
    running = threading.Thread(target=run_chunks.apply, kwargs={"kwargs": {"ids": ids}})
    running.start()
    until(lambda: worker.row(kept).state == worker.row(gone).state == "running")
    worker.services.jobs.cancel(worker.tenant, gone)
    until(lambda: worker.fake.counts("identity").cancelled == before + 1)
    assert running.is_alive()
    worker.services.jobs.cancel(worker.tenant, kept)
    running.join(20)
    assert not running.is_alive()
    until(lambda: worker.fake.counts("identity").cancelled == before + 2)


def test_a_job_whose_time_is_over_expires_beside_one_with_time_left(worker: Worker) -> None:
    late, early = worker.submit(ints(1, n=1), deadline=1.0), worker.submit(ints(2, n=2))
    worker.fake.script("identity", [Delay(2.0), Delay(2.0)])
    worker.work()
    assert (worker.row(late).state, worker.row(early).state) == ("expired", "succeeded")


HASTY = {"attempt_timeout": 0.6, "lease": 0.3, "sweep_interval": 0.1, "max_attempts": 3}


def again_at_once(worker: Worker) -> None:
    """Nobody waits for a backoff here."""
    with worker.services.database.transaction() as connection:
        connection.exec_driver_sql("UPDATE chunks SET not_before = now() WHERE state = 'queued'")


@pytest.mark.parametrize("worker", [HASTY], indirect=True)
def test_a_job_that_hangs_is_given_up_after_its_attempts(worker: Worker) -> None:
    job = worker.submit(ints(1))
    for _ in range(3):
        worker.fake.script("identity", [Delay(30)])
        worker.work()
        again_at_once(worker)
    row = worker.row(job)
    assert (row.state, row.attempts, row.error["code"]) == ("failed", 3, "attempt_overran")


@pytest.mark.parametrize("worker", [HASTY], indirect=True)
def test_a_line_that_hangs_is_given_up_alone(worker: Worker) -> None:
    lines = [line(n) for n in range(1, 5)]
    lines[2] = line(3, hang=True)
    start = worker.services.server.start

    def hanging(request: Any, deadline: Any, cancelled: Any) -> Any:
        if not request.parameters.get("hang"):
            return start(request, deadline, cancelled)
        called_off = threading.Event()
        cancelled.then(called_off.set)

        def wait() -> Outcome:
            called_off.wait(20)
            return Cancelled("called off")

        return wait

    job = worker.batch(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.services.server, "start", hanging)
        for _ in range(8):
            worker.work()
            again_at_once(worker)
    row = worker.row(job)
    assert (row.state, row.items_ok, row.items_failed) == ("succeeded", 3, 1)
    answers = [answer["custom_id"] for answer in worker.file(row.output_file_id)]
    assert answers == ["row-1", "row-2", "row-4"]
    (failed,) = worker.file(row.error_file_id)
    assert (failed["custom_id"], failed["error"]["code"]) == ("row-3", "attempt_overran")
    (letter,) = worker.services.dead_letters.list(
        worker.tenant, after=None, limit=10, chosen=LetterFilter(job_id=job)
    )
    assert (letter.first_line, letter.item_count, letter.attempts) == (3, 1, 3)


def test_slow_jobs_are_committed_after_their_neighbours(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[set[int]] = []
    held: list[int] = []
    commit = Chunks.commit

    def watched(chunks: Chunks, done: Sequence[Done]) -> set[int]:
        committed = commit(chunks, done)
        commits.append(committed)
        held.append(len(worker.services.leases._held))
        return committed

    monkeypatch.setattr(Chunks, "commit", watched)
    quick = [worker.submit(ints(n)) for n in range(10)]
    slow = worker.submit(ints(99, delay_ms=1500))
    worker.work()
    assert {worker.row(job).state for job in [*quick, slow]} == {"succeeded"}
    assert [len(one) for one in commits if one] == [10, 1]
    # What has been committed is not held any longer.
    assert held[:2] == [11, 1]


def test_jobs_that_end_together_are_committed_together(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[int] = []
    commit = Chunks.commit

    def watched(chunks: Chunks, done: Sequence[Done]) -> set[int]:
        commits.append(len(done))
        return commit(chunks, done)

    monkeypatch.setattr(Chunks, "commit", watched)
    # As long as a busy machine takes.
    monkeypatch.setattr(attempts, "GATHER", 10)
    jobs = [worker.submit(ints(n, delay_ms=n % 2)) for n in range(10)]
    worker.work()
    assert {worker.row(job).state for job in jobs} == {"succeeded"}
    assert [count for count in commits if count] == [10]


def test_an_input_that_takes_triton_down_is_given_up_and_its_neighbours_are_not(
    worker: Worker,
) -> None:
    infer_in_parts = worker.services.server.infer_in_parts

    def dying(requests: Any, deadlines: Any, hand_out: Any, cancelled: Any, **named: Any) -> None:
        if any(one.parameters.get("poison") for one in requests):
            lost = ServerLost("it went away in the middle of the call")
            hand_out(dict.fromkeys(range(len(requests)), lost))
        else:
            infer_in_parts(requests, deadlines, hand_out, cancelled, **named)

    good = [worker.submit(ints(n)) for n in range(10)]
    bad = worker.submit(ints(99, poison=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.services.server, "infer_in_parts", dying)
        for _ in range(4):
            worker.work()
            again_at_once(worker)
    assert {worker.row(job).state for job in good} == {"succeeded"}
    row = worker.row(bad)
    assert (row.state, row.attempts, row.error["code"]) == ("failed", 3, "model_server_lost")


def test_a_lines_own_timeout_is_not_what_it_is_judged_by(worker: Worker) -> None:
    job = worker.batch([line(1, timeout=1), line(2)])
    worker.work()
    assert (worker.row(job).state, worker.row(job).items_ok) == ("succeeded", 2)


def test_a_last_attempt_in_company_is_put_back_to_run_alone(worker: Worker) -> None:
    first, second = worker.submit(ints(1)), worker.submit(ints(2))
    ids = worker.release()
    with worker.services.database.transaction() as connection:
        connection.exec_driver_sql(f"UPDATE chunks SET attempts = 2 WHERE id = {ids[0]}")
    run_chunks.apply(kwargs={"ids": ids}, throw=True)
    assert (worker.row(first).state, worker.row(second).state) == ("running", "succeeded")
    again_at_once(worker)
    (hint,) = worker.services.backlog.release(worker.services.group)
    assert (hint.ids, hint.alone) == ((ids[0],), True)
    run_chunks.apply(kwargs={"ids": ids, "alone": True}, throw=True)
    assert worker.row(first).state == "succeeded"


def test_a_worker_told_to_stop_gives_back_what_it_runs_and_it_costs_no_attempt(
    worker: Worker,
) -> None:
    worker.submit(ints(1))
    worker.fake.script("identity", [Delay(30)])
    ids = worker.release()
    running = threading.Thread(target=run_chunks.apply, kwargs={"kwargs": {"ids": ids}})
    before = worker.fake.counts("identity").received
    running.start()
    until(lambda: worker.fake.counts("identity").received > before)
    worker.services.leases.drain()
    running.join(20)
    with worker.services.database.transaction() as connection:
        row = connection.exec_driver_sql(
            f"SELECT state, attempts FROM chunks WHERE id = {ids[0]}"
        ).one()
    assert tuple(row) == ("queued", 0)


def test_a_model_that_is_away_is_not_stormed(worker: Worker) -> None:
    for _ in range(20):
        worker.services.budget.record("identity", away=True)
        if not worker.services.budget.allow("identity", again=True):
            break
    before = worker.fake.counts("identity").received
    job = worker.submit(ints(1))
    worker.work()
    assert worker.fake.counts("identity").received == before
    with worker.services.database.transaction() as connection:
        row = connection.exec_driver_sql(
            "SELECT state, attempts FROM chunks WHERE job_id = %s", (job,)
        ).one()
    assert tuple(row) == ("queued", 0)
    worker.services.budget.record("identity", away=False)


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it never happened")


def send(worker: Worker, requests: list[InferRequest], deadlines: list[float]) -> tuple[str, bytes]:
    """A realtime message, as a gateway would store it."""
    message = secrets.token_bytes(16)
    worker.services.state.put_blob(message, frames.encode_requests(requests), max(deadlines))
    return message.hex(), message


def replies(worker: Worker, gateway: str) -> list[InferResult | TidegateError]:
    found = worker.services.state.next_reply(gateway, timeout=5)
    assert found is not None
    return frames.decode_outcomes(found[1])


def parts(worker: Worker, gateway: str) -> list[Outcome | None]:
    """One reply, which may leave some to a later one."""
    found = worker.services.state.next_reply(gateway, timeout=5)
    assert found is not None
    return frames.decode_part(found[1])


def test_a_realtime_message_is_run_once_and_answered(worker: Worker) -> None:
    name, _ = send(worker, [ints(1), ints(2)], [30, 30])
    gateway = secrets.token_hex(4)
    for _ in range(2):
        run_realtime.apply(kwargs={"message": name, "gateway": gateway, "deadlines": [30, 30]})
    first, second = replies(worker, gateway)
    assert isinstance(first, InferResult)
    assert isinstance(second, InferResult)
    assert worker.services.state.next_reply(gateway, timeout=0.1) is None


def test_a_request_that_is_too_late_is_not_run_and_its_neighbour_is(worker: Worker) -> None:
    name, message = send(worker, [ints(1), ints(2)], [0.2, 30])
    with worker.services.state._redis.pipeline() as pipe:
        key = worker.services.state._key("blob", name)
        pipe.pexpire(key, 29_000)
        pipe.execute()
    before = worker.fake.counts("identity").rows
    gateway = secrets.token_hex(4)
    run_realtime.apply(kwargs={"message": name, "gateway": gateway, "deadlines": [0.2, 30]})
    late, good = replies(worker, gateway)
    assert isinstance(late, DeadlineExceeded)
    assert isinstance(good, InferResult)
    assert worker.fake.counts("identity").rows == before + 1
    assert message.hex() == name


def test_one_bad_request_of_a_message_fails_alone(worker: Worker) -> None:
    name, _ = send(worker, [ints(1), ints(2, fail="x"), ints(3)], [30, 30, 30])
    gateway = secrets.token_hex(4)
    run_realtime.apply(kwargs={"message": name, "gateway": gateway, "deadlines": [30, 30, 30]})
    kinds = [type(outcome) for outcome in replies(worker, gateway)]
    assert kinds == [InferResult, ModelFailed, InferResult]


def test_a_slow_request_of_a_message_is_answered_after_its_neighbours(worker: Worker) -> None:
    name, _ = send(worker, [ints(1), ints(2, delay_ms=1500), ints(3)], [30, 30, 30])
    gateway = secrets.token_hex(4)
    run_realtime.apply(kwargs={"message": name, "gateway": gateway, "deadlines": [30, 30, 30]})
    first, second = (parts(worker, gateway) for _ in range(2))
    assert [type(outcome) for outcome in first] == [InferResult, NoneType, InferResult]
    assert [type(outcome) for outcome in second] == [NoneType, InferResult, NoneType]
    assert worker.services.state.next_reply(gateway, timeout=0.1) is None


def test_each_request_of_a_message_has_its_own_deadline(worker: Worker) -> None:
    requests = [ints(1, delay_ms=1500), ints(2, delay_ms=20_000), ints(3)]
    name, _ = send(worker, requests, [30, 0.5, 30])
    gateway = secrets.token_hex(4)
    run_realtime.apply(kwargs={"message": name, "gateway": gateway, "deadlines": [30, 0.5, 30]})
    told = [[type(outcome) for outcome in parts(worker, gateway)] for _ in range(3)]
    assert told == [
        [NoneType, NoneType, InferResult],
        [NoneType, DeadlineExceeded, NoneType],
        [InferResult, NoneType, NoneType],
    ]


def test_when_triton_is_away_the_whole_message_hears_it(worker: Worker) -> None:
    worker.fake.script("identity", [Fail(grpc.StatusCode.UNAVAILABLE, "shutting down")] * 2)
    name, _ = send(worker, [ints(1)], [2])
    gateway = secrets.token_hex(4)
    run_realtime.apply(kwargs={"message": name, "gateway": gateway, "deadlines": [2]})
    (outcome,) = replies(worker, gateway)
    assert isinstance(outcome, Unavailable)
    worker.fake.script("identity", [])


def test_a_message_is_waiting_then_running_then_nowhere(worker: Worker) -> None:
    name, message = send(worker, [ints(1)], [30])
    state = worker.services.state
    running = Running(state, "worker", every=3600)

    def where() -> Where:
        running.say()
        found = state.whereabouts([secrets.token_bytes(16), message])
        assert found[0] is Where.NOWHERE
        return found[1]

    assert where() is Where.WAITING
    assert state.claim_blob(message) is not None
    assert where() is Where.NOWHERE
    with running.message(message):
        assert where() is Where.RUNNING
    # What was said last is believed for a while, though not long.
    assert where() is Where.RUNNING
    key = state._key("running", name)
    assert 0 < state._redis.pttl(key) <= 3000
    assert state._redis.get(key) == b"worker"


def test_a_worker_says_what_it_runs_while_it_runs_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, message = send(worker, [ints(1)], [30])
    running = threading.Event()

    def infer_in_parts(_self: Any, _requests: Any, _deadlines: Any, hand_out: Any) -> None:
        hand_out({0: ModelFailed(str(running.wait(20)))})

    monkeypatch.setattr(TritonServer, "infer_in_parts", infer_in_parts)
    gateway = secrets.token_hex(4)
    asked = {"message": name, "gateway": gateway, "deadlines": [30]}
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(run_realtime.apply, kwargs=asked, throw=True)
        while not ran.done():
            if worker.services.state.whereabouts([message]) == [Where.RUNNING]:
                running.set()
        ran.result()
    (outcome,) = replies(worker, gateway)
    assert isinstance(outcome, ModelFailed)
    assert outcome.message == "True"


def test_an_answer_is_given_once_redis_is_back(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = send(worker, [ints(1)], [30])
    gateway = secrets.token_hex(4)
    reply, refusals = RedisState.reply, [Unavailable("away")] * 2

    def away_at_first(*args: Any) -> None:
        if refusals:
            raise refusals.pop()
        reply(*args)

    monkeypatch.setattr(RedisState, "reply", away_at_first)
    run_realtime.apply(kwargs={"message": name, "gateway": gateway, "deadlines": [30]}, throw=True)
    assert len(replies(worker, gateway)) == 1


def test_an_answer_nobody_waits_for_any_more_is_not_given(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = send(worker, [ints(1)], [0.5])
    tried = 0

    def away(*_: Any) -> None:
        nonlocal tried
        tried += 1
        raise Unavailable("away")

    monkeypatch.setattr(RedisState, "reply", away)
    asked = {"message": name, "gateway": secrets.token_hex(4), "deadlines": [0.5]}
    with pytest.raises(Unavailable):
        run_realtime.apply(kwargs=asked, throw=True)
    assert 1 <= tried <= 4


def test_a_query_is_answered_with_what_triton_says_or_with_its_error(worker: Worker) -> None:
    gateway = secrets.token_hex(4)
    for model in ("identity", "nothing"):
        run_query.apply(
            kwargs={
                "message": secrets.token_hex(16),
                "gateway": gateway,
                "op": "describe",
                "model": model,
                "version": "",
            }
        )
    known = worker.services.state.next_reply(gateway)
    unknown = worker.services.state.next_reply(gateway)
    assert known is not None
    assert unknown is not None
    assert json.loads(known[1])["value"]["metadata"]["name"] == "identity"
    assert json.loads(unknown[1])["error"]["code"] == "model_not_found"


def size(message: kombu.Message) -> int:
    """Its bytes in Redis, where a body is in base64; RabbitMQ needs less."""
    return len(
        json.dumps(
            {
                "body": base64.b64encode(bytes_to_str(message.body).encode()).decode(),
                "content-encoding": message.content_encoding,
                "content-type": message.content_type,
                "headers": message.headers,
                "properties": message.properties,
            },
            default=str,
        )
    )


def test_no_message_is_larger_than_we_promise(worker: Worker) -> None:
    """The largest of each kind, as it lies in the broker."""
    queue = messages.realtime_queue(worker.services.group)
    batch = messages.batch_queue(worker.services.group)
    messages.send(
        messages.REALTIME, queue, message="f" * 32, gateway="f" * 16, deadlines=[299.123] * 64
    )
    messages.send(messages.CHUNKS, batch, ids=[2**53 - n for n in range(64)])
    messages.send(
        messages.QUERY,
        queue,
        message="f" * 32,
        gateway="f" * 16,
        op="statistics",
        model="m" * 255,
        version="9" * 18,
    )
    stored = [message for name in (queue, batch) for message in lying(name)]
    assert len(stored) == 3
    assert max(map(size, stored)) <= messages.MAX_BYTES
