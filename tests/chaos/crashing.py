"""The product's processes, as the harness starts them: watched, and to die where it says.

    celery -A tests.chaos.crashing worker …
    gunicorn -c web/gunicorn.py 'tests.chaos.crashing:gateway()'
    python -m tests.chaos.crashing

are `workers`, `web.wsgi:app` and `workers.sweeper` with methods of theirs wrapped; the product has
no hooks for this. What they do besides is in the environment:

CHAOS_POINT     the name of a point of `POINTS`, at which the process kills itself
CHAOS_PASSAGE   ... when it comes there for the n-th time
CHAOS_DEATHS    ... until that many processes have
CHAOS_FOLDER    where they note their deaths
CHAOS_STORE     the share of writes to the object store that fail, half of them after success
CHAOS_GRACE     seconds that a slot may take to come back when its attempt is over
CHAOS_MUTANT    a safeguard to do without (`MUTANTS`): does the oracle notice?

Inputs `POISON` kill or hang whoever runs them.
"""

from __future__ import annotations

import functools
import importlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

KILLS, HANGS = -666_001, -666_002
"""Poison: the value of an item that kills its worker, and of one that never comes back."""
DURING = 0.03
"""Seconds into a call at which to die during it."""


class When(Enum):
    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


@dataclass(frozen=True, slots=True)
class Point:
    """A place in the product's code: a method or function by its full name."""

    name: str
    process: str
    when: When
    place: str


POINTS = (
    Point("message taken, not claimed", "worker", When.BEFORE, "storage.chunks:Chunks.claim"),
    Point("claimed, not run", "worker", When.AFTER, "storage.chunks:Chunks.claim"),
    Point("at the model", "worker", When.DURING, "inference.client:TritonServer.infer_in_parts"),
    Point("answered, not stored", "worker", When.AFTER, "inference.packing:split"),
    Point("lines at the model", "worker", When.AFTER, "inference.client:TritonServer.start"),
    Point(
        "lines answered, not stored", "worker", When.AFTER, "tasks.line_format:LineWriter.answered"
    ),
    Point("stored, not committed", "worker", When.BEFORE, "storage.chunks:Chunks.commit"),
    Point("within the commit", "worker", When.BEFORE, "storage.moves:fan_in"),
    Point("committed, not acknowledged", "worker", When.AFTER, "storage.chunks:Chunks.commit"),
    Point("renewing leases", "worker", When.BEFORE, "storage.chunks:Chunks.renew"),
    Point("read in, not committed", "worker", When.BEFORE, "storage.chunks:Chunks.commit_plan"),
    Point("putting files together", "worker", When.BEFORE, "storage.chunks:Chunks.chunk_outputs"),
    Point("files stored, not named", "worker", When.BEFORE, "storage.chunks:Chunks.commit_files"),
    Point("released, not published", "sweeper", When.AFTER, "storage.backlog:Backlog.release"),
    Point("within a sweep", "sweeper", When.BEFORE, "storage.backlog:Backlog._sweep_deadlines"),
    Point("swept, not pumped", "sweeper", When.AFTER, "storage.backlog:Backlog.sweep"),
    Point("accepted, not published", "gateway", When.BEFORE, "tasks.pump:Pump.kick"),
    Point("accepted, not answered", "gateway", When.AFTER, "tasks.pump:Pump.kick"),
)

MUTANTS = {"fence": "commits are not fenced by the token"}


