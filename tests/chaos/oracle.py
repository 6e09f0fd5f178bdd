"""What was promised against what happened: the one judge of every fault test. Pure.

It is given what clients were told (`Accepted`, `Answer`), what the ledger went through (`Entry`,
written by triggers of the harness's own, see `journal`), and what is left at the end (`Rest`).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from uuid import UUID

ENDED = frozenset({"succeeded", "failed", "canceled", "expired"})
"""States of a job that never change again."""
CLOSED = frozenset({"done", "dead", "canceled", "expired"})
"""And of a chunk."""
LATE = 20.0
"""Seconds past its deadline in which a job has ended: a sweep, a restart of whatever is dead, and
of a batch the time to put its files together."""
SHOWN = 5
"""Examples of one kind of problem in a report; the rest is counted."""


class Due(Enum):
    """What must become of an item."""

    ANSWER = "answer"
    ERROR = "error"
    """It kills or hangs whoever tries it."""
    EITHER = "either"
    """Called off, or late: an answer is fine, and must be the right one."""


@dataclass(frozen=True, slots=True)
class Item:
    value: int
    due: Due = Due.ANSWER


@dataclass(frozen=True, slots=True)
class Accepted:
    """A job that a client was promised: `key` is what it called it, `items` by their ids."""

    job: UUID
    key: str
    items: Mapping[str, Item]
    deadline: float = math.inf
    """When it should have ended, in the clock of the journal."""
    cancelled: bool = False
    """The client was told, later, that it is called off."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client found in the end: the job's state, and (item, value) for every line it was
    given; the value of an item that came to an error is None."""

    job: UUID
    state: str
    results: Sequence[tuple[str, int | None]] = ()


class What(Enum):
    """What an entry of the journal is about."""

    CHUNK = "chunk"
    """A chunk's state, token or output changed."""
    JOB = "job"
    """A job's state or result changed."""
    COMMITTED = "committed"
    """A worker was told that its commit counts."""
    REFUSED = "refused"
    """A worker was told that its commit does not: somebody newer owns the chunk."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the journal, in the order in which the ledger changed. `at`: seconds."""

    id: int
    at: float
    what: What
    job: UUID
    chunk: int | None = None
    kind: str = "infer"
    before: str | None = None
    after: str | None = None
    token: int = 0
    """After the change; of a commit, the one the worker holds."""
    token_before: int = 0
    items: int = 0
    output_key: str | None = None
    worker: str | None = None

    def __str__(self) -> str:
        moved = f"{self.before} -> {self.after}" if self.after else ""
        tokens = f"token {self.token_before} -> {self.token}"
        about = f"chunk {self.chunk} ({self.kind}, {self.items})" if self.chunk else ""
        words = (self.what.value, str(self.job), about, moved, tokens, self.worker or "")
        return f"{self.id:>7} {self.at:.3f} " + " ".join(word for word in words if word)

    @property
    def claim(self) -> bool:
        moved = self.token > self.token_before or self.before != "running"
        return self.what is What.CHUNK and self.after == "running" and moved

    @property
    def commit(self) -> bool:
        """An infer chunk ended with an answer."""
        ended = self.after == "done" and self.before != "done"
        return self.what is What.CHUNK and ended and self.kind == "infer"


@dataclass(frozen=True, slots=True)
class Rest:
    """What is left when everything should have ended."""

    states: Mapping[UUID, str]
    """Of the jobs in the ledger."""
    keys: Mapping[str, Sequence[UUID]]
    """The jobs that were made for one key of a client."""
    missing: Sequence[str] = ()
    """Objects that the ledger names and the store has not."""
    outbox: int = 0
    """Chunks of the jobs that are still queued, released or running."""
    hints: int = 0
    """Messages in the broker's queues."""


