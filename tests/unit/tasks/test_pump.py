"""The pump asks who waits, and releases less, or does not know and releases all the same."""

from __future__ import annotations

from typing import Any

import pytest

from errors import Unavailable
from storage.work import Hint
from tasks.pump import Pump


class Ledger:
    """What the pump asks of a backlog."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int | None]] = []

    def release(self, group: str, most: int | None = None) -> list[Hint]:
        self.asked.append((group, most))
        return [Hint(group, "m", "", (1, 2))]


def pumped(allowance: Any) -> list[tuple[str, int | None]]:
    """What one run asks of the backlog; its hint goes out, whatever comes of the question."""
    ledger = Ledger()
    sent: list[Hint] = []
    pump = Pump(ledger, sent.append, allowance)  # type: ignore[arg-type]
    assert pump.pump("g") == 2
    assert [hint.group for hint in sent] == ["g"]
    return ledger.asked


def test_a_run_asks_once_and_releases_what_it_is_told() -> None:
    told: list[str] = []

    def three(group: str) -> int:
        told.append(group)
        return 3

    assert pumped(three) == [("g", 3)]
    assert told == ["g"]


def test_where_nobody_waits_the_credit_alone_counts() -> None:
    assert pumped(lambda group: None) == [("g", None)]


@pytest.mark.parametrize("error", [Unavailable("away"), ValueError("what?")])
def test_who_cannot_be_asked_does_not_wait(error: Exception) -> None:
    def broken(group: str) -> int:
        raise error

    assert pumped(broken) == [("g", None)]


def test_every_run_asks_again() -> None:
    ledger, answers = Ledger(), iter([2, None, 1])
    pump = Pump(ledger, lambda hint: None, lambda group: next(answers))  # type: ignore[arg-type]
    for _ in range(3):
        pump.pump("g")
    assert [most for _, most in ledger.asked] == [2, None, 1]
