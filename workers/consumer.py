"""Celery's consumer, without what is of no use here. Named in the app's settings."""

from __future__ import annotations

from celery.worker import consumer


class Consumer(consumer.Consumer):  # type: ignore[misc]
    """On quorum queues Celery makes 28 queues more, for tasks with an ETA. Ours have none: what is
    to be done later is a row in the ledger."""

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]
        default_steps = tuple(
            step
            for step in consumer.Consumer.Blueprint.default_steps
            if not step.endswith(":DelayedDelivery")
        )
