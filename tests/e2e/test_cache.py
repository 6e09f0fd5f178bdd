"""A model that says that the same input has the same answer is not asked twice."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import tritonclient.http as tc

from config import MIB
from ops.embedded import Stack, product
from ops.embedded.ports import free_port
from storage.database import Database
from storage.keys import Keys
from tests.conftest import settings_of
from tests.e2e.helpers import IDENTITY, Http, Reply, answered_ints, hanging, ints, together, until

pytestmark = pytest.mark.stack

ECHO = "/v2/models/echo/infer"
ROOM = MIB
"""Bytes of answers, in the gateway and in Redis: nothing over a sixteenth of it is kept."""
CATALOG_TTL = 1.0
MARK = 'parameters { key: "tidegate.cache" value { string_value: "ttl=600" } }'


@pytest.fixture(scope="module")
def models(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of the stack, and two like `identity`: `echo`, which is marked, and `miswritten`."""
    folder = tmp_path_factory.mktemp("models") / "models"
    shutil.copytree(root / "ops" / "models", folder)
    for name, mark in (("echo", MARK), ("miswritten", MARK.replace("ttl=600", "for ever"))):
        shutil.copytree(folder / "identity", folder / name)
        config = folder / name / "config.pbtxt"
        # One instance: what runs, runs after the other.
        text = config.read_text().replace("count: 4", "count: 1")
        config.write_text(f"{text}\n{mark}\n")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Stack]:
    """A stack whose Triton loads what appears in its folder."""
    settings = {
        "TIDEGATE_CACHE_BYTES": str(ROOM),
        "TIDEGATE_CACHE_REDIS_BYTES": str(ROOM),
        "TIDEGATE_CATALOG_TTL": str(CATALOG_TTL),
        "TIDEGATE_GATEWAY_WORKERS": "1",
    }
    with Stack(tmp_path_factory.mktemp("cache") / "var", environ=os.environ | settings) as stack:
        stack.open()
        triton = stack.processes["triton"]
        command = [
            f"--model-repository={models}" if str(part).startswith("--model-repository") else part
            for part in triton.command
            if part not in ("--model-control-mode=explicit", "--load-model=*")
        ]
        command += ["--model-control-mode=poll", "--repository-poll-secs=1"]
        stack.processes["triton"] = replace(triton, command=command)
        stack.start(set(stack.processes) - {"flower"})
        yield stack


@pytest.fixture(scope="module")
def server(own: Stack) -> Http:
    return Http.of(own)


@pytest.fixture(scope="module")
def store(own: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own.env["TIDEGATE_REDIS_URL"], socket_timeout=30) as client:
        yield client


class Runs:
    """How many requests a model has run: Triton counts them."""

    def __init__(self, stack: Stack):
        self._triton = Http(stack.env["TIDEGATE_TRITON_HTTP_URL"])

    def of(self, model: str) -> int:
        """It counts a moment after it has answered."""
        found, last = self._read(model), -1
        while found != last:
            time.sleep(0.1)
            found, last = self._read(model), found
        return found

    def _read(self, model: str) -> int:
        told = self._triton.get(f"/v2/models/{model}/stats").json()["model_stats"]
        return sum(int(one["inference_stats"]["success"]["count"]) for one in told)


@pytest.fixture(scope="module")
def runs(own: Stack) -> Runs:
    return Runs(own)


def status(reply: Reply) -> str:
    """What the cache did, without how long an answer may still be given."""
    assert reply.status == 200, reply
    return re.sub(r"; ttl=[0-9]+", "", reply.headers["Cache-Status"])


MISS, HIT = "tidegate; fwd=uri-miss; stored", "tidegate; hit; detail=memory"
COLLAPSED = "tidegate; fwd=uri-miss; collapsed"


# Hits


def test_a_second_request_does_not_reach_triton(server: Http, runs: Runs) -> None:
    before = runs.of("echo")
    replies = [server.post(ECHO, ints(1, 2) | {"id": f"mine-{n}"}) for n in range(5)]

    assert [status(reply) for reply in replies] == [MISS, *[HIT] * 4]
    assert [reply.json()["id"] for reply in replies] == [f"mine-{n}" for n in range(5)]
    assert [answered_ints(reply.json()) for reply in replies] == [[1, 2]] * 5
    assert runs.of("echo") == before + 1


def test_tritons_own_client_gets_the_same_in_binary_and_from_json(
    own: Stack, server: Http, runs: Runs
) -> None:
    before = runs.of("echo")
    server.post(ECHO, ints(7, 7, 7))
    values = np.array([[7, 7, 7]], dtype=np.int64)
    headers = {"Authorization": f"Bearer {own.env['TIDEGATE_API_KEY']}"}
    with tc.InferenceServerClient(own.env["TIDEGATE_URL"].removeprefix("http://")) as client:
        for binary in (True, False):
            given = tc.InferInput("INTS", values.shape, "INT64")
            given.set_data_from_numpy(values, binary_data=binary)
            answer = client.infer("echo", [given], headers=dict(headers), request_id="x")
            assert (answer.as_numpy("INTS_OUT") == values).all()
            assert answer.get_response()["id"] == "x"
    assert runs.of("echo") == before + 1


