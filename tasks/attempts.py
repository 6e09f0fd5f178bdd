"""One attempt at claimed chunks: what its failure means for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import structlog

from errors import Cancelled, DeadlineExceeded, Retry, TidegateError, Unavailable
from inference.client import Deadline
from inference.tensors import InferRequest, Outcome
from storage import time_limit
from storage.work import Claim
from tasks.bootstrap import Services, WorkerServices
from tasks.leases import Held

log = structlog.get_logger(__name__)

BACKOFF = 0.5
MAX_BACKOFF = {Retry.COUNTED: 30.0, Retry.FREE: 4.0, Retry.NEVER: 0.0}
"""Seconds between attempts: the first, doubled each time, up to the last; half of it by chance.
Where something is away, soon enough to notice its return; the retry budget spares it the storm."""

GATHER = 0.05
"""Seconds that what has been answered waits for the rest of its hint, to be committed with it."""


def guarded(services: Services, held: Sequence[Held], run: Callable[[], object]) -> None:
    """Run; give the chunks back where it can't be finished. The object store is waited for as long
    as one of them has time."""
    try:
        with time_limit.within(until(held).remaining()):
            run()
    except TidegateError as error:
        _settle(services, held, error)
    except Exception:
        log.exception("chunks failed", action="chunks.failed")
        _settle(services, held, TidegateError("the worker failed; its log says why"))


def until(held: Sequence[Held]) -> Deadline:
    """When the time of all of these is over."""
    return max((one.until for one in held), key=lambda deadline: deadline.at)


def blame(one: Held, error: TidegateError) -> TidegateError:
    """What an error of anything but the model, whose own `infer` has judged, means for a chunk."""
    late = one.limit.expired() and not one.deadline.expired()
    if isinstance(error, DeadlineExceeded) and late:
        # The attempt's time, not the job's. No fault of what it ran: it costs no attempt.
        return Unavailable("the object store took all of the attempt's time", retry_after=1)
    return one.blame(error)


def _settle(services: Services, held: Sequence[Held], error: TidegateError) -> None:
    for one in held:
        give_back(services, [one.claim], blame(one, error))


def give_back(services: Services, claims: Sequence[Claim], error: TidegateError) -> None:
    """Leave the chunks to a later attempt, or declare them dead where that was the last."""
    if isinstance(error, Cancelled | DeadlineExceeded):
        # Somebody else's by now, or about to be ended by the sweep.
        log.info("chunks called off", action="chunks.cancelled", chunks=len(claims))
        return
    # A token grows with every claim, those that don't count as attempts included.
    tries = max(claim.token for claim in claims)
    ceiling = min(MAX_BACKOFF[error.retry], BACKOFF * 2.0 ** min(tries, 10))
    delay = max(error.retry_after or 0.0, random.uniform(ceiling / 2, ceiling))
    try:
        fates = services.chunks.retry(claims, error, delay)
        log.warning(
            "chunks given back",
            action="chunks.retry",
            error=error.message,
            fates=sorted({fate.value for fate in fates.values()}),
        )
    except Unavailable:
        log.warning("chunks left to their lease", action="chunks.abandoned", chunks=len(claims))


def allow(services: WorkerServices, held: Sequence[Held], model: str) -> None:
    """Raises `Unavailable` where the model has failed too often to be called again so soon."""
    if not services.budget.allow(model, again=any(one.claim.token > 1 for one in held)):
        raise Unavailable("the model has failed too often of late", retry_after=1)


def behind(services: WorkerServices, request: InferRequest) -> InferRequest:
    """The request, to be served after those that somebody waits for, where its model's queue has a
    place for that and the client said nothing else."""
    levels = services.models.spec(request.model, request.version).priority_levels
    if not levels or "priority" in request.parameters:
        return request
    return replace(request, parameters={**request.parameters, "priority": levels})


def infer(
    services: WorkerServices,
    held: Sequence[Held],
    requests: Sequence[InferRequest],
    hand_out: Callable[[list[tuple[Held, Outcome]]], object],
) -> None:
    """Run requests of one model, each for a chunk in `held`. `hand_out` is given what each came to,
    or where it did not come to an end, what that means for its chunk: those that are over do not
    wait for the others."""
    if not requests:
        return
    model = requests[0].model
    allow(services, held, model)
    requests = [behind(services, request) for request in requests]
    away = False

    def judged(part: Mapping[int, Outcome]) -> None:
        nonlocal away
        away = away or any(isinstance(outcome, Unavailable) for outcome in part.values())
        hand_out(
            [
                (one, one.blame(outcome) if isinstance(outcome, TidegateError) else outcome)
                for one, outcome in ((held[at], outcome) for at, outcome in part.items())
            ]
        )

    try:
        services.server.infer_in_parts(
            requests,
            [until(held)] * len(held),
            judged,
            [one.token for one in held],
            gather=GATHER,
        )
    finally:
        services.budget.record(model, away=away)
