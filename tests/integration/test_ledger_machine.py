"""The ledger under everything that may happen to it, and proof that this test would notice.

A short walk is part of every test run. A long one, for the night:

    TIDEGATE_TEST_STEPS=1000000 .venv/bin/python -m pytest tests/integration/test_ledger_machine.py
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, Phase
from hypothesis.stateful import run_state_machine_as_test

from config import Settings
from storage import backlog, events, moves, tables
from storage.lifecycle import ChunkState
from storage.webhooks import Webhooks
from tests.conftest import Ledger
from tests.integration.ledger_machine import LedgerMachine
from tests.integration.ledger_oracle import Broken

STEPS = int(os.environ.get("TIDEGATE_TEST_STEPS", "800"))
LENGTH = 40
"""Steps of one walk."""
SEED, WALKS = 11, 20
"""Of four seeds that were tried, this one and another killed every mutant."""

_jobs, _chunks = tables.jobs.c, tables.chunks.c
_fence, _claimable = moves.fence, moves.claimable

_long = hypothesis.settings(
    max_examples=max(1, STEPS // LENGTH),
    stateful_step_count=LENGTH,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
_same = hypothesis.settings(
    _long,
    max_examples=WALKS,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
)


@pytest.fixture
def machine(ledger: Ledger, settings: Settings) -> Callable[[], LedgerMachine]:
    """Machines on one ledger, each in a group of its own. One of two tenants has a webhook."""
    webhooks = Webhooks(ledger.database, settings.secret)
    url = "https://example.com/hook"
    webhooks.create(ledger.tenant, name="all", url=url, events=events.TYPES)
    stranger = ledger.keys.tenant_of(ledger.keys.create(f"stranger-{ledger.group}"))
    return lambda: LedgerMachine(ledger, stranger)


def walk_the_same(machine: Callable[[], LedgerMachine]) -> None:
    run_state_machine_as_test(hypothesis.seed(SEED)(machine), settings=_same)  # type: ignore[arg-type]


def test_whatever_happens_every_job_ends_and_every_item_is_committed_once(
    machine: Callable[[], LedgerMachine],
) -> None:
    run_state_machine_as_test(machine, settings=_long)  # type: ignore[arg-type]


# Guards of the ledger's, each taken away in turn.


def _fence_without(column: str) -> Callable[[Any], sa.ColumnElement[bool]]:
    return lambda token: _without(_fence(token), column)


def _without(condition: Any, column: str) -> sa.ColumnElement[bool]:
    """A conjunction less its part about this column."""
    parts = [part for part in condition.clauses if column not in str(part)]
    assert len(parts) == len(condition.clauses) - 1
    return sa.and_(*parts)


def _claimable_in(*states: ChunkState) -> Callable[[int], sa.ColumnElement[bool]]:
    """As it is, and whatever else is in these states."""

    def claimable(most: int) -> sa.ColumnElement[bool]:
        left = sa.and_(_chunks.attempts < most, _jobs.deadline_at > moves.now)
        return sa.or_(_claimable(most), sa.and_(_chunks.state.in_(states), left))

    return claimable


def _never(*_: Any) -> sa.ColumnElement[bool]:
    return sa.false()


def _nothing(*_: Any) -> int:
    return 0


MUTANTS: dict[str, tuple[object, str, Any]] = {
    "any token commits": (moves, "fence", _fence_without("lease_token")),
    "what ended commits again": (moves, "fence", _fence_without("state")),
    "a living lease is no obstacle": (moves, "claimable", _claimable_in(ChunkState.RUNNING)),
    "a lost hint stays lost": (moves, "unclaimed", _never),
    "a dead worker keeps its chunk": (moves, "lapsed", _never),
    "attempts have no cap": (moves, "claimable", lambda _: _claimable(1000)),
    "a passed deadline is no obstacle": (
        moves,
        "claimable",
        lambda most: _without(_claimable(most), "deadline_at"),
    ),
    "a retry does not wait": (
        moves,
        "claimable",
        _claimable_in(ChunkState.QUEUED, ChunkState.RELEASED),
    ),
    "an ended chunk can end again": (moves, "chunk_sources", lambda _: tuple(ChunkState)),
    "what was called off runs on": (moves, "stop_job", lambda _, job, *__: job.state),
    "nobody looks at deadlines": (backlog.Backlog, "_expire", _nothing),
    "nobody buries the dead": (backlog.Backlog, "_sweep_dead", _nothing),
    "files get no time to be put together": (backlog, "FILES_GRACE", -1e9),
    "the last chunk tells nobody": (moves, "fan_in", _nothing),
    "nobody puts files together": (moves, "finalize", _nothing),
    "nobody hears of an end": (events, "announce", _nothing),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_ledger_without_one_of_its_guards_is_found_out(
    machine: Callable[[], LedgerMachine], mutant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, name, instead = MUTANTS[mutant]
    monkeypatch.setattr(where, name, instead)
    with pytest.raises(Broken):
        walk_the_same(machine)


def test_with_all_its_guards_the_same_walks_break_nothing(
    machine: Callable[[], LedgerMachine],
) -> None:
    walk_the_same(machine)