def test_of_requests_at_one_time_one_runs(server: Http, runs: Runs) -> None:
    before = runs.of("echo")
    call = partial(server.post, ECHO, ints(3, delay_ms=1500))
    replies = together([call] * 24)

    assert runs.of("echo") == before + 1
    assert [answered_ints(reply.json()) for reply in replies] == [[3]] * 24
    statuses = [status(reply) for reply in replies]
    assert statuses.count(MISS) == 1
    assert statuses.count(COLLAPSED) + statuses.count(HIT) == 23
    assert COLLAPSED in statuses


def test_one_that_may_not_wait_leaves_the_others_alone(server: Http, runs: Runs) -> None:
    """Whether the one that runs is late, or one that waits for it."""
    late, *others = together(
        [
            partial(server.post, ECHO, ints(4, delay_ms=1500), Tidegate_Deadline="0.3"),
            *[partial(server.post, ECHO, ints(4, delay_ms=1500))] * 6,
        ]
    )
    assert late.status == 504
    assert {answered_ints(reply.json())[0] for reply in others} == {4}


def test_a_record_says_that_nothing_ran_for_it(server: Http) -> None:
    replies = [server.post(ECHO, ints(5)) for _ in range(2)]
    ids = [reply.headers["Tidegate-Job-Id"] for reply in replies]
    assert ids[0] != ids[1]

    def records() -> list[Any]:
        return [server.get(f"/v1/jobs/{job}").json() for job in ids]

    ran, kept = until(records, 10, lambda jobs: all(job["status"] == "succeeded" for job in jobs))
    assert (ran["metrics"]["cached"], ran["metrics"]["batch_size"]) == (False, 1)
    assert (kept["metrics"]["cached"], kept["metrics"]["batch_size"]) == (True, 0)
    assert kept["version"] == "1"


def test_gateways_share_through_redis(own: Stack, server: Http, runs: Runs) -> None:
    ports = [free_port(set()) for _ in range(2)]
    other = replace(product.gateway(own._settings, *ports), name="gateway-2")
    own.add(other)
    own.start({"gateway-2"})
    second = Http(f"http://127.0.0.1:{ports[0]}", server.headers)
    before = runs.of("echo")

    assert status(server.post(ECHO, ints(6))) == MISS
    # Kept in Redis behind the answer.
    reply = until(lambda: second("POST", ECHO, ints(6)), 10, lambda reply: "hit" in status(reply))
    assert answered_ints(reply.json()) == [6]
    assert runs.of("echo") <= before + 2
    assert status(server.post(ECHO, ints(8))) == MISS
    own.stop("gateway-2")


# No hits


@pytest.mark.parametrize("model", ["identity", "miswritten"])
def test_a_model_that_is_not_marked_is_run_each_time(server: Http, runs: Runs, model: str) -> None:
    before = runs.of(model)
    replies = [server.post(f"/v2/models/{model}/infer", ints(1, 2)) for _ in range(3)]

    assert ["Cache-Status" in reply.headers for reply in replies] == [False] * 3
    assert runs.of(model) == before + 3


def test_another_request_is_another_answer(server: Http, new_key: Http) -> None:
    request = ints(9)
    wider = {"inputs": [request["inputs"][0] | {"shape": [2, 1], "data": [9, 9]}]}
    wide = {"inputs": [request["inputs"][0] | {"shape": [1, 2], "data": [9, 9]}]}
    assert status(server.post(ECHO, request)) == MISS
    for other in (
        ints(10),
        wide,
        wider,
        request | {"outputs": [{"name": "INTS_OUT"}]},
        ints(9, other=1),
        ints(9, other=True),
    ):
        assert status(server.post(ECHO, other)) == MISS, other
    assert status(new_key.post(ECHO, request)) == MISS, "of another tenant"
    named = server.post("/v2/models/echo/versions/1/infer", request | {"id": "x"})
    assert status(named) == HIT, "the latest, by its number"
    for same in (ints(9, priority=1), ints(9, timeout=5_000_000), ints(9, binary_data_output=True)):
        assert status(server.post(ECHO, same)) == HIT, same


@pytest.fixture(scope="module")
def new_key(own: Stack) -> Iterator[Http]:
    """The gateway for somebody else."""
    settings = settings_of(own)
    with closing(Database(settings.database_url, pool_size=1)) as database:
        yield Http.keyed(own.env["TIDEGATE_URL"], Keys(database, settings.secret).create("other"))


def test_a_client_may_want_it_fresh_or_not_kept(server: Http, runs: Runs) -> None:
    before = runs.of("echo")
    told = [
        status(server.post(ECHO, ints(11), Cache_Control=control))
        for control in ("no-store", "no-store", "", "no-cache", "max-age=0", "")
    ]
    fresh = "tidegate; fwd=request; stored"
    bypass = "tidegate; fwd=bypass"
    assert told == [bypass, bypass, MISS, fresh, fresh, HIT]
    assert runs.of("echo") == before + 5


