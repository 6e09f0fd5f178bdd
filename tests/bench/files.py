"""Batches as clients run them: a file up, a batch made, a file down."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from tests.bench.ground import Ground
from tests.bench.load import LoadError

DIGITS = "/v2/models/digits/infer"
IDENTITY = "/v2/models/identity/infer"
ENDED = ("completed", "failed", "expired", "cancelled")
BLOCK = 1 << 20
PATIENCE = 3600.0
"""Seconds for a batch."""
EDGE = "tidegate-bench"


def images(rows: int) -> NDArray[np.float32]:
    """Pictures of nothing, as the model `digits` takes them: 64 pixels from 0 to 16."""
    return np.random.default_rng(7).integers(0, 17, (rows, 64)).astype(np.float32)


def write_digits(path: Path, rows: int) -> Path:
    """A file of lines, each with one picture."""
    if path.exists():
        return path
    head = {"method": "POST", "url": DIGITS}
    with path.open("w") as lines:
        for number, image in enumerate(images(rows)):
            tensor = {"name": "image", "shape": [1, 64], "datatype": "FP32", "data": image.tolist()}
            line = {"custom_id": f"row-{number}", **head, "body": {"inputs": [tensor]}}
            lines.write(json.dumps(line) + "\n")
    return path


def write_identity(path: Path, rows: int) -> Path:
    """A file of short lines."""
    line = (
        '{"custom_id":"%d","method":"POST","url":"/v2/models/identity/infer","body":{"inputs":'
        '[{"name":"FLOATS","shape":[1,4],"datatype":"FP32","data":[%d.0,2.0,3.0,4.0]}]}}\n'
    )
    with path.open("w") as lines:
        for number in range(rows):
            lines.write(line % (number, number % 1000))
    return path


def upload(ground: Ground, path: Path) -> str:
    """The id of a new file. It is streamed: it may be larger than memory."""
    status, answer = _post(ground, path)
    if status != 200:
        raise LoadError(f"POST /v1/files answers {status} {answer[:300]!r}")
    found: str = json.loads(answer)["id"]
    return found


def _post(ground: Ground, path: Path) -> tuple[int, bytes]:
    head = (
        f'--{EDGE}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{EDGE}\r\n'
        f'Content-Disposition: form-data; name="file"; filename="{path.name}"\r\n\r\n'
    ).encode()
    tail = f"\r\n--{EDGE}--\r\n".encode()

    def pieces() -> Iterator[bytes]:
        yield head
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
        yield tail

    parts = urlsplit(ground.env["TIDEGATE_URL"])
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=600)
    headers = ground.key | {
        "Content-Type": f"multipart/form-data; boundary={EDGE}",
        "Content-Length": str(len(head) + path.stat().st_size + len(tail)),
    }
    with contextlib.closing(connection):
        connection.request("POST", "/v1/files", pieces(), headers)
        reply = connection.getresponse()
        return reply.status, reply.read()


@dataclass(frozen=True, slots=True)
class Batch:
    """One that was made."""

    ground: Ground
    id: str
    began: float

    @classmethod
    def make(
        cls, ground: Ground, file: str, endpoint: str = DIGITS, *, more: Mapping[str, object] = {}
    ) -> Batch:
        body = {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h", **more}
        began = time.monotonic()
        headers = {"Content-Type": "application/json"}
        status, answer = ground.ask("POST", "/v1/batches", json.dumps(body), headers)
        if status != 200:
            raise LoadError(f"POST /v1/batches answers {status} {answer[:300]!r}")
        return cls(ground, json.loads(answer)["id"], began)

    def look(self) -> Any:
        status, answer = self.ground.ask("GET", f"/v1/batches/{self.id}")
        if status != 200:
            raise LoadError(f"GET /v1/batches answers {status} {answer[:300]!r}")
        return json.loads(answer)

    def done(self) -> int:
        """Rows answered so far."""
        return int(self.look()["request_counts"]["completed"])

    def wait(self, rows: int) -> tuple[float, Any]:
        """Seconds from its making to its end, which has to be a good one, and what it is then."""

        def ended() -> Any:
            found = self.look()
            return found if found["status"] in ENDED else None

        view = self.ground.until(ended, PATIENCE, f"the end of batch {self.id}")
        took = time.monotonic() - self.began
        if view["status"] != "completed" or view["request_counts"]["completed"] != rows:
            raise LoadError(f"the batch ended {view['status']}: {view}"[:1000])
        return took, view

    def cancel(self) -> None:
        self.ground.ask("POST", f"/v1/batches/{self.id}/cancel")
        self.ground.until(
            lambda: self.look()["status"] in ENDED, 120, f"the end of batch {self.id}"
        )


def download(ground: Ground, file: str) -> bytes:
    status, answer = ground.ask("GET", f"/v1/files/{file}/content")
    if status != 200:
        raise LoadError(f"GET /v1/files/…/content answers {status} {answer[:300]!r}")
    return answer
