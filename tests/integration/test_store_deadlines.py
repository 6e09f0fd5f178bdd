"""A store that has stalled holds nobody up for longer than they have time."""

from __future__ import annotations

import io
import secrets
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import pytest
import uuid_utils.compat as uuids
from flask import Flask, g

from errors import DeadlineExceeded
from inference import frames
from storage.lifecycle import JobKind, JobState
from storage.objects import ObjectStore, open_store
from storage.work import NewJob
from tasks import bootstrap
from tasks.chunks import run_chunks
from tests.integration.test_tasks import Worker, again_at_once, fake, ints, line, worker
from web import durable
from web.app import create_app
from web.context import Gateway
from workers import sweeper

__all__ = ["fake", "worker"]

PATIENCE = 30
"""Seconds after which a test fails; the store's own timeouts would take a minute."""


@pytest.fixture
def stalled() -> Iterator[ObjectStore]:
    """An S3 that takes connections, and says nothing. With the timeouts of every day."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        port = listening.getsockname()[1]
        yield open_store(f"s3://key:secret@127.0.0.1:{port}/bucket?secure=false")


def stall(worker: Worker, stalled: ObjectStore) -> None:
    """The worker's store answers no more."""
    worker.services = replace(worker.services, objects=stalled)
    bootstrap.install(worker.services)


def large(worker: Worker, deadline: float) -> UUID:
    """Submit a job whose input is in the store."""
    job = NewJob(
        id=uuids.uuid7(),
        tenant_id=worker.tenant,
        group=worker.services.group,
        model="identity",
        version="",
        deadline=deadline,
        input_key=f"jobs/{worker.tenant.hex}/x/input",
    )
    worker.services.jobs.submit([job])
    return job.id


def run(worker: Worker) -> None:
    """Run what there is in a slot, which must be free again soon."""
    (chunk,) = worker.release()
    running = threading.Thread(target=run_chunks.apply, kwargs={"kwargs": {"ids": [chunk]}})
    running.start()
    running.join(PATIENCE)
    assert not running.is_alive()


def test_a_job_that_waits_for_its_input_expires_in_time_and_frees_its_slot(
    worker: Worker, stalled: ObjectStore
) -> None:
    stall(worker, stalled)
    job = large(worker, deadline=1.5)
    run(worker)
    sweeper.sweep(worker.services)
    assert (worker.row(job).state, worker.row(job).attempts) == ("expired", 1)


@pytest.mark.parametrize("worker", [{"inline_bytes": 1}], indirect=True)
def test_a_job_whose_answer_is_not_stored_in_time_expires_and_frees_its_slot(
    worker: Worker, stalled: ObjectStore
) -> None:
    stall(worker, stalled)
    job = worker.submit(ints(1), deadline=1.5)
    run(worker)
    sweeper.sweep(worker.services)
    assert worker.row(job).state == "expired"


def test_a_neighbour_with_time_left_is_run_all_the_same(
    worker: Worker, stalled: ObjectStore
) -> None:
    stall(worker, stalled)
    late, inline = large(worker, deadline=1.5), worker.submit(ints(1), deadline=60)
    ids = worker.release()
    assert len(ids) == 2
    running = threading.Thread(target=run_chunks.apply, kwargs={"kwargs": {"ids": ids}})
    running.start()
    running.join(PATIENCE)
    assert not running.is_alive()
    sweeper.sweep(worker.services)
    assert worker.row(late).state == "expired"
    assert worker.row(inline).state == "succeeded"


def deadline_passes_soon(worker: Worker, job: UUID) -> None:
    with worker.services.database.transaction() as connection:
        connection.exec_driver_sql(
            "UPDATE jobs SET deadline_at = now() + interval '1.5 s' WHERE id = %s", (job,)
        )


@pytest.mark.parametrize("planned", [False, True])
def test_a_batch_that_waits_for_its_file_frees_its_slot_in_time(
    worker: Worker, stalled: ObjectStore, planned: bool
) -> None:
    job = worker.batch([line(1)])
    objects = worker.services.objects
    if planned:
        (chunk,) = worker.release()
        run_chunks.apply(kwargs={"ids": [chunk]}, throw=True)
    deadline_passes_soon(worker, job)
    stall(worker, stalled)
    run(worker)
    sweeper.sweep(worker.services)
    if planned:
        # Well again, the store takes what there is to say.
        assert worker.row(job).state == "finalizing"
        worker.services = replace(worker.services, objects=objects)
        sweeper.finish(worker.services, worker.services.leases, "sweeper")
    row = worker.row(job)
    assert row.state == "expired"
    assert planned == bool(worker.file(row.error_file_id))


HASTY = {"attempt_timeout": 0.6, "lease": 0.3, "sweep_interval": 0.1, "max_attempts": 2}


@pytest.mark.parametrize("worker", [HASTY], indirect=True)
@pytest.mark.parametrize("kind", ["job", "batch", "files"])
def test_an_attempt_that_the_store_takes_the_time_of_is_not_counted(
    worker: Worker, stalled: ObjectStore, kind: str
) -> None:
    objects = worker.services.objects
    job = large(worker, deadline=600) if kind == "job" else worker.batch([line(1)])
    if kind == "files":
        for _ in range(2):  # read in, run
            (chunk,) = worker.release()
            run_chunks.apply(kwargs={"ids": [chunk]}, throw=True)
        assert worker.row(job).state == "finalizing"
    stall(worker, stalled)
    for _ in range(3):
        run(worker)
        again_at_once(worker)
    assert not JobState(worker.row(job).state).terminal
    if kind == "job":
        objects.put(f"jobs/{worker.tenant.hex}/x/input", frames.encode_requests([ints(1)]))
    worker.services = replace(worker.services, objects=objects)
    bootstrap.install(worker.services)
    worker.work()
    assert worker.row(job).state == "succeeded"


# The gateway


@pytest.fixture
def app(worker: Worker, stalled: ObjectStore) -> Iterator[Flask]:
    made = create_app(worker.services.settings, replace(worker.services, objects=stalled))
    yield made
    parts: Gateway = made.extensions["tidegate"]
    parts.recorder.stop()
    parts.lane.stop()


def test_a_large_input_is_refused_when_its_jobs_time_is_over(worker: Worker, app: Flask) -> None:
    with app.test_request_context():
        g.tenant = worker.tenant
        with pytest.raises(DeadlineExceeded):
            durable.submit(ints(*range(10_000)), within=1.0)
    kinds = list(JobKind)
    assert worker.services.jobs.list(worker.tenant, after=None, limit=10, kinds=kinds) == []


def test_a_files_bytes_are_waited_for_until_the_requests_deadline(
    worker: Worker, app: Flask
) -> None:
    key = worker.services.keys.create(secrets.token_hex(4))
    worker.tenant = worker.services.keys.tenant_of(key)
    file = f"/v1/files/file-{worker.upload(b'{}').hex}"
    headers = {"X-API-Key": key, "Tidegate-Deadline": "0.5"}
    client = app.test_client()
    form = {"purpose": "batch", "file": (io.BytesIO(b"{}"), "in.jsonl")}
    for reply in (
        client.post("/v1/files", data=form, headers=headers),
        client.get(f"{file}/content", headers=headers),
        client.delete(file, headers=headers),
    ):
        assert (reply.status_code, reply.get_json()["error"]["code"]) == (504, "deadline_exceeded")
    headers["Tidegate-Deadline"] = "soon"
    refused = client.get(f"{file}/content", headers=headers)
    assert (refused.status_code, refused.get_json()["error"]["param"]) == (400, "Tidegate-Deadline")
