"""The values that pass between the ledger and those who work from it. Frozen, no SQL."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from errors import TidegateError
from storage.lifecycle import ChunkKind, ChunkState, JobKind, JobState, Priority


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a gateway hands over. `deadline` is seconds from now."""

    id: UUID
    tenant_id: UUID
    group: str
    model: str
    version: str
    deadline: float
    priority: Priority = Priority.NORMAL
    input: bytes | None = None
    input_key: str | None = None
    stored_since: datetime | None = None
    """With `input_key`: a moment of the database's before its first byte was stored."""
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class NewBatch:
    """The batch half of a job over a file's lines."""

    endpoint: str
    completion_window: str
    input_file_id: UUID
    output_ttl: int | None = None
    """Seconds after which the output files expire."""
    arrays: Mapping[str, Any] | None = None
    """What to do with a file of arrays; None: it is lines."""


@dataclass(frozen=True, slots=True)
class Pulse:
    """A job in so few words that it can be asked for often: whatever a client sees of a job
    changes, this does."""

    state: JobState
    started_at: datetime | None
    attempts: int
    items: int
    items_ok: int
    items_failed: int


@dataclass(frozen=True, slots=True)
class Hint:
    """Chunks to name in one broker message: of one group, model and version."""

    group: str
    model: str
    version: str
    ids: tuple[int, ...]
    alone: bool = False
    """The last attempt of a chunk whose earlier ones failed, perhaps with their worker: nothing
    else of the batch lane runs beside it, so that what it does happens to it alone."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run one chunk until its lease ends, proved by `token`."""

    id: int
    token: int
    kind: ChunkKind
    job_id: UUID
    job_kind: JobKind
    tenant_id: UUID
    seq: int
    model: str
    version: str
    attempts: int
    last: bool
    """No attempt follows this one."""
    items: int
    first_line: int
    byte_start: int
    byte_end: int
    duplicates: tuple[int, ...]
    remaining: float
    """Seconds to the job's deadline, at the moment of the claim."""
    input: bytes | None
    input_key: str | None
    endpoint: str
    file_key: str
    outcome: str | None
    open_chunks: int = 1
    """Of its job, at the moment of the claim."""
    arrays: Mapping[str, Any] | None = None
    """What to do with a file of arrays; None: it is lines."""
    layout: Mapping[str, Any] | None = None
    """What reading that file in found."""

    def key(self, name: str) -> str:
        """An object key only this attempt writes: a stale one can never overwrite a newer one's."""
        return f"jobs/{self.tenant_id.hex}/{self.job_id.hex}/{self.seq}/{self.token}/{name}"


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One range of lines of the input file: `[byte_start, byte_end)`."""

    items: int
    first_line: int
    byte_start: int
    byte_end: int
    duplicates: tuple[int, ...] = ()
    """Line numbers whose custom_id an earlier line has."""


@dataclass(frozen=True, slots=True)
class Done:
    """What an attempt at an infer chunk produced."""

    claim: Claim
    items_ok: int
    items_failed: int
    output: bytes | None = None
    output_key: str | None = None
    error_key: str | None = None
    error: TidegateError | None = None
    """One-item jobs: why the item failed."""
    rest: tuple[ChunkPlan, ...] = ()
    """What of the chunk was not run, up to its end: chunks of their own from now on. The items
    counted here are then all that is left of this one."""


@dataclass(frozen=True, slots=True)
class ChunkOutput:
    """A chunk as the finalizer sees it."""

    seq: int
    state: ChunkState
    items: int
    first_line: int
    byte_start: int
    byte_end: int
    output_key: str | None
    error_key: str | None
    items_ok: int
    items_failed: int
    error: Mapping[str, Any] | None


class Fate(enum.Enum):
    """What becomes of a chunk whose attempt failed. See `errors.Retry`."""

    RETRIED = "retried"
    DEAD = "dead"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep found."""

    leases: int = 0
    dead: int = 0
    hints: int = 0
    expired: int = 0
