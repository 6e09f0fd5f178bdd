"""Webhooks on a real Postgres, to real receivers: announced once, delivered at least once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from standardwebhooks import Webhook

from config import Settings
from errors import Conflict, KeyReused, ModelFailed, NotFound
from storage import events, tables, webhooks
from storage.database import Row
from storage.deliveries import PER_ENDPOINT, PER_TENANT, Attempt, Deliveries, Delivery
from storage.events import DeliveryState
from storage.idempotency import Once
from storage.webhooks import MOST, Webhooks
from storage.work import Done
from tasks.webhooks import PAUSES, Sender, message_id
from tests.conftest import Ledger
from tests.e2e.helpers import together, until
from tests.integration.test_ledger import claimed, planned, submit, submit_batch
from tests.receiver import Received, Receiver, Say, receiving


@dataclass(frozen=True)
class Hooks:
    """The parts of webhooks on the ledger's database, which holds no other test's deliveries."""

    ledger: Ledger
    webhooks: Webhooks
    deliveries: Deliveries

    def sender(self, **options: Any) -> Sender:
        given: dict[str, Any] = {"timeout": 10.0, "insecure": True, "every": 0.05}
        given["rand"] = lambda: 0.0
        return Sender(self.deliveries, self.webhooks, **(given | options))

    def deliver(self, limit: int = 100) -> list[DeliveryState]:
        """Make everything that is due, once."""
        sender = self.sender()
        return [sender.deliver(one) for one in self.deliveries.claim(limit)]

    def add(self, url: str, *names: str, tenant: UUID | None = None) -> UUID:
        row = self.webhooks.create(
            tenant or self.ledger.tenant, name="n", url=url, events=names or events.TYPES
        )
        return UUID(str(row.id))

    def of(self, webhook_id: UUID, tenant: UUID | None = None) -> list[tuple[Row, list[Row]]]:
        """An endpoint's log, oldest first."""
        return self.deliveries.list(
            tenant or self.ledger.tenant, webhook_id, after=None, limit=1000
        )[::-1]

    def only(self, webhook_id: UUID) -> tuple[Row, list[Row]]:
        (one,) = self.of(webhook_id)
        return one

    def sql(self, text: str, **values: object) -> None:
        self.ledger.sql(text, **values)

    def hurry(self) -> None:
        """What waits is due now."""
        self.sql("UPDATE deliveries SET not_before = now() WHERE state = 'pending'")

    def lapse(self) -> None:
        """Every sender has been silent for too long."""
        self.sql("UPDATE deliveries SET lease_until = now() - interval '1 s'")


@pytest.fixture
def hooks(ledger: Ledger, settings: Settings) -> Hooks:
    ledger.sql("DELETE FROM deliveries")
    return Hooks(ledger, Webhooks(ledger.database, settings.secret), Deliveries(ledger.database))


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as made:
        yield made


def succeed(ledger: Ledger, count: int = 1) -> list[UUID]:
    """So many jobs that have succeeded."""
    jobs = submit(ledger, count)
    ledger.chunks.commit([Done(claim, 1, 0, output=b"x") for claim in claimed(ledger)])
    return jobs


NOWHERE = "http://127.0.0.1:9/"


# Announcing


def told(hooks: Hooks, webhook_id: UUID) -> list[tuple[str, UUID]]:
    return [(row.event, row.job_id) for row, _ in hooks.of(webhook_id)]


def test_every_end_of_a_job_is_announced_once(hooks: Hooks) -> None:
    ledger, webhook = hooks.ledger, hooks.add(NOWHERE)
    (done,) = succeed(ledger)
    (failed,) = submit(ledger)
    (claim,) = claimed(ledger)
    ledger.chunks.commit([Done(claim, 0, 1, error=ModelFailed("no"))])
    (canceled,) = submit(ledger)
    ledger.jobs.cancel(ledger.tenant, canceled)
    ledger.jobs.cancel(ledger.tenant, canceled)
    (expired,) = submit(ledger)
    ledger.sql("UPDATE jobs SET deadline_at = now() - interval '1 s' WHERE id = :id", id=expired)
    ledger.backlog.sweep()
    ledger.backlog.sweep()

    assert told(hooks, webhook) == [
        ("job.succeeded", done),
        ("job.failed", failed),
        ("job.canceled", canceled),
        ("job.expired", expired),
    ]
    for (row, attempts), job_id in zip(
        hooks.of(webhook), (done, failed, canceled, expired), strict=True
    ):
        job = ledger.jobs.get(ledger.tenant, job_id)
        assert (row.state, row.attempts, attempts) == ("pending", 0, [])
        assert row.payload == {
            "id": f"evt_{job_id.hex}",
            "object": "event",
            "type": row.event,
            "created_at": int(job.finished_at.timestamp()),
            "data": {"id": str(job_id), "status": job.state},
        }


