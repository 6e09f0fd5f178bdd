"""The durable lane at the worker: claim, run, commit. A hint is acknowledged whatever happens;
what is left undone is in the ledger."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import structlog
from celery import shared_task

from errors import TidegateError, Unavailable
from inference import frames
from inference.client import CancelToken
from inference.tensors import InferRequest, InferResult
from storage.lifecycle import ChunkKind, JobKind
from storage.work import Claim, Done
from tasks import attempts, batches, messages
from tasks.bootstrap import WorkerServices, worker_services

log = structlog.get_logger(__name__)


@shared_task(name=messages.CHUNKS)
def run_chunks(ids: list[int]) -> None:
    """Claim what may still be claimed of these chunks, run it, commit it."""
    services = worker_services()
    claims = services.chunks.claim(ids, services.name)
    if not claims:
        log.info("nothing to claim", action="chunks.none", chunks=len(ids))
        return
    with services.leases.holding(claims) as token:
        singles = [claim for claim in claims if claim.job_kind is JobKind.INFER]
        if singles:
            run = functools.partial(_run_singles, services, singles, token)
            attempts.guarded(services, singles, run)
        for claim in claims:
            if claim.kind is not ChunkKind.INFER:
                batches.run_control(services, claim)
            elif claim.job_kind is JobKind.BATCH:
                run = functools.partial(batches.run_lines, services, claim, token)
                attempts.guarded(services, [claim], run)
    services.pump.kick(services.group)


def _run_singles(services: WorkerServices, claims: Sequence[Claim], token: CancelToken) -> None:
    """One-item jobs, run as few Triton calls and committed in one transaction. What goes wrong with
    one of them, at any step, is that one's alone."""
    ready: list[tuple[Claim, InferRequest]] = []
    done: list[Done] = []
    for claim in claims:
        try:
            ready.append((claim, _single_request(services, claim)))
        except TidegateError as error:
            _settle(services, claim, error, done)
    remaining = max((claim.remaining for claim, _ in ready), default=0.0)
    outcomes = attempts.infer(services, [request for _, request in ready], remaining, token)
    for (claim, _), outcome in zip(ready, outcomes, strict=True):
        try:
            if isinstance(outcome, TidegateError):
                raise outcome
            done.append(_keep(services, claim, outcome))
        except TidegateError as error:
            _settle(services, claim, error, done)
    try:
        services.chunks.commit(done)
    except Unavailable:
        raise
    except Exception:
        # One row that the database refuses must not take its neighbours along.
        log.exception("commit refused; one by one", action="chunks.commit")
        for item in done:
            attempts.guarded(
                services, [item.claim], functools.partial(services.chunks.commit, [item])
            )


def _settle(services: WorkerServices, claim: Claim, error: TidegateError, done: list[Done]) -> None:
    """A one-item job that came to an error: for another try, or for good."""
    if error.retryable:
        attempts.give_back(services, [claim], error)
    else:
        done.append(Done(claim, items_ok=0, items_failed=1, error=error))


def _single_request(services: WorkerServices, claim: Claim) -> InferRequest:
    frame = claim.input if claim.input is not None else services.objects.get(claim.input_key or "")
    return frames.decode_requests(frame)[0]


def _keep(services: WorkerServices, claim: Claim, result: InferResult) -> Done:
    frame = frames.encode_outcomes([result])
    if len(frame) <= services.settings.inline_bytes:
        return Done(claim, items_ok=1, items_failed=0, output=frame)
    key = claim.key("result")
    services.objects.put(key, frame)
    return Done(claim, items_ok=1, items_failed=0, output_key=key)
