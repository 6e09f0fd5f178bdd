"""RabbitMQ as the message broker, in short. `make test-rabbitmq` runs everything on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from errors import Unavailable
from ops.embedded import Stack
from tasks import messages
from tests.conftest import settings_of
from tests.e2e.helpers import (
    IDENTITY,
    Http,
    Reply,
    answered_ints,
    batch_line,
    ended,
    hanging,
    ints,
    rabbitmqctl,
    until,
    upload,
)
from workers.app import build_app

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("rabbitmq_installed")]

BOUND = 20
"""Seconds within which a publish has ended whatever RabbitMQ does: twice what it may take."""
LANES = ("default.realtime", "default.batch")


@pytest.fixture(scope="module")
def own(rabbitmq_installed: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with RabbitMQ, which may be hurt."""
    chosen = {"TIDEGATE_BROKER": "rabbitmq", "TIDEGATE_LEASE": "3", "TIDEGATE_HINT_TIMEOUT": "2"}
    var = tmp_path_factory.mktemp("rabbitmq") / "var"
    with Stack(var, environ=os.environ | chosen) as stack:
        stack.start()
        yield stack


@pytest.fixture(scope="module")
def server(own: Stack) -> Http:
    return Http.of(own)


@pytest.fixture(scope="module")
def sender(own: Stack) -> Iterator[Celery]:
    """Lets this process send as a gateway does, to groups that have no worker."""
    app = build_app(settings_of(own))
    yield app
    app.close()


def infer(server: Http, deadline: float = 2) -> Reply:
    return server("POST", IDENTITY, ints(1), {"Tidegate-Deadline": str(deadline)})


def works_again(server: Http) -> None:
    until(lambda: infer(server).status, 30, lambda status: status == 200)


def submitted(server: Http, number: int, **parameters: object) -> dict[str, Any]:
    """A job, which is accepted whatever becomes of the broker."""
    asked = {"model": "identity", "input": ints(number, **parameters)}
    reply = server.post("/v1/jobs", asked)
    assert reply.status == 202, reply
    job: dict[str, Any] = reply.json()
    return job


def answers(server: Http, job: dict[str, Any]) -> list[int]:
    """What a job came to."""
    assert ended(server, job["id"], 60)["status"] == "succeeded"
    return answered_ints(server.get(job["urls"]["result"]).json())


def batch(server: Http, numbers: range) -> str:
    lines = [batch_line(f"line {n}", ints(n, delay_ms=20)) for n in numbers]
    file = upload(server, *lines)["id"]
    asked = {"input_file_id": file, "endpoint": IDENTITY, "completion_window": "1h"}
    made: str = server.post("/v1/batches", asked).json()["id"]
    return made


def finished(server: Http, batch_id: str) -> list[str]:
    """The `custom_id`s of a batch's answers, in order."""
    done = until(
        lambda: server.get(f"/v1/batches/{batch_id}").json(),
        60,
        lambda found: found["status"] in ("completed", "failed", "expired", "cancelled"),
    )
    assert done["status"] == "completed", done
    output = server.get(f"/v1/files/{done['output_file_id']}/content").body
    return sorted(json.loads(line)["custom_id"] for line in output.splitlines())


def listed(own: Stack, what: str, *columns: str) -> list[dict[str, Any]]:
    """A table of RabbitMQ's."""
    vhost = () if what == "list_channels" else ("-p", "tidegate")
    told = rabbitmqctl(own, what, *vhost, *columns, "--formatter", "json")
    found: list[dict[str, Any]] = json.loads(told)
    return found


def lying(sender: Celery, group: str) -> int:
    """Hints that wait in a group's queue."""
    queue = messages.queue(messages.batch_queue(group))
    with sender.connection_for_read() as connection:
        declared = queue(connection.default_channel).queue_declare(passive=True)
    return int(declared.message_count)


@contextmanager
def refused() -> Iterator[None]:
    """Publishing says so, and soon, where the broker does not take a message."""
    began = time.monotonic()
    with pytest.raises(Unavailable):
        yield
    assert time.monotonic() - began < BOUND


# What it is told


def test_requests_jobs_and_batches_are_done(server: Http) -> None:
    numbers = range(20)

    assert answered_ints(infer(server, 20).json()) == [1]
    assert answers(server, submitted(server, 7)) == [7]
    assert finished(server, batch(server, numbers)) == sorted(f"line {n}" for n in numbers)


def test_lanes_are_quorum_queues_with_a_limit_of_deliveries(own: Stack) -> None:
    queues = {
        one["name"]: one
        for one in listed(own, "list_queues", "name", "type", "durable", "exclusive", "arguments")
    }
    kept = {name for name, one in queues.items() if one["durable"]}

    # Celery's own queues go with the connection that made them; RabbitMQ 4 allows no others.
    assert kept == {*LANES, "tidegate.dead"}
    assert all(one["exclusive"] for name, one in queues.items() if name not in kept)
    assert {queues[name]["type"] for name in kept} == {"quorum"}
    for name in LANES:
        assert ["x-delivery-limit", "signedint", messages.DELIVERIES] in queues[name]["arguments"]
    dead = ["x-dead-letter-exchange", "longstr", "tidegate.dead"]
    assert dead in queues["default.batch"]["arguments"]


