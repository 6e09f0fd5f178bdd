"""The tutorial design: Flask, one Celery task per request, results in Redis, `.get()`.

One module for both sides, as in Flask's and Celery's own examples: `gunicorn
tests.bench.services.tutorial:web`, and `celery -A tests.bench.services.tutorial worker`.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from celery import Celery
from flask import Flask, request

TIMEOUT = 30

app = Celery(
    "tutorial",
    broker=os.environ.get("BENCH_BROKER", "redis://127.0.0.1:1/1"),
    backend=os.environ.get("BENCH_RESULTS", "redis://127.0.0.1:1/2"),
)
app.conf.update(broker_connection_retry_on_startup=True, result_expires=3600)
web = Flask("tutorial", static_folder=None)


@functools.cache
def client() -> triton.InferenceServerClient:
    """One per process, made after the fork."""
    return triton.InferenceServerClient(os.environ["BENCH_TRITON"])


@app.task(name="tutorial.infer")
def infer(values: list[float], shape: list[int]) -> list[float]:
    tensor = triton.InferInput("FLOATS", shape, "FP32")
    tensor.set_data_from_numpy(np.asarray(values, np.float32).reshape(shape))
    answer = client().infer("identity", [tensor], client_timeout=TIMEOUT)
    found: list[float] = answer.as_numpy("FLOATS_OUT").ravel().tolist()
    return found


def _sent() -> Any:
    (tensor,) = request.get_json(force=True)["inputs"]
    return infer.delay(tensor["data"], tensor["shape"])


@web.post("/infer")
def infer_now() -> dict[str, Any]:
    """The client waits."""
    data = _sent().get(timeout=TIMEOUT)
    output = {"name": "FLOATS_OUT", "datatype": "FP32", "shape": [1, len(data)], "data": data}
    return {"model_name": "identity", "outputs": [output]}


@web.post("/jobs")
def infer_later() -> tuple[dict[str, str], int]:
    """Fire and store: the client may ask for the result."""
    return {"id": _sent().id}, 202
