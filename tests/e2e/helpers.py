"""What end-to-end tests share: waiting for something, plain HTTP, and what reached the models."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from email.message import Message
from threading import Barrier, Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psutil
import pytest
import redis

from ops.embedded import Stack, rabbitmq

T = TypeVar("T")
POLL = 0.02


def until(condition: Callable[[], T], seconds: float, accept: Callable[[T], object] = bool) -> T:
    """The first value of `condition` that is accepted. Fails with the last one after `seconds`."""
    deadline = time.monotonic() + seconds
    while not accept(value := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s; at last: {value!r}")
        time.sleep(POLL)
    return value


def together(calls: Iterable[Callable[[], T]]) -> list[T]:
    """What the calls return, each in a thread of its own, all let go at the same moment."""
    chosen = list(calls)
    gate = Barrier(len(chosen), timeout=30)
    found: dict[int, T] = {}

    def run(place: int) -> None:
        gate.wait()
        found[place] = chosen[place]()

    threads = [Thread(target=run, args=(place,)) for place in range(len(chosen))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(chosen), "a call failed; its error is above"
    return [found[place] for place in range(len(chosen))]


@dataclass(frozen=True, slots=True)
class Reply:
    """A response, read to its end."""

    status: int
    headers: Message
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"{self.status} {dict(self.headers)} {self.body[:1000]!r}"


@dataclass(frozen=True, slots=True)
class Http:
    """One server, by plain HTTP: every request on a connection of its own."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def keyed(cls, url: str, key: str) -> Http:
        return cls(url, {"Authorization": f"Bearer {key}"})

    @classmethod
    def of(cls, stack: Stack) -> Http:
        """The gateway of a stack, for the tenant `default`."""
        return cls.keyed(stack.env["TIDEGATE_URL"], stack.env["TIDEGATE_API_KEY"])

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        """A connection for more than one request, to be closed."""
        address = urlsplit(self.url)
        return http.client.HTTPConnection(address.hostname or "", address.port, timeout=timeout)

    def __call__(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """`body`: bytes as they are, anything else as JSON."""
        sent = {**self.headers, **(headers or {})}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        with closing(self.connect()) as connection:
            connection.request(method, path, body, sent)
            return receive(connection)

    def get(self, path: str, **headers: str) -> Reply:
        return self("GET", path, headers=_dashed(headers))

    def post(self, path: str, body: object = None, **headers: str) -> Reply:
        return self("POST", path, body, headers=_dashed(headers))


def _dashed(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def receive(connection: http.client.HTTPConnection) -> Reply:
    """The response that is due on a connection."""
    response = connection.getresponse()
    return Reply(response.status, response.headers, response.read())


def flower(env: Mapping[str, str]) -> Http:
    """The Flower of a stack, with its password. `env` is the stack's."""
    user, password = env["TIDEGATE_FLOWER_USER"], env["TIDEGATE_FLOWER_PASSWORD"]
    token = base64.b64encode(f"{user}:{password}".encode()).decode()
    return Http(env["TIDEGATE_FLOWER_URL"], {"Authorization": f"Basic {token}"})


# Parts of a stack


@contextmanager
def hanging(stack: Stack, name: str) -> Iterator[None]:
    """A process, and its children, stopped in the middle of what they do."""
    family = stack.family(name)
    for process in family:
        process.send_signal(signal.SIGSTOP)
    # A signal is a request: what runs on another core may still answer somebody.
    until(lambda: all(one.status() == psutil.STATUS_STOPPED for one in family), 10)
    try:
        yield
    finally:
        for process in family:
            process.send_signal(signal.SIGCONT)


def rabbitmqctl(stack: Stack, *arguments: str) -> str:
    """What a stack's RabbitMQ answers to its operator."""
    done = subprocess.run(
        [rabbitmq.BIN / "rabbitmqctl", "--quiet", *arguments],
        env=dict(stack.processes["rabbitmq"].env),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


# Requests


def tensor(name: str, datatype: str, data: list[Any], shape: list[int] | None = None) -> Any:
    """A tensor in JSON; one row unless `shape` says otherwise."""
    return {"name": name, "datatype": datatype, "shape": shape or [1, len(data)], "data": data}


def ints(*values: int, **parameters: object) -> dict[str, Any]:
    """A request to the model `identity`."""
    request: dict[str, Any] = {"inputs": [tensor("INTS", "INT64", list(values))]}
    return request | ({"parameters": parameters} if parameters else {})


def answered_ints(answer: Any) -> list[int]:
    """What `identity` answered to `ints`."""
    (output,) = answer["outputs"]
    assert output["name"] == "INTS_OUT"
    data: list[int] = output["data"]
    return data


IDENTITY = "/v2/models/identity/infer"
DIGITS = "/v2/models/digits/infer"


# Files and batches, without an SDK

_FORM = """--x\r
Content-Disposition: form-data; name="purpose"\r
\r
batch\r
--x\r
Content-Disposition: form-data; name="file"; filename="in.jsonl"\r
\r
{}\r
--x--\r
"""


def upload(server: Http, *lines: str) -> dict[str, Any]:
    """A file of these lines."""
    reply = server(
        "POST",
        "/v1/files",
        _FORM.format("\n".join(lines)).encode(),
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    assert reply.status == 200, reply
    file: dict[str, Any] = reply.json()
    return file


def batch_line(custom_id: str | None, body: object, url: str = IDENTITY, **fields: object) -> str:
    """A line of a batch's file."""
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body} | fields)


# What reached the models


@dataclass(frozen=True, slots=True)
class Witness:
    """Has anything been run? Triton counts what its models ran and failed at, but not what it
    refused; Redis counts the realtime messages that a worker took, whatever became of them."""

    triton: Http
    redis: redis.Redis

    def models(self) -> dict[str, tuple[int, int]]:
        """Per model: how many requests succeeded and failed."""
        told = self.triton.get("/v2/models/stats").json()["model_stats"]
        return {
            model["name"]: (
                model["inference_stats"]["success"]["count"],
                model["inference_stats"]["fail"]["count"],
            )
            for model in told
        }

    def messages(self) -> int:
        """Realtime messages that workers took. See `storage.redis_state`: GETDEL takes one."""
        commands: Any = self.redis.info("commandstats")
        return int(commands.get("cmdstat_getdel", {}).get("calls", 0))

    def testimony(self) -> tuple[object, ...]:
        return self.models(), self.messages()


# Jobs


def ended(server: Http, job_id: str, seconds: float = 20) -> dict[str, Any]:
    """A durable job, once it has ended."""
    job: dict[str, Any] = until(
        lambda: server.get(f"/v1/jobs/{job_id}").json(),
        seconds,
        lambda job: job["status"] in ("succeeded", "failed", "canceled", "expired"),
    )
    return job
