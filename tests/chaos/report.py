"""`docs/chaos.md`: what the last long run found."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil

from ops.embedded.stack import ROOT
from tests.chaos.baseline import Tally
from tests.chaos.play import Played
from tests.chaos.world import HINT, LEASE, SWEEP, World

INTRO = """# Fault tests

What was found by `{command}`. Real parts (Triton, Postgres, Redis, gateway, worker, sweeper) are
killed, stopped and cut off under load; one oracle judges each scenario, from what clients were
told, from a journal that triggers write in the ledger's own transactions, and from what is left in
the stores. The numbers F1–F18 are those of the usual catalogue of faults of queues: processes (F1,
F2, F3, F11, F17), Redis (F4), networks (F5, F10), Postgres (F6), Triton (F7), the object store (F8,
F12), clocks (F9), poison (F13), overload (F14), messages (F15), idempotency (F16), cancel and
deadlines (F18).

* **lost**: items accepted with 2xx that have no answer, or whose job never ended.
* **doubled**: items with more than one answer, a second commit, a commit by a stale attempt, or a
  second job for one `Idempotency-Key`.
* **wrong**: another value than the right one, a healthy item that failed, an end that changed.
* **again**: items run more than once: execution is at least once, the commit is not.
* **refused**: commits of stale attempts that the ledger refused.
* **recovery**: seconds from a kill to the next commit, the restart of the process included. Of the
  running job called off: from the cancel to the end of its call in Triton's own statistics.

Not among them: a Triton whose Python models' processes are stopped, for 3 s or longer, and
continued. Triton 2.51 takes them for dead and then gives some requests the outputs of others, to a
bare `tritonclient` as well. Kill a Triton that hangs; don't let it come back.

A lease is {lease:g} s here, a sweep every {sweep:g} s, a hint is silent after {hint:g} s, and a
chunk has 16 lines; one gateway, one worker (two where it says so), one sweeper.
"""


@dataclass(frozen=True, slots=True)
class Versions:
    """What ran where."""

    commit: str
    software: str
    machine: str

    @classmethod
    def of(cls, world: World) -> Versions:
        with world.redis() as client:
            redis_version = client.info("server")["redis_version"]
        ((postgres,),) = world.journal.sql("SHOW server_version")
        with urlopen(f"{world.env['TIDEGATE_TRITON_HTTP_URL']}/v2", timeout=5) as reply:
            triton = json.load(reply)["version"]
        packages = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("celery", "kombu")
        )
        memory = psutil.virtual_memory().total / 2**30
        return cls(
            commit=_commit(),
            software=f"Python {platform.python_version()}, {packages}, Redis {redis_version},"
            f" PostgreSQL {postgres}, Triton {triton}",
            machine=f"{psutil.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()}"
            f" {platform.machine()}",
        )


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!docs")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" + changes" if changed else "")


@dataclass(slots=True)
class Report:
    """Grows with each scenario."""

    seed: int
    command: str
    versions: Versions
    played: list[Played] = field(default_factory=list)
    baseline: list[Tally] = field(default_factory=list)
    seconds: float = 0.0

    def totals(self) -> tuple[int, int, int, int, int]:
        """accepted, lost, doubled, wrong, kills"""
        verdicts = [one.verdict for one in self.played if one.verdict]
        return (
            sum(v.accepted for v in verdicts),
            sum(v.lost for v in verdicts),
            sum(v.doubled for v in verdicts),
            sum(v.wrong for v in verdicts),
            sum(v.kills for v in verdicts),
        )

    def markdown(self) -> str:
        accepted, lost, doubled, wrong, kills = self.totals()
        parts = [
            INTRO.format(command=self.command, lease=LEASE, sweep=SWEEP, hint=HINT),
            f"**{accepted:,} items accepted, {kills} kills: {lost} lost, {doubled} doubled,"
            f" {wrong} wrong.**",
            table(self.rows()),
        ]
        parts += [
            f"{one.scenario.fault} {one.scenario.name}:\n\n"
            + "\n".join(f"* {note}" for note in one.notes)
            for one in self.played
            if one.notes
        ]
        if self.baseline:
            parts += ["## Beside it: plain Celery", _BASELINE, table(self.plain())]
        if skipped := [one for one in self.played if one.skipped]:
            parts.append("## Skipped")
            parts.append(
                "\n".join(f"* {o.scenario.fault} {o.scenario.name}: {o.skipped}" for o in skipped)
            )
        if failed := [one for one in self.played if not one.ok]:
            parts.append("## Not as promised")
            parts.append(
                "\n".join(
                    f"* {one.scenario.fault} {one.scenario.name}: {_first(problem)}"
                    for one in failed
                    for problem in one.problems
                )
            )
        parts.append("## Of this run")
        parts.append(
            "\n".join(
                (
                    f"* Seed {self.seed}, {self.seconds / 60:.0f} minutes",
                    f"* Commit {self.versions.commit}",
                    f"* {self.versions.software}",
                    f"* {self.versions.machine}",
                )
            )
        )
        return "\n\n".join(part.strip() for part in parts) + "\n"

    def rows(self) -> list[list[str]]:
        head = "fault|scenario|accepted|lost|doubled|wrong|again|refused|kills"
        rows = [[*head.split("|"), "recovery p50 / p99 / max"]]
        for one in self.played:
            if (v := one.verdict) is not None:
                counts = (v.accepted, v.lost, v.doubled, v.wrong, v.again, v.refused, v.kills)
                figures = [f"{count:,}" for count in counts]
                times = [v.recovered(share) for share in (0.5, 0.99, 1.0)]
                recovery = " / ".join(f"{time:.1f}" for time in times if time is not None)
                rows.append([one.scenario.fault, one.scenario.name, *figures, recovery or "–"])
            elif one.error:
                rows.append([one.scenario.fault, one.scenario.name, "failed", *[""] * 7])
        return rows

    def plain(self) -> list[list[str]]:
        rows = [["baseline", "accepted", "lost", "done twice or more", "again", "kills"]]
        for tally in self.baseline:
            counts = (tally.accepted, tally.lost, tally.doubled, tally.again, tally.kills)
            rows.append([tally.name, *(f"{count:,}" for count in counts)])
        return rows


_BASELINE = """The same number of items and the same schedule of kills, with `acks_late`,
`reject_on_worker_lost`, a visibility timeout of 5 s, the threads pool and Redis as broker; a task
is one item of 0.1 s, two workers of 16 threads."""


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _first(problem: str) -> str:
    return problem.strip().splitlines()[-1][:300]


def write(report: Report, path: Path) -> None:
    path.write_text(report.markdown())
