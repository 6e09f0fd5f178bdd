"""gunicorn's configuration: `gunicorn -c web/gunicorn.py web.wsgi:app`.

gevent, because a client that waits should cost a greenlet and not a thread; measured besides at
twice gthread's requests per second (see DESIGN). No gRPC runs here, which gevent would stall.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

bind = os.environ.get("TIDEGATE_BIND", "127.0.0.1:8080").split(",")
workers = int(os.environ.get("TIDEGATE_GATEWAY_WORKERS", "1"))
worker_class = "web.draining.DrainingWorker"
worker_connections = 2000
# Threads and sockets are made by each worker for itself.
preload_app = False
timeout = 60
graceful_timeout = 30
keepalive = 75
limit_request_line = 4094
limit_request_fields = 64
forwarded_allow_ips = os.environ.get("TIDEGATE_PROXIES", "127.0.0.1")
control_socket_disable = True
accesslog = None
errorlog = "-"
proc_name = "tidegate-gateway"

_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where the counters of all processes lie; read when prometheus_client is imported, in a worker."""
_OURS = f"tidegate-metrics-{os.getpid()}-"

if metrics := os.environ.get("TIDEGATE_METRICS_BIND"):
    if metrics.rpartition(":")[2] in {public.rpartition(":")[2] for public in bind}:
        raise ValueError("TIDEGATE_METRICS_BIND: needs another port than TIDEGATE_BIND")
    bind.append(metrics)
    # A gunicorn that reads its configuration again goes on with its folder; one that takes over
    # from another begins its own.
    given = Path(os.environ.get(_FOLDER, "")).name
    if not given or (given.startswith("tidegate-metrics-") and not given.startswith(_OURS)):
        os.environ[_FOLDER] = tempfile.mkdtemp(prefix=_OURS)


def post_fork(server: Any, worker: Any) -> None:
    """Make psycopg2, which is C and blocks, wait in gevent's loop instead."""
    import psycopg2.extensions
    from gevent.socket import wait_read, wait_write

    def wait(connection: Any) -> None:
        # A little more than the longest statement: past it nobody is there any more.
        until = time.monotonic() + 6
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise psycopg2.OperationalError("Postgres does not answer")
            state = connection.poll()
            if state == psycopg2.extensions.POLL_OK:
                return
            if state == psycopg2.extensions.POLL_READ:
                _within(wait_read, connection, left)
            elif state == psycopg2.extensions.POLL_WRITE:
                _within(wait_write, connection, left)
            else:
                raise psycopg2.OperationalError(f"unknown poll state {state}")

    psycopg2.extensions.set_wait_callback(wait)


def _within(wait: Callable[..., None], connection: Any, seconds: float) -> None:
    """Wait; that the time is over is for the caller's loop to see."""
    with contextlib.suppress(TimeoutError):
        wait(connection.fileno(), timeout=seconds)


def post_worker_init(worker: Any) -> None:
    """The application is loaded."""
    from workers import memory

    memory.settle()


def worker_exit(server: Any, worker: Any) -> None:
    """Write what is still to be written."""
    app = worker.app.callable
    if app is not None:
        app.extensions["tidegate"].close()


def child_exit(server: Any, worker: Any) -> None:
    """What a process that has ended had in hand is over; what it counted stays."""
    if _FOLDER in os.environ:
        from prometheus_flask_exporter.multiprocess import GunicornPrometheusMetrics

        GunicornPrometheusMetrics.mark_process_dead_on_child_exit(worker.pid)


def on_exit(server: Any) -> None:
    folder = Path(os.environ.get(_FOLDER, ""))
    if folder.name.startswith(_OURS):
        shutil.rmtree(folder, ignore_errors=True)
