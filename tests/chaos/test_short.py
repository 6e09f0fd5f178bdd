"""The short profile of the fault tests: the most telling ones, a few minutes in all.

`make chaos` runs all of them, longer. A failure names its seed (repeat it with CHAOS_SEED) and a
file with the journal.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Iterator

import pytest

from tests.chaos import crashing
from tests.chaos.play import evidence, play
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.world import LEASE, Run, World

pytestmark = [pytest.mark.stack, pytest.mark.chaos]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A stack to be hurt, shared: each scenario leaves it whole, or the rest fails with it."""
    seed = int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(10**6))
    with World(tmp_path_factory.mktemp("chaos") / "var", seed=seed) as made:
        yield made


SHORT = [scenario for scenario in SCENARIOS if scenario.short]


@pytest.mark.parametrize("scenario", SHORT, ids=lambda one: f"{one.fault} {one.name}")
def test_nothing_is_lost_or_doubled(world: World, scenario: Scenario) -> None:
    played = play(world, scenario, long=False)
    if not played.ok:
        problems = "\n".join(played.problems)
        pytest.fail(f"seed {world.seed}: {problems}\nsee {evidence(world, played)}")


@pytest.mark.parametrize("point", crashing.POINTS, ids=lambda point: point.name)
def test_a_point_to_die_at_is_a_place_in_the_product(point: crashing.Point) -> None:
    assert callable(crashing.find(point.place)[2])


def test_the_oracle_notices_that_commits_are_not_fenced(world: World) -> None:
    """The last here: it leaves the ledger in disorder. A worker that comes back may notice that its
    chunks are others' before it commits them; not each time."""
    verdicts = []
    with world.altered("worker", env={"CHAOS_MUTANT": "fence"}), world.another("worker-1"):
        for _ in range(4):
            run = Run(world)
            run.batch(600, delay_ms=1000)
            run.going(32)
            with run.frozen("worker"):
                run.going(64)
                # Its leases are over, and others have them.
                taken = functools.partial(_taken_over, run)
                run.until(taken, 6 * LEASE, "the chunks of a worker that is away")
            run.going(64)
            verdicts.append(run.finish(within=8, settle=1))
            if verdicts[-1].doubled:
                return
    raise AssertionError(verdicts)


def _taken_over(run: Run) -> bool:
    return any(entry.claim and entry.token > 1 for entry in run.world.journal.entries(run.since))