def test_a_batch_is_announced_when_its_files_are_there_and_as_a_batch(hooks: Hooks) -> None:
    ledger, webhook = hooks.ledger, hooks.add(NOWHERE)
    job_id, (one, two) = planned(ledger, 2, 3)
    ledger.chunks.commit([Done(one, 2, 0), Done(two, 3, 0)])
    assert told(hooks, webhook) == []
    (finalize,) = claimed(ledger)
    assert ledger.chunks.commit_files(finalize, None, None, ok=5, failed=0)
    assert not ledger.chunks.commit_files(finalize, None, None, ok=5, failed=0)
    called_off = submit_batch(ledger)
    ledger.jobs.cancel(ledger.tenant, called_off)

    assert told(hooks, webhook) == [("batch.completed", job_id), ("batch.cancelled", called_off)]
    assert hooks.of(webhook)[0][0].payload["data"] == {"id": f"batch_{job_id.hex}"}


def test_a_commit_that_comes_too_late_announces_nothing(hooks: Hooks) -> None:
    ledger, webhook = hooks.ledger, hooks.add(NOWHERE)
    (job_id,) = submit(ledger)
    (claim,) = claimed(ledger)
    ledger.jobs.cancel(ledger.tenant, job_id)
    done = [Done(claim, 1, 0, output=b"late")]
    together([lambda: ledger.chunks.commit(done)] * 4)
    assert told(hooks, webhook) == [("job.canceled", job_id)]


def test_commits_of_one_claim_at_once_announce_once(hooks: Hooks) -> None:
    ledger, webhook = hooks.ledger, hooks.add(NOWHERE)
    jobs = submit(ledger, 20)
    done = [Done(claim, 1, 0, output=b"x") for claim in claimed(ledger)]
    together([lambda: ledger.chunks.commit(done)] * 4)
    assert sorted(told(hooks, webhook)) == sorted(("job.succeeded", job) for job in jobs)


def test_only_enabled_endpoints_of_the_tenant_that_asked_for_the_event_hear_of_it(
    hooks: Hooks,
) -> None:
    ledger = hooks.ledger
    stranger = ledger.keys.tenant_of(ledger.keys.create(uuid4().hex))
    wanted = [hooks.add(NOWHERE, "job.succeeded", "job.failed"), hooks.add(NOWHERE)]
    others = [hooks.add(NOWHERE, "job.failed"), hooks.add(NOWHERE)]
    foreign = hooks.add(NOWHERE, tenant=stranger)
    hooks.webhooks.update(ledger.tenant, others[1], enabled=False)
    (job,) = succeed(ledger)

    assert [told(hooks, one) for one in wanted] == [[("job.succeeded", job)]] * 2
    assert [told(hooks, one) for one in others] == [[]] * 2
    assert hooks.of(foreign, stranger) == []


def test_a_job_ends_though_its_endpoint_is_being_deleted_this_moment(hooks: Hooks) -> None:
    ledger, doomed, kept = hooks.ledger, hooks.add(NOWHERE), hooks.add(NOWHERE)
    with ledger.database.transaction() as connection:
        connection.execute(sa.delete(tables.webhooks).where(tables.webhooks.c.id == doomed))
        # Not committed yet: the job's end neither waits for it nor fails with it.
        (job,) = succeed(ledger)
    assert told(hooks, kept) == [("job.succeeded", job)]


def test_without_endpoints_nothing_is_written(hooks: Hooks) -> None:
    succeed(hooks.ledger, 5)
    with hooks.ledger.database.transaction() as connection:
        count = connection.execute(sa.select(sa.func.count()).select_from(tables.deliveries))
        assert count.scalar_one() == 0


# Delivering


