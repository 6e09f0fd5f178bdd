"""Jobs: accepted with 202, polled, listed, called off; their results are what the model answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from uuid import UUID

import numpy as np
import pytest
import tritonclient.http as tc

from tests.e2e.helpers import (
    DIGITS,
    IDENTITY,
    Http,
    Reply,
    Witness,
    answered_ints,
    ended,
    ints,
    tensor,
    together,
    until,
)

pytestmark = pytest.mark.stack

IMAGE = {"inputs": [tensor("image", "FP32", [float(n * 7 % 17) for n in range(64)])]}
LENGTH = "Inference-Header-Content-Length"
SLOTS = 4
"""Hints about durable work that one GPU worker runs at a time (TIDEGATE_BATCH_SLOTS)."""


def submit(server: Http, model: str = "identity", **fields: object) -> dict[str, Any]:
    """An accepted job."""
    reply = server.post("/v1/jobs", {"model": model, "input": ints(1)} | fields)
    assert reply.status == 202, reply
    job: dict[str, Any] = reply.json()
    return job


def running(server: Http, job: dict[str, Any]) -> None:
    """Wait until somebody runs it."""
    until(
        lambda: server.get(job["urls"]["self"]).json()["status"],
        10,
        lambda status: status == "running",
    )


def slow(seconds: float) -> dict[str, Any]:
    return ints(1, delay_ms=round(seconds * 1000))


def values(reply: Reply) -> dict[str, Any]:
    """The outputs of a binary answer."""
    assert reply.headers["Content-Type"] == "application/octet-stream"
    result = tc.InferResult.from_response_body(reply.body, header_length=int(reply.headers[LENGTH]))
    names = [output["name"] for output in result.get_response()["outputs"]]
    return {name: result.as_numpy(name) for name in names}


# The life of a job


def test_a_job_is_accepted_runs_and_has_the_models_answer(mine: Http, triton: Http) -> None:
    reply = mine.post("/v1/jobs", {"model": "digits", "input": IMAGE})
    job = reply.json()

    assert reply.status == 202
    assert reply.headers["Location"] == job["urls"]["self"] == f"/v1/jobs/{job['id']}"
    assert int(reply.headers["Retry-After"]) >= 1
    assert (job["object"], job["kind"], job["model"]) == ("job", "infer", "digits")
    assert job["status"] in ("queued", "running")

    done = ended(mine, job["id"])
    assert done["status"] == "succeeded"
    assert done["items"] == {"total": 1, "completed": 1, "failed": 0}
    assert done["created_at"] <= done["started_at"] <= done["completed_at"] <= done["expires_at"]
    assert (done["attempts"], done["error"]) == (1, None)

    result = mine.get(job["urls"]["result"])
    assert result.status == 200
    label, odds = result.json()["outputs"]
    expected_label, expected_odds = triton.post(DIGITS, IMAGE).json()["outputs"]
    assert label == expected_label
    # The same float32, printed with other digits.
    assert np.float32(odds["data"]).tobytes() == np.float32(expected_odds["data"]).tobytes()


def test_a_result_can_be_had_in_binary(mine: Http) -> None:
    job = ended(mine, submit(mine, input=ints(5, -6))["id"])
    reply = mine.get(job["urls"]["result"], Accept="application/octet-stream")

    assert reply.status == 200
    assert values(reply)["INTS_OUT"].tolist() == [[5, -6]]


def test_what_a_job_was_given_is_shown_again(mine: Http) -> None:
    job = submit(mine, version="1", priority="high", metadata={"team": "tide"}, deadline=60)
    shown = ended(mine, job["id"])

    assert (shown["version"], shown["priority"]) == ("1", "high")
    assert shown["metadata"] == {"team": "tide"}


def test_a_job_whose_model_fails_says_so(mine: Http) -> None:
    job = ended(mine, submit(mine, input=ints(1, fail="out of luck"))["id"])
    result = mine.get(job["urls"]["result"])

    assert job["status"] == "failed"
    assert job["error"] == {"code": "model_failed", "message": "out of luck"}
    assert job["items"] == {"total": 1, "completed": 0, "failed": 1}
    assert (result.status, result.json()["detail"]) == (500, "out of luck")


def test_jobs_submitted_together_each_get_their_own_answer(mine: Http) -> None:
    jobs = together([partial(submit, mine, input=ints(n, -n)) for n in range(24)])
    results = [mine.get(ended(mine, job["id"])["urls"]["result"]).json() for job in jobs]

    assert [answered_ints(result) for result in results] == [[n, -n] for n in range(24)]


def test_a_large_job_comes_back_whole(mine: Http) -> None:
    """Larger than what stays in Postgres: input and result go through the object store."""
    floats = np.linspace(-1, 1, 1_000_000, dtype=np.float32)[None, :]
    one = tc.InferInput("FLOATS", list(floats.shape), "FP32")
    one.set_data_from_numpy(floats)
    body, length = tc.InferenceServerClient.generate_request_body([one])
    headers = {LENGTH: str(length), "Prefer": "respond-async"}
    reply = mine("POST", IDENTITY, body, headers)
    assert reply.status == 202, reply
    job = ended(mine, reply.json()["id"])
    result = mine.get(job["urls"]["result"], Accept="application/octet-stream")

    assert job["status"] == "succeeded"
    assert values(result)["FLOATS_OUT"].tobytes() == floats.tobytes()


# Waiting, or not


def test_who_prefers_to_wait_gets_the_finished_job(mine: Http) -> None:
    reply = mine.post("/v1/jobs", {"model": "identity", "input": ints(1)}, Prefer="wait=20")

    assert reply.status == 200
    assert reply.headers["Preference-Applied"] == "wait=20"
    assert reply.json()["status"] == "succeeded"


def test_who_waits_too_short_gets_the_unfinished_job(mine: Http) -> None:
    reply = mine.post("/v1/jobs", {"model": "identity", "input": slow(1.5)}, Prefer="wait=1")
    job = reply.json()

    assert reply.status == 202
    assert reply.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert job["status"] in ("queued", "running")
    assert ended(mine, job["id"])["status"] == "succeeded"


def test_an_inference_can_be_made_a_job(mine: Http) -> None:
    sync = mine.post(DIGITS, IMAGE)
    reply = mine.post(DIGITS, IMAGE, Prefer="respond-async")
    job = reply.json()

    assert reply.status == 202
    assert reply.headers["Preference-Applied"] == "respond-async"
    assert reply.headers["Location"] == f"/v1/jobs/{job['id']}"
    assert ended(mine, job["id"])["status"] == "succeeded"
    assert mine.get(job["urls"]["result"]).json() == sync.json()


def test_an_inference_made_a_job_can_be_waited_for(mine: Http) -> None:
    sync = mine.post(DIGITS, IMAGE)
    reply = mine.post(DIGITS, IMAGE, Prefer="wait=20")

    assert (reply.status, reply.json()) == (200, sync.json())
    assert reply.headers["Preference-Applied"] == "wait=20"
    assert mine.get(f"/v1/jobs/{reply.headers['Tidegate-Job-Id']}").json()["kind"] == "infer"


@pytest.mark.parametrize("fail", [False, True], ids=["succeeded", "failed"])
def test_a_realtime_requests_record_is_there_as_soon_as_its_answer(mine: Http, fail: bool) -> None:
    reply = mine.post(IDENTITY, ints(1, fail="out of luck") if fail else ints(1))
    shown = mine.get(f"/v1/jobs/{reply.headers['Tidegate-Job-Id']}")
    job = shown.json()

    assert shown.status == 200
    assert (job["kind"], job["status"]) == ("realtime", "failed" if fail else "succeeded")


# Calling off


@pytest.fixture
def busy(mine: Http) -> Iterator[None]:
    """Every slot for durable work is taken, one after another, for a few seconds."""
    blockers = []
    for _ in range(SLOTS):
        job = submit(mine, input=slow(2.5))
        running(mine, job)
        blockers.append(job)
    yield
    for job in blockers:
        assert ended(mine, job["id"])["status"] == "succeeded"


@pytest.mark.usefixtures("busy")
def test_slow_jobs_make_nobody_late_who_runs_beside_them(mine: Http) -> None:
    # All of them wait for a slot, so that the next hint names them together. Of another shape,
    # so that Triton does not run them as one batch.
    late = ints(1, 2, delay_ms=25_000)
    beside = [submit(mine, input=late, deadline=100) for _ in range(2)]
    quick = [submit(mine, input=ints(n), deadline=20) for n in range(20)]
    try:
        assert {ended(mine, job["id"], 30)["status"] for job in quick} == {"succeeded"}
        told = [mine.get(job["urls"]["self"]).json()["status"] for job in beside]
        assert told == ["running", "running"]
    finally:
        for job in beside:
            mine.post(job["urls"]["cancel"])


@pytest.mark.usefixtures("busy")
def test_a_job_that_waits_can_be_called_off_or_expires(mine: Http) -> None:
    waiting, late = submit(mine), submit(mine, deadline=0.3)
    canceled = mine.post(waiting["urls"]["cancel"])
    expired = ended(mine, late["id"])

    assert (canceled.status, canceled.json()["status"]) == (202, "canceled")
    assert (expired["status"], expired["attempts"]) == ("expired", 0)
    assert expired["error"]["code"] == "deadline_exceeded"
    assert mine.get(late["urls"]["result"]).status == 504
    # Nobody ran either.
    shown = ended(mine, waiting["id"])
    assert (shown["status"], shown["attempts"], shown["started_at"]) == ("canceled", 0, None)


def test_a_job_that_runs_can_be_called_off_and_again(mine: Http, witness: Witness) -> None:
    ran = sum(witness.models()["identity"])
    job = submit(mine, input=slow(1))
    running(mine, job)

    first, second = (mine.post(job["urls"]["cancel"]) for _ in range(2))
    assert (first.status, first.json()["status"]) == (202, "canceled")
    assert (second.status, second.json()["status"]) == (202, "canceled")
    assert mine.get(job["urls"]["result"]).status == 409
    # What the model still answers changes nothing.
    until(lambda: sum(witness.models()["identity"]) > ran, 15)
    assert ended(mine, submit(mine)["id"])["status"] == "succeeded"
    assert mine.get(job["urls"]["self"]).json()["status"] == "canceled"


def test_a_job_whose_deadline_passes_while_it_runs_expires(mine: Http, witness: Witness) -> None:
    ran = sum(witness.models()["identity"])
    job = ended(mine, submit(mine, input=slow(20), deadline=0.5)["id"])

    assert (job["status"], job["attempts"]) == ("expired", 1)
    assert job["error"]["code"] == "deadline_exceeded"
    # The model was told.
    until(lambda: sum(witness.models()["identity"]) > ran, 10)


def test_a_job_that_has_ended_cannot_be_called_off(mine: Http) -> None:
    job = ended(mine, submit(mine)["id"])
    reply = mine.post(job["urls"]["cancel"])

    assert reply.status == 409
    assert "succeeded" in reply.json()["detail"]
    # The openai SDK would try again.
    assert reply.headers["x-should-retry"] == "false"
    assert mine.get(job["urls"]["self"]).json() == job


def test_who_waits_for_an_inference_that_is_called_off_hears_that(mine: Http) -> None:
    def cancel() -> Reply:
        (job,) = until(lambda: mine.get("/v1/jobs?status=running&kind=infer").json()["data"], 10)
        return mine.post(job["urls"]["cancel"])

    waited, canceled = together(
        [lambda: mine.post(IDENTITY, slow(8), Prefer="wait=20"), cancel],
    )
    assert canceled.status == 202
    assert (waited.status, waited.json()) == (
        409,
        {"error": "the job was canceled: it has no result"},
    )


def test_a_realtime_request_cannot_be_called_off(mine: Http) -> None:
    quick = mine.post(IDENTITY, ints(1)).headers["Tidegate-Job-Id"]
    reply = mine.post(f"/v1/jobs/{quick}/cancel")

    assert reply.status == 409
    assert "realtime" in reply.json()["detail"]


def test_a_job_that_has_not_ended_has_no_result_yet(mine: Http) -> None:
    job = submit(mine, input=slow(0.5))
    early = mine.get(job["urls"]["result"])

    assert (early.status, early.headers["Retry-After"]) == (409, "1")
    assert early.headers["x-should-retry"] is None
    assert ended(mine, job["id"])["status"] == "succeeded"
    assert mine.get(job["urls"]["result"]).status == 200


# Lists


def ids(reply: Reply) -> list[str]:
    assert reply.status == 200, reply
    return [job["id"] for job in reply.json()["data"]]


def test_pages_of_jobs_hold_every_job_once_newest_first(new_tenant: Any) -> None:
    server: Http = new_tenant()
    made = [submit(server)["id"] for _ in range(3)]
    made += [server.post(IDENTITY, ints(1)).headers["Tidegate-Job-Id"] for _ in range(2)]
    until(lambda: len(ids(server.get("/v1/jobs"))) == 5, 5)

    found: list[str] = []
    page = server.get("/v1/jobs?limit=2").json()
    while True:
        found += [job["id"] for job in page["data"]]
        assert page["first_id"] == page["data"][0]["id"]
        assert page["last_id"] == page["data"][-1]["id"]
        if not page["has_more"]:
            break
        page = server.get(f"/v1/jobs?limit=2&after={page['last_id']}").json()

    assert found == sorted(made, key=UUID, reverse=True)


def test_lists_of_jobs_can_be_filtered(new_tenant: Any) -> None:
    server: Http = new_tenant()
    good = ended(server, submit(server)["id"])["id"]
    bad = ended(server, submit(server, input=ints(1, fail="x"))["id"])["id"]
    quick = server.post(IDENTITY, ints(1)).headers["Tidegate-Job-Id"]
    until(lambda: len(ids(server.get("/v1/jobs"))) == 3, 5)

    assert set(ids(server.get("/v1/jobs?kind=infer"))) == {good, bad}
    assert ids(server.get("/v1/jobs?kind=realtime")) == [quick]
    assert ids(server.get("/v1/jobs?kind=batch")) == []
    assert ids(server.get("/v1/jobs?status=failed")) == [bad]
    assert set(ids(server.get("/v1/jobs?status=succeeded"))) == {good, quick}
    assert ids(server.get("/v1/jobs?status=succeeded&kind=infer")) == [good]


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=x", "kind=other", "status=done", "after=nothing"]
)
def test_a_list_asked_for_in_the_wrong_words_is_refused(mine: Http, query: str) -> None:
    reply = mine.get(f"/v1/jobs?{query}")

    name = query.partition("=")[0]
    assert reply.status == 400
    assert name in reply.json()["detail"]
    assert reply.json()["errors"][0]["pointer"] == f"#/{name}"


# Somebody else's


def test_another_tenant_finds_nothing(mine: Http, stranger: Http) -> None:
    job = ended(mine, submit(mine)["id"])
    quick = mine.post(IDENTITY, ints(1)).headers["Tidegate-Job-Id"]

    for reply in (
        stranger.get(f"/v1/jobs/{job['id']}"),
        stranger.get(f"/v1/jobs/{job['id']}/result"),
        stranger.post(f"/v1/jobs/{job['id']}/cancel"),
        stranger.get(f"/v1/jobs/{quick}"),
        stranger.get(f"/v1/jobs/{quick}/result"),
        stranger.post(f"/v1/jobs/{quick}/cancel"),
    ):
        assert reply.status == 404
    assert ids(stranger.get("/v1/jobs")) == []
    assert mine.get(f"/v1/jobs/{job['id']}").json() == job


# What is wrong with a job is said by name


MISFIT = {"inputs": [tensor("INTS", "INT64", [1], [1, 2])]}
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no model": ({"model": None}, 422, "#/model"),
    "empty model": ({"model": ""}, 422, "#/model"),
    "model of another type": ({"model": 3}, 422, "#/model"),
    "unknown model": ({"model": "nobody"}, 404, "#/model"),
    "unknown version": ({"version": "77"}, 404, "#/model"),
    "version that is no number": ({"version": "latest"}, 422, "#/version"),
    "no input": ({"input": None}, 422, "#/input"),
    "input of another type": ({"input": [1]}, 422, "#/input"),
    "empty input": ({"input": {}}, 400, "#/input"),
    "tensor that does not fit": ({"input": MISFIT}, 400, "#/input"),
    "unknown tensor": ({"input": {"inputs": [tensor("OTHER", "INT64", [1])]}}, 400, "#/input"),
    "unknown output": ({"input": ints(1) | {"outputs": [{"name": "OTHER"}]}}, 400, "#/input"),
    "unknown priority": ({"priority": "urgent"}, 422, "#/priority"),
    "priority of another type": ({"priority": 1}, 422, "#/priority"),
    "no time": ({"deadline": 0}, 422, "#/deadline"),
    "negative time": ({"deadline": -1}, 422, "#/deadline"),
    "time in words": ({"deadline": "soon"}, 422, "#/deadline"),
    "more time than there is": ({"deadline": 10**9}, 422, "#/deadline"),
    "metadata of another type": ({"metadata": {"n": 1}}, 422, "#/metadata"),
    "long name in the metadata": ({"metadata": {"k" * 65: "v"}}, 422, "#/metadata"),
    "much metadata": ({"metadata": {str(n): "v" for n in range(17)}}, 422, "#/metadata"),
    "unknown field": ({"colour": "red"}, 422, "#/colour"),
}


@pytest.mark.parametrize(("fields", "status", "pointer"), REFUSED.values(), ids=REFUSED.keys())
def test_a_job_that_cannot_be_is_refused_by_name(
    mine: Http, fields: dict[str, Any], status: int, pointer: str
) -> None:
    given = {"model": "identity", "input": ints(1)} | fields
    reply = mine.post(
        "/v1/jobs", {name: value for name, value in given.items() if value is not None}
    )
    problem = reply.json()

    assert (reply.status, problem["status"]) == (status, status)
    assert reply.headers["Content-Type"] == "application/problem+json"
    (error,) = problem["errors"]
    # A JSON pointer: to the field, or to something in it.
    assert f"{error['pointer']}/".startswith(f"{pointer}/"), error


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ([tensor("INTS", "INT64", [1], [1, 2])], "INTS"),
        ([tensor("OTHER", "INT64", [1])], "OTHER"),
        ([tensor("INTS", "INT64", [0] * 65, [65, 1])], "INTS"),
    ],
    ids=["elements", "unknown", "batch"],
)
def test_the_tensor_that_does_not_fit_is_named(mine: Http, tensors: list[Any], name: str) -> None:
    reply = mine.post("/v1/jobs", {"model": "identity", "input": {"inputs": tensors}})

    assert (reply.status, reply.json()["code"]) == (400, "bad_tensor")
    assert f"'{name}'" in reply.json()["detail"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff"], ids=repr)
def test_a_body_that_is_no_object_is_refused(mine: Http, body: bytes) -> None:
    reply = mine.post("/v1/jobs", body, Content_Type="application/json")

    assert reply.status in (400, 422)
    assert reply.headers["Content-Type"] == "application/problem+json"


def test_nothing_is_kept_of_a_refused_job(new_tenant: Any) -> None:
    server: Http = new_tenant()
    assert server.post("/v1/jobs", {"model": "identity", "input": {}}).status == 400

    assert ids(server.get("/v1/jobs")) == []


@pytest.mark.parametrize("job", ["nothing", "00000000-0000-7000-8000-000000000000"])
def test_a_job_nobody_made_is_not_found(mine: Http, job: str) -> None:
    for reply in (
        mine.get(f"/v1/jobs/{job}"),
        mine.get(f"/v1/jobs/{job}/result"),
        mine.post(f"/v1/jobs/{job}/cancel"),
    ):
        assert reply.status == 404
        assert reply.headers["Content-Type"] == "application/problem+json"


def test_a_timeout_beyond_all_time_is_cut_to_the_longest(mine: Http) -> None:
    asked = ints(1, timeout=2**62)
    assert mine.post("/v2/models/identity/infer", asked, Prefer="wait=20").status == 200
    assert mine.get("/v1/jobs?kind=infer").status == 200


@pytest.mark.parametrize("field", ["model", "metadata"])
def test_text_that_is_no_unicode_is_refused(mine: Http, field: str) -> None:
    job = {"model": "identity", "input": ints(1)}
    job[field] = "\ud800" if field == "model" else {"a": "\ud800"}
    reply = mine.post("/v1/jobs", job)
    assert 400 <= reply.status < 500, reply


@pytest.mark.parametrize("version", ["1\n", "١", "x", "-1"])
def test_a_version_that_is_no_number_is_refused(mine: Http, version: str) -> None:
    job = {"model": "identity", "version": version, "input": ints(1)}
    assert mine.post("/v1/jobs", job).status == 422


def test_a_models_own_timeout_is_the_jobs_deadline(mine: Http) -> None:
    asked = {"model": "identity", "input": ints(1, delay_ms=20_000, timeout=500_000)}
    job = ended(mine, mine.post("/v1/jobs", asked).json()["id"])
    assert job["status"] == "expired"
    wrong = {"model": "identity", "input": ints(1, timeout="soon")}
    refused = mine.post("/v1/jobs", wrong)
    assert (refused.status, "timeout" in str(refused.json())) == (400, True)