def test_what_a_model_fails_at_is_tried_again(server: Http) -> None:
    for _ in range(2):
        reply = server.post(ECHO, ints(1, fail="out of luck"))
        assert (reply.status, reply.json()) == (500, {"error": "out of luck"})
        assert "Cache-Status" not in reply.headers


def test_a_request_of_a_sequence_is_run_each_time(server: Http, runs: Runs) -> None:
    before = runs.of("echo")
    for _ in range(2):
        reply = server.post(ECHO, ints(12, sequence_id=0))
        assert status(reply) == "tidegate; fwd=bypass"
    assert runs.of("echo") == before + 2


def test_the_durable_lane_runs_each_job(server: Http, runs: Runs) -> None:
    server.post(ECHO, ints(13))
    before = runs.of("echo")
    for _ in range(2):
        assert server.post(ECHO, ints(13), Prefer="wait=30").status == 200
    assert runs.of("echo") == before + 2


# Bounds


def test_an_answer_that_is_too_large_is_not_kept(server: Http, runs: Runs) -> None:
    before = runs.of("echo")
    large = ints(*range(ROOM // 16 // 8))
    for _ in range(2):
        assert status(server.post(ECHO, large)) == "tidegate; fwd=uri-miss"
    assert runs.of("echo") == before + 2


def test_answers_make_room_for_each_other(server: Http, store: redis.Redis) -> None:
    values = list(range(6000))
    calls = [partial(server.post, ECHO, ints(n, *values)) for n in range(60)]
    for group in range(0, 60, 10):
        assert {status(reply) for reply in together(calls[group : group + 10])} == {MISS}
    assert status(calls[-1]()) == HIT

    def held() -> int:
        found: Any = store.hget("tidegate:answers:sizes", "")
        return int(found or 0)

    until(held, 10, lambda size: ROOM - 100_000 < size <= ROOM)
    # Long gone, here and there.
    assert status(server.post(ECHO, ints(1, 2))) == MISS


# What fails


def test_while_redis_hangs_requests_end_in_time_and_afterwards_all_is_well(
    own: Stack, server: Http
) -> None:
    with hanging(own, "redis"):
        late = server.post(ECHO, ints(14), Tidegate_Deadline="1.5")
        assert late.status in (503, 504)
    until(lambda: server.post(ECHO, ints(14)).status, 20, lambda status: status == 200)
    until(lambda: status(server.post(ECHO, ints(14))), 10, lambda told: told == HIT)


def test_after_redis_died_what_was_kept_is_given(own: Stack, server: Http, runs: Runs) -> None:
    server.post(ECHO, ints(15))
    before = runs.of("echo")
    own.kill("redis")
    own.start({"redis"})
    reply = until(lambda: server.post(ECHO, ints(15)), 30, lambda reply: reply.status == 200)
    until(lambda: status(server.post(ECHO, ints(15))), 10, lambda told: told == HIT)
    assert answered_ints(reply.json()) == [15]
    assert runs.of("echo") <= before + 1


# What operators see


def test_the_operator_reads_what_all_processes_counted(own: Stack, server: Http) -> None:
    for _ in range(3):
        server.post(ECHO, ints(16))
    server.post(IDENTITY, ints(16))
    address, _, path = own.env["TIDEGATE_METRICS_URL"].rpartition("/")
    text = Http(address).get(f"/{path}").body.decode()

    assert (
        'tidegate_http_request_duration_seconds_count{method="POST",'
        'route="/v2/models/<model>/infer",status="200"}'
    ) in text
    for outcome in ("hit", "miss", "collapsed", "bypass"):
        name = f'tidegate_cache_requests_total{{model="echo",outcome="{outcome}"}}'
        assert float(text.split(name)[1].split()[0]) >= 1
    assert 'model="identity"' not in text
    held = re.findall(r"^tidegate_cache_bytes ([0-9.e+]+)$", text, re.MULTILINE)
    assert 0 < float(held[0]) <= ROOM
    # The one that asks.
    assert "\ntidegate_http_requests_in_flight 1.0\n" in text


# The last one: it changes the model.


def test_a_new_version_is_what_the_latest_is_from_then_on(
    server: Http, models: Path, runs: Runs
) -> None:
    assert status(server.post(ECHO, ints(17))) == MISS
    assert server.post(ECHO, ints(17)).json()["model_version"] == "1"
    shutil.copytree(models / "echo" / "1", models / "echo" / "2")
    triton = runs._triton
    until(lambda: triton.get("/v2/models/echo/versions/2/ready").status == 200, 60)

    # No longer than a gateway trusts what it was told.
    reply = until(
        lambda: server.post(ECHO, ints(17)),
        10 * CATALOG_TTL,
        lambda reply: reply.json()["model_version"] == "2",
    )
    assert answered_ints(reply.json()) == [17]
    later = [server.post(ECHO, ints(17)) for _ in range(10)]
    assert {reply.json()["model_version"] for reply in later} == {"2"}
    assert status(later[-1]) == HIT
    assert server.post("/v2/models/echo/versions/1/infer", ints(17)).status != 200