def test_a_delivery_arrives_signed_and_is_logged(hooks: Hooks, receiver: Receiver) -> None:
    webhook = hooks.add(receiver.url)
    (job,) = succeed(hooks.ledger)

    assert hooks.deliver() == [DeliveryState.DELIVERED]
    assert hooks.deliver() == []

    (request,) = receiver.received
    event = Webhook(hooks.webhooks.signing_secret(webhook, 1)).verify(
        request.body, dict(request.headers)
    )
    assert (event["type"], event["data"]["id"]) == ("job.succeeded", str(job))
    row, (attempt,) = hooks.only(webhook)
    assert request.id == message_id(row.id)
    assert (row.state, row.attempts, row.error) == ("delivered", 1, None)
    assert row.finished_at is not None
    assert (attempt.attempt, attempt.status, attempt.response) == (1, 200, "thanks")
    assert (attempt.error, attempt.duration_ms >= 0) == (None, True)


def test_after_a_rotation_both_secrets_sign_for_a_day_where_the_old_one_is_kept(
    hooks: Hooks, receiver: Receiver
) -> None:
    webhook, tenant = hooks.add(receiver.url), hooks.ledger.tenant

    def verified_by() -> list[int]:
        succeed(hooks.ledger)
        hooks.deliver()
        request = receiver.received[-1]
        found = []
        for generation in (1, 2, 3):
            secret = hooks.webhooks.signing_secret(webhook, generation)
            try:
                Webhook(secret).verify(request.body, dict(request.headers))
            except Exception:
                continue
            found.append(generation)
        return found

    assert verified_by() == [1]
    hooks.webhooks.rotate(tenant, webhook, keep=True)
    assert verified_by() == [1, 2]
    hooks.sql("UPDATE webhooks SET previous_until = previous_until - interval '24 h'")
    assert verified_by() == [2]
    hooks.webhooks.rotate(tenant, webhook, keep=False)
    assert verified_by() == [3]


def test_what_is_asked_for_again_under_its_key_is_done_once(
    hooks: Hooks, receiver: Receiver
) -> None:
    webhook, tenant = hooks.add(receiver.url), hooks.ledger.tenant

    def once(fingerprint: bytes = b"same") -> Once:
        return Once(tenant, "POST /somewhere", "key", fingerprint, 1000)

    first, again = (
        hooks.webhooks.rotate(tenant, webhook, keep=True, once=once()) for _ in range(2)
    )
    assert (first[1], again[1]) == (False, True)
    assert first[0].generation == again[0].generation == 2
    assert again[0].previous_until == first[0].previous_until is not None
    with pytest.raises(KeyReused):
        hooks.webhooks.rotate(tenant, webhook, keep=False, once=once(b"other"))

    other = replace(once(), key="other")
    samples = [hooks.deliveries.sample(tenant, webhook, "job.failed", once=other) for _ in range(2)]
    assert samples[0] == samples[1]
    assert hooks.deliver() == [DeliveryState.DELIVERED]

    third = replace(once(), key="third")
    assert not hooks.deliveries.resend(tenant, webhook, samples[0], third)
    assert hooks.deliver() == [DeliveryState.DELIVERED]
    assert hooks.deliveries.resend(tenant, webhook, samples[0], third)
    assert hooks.deliver() == []


def test_many_senders_at_once_deliver_each_once(hooks: Hooks, receiver: Receiver) -> None:
    senders = 4
    for _ in range(10):
        hooks.add(receiver.url, tenant=None)
    succeed(hooks.ledger, 5)
    expected = 50

    def work() -> int:
        made, stopping = hooks.sender(slots=4), threading.Event()
        thread = threading.Thread(target=made.run, args=(stopping,))
        thread.start()
        until(lambda: len(receiver.received), 60, lambda count: count >= expected)
        stopping.set()
        thread.join()
        made.stop()
        return 1

    together([work] * senders)
    assert len(receiver.ids) == len(set(receiver.ids)) == expected
    assert hooks.deliveries.claim(100) == []


