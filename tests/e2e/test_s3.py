"""The whole product with its objects in S3."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ops.embedded import Stack
from storage.objects import ObjectStore, open_store
from tests.conftest import S3Server
from tests.e2e.helpers import (
    IDENTITY,
    Http,
    answered_ints,
    batch_line,
    ended,
    ints,
    until,
    upload,
)

pytestmark = pytest.mark.stack


@dataclass(frozen=True, slots=True)
class OnS3:
    s3: S3Server
    stack: Stack
    server: Http
    objects: ObjectStore

    def stored(self) -> list[str]:
        found = self.objects.list()
        return [one.key for one in found if not one.key.startswith("collector/")]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnS3]:
    s3 = S3Server()
    url = s3.url()
    var = tmp_path_factory.mktemp("s3") / "var"
    with Stack(var, environ=os.environ | {"TIDEGATE_OBJECTS_URL": url}) as stack:
        stack.open()
        stack.start(only=set(stack.processes) - {"flower"})
        yield OnS3(s3, stack, Http.of(stack), open_store(url))
    s3.stop()


def test_a_batch_runs_on_s3_from_its_upload_to_its_download(own: OnS3) -> None:
    file = upload(own.server, *(batch_line(f"row-{n}", ints(n)) for n in range(600)))
    asked = {"input_file_id": file["id"], "endpoint": IDENTITY, "completion_window": "1h"}
    batch = own.server.post("/v1/batches", asked).json()
    done = until(
        lambda: own.server.get(f"/v1/batches/{batch['id']}").json(),
        60,
        lambda batch: batch["status"] in ("completed", "failed", "expired"),
    )
    assert (done["status"], done["request_counts"]["completed"]) == ("completed", 600)
    path = f"/v1/files/{done['output_file_id']}"
    content = own.server.get(f"{path}/content")
    lines = content.body.splitlines()
    assert len(lines) == 600
    assert len(content.body) == own.server.get(path).json()["bytes"]
    assert any(key.startswith("files/") for key in own.stored())
    # It is there, and nowhere else.
    assert [p for p in (own.stack.var / "objects").rglob("*") if p.is_file()] == []

    before = len(own.stored())
    assert own.server("DELETE", path).json()["deleted"]
    assert own.server.get(f"{path}/content").status == 404
    assert len(own.stored()) == before - 1


def test_a_job_with_a_large_input_and_result_runs_on_s3(own: OnS3) -> None:
    values = list(range(30_000))
    job = own.server.post("/v1/jobs", {"model": "identity", "input": ints(*values)})
    assert job.status == 202, job
    assert ended(own.server, job.json()["id"])["status"] == "succeeded"
    result = own.server.get(job.json()["urls"]["result"])
    assert answered_ints(result.json()) == values
    kept = [key.rpartition("/")[2] for key in own.stored() if key.startswith("jobs/")]
    assert {"input", "result"} <= set(kept)


def test_while_s3_is_away_what_needs_it_is_refused_and_the_rest_goes_on(own: OnS3) -> None:
    small = {"model": "identity", "input": ints(1)}
    large = {"model": "identity", "input": ints(*range(10_000))}
    assert own.server.get("/readyz").status == 200
    own.s3.stop()
    try:
        unready = until(lambda: own.server.get("/readyz"), 20, lambda reply: reply.status == 503)
        assert "store" in unready.json()["checks"]["objects"]
        refused = own.server.post("/v1/jobs", large)
        assert refused.status == 503, refused
        assert int(refused.headers["Retry-After"]) >= 1
        job = own.server.post("/v1/jobs", small).json()
        assert ended(own.server, job["id"])["status"] == "succeeded"
        assert own.server.get(job["urls"]["result"]).status == 200
    finally:
        own.s3.start()
    until(lambda: own.server.get("/readyz").status, 20, lambda status: status == 200)
    job = own.server.post("/v1/jobs", large).json()
    assert ended(own.server, job["id"])["status"] == "succeeded"
