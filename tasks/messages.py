"""Names on the wire between gateway and GPU workers: tasks, queues, and how one is sent.

A message holds ids only, never a tensor: at most `MAX_BYTES`, whatever the request weighs.
"""

from __future__ import annotations

from typing import Any

from celery import current_app
from kombu.exceptions import KombuError, OperationalError

from errors import Unavailable

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


def is_batch(queue: str) -> bool:
    return queue.endswith(".batch")


def send(task: str, queue: str, **kwargs: Any) -> None:
    """Publish one message. Raises `Unavailable` where the broker is out of reach."""
    try:
        current_app.send_task(
            task,
            kwargs=kwargs,
            queue=queue,
            ignore_result=True,
            # What monitors show instead of arguments.
            argsrepr="()",
            kwargsrepr="{...}",
        )
    except (OperationalError, KombuError, OSError) as error:
        raise Unavailable("the message broker is out of reach", retry_after=1) from error