def test_a_senders_death_sends_the_same_delivery_again(hooks: Hooks, receiver: Receiver) -> None:
    webhook = hooks.add(receiver.url)
    succeed(hooks.ledger)
    (dead,) = hooks.deliveries.claim(10)
    assert hooks.deliveries.claim(10) == []
    hooks.lapse()

    assert hooks.deliver() == [DeliveryState.DELIVERED]
    assert receiver.ids == [message_id(dead.id)]
    row, attempts = hooks.only(webhook)
    assert row.attempts == 2
    assert [one.attempt for one in attempts] == [2]


def test_the_outcome_of_a_sender_that_was_given_up_changes_nothing(
    hooks: Hooks, receiver: Receiver
) -> None:
    webhook = hooks.add(receiver.url)
    succeed(hooks.ledger)
    (stale,) = hooks.deliveries.claim(10)
    hooks.lapse()
    (fresh,) = hooks.deliveries.claim(10)
    assert fresh.token > stale.token

    log = Attempt(1, status=410)
    gone = {"disable": "gone", "error": "gone"}
    assert not hooks.deliveries.settle(stale, DeliveryState.FAILED, log, **gone)  # type: ignore[arg-type]
    row, attempts = hooks.only(webhook)
    assert (row.state, len(attempts)) == ("pending", 1)
    assert hooks.webhooks.get(hooks.ledger.tenant, webhook).disabled_at is None
    assert hooks.sender().deliver(fresh) is DeliveryState.DELIVERED
    assert not hooks.deliveries.settle(stale, DeliveryState.PENDING, delay=0)
    assert hooks.only(webhook)[0].state == "delivered"


@pytest.mark.parametrize(
    ("say", "error"),
    [
        (Say(500), "answered 500"),
        (Say(404), "answered 404"),
        (Say(301, {"Location": "/elsewhere"}), "answered 301"),
        (Say(304), "answered 304"),
    ],
    ids=lambda value: str(getattr(value, "status", "")),
)
def test_whatever_is_not_2xx_is_tried_again_with_the_same_id(
    hooks: Hooks, receiver: Receiver, say: Say, error: str
) -> None:
    webhook = hooks.add(receiver.url)
    succeed(hooks.ledger)
    receiver.answer = lambda _: say
    assert hooks.deliver() == [DeliveryState.PENDING]
    assert hooks.deliver() == []
    row, _ = hooks.only(webhook)
    assert row.error == error
    receiver.answer = lambda _: Say(204, body=b"")
    hooks.hurry()

    assert hooks.deliver() == [DeliveryState.DELIVERED]
    assert receiver.ids == [message_id(row.id)] * 2
    row, attempts = hooks.only(webhook)
    assert (row.state, row.error) == ("delivered", None)
    assert [one.status for one in attempts] == [say.status, 204]


def seconds_ahead(hooks: Hooks, delivery: UUID) -> float:
    """Until the next try, by the database's clock."""
    with hooks.ledger.database.transaction() as connection:
        found = connection.execute(
            sa.select(
                sa.extract("epoch", tables.deliveries.c.not_before - sa.func.clock_timestamp())
            ).where(tables.deliveries.c.id == delivery)
        ).scalar_one()
    return float(found)


def test_tries_follow_the_schedule_and_then_it_has_failed(hooks: Hooks) -> None:
    webhook = hooks.add(NOWHERE)
    succeed(hooks.ledger)
    for pause in PAUSES:
        assert hooks.deliver() == [DeliveryState.PENDING]
        row, _ = hooks.only(webhook)
        assert pause - 60 < seconds_ahead(hooks, row.id) <= pause
        hooks.hurry()
    assert hooks.deliver() == [DeliveryState.FAILED]
    hooks.hurry()
    assert hooks.deliver() == []
    row, attempts = hooks.only(webhook)
    assert (row.state, row.attempts, row.error) == ("failed", 10, "the connection was refused")
    assert [one.error for one in attempts] == ["the connection was refused"] * 10


def test_an_endpoint_that_asks_for_time_gets_it(hooks: Hooks, receiver: Receiver) -> None:
    webhook = hooks.add(receiver.url)
    succeed(hooks.ledger)
    receiver.answer = lambda _: Say(429, {"Retry-After": "1000"})
    hooks.deliver()
    assert 900 < seconds_ahead(hooks, hooks.only(webhook)[0].id) <= 1000
    receiver.answer = lambda _: Say(503, {"Retry-After": "1"})
    hooks.hurry()
    hooks.deliver()
    assert 200 < seconds_ahead(hooks, hooks.only(webhook)[0].id) <= 300


