"""A POST sent twice under one `Idempotency-Key` does its work once, whatever died in between."""

from __future__ import annotations

import gzip
import http.client
import operator
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import numpy as np
import openai
import pytest
import tritonclient.http as tc

from ops.embedded import Stack
from tests.e2e.helpers import (
    IDENTITY,
    Http,
    Reply,
    answered_ints,
    batch_line,
    ended,
    ints,
    together,
    until,
    upload,
)

pytestmark = pytest.mark.stack

LENGTH = "Inference-Header-Content-Length"


def new_key() -> str:
    return secrets.token_hex(16)


def submit(server: Http, key: str, body: object = None, **headers: str) -> Reply:
    given = body if body is not None else {"model": "identity", "input": ints(1)}
    return server.post("/v1/jobs", given, Idempotency_Key=key, **headers)


def replayed(reply: Reply) -> bool:
    return reply.headers["Idempotent-Replayed"] == "true"


def job_ids(server: Http) -> list[str]:
    found: list[str] = []
    page = server.get("/v1/jobs?limit=100").json()
    while True:
        found += [job["id"] for job in page["data"] if job["kind"] != "realtime"]
        if not page["has_more"]:
            return found
        page = server.get(f"/v1/jobs?limit=100&after={page['last_id']}").json()


@pytest.fixture
def fresh(new_tenant: Any) -> Http:
    """The gateway for a tenant that has nothing yet."""
    server: Http = new_tenant()
    return server


@pytest.fixture
def objects(stack: Stack) -> Path:
    return Path(urlsplit(stack.env["TIDEGATE_OBJECTS_URL"]).path)


def stored(objects: Path) -> set[Path]:
    return {path for path in objects.rglob("*") if path.is_file()}


# Jobs


def test_a_job_sent_again_is_the_same_job(fresh: Http) -> None:
    key = new_key()
    first = submit(fresh, key)
    assert (first.status, first.headers["Idempotent-Replayed"]) == (202, None)
    again = submit(fresh, key)
    done = ended(fresh, first.json()["id"])
    later = submit(fresh, f'"{key}"')

    for reply in (again, later):
        assert reply.json()["id"] == first.json()["id"]
        assert reply.headers["Location"] == first.headers["Location"]
        assert reply.headers["Tidegate-Job-Id"] == first.json()["id"]
        assert replayed(reply)
    assert again.status == 202
    assert later.json()["status"] == done["status"] == "succeeded"
    assert job_ids(fresh) == [done["id"]]


def test_the_same_json_in_other_words_is_the_same_request(fresh: Http) -> None:
    key = new_key()
    first = submit(fresh, key)
    other = b'{ "input": {"inputs": [{"data": [1], "shape": [1, 1], "datatype": "INT64", "name":'
    again = submit(
        fresh, key, other + b' "INTS"}]},\n "model": "identity"}', Content_Type="application/json"
    )

    assert again.json()["id"] == first.json()["id"]


def test_who_asks_again_may_have_more_patience(fresh: Http) -> None:
    key = new_key()
    first = submit(fresh, key)
    again = submit(fresh, key, Prefer="wait=20")

    assert (again.status, again.json()["status"]) == (200, "succeeded")
    assert again.json()["id"] == first.json()["id"]


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        ({"model": "identity", "input": ints(2)}, {}),
        ({"model": "identity", "input": ints(1), "priority": "high"}, {}),
        ({"model": "identity", "input": ints(1)}, {"Tidegate_Deadline": "100"}),
    ],
    ids=["input", "priority", "deadline"],
)
def test_the_key_of_another_request_is_refused_by_name(
    fresh: Http, body: object, headers: dict[str, str]
) -> None:
    key = new_key()
    first = submit(fresh, key)
    reply = submit(fresh, key, body, **headers)

    assert (reply.status, reply.json()["code"]) == (422, "idempotency_key_reused")
    assert reply.json()["errors"] == [
        {"pointer": "#/Idempotency-Key", "detail": reply.json()["detail"]}
    ]
    assert job_ids(fresh) == [first.json()["id"]]


