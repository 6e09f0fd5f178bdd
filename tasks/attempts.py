"""One attempt at claimed chunks: what its failure means for them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import structlog

from errors import Cancelled, DeadlineExceeded, TidegateError, Unavailable
from inference.client import CancelToken, Deadline
from inference.tensors import InferRequest, InferResult
from storage.work import Claim
from tasks.bootstrap import Services, WorkerServices

log = structlog.get_logger(__name__)

BACKOFF = 0.5
MAX_BACKOFF = 30.0
"""Seconds between attempts: the first, doubled each time, up to the last; half of it by chance."""


def guarded(services: Services, claims: Sequence[Claim], run: Callable[[], object]) -> None:
    """Run; give the chunks back where it can't be finished."""
    try:
        run()
    except Cancelled:
        log.info("chunks called off", action="chunks.cancelled", chunks=len(claims))
    except TidegateError as error:
        give_back(services, claims, error)
    except Exception:
        log.exception("chunks failed", action="chunks.failed")
        give_back(services, claims, TidegateError("the worker failed; its log says why"))


def give_back(services: Services, claims: Sequence[Claim], error: TidegateError) -> None:
    """Leave the chunks to a later attempt, or declare them dead where that was the last."""
    # A model server or store that is away is not the chunk's fault: its attempt doesn't count, and
    # the job's deadline bounds the waiting.
    counted = not isinstance(error, Unavailable)
    # A token grows with every claim, those that don't count as attempts included.
    tries = max(claim.token for claim in claims)
    ceiling = min(MAX_BACKOFF, BACKOFF * 2.0 ** min(tries, 10))
    delay = max(error.retry_after or 0.0, random.uniform(ceiling / 2, ceiling))
    try:
        fates = services.chunks.retry(claims, error, delay, counted=counted)
        log.warning(
            "chunks given back",
            action="chunks.retry",
            error=error.message,
            fates=sorted({fate.value for fate in fates.values()}),
        )
    except Unavailable:
        log.warning("chunks left to their lease", action="chunks.abandoned", chunks=len(claims))


def infer(
    services: WorkerServices, requests: Sequence[InferRequest], remaining: float, token: CancelToken
) -> list[InferResult | TidegateError]:
    """Run requests within so many seconds. Raises `DeadlineExceeded` where there are none left."""
    if not requests:
        return []
    if remaining <= 0:
        raise DeadlineExceeded("the job's deadline passed while it waited")
    return services.server.infer_many(requests, Deadline.after(remaining), token)
