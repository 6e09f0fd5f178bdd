"""Clients that wait, while a batch takes all that is left."""

from __future__ import annotations

import time

from tests.bench import contenders, files, payload
from tests.bench.bench import Bench
from tests.bench.files import Batch
from tests.bench.ground import Ground
from tests.bench.measure import Series
from tests.bench.report import Found, Goal

CLIENTS, PACE = 8, 60
"""Clients, and requests a second of all of them: far from what the gateway can do."""
SHORT, LONG = 4_000, 400_000
"""Rows of the batch: more than it has time for."""
P50, P99, RATE, ROWS = "p50 ms", "p99 ms", "req/s", "batch rows/s"
IDLE, BOTH, SOLO = "realtime alone", "realtime and batch", "batch alone"
ONE = "realtime and batch, in one process"
TOGETHER = "worker-together"


def isolation(bench: Bench) -> Found:
    ground, rows = bench.ground, bench.plan.pick(SHORT, LONG)
    found = Found(
        "Isolation",
        f"{CLIENTS} clients send {PACE} requests a second to the model `digits`, with and without"
        f" a batch of the same model that has {rows:,} rows of JSONL, on the same worker and"
        " Triton; and where the worker runs both lanes in one process (`-Q"
        " default.realtime,default.batch`).",
    )
    tidegate = contenders.tidegate_digits(ground)
    sent = payload.digits()
    file = files.upload(ground, files.write_digits(ground.folder / "saturating.jsonl", rows))
    series = Series("", (RATE, P50, P99, ROWS))
    for name in bench.steps([IDLE, BOTH, ONE, SOLO]):
        _divide(ground, apart=name != ONE)
        bench.warm(tidegate, sent, connections=CLIENTS)
        batch = Batch.make(ground, file) if name != IDLE else None
        figures: dict[str, float] = {}
        if batch:
            ground.until(batch.done, 60, "the batch's first rows")
        before, began = batch.done() if batch else 0, time.monotonic()
        if name == SOLO:
            time.sleep(bench.plan.seconds)
        else:
            tally, _ = bench.fire(tidegate, sent, connections=CLIENTS, rate=PACE)
            figures |= {RATE: tally.rate, P50: tally.p50, P99: tally.p99}
        if batch:
            view = batch.look()
            done = view["request_counts"]["completed"]
            figures[ROWS] = (done - before) / (time.monotonic() - began)
            if view["status"] == "completed" and not bench.plan.short:
                bench.problems.append("the batch was over before its time was")
            batch.cancel()
        series.add(name, figures)
    _divide(ground, apart=True)
    found.tables.append(("", series.rows()))
    found.goals += [
        Goal(
            "realtime p99 under a saturating batch, of the idle p99",
            2,
            series.ratio(BOTH, IDLE, P99),
            most=True,
        ),
        Goal(
            "batch rows/s beside realtime, of its solo rate",
            0.5,
            series.ratio(BOTH, SOLO, ROWS),
        ),
    ]
    return found


def _divide(ground: Ground, *, apart: bool) -> None:
    """A worker as it comes, or one whose process runs both lanes."""
    if TOGETHER not in ground.stack.processes:
        ground.stack.add_worker(TOGETHER, "-Q", "default.realtime,default.batch")
    wanted, other = ("worker", TOGETHER) if apart else (TOGETHER, "worker")
    if ground.stack.alive(wanted):
        return
    if ground.stack.alive(other):
        ground.stack.stop(other)
    ground.stack.start((wanted,))
    # Until the gateway has heard of it.
    time.sleep(2)
    ground.until(lambda: ground.ask("GET", "/readyz")[0] == 200, 30, "a worker")
