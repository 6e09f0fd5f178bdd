"""Everything that may happen to the ledger, in any order: a Hypothesis state machine.

Clients submit and cancel; a pump fills a broker that loses, repeats and reorders; workers claim,
renew, commit, give back, die, or wake up long after their lease; the sweeper comes when it likes;
time passes in leaps. In the end either honest workers come back or none ever does, and every job
must end. `Oracle` judges each move.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

import uuid_utils.compat as uuids
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from errors import ModelFailed, ModelNotReady, Overran, TidegateError
from storage.backlog import Backlog
from storage.files import FileRow
from storage.lifecycle import ChunkKind, ChunkState, JobKind, JobState, Priority
from storage.work import Hint
from tests.conftest import Ledger
from tests.integration.ledger_oracle import Broken, Hold, Oracle

LEASE = 30.0
SHORT, LONG = 20.0, 3600.0
"""Deadlines: one that passes in a leap or two, one that hardly a walk reaches."""
ROUNDS = 4
"""Sweeps, a lease apart, in which honest workers end everything: one for what was held or hinted,
and two for the longest delay of a retry; the last is to spare."""
CREDIT = 20
WORKERS = ("ann", "bob", "cyd")
UNKNOWN = 1 << 60
GHOSTS = 8

# Not `integers`, which favours constants it finds in whatever modules are loaded: a seed should
# mean the same walk whichever tests ran before.
picks = st.sampled_from(range(24))
workers = st.sampled_from(WORKERS)
deadlines = st.sampled_from((LONG, LONG, SHORT))
GHOSTLY = ("commit", "renew", "give back", "split", "stop early")
sizes = st.lists(st.sampled_from(range(1, 7)), max_size=4)

_CLEAR = (
    "DELETE FROM deliveries USING jobs WHERE job_id = jobs.id AND group_name = :group",
    "DELETE FROM jobs WHERE group_name = :group",  # their chunks go with them
    "DELETE FROM shares WHERE group_name = :group",
    "DELETE FROM files WHERE filename = :group",
)


def _of_lines(hold: Hold) -> bool:
    """What may be split: a chunk of a batch's lines."""
    return hold.claim.kind is ChunkKind.INFER and hold.claim.job_kind is JobKind.BATCH


