"""Messages that nobody of the product sent: repeated, reordered, stale, unknown, forged."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import kombu
from celery import Celery

GROUP = "default"


class Publisher:
    """Sends to the batch queue of a stack whatever it likes."""

    def __init__(self, env: Mapping[str, str], namespace: str = "tidegate"):
        # An app of its own, that is nobody's default.
        self._app = Celery(broker=env["TIDEGATE_REDIS_URL"], set_as_current=False)
        self._app.conf.broker_transport_options = {
            "global_keyprefix": f"{namespace}:",
            "sep": ":",
        }
        name = f"{GROUP}.batch"
        self._queue = kombu.Queue(name, kombu.Exchange(name), routing_key=name)
        self._connection = self._app.connection_for_write()
        self._producer = self._app.amqp.Producer(self._connection)

    def send(self, task: str = "tidegate.chunks", **kwargs: Any) -> None:
        self._app.send_task(task, kwargs=kwargs, queue=self._queue, ignore_result=True)

    def raw(self, body: Any, **properties: Any) -> None:
        """A message that Celery would not send."""
        self._producer.publish(
            body,
            exchange=self._queue.exchange,
            routing_key=self._queue.routing_key,
            declare=[self._queue],
            **properties,
        )

    def repeat(self, chunks: Sequence[int], dice: random.Random) -> None:
        """Hints about chunks, ended ones too: each up to five times, in any order."""
        chosen = [chunk for chunk in chunks[-400:] for _ in range(dice.randint(0, 5))]
        dice.shuffle(chosen)
        while chosen:
            cut = dice.randint(1, 40)
            self.send(ids=chosen[:cut])
            chosen = chosen[cut:]

    def forge(self, dice: random.Random) -> None:
        """Unknown chunks, wrong shapes, strange tasks, other formats, versions to come."""
        self.send(ids=[dice.randint(10**9, 10**12)])
        self.send(ids=[2**70])
        self.send(ids=[-1, 0])
        self.send(ids=["1; DROP TABLE chunks", None, {"a": 1}])
        self.send(ids="7")
        self.send(ids=[])
        self.send(wrong=True)
        self.send(ids=[1], schema=99, tenant="somebody else")
        self.send("tidegate.unknown", ids=[1])
        self.raw(b"\x80\x04garbage", content_type="application/x-python-serialize")
        self.raw("not a task", content_type="text/plain", content_encoding="utf-8")
        self.raw({"not": "a task"}, serializer="json")

    def close(self) -> None:
        self._connection.release()
        self._app.close()
