"""Who is measured: each calls the same model of the same Triton, Tidegate among them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ops.embedded.ports import HOST, free_port
from ops.embedded.process import Process
from tests.bench.ground import PEERS, Ground, request, started
from tests.bench.load import LoadError, Shot
from tests.bench.payload import Payload, small
from web import gunicorn as gateway

SERVICES = Path(__file__).with_name("services")
STORES = ("redis", "triton")
TIDEGATE = ("gateway", "worker", "sweeper", "flower", "redis", "postgres", "triton")
INFER = "/v2/models/identity/infer"
WAITING = 64
"""Threads of the tutorial's web server: each client that waits has one."""
BROKER, RESULTS = 1, 2
"""The tutorial's databases in Redis."""
SLOTS = {"prefork": os.cpu_count() or 1, "threads": 16}
"""Of the tutorial's worker: Celery's own default, and as many as a Tidegate worker has."""


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    url: str
    """Where it infers."""
    counted: tuple[str, ...]
    """Whose CPU time is its own: everything a request goes through."""
    own: tuple[str, ...] = ()
    """What runs for its turn only."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self, ground: Ground) -> Iterator[None]:
        with started(ground.stack, self.own):
            self.check(small())
            yield

    def __str__(self) -> str:
        return self.name

    def shot(self, payload: Payload, ground: Ground, url: str = "") -> Shot:
        body = payload.written(ground.folder)
        return Shot(url or self.url, "POST", body, {**self.headers, **payload.headers})

    def check(self, payload: Payload) -> None:
        """Raises unless the answer is right."""
        headers = {**self.headers, **payload.headers}
        status, body, told = request(self.url, "POST", payload.body, headers)
        length = told.get("Inference-Header-Content-Length")
        if status != 200 or not payload.right(body, length):
            raise LoadError(f"{self.name} answers {status} {body[:300]!r}")


def direct(ground: Ground) -> Contender:
    return Contender(
        "direct Triton, HTTP", ground.env["TIDEGATE_TRITON_HTTP_URL"] + INFER, ("triton",)
    )


def tidegate(ground: Ground) -> Contender:
    return Contender("Tidegate", ground.env["TIDEGATE_URL"] + INFER, TIDEGATE, headers=ground.key)


def tidegate_digits(ground: Ground) -> Contender:
    """The same, for another model."""
    url = ground.env["TIDEGATE_URL"] + "/v2/models/digits/infer"
    return Contender("Tidegate", url, TIDEGATE, headers=ground.key)


def bare(ground: Ground) -> Contender:
    """As many processes as the gateway has, of the same kind."""
    words = ("-k", "gevent", "-w", str(gateway.workers), "tests.bench.services.bare:app")
    return _served(ground, "bare Flask", "bare", (), _gunicorn(*words))


def tutorial(ground: Ground, pool: str) -> Contender:
    web, worker = "tutorial-web", f"tutorial-{pool}"
    command = [
        *(sys.executable, "-m", "celery", "-A", "tests.bench.services.tutorial", "worker"),
        *("--pool", pool, "--concurrency", str(SLOTS[pool]), "-n", f"{worker}@%h"),
        *("--without-mingle", "--without-gossip", "--loglevel", "WARNING"),
    ]

    def forget() -> None:
        """What an earlier turn left behind."""
        for database in (BROKER, RESULTS):
            with ground.redis(database) as client:
                client.flushdb()

    if worker not in ground.stack.processes:
        env = _env(ground)
        ground.stack.add(
            Process(worker, command, env, ready=_assumed, settle=0.5, tier=1, prepare=forget)
        )
    words = ("-k", "gthread", "--threads", str(WAITING), "-w", str(gateway.workers))
    server = _gunicorn(*words, "tests.bench.services.tutorial:web")
    return _served(ground, f"tutorial, {pool}", web, (worker,), server, STORES)


def bentoml(ground: Ground, processes: int) -> Contender:
    command: list[str | Path] = [_peer("bentoml"), "serve", "bento:Infer"]
    command += ["--working-dir", SERVICES, "--host", HOST, "--port", "{port}"]
    env = {"BENTOML_DO_NOT_TRACK": "1", "BENCH_PROCESSES": str(processes)}
    title = f"BentoML, {processes} worker{'s' * (processes > 1)}"
    return _served(ground, title, f"bentoml-{processes}", (), command, ("triton",), **env)


def ray(ground: Ground, *, haproxy: bool) -> Contender:
    """As it comes, and as its page on throughput advises."""
    command: list[str | Path] = [_peer("python"), SERVICES / "rayserve.py", "{port}"]
    env = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    if not haproxy:
        return _served(ground, "Ray Serve", "ray", (), command, ("triton",), **env)
    # The paths of sockets have to be short.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    env |= {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port(set())),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port(set())),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }
    ours = _served(ground, "Ray Serve, HAProxy", "ray-haproxy", (), command, ("triton",), **env)
    processes = ground.stack.processes
    clean = functools.partial(shutil.rmtree, folder, ignore_errors=True)
    processes["ray-haproxy"] = dataclasses.replace(processes["ray-haproxy"], clean=clean)
    return ours


def _served(
    ground: Ground,
    title: str,
    name: str,
    before: tuple[str, ...],
    command: Sequence[str | Path],
    shared: tuple[str, ...] = (),
    **env: str,
) -> Contender:
    """A contender whose server is the process `name`; `{port}` in its command is replaced."""
    if name in ground.stack.processes:
        port = int(ground.stack.processes[name].env["BENCH_PORT"])
    else:
        port = free_port(set())
        ground.stack.add(
            Process(
                name,
                [str(word).replace("{port}", str(port)) for word in command],
                _env(ground) | env | {"BENCH_PORT": str(port)},
                ready=lambda: check(f"http://{HOST}:{port}/infer"),
                after=before,
                tier=2,
                stop_timeout=15.0,
                ready_timeout=120.0,
            )
        )
    own = (*before, name)
    return Contender(title, f"http://{HOST}:{port}/infer", (*own, *shared), own)


def check(url: str) -> None:
    Contender(url, url, ()).check(small())


def _env(ground: Ground) -> dict[str, str]:
    return {
        **{name: text for name, text in os.environ.items() if "TIDEGATE" not in name},
        "BENCH_TRITON": ground.env["TIDEGATE_TRITON_URL"],
        "BENCH_BROKER": ground.redis_url(BROKER),
        "BENCH_RESULTS": ground.redis_url(RESULTS),
        "PYTHONUNBUFFERED": "1",
    }


def _gunicorn(*words: str) -> list[str]:
    usual = ("-b", f"{HOST}:{{port}}", "--keep-alive", "75", "--no-control-socket")
    return [sys.executable, "-m", "gunicorn", *usual, *words]


def _peer(program: str) -> Path:
    found = PEERS / "bin" / program
    if not found.exists():
        raise LoadError(f"{found} is missing: make bench-peers installs it")
    return found


def _assumed() -> None:
    """The web server is ready when a worker answers."""
