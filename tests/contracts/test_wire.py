"""Shapes on the wire that clients rely on: Triton's, OpenAI's, RFC 9457's and our own.

Written from the clients' side, by plain HTTP, against the whole stack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from typing import Any

import pytest

from ops.embedded import Stack
from tests.e2e.helpers import (
    IDENTITY,
    Http,
    Reply,
    answered_ints,
    batch_line,
    ended,
    ints,
    receive,
    until,
    upload,
)

pytestmark = pytest.mark.stack

LENGTH = "Inference-Header-Content-Length"
NOBODY = "tg_live_00000000_" + "0" * 43

Shape = Mapping[str, type | tuple[type, ...]]
NONE = type(None)


def matches(value: Mapping[str, Any], shape: Shape) -> None:
    """Exactly these keys, of these types; a bool is no int here."""
    assert value.keys() == shape.keys()
    for name, kind in shape.items():
        assert isinstance(value[name], kind), (name, value[name])
        assert not isinstance(value[name], bool) or kind is bool, (name, value[name])


@pytest.fixture(scope="module")
def server(stack: Stack) -> Http:
    return Http.of(stack)


@pytest.fixture(scope="module")
def anybody(stack: Stack) -> Http:
    """Without a key."""
    return Http(stack.env["TIDEGATE_URL"])


# Errors have the shape of their path


def as_triton(reply: Reply) -> str:
    """Whose client fails to print anything but a string."""
    assert reply.headers["Content-Type"] == "application/json"
    matches(reply.json(), {"error": str})
    message: str = reply.json()["error"]
    return message


def as_openai(reply: Reply) -> str:
    assert reply.headers["Content-Type"] == "application/json"
    matches(reply.json(), {"error": dict})
    error = reply.json()["error"]
    matches(error, {"message": str, "type": str, "param": (str, NONE), "code": (str, NONE)})
    message: str = error["message"]
    return message


def as_problem(reply: Reply) -> str:
    """RFC 9457."""
    assert reply.headers["Content-Type"] == "application/problem+json"
    problem = reply.json()
    required = {"type": str, "title": str, "status": int, "detail": str, "instance": str}
    matches({name: problem.get(name) for name in required}, required)
    assert problem["status"] == reply.status
    assert problem["request_id"] == reply.headers["X-Request-ID"]
    detail: str = problem["detail"]
    return detail


SHAPES = {"/v2": as_triton, "/v1/files": as_openai, "/v1/batches": as_openai, "/v1": as_problem}


def message_of(reply: Reply, path: str) -> str:
    """The error's words, once its shape is the right one for the path."""
    text = next(shape for start, shape in SHAPES.items() if path.startswith(start))(reply)
    for trace in ("Traceback", 'File "', ".py"):
        assert trace not in text
    assert text
    return text


GUARDED = [
    ("GET", "/v2"),
    ("GET", "/v2/models/digits"),
    ("POST", IDENTITY),
    ("GET", "/v2/models/stats"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/00000000-0000-7000-8000-000000000000"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/file-0"),
    ("GET", "/v1/files/file-0/content"),
    ("POST", "/v1/batches"),
    ("POST", "/v1/batches/batch_0/cancel"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED, ids=" ".join)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": f"Bearer {NOBODY}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"X-API-Key": "guess"},
    ],
    ids=["no key", "unknown key", "empty key", "another scheme", "malformed key"],
)
def test_without_a_good_key_nothing_is_answered(
    anybody: Http, method: str, path: str, headers: dict[str, str]
) -> None:
    reply = anybody(method, path, headers=headers)

    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")
    assert "key" in message_of(reply, path)


@pytest.mark.parametrize("name", ["Authorization", "X-API-Key"])
def test_a_key_is_taken_from_either_header(anybody: Http, server: Http, name: str) -> None:
    key = server.headers["Authorization"].removeprefix("Bearer ")
    value = f"bearer {key}" if name == "Authorization" else key

    assert anybody("GET", "/v2", headers={name: value}).status == 200


@pytest.mark.parametrize(
    "path",
    ["/v2/nothing", "/v2/models/digits/nothing", "/v1/nothing", "/v1/files/a/b/c", "/nothing"],
)
def test_a_path_that_leads_nowhere_is_not_found(server: Http, path: str) -> None:
    reply = server.get(path)

    assert reply.status == 404
    message_of(reply, path if path.startswith("/v") else "/v1")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", IDENTITY, {"POST"}),
        ("DELETE", "/v2/models/digits", {"GET"}),
        ("POST", "/v2/health/live", {"GET"}),
        ("DELETE", "/v1/jobs", {"GET", "POST"}),
        ("PUT", "/v1/files/file-0", {"GET", "DELETE"}),
        ("PATCH", "/v1/batches", {"GET", "POST"}),
    ],
)
def test_another_method_is_refused_with_those_that_are_allowed(
    server: Http, method: str, path: str, allowed: set[str]
) -> None:
    reply = server(method, path)

    assert reply.status == 405
    assert {name.strip() for name in reply.headers["Allow"].split(",")} >= allowed
    message_of(reply, path)


