"""The durable lane at the worker: claim, run, commit. A hint is acknowledged whatever happens;
what is left undone is in the ledger."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import structlog
from celery import shared_task

from errors import Cancelled, Retry, TidegateError, Unavailable
from inference import frames
from inference.tensors import InferRequest, InferResult, Outcome
from storage import time_limit
from storage.lifecycle import JobKind
from storage.work import Claim, Done
from tasks import attempts, batches, messages
from tasks.bootstrap import WorkerServices, worker_services
from tasks.leases import Held

log = structlog.get_logger(__name__)

GRACE = 60.0
"""Seconds that an attempt which was called off may take to come back."""


@shared_task(name=messages.CHUNKS)
def run_chunks(ids: list[int], alone: bool = False) -> None:
    """Claim what may still be claimed of these chunks, run it, commit it."""
    services = worker_services()
    with services.slots.taken(alone=alone):
        claims = _claim(services, ids, alone=alone)
        if not claims:
            log.info("nothing to claim", action="chunks.none", chunks=len(ids))
            return
        limit = services.settings.attempt_timeout + GRACE
        with (
            services.watchdog.watching(messages.CHUNKS, limit),
            services.leases.holding(claims) as held,
        ):
            singles = [one for one in held if one.claim.job_kind is JobKind.INFER]
            if singles:
                run = functools.partial(_run_singles, services, singles)
                attempts.guarded(services, singles, run)
            for one in held:
                if one.claim.job_kind is JobKind.BATCH:
                    batches.run(services, one)
    services.pump.kick(services.group)


def _claim(services: WorkerServices, ids: Sequence[int], *, alone: bool) -> list[Claim]:
    claims = services.chunks.claim(ids, services.name)
    if alone or services.settings.max_attempts == 1:
        return claims
    # An old hint can name, among others, what should run alone by now: it gets a hint of its own.
    company = [claim for claim in claims if claim.last and claim.items == 1]
    if company:
        attempts.give_back(services, company, Unavailable("to be run alone", retry_after=0))
    return [claim for claim in claims if claim not in company]


def _run_singles(services: WorkerServices, held: Sequence[Held]) -> None:
    """One-item jobs, run as few Triton calls and committed in one transaction, or those that are
    over in one and the slow ones in a later one. What goes wrong with one of them, at any step, is
    that one's alone."""
    ready: list[tuple[Held, InferRequest]] = []
    done: list[Done] = []
    for one in held:
        try:
            with time_limit.within(one.until.remaining()):
                ready.append((one, _single_request(services, one.claim)))
        except TidegateError as error:
            _settle(services, one.claim, attempts.blame(one, error), done)

    def keep(part: Sequence[tuple[Held, Outcome]]) -> None:
        for one, outcome in part:
            try:
                if isinstance(outcome, TidegateError):
                    raise outcome
                with time_limit.within(one.until.remaining()):
                    done.append(_keep(services, one.claim, outcome))
            except TidegateError as error:
                _settle(services, one.claim, attempts.blame(one, error), done)
        _commit(services, held, done)
        done.clear()
        services.leases.let_go([one for one, _ in part])

    attempts.infer(services, [one for one, _ in ready], [request for _, request in ready], keep)
    _commit(services, held, done)


def _commit(services: WorkerServices, held: Sequence[Held], done: Sequence[Done]) -> None:
    try:
        services.chunks.commit(done)
    except Unavailable:
        raise
    except Exception:
        # One row that the database refuses must not take its neighbours along.
        log.exception("commit refused; one by one", action="chunks.commit")
        by_claim = {one.claim.id: one for one in held}
        for item in done:
            attempts.guarded(
                services,
                [by_claim[item.claim.id]],
                functools.partial(services.chunks.commit, [item]),
            )


def _settle(services: WorkerServices, claim: Claim, error: TidegateError, done: list[Done]) -> None:
    """A one-item job that came to an error: for another try, or for good."""
    if error.retry is not Retry.NEVER or isinstance(error, Cancelled):
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