def test_410_disables_the_endpoint_and_ends_what_waits_for_it(
    hooks: Hooks, receiver: Receiver
) -> None:
    webhook, other = hooks.add(receiver.url), hooks.add(NOWHERE)
    succeed(hooks.ledger, 3)
    receiver.answer = lambda _: Say(410)
    first = next(one for one in hooks.deliveries.claim(100) if one.webhook_id == webhook)
    hooks.sql("UPDATE deliveries SET lease_until = NULL WHERE id <> :id", id=first.id)

    assert hooks.sender().deliver(first) is DeliveryState.FAILED

    row = hooks.webhooks.get(hooks.ledger.tenant, webhook)
    assert row.disabled_why == "it answered 410 Gone"
    assert [one.state for one, _ in hooks.of(webhook)] == ["failed"] * 3
    assert {one.error for one, _ in hooks.of(webhook)} == {
        "answered 410",
        "the endpoint was disabled: it answered 410 Gone",
    }
    assert [one.state for one, _ in hooks.of(other)] == ["pending"] * 3
    succeed(hooks.ledger)
    assert len(hooks.of(webhook)) == 3
    assert len(receiver.received) == 1

    hooks.webhooks.update(hooks.ledger.tenant, webhook, enabled=True)
    succeed(hooks.ledger)
    assert [one.state for one, _ in hooks.of(webhook)] == ["failed"] * 3 + ["pending"]


def test_what_was_announced_while_its_endpoint_was_disabled_is_not_sent(
    hooks: Hooks, receiver: Receiver
) -> None:
    webhook = hooks.add(receiver.url)
    succeed(hooks.ledger)
    # As an announcement that was committed just after.
    hooks.sql(
        "UPDATE webhooks SET disabled_at = now(), disabled_why = 'so' WHERE id = :id", id=webhook
    )
    assert hooks.deliver() == [DeliveryState.FAILED]
    assert hooks.only(webhook)[0].error == "the endpoint was disabled: so"
    assert receiver.connections == 0


def test_with_the_guard_on_nothing_inside_is_connected_to(hooks: Hooks, receiver: Receiver) -> None:
    urls = [
        receiver.url,
        receiver.url.replace("http", "https"),
        f"https://localhost:{receiver.port}/",
    ]
    for url in urls:
        hooks.add(url)
    succeed(hooks.ledger)
    sender = hooks.sender(insecure=False)
    found = [sender.deliver(one) for one in hooks.deliveries.claim(10)]
    assert found == [DeliveryState.PENDING] * 3
    assert receiver.connections == 0


# Fairness


def test_a_slow_endpoint_holds_up_nobody_else(hooks: Hooks, receiver: Receiver) -> None:
    let_go = threading.Event()

    def slowly(_: Received) -> Say:
        let_go.wait(30)
        return Say()

    with receiving() as slow:
        slow.answer = slowly
        hooks.add(slow.url)
        quick = hooks.add(receiver.url)
        succeed(hooks.ledger, 20)
        stopping, sender = threading.Event(), hooks.sender(slots=PER_ENDPOINT + 1)
        thread = threading.Thread(target=sender.run, args=(stopping,))
        thread.start()
        try:
            until(lambda: len(receiver.received), 30, lambda count: count == 20)
            assert not let_go.is_set()
            assert 1 <= len(slow.received) <= PER_ENDPOINT
        finally:
            let_go.set()
            until(lambda: len(slow.received), 30, lambda count: count == 20)
            stopping.set()
            thread.join()
            sender.stop()
    assert {row.state for row, _ in hooks.of(quick)} == {"delivered"}


