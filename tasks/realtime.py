"""The realtime lane at the worker: claim the tensors, run them, answer the gateway."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
import structlog
from celery import shared_task

from errors import BadRequest, DeadlineExceeded, TidegateError, Unavailable
from inference import frames
from inference.client import Deadline
from inference.tensors import Outcome
from tasks import messages
from tasks.bootstrap import WorkerServices, worker_services

log = structlog.get_logger(__name__)
QUERY_TIMEOUT = 5.0
GRACE = 60.0
"""Seconds after its deadline in which a message that was called off may come back."""
REPLY_PAUSE = 0.2
"""Seconds between two tries to answer while Redis is away."""


# No task events: three for each message were a third of what it cost the worker, and who watches is
# served better by numbers than by a list that goes by too fast to read.
@shared_task(name=messages.REALTIME, send_events=False)
def run_realtime(message: str, gateway: str, deadlines: list[float]) -> None:
    """Run the requests of one message as few Triton calls. `deadlines` are seconds from the moment
    the gateway stored the tensors, whose longest is the tensors' TTL: what is left of that says,
    on Redis's clock alone, how much time has gone by."""
    services = worker_services()
    name = bytes.fromhex(message)
    blob = services.state.claim_blob(name)
    if blob is None:
        log.info("nothing to run", action="realtime.gone", message_id=message)
        return
    until = Deadline.after(blob.remaining)
    with (
        services.watchdog.watching(messages.REALTIME, blob.remaining + GRACE),
        services.running.message(name),
    ):
        elapsed = max(deadlines) - blob.remaining
        services.haste.took(elapsed)
        left = [deadline - elapsed for deadline in deadlines]

        def reply(outcomes: Sequence[Outcome | None]) -> None:
            _reply(services, gateway, name, frames.encode_outcomes(outcomes), until)

        _run(services, blob.data, left, reply)


def _reply(
    services: WorkerServices, gateway: str, message: bytes, data: bytes, until: Deadline
) -> None:
    """Answer a message, as soon as Redis is there and while somebody waits for it. An answer that
    arrived although it seemed not to is given twice; the gateway takes the first."""
    while True:
        try:
            services.state.reply(gateway, message, data)
            return
        except Unavailable:
            if until.remaining() <= REPLY_PAUSE:
                raise
            time.sleep(REPLY_PAUSE)


def _run(
    services: WorkerServices,
    data: bytes,
    left: Sequence[float],
    reply: Callable[[Sequence[Outcome | None]], None],
) -> None:
    """Run requests that have so many seconds `left`. Those that are over are answered, in a reply
    of their own if need be, and the others in a later one: a slow request makes nobody late."""
    late = DeadlineExceeded("the request's deadline passed while it waited")
    open_ = set(range(len(left)))
    live = [place for place in open_ if left[place] > 0]
    ready: dict[int, Outcome] = dict.fromkeys(open_.difference(live), late)

    def answer() -> None:
        reply([ready.get(place) for place in range(len(left))])
        open_.difference_update(ready)
        ready.clear()

    def answer_part(part: Mapping[int, Outcome]) -> None:
        ready.update((live[at], outcome) for at, outcome in part.items())
        answer()

    failed: TidegateError
    try:
        requests = frames.decode_requests(data)
        services.server.infer_in_parts(
            [requests[place] for place in live],
            [Deadline.after(left[place]) for place in live],
            answer_part,
        )
        failed = TidegateError("the worker has no answer")
    except TidegateError as error:
        failed = error
    except Exception:
        log.exception("realtime failed", action="realtime.failed")
        failed = TidegateError("the worker failed; its log says why")
    if open_:
        ready.update(dict.fromkeys(open_.difference(ready), failed))
        answer()


@shared_task(name=messages.QUERY, send_events=False)
def run_query(message: str, gateway: str, op: str, model: str, version: str) -> None:
    """Ask this worker's Triton something for a gateway, which has no gRPC of its own."""
    services, until = worker_services(), Deadline.after(QUERY_TIMEOUT)
    try:
        answer = {"value": _ask(services, op)(model, version)}
    except TidegateError as error:
        answer = {"error": error.to_wire()}
    except Exception:
        log.exception("query failed", action="query.failed", op=op)
        answer = {"error": TidegateError("the worker failed; its log says why").to_wire()}
    _reply(services, gateway, bytes.fromhex(message), orjson.dumps(answer), until)


def _ask(services: WorkerServices, op: str) -> Callable[[str, str], Any]:
    server, deadline = services.server, Deadline.after(QUERY_TIMEOUT)
    known: dict[str, Callable[[str, str], Any]] = {
        "describe": services.models.describe,
        "server": lambda _model, _version: server.server_metadata(deadline),
        "statistics": lambda model, version: server.statistics(model, version, deadline),
        "index": lambda _model, _version: server.repository_index(deadline),
        "ready": lambda model, version: server.ready(deadline, model or None, version),
    }
    if op not in known:
        raise BadRequest(f"no such query: {op}")
    return known[op]
