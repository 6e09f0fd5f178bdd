"""What hangs is not what dies: stopped processes, requests that outlast their gateway."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from errors import Unavailable
from ops.embedded import Stack
from tasks import messages
from tests.conftest import BROKER, settings_of
from tests.e2e.helpers import Http, Reply, hanging, ints, together, until
from web.presence import TTL
from workers.app import build_app

pytestmark = pytest.mark.stack
IDENTITY = "/v2/models/identity/infer"
SLACK = 5
"""Seconds a client of a busy machine may hear its answer later than it was given."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that may be hurt, whose gateway asks for keys often."""
    var: Path = tmp_path_factory.mktemp("stalls") / "var"
    with Stack(var, environ={**os.environ, "TIDEGATE_KEY_TTL": "0.2"}) as stack:
        stack.start()
        yield stack


@pytest.fixture
def server(own: Stack) -> Http:
    return Http.of(own)


def test_a_postgres_that_hangs_stops_jobs_clearly_and_realtime_not_at_all(
    own: Stack, server: Http
) -> None:
    assert server.post(IDENTITY, ints(1)).status == 200
    with hanging(own, "postgres"):
        refused = server.get("/v1/jobs")
        assert (refused.status, refused.headers["Retry-After"]) == (503, "1")
        # The key was good a moment ago.
        assert server.post(IDENTITY, ints(2)).status == 200
    until(lambda: server.get("/v1/jobs").status, 20, lambda status: status == 200)

    job = {"model": "identity", "input": ints(3)}
    ended = server.post("/v1/jobs", job, Prefer="wait=30")
    assert (ended.status, ended.json()["status"]) == (200, "succeeded")


def test_a_key_that_was_good_is_not_waited_for_past_a_request_s_deadline(
    own: Stack, server: Http
) -> None:
    assert server.post(IDENTITY, ints(1)).status == 200
    with hanging(own, "postgres"):
        time.sleep(0.5)
        # Longer ago than the gateway trusts it without a question.
        for _ in range(3):
            reply, took = timed(partial(server.post, IDENTITY, ints(2), Tidegate_Deadline="1"))
            assert reply.status == 200
            assert took < 1 + SLACK / 2
    until(lambda: server.get("/v1/jobs").status, 20, lambda status: status == 200)


def test_a_redis_that_hangs_holds_up_no_question_about_models(own: Stack, server: Http) -> None:
    paths = {"/v2/health/ready": 400, "/v2/models/stats": 503, "/v2": 503}
    # A moment ago a worker was there: the gateway believes so still, and sends.
    assert [server.get(path).status for path in paths] == [200] * 3
    with hanging(own, "redis"):
        # First while that is believed, then while it is asked.
        for _ in range(2):
            answers = together([partial(timed, partial(server.get, path)) for path in paths])
            assert [reply.status for reply, _ in answers] == list(paths.values())
            assert max(took for _, took in answers) < 5 + SLACK
    until(lambda: server.get("/v2/health/ready").status, 20, lambda status: status == 200)


def test_a_redis_that_hangs_does_not_outlast_a_request_s_deadline(own: Stack, server: Http) -> None:
    assert server.post(IDENTITY, ints(1)).status == 200
    with hanging(own, "redis"):
        # Nobody knows any more whether a worker is there.
        time.sleep(TTL + 0.1)
        asked = [
            partial(timed, partial(server.post, IDENTITY, ints(2), Tidegate_Deadline=seconds))
            for seconds in ("0.5", "0.5", "20")
        ]
        answers = together(asked)
    assert [reply.status for reply, _ in answers] == [503] * 3
    # Who has the time hears what became of the question; the others, that theirs is over.
    told = [reply.json()["error"] for reply, _ in answers]
    assert ["in time" in error for error in told] == [True, True, False]
    assert max(took for _, took in answers) < 2 + SLACK
    until(lambda: server.post(IDENTITY, ints(3)).status, 20, lambda status: status == 200)


def test_who_sends_to_a_broker_that_hangs_hears_so_soon(own: Stack) -> None:
    build_app(settings_of(own))
    queue = messages.batch_queue("nobody")
    messages.send(messages.CHUNKS, queue, ids=[])
    with hanging(own, BROKER):
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(Unavailable):
                messages.send(messages.CHUNKS, queue, ids=[])
            assert time.monotonic() - began < 3 * messages.SEND_TIMEOUT + SLACK
    messages.send(messages.CHUNKS, queue, ids=[])


def timed(ask: Callable[[], Reply]) -> tuple[Reply, float]:
    """What was answered, and after how many seconds."""
    began = time.monotonic()
    return ask(), time.monotonic() - began


def test_who_waits_for_a_job_hears_of_it_when_the_gateway_stops(own: Stack, server: Http) -> None:
    job = {"model": "identity", "input": ints(4, delay_ms=3000)}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(partial(server.post, "/v1/jobs", job, Prefer="wait=60"))
        until(lambda: server.get("/v1/jobs?status=running").json()["data"], 10)
        own.stop("gateway")
        reply = waiting.result(60)
    own.start(only=("gateway",))

    assert reply.status == 202
    path = reply.headers["Location"]
    until(lambda: server.get(path).json()["status"], 20, lambda status: status == "succeeded")


def test_a_request_in_flight_is_answered_before_the_gateway_stops(own: Stack, server: Http) -> None:
    assert server.post(IDENTITY, ints(5)).status == 200
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(partial(server.post, IDENTITY, ints(6, delay_ms=1500)))
        until(lambda: len(server.get("/v1/jobs?limit=1").json()["data"]) == 1, 10)
        own.stop("gateway")
        reply = slow.result(60)
    own.start(only=("gateway",))

    assert reply.status == 200
