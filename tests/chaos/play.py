"""Plays scenarios, and says what came of them."""

from __future__ import annotations

import time
import traceback
from dataclasses import dataclass, replace

from tests.chaos.oracle import Verdict
from tests.chaos.scenarios import Scenario, Skip
from tests.chaos.world import Run, World

EXCERPT = 40
"""Lines of the journal shown with a failure."""


@dataclass(frozen=True, slots=True)
class Played:
    scenario: Scenario
    seconds: float
    verdict: Verdict | None = None
    skipped: str = ""
    error: str = ""
    """The scenario itself failed: a traceback."""

    @property
    def ok(self) -> bool:
        return bool(self.skipped) or (self.verdict is not None and self.verdict.ok)


def play(world: World, scenario: Scenario, *, long: bool) -> Played:
    """One scenario on a running world, judged."""
    began = time.monotonic()
    run = Run(world, long=long)
    try:
        scenario.play(run)
        verdict = run.verdict or run.finish()
        more = [problem for expect in scenario.expect for problem in expect(run, verdict)]
        verdict = replace(verdict, problems=(*verdict.problems, *more))
    except Skip as skip:
        return Played(scenario, time.monotonic() - began, skipped=str(skip))
    except Exception:
        return Played(scenario, time.monotonic() - began, error=traceback.format_exc())
    return Played(scenario, time.monotonic() - began, verdict)


def evidence(world: World, played: Played) -> str:
    """What is needed to look into a failure."""
    lines = [f"seed {world.seed}; logs in {world.stack.var / 'logs'}"]
    if played.verdict:
        lines += played.verdict.problems
    if played.error:
        lines.append(played.error)
    try:
        newest = world.journal.last()
        lines += [str(entry) for entry in world.journal.entries(newest - EXCERPT)]
    except Exception as error:
        lines.append(f"the journal cannot be read: {error!r}")
    return "\n".join(lines)
