"""All suites, in the order of the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from tests.bench.bench import Bench
from tests.bench.report import Found
from tests.bench.suites import backlog, batch, durable, isolation, overload, realtime

MANY_ROWS = {
    "TIDEGATE_MAX_BATCH_LINES": "10000000",
    "TIDEGATE_MAX_FILE_BYTES": str(4 << 30),
}


@dataclass(frozen=True, slots=True)
class Suite:
    name: str
    title: str
    """Of its section."""
    run: Callable[[Bench], Found]
    peers: bool = False
    """Needs the environment of other model servers."""
    alone: bool = False
    """On a stack of its own: it leaves too much behind."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """What that stack is told, where it can't be as shipped."""


SUITES = (
    Suite("realtime", "Realtime", realtime.realtime),
    Suite("peers", "Realtime, beside other model servers", realtime.peers, peers=True),
    Suite("tensors", "Large tensors", realtime.tensors),
    Suite("overload", "Overload", overload.overload),
    Suite("isolation", "Isolation", isolation.isolation),
    Suite("durable", "Durable jobs", durable.durable),
    Suite("jsonl", "Batch, JSONL", batch.jsonl),
    Suite("npy", "Batch, .npy", batch.npy),
    Suite("memory", "Memory", batch.memory, alone=True, settings=MANY_ROWS),
    Suite("backlog", "Backlog", backlog.backlog, alone=True),
)
