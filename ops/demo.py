"""`make demo`: real handwritten digits through both lanes, with the clients people already have.

Uses the stack of `make up` where one runs, and otherwise starts one and stops it at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import openai
import tritonclient.http as triton
import urllib3
from numpy.typing import NDArray
from tqdm import tqdm

from ops.embedded import Ports, Stack, StackError, envfile
from ops.embedded.__main__ import say, welcome
from ops.embedded.stack import ROOT

DIGITS = ROOT / "ops" / "digits"
MODEL = "digits"
ENDPOINT = f"/v2/models/{MODEL}/infer"
REALTIME = 64
"""Images sent one after the other on the realtime lane."""
GOOD_ENOUGH = 0.95
"""Accuracy on images the model was not trained on, below which something is wrong."""
PATIENCE = 120.0
"""Seconds for the batch."""

SHADES = " .:-=+*#@"


class DemoError(Exception):
    """The demo did not show what it should; the message says what."""


@dataclass(frozen=True)
class Digits:
    """The images, as float32 [n, 64] from 0 to 16, and what they show."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    held_out: NDArray[np.int64]
    """The images the model was not trained on, by number."""

    @classmethod
    def load(cls) -> Digits:
        with gzip.open(DIGITS / "digits.csv.gz", "rt") as lines:
            table = np.array([[int(cell) for cell in row] for row in csv.reader(lines)])
        split = json.loads((DIGITS / "split.json").read_text())
        images = table[:, :64].astype(np.float32)
        return cls(images, table[:, 64], np.array(split["held_out"]))


def draw(image: NDArray[np.float32]) -> str:
    """An 8x8 image in characters."""
    step = 16 / (len(SHADES) - 1)
    rows = image.reshape(8, 8)
    return "\n".join("    " + "".join(SHADES[round(p / step)] * 2 for p in row) for row in rows)


@contextlib.contextmanager
def running(var: Path) -> Iterator[dict[str, str]]:
    """Where to reach a stack: the one that runs, or one of our own that ends with the block."""
    found = var / "tidegate.env"
    if found.exists():
        env = envfile.read(found)
        with contextlib.suppress(urllib3.exceptions.HTTPError):
            if urllib3.request("GET", f"{env['TIDEGATE_URL']}/readyz", timeout=3).status == 200:
                say(f"Using the stack at {env['TIDEGATE_URL']}")
                yield env
                return
    began = time.monotonic()
    with Stack(var, Ports.from_environ(os.environ), tell=say) as stack:
        say(f"Starting Tidegate on {stack.var}")
        stack.start()
        say(welcome(stack, time.monotonic() - began))
        yield stack.env
        say("\nStopping what this started")


def realtime(env: dict[str, str], digits: Digits) -> list[str]:
    """A few images, one after the other. Returns the job ids they were given."""
    say(f"\n1. Realtime: tritonclient.http, {REALTIME} images one by one")
    key = {"Authorization": f"Bearer {env['TIDEGATE_API_KEY']}"}
    client = triton.InferenceServerClient(env["TIDEGATE_URL"].removeprefix("http://"))
    say(f"   {client.get_model_metadata(MODEL, headers=dict(key))}")
    latencies, right, jobs = [], 0, []
    chosen = digits.held_out[:REALTIME]
    for number in chosen:
        image = triton.InferInput("image", [1, 64], "FP32")
        image.set_data_from_numpy(digits.images[number : number + 1])
        began = time.perf_counter()
        answer = client.infer(MODEL, [image], headers=dict(key))
        latencies.append((time.perf_counter() - began) * 1000)
        right += int(answer.as_numpy("label")[0, 0] == digits.labels[number])
    first = digits.images[chosen[0]]
    guess, job = _ask_plainly(env, first)
    jobs.append(job)
    truth = digits.labels[chosen[0]]
    say(f"{draw(first)}\n   is a {guess}, says the model; a {truth}, says the data")
    cuts = statistics.quantiles(latencies, n=100)
    say(
        f"   {right} of {REALTIME} right;"
        f" median {statistics.median(latencies):.1f} ms, p95 {cuts[94]:.1f} ms, one client"
    )
    if right < GOOD_ENOUGH * REALTIME:
        raise DemoError(f"only {right} of {REALTIME} realtime answers are right")
    return jobs


def _ask_plainly(env: dict[str, str], image: NDArray[np.float32]) -> tuple[int, str]:
    """The same by plain HTTP and JSON: the answer, and the id of its job record."""
    body = {
        "inputs": [{"name": "image", "shape": [1, 64], "datatype": "FP32", "data": image.tolist()}]
    }
    response = urllib3.request(
        "POST",
        env["TIDEGATE_URL"] + ENDPOINT,
        json=body,
        headers={"Authorization": f"Bearer {env['TIDEGATE_API_KEY']}"},
        timeout=10,
    )
    if response.status != 200:
        raise DemoError(f"POST {ENDPOINT} answered {response.status}: {response.data.decode()}")
    label = next(out for out in response.json()["outputs"] if out["name"] == "label")
    return int(label["data"][0]), response.headers["Tidegate-Job-Id"]


