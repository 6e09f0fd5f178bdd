"""What somebody would write without a gateway: plain loops around `tritonclient`, each in a process
of its own. `python -m tests.bench.loops KIND TRITON ...` prints one line of JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import psutil
import tritonclient.grpc as triton

from tests.bench.ground import Ground
from tests.bench.load import LoadError
from tests.bench.measure import Meter
from tests.bench.payload import SMALL

ROWS = 256
"""As many as the model `digits` takes at once."""


@dataclass(frozen=True, slots=True)
class Looped:
    """What came of one loop."""

    rows: int
    seconds: float
    cpu: float
    """Seconds, its own and Triton's."""


def run(ground: Ground, kind: str, source: Path, target: Path) -> Looped:
    """A loop over a file."""
    with Meter(ground.stack, ("triton",)) as meter:
        told = _ask(ground, kind, str(source), str(target))
    return Looped(told["rows"], told["seconds"], told["cpu"] + meter.total)


def grpc_p50(ground: Ground, seconds: float) -> float:
    """Milliseconds of one small request by gRPC."""
    return float(_ask(ground, "latency", str(seconds))["p50"])


def _ask(ground: Ground, kind: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.loops", kind, ground.env["TIDEGATE_TRITON_URL"]]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise LoadError(f"the loop {kind} failed: {done.stderr.strip()[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# In the process of its own


def latency(client: Any, seconds: str) -> dict[str, float]:
    values = np.asarray([SMALL], np.float32)
    tensor = triton.InferInput("FLOATS", [1, 4], "FP32")
    tensor.set_data_from_numpy(values)
    took = []
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        began = time.perf_counter()
        client.infer("identity", [tensor])
        took.append(time.perf_counter() - began)
    return {"p50": 1000 * statistics.median(took)}


def _infer(client: Any, images: Any) -> tuple[Any, Any]:
    tensor = triton.InferInput("image", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    answer = client.infer("digits", [tensor])
    return answer.as_numpy("label"), answer.as_numpy("probabilities")


def _packs(lines: Iterable[bytes], rows: int) -> Iterator[list[bytes]]:
    left = iter(lines)
    while pack := list(itertools.islice(left, rows)):
        yield pack


def jsonl(client: Any, source: str, target: str, rows: int = ROWS) -> dict[str, float]:
    """Reads lines, asks for so many rows at once, writes lines of the same shape as a batch's."""
    count = 0
    with Path(source).open("rb") as lines, Path(target).open("wb") as out:
        for pack in _packs(lines, rows):
            asked = [orjson.loads(line) for line in pack]
            images = np.array([one["body"]["inputs"][0]["data"] for one in asked], np.float32)
            labels, odds = _infer(client, images)
            for one, label, chances in zip(asked, labels.tolist(), odds.tolist(), strict=True):
                outputs = [
                    {"name": "label", "datatype": "INT64", "shape": [1, 1], "data": label},
                    {
                        "name": "probabilities",
                        "datatype": "FP32",
                        "shape": [1, 10],
                        "data": chances,
                    },
                ]
                body = {"model_name": "digits", "outputs": outputs}
                answer = {"status_code": 200, "body": body}
                line = {"custom_id": one["custom_id"], "response": answer, "error": None}
                out.write(orjson.dumps(line) + b"\n")
            count += len(pack)
    return {"rows": count}


def naive(client: Any, source: str, target: str) -> dict[str, float]:
    """One row a call."""
    return jsonl(client, source, target, rows=1)


def npy(client: Any, source: str, target: str) -> dict[str, float]:
    images = np.load(source, mmap_mode="r")
    odds = np.empty((len(images), 10), np.float32)
    for start in range(0, len(images), ROWS):
        end = min(start + ROWS, len(images))
        odds[start:end] = _infer(client, np.ascontiguousarray(images[start:end]))[1]
    np.save(target, odds)
    return {"rows": len(images)}


Kind = Callable[..., dict[str, float]]
KINDS: dict[str, Kind] = {
    "latency": latency,
    "jsonl": jsonl,
    "naive": naive,
    "npy": npy,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.loops", description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("triton", metavar="TRITON", help="its gRPC address")
    parser.add_argument("rest", nargs="*", metavar="FILE")
    asked = parser.parse_args()
    client = triton.InferenceServerClient(asked.triton)
    times = psutil.Process().cpu_times()
    began = time.monotonic()
    found = KINDS[asked.kind](client, *asked.rest)
    found["seconds"] = time.monotonic() - began
    now = psutil.Process().cpu_times()
    found["cpu"] = now.user + now.system - times.user - times.system
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
