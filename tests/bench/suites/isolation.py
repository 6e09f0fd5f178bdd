"""Clients that wait, while a batch takes all that is left."""

from __future__ import annotations

import time

from tests.bench import contenders, files, payload
from tests.bench.bench import Bench
from tests.bench.files import Batch
from tests.bench.measure import Series
from tests.bench.report import Found, Goal

CLIENTS, PACE = 8, 60
"""Clients, and requests a second of all of them: far from what the gateway can do."""
SHORT, LONG = 4_000, 400_000
"""Rows of the batch: more than it has time for."""
P50, P99, RATE, ROWS = "p50 ms", "p99 ms", "req/s", "batch rows/s"
IDLE, BOTH, SOLO = "realtime alone", "realtime and batch", "batch alone"


def isolation(bench: Bench) -> Found:
    ground, rows = bench.ground, bench.plan.pick(SHORT, LONG)
    found = Found(
        "Isolation",
        f"{CLIENTS} clients send {PACE} requests a second to the model `digits`, with and without"
        f" a batch of the same model that has {rows:,} rows of JSONL, on the same worker and"
        " Triton.",
    )
    tidegate = contenders.tidegate_digits(ground)
    sent = payload.digits()
    file = files.upload(ground, files.write_digits(ground.folder / "saturating.jsonl", rows))
    series = Series("", (RATE, P50, P99, ROWS))
    bench.warm(tidegate, sent, connections=CLIENTS)
    for name in bench.steps([IDLE, BOTH, SOLO]):
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