@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256, '"open', "naïve"])
def test_a_key_of_another_form_is_refused_by_name(fresh: Http, key: str) -> None:
    replies = [
        submit(fresh, key),
        fresh.post("/v1/batches", BATCH | {"input_file_id": "x"}, Idempotency_Key=key),
        send_file(fresh, key, "{}"),
        fresh.post(IDENTITY, ints(1), Idempotency_Key=key, Prefer="respond-async"),
    ]

    for reply in replies:
        assert reply.status == 400, reply
        assert b"Idempotency-Key" in reply.body
    assert job_ids(fresh) == []
    assert fresh.get("/v1/files").json()["data"] == []


def test_a_request_that_was_refused_leaves_its_key_free(fresh: Http) -> None:
    key = new_key()
    assert submit(fresh, key, {"model": "nobody", "input": ints(1)}).status == 404
    assert submit(fresh, key, {"model": "identity", "input": {}}).status == 400
    good = submit(fresh, key)

    assert (good.status, good.headers["Idempotent-Replayed"]) == (202, None)


def test_the_same_key_is_another_tenants_own(mine: Http, stranger: Http) -> None:
    key = new_key()
    one, other = submit(mine, key), submit(stranger, key)

    assert (one.status, other.status) == (202, 202)
    assert one.json()["id"] != other.json()["id"]
    assert other.headers["Idempotent-Replayed"] is None


def test_the_same_key_on_another_route_is_another_key(fresh: Http) -> None:
    key = new_key()
    one = submit(fresh, key)
    other = fresh.post(IDENTITY, ints(1), Idempotency_Key=key, Prefer="respond-async")

    assert other.status == 202
    assert one.json()["id"] != other.json()["id"]


def test_of_many_at_once_each_gets_its_own_answer(fresh: Http) -> None:
    """They share transactions, and neither keys nor each other's refusals."""
    used = new_key()
    first = submit(fresh, used).json()["id"]
    calls = {
        "new": lambda: submit(fresh, new_key()),
        "plain": lambda: fresh.post("/v1/jobs", {"model": "identity", "input": ints(2)}),
        "again": lambda: submit(fresh, used),
        "misused": lambda: submit(fresh, used, {"model": "identity", "input": ints(3)}),
        "wrong": lambda: submit(fresh, new_key(), {"model": "nobody", "input": ints(4)}),
    }
    names = [*calls] * 20
    replies = together([calls[name] for name in names])

    said = {name: [r for n, r in zip(names, replies, strict=True) if n == name] for name in calls}
    assert {name: {reply.status for reply in said[name]} for name in calls} == {
        "new": {202},
        "plain": {202},
        "again": {202},
        "misused": {422},
        "wrong": {404},
    }
    assert {reply.json()["id"] for reply in said["again"]} == {first}
    made = [reply.json()["id"] for name in ("new", "plain") for reply in said[name]]
    assert sorted(job_ids(fresh)) == sorted([first, *made])
    assert {ended(fresh, job_id)["status"] for job_id in made} == {"succeeded"}


def test_two_hundred_at_once_make_one_job(fresh: Http) -> None:
    key = new_key()
    replies = together([partial(answered, fresh, key) for _ in range(200)])

    assert {reply.status for reply in replies} <= {200, 202}
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert [replayed(reply) for reply in replies].count(False) == 1
    assert len(job_ids(fresh)) == 1


def attempt(post: Callable[[], Reply]) -> Reply | None:
    """None: no answer, or one that says to try again."""
    try:
        reply = post()
    except (OSError, http.client.HTTPException):
        return None
    return None if reply.status == 503 else reply


def answered(server: Http, key: str, body: object = None) -> Reply:
    """As a client that does not give up gets it."""
    found = until(lambda: attempt(partial(submit, server, key, body)), 90)
    assert found is not None
    return found


# Inferences that become jobs


