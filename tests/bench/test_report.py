"""What the page says of figures, and how wrk's are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.__main__ import arguments, chosen, plan_of
from tests.bench.load import LoadError, Tally
from tests.bench.measure import Series, number, spread
from tests.bench.payload import SMALL, binary, small
from tests.bench.report import Document, Found, Goal, Run, table
from tests.bench.suites import SUITES

RUN = Run("make bench", "abc", "Python 3", "2 cores", "2026-11-24")
SAID = """Running 5s test @ http://127.0.0.1:1/
  61 requests in 2.02s, 7.09KB read

BENCH {"requests":61,"seconds":2.0,"bytes":7259,"p50":0.2,"p90":0.9,"p99":2.2,"longest":2.4,\
"connect":0,"read":1,"write":0,"status":11,"timeout":0,"statuses":{"200":50,"503":11}}
"""


def test_what_wrk_says_is_read() -> None:
    tally = Tally.parse(SAID)
    assert (tally.requests, tally.p99) == (61, 2.2)
    assert tally.statuses == {200: 50, 503: 11}
    assert tally.errors == 12
    assert tally.rate == 25
    assert tally.problem() == "61 answers, errors: read 1, status 11 (50 × 200, 11 × 503)"


def test_a_wrk_that_says_nothing_is_an_error() -> None:
    with pytest.raises(LoadError, match="unable to connect"):
        Tally.parse("unable to connect to 127.0.0.1:1 Connection refused")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.00123, "0.001"), (0.0421, "0.0421"), (1.234, "1.23"), (12345.6, "12,346")],
)
def test_a_number_has_the_digits_that_count(value: float, text: str) -> None:
    assert number(value) == text


def test_a_figure_is_the_median_with_its_spread() -> None:
    assert spread([3, 1, 2]) == "2 (1–3)"
    assert spread([3]) == "3"
    assert spread([]) == "–"


def test_ratios_are_those_of_each_round() -> None:
    series = Series("who", ("req/s",))
    for ours, theirs in ((10, 5), (30, 10)):
        series.add("ours", {"req/s": ours})
        series.add("theirs", {"req/s": theirs})
    assert series.ratio("ours", "theirs", "req/s") == [2, 3]
    assert series.ratio("ours", "nobody", "req/s") == []
    assert series.rows() == [["who", "req/s"], ["ours", "20 (10–30)"], ["theirs", "7.5 (5–10)"]]


@pytest.mark.parametrize(
    ("goal", "row"),
    [
        (Goal("req/s", 10, [9, 11, 12]), ["req/s", "≥ 10×", "11 (9–12)×", "yes"]),
        (Goal("req/s", 10, [9]), ["req/s", "≥ 10×", "9×", "no"]),
        (Goal("RSS", 300, [301], "MiB", most=True), ["RSS", "≤ 300 MiB", "301 MiB", "no"]),
        (Goal("jobs/s", 2, [3], but="1 lost"), ["jobs/s", "≥ 2×", "3×; 1 lost", "no"]),
        (Goal("npy", 1, [], missing="not there yet"), ["npy", "≥ 1×", "not there yet", "–"]),
    ],
    ids=lambda value: value.what if isinstance(value, Goal) else "",
)
def test_a_goal_says_whether_it_is_reached(goal: Goal, row: list[str]) -> None:
    assert goal.row() == row


def test_a_run_of_some_suites_leaves_the_others_on_the_page(tmp_path: Path) -> None:
    path, order = tmp_path / "page.md", ["Realtime", "Batch"]
    for title, values in (("Batch", [1.0]), ("Realtime", [2.0]), ("Realtime", [3.0])):
        page = Document.read(path)
        rows = [["who", "rows/s"], ["ours", number(values[0])]]
        goals = [Goal(f"{title} rate", 2, values)]
        page.update(Found(title, f"About {title}.", [("", rows)], goals), RUN)
        page.write(path, order)
    text = path.read_text()
    assert text.index("## Figures to reach") < text.index("## Realtime") < text.index("## Batch")
    assert "| Batch rate | ≥ 2× | 1× | no |" in text
    assert "| Realtime rate | ≥ 2× | 3× | yes |" in text
    assert "| ours | 2 |" not in text
    assert text.count("By `make bench` on 2026-11-24, commit abc; 2 cores; Python 3.") == 2
    page.write(path, order)
    assert path.read_text() == text


def test_what_is_not_clean_is_said() -> None:
    found = Found(
        "Realtime", "About.", problems=["Tidegate, small, 64: 10 answers, errors: read 1"]
    )
    assert "Not clean: Tidegate, small, 64: 10 answers, errors: read 1." in found.section()


def test_suites_are_chosen_by_name_and_peers_only_so() -> None:
    assert [suite.name for suite in chosen(["tensors"])] == ["tensors"]
    assert "peers" not in [suite.name for suite in chosen([])]
    assert [suite.name for suite in chosen(["peers"])] == ["peers"]
    with pytest.raises(LoadError, match="no suite is called nonsense"):
        chosen(["nonsense"])
    assert len({suite.name for suite in SUITES}) == len({s.title for s in SUITES}) == len(SUITES)


def test_how_much_is_asked_for() -> None:
    plan = plan_of(arguments(["--rounds", "2", "--seconds", "1.5"]))
    assert (plan.rounds, plan.seconds, plan.short) == (2, 1.5, False)
    assert plan_of(arguments(["--short"])).short


def test_a_wrong_answer_is_told_from_a_right_one() -> None:
    sent = binary("some", 4)
    head = b'{"outputs":[]}'
    assert sent.right(head + sent.expected, str(len(head)))
    assert not sent.right(head, str(len(head)))
    assert not sent.right(sent.expected, None)
    good = {"outputs": [{"name": "FLOATS_OUT", "data": list(SMALL)}]}
    assert small().right(str(good).replace("'", '"').encode(), None)
    assert not small().right(b'{"outputs":[]}', None)


def test_a_table_is_markdown() -> None:
    assert table([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