def test_each_lane_has_a_prefetch_of_its_own(own: Stack) -> None:
    settings = settings_of(own)
    consumers = listed(own, "list_consumers", "queue_name", "prefetch_count", "ack_required")
    found = {one["queue_name"]: one for one in consumers if one["queue_name"] in LANES}

    assert {name: one["prefetch_count"] for name, one in found.items()} == {
        "default.realtime": settings.realtime_slots,
        "default.batch": settings.batch_slots,
    }
    assert all(one["ack_required"] for one in found.values())
    # A limit for a whole channel is what quorum queues refuse.
    channels = listed(own, "list_channels", "pid", "global_prefetch_count")
    assert {one["global_prefetch_count"] for one in channels} == {0}


def test_celerys_remote_control_works(own: Stack, root: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers", "inspect", "ping", "--json"],
        cwd=root,
        env=os.environ | own.env,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert told.returncode == 0, told.stderr
    # One node for each lane.
    assert list(json.loads(told.stdout).values()) == [{"ok": "pong"}] * 2


# What is published


def send(group: str, ttl: float | None = None) -> None:
    messages.send(messages.CHUNKS, messages.batch_queue(group), ttl=ttl, ids=[2**53])


def sent(group: str) -> bool:
    """Was it taken?"""
    try:
        send(group)
    except Unavailable:
        return False
    return True


def test_a_message_lies_there_until_somebody_comes_or_its_time_is_over(
    sender: Celery,
) -> None:
    send("nobody")
    send("hurry", ttl=0.1)

    assert lying(sender, "nobody") == 1
    until(lambda: lying(sender, "hurry"), 20, lambda count: count == 0)


def test_a_message_that_fits_in_no_queue_is_noticed(own: Stack, sender: Celery) -> None:
    send("removed")
    rabbitmqctl(own, "delete_queue", "-p", "tidegate", "removed.batch")

    with refused():
        send("removed")
    send("removed")
    assert lying(sender, "removed") == 1


def test_a_message_that_is_not_confirmed_is_noticed(own: Stack, sender: Celery) -> None:
    full = json.dumps({"max-length": 1, "overflow": "reject-publish"})
    rabbitmqctl(own, "set_policy", "-p", "tidegate", "full", r"^full\.", full)

    with refused():
        for _ in range(10):
            send("full")
    assert 1 <= lying(sender, "full") < 10


def test_a_rabbitmq_without_room_is_noticed(own: Stack, server: Http, sender: Celery) -> None:
    send("room")
    rabbitmqctl(own, "set_disk_free_limit", "1000000GB")
    try:
        with refused():
            send("room")
        job = submitted(server, 3)
    finally:
        rabbitmqctl(own, "set_disk_free_limit", "64MB")

    assert answers(server, job) == [3]
    until(lambda: sent("room"), 20)


# What dies


def test_a_rabbitmq_that_hangs_holds_nobody_up(own: Stack, server: Http, sender: Celery) -> None:
    works_again(server)
    send("hanging")
    with hanging(own, "rabbitmq"):
        with refused():
            send("hanging")
        began = time.monotonic()
        job = submitted(server, 4)
        assert time.monotonic() - began < 5
        assert infer(server, 1).status in (503, 504)
    works_again(server)

    assert answers(server, job) == [4]


def test_a_rabbitmq_that_is_killed_loses_nothing(own: Stack, server: Http, sender: Celery) -> None:
    works_again(server)
    survivors = {name: own.pid(name) for name in ("gateway", "worker", "sweeper")}
    numbers = range(300)
    under_way = batch(server, numbers)
    jobs = {n: submitted(server, n, delay_ms=50) for n in range(20)}
    # A queue that was made within half a second before a kill is one that RabbitMQ never heard of.
    send("survivor")
    time.sleep(1)
    own.kill("rabbitmq")
    with refused():
        send("survivor")
    jobs |= {n: submitted(server, n) for n in range(20, 25)}
    own.start(only=("rabbitmq",))

    # The connection that broke is not what the next message finds.
    send("survivor")
    assert lying(sender, "survivor") == 2
    works_again(server)
    assert {n: answers(server, job) for n, job in jobs.items()} == {n: [n] for n in jobs}
    assert finished(server, under_way) == sorted(f"line {n}" for n in numbers)
    assert {name: own.pid(name) for name in survivors} == survivors


def test_after_a_restart_the_first_message_is_sent_and_both_lanes_are_read(
    own: Stack, server: Http, sender: Celery
) -> None:
    send("again")
    own.stop("rabbitmq")
    own.start(only=("rabbitmq",))
    send("again")

    assert lying(sender, "again") == 2
    until(
        lambda: {one["queue_name"] for one in listed(own, "list_consumers", "queue_name")},
        30,
        lambda names: names >= set(LANES),
    )
    works_again(server)
    assert answers(server, submitted(server, 5)) == [5]
