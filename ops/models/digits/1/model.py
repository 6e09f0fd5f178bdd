"""The digits network, run by onnxruntime inside Triton's Python backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        # The network is tiny: more threads would only take cores from the rest of the machine.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        network = Path(__file__).with_name("model.onnx")
        self.session = onnxruntime.InferenceSession(
            str(network), options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        """One run for the whole batch; each request gets its own rows back."""
        images = [pb.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        labels, probabilities = self.session.run(None, {"image": np.concatenate(images)})
        responses, start = [], 0
        for image in images:
            rows = slice(start, start + len(image))
            start += len(image)
            outputs = [
                pb.Tensor("label", labels[rows]),
                pb.Tensor("probabilities", probabilities[rows]),
            ]
            responses.append(pb.InferenceResponse(output_tensors=outputs))
        return responses
