"""CPU time and memory of processes, and figures over rounds."""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

from ops.embedded import Stack

SAMPLE = 0.2
"""Seconds between two looks at memory."""
MIB = 1 << 20


def families(stack: Stack, names: Iterable[str]) -> dict[str, list[psutil.Process]]:
    """Processes of a stack that run, with all that descends from them."""
    found: dict[str, list[psutil.Process]] = {}
    for name in names:
        if stack.alive(name):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[name] = stack.family(name)
    return found


def cpu(stack: Stack, names: Iterable[str]) -> dict[str, dict[int, float]]:
    """CPU seconds so far, by name and process."""
    spent: dict[str, dict[int, float]] = {}
    for name, family in families(stack, names).items():
        spent[name] = {}
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent[name][process.pid] = times.user + times.system
    return spent


class Meter:
    """CPU seconds that processes spend within the block, by name in `spent`."""

    def __init__(self, stack: Stack, names: Sequence[str]):
        self._stack = stack
        self._names = names
        self.spent: dict[str, float] = {}

    def __enter__(self) -> Meter:
        self._before = cpu(self._stack, self._names)
        return self

    def __exit__(self, *_: object) -> None:
        for name, now in cpu(self._stack, self._names).items():
            before = self._before.get(name, {})
            self.spent[name] = sum(max(0.0, t - before.get(pid, 0.0)) for pid, t in now.items())

    @property
    def total(self) -> float:
        return sum(self.spent.values())


@contextlib.contextmanager
def peaks(stack: Stack, names: Sequence[str]) -> Iterator[dict[str, float]]:
    """The most memory (RSS, MiB) that any process of each name is seen to have within the block."""
    found: dict[str, float] = defaultdict(float)
    over = threading.Event()

    def look() -> None:
        for name, family in families(stack, names).items():
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    found[name] = max(found[name], process.memory_info().rss / MIB)

    def watch() -> None:
        while not over.wait(SAMPLE):
            look()

    look()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


@dataclass(slots=True)
class Series:
    """Figures by row and column, one a round."""

    corner: str
    columns: Sequence[str]
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, figures: Mapping[str, float]) -> None:
        for column, value in figures.items():
            self.values.setdefault(row, {}).setdefault(column, []).append(value)

    def of(self, row: str, column: str) -> list[float]:
        return self.values.get(row, {}).get(column, [])

    def ratio(self, row: str, other: str, column: str) -> list[float]:
        """Round by round: rounds lie side by side, and a noisy one is so for both."""
        pairs = zip(self.of(row, column), self.of(other, column), strict=False)
        return [ours / theirs for ours, theirs in pairs if theirs]

    def rows(self) -> list[list[str]]:
        body = [
            [row, *(spread(figures.get(column, [])) for column in self.columns)]
            for row, figures in self.values.items()
        ]
        return [[self.corner, *self.columns], *body]


def spread(values: Sequence[float]) -> str:
    """The median, with the least and the most."""
    if not values:
        return "–"
    middle = number(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({number(min(values))}–{number(max(values))})"


def number(value: float) -> str:
    """Three digits that count."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.1g}"
