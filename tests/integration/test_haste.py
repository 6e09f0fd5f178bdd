"""The pump releases less while realtime messages wait, on a real broker, Redis and Postgres."""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import kombu
import orjson
import pytest
from celery import current_app

from config import Settings
from inference import frames
from inference.fake import FakeTriton
from storage.backlog import HINT_CHUNKS
from storage.redis_state import RedisState
from tasks import bootstrap, haste, messages
from tasks.bootstrap import Services, build_services, build_worker_services
from tasks.pump import Pump
from tasks.realtime import run_realtime
from tests.conftest import Ledger
from tests.integration.test_ledger import submit
from tests.integration.test_tasks import ints
from workers import sweeper
from workers.app import build_app

JOBS = 5 * HINT_CHUNKS
LONG = 60.0
AWAY = "redis://127.0.0.1:1/0"


@pytest.fixture
def services(settings: Settings) -> Iterator[Services]:
    """Of a process that pumps."""
    build_app(settings)
    made = build_services(settings, pool_size=2)
    yield made
    made.close()


def taken(queue: str) -> list[Any]:
    """What lies in a queue of the broker, taken as a worker takes it: the arguments."""
    with current_app.connection_for_read() as connection:
        bound = messages.queue(queue)(connection.default_channel)
        bound.declare()
        found: list[kombu.Message] = list(iter(functools.partial(bound.get, no_ack=True), None))
    return [orjson.loads(message.body)[1] for message in found]


def hinted(group: str) -> int:
    """Chunks that are named by what lies in the group's batch queue, which is empty then."""
    return sum(len(hint["ids"]) for hint in taken(messages.batch_queue(group)))


def calm(state: RedisState, group: str) -> None:
    """Nobody has said for a while that messages wait."""
    state.hurry(group, 0.001)
    while state.hurried(group):
        time.sleep(0.01)


def test_while_messages_wait_the_sweeper_releases_a_part_and_then_everything(
    services: Services, ledger: Ledger
) -> None:
    services.state.present(ledger.group, "one", int(LONG))
    services.state.hurry(ledger.group, LONG)
    submit(ledger, JOBS)
    for _ in range(3):
        sweeper.sweep(services)
    assert hinted(ledger.group) == haste.CHUNKS * HINT_CHUNKS
    # A group is held back for its own sake alone.
    other = f"other-{ledger.group}"
    submit(ledger, 2 * HINT_CHUNKS, group=other)
    sweeper.sweep(services)
    assert (hinted(ledger.group), hinted(other)) == (0, 2 * HINT_CHUNKS)

    calm(services.state, ledger.group)
    sweeper.sweep(services)
    assert hinted(ledger.group) == JOBS - haste.CHUNKS * HINT_CHUNKS


def test_a_batch_goes_on_while_messages_wait(services: Services, ledger: Ledger) -> None:
    services.state.present(ledger.group, "one", int(LONG))
    services.state.hurry(ledger.group, LONG)
    submit(ledger, JOBS)
    rounds = 0
    while services.pump.pump(ledger.group):
        for hint in taken(messages.batch_queue(ledger.group)):
            assert len(ledger.chunks.claim(hint["ids"], "one")) == len(hint["ids"])
        assert services.pump.pump(ledger.group) == 0
        ledger.sql(
            "UPDATE chunks SET state = 'done' WHERE group_name = :group AND state = 'running'",
            group=ledger.group,
        )
        rounds += 1
    assert rounds == JOBS / HINT_CHUNKS / haste.CHUNKS


def test_more_workers_are_left_more(services: Services, ledger: Ledger) -> None:
    for worker in ("one", "two", "three"):
        services.state.present(ledger.group, worker, int(LONG))
    services.state.hurry(ledger.group, LONG)
    submit(ledger, JOBS)
    assert services.pump.pump(ledger.group) == 3 * haste.CHUNKS * HINT_CHUNKS


def test_where_no_worker_is_left_nothing_is_held_back(services: Services, ledger: Ledger) -> None:
    services.state.hurry(ledger.group, LONG)
    submit(ledger, JOBS)
    assert services.pump.pump(ledger.group) == JOBS


def test_a_redis_that_is_away_holds_nothing_back(settings: Settings, ledger: Ledger) -> None:
    build_app(settings)
    state = RedisState(AWAY, settings.namespace)
    pump = Pump(ledger.backlog, allowance=functools.partial(haste.allowance, state))
    submit(ledger, JOBS)
    assert pump.pump(ledger.group) == JOBS
    assert hinted(ledger.group) == JOBS


def test_a_message_that_lay_in_its_queue_is_heard_of_by_the_pumps_and_a_prompt_one_is_not(
    settings: Settings, services: Services, ledger: Ledger
) -> None:
    own, group = replace(settings, group=ledger.group), ledger.group
    with FakeTriton() as fake:
        own = replace(own, triton_url=fake.address)
        worker = build_worker_services(own, name="one", group=group)
        bootstrap.install(worker)

        def send(deadline: float) -> None:
            """A message whose tensors are kept for `LONG`."""
            name = secrets.token_bytes(16)
            worker.state.put_blob(name, frames.encode_requests([ints(1)]), LONG)
            messages.send(
                messages.REALTIME,
                messages.realtime_queue(group),
                message=name.hex(),
                gateway="gateway",
                deadlines=[deadline],
            )

        def run() -> None:
            for asked in taken(messages.realtime_queue(group)):
                run_realtime.apply(kwargs=asked, throw=True)

        # Promised less time than its tensors have: however slow this machine, it came early.
        send(LONG / 2)
        run()
        assert not services.state.hurried(group)
        send(LONG)
        time.sleep(2 * haste.LONG)
        run()
        assert services.state.hurried(group)
        worker.close()
