"""What operators see: health, Flower, the broker, the command line; and what nobody may see."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import redis
import sqlalchemy as sa
import uuid_utils.compat as uuids
from openapi_spec_validator import validate

from config import Settings
from inference import frames
from inference.tensors import InferRequest, Tensor
from ops.embedded import Stack
from storage.backlog import HINT_CHUNKS
from storage.database import Database
from storage.jobs import Jobs
from storage.work import NewJob
from tasks import messages
from tests.e2e.helpers import (
    IDENTITY,
    Http,
    Witness,
    batch_line,
    ended,
    flower,
    ints,
    tensor,
    together,
    until,
    upload,
)
from tests.e2e.traffic import overheard

pytestmark = pytest.mark.stack


WINDOW = 3
"""Messages of a model in flight before requests gather (TIDEGATE_COALESCE_WINDOW)."""


# Health


def test_a_gateway_that_runs_is_alive_and_ready(gateway: Http) -> None:
    anybody = Http(gateway.url)

    assert (anybody.get("/livez").status, anybody.get("/livez").json()) == (200, {"status": "ok"})
    ready = anybody.get("/readyz")
    assert ready.status == 200
    assert ready.json() == {
        "status": "ok",
        "checks": dict.fromkeys(("database", "redis", "objects", "workers"), "ok"),
    }


# The broker


def test_a_message_for_many_requests_is_small(
    stack: Stack, gateway: Http, redis_client: redis.Redis, witness: Witness
) -> None:
    """While a window of messages is in flight, requests gather for the next one."""
    slow = partial(gateway.post, IDENTITY, ints(0, delay_ms=2000))
    with overheard(stack, redis_client) as traffic, ThreadPoolExecutor(WINDOW) as pool:
        for _ in range(WINDOW):
            before = witness.messages()
            pool.submit(slow)
            until(lambda before=before: witness.messages() > before, 10)  # type: ignore[misc]
        replies = together([partial(gateway.post, IDENTITY, ints(n)) for n in range(70)])
    jobs = [gateway.get(f"/v1/jobs/{reply.headers['Tidegate-Job-Id']}").json() for reply in replies]
    sent = [
        message
        for message in traffic.published(messages.realtime_queue("default"))
        if message.task == messages.REALTIME
    ]

    assert {reply.status for reply in replies} == {200}
    # How many travel together depends on how closely 70 threads follow each other.
    assert 2 <= max(job["metrics"]["batch_size"] for job in jobs) <= 64
    assert WINDOW < len(sent) < WINDOW + len(replies)
    assert max(message.size for message in sent) <= messages.MAX_BYTES


def test_a_hint_about_many_jobs_is_small(
    stack: Stack,
    gateway: Http,
    redis_client: redis.Redis,
    stack_settings: Settings,
) -> None:
    """Jobs accepted in one transaction, as under load, are named by one hint."""
    database = Database(stack_settings.database_url, pool_size=1)
    with database.transaction() as connection:
        tenant = connection.execute(
            sa.text("SELECT id FROM tenants WHERE name = 'default'")
        ).scalar_one()
    request = InferRequest("identity", "", (Tensor("INTS", "INT64", (1, 1), bytes(8)),))
    jobs = [
        NewJob(
            id=uuids.uuid7(),
            tenant_id=tenant,
            group=stack_settings.group,
            model="identity",
            version="",
            deadline=60,
            input=frames.encode_requests([request]),
        )
        for _ in range(HINT_CHUNKS)
    ]
    with overheard(stack, redis_client) as traffic:
        Jobs(database).submit(jobs)
        states = {ended(gateway, str(job.id))["status"] for job in jobs}
    database.close()
    hints = traffic.published(messages.batch_queue("default"))

    assert states == {"succeeded"}
    assert max(len(json.loads(hint.body)[1]["ids"]) for hint in hints) == HINT_CHUNKS
    assert max(hint.size for hint in hints) <= messages.MAX_BYTES


# Flower


@pytest.mark.parametrize(
    "path",
    ["/", "/workers", "/tasks", "/broker", "/api/workers", "/api/tasks", "/api/queues/length"],
)
def test_flower_asks_for_its_password(stack: Stack, path: str) -> None:
    url = stack.env["TIDEGATE_FLOWER_URL"]
    wrong = base64.b64encode(b"tidegate:guess").decode()

    assert Http(url).get(path).status == 401
    assert Http(url).get(path, Authorization=f"Basic {wrong}").status == 401
    assert flower(stack.env).get(path).status == 200


def test_flower_shows_workers_and_their_durable_work(stack: Stack, gateway: Http) -> None:
    assert gateway.post(IDENTITY, ints(1)).status == 200
    job = gateway.post("/v1/jobs", {"model": "identity", "input": ints(1)}).json()
    worker = ended(gateway, job["id"])["worker"]

    workers = flower(stack.env).get("/api/workers?refresh=1").json()
    assert worker in workers
    expected = {messages.REALTIME, messages.CHUNKS, messages.QUERY}
    assert expected <= set(workers[worker]["registered"])
    tasks = until(
        lambda: flower(stack.env).get("/api/tasks?limit=1000").json(),
        10,
        lambda tasks: messages.CHUNKS in {task["name"] for task in tasks.values()},
    )
    # Requests that somebody waits for are counted, not listed.
    assert {task["name"] for task in tasks.values()} == {messages.CHUNKS}
    assert {task["worker"] for task in tasks.values()} == {worker}


# What nobody may see


def everything_flower_shows(stack: Stack) -> str:
    workers = flower(stack.env).get("/api/workers?refresh=1")
    pages = [
        "/api/tasks?limit=10000",
        "/tasks",
        "/workers?json=1",
        "/broker",
        "/metrics",
        *(f"/worker/{quote(name)}" for name in workers.json()),
    ]
    replies = [workers, *(flower(stack.env).get(page) for page in pages)]
    assert {reply.status for reply in replies} == {200}
    return b"\n".join(reply.body for reply in replies).decode()


def logs(stack: Stack) -> dict[str, str]:
    found = {path.name: path.read_text(errors="replace") for path in (stack.var / "logs").iterdir()}
    assert "worker.log" in found
    return found


def test_tensors_are_in_no_log_no_message_and_not_in_flower(
    stack: Stack, gateway: Http, redis_client: redis.Redis
) -> None:
    canary = f"canary{secrets.token_hex(8)}"
    text = {"inputs": [tensor("TEXT", "BYTES", [canary])]}
    with overheard(stack, redis_client) as traffic:
        assert gateway.post(IDENTITY, text).status == 200
        assert gateway.post(IDENTITY, text | {"parameters": {"fail": "x"}}).status == 500
        late = gateway.post(
            IDENTITY, text | {"parameters": {"delay_ms": 2000}}, Tidegate_Deadline="0.2"
        )
        assert late.status == 504
        assert (
            gateway.post(IDENTITY, {"inputs": [text["inputs"][0] | {"shape": [2]}]}).status == 400
        )
        assert gateway("POST", IDENTITY, canary.encode()).status == 400
        assert gateway("POST", "/v1/jobs", canary.encode()).status in (400, 415, 422)
        job = gateway.post("/v1/jobs", {"model": "identity", "input": text}).json()
        assert ended(gateway, job["id"])["status"] == "succeeded"
        stray = json.dumps({"custom_id": "stray", "url": canary})
        batch = batch_of(gateway, stray, canary, batch_line("good", text))
        until(
            lambda: gateway.get(f"/v1/batches/{batch}").json()["status"],
            20,
            lambda status: status == "completed",
        )
    shown = until(lambda: everything_flower_shows(stack), 10, lambda text: messages.CHUNKS in text)

    # The tensors were there, in the blobs and replies, which end by themselves.
    keys = re.compile(r":(blob|reply):")
    kept = [command for command in traffic.commands if keys.search(command)]
    assert any(canary in command for command in kept)
    assert not any(canary in command for command in traffic.commands if not keys.search(command))
    sent = [
        message
        for queue in (messages.realtime_queue("default"), messages.batch_queue("default"))
        for message in traffic.published(queue)
    ]
    assert len(sent) >= 5
    assert not any(canary.encode() in message.body for message in sent)
    assert canary not in shown
    assert [name for name, text in logs(stack).items() if canary in text] == []


def batch_of(server: Http, *lines: str) -> str:
    """A batch over these lines."""
    file = upload(server, *lines)["id"]
    asked = {"input_file_id": file, "endpoint": IDENTITY, "completion_window": "1h"}
    batch: str = server.post("/v1/batches", asked).json()["id"]
    return batch


def credentials(stack: Stack) -> dict[str, str]:
    """What opens something, by name."""
    named = ("TIDEGATE_SECRET", "TIDEGATE_API_KEY", "TIDEGATE_FLOWER_PASSWORD")
    urls = {"TIDEGATE_DATABASE_URL", "TIDEGATE_REDIS_URL", "TIDEGATE_BROKER_URL"} & stack.env.keys()
    found = {name: stack.env[name] for name in named}
    found |= {name: urlsplit(stack.env[name]).password or "" for name in urls}
    assert all(found.values())
    return found


def test_flower_shows_no_password(stack: Stack) -> None:
    shown = everything_flower_shows(stack)

    assert [name for name, value in credentials(stack).items() if value in shown] == []


def test_logs_hold_no_password(stack: Stack) -> None:
    text = "\n".join(logs(stack).values())

    assert [name for name, value in credentials(stack).items() if value in text] == []


def test_command_lines_which_are_public_hold_no_password(stack: Stack) -> None:
    shown = {
        process.name
        for process in stack.processes.values()
        for value in credentials(stack).values()
        if any(value in str(word) for word in process.command)
    }

    assert shown == set()


# The API's description, and the command line


def test_the_api_describes_itself(gateway: Http) -> None:
    document = Http(gateway.url).get("/v1/openapi.json").json()

    validate(document)
    assert document["openapi"].startswith("3.1")
    assert document["info"]["title"] == "Tidegate"
    paths = document["paths"]
    for path, methods in {
        "/v1/jobs": {"get", "post"},
        "/v1/jobs/{job_id}": {"get"},
        "/v1/jobs/{job_id}/events": {"get"},
        "/v1/jobs/{job_id}/result": {"get"},
        "/v1/jobs/{job_id}/cancel": {"post"},
        "/v1/files": {"get", "post"},
        "/v1/files/{file_id}": {"get", "delete"},
        "/v1/files/{file_id}/content": {"get"},
        "/v1/batches": {"get", "post"},
        "/v1/batches/{batch_id}": {"get"},
        "/v1/batches/{batch_id}/cancel": {"post"},
        "/v1/dead-letters": {"get"},
        "/v1/dead-letters/{letter_id}": {"get"},
        "/v1/dead-letters/{letter_id}/redrive": {"post"},
        "/v1/dead-letters/redrive": {"post"},
        "/v1/webhook_event_types": {"get"},
        "/v1/webhook_endpoints": {"get", "post"},
        "/v1/webhook_endpoints/{webhook_id}": {"get", "post", "delete"},
        "/v1/webhook_endpoints/{webhook_id}/rotate_secret": {"post"},
        "/v1/webhook_endpoints/{webhook_id}/test": {"post"},
        "/v1/webhook_endpoints/{webhook_id}/deliveries": {"get"},
        "/v1/webhook_endpoints/{webhook_id}/deliveries/{delivery_id}": {"get"},
        "/v1/webhook_endpoints/{webhook_id}/deliveries/{delivery_id}/resend": {"post"},
    }.items():
        assert methods <= paths[path].keys()
    for path, operations in paths.items():
        named = set(re.findall(r"{(\w+)}", path))
        for method, operation in operations.items():
            if method == "parameters":
                continue
            assert operation["responses"].keys() & {"200", "202"}, (method, path)
            parameters = [*operations.get("parameters", []), *operation.get("parameters", [])]
            assert {p["name"] for p in parameters if p.get("in") == "path"} == named, (method, path)
    for path, method, header in (
        ("/v1/jobs", "post", "Idempotency-Key"),
        ("/v1/files", "post", "Idempotency-Key"),
        ("/v1/batches", "post", "Idempotency-Key"),
        ("/v1/webhook_endpoints", "post", "Idempotency-Key"),
        ("/v1/dead-letters/{letter_id}/redrive", "post", "Idempotency-Key"),
        ("/v1/dead-letters/redrive", "post", "Idempotency-Key"),
        ("/v1/webhook_endpoints/{webhook_id}/rotate_secret", "post", "Idempotency-Key"),
        ("/v1/jobs", "post", "Prefer"),
        ("/v1/jobs", "post", "Tidegate-Deadline"),
        ("/v1/jobs/{job_id}", "get", "If-None-Match"),
        ("/v1/batches/{batch_id}", "get", "If-None-Match"),
        ("/v1/jobs/{job_id}/events", "get", "Last-Event-ID"),
    ):
        named = {p["name"] for p in paths[path][method]["parameters"] if p["in"] == "header"}
        assert header in named, (method, path)
    for path, names in {
        "/v1/jobs": {"kind", "status"},
        "/v1/files": {"purpose", "order"},
        "/v1/batches": set[str](),
        "/v1/dead-letters": {"job_id", "model", "code", "redriven"},
        "/v1/webhook_endpoints": set[str](),
        "/v1/webhook_endpoints/{webhook_id}/deliveries": {"state"},
    }.items():
        parameters = paths[path]["get"]["parameters"]
        named = {p["name"] for p in parameters if p["in"] == "query"}
        assert named == names | {"limit", "after"}, path
    form = paths["/v1/files"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert {"file", "purpose"} <= form["properties"].keys()
    batch = document["components"]["schemas"]["Batch"]["properties"]
    assert {"created_at", "expires_at", "completed_at", "cancelled_at"} <= batch.keys()
    streamed = paths["/v1/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    assert list(streamed) == ["text/event-stream"]
    # Every reference leads somewhere.
    for reference in set(re.findall(r'"\$ref": ?"([^"]+)"', json.dumps(document))):
        found = document
        for step in reference.removeprefix("#/").split("/"):
            found = found[step]


def celery(stack: Stack, root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers", "worker", *arguments],
        cwd=root,
        env=os.environ | stack.env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_celerys_own_command_knows_gpus(stack: Stack, root: Path) -> None:
    told = celery(stack, root, "--help")

    assert told.returncode == 0
    assert "--gpu" in told.stdout
    assert "--group" in told.stdout


def test_a_gpu_that_is_none_is_refused(stack: Stack, root: Path) -> None:
    told = celery(stack, root, "--gpu", "first")

    assert told.returncode == 2
    assert "GPU number" in told.stderr
