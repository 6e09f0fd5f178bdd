"""A little of everything: that it runs, and measures something. What the figures are is for
`make bench` to say."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ops.embedded import Stack
from tests.bench import load
from tests.bench.__main__ import play
from tests.bench.bench import Plan
from tests.bench.contenders import INFER
from tests.bench.ground import Ground
from tests.bench.load import Shot
from tests.bench.report import Run
from tests.bench.suites import SUITES

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def ground(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """The stack of all tests; what suites add to it is taken away again."""
    if not load.available():
        assert not os.environ.get("CI"), load.MISSING
        pytest.skip(load.MISSING)
    before = dict(stack.processes)
    with contextlib.closing(Ground(stack, tmp_path_factory.mktemp("bench"))) as made:
        yield made
    for name in stack.processes.keys() - before.keys():
        del stack.processes[name]


@pytest.mark.parametrize("name", ["tensors", "durable", "jsonl"])
def test_a_suite_counts_something_and_nothing_fails(ground: Ground, name: str) -> None:
    (suite,) = (suite for suite in SUITES if suite.name == name)
    found = play(suite, ground, Plan.least(), quiet=True)
    assert found.title == suite.title
    assert not found.problems
    assert all(goal.values and min(goal.values) > 0 and not goal.but for goal in found.goals)
    for _, (head, *rows) in found.tables:
        assert len(rows) > 0
        assert {len(row) for row in rows} == {len(head)}
    assert suite.title in {one.title for one in SUITES}


def test_answers_that_are_errors_are_counted(ground: Ground, tmp_path: Path) -> None:
    body = tmp_path / "body"
    body.write_bytes(b"{}")
    shot = Shot(ground.env["TIDEGATE_URL"] + INFER, "POST", body, ground.key)
    tally = load.fire(shot, connections=1, seconds=1, limit=5, statuses=True)
    assert tally.statuses == {400: 5}
    assert tally.status == tally.errors == 5
    assert tally.rate == 0
    assert "status 5" in tally.problem()


def test_a_run_names_what_ran_where(ground: Ground) -> None:
    line = Run.of(ground, "make bench").line()
    for word in ("`make bench`", "commit", "cores", "Triton 2.", "PostgreSQL 1", "celery 5"):
        assert word in line
