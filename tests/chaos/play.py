"""Plays scenarios, and says what came of them."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tests.chaos.oracle import Verdict
from tests.chaos.scenarios import Scenario, Skip
from tests.chaos.world import Run, World


@dataclass(frozen=True, slots=True)
class Played:
    scenario: Scenario
    seconds: float
    since: int
    """Where the journal of it begins."""
    verdict: Verdict | None = None
    skipped: str = ""
    error: str = ""
    """The scenario itself failed: a traceback."""
    notes: Sequence[str] = ()

    @property
    def problems(self) -> Sequence[str]:
        found = self.verdict.problems if self.verdict else ()
        return (*found, self.error) if self.error else found

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
        return Played(scenario, time.monotonic() - began, run.since, skipped=str(skip))
    except Exception:
        return Played(scenario, time.monotonic() - began, run.since, error=traceback.format_exc())
    return Played(scenario, time.monotonic() - began, run.since, verdict, notes=run.notes)


def evidence(world: World, played: Played) -> Path:
    """A file with what is needed to look into a failure."""
    name = re.sub(r"\W+", "-", f"{played.scenario.fault} {played.scenario.name}")
    path = world.stack.var / "chaos" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    verdict = played.verdict
    lines = [f"{played.scenario.fault} {played.scenario.name}: seed {world.seed}"]
    lines += [f"logs: {world.stack.var / 'logs'}", *played.problems, ""]
    try:
        lines += map(str, world.journal.entries(played.since))
    except Exception as error:
        lines.append(f"the journal cannot be read: {error!r}")
    path.write_text("\n".join([*lines, "", repr(verdict), ""]))
    return path