def wrap(place: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace what is at a place by what `wrapper` makes of it."""
    owner, name, original = find(place)
    setattr(owner, name, functools.wraps(original)(wrapper(original)))


def find(place: str) -> tuple[Any, str, Callable[..., Any]]:
    """Owner, name and value of what is at `module:Class.method` or `module:function`."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    return owner, name, getattr(owner, name)


def die() -> None:
    """As a power cut would: this process and those it has made."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
    time.sleep(60)


class Death:
    """At one point, on one passage, so many times in all."""

    def __init__(self, passage: int, deaths: int, notes: Path):
        self._passage = passage
        self._deaths = deaths
        self._notes = notes
        self._lock = threading.Lock()

    def comes(self) -> None:
        with self._lock:
            self._passage -= 1
            if self._passage != 0:
                return
            noted = self._notes.read_text().splitlines() if self._notes.exists() else []
            if len(noted) >= self._deaths:
                return
            with self._notes.open("a") as file:
                file.write(f"{time.time()}\n")
                file.flush()
            die()

    def at(self, when: When) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any, **named: Any) -> Any:
                if when is When.BEFORE:
                    self.comes()
                elif when is When.DURING:
                    timer = threading.Timer(DURING, self.comes)
                    timer.daemon = True
                    timer.start()
                value = original(*arguments, **named)
                if when is When.AFTER:
                    self.comes()
                return value

            return run

        return wrapper


def point(name: str) -> Point:
    return next(one for one in POINTS if one.name == name)


# What the journal cannot see: what a worker was told about its commit


def _note(chunks: Any, claim: Any, committed: bool) -> None:
    import sqlalchemy as sa

    from tests.chaos.journal import SAID

    values = {
        "what": "committed" if committed else "refused",
        "job": claim.job_id,
        "chunk": claim.id,
        "token": claim.token,
        "items": claim.items,
        "worker": f"pid {os.getpid()}",
    }
    try:
        with chunks.database.transaction() as connection:
            connection.execute(
                sa.text(SAID + "(:what, :job, :chunk, :token, :items, :worker)"), values
            )
    except Exception:
        pass


def _watch_commits() -> None:
    def many(original: Callable[..., Any]) -> Callable[..., Any]:
        def commit(self: Any, done: Any) -> Any:
            done = list(done)
            committed = original(self, done)
            for item in done:
                _note(self, item.claim, item.claim.id in committed)
            return committed

        return commit

    def one(original: Callable[..., Any]) -> Callable[..., Any]:
        def commit(self: Any, claim: Any, *arguments: Any, **named: Any) -> Any:
            committed = original(self, claim, *arguments, **named)
            _note(self, claim, bool(committed))
            return committed

        return commit

    wrap("storage.chunks:Chunks.commit", many)
    for name in ("commit_plan", "commit_files", "reject_plan"):
        wrap(f"storage.chunks:Chunks.{name}", one)


# Inputs and stores that hurt


def _poison() -> None:
    def values(request: Any) -> set[int]:
        data = b"".join(bytes(tensor.data) for tensor in request.inputs)
        return {
            int.from_bytes(data[at : at + 8], "little", signed=True)
            for at in range(0, len(data), 8)
        }

    def look(requests: Sequence[Any]) -> None:
        found = {n for one in requests if one.model == "identity" for n in values(one)}
        if KILLS in found:
            die()
        if HANGS in found:
            threading.Event().wait()

    def many(original: Callable[..., Any]) -> Callable[..., Any]:
        def infer_in_parts(self: Any, requests: Any, *arguments: Any, **named: Any) -> Any:
            look(requests)
            return original(self, requests, *arguments, **named)

        return infer_in_parts

    def one(original: Callable[..., Any]) -> Callable[..., Any]:
        def start(self: Any, request: Any, *arguments: Any, **named: Any) -> Any:
            look([request])
            return original(self, request, *arguments, **named)

        return start

    wrap("inference.client:TritonServer.infer_in_parts", many)
    wrap("inference.client:TritonServer.start", one)


def _flaky_store(share: float) -> None:
    from errors import Unavailable

    dice = random.Random(os.getpid())

    def wrapper(original: Callable[..., Any]) -> Callable[..., Any]:
        def put(*arguments: Any, **named: Any) -> Any:
            fate = dice.random()
            if fate < share / 2:
                raise Unavailable("the object store is slow down (chaos)")
            written = original(*arguments, **named)
            if fate < share:
                raise Unavailable("the object store fell silent (chaos)")
            return written

        return put

    wrap("storage.objects:DirectoryStore.put", wrapper)


def _mutate(name: str) -> None:
    if name not in MUTANTS:
        raise SystemExit(f"no such mutant: {name}")
    import sqlalchemy as sa

    wrap("storage.moves:fence", lambda _: lambda token: sa.true())


def _arm() -> None:
    """Make this process what the environment says."""
    if mutant := os.environ.get("CHAOS_MUTANT"):
        _mutate(mutant)
    # Before the point: one that comes after a commit should find it noted.
    _watch_commits()
    _poison()
    if share := os.environ.get("CHAOS_STORE"):
        _flaky_store(float(share))
    if grace := os.environ.get("CHAOS_GRACE"):
        import tasks.chunks

        tasks.chunks.GRACE = float(grace)
    if name := os.environ.get("CHAOS_POINT"):
        chosen = point(name)
        death = Death(
            int(os.environ["CHAOS_PASSAGE"]),
            int(os.environ["CHAOS_DEATHS"]),
            Path(os.environ["CHAOS_FOLDER"]) / "deaths",
        )
        wrap(chosen.place, death.at(chosen.when))


@functools.cache
def _worker() -> Any:
    _arm()
    from workers import celery

    return celery.app


def __getattr__(name: str) -> Any:
    """`celery -A tests.chaos.crashing` asks for this. Made when asked for, as the product's is."""
    if name == "app":
        return _worker()
    raise AttributeError(name)


def gateway() -> Any:
    """For gunicorn."""
    _arm()
    from web.app import create_app

    return create_app()


if __name__ == "__main__":
    _arm()
    from workers import sweeper

    sweeper.main()
