"""`docs/benchmarks.md`: what the last runs found. Sections of suites that did not run stay."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.request import urlopen

import psutil

from ops.embedded.stack import ROOT
from tests.bench.ground import PEERS, Ground
from tests.bench.measure import number, spread

Rows = Sequence[Sequence[str]]

INTRO = """# Figures

Written by `make bench` and `make bench-peers`: everything on one machine, started by them on
loopback, Tidegate as `make up` starts it (keys, records, metrics, limits, Flower). Whoever is
compared runs in the same minutes: a round takes one turn of each after the other, each contender's
own processes run for its turn only, and a turn begins with a warm-up that is not counted. A figure
is the median over rounds, with the least and the most; a ratio is one of each round.

* **CPU**: of all processes that a request goes through, the model server's, Redis' and Postgres'
  among them. It is steadier than what a clock says.
* Load comes from `wrk`, a process of its own in C; p50 and p99 are what it reports, with its
  correction for answers that were late to ask. Every contender's answer is checked before.
* Every contender calls the same models of the same Triton. Small is 16 bytes (4 × FP32) in JSON,
  medium 600 KB and large 16 MiB in binary; all three come back.
"""
TARGETS = "Figures to reach"
HEAD = ("what", "goal", "figure", "reached")


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure to reach."""

    what: str
    bound: float
    values: Sequence[float]
    """One a round."""
    unit: str = "×"
    most: bool = False
    """The bound is one from above."""
    missing: str = ""
    """Why there are no values."""
    but: str = ""
    """What else is wrong: then it isn't reached."""

    @property
    def reached(self) -> bool:
        if not self.values or self.but:
            return False
        middle = statistics.median(self.values)
        return middle <= self.bound if self.most else middle >= self.bound

    def row(self) -> list[str]:
        sign = "≤" if self.most else "≥"
        unit = self.unit if self.unit == "×" else f" {self.unit}"
        figure = f"{spread(self.values)}{unit}" if self.values else self.missing or "–"
        if self.but:
            figure += f"; {self.but}"
        reached = "yes" if self.reached else "no" if self.values else "–"
        return [self.what, f"{sign} {number(self.bound)}{unit}", figure, reached]


@dataclass(slots=True)
class Found:
    """What one suite found."""

    title: str
    about: str
    tables: list[tuple[str, Rows]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Errors in what was measured: such figures say little."""

    def section(self, run: Run | None = None) -> str:
        parts = [self.about]
        for caption, rows in self.tables:
            parts += [f"**{caption}**"] if caption else []
            parts.append(table(rows))
        parts += self.notes
        if self.problems:
            parts.append("Not clean: " + "; ".join(self.problems) + ".")
        if run is not None:
            parts.append(run.line())
        return "\n\n".join(part.strip() for part in parts)


@dataclass(frozen=True, slots=True)
class Run:
    """What ran where, and when."""

    command: str
    commit: str
    software: str
    machine: str
    date: str

    @classmethod
    def of(cls, ground: Ground, command: str, *, peers: bool = False) -> Run:
        with ground.redis() as client:
            redis_version = client.info("server")["redis_version"]
        ((postgres,),) = ground.sql("SHOW server_version")
        with urlopen(f"{ground.env['TIDEGATE_TRITON_HTTP_URL']}/v2", timeout=5) as reply:
            triton = json.load(reply)["version"]
        named = ("celery", "flask", "gunicorn", "gevent", "tritonclient")
        software = [f"Python {platform.python_version()}"]
        software += [f"{name} {importlib.metadata.version(name)}" for name in named]
        software += _peers() if peers else []
        software += [f"Redis {redis_version}", f"PostgreSQL {postgres}", f"Triton {triton}"]
        memory = psutil.virtual_memory().total / 2**30
        return cls(
            command=command,
            commit=_commit(),
            software=", ".join(software),
            machine=f"{psutil.cpu_count()} cores ({_model()}), {memory:.0f} GiB of memory,"
            f" {platform.system()} {platform.machine()}",
            date=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}",
        )

    def line(self) -> str:
        return (
            f"By `{self.command}` on {self.date}, commit {self.commit}; {self.machine};"
            f" {self.software}."
        )


def _model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "of some kind"
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return found[1] if found else "of some kind"


def _peers() -> list[str]:
    ask = (
        "from importlib.metadata import version as v;"
        "print(*(f'{n} {v(n)}' for n in ('bentoml', 'ray')), sep=', ')"
    )
    done = subprocess.run([PEERS / "bin" / "python", "-c", ask], capture_output=True, text=True)
    return [done.stdout.strip()] if done.returncode == 0 else []


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":!docs")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" + changes" if changed else "")


def table(rows: Rows) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(slots=True)
class Document:
    """The page, by sections. A run replaces those of its suites, and its goals' rows."""

    targets: dict[str, list[str]] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Document:
        if not path.exists():
            return cls()
        _, *parts = re.split(r"^## ", path.read_text(), flags=re.MULTILINE)
        sections = dict(part.split("\n", 1) for part in parts)
        rows = re.findall(r"^\| (.+) \|$", sections.pop(TARGETS, ""), re.MULTILINE)
        cells = [row.split(" | ") for row in rows[2:]]
        targets = {row[0]: row for row in cells if len(row) == len(HEAD)}
        return cls(targets, {title: text.strip() for title, text in sections.items()})

    def update(self, found: Found, run: Run) -> None:
        self.targets |= {goal.what: goal.row() for goal in found.goals}
        self.sections[found.title] = found.section(run)

    def markdown(self, order: Sequence[str]) -> str:
        """`order`: titles of all suites there are; a section of none of them goes."""
        parts = [INTRO.strip(), f"## {TARGETS}", table([HEAD, *self.targets.values()])]
        for title in order:
            if title in self.sections:
                parts += [f"## {title}", self.sections[title]]
        return "\n\n".join(parts) + "\n"

    def write(self, path: Path, order: Sequence[str]) -> None:
        part = path.with_suffix(".part")
        part.write_text(self.markdown(order))
        os.replace(part, path)
