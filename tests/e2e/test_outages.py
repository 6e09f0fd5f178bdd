"""Parts that die and come back: clients are told to wait, and nothing accepted is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import redis

from ops.embedded import Stack
from tests.e2e.helpers import (
    DIGITS,
    IDENTITY,
    Http,
    Reply,
    answered_ints,
    ended,
    flower,
    ints,
    tensor,
    until,
)

pytestmark = pytest.mark.stack

PRESENCE = 15
"""Seconds in which a gateway notices that no worker is there any more, with some to spare."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: what is killed here, nobody else misses."""
    # Short, so that what a dead part held is taken up soon.
    patience = {"TIDEGATE_LEASE": "3", "TIDEGATE_HINT_TIMEOUT": "2"}
    var = tmp_path_factory.mktemp("outages") / "var"
    with Stack(var, environ=os.environ | patience) as stack:
        stack.start()
        yield stack


@pytest.fixture
def server(own: Stack) -> Http:
    return Http.of(own)


@contextmanager
def without(own: Stack, name: str, *, killed: bool = False) -> Iterator[None]:
    """A part is away meanwhile."""
    if killed:
        own.kill(name)
    else:
        own.stop(name)
    try:
        yield
    finally:
        own.start(only=(name,))


def infer(server: Http, deadline: float = 2) -> Reply:
    return server("POST", IDENTITY, ints(1), {"Tidegate-Deadline": str(deadline)})


def started(server: Http, request: dict[str, Any]) -> dict[str, Any]:
    """A job of the model `identity` that somebody runs."""
    job: dict[str, Any] = server.post("/v1/jobs", {"model": "identity", "input": request}).json()
    path = job["urls"]["self"]
    until(lambda: server.get(path).json()["status"], 10, lambda status: status == "running")
    return job


def works_again(server: Http, seconds: float = 30) -> None:
    reply = until(lambda: infer(server), seconds, lambda reply: reply.status == 200)
    assert answered_ints(reply.json()) == [1]


def family(own: Stack, *names: str) -> set[tuple[int, float]]:
    """The processes of these parts, with their children: ids, and moments of birth."""
    return {(one.pid, one.create_time()) for name in names for one in own.family(name)}


def refused(reply: Reply) -> bool:
    """Unavailable, in the words and headers of a service that is."""
    if reply.status != 503:
        return False
    assert int(reply.headers["Retry-After"]) >= 1
    assert list(reply.json()) == ["error"]
    return True


def test_without_triton_requests_are_refused_and_what_was_accepted_waits_for_it(
    own: Stack, server: Http
) -> None:
    works_again(server)
    survivors = family(own, "gateway", "worker")
    job = started(server, ints(5, delay_ms=1500))
    with without(own, "triton", killed=True):
        until(lambda: infer(server), 10, refused)
        until(lambda: server.get("/v2/health/ready").status, 10, lambda status: status == 400)
        assert server.get("/livez").status == 200
        assert server.get(job["urls"]["self"]).json()["status"] in ("queued", "running")
    works_again(server)

    assert server.get("/v2/models/digits/ready").status == 200
    assert ended(server, job["id"], 30)["status"] == "succeeded"
    assert answered_ints(server.get(job["urls"]["result"]).json()) == [5]
    assert family(own, "gateway", "worker") == survivors


def test_without_a_worker_requests_are_refused_and_jobs_wait_for_it(
    own: Stack, server: Http
) -> None:
    works_again(server)
    held = started(server, ints(6, delay_ms=1000))
    with without(own, "worker", killed=True):
        until(lambda: infer(server, 0.5), PRESENCE, refused)
        unready = until(lambda: server.get("/readyz"), 5, lambda reply: reply.status == 503)
        assert "worker" in unready.json()["checks"]["workers"]

        accepted = server.post("/v1/jobs", {"model": "identity", "input": ints(7)})
        assert accepted.status == 202, accepted
        job = accepted.json()
        assert server.get(job["urls"]["self"]).json()["status"] == "queued"
    works_again(server)

    assert ended(server, job["id"], 30)["status"] == "succeeded"
    assert answered_ints(server.get(job["urls"]["result"]).json()) == [7]
    # What it ran when it died was run again, by the next one.
    again = ended(server, held["id"], 30)
    assert (again["status"], again["attempts"]) == ("succeeded", 2)
    assert answered_ints(server.get(held["urls"]["result"]).json()) == [6]


def test_a_job_called_off_frees_the_model(own: Stack, server: Http) -> None:
    triton = Http(own.env["TIDEGATE_TRITON_HTTP_URL"])

    def ended_requests() -> int:
        (model,) = triton.get("/v2/models/identity/stats").json()["model_stats"]
        counts = model["inference_stats"]
        return int(counts["success"]["count"] + counts["fail"]["count"])

    works_again(server)
    before = ended_requests()
    job = started(server, ints(1, delay_ms=60_000))
    assert server.post(job["urls"]["cancel"]).status == 202

    until(lambda: ended_requests() > before, 15)


