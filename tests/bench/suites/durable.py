"""Jobs of one item: accepted, run, committed."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.bench import contenders, files, payload
from tests.bench.bench import Bench
from tests.bench.contenders import Contender
from tests.bench.ground import Ground
from tests.bench.load import Tally
from tests.bench.measure import Meter, Series
from tests.bench.report import Found, Goal

CLIENTS = 64
SHORT, LONG = 100, 10_000
"""Jobs."""
RATE, ACCEPT, P99, CPU, LOST = "jobs/s", "accepted/s", "accept p99 ms", "CPU ms", "lost"
ACCEPTING = 600.0
"""Seconds for all jobs to be accepted."""
LOOK = 0.1
"""Seconds between two looks at how many have ended."""
STILL = 20.0
"""A count that has stood still so long is final."""
TIDEGATE = "Tidegate, POST /v1/jobs"


def durable(bench: Bench) -> Found:
    ground = bench.ground
    jobs = bench.plan.pick(SHORT, LONG)
    found = Found(
        "Durable jobs",
        f"{jobs:,} jobs of one small item, submitted by {CLIENTS} clients, each the next one when"
        " the last was accepted; from the first submit until the last result is committed:"
        " in Postgres, or in the tutorial's result backend in Redis (`delay`, answered with an"
        " id). *lost*: accepted, and never any result.",
    )
    series = Series("", (RATE, ACCEPT, P99, CPU, LOST))
    parts: Series | None = None
    who = [
        *(contenders.tutorial(ground, pool) for pool in contenders.SLOTS),
        contenders.tidegate(ground),
    ]
    for one in bench.turns(who):
        if one.counted != contenders.TIDEGATE:
            took, tally, meter, lost = _tutorial(bench, one, jobs)
            series.add(one.name, _figures(took, tally, meter, lost))
            continue
        took, tally, meter, lost = _tidegate(bench, one, jobs)
        series.add(TIDEGATE, _figures(took, tally, meter, lost))
        parts = parts or Series("CPU ms a job", sorted(meter.spent))
        parts.add(TIDEGATE, {name: 1000 * s / jobs for name, s in meter.spent.items()})
        series.add("Tidegate, one batch of as many rows", _batch(bench, one, jobs))
    found.tables.append(("", series.rows()))
    if parts:
        found.tables.append(("Where its CPU time goes", parts.rows()))
    pools = [series.ratio(TIDEGATE, f"tutorial, {pool}", RATE) for pool in contenders.SLOTS]
    lost_jobs = sum(series.of(TIDEGATE, LOST))
    found.goals.append(
        Goal(
            "one-item durable jobs/s, submit to committed result, of the tutorial's better pool",
            2,
            [min(pair) for pair in zip(*pools, strict=True)],
            but=f"{lost_jobs:.0f} lost" if lost_jobs else "",
        )
    )
    return found


def _figures(took: float, tally: Tally, meter: Meter, lost: int) -> dict[str, float]:
    jobs = max(1, tally.requests)
    cost = 1000 * meter.total / jobs
    return {RATE: jobs / took, ACCEPT: tally.rate, P99: tally.p99, CPU: cost, LOST: lost}


def _tidegate(bench: Bench, one: Contender, jobs: int) -> tuple[float, Tally, Meter, int]:
    ground = bench.ground
    ((since,),) = ground.sql("SELECT now()")

    def ended() -> int:
        return _count(ground, "finished_at IS NOT NULL", since)

    def accepted() -> int:
        return _count(ground, "true", since)

    url = f"{ground.env['TIDEGATE_URL']}/v1/jobs"
    found = _submitted(bench, one, payload.job(), url, jobs, ended, accepted)
    if bad := _count(ground, "finished_at IS NOT NULL AND state <> 'succeeded'", since):
        bench.problems.append(f"{bad} jobs did not succeed")
    return found


def _count(ground: Ground, which: str, since: object) -> int:
    text = f"SELECT count(*) FROM jobs WHERE kind = 'infer' AND created_at >= %s AND {which}"
    ((count,),) = ground.sql(text, since)
    return int(count)


def _tutorial(bench: Bench, one: Contender, jobs: int) -> tuple[float, Tally, Meter, int]:
    with bench.ground.redis(contenders.RESULTS) as results:
        results.flushdb()

        def stored() -> int:
            return int(results.dbsize())

        url = one.url.replace("/infer", "/jobs")
        return _submitted(bench, one, payload.small(), url, jobs, stored, None)


def _submitted(
    bench: Bench,
    one: Contender,
    sent: payload.Payload,
    url: str,
    jobs: int,
    ended: Callable[[], int],
    accepted: Callable[[], int] | None,
) -> tuple[float, Tally, Meter, int]:
    """Submit, and wait for all results: the seconds of both, and how many never came."""
    began = time.monotonic()
    with Meter(bench.ground.stack, one.counted) as meter:
        tally, _ = bench.fire(
            one,
            sent,
            connections=min(CLIENTS, jobs),
            seconds=ACCEPTING,
            limit=jobs,
            url=url,
        )
        # wrk leaves some that are on their way: they may be accepted, too.
        due = accepted() if accepted else tally.requests
        last, moved = -1, time.monotonic()
        while (count := ended()) < due and time.monotonic() - moved < STILL:
            if count != last:
                last, moved = count, time.monotonic()
            time.sleep(LOOK)
        took = time.monotonic() - began
    return took, tally, meter, max(0, due - count)


def _batch(bench: Bench, one: Contender, rows: int) -> dict[str, float]:
    path = bench.ground.folder / "short.jsonl"
    if not path.exists():
        files.write_identity(path, rows)
    with Meter(bench.ground.stack, one.counted) as meter:
        began = time.monotonic()
        file = files.upload(bench.ground, path)
        files.Batch.make(bench.ground, file, files.IDENTITY).wait(rows)
        took = time.monotonic() - began
    return {RATE: rows / took, CPU: 1000 * meter.total / rows, LOST: 0}