def test_turns_go_by_endpoint_and_by_tenant(hooks: Hooks) -> None:
    ledger = hooks.ledger
    stranger = ledger.keys.tenant_of(ledger.keys.create(uuid4().hex))
    many = [hooks.add(NOWHERE) for _ in range(PER_TENANT + 2)]
    foreign = hooks.add(NOWHERE, tenant=stranger)
    succeed(ledger, 10)
    hooks.sql(
        "INSERT INTO deliveries (id, webhook_id, tenant_id, event, payload, state)"
        " SELECT uuidv7(), :webhook, :tenant, 'job.failed', '{}', 'pending'"
        " FROM generate_series(1, 10)",
        webhook=foreign,
        tenant=stranger,
    )
    first = hooks.deliveries.claim(1000)
    mine = [one.webhook_id for one in first if one.webhook_id in many]
    assert len(mine) == len(set(mine)) == PER_TENANT
    assert [one.webhook_id for one in first].count(foreign) == PER_ENDPOINT
    assert hooks.deliveries.claim(1000) == []
    landed = next(one for one in first if one.webhook_id == foreign)
    hooks.deliveries.settle(landed, DeliveryState.DELIVERED)
    assert [one.webhook_id for one in hooks.deliveries.claim(1000)] == [foreign]


def test_a_stopping_sender_ends_what_flies_and_takes_nothing_new(
    hooks: Hooks, receiver: Receiver
) -> None:
    arrived, let_go = threading.Event(), threading.Event()

    def slowly(_: Received) -> Say:
        arrived.set()
        let_go.wait(30)
        return Say()

    receiver.answer = slowly
    webhook = hooks.add(receiver.url)
    succeed(hooks.ledger, 3)
    stopping, sender = threading.Event(), hooks.sender(slots=1)
    thread = threading.Thread(target=sender.run, args=(stopping,))
    thread.start()
    assert arrived.wait(30)
    stopping.set()
    thread.join()
    let_go.set()
    sender.stop()
    assert sorted(row.state for row, _ in hooks.of(webhook)) == ["delivered", "pending", "pending"]
    assert all(row.lease_until is None for row, _ in hooks.of(webhook))


# Samples, resending, deleting, forgetting


def test_a_sample_is_sent_once_and_first(hooks: Hooks, receiver: Receiver) -> None:
    webhook, tenant = hooks.add(receiver.url), hooks.ledger.tenant
    succeed(hooks.ledger, 3)
    sample = hooks.deliveries.sample(tenant, webhook, "batch.failed")
    receiver.answer = lambda _: Say(500)
    (claim,) = hooks.deliveries.claim(1)
    assert claim.id == sample
    assert hooks.sender().deliver(claim) is DeliveryState.FAILED
    row, (attempt,) = hooks.deliveries.get(tenant, webhook, sample)
    assert (row.event, row.job_id, attempt.status) == ("batch.failed", None, 500)
    assert receiver.received[0].json()["data"]["id"].startswith("batch_")


@pytest.mark.parametrize("state", ["delivered", "failed", "pending"])
def test_a_delivery_is_sent_again_at_once_when_asked(
    hooks: Hooks, receiver: Receiver, state: str
) -> None:
    webhook, tenant = hooks.add(receiver.url), hooks.ledger.tenant
    succeed(hooks.ledger)
    receiver.answer = lambda _: Say(200 if state == "delivered" else 500)
    hooks.deliver()
    if state == "failed":
        hooks.sql("UPDATE deliveries SET state = 'failed', attempts = 10, finished_at = now()")
    row, _ = hooks.only(webhook)
    assert row.state == state
    assert hooks.deliver() == []
    receiver.answer = lambda _: Say()

    hooks.deliveries.resend(tenant, webhook, row.id)

    assert hooks.deliver() == [DeliveryState.DELIVERED]
    assert receiver.ids == [message_id(row.id)] * 2
    again, attempts = hooks.only(webhook)
    assert (again.state, again.finished_at is not None, len(attempts)) == ("delivered", True, 2)


def test_what_is_being_tried_is_not_tried_twice_when_asked(hooks: Hooks) -> None:
    webhook = hooks.add(NOWHERE)
    succeed(hooks.ledger)
    (claim,) = hooks.deliveries.claim(1)
    hooks.deliveries.resend(hooks.ledger.tenant, webhook, claim.id)
    assert hooks.deliveries.claim(1) == []
    assert hooks.deliveries.settle(claim, DeliveryState.DELIVERED)


def test_a_disabled_endpoint_is_sent_nothing_when_asked(hooks: Hooks) -> None:
    webhook, tenant = hooks.add(NOWHERE), hooks.ledger.tenant
    succeed(hooks.ledger)
    row, _ = hooks.only(webhook)
    hooks.webhooks.update(tenant, webhook, enabled=False)
    with pytest.raises(Conflict, match="enable it first"):
        hooks.deliveries.resend(tenant, webhook, row.id)
    with pytest.raises(Conflict, match="enable it first"):
        hooks.deliveries.sample(tenant, webhook, "job.failed")
    assert hooks.only(webhook)[0].error == "the endpoint was disabled: by request"