def test_an_inference_made_a_job_is_made_one_job(fresh: Http) -> None:
    key = new_key()
    first = fresh.post(IDENTITY, ints(5), Idempotency_Key=key, Prefer="respond-async")
    again = fresh.post(IDENTITY, ints(5), Idempotency_Key=key, Prefer="wait=20")
    other = fresh.post(IDENTITY, ints(6), Idempotency_Key=key, Prefer="wait=20")

    assert (first.status, again.status) == (202, 200)
    assert answered_ints(again.json()) == [5]
    assert again.headers["Tidegate-Job-Id"] == first.json()["id"]
    assert replayed(again)
    assert (other.status, list(other.json())) == (422, ["error"])
    assert "Idempotency-Key" in other.json()["error"]
    assert job_ids(fresh) == [first.json()["id"]]


def test_a_body_compressed_again_is_the_same_body(fresh: Http) -> None:
    """Its bytes are not: gzip writes down when it was at work."""
    key, body = new_key(), b'{"inputs": [%s]}' % ints_text(7)
    replies = [
        fresh.post(
            IDENTITY,
            gzip.compress(body, mtime=moment),
            Content_Encoding="gzip",
            Idempotency_Key=key,
            Prefer="respond-async",
        )
        for moment in (1, 2)
    ]

    assert [reply.status for reply in replies] == [202, 202]
    assert len({reply.json()["id"] for reply in replies}) == 1


def ints_text(value: int) -> bytes:
    return b'{"name": "INTS", "datatype": "INT64", "shape": [1, 1], "data": [%d]}' % value


def test_a_large_input_sent_again_is_stored_once(fresh: Http, objects: Path) -> None:
    floats = np.linspace(-1, 1, 100_000, dtype=np.float32)[None, :]
    one = tc.InferInput("FLOATS", list(floats.shape), "FP32")
    one.set_data_from_numpy(floats)
    body, length = tc.InferenceServerClient.generate_request_body([one])
    headers = {LENGTH: str(length), "Prefer": "respond-async", "Idempotency-Key": new_key()}
    first = fresh("POST", IDENTITY, body, headers)
    ended(fresh, first.json()["id"])
    before = stored(objects)
    again = fresh("POST", IDENTITY, body, headers)
    refused = fresh("POST", IDENTITY, body[:-4] + b"\0\0\0\0", headers)

    assert again.json()["id"] == first.json()["id"]
    assert refused.status == 422
    assert stored(objects) == before


def test_a_realtime_request_takes_no_notice_of_keys(fresh: Http) -> None:
    """Nothing of it outlives its answer: sent again, it is answered again."""
    key = new_key()
    replies = [fresh.post(IDENTITY, ints(n), Idempotency_Key=key) for n in (1, 2)]

    assert [answered_ints(reply.json()) for reply in replies] == [[1], [2]]


# Files and batches

BATCH = {"endpoint": IDENTITY, "completion_window": "1h"}


def send_file(server: Http, key: str, text: str, **fields: str) -> Reply:
    form = {"purpose": "batch"} | fields
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in form.items()
    ]
    file = 'Content-Disposition: form-data; name="file"; filename="in.jsonl"'
    body = "".join([*parts, f"--x\r\n{file}\r\n\r\n{text}\r\n--x--\r\n"])
    return server.post(
        "/v1/files",
        body.encode(),
        Content_Type="multipart/form-data; boundary=x",
        Idempotency_Key=key,
    )


def test_a_file_sent_again_is_the_same_file_and_stored_once(fresh: Http, objects: Path) -> None:
    key = new_key()
    first = send_file(fresh, key, "{}\n" * 1000)
    before = stored(objects)
    again = send_file(fresh, key, "{}\n" * 1000)
    refused = [
        send_file(fresh, key, "{}\n" * 1001),
        send_file(fresh, key, "{}\n" * 1000, **{"expires_after[seconds]": "3600"}),
    ]

    assert (first.status, again.status) == (200, 200)
    assert again.json() == first.json()
    assert replayed(again)
    assert not replayed(first)
    for reply in refused:
        assert reply.status == 422
        assert reply.json()["error"]["param"] == "Idempotency-Key"
    assert stored(objects) == before
    assert len(fresh.get("/v1/files").json()["data"]) == 1