class LedgerMachine(RuleBasedStateMachine):
    """One walk, in a group of its own."""

    def __init__(self, ledger: Ledger, stranger: UUID):
        super().__init__()
        group = secrets.token_hex(4)
        self.ledger = replace(
            ledger,
            group=group,
            backlog=Backlog(ledger.database, max_attempts=3, credit=CREDIT, hint_timeout=10),
        )
        self.tenants = (ledger.tenant, stranger)
        files = {
            tenant: ledger.files.add(FileRow(uuids.uuid7(), tenant, "batch", group, 10, group)).id
            for tenant in self.tenants
        }
        self.oracle = Oracle(self.ledger, ledger.tenant, files)
        self.broker: list[Hint] = []
        self.hands: dict[str, list[Hold]] = {name: [] for name in WORKERS}
        self.ghosts: list[Hold] = []
        self.deserted = False

    @initialize(deserted=st.booleans(), deadline=deadlines)
    def begin(self, deserted: bool, deadline: float) -> None:
        """With work at hand: Hypothesis leaves some rules out of each walk."""
        self.deserted = deserted
        self.oracle.submit_batch(self.tenants[1], Priority.NORMAL, LONG)
        self._finish(self.oracle.claim(self.oracle.chunks, "ann"), False, [3, 2])
        self.oracle.submit(2, self.tenants[0], Priority.NORMAL, deadline)

    # Clients

    @rule(
        count=st.sampled_from((1, 2, 3)),
        pick=picks,
        priority=st.sampled_from(Priority),
        deadline=deadlines,
    )
    def submit(self, count: int, pick: int, priority: Priority, deadline: float) -> None:
        self.oracle.submit(count, self.tenants[pick % 2], priority, deadline)

    @rule(pick=picks, priority=st.sampled_from(Priority), deadline=deadlines)
    def submit_batch(self, pick: int, priority: Priority, deadline: float) -> None:
        self.oracle.submit_batch(self.tenants[pick % 2], priority, deadline)

    @precondition(lambda self: self.oracle.jobs)
    @rule(pick=picks, stranger=st.sampled_from((False, False, False, True)))
    def cancel(self, pick: int, stranger: bool) -> None:
        jobs = list(self.oracle.jobs)
        job_id = jobs[pick % len(jobs)]
        owner = self.oracle.jobs[job_id].tenant
        (other,) = set(self.tenants) - {owner}
        self.oracle.cancel(job_id, other if stranger else owner)

    @precondition(lambda self: self._dead())
    @rule(pick=picks, stranger=st.sampled_from((False, False, False, True)), whole=st.booleans())
    def redrive(self, pick: int, stranger: bool, whole: bool) -> None:
        """Run a dead letter again, or all of its job."""
        dead = self._dead()
        letter = self.oracle.chunk_rows[dead[pick % len(dead)]]
        owner = self.oracle.jobs[letter.job_id].tenant
        (other,) = set(self.tenants) - {owner}
        who = other if stranger else owner
        if whole:
            self.oracle.redrive_all(letter.job_id, who)
        else:
            self.oracle.redrive(letter.id, who)

    # The pump and its broker

    @rule(most=st.sampled_from((None, None, None, None, 1, 2)))
    def pump(self, most: int | None) -> None:
        """Perhaps while realtime messages wait."""
        self.broker += self.oracle.release(most)

    @precondition(lambda self: self.broker)
    @rule(pick=picks, everything=st.booleans())
    def lose(self, pick: int, everything: bool) -> None:
        if everything:
            self.broker.clear()
        else:
            self.broker.pop(pick % len(self.broker))

    @precondition(lambda self: self.broker)
    @rule(pick=picks, who=workers, again=st.booleans())
    def deliver(self, pick: int, who: str, again: bool) -> None:
        """In any order, and perhaps again later."""
        place = pick % len(self.broker)
        hint = self.broker[place] if again else self.broker.pop(place)
        self.hands[who] += self.oracle.claim(hint.ids, who)

    @precondition(lambda self: self.oracle.chunks)
    @rule(pick=picks, who=workers)
    def deliver_what_nobody_sent(self, pick: int, who: str) -> None:
        """About any chunk, whatever its state, and one that never was."""
        chunks = list(self.oracle.chunks)
        ids = [chunks[-1 - pick % len(chunks)], UNKNOWN]
        self.hands[who] += self.oracle.claim(ids, who)

    # Workers

    @precondition(lambda self: self._open())
    @rule(pick=picks, count=st.sampled_from((1, 2, 9)), fail=st.booleans(), cut=sizes)
    def finish(self, pick: int, count: int, fail: bool, cut: list[int]) -> None:
        """Commit some of what a worker holds, rightly or not any more."""
        self._finish(self._let_go(pick, count), fail, cut)

    @precondition(lambda self: self._open())
    @rule(
        pick=picks,
        error=st.sampled_from((Overran, Overran, ModelNotReady, ModelNotReady, ModelFailed)),
        delay=st.sampled_from((0.0, 60.0, 60.0)),
        other=workers,
    )
    def give_back(self, pick: int, error: type[TidegateError], delay: float, other: str) -> None:
        """And an old message about it arrives elsewhere right away."""
        for hold in self._let_go(pick, 1):
            self.oracle.retry(hold, error("not this time"), delay)
            self.hands[other] += self.oracle.claim([hold.claim.id], other)

    @precondition(lambda self: self._open())
    @rule(pick=picks, size=st.sampled_from((1, 2)))
    def split(self, pick: int, size: int) -> None:
        """What is no batch's chunk is dropped."""
        for hold in self._let_go(pick, 1):
            if _of_lines(hold):
                self.oracle.split(hold, size)

    @precondition(lambda self: self._open())
    @rule(pick=picks, items=st.sampled_from((1, 2, 4)), size=st.sampled_from((1, 2)))
    def stop_early(self, pick: int, items: int, size: int) -> None:
        """A worker commits the first items of a chunk, and leaves the others."""
        for hold in self._let_go(pick, 1):
            if _of_lines(hold):
                self.oracle.stop_early(hold, min(items, hold.claim.items), size)

    @precondition(lambda self: self._open())
    @rule(pick=picks)
    def renew(self, pick: int) -> None:
        self.oracle.renew(self.hands[self._holder(pick)])

    @precondition(lambda self: self._open())
    @rule(pick=picks)
    def die(self, pick: int) -> None:
        self.hands[self._holder(pick)].clear()

    @precondition(lambda self: self.ghosts)
    @rule(pick=picks, what=st.sampled_from(GHOSTLY), cut=sizes)
    def haunt(self, pick: int, what: str, cut: list[int]) -> None:
        """Act once more on a claim that was finished with."""
        hold = self.ghosts[pick % len(self.ghosts)]
        if what == "commit":
            self._finish([hold], False, cut)
        elif what == "renew":
            self.oracle.renew([hold])
        elif what == "give back":
            self.oracle.retry(hold, Overran("again"), 0)
        elif _of_lines(hold) and what == "stop early":
            self.oracle.stop_early(hold, 1, 1)
        elif _of_lines(hold):
            self.oracle.split(hold, 1)

    @precondition(lambda self: self._open())
    @rule(pick=picks, other=workers, late=st.booleans(), cut=sizes)
    def overtake(self, pick: int, other: str, late: bool, cut: list[int]) -> None:
        """A worker sleeps through its lease, another takes over, and both commit."""
        first = self._let_go(pick, 1)
        self.oracle.advance(LEASE + 1)
        second = self.oracle.claim([hold.claim.id for hold in first], other)
        for holds in (second, first) if late else (first, second):
            self._finish(holds, False, cut)
        self.ghosts += second

    @precondition(lambda self: self._open())
    @rule(pick=picks, who=workers, swept=st.booleans())
    def poison(self, pick: int, who: str, swept: bool) -> None:
        """Every worker that tries this chunk dies of it."""
        chunk = self._open()[pick % len(self._open())]
        for _ in range(self.ledger.chunks.max_attempts + 1):
            self.oracle.claim([chunk], who)
            self.oracle.advance(LEASE + 1)
            if swept:
                self.oracle.sweep()

    # Time, and the sweeper

    @rule(seconds=st.sampled_from((1.0, 11.0, 31.0, 90.0)))
    def wait(self, seconds: float) -> None:
        self.oracle.advance(seconds)

    @rule()
    def sweep(self) -> None:
        self.oracle.sweep()

    @rule(fail=st.booleans(), cut=sizes)
    def sweep_up(self, fail: bool, cut: list[int]) -> None:
        """The sweeper does control chunks no worker comes for."""
        for chunk in self.oracle.stranded():
            self._finish(self.oracle.claim([chunk], "sweeper"), fail, cut)

    # How these are done

    def _open(self) -> list[int]:
        rows = self.oracle.chunk_rows.values()
        return [row.id for row in rows if not ChunkState(row.state).terminal]

    def _dead(self) -> list[int]:
        return [row.id for row in self.oracle.chunk_rows.values() if row.state == "dead"]

    def _holder(self, pick: int) -> str:
        """Somebody who holds a chunk, if any may be held."""
        if not any(self.hands.values()):
            chunks = self._open()
            self.hands["ann"] += self.oracle.claim([chunks[pick % len(chunks)]], "ann")
        names = [name for name, holds in self.hands.items() if holds]
        return names[pick % len(names)] if names else "ann"

    def _let_go(self, pick: int, count: int) -> list[Hold]:
        """The first claims of a worker's, which only its ghost remembers from now on."""
        who = self._holder(pick)
        holds, self.hands[who] = self.hands[who][:count], self.hands[who][count:]
        self.ghosts = [*self.ghosts, *holds][-GHOSTS:]
        return holds

    def _finish(self, holds: Sequence[Hold], fail: bool, cut: list[int]) -> None:
        items = []
        for hold in holds:
            if hold.claim.kind is ChunkKind.INFER:
                items.append(hold)
            elif hold.claim.kind is ChunkKind.PLAN:
                self.oracle.commit_plan(hold, cut)
            else:
                self.oracle.commit_files(hold)
        if items:
            self.oracle.commit(items, fail)

    # The end

    def teardown(self) -> None:
        try:
            if not self.oracle.midway:
                self._end()
        finally:
            for statement in _CLEAR:
                self.ledger.sql(statement, group=self.ledger.group)

    def _end(self) -> None:
        """Every worker is gone with what it held, and the broker has forgotten everything."""
        if self.deserted:
            self.oracle.advance(LONG)
        for _ in range(ROUNDS):
            if not self._unended():
                return
            self.oracle.advance(LEASE + 1)
            self.oracle.sweep()
            if self.deserted:
                self.sweep_up(False, [2])
            else:
                self._work()
        if unended := self._unended():
            raise Broken(f"jobs that never end: {unended}")

    def _work(self) -> None:
        while hints := self.oracle.release():
            for hint in hints:
                self._finish(self.oracle.claim(hint.ids, "honest"), False, [3, 5])

    def _unended(self) -> list[str]:
        rows = self.oracle.job_rows.values()
        return [f"{row.kind} {row.state}" for row in rows if not JobState(row.state).terminal]
