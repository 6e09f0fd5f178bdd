"""Ray Serve: `python rayserve.py PORT`, in the environment `.venv-peers`."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import numpy as np
import ray
import tritonclient.grpc.aio as triton
from ray import serve
from starlette.requests import Request

LIMIT = 256
"""Requests a replica takes at a time: more than any client here sends."""


@serve.deployment(max_ongoing_requests=LIMIT)
class Infer:
    def __init__(self, address: str) -> None:
        self.client = triton.InferenceServerClient(address)

    async def __call__(self, request: Request) -> dict[str, Any]:
        (given,) = (await request.json())["inputs"]
        tensor = triton.InferInput("FLOATS", given["shape"], "FP32")
        tensor.set_data_from_numpy(np.asarray(given["data"], np.float32).reshape(given["shape"]))
        answer = await self.client.infer("identity", [tensor], client_timeout=30)
        data = answer.as_numpy("FLOATS_OUT")
        output = {"name": "FLOATS_OUT", "datatype": "FP32", "shape": list(data.shape)}
        return {"model_name": "identity", "outputs": [output | {"data": data.ravel().tolist()}]}


def main() -> None:
    ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        object_store_memory=100 << 20,
        _node_ip_address="127.0.0.1",
    )
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Infer.bind(os.environ["BENCH_TRITON"]), route_prefix="/infer")  # type: ignore[attr-defined]
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
