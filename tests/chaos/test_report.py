"""What the table says of a run."""

from __future__ import annotations

from tests.chaos.__main__ import chosen
from tests.chaos.baseline import Tally
from tests.chaos.oracle import Verdict
from tests.chaos.play import Played
from tests.chaos.report import Report, Versions
from tests.chaos.scenarios import SCENARIOS, Scenario

FLUSH = Scenario("F4", "FLUSHALL", lambda _: None)
GOOD = Verdict(
    accepted=1200,
    lost=0,
    doubled=0,
    wrong=0,
    executed=1300,
    dead=0,
    refused=2,
    kills=2,
    recovery=(0.5, 2.0),
)


def report(*played: Played) -> Report:
    versions = Versions("abc", "Python 3", "2 cores")
    return Report(7, "make chaos", versions, list(played), [Tally("plain", 10, 3, 2, 1, 5)])


def test_a_row_has_the_figures_of_its_scenario() -> None:
    text = report(Played(FLUSH, 1.0, 0, GOOD)).markdown()
    assert "| F4 | FLUSHALL | 1,200 | 0 | 0 | 0 | 100 | 2 | 2 | 0.5 / 2.0 / 2.0 |" in text
    assert "| plain | 10 | 3 | 2 | 1 | 5 |" in text
    assert "Seed 7" in text
    assert "Not as promised" not in text


def test_what_failed_and_what_was_skipped_is_said() -> None:
    failed = Played(FLUSH, 1.0, 0, error="Traceback\nStackError: redis died")
    skipped = Played(Scenario("F5", "cut off", lambda _: None), 0.0, 0, skipped="needs root")
    text = report(failed, skipped).markdown()
    assert "* F5 cut off: needs root" in text
    assert "* F4 FLUSHALL: StackError: redis died" in text
    assert not failed.ok


def test_figures_of_a_scenario_s_own_are_noted() -> None:
    text = report(Played(FLUSH, 1.0, 0, GOOD, notes=["10 times that: 5 good ones"])).markdown()
    assert "F4 FLUSHALL:\n\n* 10 times that: 5 good ones" in text


def test_scenarios_are_chosen_by_fault_or_by_words() -> None:
    assert chosen([]) == SCENARIOS
    assert {scenario.fault for scenario in chosen(["F4", "F11"])} == {"F4", "F11"}
    assert [scenario.name for scenario in chosen(["FLUSHALL"])] == ["FLUSHALL under load"]
    names = [f"{scenario.fault} {scenario.name}" for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
