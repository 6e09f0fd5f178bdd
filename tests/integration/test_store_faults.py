"""A store that fails by chance: nothing is lost, nothing is doubled, and no rubbish stays."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from config import parse_objects
from inference.tensors import InferResult
from storage.objects import open_store
from tasks import bootstrap, retention
from tests.integration.faults import FaultyStore
from tests.integration.test_tasks import Worker, fake, ints, line, worker

__all__ = ["fake", "worker"]

ROUNDS = 500


def troubled(worker: Worker, *, rate: float, seed: int, url: str | None = None) -> FaultyStore:
    """The worker's store fails from now on."""
    store = open_store(url) if url else worker.services.objects
    faulty = FaultyStore(store, rate=rate, seed=seed)
    worker.services = replace(worker.services, objects=faulty)
    bootstrap.install(worker.services)
    return faulty


def end(worker: Worker, *jobs: UUID) -> None:
    """Work until these have ended, without waiting for the moments of their retries."""
    for _ in range(ROUNDS):
        worker.work(ROUNDS)
        pulses = worker.services.jobs.pulses(jobs)
        if all(pulses[job].state.terminal for job in jobs):
            return
        with worker.services.database.transaction() as connection:
            connection.exec_driver_sql(
                "UPDATE chunks SET not_before = now() WHERE group_name = %s",
                (worker.services.group,),
            )
    raise AssertionError("the work does not end")


def calm(worker: Worker) -> None:
    """The store is well again."""
    worker.services.objects._rate = 0.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", ["directory", "s3"])
@pytest.mark.parametrize(("rate", "seed"), [(0.1, 1), (0.1, 2), (0.3, 3)])
def test_a_batch_answers_every_line_once_whatever_the_store_does(
    worker: Worker, rate: float, seed: int, where: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("s3").url() if where == "s3" else None
    lines = [line(n) for n in range(1, 41)]
    lines[20] = line(21, fail="not this one")
    faulty = troubled(worker, rate=0, seed=seed, url=url)
    job = worker.batch(lines)
    faulty._rate = rate
    end(worker, job)
    calm(worker)
    row = worker.row(job)
    assert (row.state, row.items_ok, row.items_failed) == ("succeeded", 39, 1)
    answers = [
        (found["custom_id"], found["response"]["body"]["outputs"][0]["data"][0])
        for found in worker.file(row.output_file_id)
    ]
    assert sorted(answers) == sorted((f"row-{n}", n) for n in range(1, 41) if n != 21)
    assert [found["custom_id"] for found in worker.file(row.error_file_id)] == ["row-21"]
    assert faulty.faults["put"] or faulty.faults["read"]
    assert sum(faulty.faults.values()) >= 3


@pytest.mark.parametrize("worker", [{"inline_bytes": 1000}], indirect=True)
def test_large_results_are_whole_or_not_there(worker: Worker) -> None:
    faulty = troubled(worker, rate=0.3, seed=4)
    jobs = {n: worker.submit(ints(*range(n, n + 1000))) for n in range(20)}
    end(worker, *jobs.values())
    calm(worker)
    for n, job in jobs.items():
        outcome = worker.result(job)
        assert isinstance(outcome, InferResult)
        expected = b"".join(value.to_bytes(8, "little") for value in range(n, n + 1000))
        assert bytes(outcome.outputs[0].data) == expected
    assert faulty.faults["put, after success"]


def test_what_failed_puts_left_is_collected_by_a_store_that_fails_too(
    worker: Worker, tmp_path: Path
) -> None:
    url = (tmp_path / "objects").as_uri()
    faulty = troubled(worker, rate=0, seed=5, url=url)
    job = worker.batch([line(n) for n in range(1, 41)])
    faulty._rate = 0.2
    end(worker, job)
    calm(worker)
    row = worker.row(job)
    folder = parse_objects(url)
    assert isinstance(folder, Path)
    everything = list(faulty.list())
    for one in everything:
        os.utime(folder / one.key, (0, 0))
    named = {
        worker.services.files.get(worker.tenant, file_id).key
        for file_id in (row.input_file_id, row.output_file_id)
    }
    assert len(everything) > len(named)

    def left() -> set[str]:
        return {one.key for one in faulty.list() if not one.key.startswith("collector/")}

    faulty._rate = 0.1
    for _ in range(ROUNDS):
        retention.run(worker.services)
        faulty._rate, before = 0.0, faulty._rate
        if left() == named:
            break
        faulty._rate = before
    assert left() == named
