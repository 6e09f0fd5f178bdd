"""Names on the wire between gateway and GPU workers: tasks, queues, and how one is sent.

A message holds ids only, never a tensor: at most `MAX_BYTES`, whatever the request weighs.

Nothing depends on one message arriving: the ledger sends its hints again, and a realtime request
has a deadline. So it may be dropped by a broker that had to deliver it too often.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import structlog
from celery import Celery, current_app
from kombu import Exchange, Queue, pools
from kombu.exceptions import KombuError, OperationalError

from errors import Unavailable

log = structlog.get_logger(__name__)

REALTIME = "tidegate.realtime"
QUERY = "tidegate.query"
CHUNKS = "tidegate.chunks"

MAX_BYTES = 4096


def realtime_queue(group: str) -> str:
    """Requests somebody is waiting for."""
    return f"{group}.realtime"


def batch_queue(group: str) -> str:
    """Hints about work in the ledger."""
    return f"{group}.batch"


_QUEUE = re.compile(r"[A-Za-z0-9_-]+\.(realtime|batch)")


def is_queue(name: str) -> bool:
    """Would anybody send there?"""
    return bool(_QUEUE.fullmatch(name))


def is_batch(name: str) -> bool:
    return name.endswith(".batch")


# What RabbitMQ reads here and Redis does not. Nothing is set that an operator might change: a
# queue that is there with other arguments is refused.
DELIVERIES = 5
"""Times RabbitMQ gives one message to workers that die of it. More than the attempts of a chunk:
the ledger is the judge."""
_QUORUM = {"x-queue-type": "quorum"}

DEAD = Queue(
    "tidegate.dead",
    Exchange("tidegate.dead"),
    routing_key="tidegate.dead",
    queue_arguments={**_QUORUM, "x-max-length": 1000},
)
"""The latest hints that were delivered too often, for an operator to look at."""


@functools.cache
def queue(name: str) -> Queue:
    """A queue of ours, on an exchange of its own name."""
    arguments = {**_QUORUM, "x-delivery-limit": DELIVERIES}
    # Of a realtime message nothing is left to look at: who took it took its tensors.
    if is_batch(name):
        arguments |= {
            "x-dead-letter-exchange": DEAD.exchange.name,
            "x-dead-letter-routing-key": DEAD.routing_key,
        }
    return Queue(name, Exchange(name), routing_key=name, queue_arguments=arguments)


POOL_TIMEOUT = 2.0
"""Seconds a message may wait until one of this process's connections is free."""
SEND_TIMEOUT = 2.0
"""Seconds Redis may take for its answer to one who sends. One who receives gives it longer: what
it asks for is to be waited for."""


def _on_redis(app: Celery) -> bool:
    return not str(app.conf.broker_url).startswith("amqp")


@functools.cache
def _senders(app: Celery) -> Any:
    """This process's connections to send by."""
    options = {"socket_timeout": SEND_TIMEOUT} if _on_redis(app) else {}
    return pools.producers[app.connection_for_write(transport_options=options)]


def send(task: str, to: str, *, ttl: float | None = None, **kwargs: Any) -> None:
    """Publish one message; RabbitMQ drops it where nobody took it for `ttl` seconds. Raises
    `Unavailable` where the broker is out of reach, or does not say that it has the message."""
    app = current_app._get_current_object()
    try:
        with _senders(app).acquire(block=True, timeout=POOL_TIMEOUT) as producer:
            try:
                app.send_task(
                    task,
                    kwargs=kwargs,
                    queue=queue(to),
                    producer=producer,
                    expiration=ttl,
                    # RabbitMQ confirms what it could put in no queue, too, unless asked to object.
                    mandatory=True,
                    # RabbitMQ says on use that a connection is gone. Of Redis that is known
                    # before, and one that is silent would be waited for again.
                    retry=not _on_redis(app),
                    ignore_result=True,
                    # What monitors show instead of arguments.
                    argsrepr="()",
                    kwargsrepr="{...}",
                )
            except Exception as error:
                connection = producer.connection
                # A confirm that still comes must not pass for the next message's.
                connection.collect()
                if isinstance(error, connection.connection_errors + connection.channel_errors):
                    # Not away: it does not like what we ask. What exactly is for its operator.
                    log.warning("refused", action="messages.refused", to=to, error=str(error))
                    raise Unavailable("the message broker refused", retry_after=1) from error
                raise
    except (OperationalError, KombuError, OSError) as error:
        raise Unavailable("the message broker is out of reach", retry_after=1) from error