def test_a_worker_that_stops_in_order_is_missed_at_once_and_hands_over_its_work(
    own: Stack, server: Http
) -> None:
    works_again(server)
    job = started(server, ints(1, delay_ms=500))
    with without(own, "worker"):
        # It said goodbye; nobody waited for its silence, and it ended what it ran.
        assert server.get(job["urls"]["self"]).json()["status"] == "succeeded"
        until(lambda: infer(server, 0.5), 5, refused)
    works_again(server)


def test_gateway_and_worker_outlive_a_restart_of_redis(own: Stack, server: Http) -> None:
    works_again(server)
    survivors = family(own, "gateway", "worker", "sweeper")
    with without(own, "redis"):
        until(lambda: infer(server), 10, refused)
        # The ledger needs no broker to accept.
        accepted = server.post("/v1/jobs", {"model": "identity", "input": ints(8)})
        assert accepted.status == 202, accepted
    works_again(server)

    assert ended(server, accepted.json()["id"], 30)["status"] == "succeeded"
    assert family(own, "gateway", "worker", "sweeper") == survivors


def test_a_redis_that_forgot_everything_loses_no_job(own: Stack, server: Http) -> None:
    works_again(server)
    with without(own, "worker"):
        job = server.post("/v1/jobs", {"model": "identity", "input": ints(9)}).json()
        # It keeps nothing on disk.
        own.stop("redis")
        own.start(only=("redis",))

    assert ended(server, job["id"], 60)["status"] == "succeeded"
    works_again(server)


def test_gateway_and_worker_outlive_a_restart_of_postgres(own: Stack, server: Http) -> None:
    works_again(server)
    survivors = family(own, "gateway", "worker", "sweeper")
    with without(own, "postgres"):
        away = until(lambda: server.get("/v1/jobs"), 10, lambda reply: reply.status == 503)
        assert away.headers["Content-Type"] == "application/problem+json"
        assert int(away.headers["Retry-After"]) >= 1
        # Realtime needs no ledger: the key was good a moment ago.
        answered = infer(server)
        assert (answered.status, answered_ints(answered.json())) == (200, [1])
    until(lambda: server.get("/v1/jobs").status, 30, lambda status: status == 200)

    job = server.post("/v1/jobs", {"model": "identity", "input": ints(1)}).json()
    assert ended(server, job["id"], 30)["status"] == "succeeded"
    # What was answered meanwhile is written down after all.
    record = f"/v1/jobs/{answered.headers['Tidegate-Job-Id']}"
    until(lambda: server.get(record).json()["status"], 10, lambda status: status == "succeeded")
    assert family(own, "gateway", "worker", "sweeper") == survivors


def test_workers_side_by_side_share_the_work(own: Stack, server: Http) -> None:
    works_again(server)
    own.add_worker("worker-1", "--gpu", "1")
    own.start(only=("worker-1",))
    jobs: list[dict[str, Any]] = []

    def by_whom() -> set[str]:
        asked = {"model": "identity", "input": ints(1, delay_ms=100)}
        jobs.extend(server.post("/v1/jobs", asked).json() for _ in range(4))
        return {server.get(job["urls"]["self"]).json()["worker"] for job in jobs} - {None}

    try:
        names = until(by_whom, 30, lambda found: len(found) == 2)
        listed = until(
            lambda: flower(own.env).get("/api/workers?refresh=1").json(),
            20,
            lambda found: len(found) == 4,
        )
        assert all(ended(server, job["id"])["status"] == "succeeded" for job in jobs)
    finally:
        own.stop("worker-1")

    assert {name.partition("@")[0] for name in names} == {"default-batch", "default-gpu1-batch"}
    # Each is a node for each lane.
    assert listed.keys() == names | {name.replace("-batch@", "@") for name in names}
    # And one alone goes on with it.
    works_again(server)
    image = {"inputs": [tensor("image", "FP32", [0.0] * 64)]}
    assert server.post(DIGITS, image).status == 200


def test_a_worker_of_another_group_reads_that_groups_lanes_only(own: Stack) -> None:
    own.add_worker("vision", "--gpu", "none", "--group", "vision")
    own.start(only=("vision",))
    with redis.Redis.from_url(own.env["TIDEGATE_REDIS_URL"]) as client:
        present = partial(client.zrange, "tidegate:workers:vision", 0, -1)
        until(present, 20)
    banner = own.log("vision").read_text()
    own.stop("vision")

    assert "vision.realtime" in banner
    assert "default.realtime" not in banner
