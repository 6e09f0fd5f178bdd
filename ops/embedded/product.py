"""The product's own processes: what the embedded stack runs is what production runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping

from ops.embedded import probes
from ops.embedded.ports import HOST
from ops.embedded.process import Process

STORES = ("postgres", "redis", "rabbitmq", "triton")
"""As far as a stack has them."""
SETUP = ("migrate", "default-key")


QUIET = ("--without-mingle", "--without-gossip")
"""Workers have nothing to tell each other: the ledger knows. Asking costs a second a start."""


def setup(env: Mapping[str, str]) -> list[Process]:
    """One-shots, safe to repeat: the tables, and the key that `var/tidegate.env` names (taken from
    TIDEGATE_API_KEY: arguments are public)."""
    return [
        Process("migrate", _python("storage", "migrate"), env, after=("postgres",)),
        Process(
            "default-key",
            _python("storage", "create-key", "--tenant", "default"),
            env,
            after=("migrate",),
        ),
    ]


def gateway(env: Mapping[str, str], port: int, metrics: int) -> Process:
    """Ready when it says so, which is when its stores and a worker are there, too."""
    return Process(
        "gateway",
        _python("gunicorn", "-c", "web/gunicorn.py", "web.wsgi:app"),
        {**env, "TIDEGATE_BIND": f"{HOST}:{port}", "TIDEGATE_METRICS_BIND": f"{HOST}:{metrics}"},
        ready=lambda: probes.expect(f"http://{HOST}:{port}/readyz", 200),
        after=(*STORES, *SETUP),
        # First to stop: it may still be waiting for answers that the worker has to give.
        tier=2,
        stop_timeout=32.0,
        # "Quick": takes its own processes with it and waits for no client.
        orphan_signal=signal.SIGQUIT,
    )


def worker(env: Mapping[str, str], *arguments: str, name: str = "worker") -> Process:
    """A GPU worker. `arguments` go to `celery worker`."""
    return Process(
        name,
        _python("celery", "-A", "workers", "worker", *QUIET, *(arguments or ("--gpu", "none"))),
        env,
        ready=_assumed,
        settle=1.0,
        after=(*STORES, *SETUP),
        tier=1,
        # Its own drain takes up to 15 s.
        stop_timeout=20.0,
    )


def sweeper(env: Mapping[str, str]) -> Process:
    return Process(
        "sweeper",
        _python("workers.sweeper"),
        env,
        ready=_assumed,
        settle=1.0,
        after=("redis", "rabbitmq", *SETUP),
        tier=1,
        # A delivery of a webhook takes up to 15 s.
        stop_timeout=20.0,
    )


def flower(env: Mapping[str, str], port: int, user: str, password: str) -> Process:
    """Ready when it asks for the password, which it has from its environment: arguments are
    public."""
    return Process(
        "flower",
        _python("celery", "-A", "workers", "flower", f"--address={HOST}", f"--port={port}"),
        {**env, "FLOWER_BASIC_AUTH": f"{user}:{password}"},
        ready=lambda: probes.expect(f"http://{HOST}:{port}/", 401),
        # It asks who the workers are once, when it starts; the gateway is ready when they are.
        after=("gateway",),
        tier=2,
        stop_timeout=5.0,
    )


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _assumed() -> None:
    """Nothing to ask: the gateway is not ready before a worker is, and knows how to tell."""