# Every answer


def test_every_answer_carries_the_requests_id(server: Http) -> None:
    for path in ("/livez", "/v2", "/v1/jobs", "/v1/nothing"):
        assert server.get(path, X_Request_ID="mine-1").headers["X-Request-ID"] == "mine-1"
    made = [server.get("/livez").headers["X-Request-ID"] for _ in range(2)]
    assert len(set(made)) == 2
    assert server.get("/livez", X_Request_ID="a b").headers["X-Request-ID"] != "a b"


@pytest.mark.parametrize("status", [401, 400, 404])
def test_what_is_left_of_a_refused_body_is_not_taken_for_a_request(
    server: Http, status: int
) -> None:
    body = b"GET /livez HTTP/1.1\r\n\r\n" * 1000
    path = IDENTITY if status != 404 else "/v2/models/nobody/infer"
    with closing(server.connect()) as connection:
        connection.request("POST", path, body, dict(server.headers) if status != 401 else {})
        assert receive(connection).status == status
        connection.request("POST", IDENTITY, json.dumps(ints(5)), dict(server.headers))
        assert answered_ints(receive(connection).json()) == [5]


# Open Inference Protocol


def test_an_answer_has_tritons_keys_and_no_others(server: Http) -> None:
    reply = server.post(IDENTITY, ints(1, 2) | {"id": "mine"})
    answer = reply.json()

    assert reply.headers["Content-Type"] == "application/json"
    assert LENGTH not in reply.headers
    matches(answer, {"id": str, "model_name": str, "model_version": str, "outputs": list})
    (output,) = answer["outputs"]
    matches(output, {"name": str, "datatype": str, "shape": list, "data": list})


def test_a_binary_answer_says_where_its_json_ends(server: Http) -> None:
    reply = server.post(IDENTITY, ints(1, -1) | {"parameters": {"binary_data_output": True}})
    end = int(reply.headers[LENGTH])
    (output,) = json.loads(reply.body[:end])["outputs"]

    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert "id" not in json.loads(reply.body[:end])
    assert output["parameters"] == {"binary_data_size": 16}
    assert reply.body[end:] == b"\x01" + bytes(7) + b"\xff" * 8


@pytest.mark.parametrize(
    "headers",
    [
        # tritonclient for Python sends none, the one for C++ one of the next two, curl the last.
        {},
        {"Content-Type": "application/json"},
        {"Content-Type": "application/octet-stream"},
        {"Content-Type": "application/x-www-form-urlencoded", "Expect": "100-continue"},
    ],
    ids=str,
)
def test_an_inference_is_read_whatever_its_content_type(
    server: Http, headers: dict[str, str]
) -> None:
    reply = server("POST", IDENTITY, json.dumps(ints(3)).encode(), headers)

    assert (reply.status, answered_ints(reply.json())) == (200, [3])


def test_a_body_may_come_in_chunks(server: Http) -> None:
    parts = [part.encode() for part in json.dumps(ints(3)).partition("data")]
    with closing(server.connect()) as connection:
        connection.request("POST", IDENTITY, iter(parts), dict(server.headers), encode_chunked=True)
        reply = receive(connection)

    assert (reply.status, answered_ints(reply.json())) == (200, [3])


# OpenAI's files and batches

FILE: Shape = {
    "id": str,
    "object": str,
    "bytes": int,
    "created_at": int,
    "expires_at": (int, NONE),
    "filename": str,
    "purpose": str,
    "status": str,
    "status_details": NONE,
}
MOMENTS = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
BATCH: Shape = {
    "id": str,
    "object": str,
    "endpoint": str,
    "model": str,
    "errors": (dict, NONE),
    "input_file_id": str,
    "completion_window": str,
    "status": str,
    "output_file_id": (str, NONE),
    "error_file_id": (str, NONE),
    "created_at": int,
    "expires_at": int,
    **{f"{moment}_at": (int, NONE) for moment in MOMENTS},
    "request_counts": dict,
    "metadata": dict,
}
PAGE: Shape = {
    "object": str,
    "data": list,
    "first_id": (str, NONE),
    "last_id": (str, NONE),
    "has_more": bool,
}


MIXED = (batch_line("good", ints(1)), batch_line("bad", ints(1, fail="x")), "?")
"""One line that is answered, one that fails and one that is none."""


def run_batch(server: Http, *lines: str) -> dict[str, Any]:
    asked = {
        "input_file_id": upload(server, *lines)["id"],
        "endpoint": IDENTITY,
        "completion_window": "24h",
        # From an SDK newer than this server.
        "output_expires_after": {"anchor": "created_at", "seconds": 3600},
        "something_new": True,
    }
    reply = server.post("/v1/batches", asked)
    assert reply.status == 200, reply
    path = f"/v1/batches/{reply.json()['id']}"
    batch: dict[str, Any] = until(
        lambda: server.get(path).json(),
        20,
        lambda batch: batch["status"] in ("completed", "failed"),
    )
    return batch


