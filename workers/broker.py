"""The message broker as Celery is to use it: Redis, or RabbitMQ where its URL begins with `amqp`.

On RabbitMQ a deployment is a virtual host; Redis has no such thing, so its keys get a prefix.
"""

from __future__ import annotations

from typing import Any

from config import Settings

CONNECT_TIMEOUT = 2
HEARTBEAT = 10
"""A worker and RabbitMQ take each other for dead after twice these seconds of silence."""


def transport_options(settings: Settings) -> dict[str, Any]:
    """What the broker's own client is told."""
    if settings.broker.startswith("amqp"):
        return {
            # Without it a publish can vanish: RabbitMQ answers only what is confirmed.
            "confirm_publish": True,
            "client_properties": {"connection_name": "tidegate"},
        }
    return {
        # Which messages are in hand, kombu would write down in Redis, twice a message: a quarter of
        # what a message cost the worker. What a worker takes along when it dies is sent again by
        # who counts on it, the ledger or a gateway; what it did not run it gives back.
        "ack_emulation": False,
        # Of who receives. Who sends is less patient: see `tasks.messages`.
        "socket_timeout": 15,
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "retry_on_timeout": False,
        "queue_order_strategy": "priority",
        "global_keyprefix": f"{settings.namespace}:",
        "sep": ":",
        "client_name": "tidegate",
    }
