"""Clients that wait: how many, how soon, and at what cost."""

from __future__ import annotations

import os
from collections.abc import Sequence

from tests.bench import contenders, loops, payload
from tests.bench.bench import Bench
from tests.bench.contenders import Contender
from tests.bench.load import Tally
from tests.bench.measure import Meter, Series
from tests.bench.report import Found, Goal

MANY = 64
CLIENTS = (1, 8, 64, 128)
RATE, P50, P99, CPU = "req/s", "p50 ms", "p99 ms", "CPU ms"
ALONE = "p50 ms, 1 client"
ALONE_99 = "p99 ms, 1 client"


def figures(tally: Tally, meter: Meter) -> dict[str, float]:
    cost = 1000 * meter.total / max(1, tally.requests)
    return {RATE: tally.rate, P50: tally.p50, P99: tally.p99, CPU: cost}


def _measure(bench: Bench, who: Sequence[Contender], found: Found) -> Series:
    small = payload.small()
    columns = (RATE, P50, P99, CPU, ALONE, ALONE_99)
    series = Series(f"{MANY} clients, small tensor", columns)
    by_clients = Series("Tidegate, clients", (RATE, P50, P99, CPU))
    parts: Series | None = None
    for one in bench.turns(who):
        bench.warm(one, small, connections=MANY)
        tally, meter = bench.fire(one, small, connections=MANY)
        many = figures(tally, meter)
        single, alone = bench.fire(one, small, connections=1)
        series.add(one.name, many | {ALONE: single.p50, ALONE_99: single.p99})
        if one.counted != contenders.TIDEGATE:
            continue
        by_clients.add(str(MANY), many)
        by_clients.add("1", figures(single, alone))
        for clients in set(CLIENTS) - {1, MANY}:
            by_clients.add(str(clients), figures(*bench.fire(one, small, connections=clients)))
        parts = parts or Series("CPU ms a request", sorted(meter.spent))
        spent = {name: 1000 * s / max(1, tally.requests) for name, s in meter.spent.items()}
        parts.add(f"Tidegate, {MANY} clients", spent)
    by_clients.values = {str(c): by_clients.values[str(c)] for c in CLIENTS}
    found.tables += [("", series.rows()), ("", by_clients.rows())]
    if parts:
        found.tables.append(("Where its CPU time goes", parts.rows()))
    found.notes.append(
        f"One `tritonclient.grpc`, one request after the other: p50"
        f" {loops.grpc_p50(bench.ground, bench.plan.seconds):.2f} ms."
    )
    return series


def realtime(bench: Bench) -> Found:
    ground = bench.ground
    found = Found(
        "Realtime",
        "One small request after the other from each client. *tutorial* is Flask with one Celery"
        " task per request, results in Redis and `.get()`; *bare Flask* answers a constant and"
        " calls nobody: the ceiling of a gateway in Flask.",
    )
    who = [
        contenders.direct(ground),
        contenders.bare(ground),
        *(contenders.tutorial(ground, pool) for pool in contenders.SLOTS),
        contenders.tidegate(ground),
    ]
    series = _measure(bench, who, found)
    # The better one of each round.
    pools = [series.ratio("Tidegate", f"tutorial, {pool}", RATE) for pool in contenders.SLOTS]
    found.goals += [
        Goal(
            "realtime req/s, 64 clients, small tensor, of the tutorial's better pool",
            10,
            [min(pair) for pair in zip(*pools, strict=True)],
        ),
        Goal(
            "realtime req/s, 64 clients, small tensor, of bare Flask",
            0.5,
            series.ratio("Tidegate", "bare Flask", RATE),
        ),
    ]
    return found


def peers(bench: Bench) -> Found:
    ground = bench.ground
    found = Found(
        "Realtime, beside other model servers",
        "Each is a service that calls the same Triton by `tritonclient.grpc.aio`, as it comes: one"
        " worker or replica. Beside that, BentoML with a worker per core, and *Ray Serve, HAProxy*,"
        " which has `RAY_SERVE_ENABLE_HA_PROXY` and `RAY_SERVE_THROUGHPUT_OPTIMIZED` set. None has"
        " keys, records or limits. The goals are of those that are as they come.",
    )
    who = [
        contenders.direct(ground),
        contenders.tidegate(ground),
        *(contenders.bentoml(ground, workers) for workers in sorted({1, os.cpu_count() or 1})),
        contenders.ray(ground, haproxy=False),
        contenders.ray(ground, haproxy=True),
    ]
    series = _measure(bench, who, found)
    found.goals += [
        Goal(
            "realtime req/s, 64 clients, small tensor, of BentoML",
            3,
            series.ratio("Tidegate", "BentoML, 1 worker", RATE),
        ),
        Goal(
            "realtime req/s, 64 clients, small tensor, of Ray Serve",
            8,
            series.ratio("Tidegate", "Ray Serve", RATE),
        ),
        Goal(
            "realtime p50, 1 client, of BentoML",
            1,
            series.ratio("Tidegate", "BentoML, 1 worker", ALONE),
            most=True,
        ),
    ]
    return found


def tensors(bench: Bench) -> Found:
    found = Found(
        "Large tensors",
        "Binary tensors to a model that answers what it was given. MB/s are those of the tensor,"
        " one way.",
    )
    who = [contenders.direct(bench.ground), contenders.tidegate(bench.ground)]
    for name, floats, clients in (("600 KB", payload.MEDIUM, 8), ("16 MiB", payload.LARGE, 2)):
        sent = payload.binary(name.replace(" ", "-"), floats)
        series = Series(f"{name}, {clients} clients", ("MB/s", P50, P99, CPU))
        for one in bench.turns(who):
            bench.warm(one, sent, connections=clients)
            tally, meter = bench.fire(one, sent, connections=clients)
            moved = {"MB/s": tally.rate * len(sent.expected) / 1e6}
            series.add(one.name, moved | figures(tally, meter))
        found.tables.append(("", series.rows()))
        ratios = series.ratio("Tidegate", who[0].name, "MB/s")
        found.goals.append(
            Goal(f"{name} binary tensor, {clients} clients, bytes/s of direct Triton", 0.7, ratios)
        )
    return found
