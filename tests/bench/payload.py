"""What is sent to a model, and how to tell that the answer is right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

HEADER = "Inference-Header-Content-Length"
SMALL = (1.5, 2.5, 3.5, 4.5)
"""16 bytes."""
MEDIUM, LARGE = 150_000, 4 << 20
"""Floats: 600 KB, an image of 224 x 224 in three colours, and 16 MiB."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A request to the model `identity`, which answers what it was given."""

    name: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: bytes = b""
    """Of a binary answer: its tensor."""
    outputs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Of an answer in JSON."""

    def right(self, answer: bytes, header_length: str | None) -> bool:
        if not self.expected:
            found = {output["name"]: output["data"] for output in json.loads(answer)["outputs"]}
            return all(tuple(found.get(name, ())) == data for name, data in self.outputs.items())
        return header_length is not None and answer[int(header_length) :] == self.expected

    def written(self, folder: Path) -> Path:
        """Its body, in a file."""
        path = folder / f"{self.name}.body"
        if not path.exists():
            path.write_bytes(self.body)
        return path


def small() -> Payload:
    """As people write it: JSON."""
    body = json.dumps({"inputs": [_tensor(SMALL)]}).encode()
    return Payload("small", body, JSON, outputs={"FLOATS_OUT": SMALL})


def digits() -> Payload:
    """A picture of nothing, which that model takes for a 2."""
    tensor = {"name": "image", "datatype": "FP32", "shape": [1, 64], "data": [0.0] * 64}
    body = json.dumps({"inputs": [tensor]}).encode()
    return Payload("digits", body, JSON, outputs={"label": (2,)})


def job() -> Payload:
    """The same, as a durable job."""
    body = {"model": "identity", "input": {"inputs": [_tensor(SMALL)]}, "deadline": 3600}
    return Payload("job", json.dumps(body).encode(), JSON)


def slow_job(seconds: float) -> Payload:
    """A job whose model takes so long."""
    asked = {"inputs": [_tensor(SMALL)], "parameters": {"delay_ms": round(seconds * 1000)}}
    body = {"model": "identity", "input": asked, "deadline": 24 * 3600}
    return Payload("slow-job", json.dumps(body).encode(), JSON)


def binary(name: str, floats: int) -> Payload:
    """As `tritonclient` sends it: the tensor behind its description."""
    data = np.random.default_rng(1).random(floats, np.float32).tobytes()
    parameters = {"binary_data_size": len(data)}
    tensor = {"name": "FLOATS", "datatype": "FP32", "shape": [1, floats], "parameters": parameters}
    asked = {"inputs": [tensor], "parameters": {"binary_data_output": True}}
    head = json.dumps(asked).encode()
    headers = {"Content-Type": "application/octet-stream", HEADER: str(len(head))}
    return Payload(name, head + data, headers, expected=data)


JSON = {"Content-Type": "application/json"}


def _tensor(values: tuple[float, ...]) -> dict[str, object]:
    return {"name": "FLOATS", "datatype": "FP32", "shape": [1, len(values)], "data": values}
