"""The oracle finds what it is there to find: each promise, broken, is seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.chaos.oracle import (
    LATE,
    Accepted,
    Answer,
    Due,
    Entry,
    Evidence,
    Item,
    Kill,
    Rest,
    Verdict,
    What,
    judge,
)

JOB = UUID(int=1)
ITEMS = {"a": Item(10), "b": Item(20)}


def claim(place: int, token: int, **other: Any) -> Entry:
    made = Entry(place, float(place), What.CHUNK, JOB, 1, token=token, items=2)
    claimed = replace(made, before="queued", after="running", token_before=token - 1)
    return replace(claimed, **other)


def commit(place: int, token: int, **other: Any) -> Entry:
    made = Entry(place, float(place), What.CHUNK, JOB, 1, token=token, items=2)
    return replace(made, before="running", after="done", token_before=token, **other)


def ended(place: int, **other: Any) -> Entry:
    made = Entry(place, float(place), What.JOB, JOB, before="running", after="succeeded")
    return replace(made, **other)


GOOD = Evidence(
    accepted=[Accepted(JOB, "key", ITEMS)],
    answers=[Answer(JOB, "succeeded", [("a", 10), ("b", 20)])],
    journal=[claim(1, 1), claim(5, 2, before="running"), commit(6, 2), ended(7)],
    rest=Rest(states={JOB: "succeeded"}, keys={"key": [JOB]}),
    kills=[Kill(2.0, "worker")],
)


def judged(**changes: Any) -> Verdict:
    return judge(replace(GOOD, **changes))


def answers(*results: tuple[str, int | None], state: str = "succeeded") -> dict[str, Any]:
    return {
        "answers": [Answer(JOB, state, results)],
        "rest": replace(GOOD.rest, states={JOB: state}),
    }


def test_a_run_in_which_all_is_well_is_counted() -> None:
    verdict = judge(GOOD)
    assert verdict.ok, verdict.problems
    assert (verdict.accepted, verdict.executed, verdict.again) == (2, 4, 2)
    assert (verdict.kills, verdict.recovery, verdict.amplification) == (1, (4.0,), 2.0)


@pytest.mark.parametrize(
    ("changes", "lost"),
    [
        ({"rest": Rest(states={}, keys={})}, 2),
        ({"rest": Rest(states={JOB: "running"}, keys={})}, 2),
        ({"answers": []}, 2),
        (answers(("a", 10)), 1),
        ({"rest": replace(GOOD.rest, missing=["files/x"])}, 1),
    ],
    ids=["not in the ledger", "never ends", "unreadable", "a line missing", "an object missing"],
)
def test_a_loss_is_found(changes: Mapping[str, Any], lost: int) -> None:
    verdict = judged(**changes)
    assert (verdict.lost, verdict.ok) == (lost, False)


@pytest.mark.parametrize(
    "changes",
    [
        answers(("a", 10), ("b", 20), ("b", 20)),
        {"journal": [*GOOD.journal, commit(8, 2)]},
        {"journal": [*GOOD.journal, Entry(8, 8.0, What.COMMITTED, JOB, 1, token=1, items=2)]},
        {"journal": [claim(1, 1), claim(2, 2), commit(3, 2, output_key="jobs/t/j/1/1/output")]},
        {"rest": replace(GOOD.rest, keys={"key": [JOB, uuid4()]})},
    ],
    ids=["two answers", "two commits", "a stale commit", "a stale output", "two jobs of one key"],
)
def test_a_double_is_found(changes: Mapping[str, Any]) -> None:
    verdict = judged(**changes)
    assert verdict.doubled
    assert not verdict.ok


@pytest.mark.parametrize(
    "changes",
    [
        answers(("a", 10), ("b", 21)),
        answers(("a", 10), ("b", None)),
        answers(("a", 10), ("b", 20), ("c", 30)),
        {"journal": [*GOOD.journal, ended(8, before="succeeded", after="failed")]},
        {"journal": [*GOOD.journal, claim(8, 3, before="done")]},
        {"answers": [Answer(JOB, "failed", GOOD.answers[0].results)]},
        {"accepted": [Accepted(JOB, "key", ITEMS, cancelled=True)]},
        {"accepted": [Accepted(JOB, "key", ITEMS | {"b": Item(20, Due.ERROR)})]},
    ],
    ids=[
        "another value",
        "a healthy item failed",
        "an answer to nothing",
        "an ended job changed",
        "an ended chunk ran again",
        "the client hears otherwise",
        "a result after the cancel",
        "poison has an answer",
    ],
)
def test_a_wrong_end_is_found(changes: Mapping[str, Any]) -> None:
    verdict = judged(**changes)
    assert verdict.wrong
    assert not verdict.ok


def test_an_end_long_after_the_deadline_is_found() -> None:
    assert judged(accepted=[Accepted(JOB, "key", ITEMS, deadline=6.5)]).ok
    verdict = judged(accepted=[Accepted(JOB, "key", ITEMS, deadline=6.5 - LATE)])
    assert verdict.problems == (f"late: job {JOB} ended 20.5 s after its deadline",)


@pytest.mark.parametrize("field", ["outbox", "hints"])
def test_what_is_left_over_is_found(field: str) -> None:
    one: dict[str, Any] = {field: 1}
    assert not judged(rest=replace(GOOD.rest, **one)).ok


def test_an_item_called_off_may_have_an_answer_or_none_but_no_wrong_one() -> None:
    either = {"a": Item(10, Due.EITHER), "b": Item(20, Due.EITHER)}
    called_off = {"accepted": [Accepted(JOB, "key", either, cancelled=True)], "journal": []}
    assert judged(**called_off, **answers(("a", 10), ("b", None), state="canceled")).ok
    assert judged(**called_off, **answers(state="canceled")).ok
    assert judged(**called_off, **answers(("a", 11), state="canceled")).wrong == 1


def test_a_refused_commit_is_counted_and_no_problem() -> None:
    refused = Entry(8, 8.0, What.REFUSED, JOB, 1, token=1, items=2)
    verdict = judged(journal=[*GOOD.journal, refused])
    assert (verdict.refused, verdict.ok) == (1, True)


def test_recovery_counts_only_while_something_is_left_to_commit() -> None:
    kills = [Kill(1.5, "redis"), Kill(5.5, "worker"), Kill(9.0, "worker")]
    verdict = judged(kills=kills)
    assert verdict.recovery == (4.5, 0.5)
    assert (verdict.recovered(0.5), verdict.recovered(1)) == (0.5, 4.5)
