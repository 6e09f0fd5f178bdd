"""The client of every fault test: patient, and it writes down what it was promised."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

import urllib3

from tests.chaos.oracle import Accepted, Answer, Item

ENDPOINT = "/v2/models/identity/infer"
CHUNK = 16
"""Lines of a batch in one chunk."""
THREADS = 16
TIMEOUT = urllib3.Timeout(connect=2, read=20)
PAUSE = 0.2
"""Seconds before a request that failed is sent again, where nobody said how long."""
BUSY = (425, 429, 500, 502, 503, 504)
BATCH_STATES = {"completed": "succeeded", "cancelled": "canceled"}


class Refused(Exception):
    """The gateway said no, or nothing, for as long as we had patience."""


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def ask(value: int, **parameters: object) -> dict[str, Any]:
    """A request whose answer is `value`."""
    tensor = {"name": "INTS", "datatype": "INT64", "shape": [1, 1], "data": [value]}
    return {"inputs": [tensor]} | ({"parameters": parameters} if parameters else {})


class Client:
    """Safe to share between threads. `patience`: seconds to send a request again and again."""

    def __init__(self, url: str, api_key: str, *, patience: float = 90.0):
        self._url = url
        self._headers = {"Authorization": f"Bearer {api_key}"}
        self._patience = patience
        self._pool = urllib3.PoolManager(maxsize=2 * THREADS, retries=False, timeout=TIMEOUT)
        self._lock = threading.Lock()
        self._accepted: dict[UUID, Accepted] = {}
        self.statuses: Counter[int] = Counter()
        """How often each status came; 0 where no answer did."""
        self.submits: list[tuple[int, float]] = []
        """Of each try to submit a job: the status, and the seconds to it."""
        self.broken: list[str] = []
        """Promises broken on the spot: one key, two jobs."""

    def close(self) -> None:
        self._pool.clear()

    # What it was promised

    @property
    def accepted(self) -> list[Accepted]:
        with self._lock:
            return list(self._accepted.values())

    def _promised(self, job: Accepted) -> UUID:
        with self._lock:
            self._accepted.setdefault(job.job, job)
        return job.job

    # Requests

    def once(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        """One try. Status 0: no answer came."""
        began = time.monotonic()
        try:
            reply = self._pool.request(
                method, self._url + path, body=body, headers=self._headers | dict(headers)
            )
            found = Reply(reply.status, dict(reply.headers), reply.data)
        except urllib3.exceptions.HTTPError as error:
            found = Reply(0, {}, repr(error).encode())
        with self._lock:
            self.statuses[found.status] += 1
            if (method, path) == ("POST", "/v1/jobs"):
                self.submits.append((found.status, time.monotonic() - began))
        return found

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> Reply:
        """Try until there is an answer that means something."""
        until = time.monotonic() + self._patience
        while True:
            reply = self.once(method, path, body, headers)
            if reply.status and reply.status not in BUSY:
                return reply
            if time.monotonic() > until:
                raise Refused(f"{method} {path}: {reply.status} {reply.body[:300]!r}")
            time.sleep(min(float(reply.headers.get("Retry-After", PAUSE)), 1.0))

    def realtime(self, model: str, body: Mapping[str, Any], **headers: str) -> Reply:
        """One try at an answer now."""
        return self.once("POST", f"/v2/models/{model}/infer", json.dumps(body).encode(), headers)

    def _create(self, path: str, body: Mapping[str, Any], key: str) -> Any:
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        reply = self.request("POST", path, json.dumps(body).encode(), headers)
        if not 200 <= reply.status < 300:
            raise Refused(f"POST {path}: {reply.status} {reply.body[:300]!r}")
        return reply.json()

    # Work

    def job(
        self, item: Item, *, key: str | None = None, within: float = 3600, **parameters: object
    ) -> UUID:
        """Submit one inference."""
        key = key or secrets.token_hex(8)
        body = {
            "model": "identity",
            "input": ask(item.value, **parameters),
            "deadline": within,
            "metadata": {"chaos": key},
        }
        made = self._create("/v1/jobs", body, key)
        deadline = time.time() + within
        return self._promised(Accepted(UUID(made["id"]), key, {"0": item}, deadline))

    def batch(self, items: Mapping[str, Item], *, window: int = 3600, delay_ms: int = 0) -> UUID:
        """Upload a file of lines and run it. Of each `CHUNK` lines the first takes `delay_ms`."""
        key = secrets.token_hex(8)
        lines = "\n".join(
            json.dumps(
                {
                    "custom_id": name,
                    "method": "POST",
                    "url": ENDPOINT,
                    "body": ask(
                        item.value, **({"delay_ms": delay_ms} if not place % CHUNK else {})
                    ),
                }
            )
            for place, (name, item) in enumerate(items.items())
        )
        file = self._upload(lines.encode())
        body = {
            "input_file_id": file,
            "endpoint": ENDPOINT,
            "completion_window": f"{window}s",
            "metadata": {"chaos": key},
        }
        made = self._create("/v1/batches", body, key)
        job = UUID(made["id"].removeprefix("batch_"))
        return self._promised(Accepted(job, key, dict(items), time.time() + window))

    def _upload(self, data: bytes) -> str:
        reply = self.request("POST", "/v1/files", *form(data))
        if reply.status != 200:
            raise Refused(f"POST /v1/files: {reply.status} {reply.body[:300]!r}")
        found: str = reply.json()["id"]
        return found

    def cancel(self, job: UUID, *, batch: bool = False) -> bool:
        """Call a job off; False: too late."""
        path = f"/v1/batches/batch_{job.hex}/cancel" if batch else f"/v1/jobs/{job}/cancel"
        reply = self.request("POST", path)
        if reply.status not in (200, 202, 409):
            raise Refused(f"POST {path}: {reply.status} {reply.body[:300]!r}")
        done = reply.status != 409
        if done:
            with self._lock:
                self._accepted[job] = replace(self._accepted[job], cancelled=True)
        return done

    # Answers

    def answers(self) -> list[Answer]:
        """What became of everything that was promised."""
        with ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(self._answer, self.accepted)
            return [answer for answer in found if answer is not None]

    def _answer(self, job: Accepted) -> Answer | None:
        try:
            view = self.request("GET", f"/v1/jobs/{job.job}").json()
            if view["kind"] == "batch":
                return self._batch_answer(job)
            results: Sequence[tuple[str, int | None]] = []
            if view["status"] == "succeeded":
                reply = self.request("GET", f"/v1/jobs/{job.job}/result")
                results = [("0", _value(reply.json()))] if reply.status == 200 else []
            elif view["status"] != "canceled":
                results = [("0", None)]
            return Answer(job.job, view["status"], results)
        except (Refused, KeyError, ValueError) as error:
            self.broken.append(f"job {job.job} cannot be read: {error!r}")
            return None

    def _batch_answer(self, job: Accepted) -> Answer:
        view = self.request("GET", f"/v1/batches/batch_{job.job.hex}").json()
        results: list[tuple[str, int | None]] = []
        for field in ("output_file_id", "error_file_id"):
            if view.get(field):
                file = self.request("GET", f"/v1/files/{view[field]}/content")
                if file.status != 200:
                    raise Refused(f"{field}: {file.status} {file.body[:300]!r}")
                for text in file.body.splitlines():
                    line = json.loads(text)
                    good = line.get("error") is None and line["response"]["status_code"] == 200
                    value = _value(line["response"]["body"]) if good else None
                    results.append((line["custom_id"], value))
        state = BATCH_STATES.get(view["status"], view["status"])
        return Answer(job.job, state, results)


def form(data: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of the upload of a batch's file."""
    body, kind = urllib3.encode_multipart_formdata(
        [("purpose", "batch"), ("file", ("in.jsonl", data))]
    )
    return body, {"Content-Type": kind}


def _value(answer: Any) -> int:
    (output,) = answer["outputs"]
    (value,) = output["data"]
    return int(value)
