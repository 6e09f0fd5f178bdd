"""More than can be done."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from tests.bench import contenders, payload
from tests.bench.bench import Bench
from tests.bench.contenders import Contender
from tests.bench.ground import request
from tests.bench.load import LoadError
from tests.bench.measure import Meter, Series
from tests.bench.report import Found, Goal

CLIENTS = 64
"""Of whom the peak is."""
TIMES = (1, 2, 3, 5)
DEADLINE = 1.0
"""Seconds a request may take."""
MOST = 1800
"""Connections: what one gateway process takes is 2000."""
OFFERED, ANSWERED, GOOD = "offered/s", "answered/s", "good/s"
REFUSED, LATE, P50 = "503 or 429", "504", "p50 ms"
CPU = "CPU ms"
REFUSAL = "a refusal's ms"
PROBES = 20
"""Requests a second that say how long a refusal takes."""


def overload(bench: Bench) -> Found:
    found = Found(
        "Overload",
        f"The peak is what {CLIENTS} clients get who wait for each answer. Then requests are sent"
        f" on a schedule, whether or not the earlier ones are answered, from up to {MOST}"
        f" connections, with a deadline of {DEADLINE:g} s. *good*: answered with 200. A refusal's"
        f" time is what {PROBES} requests a second from another process saw.",
    )
    tidegate = contenders.tidegate(bench.ground)
    hasty = Contender(
        tidegate.name,
        tidegate.url,
        tidegate.counted,
        headers={**tidegate.headers, "Tidegate-Deadline": f"{DEADLINE:g}"},
    )
    small = payload.small()
    series = Series("offered", (OFFERED, ANSWERED, GOOD, REFUSED, LATE, P50, REFUSAL, CPU))
    bench.warm(tidegate, small, connections=CLIENTS)
    names = ["peak", *(f"{times} × peak" for times in TIMES)]
    peak = 0.0
    for name in bench.steps(names):
        # What the last step left is over.
        bench.ground.until(partial(_soon, tidegate, small), 60, "an answer in time")
        if name == "peak":
            tally, meter = bench.fire(tidegate, small, connections=CLIENTS)
            peak = tally.rate
            cost = _cost(meter, tally.requests)
            series.add(name, {OFFERED: peak, ANSWERED: peak, GOOD: peak, P50: tally.p50, CPU: cost})
            continue
        rate = TIMES[names.index(name) - 1] * peak
        connections = int(min(MOST, max(CLIENTS, rate * DEADLINE)))
        with _probes(hasty, small) as refusals:
            tally, meter = bench.fire(hasty, small, connections=connections, rate=rate, clean=False)
        answers = max(1, tally.requests)
        shares = {status: count / answers for status, count in tally.statuses.items()}
        figures = {
            OFFERED: rate,
            ANSWERED: tally.requests / tally.seconds,
            GOOD: tally.statuses.get(200, 0) / tally.seconds,
            REFUSED: shares.get(503, 0.0) + shares.get(429, 0.0),
            LATE: shares.get(504, 0.0),
            P50: tally.p50,
            CPU: _cost(meter, tally.requests),
        }
        if refusals:
            figures[REFUSAL] = statistics.median(refusals)
        series.add(name, figures)
        if other := sum(count for status, count in tally.statuses.items() if status not in KNOWN):
            bench.problems.append(f"{name}: {other} answers of another status: {tally.statuses}")
        if tally.connect + tally.read + tally.write + tally.timeout:
            bench.problems.append(f"{name}: {tally.problem()}")
    found.tables.append(("", series.rows()))
    what = f"goodput at {TIMES[-1]}× overload, of the peak"
    found.goals.append(Goal(what, 0.9, series.ratio(names[-1], "peak", GOOD)))
    return found


KNOWN = (200, 429, 503, 504)


def _soon(one: Contender, sent: payload.Payload) -> bool:
    began = time.monotonic()
    try:
        one.check(sent)
    except LoadError:
        return False
    return time.monotonic() - began < DEADLINE / 10


def _cost(meter: Meter, requests: int) -> float:
    return 1000 * meter.total / max(1, requests)


@contextmanager
def _probes(one: Contender, sent: payload.Payload) -> Iterator[list[float]]:
    """Milliseconds of each refusal, so far."""
    took: list[float] = []
    over = threading.Event()

    def probe() -> None:
        while not over.wait(1 / PROBES):
            began = time.monotonic()
            try:
                status, _, _ = request(one.url, "POST", sent.body, {**one.headers, **sent.headers})
            except OSError:
                continue
            if status in (429, 503):
                took.append(1000 * (time.monotonic() - began))

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    try:
        yield took
    finally:
        over.set()
        thread.join()