@dataclass(frozen=True, slots=True)
class Kill:
    at: float
    what: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything of one scenario."""

    accepted: Sequence[Accepted]
    answers: Sequence[Answer]
    journal: Sequence[Entry]
    rest: Rest
    kills: Sequence[Kill] = ()
    idempotent: bool = True
    """Clients sent an Idempotency-Key: one key is one job, however often it was sent."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts are of items. Lost, doubled and wrong must be 0; what they are is in `problems`."""

    accepted: int
    lost: int
    doubled: int
    wrong: int
    executed: int
    """Items of all claims."""
    dead: int
    """Items that ended as dead letters."""
    refused: int
    """Commits of stale attempts that the ledger refused."""
    kills: int
    recovery: Sequence[float]
    """Seconds from each kill to the next commit, where anything was left to commit."""
    problems: Sequence[str] = field(default=())

    @property
    def again(self) -> int:
        """Items run more than once: more claims than needed."""
        return max(0, self.executed - self.accepted)

    @property
    def amplification(self) -> float:
        return self.executed / self.accepted if self.accepted else 0.0

    @property
    def ok(self) -> bool:
        return not (self.lost or self.doubled or self.wrong or self.problems)

    def recovered(self, share: float) -> float | None:
        """The recovery that `share` of the kills stayed within (1: the longest)."""
        if not self.recovery:
            return None
        return sorted(self.recovery)[max(0, math.ceil(share * len(self.recovery)) - 1)]


def judge(evidence: Evidence) -> Verdict:
    """Compare the promise with what happened."""
    lost, doubled, wrong = Findings("lost"), Findings("doubled"), Findings("wrong")
    late, left = Findings("late"), Findings("left over")
    _answers(evidence, lost, doubled, wrong)
    _history(evidence.journal, doubled, wrong)
    _keys(evidence, doubled)
    _deadlines(evidence, late)
    for key in evidence.rest.missing:
        lost.add(f"object {key}, which the ledger names, is not in the store")
    rest = evidence.rest
    for count, name in (
        (rest.outbox, "open chunks"),
        (rest.hints, "messages in the broker's queues"),
    ):
        if count:
            left.add(f"{count} {name}")
    claims = [entry for entry in evidence.journal if entry.claim and entry.kind == "infer"]
    return Verdict(
        accepted=sum(len(job.items) for job in evidence.accepted),
        lost=lost.count,
        doubled=doubled.count,
        wrong=wrong.count,
        executed=sum(entry.items for entry in claims),
        dead=sum(
            entry.items
            for entry in evidence.journal
            if entry.what is What.CHUNK and entry.after == "dead" and entry.before != "dead"
        ),
        refused=sum(entry.what is What.REFUSED for entry in evidence.journal),
        kills=len(evidence.kills),
        recovery=tuple(_recovery(evidence)),
        problems=(*lost.told(), *doubled.told(), *wrong.told(), *late.told(), *left.told()),
    )


class Findings:
    """Problems of one kind: all counted, a few told."""

    def __init__(self, kind: str):
        self.kind = kind
        self.count = 0
        self._examples: list[str] = []

    def add(self, problem: str, count: int = 1) -> None:
        self.count += count
        if len(self._examples) < SHOWN:
            self._examples.append(problem)

    def told(self) -> Iterator[str]:
        yield from (f"{self.kind}: {example}" for example in self._examples)
        if self.count > len(self._examples):
            yield f"{self.kind}: {self.count} in all"


def _answers(evidence: Evidence, lost: Findings, doubled: Findings, wrong: Findings) -> None:
    """(i) Everything accepted has ended; (ii) each item has one answer, and the right one."""
    answers = {answer.job: answer for answer in evidence.answers}
    for job in evidence.accepted:
        state = evidence.rest.states.get(job.job)
        if state is None:
            lost.add(f"job {job.job}, accepted, is not in the ledger", len(job.items))
            continue
        if state not in ENDED:
            lost.add(f"job {job.job} is still {state}", len(job.items))
            continue
        answer = answers.get(job.job)
        if answer is None:
            lost.add(f"nobody could read what job {job.job} ({state}) came to", len(job.items))
            continue
        if answer.state != state:
            wrong.add(f"job {job.job} is {state} in the ledger and {answer.state} to its client")
        if job.cancelled and state != "canceled":
            wrong.add(f"job {job.job} is {state}, and its client was told that it is called off")
        given = defaultdict(list)
        for name, value in answer.results:
            given[name].append(value)
        for name in given.keys() - job.items.keys():
            wrong.add(f"job {job.job} answers {name}, which is not in it")
        for name, item in job.items.items():
            _item(job, name, item, given[name], (lost, doubled, wrong))


