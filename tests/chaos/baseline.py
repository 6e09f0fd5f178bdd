"""The baseline: plain Celery on Redis with the settings that are meant to lose nothing.

`acks_late`, `reject_on_worker_lost`, a short visibility timeout, threads: a task per item, under
the same schedule of kills. Each task counts itself in a database of Redis that nobody flushes.

As a module it is the app: `celery -A tests.chaos.baseline worker`.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from ops.embedded import Stack
from ops.embedded.process import Process

VISIBILITY = 5
"""Seconds until Celery takes a task that nobody acknowledged for lost."""
SLOTS = 16
TAKES = 0.1
"""Seconds of one task."""
WORKERS = ("plain", "plain-1")
QUIET = 15.0
"""The end: so many seconds without anything waiting, being done, or done."""

URL = os.environ.get("CHAOS_BASELINE", "redis://127.0.0.1:1/0")
app = Celery("baseline", broker=URL, set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=1,
    worker_pool="threads",
    worker_concurrency=SLOTS,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "visibility_timeout": VISIBILITY,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    },
)


def counters(url: str) -> redis.Redis:
    """Where tasks are counted: another database than the broker's."""
    return redis.Redis.from_url(url.rpartition("/")[0] + "/1", socket_timeout=10)


@app.task(name="baseline.work")
def work(item: int) -> None:
    client = counters(URL)
    client.hincrby("started", str(item))
    time.sleep(TAKES)
    client.hincrby("done", str(item))
    client.close()


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of plain Celery's items."""

    name: str
    accepted: int
    lost: int
    doubled: int
    again: int
    kills: int


class Baseline:
    """A Redis and two plain workers of its own."""

    def __init__(self, var: Path, seed: int):
        self.dice = random.Random(seed)
        self.stack = Stack(var)
        self.stack.open()
        self.url = self.stack.env["TIDEGATE_REDIS_URL"]
        self.kills = 0
        for name in WORKERS:
            self.stack.add(
                Process(
                    name,
                    [
                        *(sys.executable, "-m", "celery", "-A", "tests.chaos.baseline", "worker"),
                        *("-n", f"{name}@%h", "--without-mingle", "--without-gossip"),
                    ],
                    {**os.environ, "CHAOS_BASELINE": self.url},
                    ready=lambda: None,
                    settle=1.0,
                    after=("redis",),
                    tier=1,
                )
            )

    def __enter__(self) -> Baseline:
        self.stack.start(only=("redis", *WORKERS))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.stop()

    def run(self, name: str, items: int, hurt: Callable[[Baseline], Any]) -> Tally:
        """Send items while `hurt` goes on; then wait until nothing happens any more."""
        with counters(self.url) as counted:
            counted.flushdb()
            self.kills = 0
            sending = threading.Thread(target=self._send, args=(items,), daemon=True)
            sending.start()
            while not counted.hlen("done"):
                time.sleep(0.1)
            hurt(self)
            while sending.is_alive():
                sending.join(0.5)
            self._settle(counted)
            started = _counts(counted.hvals("started"))
            done = _counts(counted.hvals("done"))
        return Tally(
            name=name,
            accepted=items,
            lost=items - len(done),
            doubled=sum(count > 1 for count in done),
            again=max(0, sum(started) - items),
            kills=self.kills,
        )

    def _send(self, items: int) -> None:
        sender = Celery(broker=self.url, set_as_current=False)
        for item in range(items):
            sender.send_task("baseline.work", args=(item,), ignore_result=True)
        sender.close()

    def _settle(self, counted: redis.Redis) -> None:
        with redis.Redis.from_url(self.url, socket_timeout=10) as broker:
            last: tuple[Any, ...] = ()
            since = time.monotonic()
            while time.monotonic() - since < QUIET:
                now = (broker.llen("celery"), broker.hlen("unacked"), counted.hlen("done"))
                if now != last:
                    last, since = now, time.monotonic()
                time.sleep(0.5)

    def storm(self, schedule: Iterable[float]) -> None:
        """Kill random workers, as long as there is work."""
        with redis.Redis.from_url(self.url, socket_timeout=10) as broker:
            for pause in schedule:
                began = time.monotonic()
                name = self.dice.choice(WORKERS)
                self.stack.kill(name)
                self.kills += 1
                self.stack.start(only=(name,))
                time.sleep(max(0.0, pause - (time.monotonic() - began)))
                if not broker.llen("celery") and not broker.hlen("unacked"):
                    return

    def flush(self, times: int) -> None:
        """The broker forgets everything."""
        with redis.Redis.from_url(self.url, socket_timeout=10) as broker:
            for _ in range(times):
                broker.flushdb()
                time.sleep(self.dice.uniform(0.2, 1.2))


def _counts(values: Iterable[bytes]) -> list[int]:
    return [int(value) for value in values]


def tallies(
    var: Path, seed: int, kills: Callable[[], Iterable[float]], items: int
) -> Iterator[Tally]:
    """Plain Celery under the two faults whose figures say most."""
    with Baseline(var, seed) as baseline:
        yield baseline.run(
            f"plain Celery: {items:,} items, workers killed",
            items,
            lambda one: one.storm(kills()),
        )
        yield baseline.run("plain Celery: its Redis flushed", 6300, lambda one: one.flush(15))
