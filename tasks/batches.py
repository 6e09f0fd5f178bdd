"""Batches at the worker: read the file in, run its items, put the answers together."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence

import uuid_utils.compat as uuids

from errors import TidegateError
from inference.client import Deadline
from storage import objects
from storage.files import FileRow
from storage.lifecycle import ChunkKind, ChunkState
from storage.work import ChunkOutput, ChunkPlan, Claim, Done
from tasks import attempts, pipeline
from tasks.bootstrap import Services, WorkerServices
from tasks.formats import (
    Dropped,
    FileErrors,
    Format,
    Limits,
    Member,
    Pack,
    Refused,
    Source,
    nothing,
)
from tasks.leases import Held
from tasks.line_format import Lines

_UNDONE = {
    ChunkState.CANCELED: (
        "batch_cancelled",
        "the batch was cancelled before this was finished",
    ),
    ChunkState.EXPIRED: (
        "batch_expired",
        "the batch's completion window ended before this was finished",
    ),
}


def run(services: WorkerServices, held: Held) -> None:
    """Run a claimed chunk of a batch."""
    if held.claim.kind is not ChunkKind.INFER:
        run_control(services, held)
    else:
        attempts.guarded(services, [held], functools.partial(_run_range, services, held))


def run_control(services: Services, held: Held) -> None:
    """Read a claimed batch's file in, or put its answers together: needs no model."""
    step = _plan if held.claim.kind is ChunkKind.PLAN else _finalize
    attempts.guarded(services, [held], functools.partial(step, services, held))


def _format(claim: Claim) -> Format:
    if claim.arrays is None:
        return Lines()
    # Loaded where it is used: pyarrow takes half a second, and memory.
    from tasks.arrays import Arrays

    return Arrays.of(claim)


def _limits(services: Services) -> Limits:
    settings = services.settings
    return Limits(
        chunk_items=settings.chunk_items,
        chunk_bytes=settings.chunk_bytes,
        max_lines=settings.max_batch_lines,
        max_line_bytes=settings.max_line_bytes,
    )


def _source(services: Services, held: Held) -> Source:
    claim = held.claim
    return Source(services.objects, claim.file_key, held.token, claim.key("rows"))


def _plan(services: Services, held: Held) -> None:
    """Read the input file once and cut it into chunks."""
    claim = held.claim
    try:
        planned = _format(claim).plan(_source(services, held), _limits(services))
    except FileErrors as error:
        services.chunks.reject_plan(claim, error.errors)
    else:
        services.chunks.commit_plan(claim, planned.ranges, planned.layout, planned.staged)


PIECES = 256
"""Most chunks that one is split into: of up to as many lines, each becomes one."""
TARGET = 2.0
"""Seconds after which an attempt reads no more: it commits what it has run, and leaves the rest. So
long a claim lasts, whatever the model's speed, and no more than that is lost with a worker or given
up with its batch."""
BUSY = 256
"""Open chunks of a batch that are enough for any number of workers: it is not cut finer then."""


def _run_range(services: WorkerServices, held: Held) -> None:
    """Run one range of items: outputs to one object, errors to another, then the commit."""
    claim, source, limits = held.claim, _source(services, held), _limits(services)
    format_ = _format(claim)
    if claim.last and claim.items > 1 and claim.attempts > 1:
        # Whatever makes it fail, or its worker, is in one of its items.
        each = math.ceil(claim.items / PIECES)
        services.chunks.split(claim, format_.pieces(source, _plan_of(claim), each, limits))
        return
    spec = services.models.spec(claim.model, claim.version)
    writer = format_.writer(claim, spec)
    errors = _Errors(claim, format_)

    rest: list[ChunkPlan] = []
    target = Deadline.after(TARGET)

    def packs() -> Iterator[Pack]:
        for found in format_.read(source, claim, spec, limits, target.expired):
            if isinstance(found, Pack):
                yield found
            elif isinstance(found, ChunkPlan):
                rest.append(found)
            else:
                errors.refused(found)
                writer.missing(Member(found.number, found.custom_id))

    answered = 0
    for pack, outcome in pipeline.run(services, held, packs()):
        if isinstance(outcome, TidegateError):
            unanswered = [(member, outcome) for member in pack.members]
        else:
            unanswered = list(writer.answered(pack, outcome))
        for member, error in unanswered:
            errors.failed(member, error)
            writer.missing(member)
        answered += len(pack.members) - len(unanswered)
    if rest and claim.open_chunks < BUSY:
        # As many as were run in this time, for whoever is free.
        each = max(answered + errors.count, math.ceil(rest[0].items / PIECES))
        rest = format_.pieces(source, rest[0], each, limits)
    services.chunks.commit(
        [
            Done(
                claim,
                items_ok=answered,
                items_failed=errors.count,
                output_key=_store(services, claim, f"output.{format_.suffix}", writer.close()),
                error_key=_store(services, claim, "errors.jsonl", errors.close()),
                rest=tuple(rest),
            )
        ]
    )


