"""The durable lane at the worker: claim, run, commit. A hint is acknowledged whatever happens;
what is left undone is in the ledger."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Sequence

import structlog
import uuid_utils.compat as uuids
from celery import shared_task

from errors import (
    BadTensor,
    Cancelled,
    DeadlineExceeded,
    ModelFailed,
    TidegateError,
    Unavailable,
)
from inference import frames
from inference.client import CancelToken, Deadline
from inference.metadata import ModelSpec, check
from inference.tensors import InferRequest, InferResult
from storage import objects
from storage.files import FileRow, file_key
from storage.lifecycle import ChunkKind, ChunkState, JobKind
from storage.work import ChunkOutput, Claim, Done
from tasks import batch_lines, messages
from tasks.bootstrap import WorkerServices, worker_services

log = structlog.get_logger(__name__)

BACKOFF = 0.5
MAX_BACKOFF = 30.0

_UNDONE = {
    ChunkState.CANCELED: ("batch_cancelled", "the batch was cancelled before this line ran"),
    ChunkState.EXPIRED: (
        "batch_expired",
        "the batch's completion window ended before this line ran",
    ),
}


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
            _guarded(services, singles, lambda: _run_singles(services, singles, token))
        for claim in claims:
            if claim.job_kind is JobKind.BATCH:
                _guarded(services, [claim], lambda: _BATCH[claim.kind](services, claim, token))  # noqa: B023
    services.pump.kick(services.group)


def _guarded(services: WorkerServices, claims: Sequence[Claim], run: Callable[[], object]) -> None:
    """Run; give the chunks back where it can't be finished."""
    try:
        run()
    except Cancelled:
        log.info("chunks called off", action="chunks.cancelled", chunks=len(claims))
    except TidegateError as error:
        _give_back(services, claims, error)
    except Exception:
        log.exception("chunks failed", action="chunks.failed")
        _give_back(services, claims, TidegateError("the worker failed; its log says why"))


def _give_back(services: WorkerServices, claims: Sequence[Claim], error: TidegateError) -> None:
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
    outcomes = _infer(services, [request for _, request in ready], remaining, token)
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
            _guarded(services, [item.claim], functools.partial(services.chunks.commit, [item]))


def _settle(services: WorkerServices, claim: Claim, error: TidegateError, done: list[Done]) -> None:
    """A one-item job that came to an error: for another try, or for good."""
    if error.retryable:
        _give_back(services, [claim], error)
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


def _infer(
    services: WorkerServices, requests: Sequence[InferRequest], remaining: float, token: CancelToken
) -> list[InferResult | TidegateError]:
    if not requests:
        return []
    if remaining <= 0:
        raise DeadlineExceeded("the job's deadline passed while it waited")
    return services.server.infer_many(requests, Deadline.after(remaining), token)


# ---- batches -------------------------------------------------------------------------------------


def _plan(services: WorkerServices, claim: Claim, token: CancelToken) -> None:
    """Read the input file once and cut it into chunks."""
    settings = services.settings
    limits = batch_lines.Limits(
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        max_lines=settings.max_batch_lines,
        max_line_bytes=settings.max_line_bytes,
    )
    blocks = services.objects.stream(claim.file_key)
    try:
        plans = batch_lines.plan_file(objects.lines(blocks, limits.max_line_bytes), limits)
    except batch_lines.FileErrors as error:
        services.chunks.reject_plan(claim, error.errors)
    else:
        services.chunks.commit_plan(claim, plans)


def _run_lines(services: WorkerServices, claim: Claim, token: CancelToken) -> None:
    """Run one range of lines: outputs to one object, errors to another, then the commit."""
    spec = services.models.spec(claim.model, claim.version)
    lines: list[batch_lines.Line] = []
    failed: list[bytes] = []
    for number, text in _input_lines(services, claim.file_key, claim):
        try:
            lines.append(_parse(services, claim, spec, number, text))
        except batch_lines.BadLine as bad:
            request_id = _request_id(claim, number)
            failed.append(
                batch_lines.error_line(request_id, bad.custom_id, number, bad.reason, bad.message)
            )
    outputs: list[bytes] = []
    outcomes = _infer(services, [line.request for line in lines], claim.remaining, token)
    for line, outcome in zip(lines, outcomes, strict=True):
        request_id = _request_id(claim, line.number)
        try:
            if isinstance(outcome, InferResult):
                outputs.append(batch_lines.output_line(request_id, line.custom_id, outcome))
                continue
        except TidegateError as error:
            outcome = error  # an answer that has no form in JSON
        if outcome.retryable or isinstance(outcome, Cancelled | DeadlineExceeded):
            # Not this line's failure but the whole chunk's: nothing of it is committed.
            raise outcome
        failed.append(
            batch_lines.failed_line(request_id, line.custom_id, _status(outcome), outcome)
        )
    services.chunks.commit(
        [
            Done(
                claim,
                items_ok=len(outputs),
                items_failed=len(failed),
                output_key=_store(services, claim, "output", outputs),
                error_key=_store(services, claim, "errors", failed),
            )
        ]
    )


