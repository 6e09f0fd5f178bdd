"""What is said to the message broker, and to Redis besides, while a test looks."""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import kombu
import redis

from ops.embedded import Stack
from tests.e2e.helpers import rabbitmqctl


@dataclass(frozen=True, slots=True)
class Message:
    """One message to workers: its task, its body, and how much the broker was sent in all."""

    queue: str
    task: str
    body: bytes
    size: int


@dataclass
class Traffic:
    """In its order."""

    commands: list[str] = field(default_factory=list)
    """What clients said to Redis."""
    messages: list[Message] = field(default_factory=list)

    def published(self, queue: str) -> list[Message]:
        """The messages put in a queue."""
        return [message for message in self.messages if message.queue == queue]


@contextmanager
def overheard(stack: Stack, client: redis.Redis) -> Iterator[Traffic]:
    """Everything said within the block. What it published is known after it."""
    traffic = Traffic()
    with _commands(client, traffic):
        if "rabbitmq" in stack.processes:
            with _traced(stack, traffic):
                yield traffic
        else:
            yield traffic
    traffic.messages += filter(None, map(_pushed, traffic.commands))


@contextmanager
def _commands(client: redis.Redis, traffic: Traffic) -> Iterator[None]:
    marker = secrets.token_hex(8)
    with client.monitor() as monitor:  # type: ignore[no-untyped-call]

        def listen() -> None:
            while marker not in (command := monitor.next_command()["command"]):
                traffic.commands.append(command)

        thread = Thread(target=listen)
        thread.start()
        try:
            yield
        finally:
            client.echo(marker)
            thread.join(timeout=30)
    assert not thread.is_alive()


def _pushed(command: str) -> Message | None:
    """The message in a command, if it is one that publishes."""
    name, _, rest = command.partition(" ")
    key, _, text = rest.partition(" ")
    _, _, queue = key.rpartition(":")
    if name.upper() != "LPUSH" or not queue.endswith((".realtime", ".batch")):
        return None
    document = json.loads(text)
    assert document["properties"]["body_encoding"] == "base64"
    return Message(
        queue=queue,
        task=document["headers"]["task"],
        body=base64.b64decode(document["body"]),
        size=len(text),
    )


@contextmanager
def _traced(stack: Stack, traffic: Traffic) -> Iterator[None]:
    """RabbitMQ gives a copy of everything published to who asks for it."""
    exchange = kombu.Exchange("amq.rabbitmq.trace", type="topic", passive=True)
    rabbitmqctl(stack, "trace_on", "-p", "tidegate")
    with kombu.Connection(stack.env["TIDEGATE_BROKER_URL"]) as connection:
        copies = kombu.Queue(
            secrets.token_hex(8), exchange, routing_key="publish.#", exclusive=True
        )(connection.default_channel)
        copies.declare()
        yield
        while (copy := copies.get(no_ack=True)) is not None:
            properties: dict[str, Any] = copy.headers["properties"]
            for queue in copy.headers["routing_keys"]:
                if queue.endswith((".realtime", ".batch")):
                    traffic.messages.append(
                        Message(
                            queue=queue,
                            task=properties["headers"]["task"],
                            body=copy.body,
                            size=len(copy.body) + len(json.dumps(properties)),
                        )
                    )
    rabbitmqctl(stack, "trace_off", "-p", "tidegate")
