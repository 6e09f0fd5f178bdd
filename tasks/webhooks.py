"""Tells endpoints what happened: claims due deliveries, signs and posts them, logs what came of it.

Standard Webhooks: `webhook-id` is the delivery's and stays over its tries, `webhook-timestamp` is
this try's, `webhook-signature` holds one signature per secret in use. Only 2xx is success.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from uuid import UUID

import orjson
import structlog
from standardwebhooks import Webhook

from errors import Unavailable
from storage.deliveries import Attempt, Deliveries, Delivery
from storage.events import DeliveryState
from storage.webhooks import DISABLED, Webhooks
from tasks import outbound
from tasks.outbound import Answer

log = structlog.get_logger(__name__)

MINUTE, HOUR = 60.0, 3600.0
PAUSES = (
    5.0,
    5 * MINUTE,
    30 * MINUTE,
    2 * HOUR,
    5 * HOUR,
    10 * HOUR,
    14 * HOUR,
    20 * HOUR,
    24 * HOUR,
)
"""After each try that failed; after the last try it has failed for good."""
JITTER = 0.2
LONGEST_PAUSE = 24 * HOUR
SLOTS = 32
"""Deliveries one sender makes at a time."""
GONE = 410


def pause(attempt: int, asked: float = 0.0, rand: Callable[[], float] = random.random) -> float:
    """Seconds after the failed try of this number, from 1: a little more than the schedule says, so
    that what failed together doesn't come back together; not less than the endpoint asked for."""
    scheduled = PAUSES[min(attempt, len(PAUSES)) - 1] * (1 + JITTER * rand())
    return min(LONGEST_PAUSE * (1 + JITTER), max(scheduled, asked))


def retry_after(answer: Answer) -> float:
    """The seconds an answer asks us to wait, up to a day; 0 where it says nothing we understand. A
    moment is measured by the clock that named it."""
    text = (answer.retry_after or "").strip()
    if text.isascii() and text.isdigit():
        return min(LONGEST_PAUSE, float(text[:9]))
    try:
        until = parsedate_to_datetime(text)
        said = parsedate_to_datetime(answer.date) if answer.date else datetime.now(UTC)
        return max(0.0, min(LONGEST_PAUSE, (until - said).total_seconds()))
    except (TypeError, ValueError):
        return 0.0


def message_id(delivery_id: UUID) -> str:
    return f"msg_{delivery_id.hex}"


def signed(
    delivery_id: UUID, moment: datetime, body: bytes, secrets: Sequence[str]
) -> dict[str, str]:
    """The headers of one try."""
    name = message_id(delivery_id)
    moment = moment.astimezone(UTC)
    signatures = [Webhook(secret).sign(name, moment, body.decode()) for secret in secrets]
    return {
        "webhook-id": name,
        "webhook-timestamp": str(int(moment.timestamp())),
        "webhook-signature": " ".join(signatures),
    }


class Sender:
    """Delivers what is due, several at a time. Any number may run; none is special."""

    def __init__(
        self,
        deliveries: Deliveries,
        webhooks: Webhooks,
        *,
        timeout: float,
        insecure: bool = False,
        every: float = 1.0,
        slots: int = SLOTS,
        post: Callable[..., Answer] = outbound.post,
        rand: Callable[[], float] = random.random,
    ):
        self._deliveries = deliveries
        self._webhooks = webhooks
        self._timeout = timeout
        self._insecure = insecure
        self._every = every
        self._post = post
        self._rand = rand
        self._slots = slots
        self._flying = 0
        self._landed = 0
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="webhook")

    def run(self, stopping: threading.Event) -> None:
        """Deliver until told to stop. Raises `Unavailable` where Postgres is away."""
        while not stopping.is_set():
            with self._changed:
                free, landed = self._slots - self._flying, self._landed
            # No more than fly at once: a lease begins with the claim.
            claimed = self._deliveries.claim(free) if free else []
            for delivery in claimed:
                self._pool.submit(self._fly, delivery)
                with self._changed:
                    self._flying += 1
            with self._changed:
                # Whenever one lands there is room for the next.
                self._changed.wait_for(functools.partial(self._another, landed), self._every)

    def _another(self, landed: int) -> bool:
        return self._landed != landed

    def _fly(self, delivery: Delivery) -> None:
        try:
            self.deliver(delivery)
        except Unavailable as error:
            # The lease runs out, and somebody tries again.
            log.warning("outcome lost", action="webhook.unsettled", error=error.message)
        except Exception:
            log.exception("delivery failed", action="webhook.unsettled", id=str(delivery.id))
        finally:
            with self._changed:
                self._flying -= 1
                self._landed += 1
                self._changed.notify()

    def deliver(self, delivery: Delivery) -> DeliveryState:
        """One try of a claimed delivery; the state it left it in."""
        if delivery.disabled_why is not None:
            why = f"{DISABLED}{delivery.disabled_why}"
            self._deliveries.settle(delivery, DeliveryState.FAILED, error=why)
            return DeliveryState.FAILED
        body = orjson.dumps(delivery.payload)
        secrets = [
            self._webhooks.signing_secret(delivery.webhook_id, generation)
            for generation in delivery.generations
        ]
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Tidegate-Webhooks/1",
            **signed(delivery.id, delivery.claimed_at, body, secrets),
        }
        started = time.monotonic()
        answer = self._post(
            delivery.url, body, headers, timeout=self._timeout, insecure=self._insecure
        )
        attempt = Attempt(
            duration_ms=round((time.monotonic() - started) * 1000),
            status=answer.status,
            error=answer.error,
            response=answer.body,
        )
        return self._settle(delivery, answer, attempt)

    def _settle(self, delivery: Delivery, answer: Answer, attempt: Attempt) -> DeliveryState:
        why = answer.error or f"answered {answer.status}"
        state, disable, delay = DeliveryState.PENDING, None, 0.0
        if answer.status is not None and 200 <= answer.status < 300:
            state, why = DeliveryState.DELIVERED, ""
        elif answer.status == GONE:
            state, disable = DeliveryState.FAILED, "it answered 410 Gone"
        elif delivery.sample or delivery.attempt > len(PAUSES):
            state = DeliveryState.FAILED
        else:
            delay = pause(delivery.attempt, retry_after(answer), self._rand)
        held = self._deliveries.settle(
            delivery, state, attempt, delay=delay, error=why or None, disable=disable
        )
        log.info(
            "delivered" if state is DeliveryState.DELIVERED else "not delivered",
            action=f"webhook.{state.value}" if held else "webhook.stale",
            id=str(delivery.id),
            webhook=str(delivery.webhook_id),
            attempt=delivery.attempt,
            status=answer.status,
            error=answer.error,
        )
        return state

    def stop(self) -> None:
        """Wait for what flies."""
        self._pool.shutdown(wait=True)
