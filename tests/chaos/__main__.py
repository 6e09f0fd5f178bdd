"""`python -m tests.chaos`: the long fault tests, about an hour. See `docs/chaos.md`."""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from tests.chaos import baseline, report
from tests.chaos.play import Played, evidence, play
from tests.chaos.scenarios import SCENARIOS, Scenario
from tests.chaos.world import World

KILLS, EVERY, ITEMS = 200, 2.0, 100_000
"""Of the baseline: what scenario F1 does to us."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Kill, stop and cut off real parts under load, and judge what came of it.",
    )
    parser.add_argument(
        "--seed", type=int, default=None, help="repeat a run's choices (default: new ones)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="F4",
        help="faults by number, or scenarios by words of their names",
    )
    parser.add_argument("--short", action="store_true", help="as much of each as `make test` does")
    parser.add_argument(
        "--out", type=Path, help="write the table to this file, too, when all have run"
    )
    parser.add_argument("--no-baseline", action="store_true", help="without plain Celery beside it")
    parser.add_argument("--list", action="store_true", help="name the scenarios and stop")
    return parser.parse_args()


def chosen(words: Sequence[str]) -> list[Scenario]:
    """The scenarios that are meant by these words."""
    return [
        scenario
        for scenario in SCENARIOS
        if not words or any(word == scenario.fault or word in f"{scenario.name}" for word in words)
    ]


def say(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()


def tell(played: Played) -> None:
    """One line on the terminal."""
    name = f"{played.scenario.fault:<4}{played.scenario.name:<58}"
    if played.skipped:
        say(f"skip {name} {played.skipped}")
        return
    word = "ok  " if played.ok else "FAIL"
    figures = ""
    if v := played.verdict:
        longest = v.recovered(1)
        figures = (
            f"{v.accepted:>7,} accepted {v.lost} lost {v.doubled} doubled {v.wrong} wrong"
            f" {v.again:,} again {v.refused} refused {v.kills} kills"
            + (f" {longest:.1f} s" if longest is not None else "")
        )
    say(f"{word} {name} {played.seconds:5.0f} s {figures}")
    for note in played.notes:
        say(f"       {note}")
    for problem in () if played.ok else played.problems:
        say(f"       {problem}")


def main() -> int:
    asked = arguments()
    scenarios = chosen(asked.only)
    if asked.list:
        for scenario in scenarios:
            say(f"{scenario.fault:<4} {scenario.name}")
        return 0
    if not scenarios:
        say(f"no scenario is called {' or '.join(asked.only)}: see --list")
        return 2
    seed = asked.seed if asked.seed is not None else random.SystemRandom().randrange(10**6)
    folder = Path(tempfile.mkdtemp(prefix="tidegate-chaos-"))
    began = time.monotonic()
    say(f"seed {seed}; state and logs in {folder}")
    found = _play_all(folder, seed, scenarios, asked, began)
    found.seconds = time.monotonic() - began
    say("")
    say(report.table(found.rows()))
    if found.baseline:
        say("")
        say(report.table(found.plain()))
    if asked.out and not asked.only:
        report.write(found, asked.out)
        say(f"\nwritten to {asked.out}")
    failed = [played for played in found.played if not played.ok]
    accepted, lost, doubled, wrong, kills = found.totals()
    say(
        f"\n{accepted:,} items accepted, {kills} kills: {lost} lost, {doubled} doubled,"
        f" {wrong} wrong; {len(failed)} of {len(found.played)} scenarios failed; seed {seed}"
    )
    if failed:
        say(f"what is needed to look into it is kept in {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


def _play_all(
    folder: Path,
    seed: int,
    scenarios: Sequence[Scenario],
    asked: argparse.Namespace,
    began: float,
) -> report.Report:
    """All scenarios on one world; a fresh one after a failure, which leaves the old as it is."""
    found: report.Report | None = None
    waiting = list(scenarios)
    with tqdm(total=len(waiting), desc="scenarios", ncols=80, position=1, disable=None) as bar:
        for number in range(len(scenarios)):
            if not waiting:
                break
            with World(folder / f"stack-{number}" / "var", seed=seed, quiet=False) as world:
                if found is None:
                    command = shlex.join(["make", "chaos"])
                    found = report.Report(seed, command, report.Versions.of(world))
                while waiting:
                    played = play(world, waiting.pop(0), long=not asked.short)
                    found.played.append(played)
                    tell(played)
                    bar.update()
                    if not played.ok:
                        say(f"       {evidence(world, played)}")
                        break
    assert found is not None
    if not asked.no_baseline and not asked.only:
        _beside(folder, seed, found, short=asked.short)
    return found


def _beside(folder: Path, seed: int, found: report.Report, *, short: bool) -> None:
    dice = random.Random(seed)
    kills, items = (10, 4000) if short else (KILLS, ITEMS)

    def schedule() -> tqdm[float]:
        pauses = [EVERY * dice.uniform(0.6, 1.4) for _ in range(kills)]
        return tqdm(pauses, desc="killing plain Celery", ncols=80, leave=False, disable=None)

    for tally in baseline.tallies(folder / "baseline" / "var", seed, schedule, items):
        found.baseline.append(tally)
        say(
            f"     {tally.name}: {tally.accepted:,} accepted, {tally.lost} lost,"
            f" {tally.doubled} done twice, {tally.again} again, {tally.kills} kills"
        )


if __name__ == "__main__":
    sys.exit(main())
