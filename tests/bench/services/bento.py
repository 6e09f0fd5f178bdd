"""BentoML: `bentoml serve` on this module, in the environment `.venv-peers`."""

from __future__ import annotations

import os
from typing import Any

import bentoml
import numpy as np
import tritonclient.grpc.aio as triton


@bentoml.service(workers=int(os.environ["BENCH_PROCESSES"]), traffic={"timeout": 30})
class Infer:
    def __init__(self) -> None:
        self.client: triton.InferenceServerClient | None = None

    @bentoml.api(route="/infer")
    async def infer(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.client is None:
            # Here, since it belongs to the loop that runs.
            self.client = triton.InferenceServerClient(os.environ["BENCH_TRITON"])
        (given,) = inputs
        tensor = triton.InferInput("FLOATS", given["shape"], "FP32")
        tensor.set_data_from_numpy(np.asarray(given["data"], np.float32).reshape(given["shape"]))
        answer = await self.client.infer("identity", [tensor], client_timeout=30)
        data = answer.as_numpy("FLOATS_OUT")
        output = {"name": "FLOATS_OUT", "datatype": "FP32", "shape": list(data.shape)}
        return {"model_name": "identity", "outputs": [output | {"data": data.ravel().tolist()}]}
