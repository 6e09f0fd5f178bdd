"""`python -m tests.bench`: figures, side by side. See `docs/benchmarks.md`."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ops.embedded.process import StackError
from tests.bench import load
from tests.bench.bench import Bench, Plan
from tests.bench.ground import Ground
from tests.bench.load import LoadError
from tests.bench.report import HEAD, Document, Found, Run, table
from tests.bench.suites import SUITES, Suite


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    usual = Plan()
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench",
        description="Measure Tidegate side by side with others, on a stack started for it.",
    )
    parser.add_argument("--list", action="store_true", help="name the suites and stop")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="SUITE", help="these suites (default: no peers)"
    )
    parser.add_argument(
        "--rounds", type=int, default=usual.rounds, help="turns of each (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=usual.seconds,
        help="of one measurement (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=usual.rows,
        help="of the batch whose memory is watched (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=usual.jobs,
        help="that wait in the suite of the backlog (default: %(default)s)",
    )
    parser.add_argument("--short", action="store_true", help="only to see that it all runs")
    parser.add_argument("--out", type=Path, help="write the page to this file, too")
    return parser.parse_args(words)


def chosen(names: Sequence[str]) -> list[Suite]:
    """The suites of these names; without any, all that need no peers."""
    if unknown := set(names) - {suite.name for suite in SUITES}:
        raise LoadError(f"no suite is called {' or '.join(sorted(unknown))}: see --list")
    return [suite for suite in SUITES if (suite.name in names if names else not suite.peers)]


def say(line: str) -> None:
    tqdm.write(line)
    sys.stdout.flush()


def plan_of(asked: argparse.Namespace) -> Plan:
    if asked.short:
        return Plan.least()
    return dataclasses.replace(
        Plan(), rounds=asked.rounds, seconds=asked.seconds, rows=asked.rows, jobs=asked.jobs
    )


def main() -> int:
    asked = arguments()
    if asked.list:
        for suite in SUITES:
            say(f"{suite.name:<12}{suite.title}{' (make bench-peers)' if suite.peers else ''}")
        return 0
    try:
        suites = chosen(asked.only)
        if not load.available():
            raise LoadError(load.MISSING)
        failed = measure(suites, plan_of(asked), asked.out)
    except (LoadError, StackError) as error:
        print(f"bench: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 1 if failed else 0


def measure(suites: Sequence[Suite], plan: Plan, out: Path | None) -> list[str]:
    """Run suites and tell what they find. Returns the names of those that could not be run."""
    folder = Path(tempfile.mkdtemp(prefix="tidegate-bench-"))
    command = shlex.join(["python", "-m", "tests.bench", *sys.argv[1:]])
    failed: list[str] = []
    goals: list[list[str]] = []

    def one(suite: Suite, ground: Ground) -> None:
        try:
            found = play(suite, ground, plan)
        except (LoadError, StackError) as error:
            say(f"\n{suite.name} could not be run: {error}")
            failed.append(suite.name)
            return
        say(f"\n## {found.title}\n\n{found.section()}\n")
        goals.extend(goal.row() for goal in found.goals)
        if out is not None:
            page = Document.read(out)
            page.update(found, Run.of(ground, command, peers=suite.peers))
            page.write(out, [each.title for each in SUITES])

    together = [suite for suite in suites if not suite.alone]
    if together:
        with Ground.made(folder / "shared", say) as ground:
            for suite in together:
                one(suite, ground)
    for suite in suites:
        if suite.alone:
            with Ground.made(folder / suite.name, say, **suite.settings) as ground:
                one(suite, ground)
    if goals:
        say(table([HEAD, *goals]))
    if failed:
        say(f"logs are kept in {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return failed


def play(suite: Suite, ground: Ground, plan: Plan, *, quiet: bool = False) -> Found:
    """Run one suite."""
    bench = Bench(ground, plan, suite.name, quiet=quiet)
    found = suite.run(bench)
    found.problems += bench.problems
    return found


if __name__ == "__main__":
    sys.exit(main())
