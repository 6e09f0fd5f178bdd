"""Is this process alive, could it do its work, and what has it done?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from flask import Blueprint, Response, request

from errors import NotFound, TidegateError, Unavailable
from web.context import Gateway, gateway
from web.json import respond
from web.offload import offload

blueprint = Blueprint("health", __name__)
CACHED = 1.0

_lock = threading.Lock()
_last: list[tuple[float, dict[str, str]]] = []


def _workers(found: Gateway) -> None:
    if not found.lane.workers():
        raise Unavailable("no GPU worker is there")


_CHECKS: dict[str, Callable[[Gateway], None]] = {
    "database": lambda found: found.services.database.ping(),
    "redis": lambda found: found.services.state.ping(),
    "objects": lambda found: found.objects.ping(),
    "workers": _workers,
}


def check(found: Gateway) -> dict[str, str]:
    """Each dependency's state, asked for at most once a second."""
    with _lock:
        if _last and time.monotonic() - _last[0][0] < CACHED:
            return _last[0][1]
        states = {}
        for name, ask in _CHECKS.items():
            try:
                ask(found)
                states[name] = "ok"
            except TidegateError as error:
                states[name] = error.message
        _last[:] = [(time.monotonic(), states)]
        return states


@blueprint.get("/livez")
def livez() -> Response:
    """The process answers."""
    return respond({"status": "ok"})


@blueprint.get("/readyz")
def readyz() -> Response:
    """Requests can be taken; 503 names what is missing."""
    states = check(gateway())
    ready = all(state == "ok" for state in states.values())
    return respond(
        {"status": "ok" if ready else "unready", "checks": states}, 200 if ready else 503
    )


@blueprint.get("/metrics")
def metrics() -> Response:
    """For Prometheus: on a listener of its own, and nowhere else."""
    found = gateway()
    # Where the connection arrived: what its headers say of that is the client's.
    socket: Any = request.environ.get("gunicorn.socket")
    port = found.services.settings.metrics_port
    if not port or socket is None or socket.getsockname()[1:2] != (port,):
        raise NotFound("nothing is here")
    # The files of every process are read.
    text, kind = offload(found.metrics.render, request.headers.get("Accept"))
    return Response(text, content_type=kind)
