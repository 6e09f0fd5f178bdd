"""Names on the wire between gateway and GPU workers: tasks, queues, and how one is sent.

A message holds ids only, never a tensor: at most `MAX_BYTES`, whatever the request weighs.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from celery import current_app
from kombu import Exchange, Queue
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


_QUEUE = re.compile(r"[A-Za-z0-9_-]+\.(realtime|batch)")


def is_queue(name: str) -> bool:
    """Would anybody send there?"""
    return bool(_QUEUE.fullmatch(name))


def is_batch(name: str) -> bool:
    return name.endswith(".batch")


@functools.cache
def queue(name: str) -> Queue:
    """A queue of ours, on an exchange of its own name."""
    return Queue(name, Exchange(name), routing_key=name)


def send(task: str, to: str, **kwargs: Any) -> None:
    """Publish one message. Raises `Unavailable` where the broker is out of reach."""
    try:
        current_app.send_task(
            task,
            kwargs=kwargs,
            queue=queue(to),
            ignore_result=True,
            # What monitors show instead of arguments.
            argsrepr="()",
            kwargsrepr="{...}",
        )
    except (OperationalError, KombuError, OSError) as error:
        raise Unavailable("the message broker is out of reach", retry_after=1) from error
