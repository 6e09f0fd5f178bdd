"""The stack that is hurt, and one scenario's doings on it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import redis
from tqdm import tqdm

from ops.embedded import Stack
from ops.embedded.process import Process, StackError
from tests.chaos.client import CHUNK, Client, Refused
from tests.chaos.journal import Holds, Journal
from tests.chaos.oracle import Due, Evidence, Item, Kill, Verdict, judge

STORES = ("triton", "redis", "postgres")
PRODUCT = ("gateway", "worker", "sweeper")
PARTS = (*STORES, "migrate", "default-key", *PRODUCT)
"""What is started: everything but Flower."""
LEASE, SWEEP, HINT = 3.0, 0.5, 2.0
SETTINGS = {
    "TIDEGATE_LEASE": str(LEASE),
    "TIDEGATE_SWEEP_INTERVAL": str(SWEEP),
    "TIDEGATE_HINT_TIMEOUT": str(HINT),
    # Small, so that work is spread over many attempts.
    "TIDEGATE_CHUNK_ITEMS": str(CHUNK),
    "TIDEGATE_MAX_BATCH_LINES": "1000000",
    # A storm hits the same chunk more often than life does; that attempts end is tested by itself.
    "TIDEGATE_MAX_ATTEMPTS": "50",
}
WORKER = ("celery", "-A", "tests.chaos.crashing", "worker")
TRIES = 10
"""Starts of a process that dies at once."""
SETTLE = 30.0
"""Seconds for the broker and the outbox to empty once every job has ended."""

Tell = Callable[[str], None]


class World:
    """One embedded stack whose workers are watched (`crashing`). To be used from one thread, which
    outlives it."""

    def __init__(self, var: Path, *, seed: int, tell: Tell = lambda _: None, quiet: bool = True):
        self.seed = seed
        self.tell = tell
        self.quiet = quiet
        self.stack = Stack(var, environ={**os.environ, **SETTINGS})
        self.stack.open()
        self.stack.processes["worker"] = watched(self.stack.processes["worker"])
        self.journal = Journal(self.stack.env)
        objects = self.stack.var / "objects"
        self.holds: Holds = lambda key: (objects / key).exists()
        self.wanted = {*STORES, *PRODUCT}
        """What should run: `revive` sees to it."""

    def start(self) -> None:
        self.stack.start(only=PARTS)
        self.journal.install()

    def __enter__(self) -> World:
        try:
            self.start()
        except BaseException:
            self.stack.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.stop()

    @property
    def env(self) -> Mapping[str, str]:
        return self.stack.env

    def client(self, **options: Any) -> Client:
        return Client(self.env["TIDEGATE_URL"], self.env["TIDEGATE_API_KEY"], **options)

    @contextlib.contextmanager
    def altered(
        self,
        *names: str,
        env: Mapping[str, str] | None = None,
        command: Callable[[Sequence[str | Path]], Sequence[str | Path]] = lambda same: same,
    ) -> Iterator[None]:
        """Processes run with other variables, or as another command, meanwhile."""
        before = {name: self.stack.processes[name] for name in names}
        for name, process in before.items():
            self.stack.processes[name] = replace(
                process, env={**process.env, **(env or {})}, command=command(process.command)
            )
        self._again(names)
        try:
            yield
        finally:
            self.stack.processes.update(before)
            self._again(names)

    @contextlib.contextmanager
    def another(self, name: str, like: str = "worker", **changes: Any) -> Iterator[None]:
        """One more process meanwhile."""
        self.stack.add(replace(self.stack.processes[like], name=name, **changes))
        self.bring((name,))
        self.wanted.add(name)
        try:
            yield
        finally:
            self.wanted.remove(name)
            self.stack.stop(name)
            del self.stack.processes[name]

    @contextlib.contextmanager
    def without(self, *names: str) -> Iterator[None]:
        """Parts are away meanwhile, stopped in order."""
        self.wanted -= set(names)
        self.stack.stop(*names)
        try:
            yield
        finally:
            self.wanted |= set(names)
            self.bring(names)

    def _again(self, names: Iterable[str]) -> None:
        running = [name for name in names if self.stack.alive(name)]
        if running:
            self.stack.stop(*running)
        self.bring(names)

    def bring(self, names: Iterable[str]) -> None:
        """Start processes; one that dies on the way, as some here are to, is started again."""
        wanted = tuple(names)
        for left in reversed(range(TRIES)):
            try:
                self.stack.start(only=wanted)
                return
            except StackError:
                if not left:
                    raise

    def revive(self) -> list[str]:
        """Start what does not run. Which that was."""
        dead = [name for name in self.wanted if not self.stack.alive(name)]
        if dead:
            self.bring(dead)
        return dead

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.env["TIDEGATE_REDIS_URL"], socket_timeout=5)

    def each(self, things: Iterable[Any], what: str, total: int | None = None) -> Iterator[Any]:
        """Go through things with a progress bar."""
        return iter(
            tqdm(things, desc=what, total=total, disable=self.quiet or None, leave=False, ncols=80)
        )


def watched(process: Process, *arguments: str) -> Process:
    """A worker process as `crashing` runs it."""
    words = list(process.command)
    at = words.index("-A")
    words[at + 1] = WORKER[2]
    return replace(process, command=[*words, *arguments])


class Run:
    """What one scenario does: its load, its faults, and in the end the verdict."""

    def __init__(self, world: World, *, long: bool = False, patience: float = 120.0):
        self.world = world
        self.stack = world.stack
        self.rng = random.Random(world.seed)
        self.long = long
        self.client = world.client(patience=patience)
        self.idempotent = True
        self.kills: list[Kill] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        """Figures of its own, for the report."""
        world.revive()
        self.verdict: Verdict | None = None
        """Where a scenario had to have it before its world is put right again."""
        self.pids = {name: self.stack.pid(name) for name in PRODUCT}
        self.since = world.journal.last()
        self._threads: list[threading.Thread] = []
        self._numbers = itertools.count(1)

    def pick(self, short: int, long: int) -> int:
        """How much, by profile."""
        return long if self.long else short

    # Load

    def items(self, count: int, **options: Any) -> dict[str, Item]:
        """Lines whose answers are known, and differ."""
        numbers = itertools.islice(self._numbers, count)
        return {f"line-{number}": Item(number * 7 + 1, **options) for number in numbers}

    def batch(self, count: int, *, delay_ms: int = 0, window: int = 3600) -> UUID:
        return self.client.batch(self.items(count), delay_ms=delay_ms, window=window)

    def job(self, due: Due = Due.ANSWER, **options: Any) -> UUID:
        (item,) = self.items(1, due=due).values()
        return self.client.job(item, **options)

    def trickle(self, count: int, rate: float, *, threads: int = 2, delay_ms: int = 0) -> None:
        """Submit single jobs in the background, so many a second."""
        share = count // threads

        def submit(items: Sequence[Item]) -> None:
            for item in items:
                began = time.monotonic()
                parameters: dict[str, Any] = {"delay_ms": delay_ms} if delay_ms else {}
                self.client.job(item, **parameters)
                time.sleep(max(0.0, threads / rate - (time.monotonic() - began)))

        for _ in range(threads):
            items = list(self.items(share).values())
            self.behind(functools.partial(submit, items))

    def behind(self, run: Callable[[], Any]) -> None:
        """Do something in the background; `finish` waits for it, and tells what failed."""

        def guarded() -> None:
            try:
                run()
            except Refused as error:
                self.problems.append(f"a client gave up: {error}")
            except Exception as error:
                self.problems.append(f"a client failed: {error!r}")

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        self._threads.append(thread)

    # Progress

    @property
    def committed(self) -> int:
        """Items committed so far."""
        return self.world.journal.committed(self.since)

    def until(self, condition: Callable[[], Any], within: float, what: str) -> bool:
        """Wait for something; that it did not come is a problem."""
        until = time.monotonic() + within
        while not condition():
            if time.monotonic() > until:
                self.problems.append(f"not within {within:g} s: {what}")
                return False
            self.world.revive()
            time.sleep(0.05)
        return True

    def going(self, more: int = 1, within: float = 60.0) -> bool:
        """Wait until so many more items are committed."""
        target = self.committed + more
        return self.until(lambda: self.committed >= target, within, f"{more} more items")

    def resumed(self, within: float) -> float:
        """Seconds until the next commit, the restart of what is dead included."""
        began = time.monotonic()
        self.world.revive()
        self.going(within=within)
        return time.monotonic() - began

    def unended(self) -> int:
        return self.world.journal.unended([job.job for job in self.client.accepted])

    @property
    def submitting(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    # Faults

    def kill(self, name: str) -> None:
        """SIGKILL, and note when."""
        if self.stack.alive(name):
            self.kills.append(Kill(time.time(), name))
            self.stack.kill(name)

    def kill_lane(self, name: str) -> None:
        """SIGKILL to the process that runs a worker's batch lane, and to it alone."""
        for lane in self.stack.family(name)[1:]:
            self.kills.append(Kill(time.time(), name))
            lane.kill()

    def crash(self, name: str) -> None:
        """SIGKILL and start again."""
        self.kill(name)
        self.world.bring((name,))

    def storm(self, parts: Sequence[str], kills: int, every: float) -> None:
        """Crash random parts as long as there is work."""
        for _ in self.world.each(range(kills), f"killing {'/'.join(parts)}"):
            next_at = time.monotonic() + every * self.rng.uniform(0.6, 1.4)
            self.crash(self.rng.choice(parts))
            time.sleep(max(0.0, next_at - time.monotonic()))
            if not self.submitting and not self.unended():
                return

    @contextlib.contextmanager
    def frozen(self, name: str, *, children: bool = True) -> Iterator[None]:
        """SIGSTOP a process, its children as well unless told otherwise, then SIGCONT."""
        family = self.stack.family(name)[: None if children else 1]
        _signal(family, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(family, signal.SIGCONT)

    @contextlib.contextmanager
    def dying(self, name: str, point: str, passage: int, deaths: int) -> Iterator[Path]:
        """A process kills itself at a point of `crashing`. Gives the file of its deaths."""
        folder = self.stack.var / "chaos" / secrets.token_hex(4)
        folder.mkdir(parents=True)
        notes = folder / "deaths"
        env = {
            "CHAOS_POINT": point,
            "CHAOS_PASSAGE": str(passage),
            "CHAOS_DEATHS": str(deaths),
            "CHAOS_FOLDER": str(folder),
        }
        with self.world.altered(name, env=env, command=TWINS[name]):
            yield notes
            noted = notes.read_text().split() if notes.exists() else []
            self.kills += [Kill(float(at), name) for at in noted]

    # The end

    def drain(self, within: float = 300.0) -> None:
        """Wait until everything submitted has ended, for what the scenario changed is put back
        then; who dies is started again."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.5)
                self.world.revive()
        until = time.monotonic() + within
        with tqdm(
            desc="ending",
            total=self.unended(),
            disable=self.world.quiet or None,
            leave=False,
            ncols=80,
        ) as bar:
            while left := self.unended():
                bar.update((bar.total or 0) - left - bar.n)
                self.world.revive()
                if time.monotonic() > until:
                    self.problems.append(f"{left} jobs have not ended within {within:g} s")
                    return
                time.sleep(0.1)
        self.world.revive()

    def finish(self, within: float = 300.0, settle: float = SETTLE) -> Verdict:
        """Let everything come to its end, and judge."""
        self.drain(within)
        answers = self.client.answers()
        accepted = self.client.accepted
        settled = time.monotonic() + settle
        while True:
            rest = self.world.journal.rest(
                [job.job for job in accepted], [job.key for job in accepted], self.world.holds
            )
            if not (rest.outbox or rest.hints) or time.monotonic() > settled:
                break
            time.sleep(0.3)
        self.client.close()
        if errors := self.client.statuses[500]:
            self.problems.append(f"the gateway answered 500 {errors} times")
        self.problems += self.client.broken
        verdict = judge(
            Evidence(
                accepted=accepted,
                answers=answers,
                journal=self.world.journal.entries(self.since),
                rest=rest,
                kills=self.kills,
                idempotent=self.idempotent,
            )
        )
        return replace(verdict, problems=(*self.problems, *verdict.problems))


def _signal(family: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _gateway(words: Sequence[str | Path]) -> Sequence[str | Path]:
    return [*words[:-1], "tests.chaos.crashing:gateway()"]


def _sweeper(words: Sequence[str | Path]) -> Sequence[str | Path]:
    return [*words[:-1], "tests.chaos.crashing"]


TWINS: Mapping[str, Callable[[Sequence[str | Path]], Sequence[str | Path]]] = {
    "gateway": _gateway,
    "sweeper": _sweeper,
    "worker": lambda same: same,
}
"""How each part is started as `crashing` has it. Workers always are."""
