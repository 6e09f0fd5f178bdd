"""What clients are told about what is no longer kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from uuid import UUID

import openai
import pytest
import sqlalchemy as sa

from config import DAY, Settings
from ops.embedded import Stack
from storage.ids import IdMint
from tasks import retention
from tasks.bootstrap import Services, build_services
from tests.e2e.helpers import IDENTITY, Http, answered_ints, batch_line, ended, ints, upload

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def services(stack: Stack, stack_settings: Settings) -> Iterator[Services]:
    """What the stack's own sweeper works with, which does the same once a minute."""
    made = build_services(stack_settings, pool_size=2)
    yield made
    made.close()


def older(services: Services, table: str, column: str, row: UUID, seconds: float) -> None:
    with services.database.transaction() as connection:
        changed = connection.execute(
            sa.text(
                f"UPDATE {table} SET {column} = {column} - make_interval(secs => :by)"
                " WHERE id = :id"
            ),
            {"by": seconds, "id": row},
        )
        assert changed.rowcount == 1


@pytest.mark.parametrize("count", [1, 20_000], ids=["small", "large"])
def test_a_result_that_is_gone_is_gone_and_its_job_still_known(
    mine: Http, services: Services, count: int
) -> None:
    values = list(range(count))
    job = mine.post("/v1/jobs", {"model": "identity", "input": ints(*values)}).json()
    assert ended(mine, job["id"])["status"] == "succeeded"
    assert answered_ints(mine.get(job["urls"]["result"]).json()) == values
    older(services, "jobs", "finished_at", UUID(job["id"]), 7 * DAY + 1)
    retention.run(services)
    reply = mine.get(job["urls"]["result"])
    assert (reply.status, reply.json()["code"]) == (410, "gone")
    assert "604800 s" in reply.json()["detail"]
    assert mine.get(job["urls"]["self"]).json()["status"] == "succeeded"

    older(services, "jobs", "finished_at", UUID(job["id"]), 23 * DAY)
    retention.run(services)
    assert mine.get(job["urls"]["self"]).status == 404


def test_a_file_is_gone_once_it_has_expired_whether_or_not_its_bytes_are(
    mine: Http, stranger: Http, services: Services
) -> None:
    file = upload(mine, batch_line("a", ints(1)))
    assert file["expires_at"] - file["created_at"] == 30 * DAY
    path = f"/v1/files/{file['id']}"
    asked = {"input_file_id": file["id"], "endpoint": IDENTITY, "completion_window": "1h"}
    older(services, "files", "expires_at", UUID(file["id"].removeprefix("file-")), 30 * DAY)
    for _ in range(2):
        for reply in (mine.get(path), mine.get(f"{path}/content"), mine("DELETE", path)):
            assert (reply.status, reply.json()["error"]["code"]) == (410, "gone")
        refused = mine.post("/v1/batches", asked)
        assert (refused.status, refused.json()["error"]["param"]) == (410, "input_file_id")
        assert stranger.get(path).status == 404
        assert file["id"] not in {one["id"] for one in mine.get("/v1/files").json()["data"]}
        retention.run(services)


def test_a_file_that_was_deleted_was_never_there(mine: Http, services: Services) -> None:
    file = upload(mine, batch_line("a", ints(1)))
    assert mine("DELETE", f"/v1/files/{file['id']}").status == 200
    retention.run(services)
    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content"):
        assert mine.get(path).status == 404
    asked = {"input_file_id": file["id"], "endpoint": IDENTITY, "completion_window": "1h"}
    refused = mine.post("/v1/batches", asked)
    assert (refused.status, refused.json()["error"]["param"]) == (404, "input_file_id")


def test_the_openai_sdk_reads_when_a_file_expires(mine: Http) -> None:
    key = mine.headers["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{mine.url}/v1", api_key=key, max_retries=0) as client:
        text = batch_line("a", ints(1)).encode()
        kept = client.files.create(file=("in.jsonl", text), purpose="batch")
        short = client.files.create(
            file=("in.jsonl", text),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3600},
        )
    assert kept.expires_at == kept.created_at + 30 * DAY
    assert short.expires_at == short.created_at + 3600


def test_a_realtime_request_is_unknown_once_its_record_is_no_longer_kept(
    mine: Http, services: Services, stack_settings: Settings
) -> None:
    token = mine.headers["Authorization"].removeprefix("Bearer ")
    tenant = services.keys.tenant_of(token)
    for days, status in ((29, 200), (31, 404)):
        moment = time.time() - days * DAY
        mint = IdMint(stack_settings.secret, clock=partial(float, moment))
        assert mine.get(f"/v1/jobs/{mint.mint(tenant)}").status == status