def test_deleting_an_endpoint_ends_its_deliveries_in_flight_or_not(
    hooks: Hooks, receiver: Receiver
) -> None:
    webhook, tenant = hooks.add(receiver.url), hooks.ledger.tenant
    succeed(hooks.ledger, 2)
    (flying,) = hooks.deliveries.claim(1)
    hooks.webhooks.delete(tenant, webhook)
    assert hooks.sender().deliver(flying) is DeliveryState.DELIVERED
    assert hooks.deliver() == []
    with pytest.raises(NotFound):
        hooks.webhooks.get(tenant, webhook)


def test_a_backlog_ends_or_goes_with_its_endpoint_slice_by_slice(
    hooks: Hooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "SLICE", 4)
    webhook, other, tenant = hooks.add(NOWHERE), hooks.add(NOWHERE), hooks.ledger.tenant
    succeed(hooks.ledger, 10)

    def states(one: UUID) -> list[str]:
        return [row.state for row, _ in hooks.of(one)]

    hooks.webhooks.update(tenant, webhook, enabled=False)
    assert states(webhook).count("failed") == 4
    assert [hooks.deliveries.end_disabled() for _ in range(3)] == [4, 2, 0]
    assert states(webhook) == ["failed"] * 10
    assert states(other) == ["pending"] * 10
    hooks.webhooks.delete(tenant, other)
    assert hooks.of(other) == []


def test_deleting_and_410_at_once_do_not_wait_for_each_other(hooks: Hooks) -> None:
    tenant = hooks.ledger.tenant
    for _ in range(10):
        webhook = hooks.add(NOWHERE)
        succeed(hooks.ledger, 3)
        claims = hooks.deliveries.claim(3)
        calls: list[Callable[[], object]] = [
            lambda: hooks.webhooks.delete(tenant, webhook),  # noqa: B023 - run within the round
            *(
                lambda one=one: hooks.deliveries.settle(
                    one, DeliveryState.FAILED, Attempt(1, status=410), disable="gone"
                )
                for one in claims
            ),
        ]
        together(calls)
        with pytest.raises(NotFound):
            hooks.webhooks.get(tenant, webhook)


def test_a_tenant_has_so_many_endpoints_and_no_more(hooks: Hooks) -> None:
    def add(_: int) -> bool:
        try:
            hooks.add(NOWHERE)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(add, range(MOST + 8))) == MOST


def test_old_deliveries_are_forgotten_and_pending_ones_are_not(hooks: Hooks) -> None:
    webhook = hooks.add(NOWHERE)
    succeed(hooks.ledger, 3)
    done, waiting, fresh = hooks.deliveries.claim(3)
    hooks.deliveries.settle(done, DeliveryState.DELIVERED, Attempt(1, status=200))
    hooks.deliveries.settle(fresh, DeliveryState.DELIVERED, Attempt(1, status=200))
    old = "01900000-0000-7000-8000-00000000000"
    for place, one in enumerate((done, waiting)):
        hooks.sql("DELETE FROM delivery_attempts WHERE delivery_id = :id", id=one.id)
        hooks.sql("UPDATE deliveries SET id = :new WHERE id = :id", new=f"{old}{place}", id=one.id)
    assert hooks.deliveries.purge(3600) == 1
    assert [str(row.id) for row, _ in hooks.of(webhook)] == [f"{old}1", str(fresh.id)]
    assert hooks.deliveries.purge(0) == 1


def test_the_log_shows_the_latest_tries_of_many(hooks: Hooks) -> None:
    webhook, tenant = hooks.add(NOWHERE), hooks.ledger.tenant
    succeed(hooks.ledger)
    for _ in range(25):
        claim: Delivery
        (claim,) = hooks.deliveries.claim(1)
        hooks.deliveries.settle(claim, DeliveryState.FAILED, Attempt(1, error="no"))
        hooks.deliveries.resend(tenant, webhook, claim.id)
    _, attempts = hooks.only(webhook)
    assert [one.attempt for one in attempts] == list(range(6, 26))
