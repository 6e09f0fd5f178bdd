"""Files of many rows."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from tests.bench import contenders, files, loops
from tests.bench.bench import Bench
from tests.bench.files import Batch
from tests.bench.load import LoadError
from tests.bench.measure import Meter, Series, number, peaks
from tests.bench.report import Found, Goal

ROWS, CPU = "rows/s", "CPU ms a 1,000 rows"
UPLOAD = "upload s"
SHORT, LONG = 2_000, 50_000
TIDEGATE = "Tidegate"
NAIVE, PACKED, ARRAYS = "loop, a row a call", "loop, 256 rows a call", "loop on arrays"
LIMIT = 300
"""MiB that a process of ours may have."""
OURS = ("gateway", "worker", "sweeper")


def jsonl(bench: Bench) -> Found:
    ground, rows = bench.ground, bench.plan.pick(SHORT, LONG)
    found = Found(
        "Batch, JSONL",
        f"{rows:,} rows for the model `digits`, 64 floats each, in JSON. Tidegate: from `POST"
        " /v1/batches` to `completed`, the output in the store. The loops read the same file, call"
        " Triton by `tritonclient.grpc` one call after the other, and write a file of the same"
        " lines; the one with a row a call is given a tenth of them.",
    )
    source = files.write_digits(ground.folder / "digits.jsonl", rows)
    few = ground.folder / "few.jsonl"
    with source.open() as lines:
        few.write_text("".join(line for _, line in zip(range(rows // 10), lines, strict=False)))
    target = ground.folder / "out.jsonl"
    series = Series("", (ROWS, CPU, UPLOAD))
    for name in bench.steps([NAIVE, PACKED, TIDEGATE]):
        if name == TIDEGATE:
            _tidegate(bench, series, source, rows, partial(_same_labels, target))
        else:
            kind, given = ("naive", few) if name == NAIVE else ("jsonl", source)
            series.add(name, _looped(loops.run(ground, kind, given, target)))
    found.tables.append(("", series.rows()))
    for loop, what in ((NAIVE, "a row a call"), (PACKED, "256 rows a call")):
        ratios = series.ratio(TIDEGATE, loop, ROWS)
        found.goals.append(Goal(f"batch JSONL rows/s, of the loop with {what}", 0.8, ratios))
    return found


def npy(bench: Bench) -> Found:
    ground, rows = bench.ground, bench.plan.pick(SHORT, 4 * LONG)
    found = Found(
        "Batch, .npy",
        f"The same for an array of {rows:,} × 64 float32. The loop writes the odds as an array.",
    )
    source = ground.folder / "digits.npy"
    np.save(source, files.images(rows))
    what = "batch `.npy` rows/s, of the same loop on arrays"
    target = ground.folder / "out.npy"
    series = Series("", (ROWS, CPU, UPLOAD))
    for name in bench.steps([ARRAYS, TIDEGATE]):
        if name == ARRAYS:
            series.add(name, _looped(loops.run(ground, "npy", source, target)))
        else:
            same = partial(_same_odds, target)
            _tidegate(bench, series, source, rows, same, output_names=["probabilities"])
    found.goals.append(Goal(what, 0.9, series.ratio(TIDEGATE, ARRAYS, ROWS)))
    found.tables.append(("", series.rows()))
    return found


def _looped(done: loops.Looped) -> dict[str, float]:
    return {ROWS: done.rows / done.seconds, CPU: 1e6 * done.cpu / done.rows}


def _tidegate(
    bench: Bench,
    series: Series,
    source: Path,
    rows: int,
    check: Callable[[bytes], None],
    **more: object,
) -> None:
    began = time.monotonic()
    file = files.upload(bench.ground, source)
    sent = time.monotonic() - began
    with Meter(bench.ground.stack, contenders.TIDEGATE) as meter:
        took, view = Batch.make(bench.ground, file, more=more).wait(rows)
    check(files.download(bench.ground, view["output_file_id"]))
    figures = {ROWS: rows / took, CPU: 1e6 * meter.total / rows, UPLOAD: sent}
    series.add(TIDEGATE, figures)


def _same_labels(target: Path, answers: bytes) -> None:
    """The batch and the loop before it found the same."""
    with target.open("rb") as lines:
        theirs = dict(map(_label, lines))
    ours = dict(map(_label, answers.splitlines()))
    if ours != theirs:
        raise LoadError("the batch's answers are not those of the loop")


def _same_odds(target: Path, answers: bytes) -> None:
    if not np.array_equal(np.load(io.BytesIO(answers)), np.load(target)):
        raise LoadError("the batch's answers are not those of the loop")


def _label(line: bytes) -> tuple[str, int]:
    found = json.loads(line)
    outputs = found["response"]["body"]["outputs"]
    return found["custom_id"], next(o["data"][0] for o in outputs if o["name"] == "label")


def memory(bench: Bench) -> Found:
    """One round: it takes minutes."""
    ground, rows = bench.ground, bench.plan.rows
    sizes = sorted({max(1000, rows // 100), rows})
    found = Found(
        "Memory",
        "The most memory (RSS, MiB) that any process of each part was seen to have while a batch of"
        " short JSONL lines was uploaded, run and put together. Postgres' and Triton's have shared"
        " memory in it.",
    )
    table = [["rows", *contenders.TIDEGATE, "seconds", ROWS]]
    worst = 0.0
    for size in bench.steps(sizes, rounds=1):
        path = files.write_identity(ground.folder / "lines.jsonl", size)
        with peaks(ground.stack, contenders.TIDEGATE) as most:
            file = files.upload(ground, path)
            took, _ = Batch.make(ground, file, files.IDENTITY).wait(size)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        found_mib = [number(most.get(name, 0.0)) for name in contenders.TIDEGATE]
        table.append([f"{size:,}", *found_mib, number(took), number(size / took)])
        worst = max(most[name] for name in OURS)
    found.tables.append(("", table))
    what = f"{sizes[-1]:,}-row batch, peak RSS of gateway, worker and sweeper"
    found.goals.append(Goal(what, LIMIT, [worst], unit="MiB", most=True))
    return found
