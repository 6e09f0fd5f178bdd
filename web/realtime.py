"""One realtime request, from what is asked to what came of it: both ways to serve it lead here."""

from __future__ import annotations

import time
from dataclasses import dataclass
from uuid import UUID

from errors import DeadlineExceeded, NotFound, TidegateError
from inference.tensors import InferRequest, InferResult
from storage.lifecycle import JobState
from storage.records import Record
from web.context import Gateway
from web.flight import Answer


@dataclass(frozen=True, slots=True)
class Keeping:
    """What a client says about answers that may be given again."""

    fresh: bool = False
    """Run it, whatever is kept."""
    store: bool = True
    """False: as if there were no cache."""


def run(
    found: Gateway,
    asked: InferRequest,
    timeout: float,
    *,
    tenant: UUID,
    job_id: UUID,
    keeping: Keeping | None = None,
) -> Answer:
    """Run a request within so many seconds, and have it recorded. `keeping`: of a model whose
    answers may be given again. Raises nothing: what went wrong is the outcome."""
    started = time.monotonic()
    try:
        if keeping is None:
            answer = found.lane.infer(asked, timeout)
        else:
            answer = found.cache.infer(
                asked, timeout, tenant=tenant, fresh=keeping.fresh, store=keeping.store
            )
    except TidegateError as error:
        answer = Answer(error, batch_size=1)
    outcome = answer.outcome
    failed = outcome if isinstance(outcome, TidegateError) else None
    if isinstance(failed, NotFound):
        found.catalog.forget(asked.model, asked.version)
    found.recorder.add(
        Record(
            id=job_id,
            tenant_id=tenant,
            model=asked.model,
            version=outcome.version if isinstance(outcome, InferResult) else asked.version,
            state=_state(failed),
            error=failed.to_wire() if failed else None,
            duration_ms=round((time.monotonic() - started) * 1000),
            batch_size=answer.batch_size,
            cached=answer.cached,
        )
    )
    return answer


def _state(failed: TidegateError | None) -> JobState:
    """How a request ended: as a job of the durable lane would have."""
    if isinstance(failed, DeadlineExceeded):
        return JobState.EXPIRED
    return JobState.FAILED if failed else JobState.SUCCEEDED