def test_what_a_key_made_and_is_gone_is_not_made_again(fresh: Http) -> None:
    key = new_key()
    file = send_file(fresh, key, "{}").json()
    assert fresh("DELETE", f"/v1/files/{file['id']}").status == 200
    again = send_file(fresh, key, "{}")

    assert again.status == 410
    assert again.json()["error"]["param"] == "Idempotency-Key"
    assert fresh.get("/v1/files").json()["data"] == []


def test_a_batch_sent_again_is_the_same_batch_even_without_its_file(fresh: Http) -> None:
    key = new_key()
    file = upload(fresh, batch_line("one", ints(1)))
    asked = BATCH | {"input_file_id": file["id"]}
    first = fresh.post("/v1/batches", asked, Idempotency_Key=key)
    assert fresh("DELETE", f"/v1/files/{file['id']}").status == 200
    again = fresh.post("/v1/batches", asked, Idempotency_Key=key)
    other = fresh.post("/v1/batches", asked | {"priority": "high"}, Idempotency_Key=key)

    assert (first.status, again.status) == (200, 200)
    assert again.json()["id"] == first.json()["id"]
    assert replayed(again)
    assert (other.status, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len(fresh.get("/v1/batches").json()["data"]) == 1


def test_a_webhook_endpoint_made_again_is_the_same_with_the_same_secret(fresh: Http) -> None:
    key = new_key()
    asked = {"name": "n", "url": "https://example.com/hook", "event_types": ["job.succeeded"]}
    first, again = (
        fresh.post("/v1/webhook_endpoints", asked, Idempotency_Key=key) for _ in range(2)
    )
    other = fresh.post("/v1/webhook_endpoints", asked | {"name": "m"}, Idempotency_Key=key)

    assert (first.status, again.status, other.status) == (200, 200, 422)
    assert again.json() == first.json()
    assert first.json()["signing_secret"]
    assert [replayed(reply) for reply in (first, again)] == [False, True]
    assert fresh("DELETE", f"/v1/webhook_endpoints/{first.json()['id']}").status == 200
    assert fresh.post("/v1/webhook_endpoints", asked, Idempotency_Key=key).status == 410
    assert fresh.get("/v1/webhook_endpoints").json()["data"] == []


@contextmanager
def losing(server: Http, answers: int) -> Iterator[tuple[str, list[bytes]]]:
    """An address before the gateway behind which so many first answers get lost: the gateway has
    begun to say them, and the connection breaks. Also gives how each of them began."""
    target = urlsplit(server.url)
    lost: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            upstream = socket.create_connection((target.hostname, target.port or 80))
            with client, upstream:
                asking = threading.Thread(target=pipe, args=(client, upstream), daemon=True)
                asking.start()
                while data := upstream.recv(65536):
                    if len(lost) < answers:
                        lost.append(data)
                        # For good, with the thread that still reads from it.
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    client.sendall(data)

        def pipe(one: socket.socket, other: socket.socket) -> None:
            try:
                while data := one.recv(65536):
                    other.sendall(data)
            except OSError:
                pass  # Somebody closed it.

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", lost
        listener.shutdown(socket.SHUT_RDWR)


def test_the_openai_sdks_own_retries_double_no_batch(fresh: Http) -> None:
    file = upload(fresh, batch_line("one", ints(1)))
    api_key = fresh.headers["Authorization"].removeprefix("Bearer ")
    with (
        losing(fresh, 2) as (url, lost),
        openai.OpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=3) as client,
    ):
        batch = client.batches.create(
            input_file_id=file["id"],
            endpoint=IDENTITY,  # type: ignore[arg-type]
            completion_window="1h",  # type: ignore[arg-type]
            extra_headers={"Idempotency-Key": new_key()},
        )

    assert [answer.split(b"\r\n")[0] for answer in lost] == [b"HTTP/1.1 200 OK"] * 2
    assert [one["id"] for one in fresh.get("/v1/batches").json()["data"]] == [batch.id]


