"""What a `/v1` request may not be: larger than it has to be, of another form, or unclear."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Any

import pytest

from config import MIB
from tests.e2e.helpers import IDENTITY, Http, Reply, ints, receive, until, upload
from tests.e2e.test_idempotency import send_file

pytestmark = pytest.mark.stack

JOB: dict[str, Any] = {"model": "identity", "input": ints(1)}
WEBHOOK = {"name": "n", "url": "https://hooks.example.com/"}
UNKNOWN = "0" * 32


def message(reply: Reply) -> str:
    told = reply.json()
    text: str = told["error"]["message"] if "error" in told else told["detail"]
    return text


@pytest.mark.parametrize(
    "path",
    [
        "/v1/batches",
        "/v1/dead-letters/redrive",
        "/v1/dead-letters/dl_1/redrive",
        "/v1/webhook_endpoints",
        f"/v1/webhook_endpoints/we_{UNKNOWN}",
        f"/v1/webhook_endpoints/we_{UNKNOWN}/rotate_secret",
        f"/v1/webhook_endpoints/we_{UNKNOWN}/test",
    ],
)
def test_a_body_of_fields_is_small(mine: Http, path: str) -> None:
    reply = mine.post(path, {"event_types": ["x"] * (MIB // 5)})
    assert reply.status == 413, reply


def test_a_large_body_of_fields_is_read_where_it_holds_tensors(mine: Http) -> None:
    values = list(range(2 * MIB // 8))
    reply = mine.post("/v1/jobs", JOB | {"input": ints(*values)}, Prefer="wait=30")
    assert (reply.status, reply.json()["status"]) == (200, "succeeded")


@pytest.mark.parametrize(
    ("path", "body", "field", "status"),
    [
        ("/v1/jobs", JOB | {"metadata": {str(n): "" for n in range(300_000)}}, "metadata", 422),
        ("/v1/jobs", JOB | {str(n): 1 for n in range(300_000)}, "64 names", 422),
        ("/v1/webhook_endpoints", WEBHOOK | {"event_types": [""] * 200_000}, "event_types", 400),
        ("/v1/dead-letters/redrive", {"filter": {str(n): 1 for n in range(60_000)}}, "filter", 422),
    ],
    ids=["pairs", "names", "elements", "names inside"],
)
def test_too_many_of_anything_is_one_error(
    mine: Http, path: str, body: object, field: str, status: int
) -> None:
    reply = mine.post(path, body)
    assert reply.status == status, reply
    assert field in message(reply)
    assert len(reply.body) < 1000


def test_an_answer_lists_some_errors_and_not_each(mine: Http) -> None:
    reply = mine.post("/v1/jobs", JOB | {f"field-{n}" * 100: 1 for n in range(50)})
    assert (reply.status, len(reply.json()["errors"])) == (422, 20)
    assert len(reply.body) < 20_000


def test_only_a_multipart_form_is_a_file(mine: Http) -> None:
    for kind in ("application/x-www-form-urlencoded", "application/json", "text/plain"):
        reply = mine.post("/v1/files", b"purpose=batch&" * 100_000, Content_Type=kind)
        assert reply.status == 415, reply
        assert "multipart/form-data" in message(reply)


def test_what_comes_in_chunks_says_that_it_is_json_too(mine: Http) -> None:
    def chunked(kind: str, body: bytes) -> Reply:
        headers = {**mine.headers, "Content-Type": kind, "Transfer-Encoding": "chunked"}
        with closing(mine.connect()) as connection:
            blocks = [body[at : at + 65536] for at in range(0, len(body), 65536)]
            connection.request(
                "POST", "/v1/dead-letters/redrive", iter(blocks), headers, encode_chunked=True
            )
            return receive(connection)

    body = json.dumps({"filter": {"model": "nobody"}}).encode()
    assert chunked("text/plain", body).status == 415
    good = chunked("application/json", body)
    assert (good.status, good.json()["letters"]) == (202, 0)
    assert chunked("application/json", body + b" " * 2 * MIB).status in (400, 413)


def test_a_deep_body_under_a_key_is_refused_for_what_it_is(mine: Http) -> None:
    deep = b'{"model": "identity", "input": ' + b'{"a":' * 500 + b"1" + b"}" * 501
    headers = {"Content_Type": "application/json", "Idempotency_Key": "deep"}
    reply = mine.post("/v1/jobs", deep, **headers)
    assert reply.status == 400, reply
    assert "input" in message(reply)


@pytest.mark.parametrize("text", ["inf", "nan", "1e300", "1_0", "9999999", "2999-01-01T00:00:00Z"])
def test_a_deadline_that_is_none_is_refused_by_name(mine: Http, text: str) -> None:
    headers = {"Tidegate_Deadline": text}
    reply = mine.post("/v1/jobs", JOB, **headers)
    assert reply.status == 400, reply
    assert reply.json()["errors"][0]["pointer"] == "#/Tidegate-Deadline"
    durable = mine.post(IDENTITY, ints(1), Prefer="respond-async", **headers)
    assert durable.status == 400
    assert "Tidegate-Deadline" in durable.json()["error"]


def test_a_deadline_in_the_header_goes_before_the_bodys(mine: Http) -> None:
    reply = mine.post(
        "/v1/jobs",
        JOB | {"input": ints(1, delay_ms=20_000), "deadline": 600},
        Tidegate_Deadline="0.5",
        Prefer="wait=20",
    )
    assert (reply.status, reply.json()["status"]) == (200, "expired")


@pytest.mark.parametrize(
    "fields",
    [
        {"expires_after[anchor]": "created_at"},
        {"expires_after": "3600"},
        {"expires_after[seconds]": "3600", "expires_after[unit]": "s"},
        {"expires_after[seconds]": ""},
    ],
    ids=["no seconds", "no object", "more", "empty"],
)
def test_an_expiry_of_another_form_is_refused(mine: Http, fields: dict[str, str]) -> None:
    reply = send_file(mine, "expiry", "{}", **fields)
    assert reply.status == 400, reply
    assert reply.json()["error"]["param"] == "expires_after"


@pytest.mark.parametrize("path", ["files", "batches", "webhook_endpoints", "jobs", "dead-letters"])
def test_a_cursor_of_another_form_is_a_wrong_parameter(mine: Http, path: str) -> None:
    reply = mine.get(f"/v1/{path}?after=nothing")
    assert reply.status == 400, reply
    told = reply.json()
    named = told["error"]["param"] if "error" in told else told["errors"][0]["pointer"]
    assert named.removeprefix("#/") == "after"


def test_a_batch_says_when_to_look_again_until_it_has_ended(mine: Http) -> None:
    body = {"custom_id": "a", "method": "POST", "url": IDENTITY, "body": ints(1, delay_ms=1000)}
    file = upload(mine, json.dumps(body))["id"]
    asked = {"input_file_id": file, "endpoint": IDENTITY, "completion_window": "1h"}
    path = f"/v1/batches/{mine.post('/v1/batches', asked).json()['id']}"

    assert mine.get(path).headers["Retry-After"] == "1"
    done = until(
        lambda: mine.get(path), 30, lambda reply: bool(reply.json()["status"] == "completed")
    )
    assert done.headers["Retry-After"] is None
