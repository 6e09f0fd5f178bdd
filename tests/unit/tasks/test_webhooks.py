"""Signatures as others verify them, and how long a failed delivery pauses."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from storage.database import Database
from storage.webhooks import Webhooks
from tasks.outbound import Answer
from tasks.webhooks import JITTER, LONGEST_PAUSE, PAUSES, pause, retry_after, signed

BODY = json.dumps(
    {
        "id": "evt_1",
        "object": "event",
        "type": "batch.completed",
        "created_at": 1_700_000_000,
        "data": {"id": "batch_1"},
    }
).encode()


@pytest.fixture
def webhooks() -> Webhooks:
    return Webhooks(Database("postgresql+psycopg2://nobody@localhost/none"), "secret of 16 chars")


def test_a_secret_is_stable_and_differs_by_deployment_endpoint_and_generation(
    webhooks: Webhooks,
) -> None:
    one, other = uuid4(), uuid4()
    elsewhere = Webhooks(webhooks.database, "secret of another")
    secrets = [
        webhooks.signing_secret(one, 1),
        webhooks.signing_secret(one, 2),
        webhooks.signing_secret(other, 1),
        elsewhere.signing_secret(one, 1),
    ]
    assert len(set(secrets)) == 4
    assert webhooks.signing_secret(one, 1) == secrets[0]
    assert all(secret.startswith("whsec_") and len(secret) == 6 + 44 for secret in secrets)


def test_what_is_signed_is_verified_by_both_libraries(webhooks: Webhooks) -> None:
    secret = webhooks.signing_secret(uuid4(), 1)
    headers = signed(uuid4(), datetime.now(UTC), BODY, [secret])

    assert Webhook(secret).verify(BODY, headers) == json.loads(BODY)
    event = openai.OpenAI(api_key="none").webhooks.unwrap(BODY, headers, secret=secret)
    assert isinstance(event, openai.types.webhooks.BatchCompletedWebhookEvent)
    assert event.data.id == "batch_1"


def test_while_two_secrets_sign_either_verifies(webhooks: Webhooks) -> None:
    endpoint = uuid4()
    old, new = (webhooks.signing_secret(endpoint, generation) for generation in (1, 2))
    headers = signed(uuid4(), datetime.now(UTC), BODY, [new, old])

    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (old, new):
        Webhook(secret).verify(BODY, headers)


@pytest.mark.parametrize("changed", ["body", "id", "timestamp", "secret", "replayed"])
def test_what_was_tampered_with_is_not_verified(webhooks: Webhooks, changed: str) -> None:
    endpoint = uuid4()
    secret = webhooks.signing_secret(endpoint, 1)
    moment = datetime.now(UTC) - timedelta(minutes=6 if changed == "replayed" else 0)
    headers, body = signed(uuid4(), moment, BODY, [secret]), BODY
    if changed == "body":
        body = BODY.replace(b"batch_1", b"batch_2")
    if changed == "id":
        headers["webhook-id"] = "msg_other"
    if changed == "timestamp":
        headers["webhook-timestamp"] = str(int(headers["webhook-timestamp"]) + 1)
    if changed == "secret":
        secret = webhooks.signing_secret(endpoint, 2)

    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(body, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        openai.OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=secret)


def test_the_timestamp_is_the_same_moment_in_any_zone(webhooks: Webhooks) -> None:
    moment = datetime.fromisoformat("2026-11-24T10:00:00.9+05:30")
    assert signed(uuid4(), moment, BODY, [])["webhook-timestamp"] == str(int(moment.timestamp()))


# The schedule


def test_pauses_grow_to_a_day_and_last_for_more_than_three() -> None:
    assert [pause(attempt, rand=lambda: 0.0) for attempt in range(1, 10)] == list(PAUSES)
    assert list(PAUSES) == sorted(PAUSES)
    assert sum(PAUSES) > 3 * 86_400


@given(st.integers(1, 1000), st.floats(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_pause_is_within_its_bounds(attempt: int, asked: float, chance: float) -> None:
    seconds = pause(attempt, asked, lambda: chance)
    least = PAUSES[min(attempt, len(PAUSES)) - 1]
    longest = LONGEST_PAUSE * (1 + JITTER)
    assert least <= seconds <= longest
    assert seconds >= min(asked, longest)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (None, 0),
        ("", 0),
        ("120", 120),
        (" 120 ", 120),
        ("-1", 0),
        ("1.5", 0),
        ("soon", 0),
        ("²", 0),
        ("9" * 400, LONGEST_PAUSE),
        ("Tue, 24 Nov 2026 10:02:00 GMT", 120),
        ("Tue, 24 Nov 2026 09:00:00 GMT", 0),
        ("Tue, 24 Nov 2037 10:00:00 GMT", LONGEST_PAUSE),
        ("Tue, 99 Nov 2026 10:00:00 GMT", 0),
        ("Tue, 24 Nov 2026 10:02:00 -0000", 0),
    ],
)
def test_an_endpoint_may_ask_for_time_up_to_a_day(text: str | None, seconds: float) -> None:
    answer = Answer(status=503, retry_after=text, date="Tue, 24 Nov 2026 10:00:00 GMT")
    assert retry_after(answer) == seconds
