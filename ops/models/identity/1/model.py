"""Echo: answers what it was given, later or not at all when the request asks for that.

Request parameters: `delay_ms`, milliseconds to wait before answering (a cancelled request is
answered at once); `fail`, the text of an error to answer instead.
"""

from __future__ import annotations

import json
import time
from typing import Any

import triton_python_backend_utils as pb

INPUTS = ("TEXT", "FLOATS", "INTS")
POLL = 0.010
"""Seconds between two looks at whether a waiting request was cancelled."""


class TritonPythonModel:
    def execute(self, requests: list[Any]) -> list[Any]:
        """A batch waits for its slowest request; requests that wait alike end alike."""
        started = time.monotonic()
        return [self._answer(request, started) for request in requests]

    def _answer(self, request: Any, started: float) -> Any:
        parameters = json.loads(request.parameters() or "{}")
        end = started + int(parameters.get("delay_ms", 0)) / 1000
        while (left := end - time.monotonic()) > 0 and not request.is_cancelled():
            time.sleep(min(POLL, left))
        if request.is_cancelled():
            return _error("cancelled", pb.TritonError.CANCELLED)
        if "fail" in parameters:
            return _error(str(parameters["fail"]), pb.TritonError.INTERNAL)
        given = ((name, pb.get_input_tensor_by_name(request, name)) for name in INPUTS)
        return pb.InferenceResponse(
            output_tensors=[
                pb.Tensor(f"{name}_OUT", tensor.as_numpy())
                for name, tensor in given
                if tensor is not None
            ]
        )


def _error(message: str, code: Any) -> Any:
    return pb.InferenceResponse(output_tensors=[], error=pb.TritonError(message, code))
