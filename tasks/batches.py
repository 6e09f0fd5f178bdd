"""Batches at the worker: read the file in, run its lines, put the answers together."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import uuid_utils.compat as uuids

from errors import BadTensor, Cancelled, DeadlineExceeded, ModelFailed, Retry, TidegateError
from inference.metadata import ModelSpec, check
from inference.tensors import InferResult
from storage import objects
from storage.files import FileRow
from storage.lifecycle import ChunkKind, ChunkState
from storage.work import ChunkOutput, ChunkPlan, Claim, Done
from tasks import attempts, batch_lines
from tasks.bootstrap import Services, WorkerServices
from tasks.leases import Held

_UNDONE = {
    ChunkState.CANCELED: (
        "batch_cancelled",
        "the batch was cancelled before this line was finished",
    ),
    ChunkState.EXPIRED: (
        "batch_expired",
        "the batch's completion window ended before this line was finished",
    ),
}


def run(services: WorkerServices, held: Held) -> None:
    """Run a claimed chunk of a batch."""
    if held.claim.kind is not ChunkKind.INFER:
        run_control(services, held)
    else:
        attempts.guarded(services, [held], functools.partial(_run_lines, services, held))


def run_control(services: Services, held: Held) -> None:
    """Read a claimed batch's file in, or put its answers together: needs no model."""
    step = _plan if held.claim.kind is ChunkKind.PLAN else _finalize
    attempts.guarded(services, [held], functools.partial(step, services, held))


def _while_ours(held: Held, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks, as long as somebody wants what is made of them."""
    for block in blocks:
        held.token.check()
        yield block


def _plan(services: Services, held: Held) -> None:
    """Read the input file once and cut it into chunks."""
    claim, settings = held.claim, services.settings
    limits = batch_lines.Limits(
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        max_lines=settings.max_batch_lines,
        max_line_bytes=settings.max_line_bytes,
    )
    blocks = _while_ours(held, objects.steadily(services.objects, claim.file_key))
    try:
        plans = batch_lines.plan_file(objects.lines(blocks, limits.max_line_bytes), limits)
    except batch_lines.FileErrors as error:
        services.chunks.reject_plan(claim, error.errors)
    else:
        services.chunks.commit_plan(claim, plans)


PIECES = 256
"""Most chunks that one is split into: of up to as many lines, each becomes one."""


def _run_lines(services: WorkerServices, held: Held) -> None:
    """Run one range of lines: outputs to one object, errors to another, then the commit."""
    claim = held.claim
    if claim.last and claim.items > 1 and claim.attempts > 1:
        # Whatever makes it fail, or its worker, is in one of its lines.
        services.chunks.split(claim, _pieces(services, claim))
        return
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
    outcomes = attempts.infer(services, [held] * len(lines), [line.request for line in lines])
    for line, outcome in zip(lines, outcomes, strict=True):
        request_id = _request_id(claim, line.number)
        try:
            if isinstance(outcome, InferResult):
                outputs.append(batch_lines.output_line(request_id, line.custom_id, outcome))
                continue
        except TidegateError as error:
            outcome = error  # an answer that has no form in JSON
        if outcome.retry is not Retry.NEVER or isinstance(outcome, Cancelled | DeadlineExceeded):
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


def _pieces(services: Services, claim: Claim) -> list[ChunkPlan]:
    """The chunk's lines in up to `PIECES` parts."""
    per_piece = math.ceil(claim.items / PIECES)
    plans: list[ChunkPlan] = []
    blocks = services.objects.stream(claim.file_key, claim.byte_start, claim.byte_end)
    found = objects.lines(blocks, services.settings.max_line_bytes)
    lines = [
        (number, claim.byte_start + offset)
        for number, (offset, text) in enumerate(found, start=claim.first_line)
        if text.strip()
    ]
    for at in range(0, len(lines), per_piece):
        piece = lines[at : at + per_piece]
        numbers = [number for number, _ in piece]
        end = lines[at + per_piece][1] if at + per_piece < len(lines) else claim.byte_end
        plans.append(
            ChunkPlan(
                items=len(piece),
                first_line=numbers[0],
                byte_start=piece[0][1],
                byte_end=end,
                duplicates=tuple(set(numbers).intersection(claim.duplicates)),
            )
        )
    return plans


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


def _finalize(services: Services, held: Held) -> None:
    """Put the chunks' outputs into one output file and one error file."""
    claim = held.claim
    parts = services.chunks.chunk_outputs(claim)
    ok = sum(part.items_ok for part in parts)
    total = sum(part.items for part in parts)
    output = errors = None
    if ok:
        output = _file(
            services,
            held,
            "output",
            (
                block
                for part in parts
                if part.output_key
                for block in objects.steadily(services.objects, part.output_key)
            ),
        )
    if total > ok:
        errors = _file(services, held, "errors", _error_blocks(services, claim, parts))
    services.chunks.commit_files(claim, output, errors, ok=ok, failed=total - ok)


def _file(services: Services, held: Held, name: str, blocks: Iterator[bytes]) -> FileRow:
    claim = held.claim
    # Below the job's name: while the job has not ended, nobody takes this for garbage.
    key = claim.key(f"{name}.jsonl")
    size = services.objects.put(key, _while_ours(held, blocks))
    return FileRow(
        id=uuids.uuid7(),
        tenant_id=claim.tenant_id,
        purpose="batch_output",
        filename=f"batch_{claim.job_id.hex}_{name}.jsonl",
        bytes=size,
        key=key,
    )


def _error_blocks(
    services: Services, claim: Claim, parts: Sequence[ChunkOutput]
) -> Iterator[bytes]:
    """What went wrong, in the order of the chunks; a line never run says why."""
    for part in parts:
        if part.error_key:
            yield from objects.steadily(services.objects, part.error_key)
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


def _input_lines(
    services: Services, key: str, part: Claim | ChunkOutput
) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of one range of the input file, blank lines left out."""
    blocks = objects.steadily(services.objects, key, part.byte_start, part.byte_end)
    found = objects.lines(blocks, services.settings.max_line_bytes)
    for number, (_, text) in enumerate(found, start=part.first_line):
        if text.strip():
            yield number, text


def _request_id(claim: Claim, number: int) -> str:
    """The same for every attempt: a client may tell by it that two files hold one answer."""
    return f"batch_req_{claim.job_id.hex}_{number}"


def _store(services: Services, claim: Claim, name: str, lines: list[bytes]) -> str | None:
    if not lines:
        return None
    key = claim.key(f"{name}.jsonl")
    services.objects.put(key, lines)
    return key
