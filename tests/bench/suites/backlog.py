"""Accepting and looking, with much waiting and with nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping

from tests.bench import contenders, payload
from tests.bench.bench import Bench
from tests.bench.load import Shot, Tally, fire
from tests.bench.measure import MIB, Series
from tests.bench.report import Found, Goal

CLIENTS, PACE = 8, 40
SUBMITTING = 1800.0
"""Seconds they may take to be accepted."""
SLOW = 300.0
"""Seconds that each takes its model: the queue doesn't shrink meanwhile."""
ACCEPT, POLL, LIST = "accept p99 ms", "status p99 ms", "list p99 ms"
ACCEPT_50, POLL_50, LIST_50 = "accept p50", "status p50", "list p50"
REDIS = "Redis MiB"


def backlog(bench: Bench) -> Found:
    ground, jobs = bench.ground, bench.plan.jobs
    found = Found(
        "Backlog",
        f"{CLIENTS} clients, {PACE} requests a second: `POST /v1/jobs`, `GET /v1/jobs/{{id}}` and"
        " `GET /v1/jobs` (newest 20), with a queue that is empty but for what they submit, and"
        f" with {jobs:,} jobs waiting (of {SLOW:.0f} s each, so that they do wait).",
    )
    tidegate = contenders.tidegate(ground)
    columns = (ACCEPT_50, ACCEPT, POLL_50, POLL, LIST_50, LIST, REDIS)
    series = Series("jobs waiting", columns)
    empty, full = "0", f"{jobs:,}"
    # A connection's first requests find out about the key and the model.
    bench.warm(tidegate, payload.small(), connections=CLIENTS)
    _look(bench, series, empty)
    slow = payload.slow_job(SLOW)
    shot = Shot(
        f"{ground.env['TIDEGATE_URL']}/v1/jobs",
        "POST",
        slow.written(ground.folder),
        {**ground.key, **slow.headers},
    )
    for _ in bench.steps([f"{jobs:,} jobs"], rounds=1):
        tally = fire(shot, connections=64, seconds=SUBMITTING, limit=jobs, statuses=True)
    if problem := tally.problem():
        bench.problems.append(f"submitting {jobs}: {problem}")
    _look(bench, series, full)
    found.tables.append(("", series.rows()))
    found.notes.append(
        f"{jobs:,} jobs were accepted by 64 clients at {tally.rate:,.0f} a second, with a p99 of"
        f" {tally.p99:.0f} ms."
    )
    ratios = series.ratio(full, empty, ACCEPT)
    what = f"accept p99 with {jobs:,} jobs waiting, of that with none"
    found.goals.append(Goal(what, 2, ratios, most=True))
    return found


def _look(bench: Bench, series: Series, row: str) -> None:
    ground = bench.ground
    url = f"{ground.env['TIDEGATE_URL']}/v1/jobs"
    sent = payload.slow_job(SLOW)
    status, answer = ground.ask("POST", "/v1/jobs", sent.body, sent.headers)
    assert status == 202, answer
    one = json.loads(answer)["id"]
    body = sent.written(ground.folder)
    shots: Mapping[str, tuple[str, Shot]] = {
        ACCEPT: (ACCEPT_50, Shot(url, "POST", body, {**ground.key, **sent.headers})),
        POLL: (POLL_50, Shot(f"{url}/{one}", headers=ground.key)),
        LIST: (LIST_50, Shot(url, headers=ground.key)),
    }
    for _ in range(bench.plan.rounds):
        figures: dict[str, float] = {}
        for name, (middle, shot) in shots.items():
            tally = _paced(bench, shot)
            figures |= {name: tally.p99, middle: tally.p50}
            if problem := tally.problem():
                bench.problems.append(f"{name} with {row} waiting: {problem}")
        with ground.redis() as client:
            figures[REDIS] = client.info("memory")["used_memory"] / MIB
        series.add(row, figures)


def _paced(bench: Bench, shot: Shot) -> Tally:
    seconds, answers = bench.plan.limits
    return fire(shot, connections=CLIENTS, seconds=seconds, rate=PACE, limit=answers)