def _plan_of(claim: Claim) -> ChunkPlan:
    return ChunkPlan(
        claim.items, claim.first_line, claim.byte_start, claim.byte_end, claim.duplicates
    )


class _Errors:
    """The error lines of one range: first what was never run, then what failed."""

    def __init__(self, claim: Claim, format_: Format):
        self._claim = claim
        self._format = format_
        self._refused: list[tuple[int, bytes]] = []
        self._failed: list[tuple[int, bytes]] = []
        self.count = 0

    def refused(self, item: Refused) -> None:
        self._refused.append((item.number, self._format.refused_line(self._claim, item)))
        self.count += item.items

    def failed(self, member: Member, error: TidegateError) -> None:
        text = self._format.failed_line(self._claim, member, error)
        self._failed.append((member.number, text))
        self.count += 1

    def close(self) -> list[bytes]:
        texts = [text for _, text in (*sorted(self._refused), *sorted(self._failed))]
        return [b"".join(texts)] if texts else []


def _finalize(services: Services, held: Held) -> None:
    """Put the chunks' outputs into one output file and one error file."""
    claim, format_ = held.claim, _format(held.claim)
    parts = services.chunks.chunk_outputs(claim)
    ok = sum(part.items_ok for part in parts)
    total = sum(part.items for part in parts)
    output = errors = None
    dropped: Dropped = nothing
    if ok:
        made = format_.output(_source(services, held), parts, services.objects)
        dropped = made.dropped
        ok -= sum(item.items for part in parts for item in dropped(part))
        output = _file(services, held, f"output.{format_.suffix}", made.blocks)
    if total > ok:
        blocks = _error_blocks(services, held, parts, dropped)
        errors = _file(services, held, "errors.jsonl", blocks)
    services.chunks.commit_files(claim, output, errors, ok=ok, failed=total - ok)


def _file(services: Services, held: Held, name: str, blocks: Iterable[bytes]) -> FileRow:
    claim = held.claim
    # Below the job's name: while the job has not ended, nobody takes this for garbage.
    key = claim.key(name)
    size = services.objects.put(key, _while_ours(held, blocks))
    return FileRow(
        id=uuids.uuid7(),
        tenant_id=claim.tenant_id,
        purpose="batch_output",
        filename=f"batch_{claim.job_id.hex}_{name}",
        bytes=size,
        key=key,
    )


def _while_ours(held: Held, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The blocks, as long as somebody wants what is made of them."""
    for block in blocks:
        held.token.check()
        yield block


def _error_blocks(
    services: Services, held: Held, parts: Sequence[ChunkOutput], dropped: Dropped
) -> Iterator[bytes]:
    """What went wrong, in the order of the chunks; an item never run says why."""
    claim, source, limits = held.claim, _source(services, held), _limits(services)
    format_ = _format(claim)
    for part in parts:
        if part.error_key:
            yield from objects.steadily(services.objects, part.error_key)
        for item in dropped(part):
            yield format_.refused_line(claim, item)
        if part.state is ChunkState.DONE:
            continue
        error = part.error or {}
        code, message = _UNDONE.get(
            part.state, (str(error.get("code", "failed")), str(error.get("message", "")))
        )
        for item in format_.undone(source, part, limits, code, message):
            yield format_.refused_line(claim, item)


def _store(services: Services, claim: Claim, name: str, blocks: Sequence[bytes]) -> str | None:
    if not blocks:
        return None
    key = claim.key(name)
    services.objects.put(key, blocks)
    return key
