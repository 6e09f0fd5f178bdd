"""States of jobs and chunks and the legal moves between them. Pure.

    job    queued ──▶ running ──▶ finalizing ──▶ succeeded
              │          │  │          │
              │          │  └▶ cancelling ─────▶ canceled
              └──────────┴─────────────┴───────▶ failed · canceled · expired

    chunk  queued ──▶ released ──▶ running ──▶ done
              ▲  └────────┴──────────┤          dead       attempts used up, or refused for good
              └──────────────────────┘          canceled · expired

`released` says that a hint went to the broker; a chunk may be claimed from `queued` too, since a
hint is only a hint. A state once terminal never changes.
"""

from __future__ import annotations

from enum import IntEnum, StrEnum


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    FINALIZING = "finalizing"
    """Every item has an answer; output files are being put together."""
    CANCELLING = "cancelling"
    """No item will run any more; output files are being put together."""
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return not JOB_MOVES[self]


class ChunkState(StrEnum):
    QUEUED = "queued"
    RELEASED = "released"
    RUNNING = "running"
    DONE = "done"
    DEAD = "dead"
    CANCELED = "canceled"
    EXPIRED = "expired"

    @property
    def terminal(self) -> bool:
        return not CHUNK_MOVES[self]


class ChunkKind(StrEnum):
    PLAN = "plan"
    """Read the input file once: count, validate, cut into infer chunks."""
    INFER = "infer"
    """Run a contiguous range of items on the model."""
    FINALIZE = "finalize"
    """Put the outputs of all chunks into the files the client downloads."""


class JobKind(StrEnum):
    INFER = "infer"
    """One item, given with the request."""
    BATCH = "batch"
    """The lines of a file."""
    REALTIME = "realtime"
    """Answered on the connection; only a record of it is kept."""


class Priority(IntEnum):
    """Smaller runs first. Brokers never see these: the pump orders by them."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


JOB_MOVES: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset(
        {JobState.RUNNING, JobState.CANCELLING, JobState.FINALIZING}
        | {JobState.FAILED, JobState.CANCELED, JobState.EXPIRED}
    ),
    JobState.RUNNING: frozenset(
        {JobState.FINALIZING, JobState.CANCELLING, JobState.SUCCEEDED}
        | {JobState.FAILED, JobState.CANCELED, JobState.EXPIRED}
    ),
    JobState.FINALIZING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.EXPIRED}),
    JobState.CANCELLING: frozenset({JobState.CANCELED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset(),
    JobState.CANCELED: frozenset(),
    JobState.EXPIRED: frozenset(),
}

CHUNK_MOVES: dict[ChunkState, frozenset[ChunkState]] = {
    ChunkState.QUEUED: frozenset(
        {ChunkState.RELEASED, ChunkState.RUNNING, ChunkState.CANCELED, ChunkState.EXPIRED}
        | {ChunkState.DEAD}
    ),
    ChunkState.RELEASED: frozenset(
        {ChunkState.QUEUED, ChunkState.RUNNING, ChunkState.CANCELED, ChunkState.EXPIRED}
        | {ChunkState.DEAD}
    ),
    ChunkState.RUNNING: frozenset(
        {ChunkState.QUEUED, ChunkState.RUNNING, ChunkState.DONE, ChunkState.DEAD}
        | {ChunkState.CANCELED, ChunkState.EXPIRED}
    ),
    ChunkState.DONE: frozenset(),
    ChunkState.DEAD: frozenset(),
    ChunkState.CANCELED: frozenset(),
    ChunkState.EXPIRED: frozenset(),
}


def sources(target: JobState) -> tuple[JobState, ...]:
    """The states a job may come from to reach `target`: the guard of every UPDATE of its state."""
    return tuple(state for state, moves in JOB_MOVES.items() if target in moves)


def chunk_sources(target: ChunkState) -> tuple[ChunkState, ...]:
    """The states a chunk may come from to reach `target`."""
    return tuple(state for state, moves in CHUNK_MOVES.items() if target in moves)