def test_a_file_has_openais_shape(server: Http) -> None:
    made = upload(server, "{}")
    matches(made, FILE)
    assert made["object"] == "file"

    page = server.get("/v1/files?limit=1").json()
    matches(page, PAGE)
    assert (page["object"], page["data"]) == ("list", [made])

    # What the SDK sends: a JSON content type with an empty body.
    deleted = server("DELETE", f"/v1/files/{made['id']}", b"", {"Content-Type": "application/json"})
    assert deleted.json() == {"id": made["id"], "object": "file", "deleted": True}


def test_a_batch_has_openais_shape_whatever_became_of_it(server: Http) -> None:
    done = run_batch(server, *MIXED)
    failed = run_batch(server, "?")

    for batch in (done, failed):
        matches(batch, BATCH)
        matches(batch["request_counts"], {"total": int, "completed": int, "failed": int})
        assert batch["object"] == "batch"
    assert done["errors"] is None
    matches(failed["errors"], {"object": str, "data": list})
    for error in failed["errors"]["data"]:
        matches(error, {"code": str, "message": str, "line": (int, NONE), "param": (str, NONE)})
    page = server.get("/v1/batches?limit=2").json()
    matches(page, PAGE)
    assert page["data"] == [failed, done]


def test_lines_of_a_batchs_files_have_openais_shape(server: Http) -> None:
    done = run_batch(server, *MIXED)
    contents = {
        name: server.get(f"/v1/files/{done[name]}/content", Accept="application/binary")
        for name in ("output_file_id", "error_file_id")
    }

    lines = [json.loads(text) for one in contents.values() for text in one.body.splitlines()]
    assert len(lines) == 3
    for one in lines:
        matches(
            one,
            {"id": str, "custom_id": (str, NONE), "response": (dict, NONE), "error": (dict, NONE)},
        )
        if one["response"]:
            shape: Shape = {"status_code": int, "request_id": str, "body": dict}
            matches(one["response"], shape)
        else:
            matches(one["error"], {"code": str, "message": str, "line": int})
    for reply in contents.values():
        assert int(reply.headers["Content-Length"]) == len(reply.body)


def test_cancelling_needs_no_body(server: Http) -> None:
    asked = {
        "input_file_id": upload(server, batch_line("one", ints(1, delay_ms=500)))["id"],
        "endpoint": IDENTITY,
        "completion_window": "24h",
    }
    batch = server.post("/v1/batches", asked).json()
    reply = server(
        "POST", f"/v1/batches/{batch['id']}/cancel", b"", {"Content-Type": "application/json"}
    )

    assert reply.status == 200
    assert reply.json()["status"] in ("cancelling", "cancelled")


# Our own jobs

JOB: Shape = {
    "id": str,
    "object": str,
    "kind": str,
    "model": str,
    "version": (str, NONE),
    "status": str,
    "priority": str,
    "error": (dict, NONE),
    "attempts": int,
    "worker": (str, NONE),
    "items": dict,
    "created_at": str,
    "started_at": (str, NONE),
    "completed_at": (str, NONE),
    "expires_at": str,
    "metrics": dict,
    "metadata": dict,
    "redrive_of": (str, NONE),
    "urls": dict,
}


# Counted when somebody asks for the one job.
ASKED_FOR: Shape = {**JOB, "queue_position": (int, NONE)}


def test_a_job_has_one_shape_from_its_start_to_its_end(server: Http) -> None:
    asked = {"model": "identity", "input": ints(1)}
    accepted = server.post("/v1/jobs", asked).json()
    done = ended(server, accepted["id"])

    for job, shape in ((accepted, JOB), (done, ASKED_FOR)):
        matches(job, shape)
        matches(job["items"], {"total": int, "completed": int, "failed": int})
        matches(job["metrics"], {"queue_ms": (int, NONE), "total_ms": (int, NONE)})
        assert set(job["urls"]) >= {"self", "cancel", "result", "events"}
    for name in ("created_at", "started_at", "completed_at", "expires_at"):
        assert done[name].endswith("Z")
        assert datetime.fromisoformat(done[name]).tzinfo is not None


def test_a_realtime_record_has_a_jobs_first_keys(server: Http) -> None:
    job_id = server.post(IDENTITY, ints(1)).headers["Tidegate-Job-Id"]
    record = server.get(f"/v1/jobs/{job_id}").json()

    shared = (
        "id object kind model version status error items created_at completed_at metrics metadata"
    )
    matches({name: record[name] for name in shared.split()}, {n: JOB[n] for n in shared.split()})
    path = f"/v1/jobs/{job_id}"
    assert record["urls"] == {"self": path, "events": f"{path}/events"}


def test_a_page_of_jobs_has_the_shape_of_every_list(server: Http) -> None:
    matches(server.get("/v1/jobs?limit=1").json(), PAGE)
    empty = server.get("/v1/jobs?after=00000000-0000-7000-8000-000000000000").json()

    matches(empty, PAGE)
    assert (empty["data"], empty["first_id"], empty["has_more"]) == ([], None, False)
