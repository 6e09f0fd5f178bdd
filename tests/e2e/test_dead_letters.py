"""Dead letters over HTTP: what hangs is given up after its attempts, and run again on demand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from ops.embedded import Stack
from tests.e2e.helpers import Http, Reply, answered_ints, batch_line, ended, ints, until, upload

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack on which an attempt may take no longer than two seconds."""
    hasty = {
        "TIDEGATE_LEASE": "1",
        "TIDEGATE_SWEEP_INTERVAL": "0.3",
        "TIDEGATE_ATTEMPT_TIMEOUT": "2",
    }
    var = tmp_path_factory.mktemp("letters") / "var"
    with Stack(var, environ=os.environ | hasty) as stack:
        stack.start(only=[name for name in stack_names(stack) if name != "flower"])
        yield stack


def stack_names(stack: Stack) -> list[str]:
    stack.open()
    return list(stack.processes)


@pytest.fixture(scope="module")
def server(own: Stack) -> Http:
    return Http.of(own)


@pytest.fixture(scope="module")
def hung(server: Http) -> dict[str, Any]:
    """A job whose every attempt took too long, in a dead letter."""
    body = {"model": "identity", "input": ints(7, delay_ms=60_000), "metadata": {"mine": "yes"}}
    job = ended(server, server.post("/v1/jobs", body).json()["id"], 60)
    assert (job["status"], job["attempts"]) == ("failed", 3)
    assert job["error"]["code"] == "attempt_overran"
    return job


def letters(server: Http, **chosen: str) -> list[dict[str, Any]]:
    query = "&".join(f"{name}={value}" for name, value in chosen.items())
    found: list[dict[str, Any]] = server.get(f"/v1/dead-letters?{query}").json()["data"]
    return found


def test_a_dead_letter_names_its_job_and_its_reason(server: Http, hung: dict[str, Any]) -> None:
    (letter,) = letters(server, job_id=hung["id"])
    assert (letter["model"], letter["step"], letter["attempts"]) == ("identity", "infer", 3)
    assert letter["error"]["code"] == "attempt_overran"
    assert letter["redriven_as"] is None
    assert server.get(letter["urls"]["self"]).json() == letter
    assert letters(server, job_id=hung["id"], redriven="true") == []
    assert [one["id"] for one in letters(server, code="attempt_overran")] == [letter["id"]]


def test_redriving_makes_one_new_job_however_often_it_is_asked_for(
    server: Http, hung: dict[str, Any]
) -> None:
    (letter,) = letters(server, job_id=hung["id"])
    first = server.post(letter["urls"]["redrive"], {"deadline": 1.5})
    again = server.post(letter["urls"]["redrive"])
    assert (first.status, again.status) == (202, 202)
    job = first.json()
    assert again.json()["id"] == job["id"] != hung["id"]
    assert first.headers["Location"] == job["urls"]["self"]
    assert (job["redrive_of"], job["metadata"]) == (hung["id"], {"mine": "yes"})
    assert ended(server, job["id"])["status"] == "expired"
    assert server.get(hung["urls"]["self"]).json() == hung
    (letter,) = letters(server, job_id=hung["id"])
    assert letter["redriven_as"] == job["id"]


def test_a_redrive_sent_again_under_its_key_says_so(server: Http, hung: dict[str, Any]) -> None:
    (letter,) = letters(server, job_id=hung["id"])
    for path, body in (
        (letter["urls"]["redrive"], {}),
        ("/v1/dead-letters/redrive", {"filter": {"job_id": hung["id"]}}),
    ):
        first, again = (server.post(path, body, Idempotency_Key="once") for _ in range(2))
        assert (first.status, again.status) == (202, 202)
        assert first.headers["Idempotent-Replayed"] is None
        assert again.headers["Idempotent-Replayed"] == "true"
        assert answer(again) == answer(first)


def answer(reply: Reply) -> Any:
    told = reply.json()
    return told["id"] if told["object"] == "job" else told