# With gateways that die


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own, whose gateway may be killed."""
    patience = {"TIDEGATE_LEASE": "3", "TIDEGATE_HINT_TIMEOUT": "2"}
    var = tmp_path_factory.mktemp("idempotency") / "var"
    with Stack(var, environ=os.environ | patience) as stack:
        stack.start()
        yield stack


def test_two_hundred_at_once_and_a_gateway_that_is_killed_make_one_job(own: Stack) -> None:
    server, key = Http.of(own), new_key()
    before = set(job_ids(server))
    replies: list[Reply] = []
    threads = [
        threading.Thread(target=lambda: replies.append(answered(server, key))) for _ in range(200)
    ]
    for thread in threads:
        thread.start()
    # Some have been answered, most not.
    until(lambda: len(replies) > 5, 60)
    own.kill("gateway")
    own.start(only=("gateway",))
    for thread in threads:
        thread.join()

    (job,) = {reply.json()["id"] for reply in replies}
    assert len(replies) == 200
    assert answered(server, key).json()["id"] == job
    assert set(job_ids(server)) - before == {job}
    assert ended(server, job, 60)["status"] == "succeeded"


def test_as_many_jobs_as_keys_however_often_the_gateway_dies(own: Stack) -> None:
    """Killed anywhere: before the commit, between commit and publication, before the answer."""
    server, rng = Http.of(own), random.Random(3)
    before = set(job_ids(server))
    keys = [new_key() for _ in range(600)]
    left = iter(enumerate(keys))
    lock = threading.Lock()
    made: dict[str, str] = {}

    def client() -> None:
        while True:
            with lock:
                number, key = next(left, (0, ""))
            if not key:
                return
            body = {"model": "identity", "input": ints(number)}
            made[key] = answered(server, key, body).json()["id"]

    threads = [threading.Thread(target=client) for _ in range(12)]
    for thread in threads:
        thread.start()
    for kill in range(5):
        until(lambda: len(made), 60, partial(operator.le, 100 * (kill + 1)))
        time.sleep(rng.uniform(0, 0.05))
        own.kill("gateway")
        own.start(only=("gateway",))
    for thread in threads:
        thread.join()

    assert len(made) == len(set(made.values())) == len(keys)
    assert set(job_ids(server)) - before == set(made.values())
    for number, key in enumerate(keys):
        assert ended(server, made[key], 60)["status"] == "succeeded"
        result = server.get(f"/v1/jobs/{made[key]}/result").json()
        assert answered_ints(result) == [number]


POINTS = ("commit", "publish", "answer")
"""What a gateway does not come to do any more: see `dying`."""


@pytest.fixture
def deaths(own: Stack, tmp_path: Path) -> Iterator[Path]:
    """The folder in which to say where the gateway dies next."""
    usual = own.processes["gateway"]
    own.stop("gateway")
    command = ["tests.e2e.dying:app" if word == "web.wsgi:app" else word for word in usual.command]
    assert command != usual.command
    env = {**usual.env, "DYING": str(tmp_path)}
    own.processes["gateway"] = replace(usual, command=command, env=env)
    own.start(only=("gateway",))
    yield tmp_path
    own.stop("gateway")
    own.processes["gateway"] = usual
    own.start(only=("gateway",))


def test_a_gateway_that_dies_anywhere_on_the_way_leaves_one_job_and_one_batch(
    own: Stack, deaths: Path
) -> None:
    server = Http.of(own)
    file = upload(server, batch_line("one", ints(1)))
    bodies: dict[str, dict[str, Any]] = {
        "/v1/jobs": {"model": "identity", "input": ints(1)},
        "/v1/batches": BATCH | {"input_file_id": file["id"]},
    }
    for point in POINTS:
        for path, body in bodies.items():
            before = set(job_ids(server))
            key = new_key()
            (deaths / point).touch()
            with pytest.raises((OSError, http.client.HTTPException)):
                server.post(path, body, Idempotency_Key=key)
            assert not (deaths / point).exists()
            retry = partial(attempt, partial(server.post, path, body, Idempotency_Key=key))
            reply = until(retry, 30)
            assert reply is not None
            (job,) = set(job_ids(server)) - before
            assert reply.json()["id"] in (job, f"batch_{UUID(job).hex}")
            # Only what had been committed could be found again.
            assert (reply.headers["Idempotent-Replayed"] == "true") is (point != "commit")
            # Published or not, it is run.
            assert ended(server, job, 60)["status"] == "succeeded"