def batch(env: dict[str, str], digits: Digits) -> str:
    """All images as one file. Returns the batch's job id."""
    count = len(digits.images)
    say(f"\n2. Batch: the openai SDK, all {count:,} images as one JSONL file")
    client = openai.OpenAI(
        base_url=f"{env['TIDEGATE_URL']}/v1", api_key=env["TIDEGATE_API_KEY"], timeout=30
    )
    file = client.files.create(file=("digits.jsonl", _jsonl(digits)), purpose="batch")
    say(f"   uploaded {file.id}: {file.bytes:,} bytes")
    began = time.perf_counter()
    made = client.batches.create(
        input_file_id=file.id,
        endpoint=ENDPOINT,  # type: ignore[arg-type]
        completion_window="24h",
    )
    made = _follow(client, made.id, count)
    took = time.perf_counter() - began
    if made.status != "completed" or not made.output_file_id:
        raise DemoError(f"the batch ended {made.status}: {made.errors or made.request_counts}")
    answers = _answers(client.files.content(made.output_file_id).text)
    if sorted(answers) != list(range(count)):
        raise DemoError(f"{count - len(answers)} of {count} lines have no answer")
    right = np.array([answers[number] == digits.labels[number] for number in range(count)])
    held_out = right[digits.held_out]
    say(f"   {made.id} {made.status} in {took:.2f} s: {count / took:,.0f} images/s")
    say(
        f"   {held_out.mean():.1%} right on the {held_out.size} images the model was not trained"
        f" on ({right.mean():.1%} on all {count:,}, which include its training images)"
    )
    if held_out.mean() < GOOD_ENOUGH:
        raise DemoError(f"accuracy on held-out images is below {GOOD_ENOUGH:.0%}")
    return str(UUID(made.id.removeprefix("batch_")))


def _jsonl(digits: Digits) -> bytes:
    lines = io.StringIO()
    for number, image in enumerate(digits.images):
        body = {
            "inputs": [
                {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": image.tolist()}
            ]
        }
        line = {"custom_id": str(number), "method": "POST", "url": ENDPOINT, "body": body}
        lines.write(json.dumps(line) + "\n")
    return lines.getvalue().encode()


def _follow(client: openai.OpenAI, batch_id: str, count: int) -> openai.types.Batch:
    until = time.monotonic() + PATIENCE
    with tqdm(total=count, unit=" images", ncols=80, desc="   batch") as bar:
        while True:
            found = client.batches.retrieve(batch_id)
            counts = found.request_counts
            bar.update((counts.completed + counts.failed if counts else 0) - bar.n)
            if found.status in ("completed", "failed", "expired", "cancelled"):
                return found
            if time.monotonic() > until:
                raise DemoError(f"the batch is still {found.status} after {PATIENCE:.0f} s")
            time.sleep(0.05)


def _answers(text: str) -> dict[int, int]:
    answers = {}
    for line in map(json.loads, text.splitlines()):
        outputs = line["response"]["body"]["outputs"]
        label = next(output for output in outputs if output["name"] == "label")
        answers[int(line["custom_id"])] = label["data"][0]
    return answers


def records(env: dict[str, str], jobs: list[str]) -> None:
    """Read back what Tidegate wrote down about all that."""
    say("\n3. Records: GET /v1/jobs/{id}")
    for job in jobs:
        found = _get(env, f"/v1/jobs/{job}")
        items = found["items"]
        say(
            f"   {found['id']}  {found['kind']:<8}  {found['status']}"
            f"  {items['completed']}/{items['total']} items  {found['metrics']['total_ms']} ms"
        )
        if found["status"] != "succeeded":
            raise DemoError(f"job {job} is recorded as {found['status']}")


def _get(env: dict[str, str], path: str) -> dict[str, Any]:
    response = urllib3.request(
        "GET",
        env["TIDEGATE_URL"] + path,
        headers={"Authorization": f"Bearer {env['TIDEGATE_API_KEY']}"},
        timeout=10,
    )
    if response.status != 200:
        raise DemoError(f"GET {path} answered {response.status}: {response.data.decode()}")
    found: dict[str, Any] = response.json()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.demo", description=__doc__)
    parser.add_argument(
        "--var", type=Path, default=ROOT / "var", help="folder of the stack (default: %(default)s)"
    )
    var = parser.parse_args().var
    # As Ctrl-C does: what was started is stopped on the way out.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    digits = Digits.load()
    try:
        with running(var) as env:
            jobs = realtime(env, digits)
            jobs.append(batch(env, digits))
            records(env, jobs)
            say(
                "\nWhere to look next"
                "\n   make up                              keep it running"
                "\n   README.md                            the same with curl and in your own code"
                f"\n   {env['TIDEGATE_FLOWER_URL']:<36} Flower: workers and tasks (while it runs)"
            )
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    except (
        DemoError,
        StackError,
        openai.OpenAIError,
        triton.InferenceServerException,
        urllib3.exceptions.HTTPError,
    ) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