def test_a_line_that_hangs_takes_no_neighbour_along(server: Http) -> None:
    delays = {2: 60_000}
    lines = [batch_line(f"row-{n}", ints(n, delay_ms=delays.get(n, 0))) for n in range(1, 7)]
    file = upload(server, *lines)
    batch = server.post(
        "/v1/batches",
        {
            "input_file_id": file["id"],
            "endpoint": "/v2/models/identity/infer",
            "completion_window": "1h",
        },
    ).json()
    path = f"/v1/batches/{batch['id']}"
    done = until(lambda: server.get(path).json(), 90, lambda b: b["status"] == "completed")
    assert done["request_counts"] == {"total": 6, "completed": 5, "failed": 1}
    failed = server.get(f"/v1/files/{done['error_file_id']}/content").json()
    assert (failed["custom_id"], failed["error"]["code"]) == ("row-2", "attempt_overran")

    (letter,) = letters(server, job_id=batch["id"])
    assert (letter["first_line"], letter["items"]) == (2, 1)
    redriven = server.post(
        "/v1/dead-letters/redrive", {"filter": {"job_id": batch["id"]}, "deadline": 2}
    )
    assert redriven.status == 202
    told = redriven.json()
    assert (told["letters"], told["gone"], told["has_more"]) == (1, [], False)
    job = ended(server, told["jobs"][0], 30)
    assert (job["kind"], job["status"], job["items"]["total"]) == ("batch", "expired", 1)
    nothing = server.post("/v1/dead-letters/redrive", {"filter": {"job_id": batch["id"]}})
    assert nothing.json()["jobs"] == []


def test_the_worker_that_gave_up_still_works(server: Http, hung: dict[str, Any]) -> None:
    reply = server.post("/v2/models/identity/infer", ints(3))
    assert answered_ints(reply.json()) == [3]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "named"),
    [
        ("GET", "?redriven=perhaps", None, 400, "redriven"),
        ("GET", "?limit=1000", None, 400, "limit"),
        ("GET", "?job_id=x", None, 400, "job_id"),
        ("GET", "?job_id=batch_x", None, 400, "job_id"),
        ("GET", "?after=7", None, 400, "after"),
        ("POST", "/redrive", {"filter": {"job_id": "x"}}, 400, "#/filter/job_id"),
        ("POST", "/redrive", {"filter": {"job_id": "\0"}}, 422, "job_id"),
        ("POST", "/redrive", {"filter": {"model": "\0"}}, 422, "model"),
        ("POST", "/redrive", {"filter": {"code": "\0"}}, 422, "code"),
        ("GET", "/dl_0", None, 404, "dl_0"),
        ("GET", "/dl_99999999", None, 404, "dl_99999999"),
        ("POST", "/dl_99999999/redrive", None, 404, "dl_99999999"),
        ("POST", "/redrive", {}, 422, "filter"),
        ("POST", "/redrive", {"filter": {"color": "red"}}, 422, "color"),
        ("POST", "/redrive", {"filter": {}, "limit": 0}, 422, "limit"),
        ("POST", "/dl_1/redrive", {"deadline": -1}, 422, "deadline"),
        ("POST", "/dl_1/redrive", {"priority": "high"}, 422, "priority"),
    ],
)
def test_bad_input_is_refused_by_name(
    server: Http, method: str, path: str, body: object, status: int, named: str
) -> None:
    reply = server(method, f"/v1/dead-letters{path}", body)
    assert reply.status == status, reply
    assert reply.headers["Content-Type"] == "application/problem+json"
    assert named in str(reply.json())


def test_somebody_elses_letter_is_not_found(own: Stack, hung: dict[str, Any]) -> None:
    (letter,) = letters(Http.of(own), job_id=hung["id"])
    assert Http(own.env["TIDEGATE_URL"]).get(letter["urls"]["self"]).status == 401
    assert letters(Http.of(own), job_id=str(uuid4())) == []
