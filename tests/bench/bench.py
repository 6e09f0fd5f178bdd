"""One suite's run: how much, on what, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tqdm import tqdm

from tests.bench import load
from tests.bench.contenders import Contender
from tests.bench.ground import Ground
from tests.bench.measure import Meter
from tests.bench.payload import Payload

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds for a measurement that ends with a number of answers."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much."""

    rounds: int = 5
    seconds: float = 5.0
    """Of one measurement."""
    warm: float = 2.0
    rows: int = 1_000_000
    """Of the batch whose memory is looked at."""
    jobs: int = 100_000
    """That wait, in the suite of the backlog."""
    answers: int = 0
    """After which a measurement ends, however long they took. 0: by time."""
    short: bool = False
    """Only to see that it runs."""

    @classmethod
    def least(cls) -> Plan:
        return cls(rounds=1, seconds=1.0, warm=0.0, rows=2_000, jobs=200, answers=10, short=True)

    @property
    def limits(self) -> tuple[float, int]:
        """Of one measurement: seconds, and answers."""
        return (PATIENCE, self.answers) if self.answers else (self.seconds, 0)

    def pick(self, short: int, long: int) -> int:
        return short if self.short else long


@dataclass(slots=True)
class Bench:
    ground: Ground
    plan: Plan
    name: str
    quiet: bool = False
    problems: list[str] = field(default_factory=list)

    def turns(self, contenders: Sequence[Contender]) -> Iterator[Contender]:
        """Each in turn, round after round; what is only its own runs for its turn."""
        for contender in self.steps(contenders):
            with contender.running(self.ground):
                yield contender

    def steps(self, things: Sequence[T], rounds: int | None = None) -> Iterator[T]:
        """Each thing, round after round, with a progress bar."""
        times = rounds or self.plan.rounds
        total = times * len(things)
        with tqdm(total=total, desc=self.name, ncols=80, disable=self.quiet or None) as bar:
            for _ in range(times):
                for thing in things:
                    bar.set_postfix_str(f"{thing}"[:24])
                    yield thing
                    bar.update()

    def fire(
        self,
        contender: Contender,
        payload: Payload,
        *,
        connections: int,
        seconds: float | None = None,
        rate: float = 0,
        limit: int = 0,
        url: str = "",
        clean: bool = True,
    ) -> tuple[load.Tally, Meter]:
        """One measurement. Errors in it are a problem, unless not meant to be `clean`."""
        shot = contender.shot(payload, self.ground, url)
        usual, answers = self.plan.limits
        with Meter(self.ground.stack, contender.counted) as meter:
            tally = load.fire(
                shot,
                connections=connections,
                seconds=seconds or usual,
                rate=rate,
                limit=limit or answers,
                # Where answers are counted one by one anyway, their statuses cost no more.
                statuses=not clean or bool(limit),
            )
        if clean and (problem := tally.problem()):
            self.problems.append(f"{contender.name}, {payload.name}, {connections}: {problem}")
        return tally, meter

    def warm(self, contender: Contender, payload: Payload, *, connections: int) -> None:
        contender.check(payload)
        if self.plan.warm:
            shot = contender.shot(payload, self.ground)
            load.fire(shot, connections=connections, seconds=self.plan.warm)