def _parse(
    services: WorkerServices, claim: Claim, spec: ModelSpec, number: int, text: bytes
) -> batch_lines.Line:
    line = batch_lines.parse_line(text, number, claim.endpoint, services.settings.max_line_bytes)
    if number in claim.duplicates:
        raise batch_lines.BadLine(
            "duplicate_custom_id", "custom_id: an earlier line has the same", line.custom_id
        )
    try:
        check(line.request, spec)
    except BadTensor as error:
        raise batch_lines.BadLine(error.code, error.message, line.custom_id) from error
    return line


def _status(error: TidegateError) -> int:
    """The status a line's error carries in the error file."""
    return 500 if isinstance(error, ModelFailed) else 400


def _input_lines(
    services: WorkerServices, key: str, part: Claim | ChunkOutput
) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of one range of the input file, blank lines left out."""
    blocks = services.objects.stream(key, part.byte_start, part.byte_end)
    found = objects.lines(blocks, services.settings.max_line_bytes)
    for number, (_, text) in enumerate(found, start=part.first_line):
        if text.strip():
            yield number, text


def _request_id(claim: Claim, number: int) -> str:
    """The same for every attempt: a client may tell by it that two files hold one answer."""
    return f"batch_req_{claim.job_id.hex}_{number}"


def _store(services: WorkerServices, claim: Claim, name: str, lines: list[bytes]) -> str | None:
    if not lines:
        return None
    key = claim.key(f"{name}.jsonl")
    services.objects.put(key, lines)
    return key


def _finalize(services: WorkerServices, claim: Claim, token: CancelToken) -> None:
    """Put the chunks' outputs into one output file and one error file."""
    parts = services.chunks.chunk_outputs(claim)
    ok = sum(part.items_ok for part in parts)
    total = sum(part.items for part in parts)
    output = errors = None
    if ok:
        output = _file(
            services,
            claim,
            "output",
            (
                block
                for part in parts
                if part.output_key
                for block in services.objects.stream(part.output_key)
            ),
        )
    if total > ok:
        errors = _file(services, claim, "errors", _error_blocks(services, claim, parts))
    services.chunks.commit_files(claim, output, errors, ok=ok, failed=total - ok)


def _file(services: WorkerServices, claim: Claim, name: str, blocks: Iterator[bytes]) -> FileRow:
    file_id = uuids.uuid7()
    key = f"{file_key(claim.tenant_id, file_id)}"
    size = services.objects.put(key, blocks)
    return FileRow(
        id=file_id,
        tenant_id=claim.tenant_id,
        purpose="batch_output",
        filename=f"batch_{claim.job_id.hex}_{name}.jsonl",
        bytes=size,
        key=key,
    )


def _error_blocks(
    services: WorkerServices, claim: Claim, parts: Sequence[ChunkOutput]
) -> Iterator[bytes]:
    """What went wrong, in the order of the chunks; a line never run says why."""
    for part in parts:
        if part.error_key:
            yield from services.objects.stream(part.error_key)
        if part.state is ChunkState.DONE:
            continue
        error = part.error or {}
        code, message = _UNDONE.get(
            part.state, (str(error.get("code", "failed")), str(error.get("message", "")))
        )
        for number, text in _input_lines(services, claim.file_key, part):
            custom_id = batch_lines.peek_custom_id(text)
            yield batch_lines.error_line(
                _request_id(claim, number), custom_id, number, code, message
            )


_BATCH: dict[ChunkKind, Callable[[WorkerServices, Claim, CancelToken], None]] = {
    ChunkKind.PLAN: _plan,
    ChunkKind.INFER: _run_lines,
    ChunkKind.FINALIZE: _finalize,
}