def _item(
    job: Accepted,
    name: str,
    item: Item,
    given: Sequence[int | None],
    findings: tuple[Findings, Findings, Findings],
) -> None:
    lost, doubled, wrong = findings
    where = f"item {name} of job {job.job}"
    if not given:
        if item.due is not Due.EITHER:
            lost.add(f"{where} has no answer")
        return
    if len(given) > 1:
        doubled.add(f"{where} has {len(given)} answers")
    value = given[0]
    if value is None:
        if item.due is Due.ANSWER:
            wrong.add(f"{where} failed")
    elif item.due is Due.ERROR:
        wrong.add(f"{where} has the answer {value}, and should have none")
    elif value != item.value:
        wrong.add(f"{where} has the answer {value}, not {item.value}")


def _history(journal: Sequence[Entry], doubled: Findings, wrong: Findings) -> None:
    """(iii) No commit by a stale token, no second commit, nothing changes once it has ended."""
    newest: dict[int, int] = {}
    commits: Counter[int] = Counter()
    for entry in journal:
        if entry.what is What.JOB and entry.before in ENDED:
            wrong.add(f"job {entry.job} changed from {entry.before} to {entry.after}")
        if entry.chunk is None:
            continue
        where = f"chunk {entry.chunk} of job {entry.job}"
        if entry.what is What.CHUNK:
            if entry.before in CLOSED:
                wrong.add(f"{where} changed from {entry.before} to {entry.after}")
            if entry.claim:
                newest[entry.chunk] = entry.token
            if entry.after == "done" and entry.before != "done":
                commits[entry.chunk] += 1
                _fenced(entry, doubled)
        elif entry.what is What.COMMITTED and entry.token != newest.get(entry.chunk, entry.token):
            doubled.add(f"{where}: the stale token {entry.token} committed", entry.items)
    for chunk, count in commits.items():
        if count > 1:
            doubled.add(f"chunk {chunk} was committed {count} times")


def _fenced(entry: Entry, doubled: Findings) -> None:
    """The key of an output says which attempt wrote it."""
    if entry.output_key is not None:
        parts = entry.output_key.split("/")
        if len(parts) > 2 and parts[-2].isdigit() and int(parts[-2]) != entry.token:
            doubled.add(
                f"chunk {entry.chunk} of job {entry.job}, held by token {entry.token}, was"
                f" committed with {entry.output_key}",
                entry.items,
            )


def _keys(evidence: Evidence, doubled: Findings) -> None:
    if evidence.idempotent:
        for key, jobs in evidence.rest.keys.items():
            if len(jobs) > 1:
                doubled.add(f"the key {key} made {len(jobs)} jobs: {', '.join(map(str, jobs))}")


def _deadlines(evidence: Evidence, late: Findings) -> None:
    """(i) ... by its deadline and a little."""
    ended = {
        entry.job: entry.at
        for entry in evidence.journal
        if entry.what is What.JOB and entry.after in ENDED
    }
    for job in evidence.accepted:
        over = ended.get(job.job, 0.0) - job.deadline
        if over > LATE:
            late.add(f"job {job.job} ended {over:.1f} s after its deadline")


def _recovery(evidence: Evidence) -> Iterable[float]:
    commits = sorted(entry.at for entry in evidence.journal if entry.commit)
    for kill in evidence.kills:
        after = next((at for at in commits if at > kill.at), None)
        if after is not None:
            yield after - kill.at
