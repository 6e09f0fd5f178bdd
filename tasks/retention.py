"""What is over goes: rows by the ledger's rules, then their objects, then objects nobody names.

Any sweeper may run this, and any number of them: the ledger hands each row to one, and the walk
through the store to one at a time. No transaction is open while the store works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from itertools import islice

import structlog

from errors import Unavailable
from storage import retention
from storage.objects import ObjectStore, Stored
from storage.retention import Retention, Walk
from tasks.bootstrap import Services

log = structlog.get_logger(__name__)

ROWS = 200
"""Rows of one transaction, and keys that one statement asks the ledger about."""
PATIENCE = 20.0
"""Seconds that one kind of work may take of a round, so that none waits for another."""
STRETCH = 20_000
"""Most keys of one round's walk through the store: ten million take a working day."""
MARK = "collector"
"""Folder of the one object by which a ledger marks a store as its own."""

_PURGES: dict[str, Callable[[Retention, int], tuple[int, list[str]]]] = {
    "results": Retention.purge_jobs,
    "files": Retention.purge_files,
}
_DROPS: dict[str, Callable[[Retention, int], int]] = {
    "jobs": Retention.drop_jobs,
    "file records": Retention.drop_files,
    "idempotency keys": Retention.drop_idempotency_keys,
    "realtime records": Retention.drop_records,
}


def never() -> bool:
    return False


def run(services: Services, stopping: Callable[[], bool] = never) -> None:
    """One round, or what of it is done when it is time to stop. What fails leaves the rest alone
    and is there in the next round."""
    chores: dict[str, Callable[[], int]] = {
        **{name: _purging(services, purge, stopping) for name, purge in _PURGES.items()},
        **{name: _dropping(services, drop, stopping) for name, drop in _DROPS.items()},
        "garbage": lambda: collect(services, stopping),
    }
    for name, chore in chores.items():
        if stopping():
            return
        try:
            if done := chore():
                log.info("let go", action="retention.done", what=name, count=done)
        except Unavailable as error:
            log.warning("kept", action="retention.failed", what=name, error=error.message)
        except Exception:
            log.exception("kept", action="retention.failed", what=name)


def _purging(
    services: Services,
    purge: Callable[[Retention, int], tuple[int, list[str]]],
    stopping: Callable[[], bool],
) -> Callable[[], int]:
    def once() -> int:
        done, keys = purge(services.retention, ROWS)
        _delete(services.objects, keys)
        return done

    return lambda: _until_done(once, stopping)


def _dropping(
    services: Services, drop: Callable[[Retention, int], int], stopping: Callable[[], bool]
) -> Callable[[], int]:
    return lambda: _until_done(lambda: drop(services.retention, ROWS), stopping)


def _until_done(once: Callable[[], int], stopping: Callable[[], bool]) -> int:
    until = time.monotonic() + PATIENCE
    total = 0
    while done := once():
        total += done
        if stopping() or time.monotonic() > until:
            break
    return total


REFUSALS = 5
"""Objects in a row that can't be deleted, and no more is tried this time."""


def _delete(objects: ObjectStore, keys: Iterable[str]) -> int:
    """Nothing in the ledger names them any more: what is not deleted now is the collector's. One
    that may not be deleted keeps none of the others; several in a row, and the store is away."""
    deleted = refused = 0
    for key in keys:
        try:
            objects.delete(key)
        except Unavailable as error:
            refused += 1
            log.warning("not deleted", action="retention.kept", key=key, error=error.message)
            if refused == REFUSALS:
                raise
        else:
            deleted, refused = deleted + 1, 0
    return deleted


def collect(services: Services, stopping: Callable[[], bool] = never) -> int:
    """Walk on through the store for a while, and delete what is of age and nobody names."""
    walk = services.retention.begin_walk()
    if walk is None:
        return 0
    objects, after, deleted = services.objects, walk.after, 0
    try:
        marked = _mark(objects, walk)
        if marked is None:
            return 0
        # Both moments are by the store's own clock: nobody else's has to be right.
        before = marked.modified - timedelta(seconds=services.settings.garbage_age)
        deleted += objects.clean(before)
        until = time.monotonic() + PATIENCE
        listing = islice(objects.list(after=after), STRETCH)
        seen = 0
        while page := list(islice(listing, ROWS)):
            old = [one.key for one in page if one.modified < before and retention.ours(one.key)]
            deleted += _delete(objects, services.retention.unreferenced(old))
            after = page[-1].key
            seen += len(page)
            if stopping() or time.monotonic() > until:
                break
        else:
            # The end of the stretch, or of the store.
            after = after if seen == STRETCH else ""
    finally:
        services.retention.end_walk(walk, after)
    return deleted


def _mark(objects: ObjectStore, walk: Walk) -> Stored | None:
    """The mark of our ledger in the store, written just now. None where another ledger has left
    its own: what that one names would be garbage to us."""
    mine = f"{MARK}/{walk.owner.hex}"
    objects.put(mine, b"")
    marks = {one.key: one for one in objects.list(f"{MARK}/")}
    if marks.keys() - {mine}:
        log.warning(
            "the store is marked by another deployment: nothing is collected",
            action="retention.shared",
            marks=sorted(marks),
        )
        return None
    return marks[mine]
