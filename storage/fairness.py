"""Weighted deficit round robin between tenants, costed by items. Pure.

M. Shreedhar, G. Varghese, "Efficient fair queuing using deficit round robin", 1995.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Tenant = TypeVar("Tenant")

QUANTUM = 256
"""Items a tenant of weight 1 may release in one round: a chunk, so that a round moves something."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """One chunk that may be released."""

    id: int
    items: int


@dataclass(frozen=True, slots=True)
class Choice(Generic[Tenant]):
    """What to release, in this order, and what each tenant still has to its credit."""

    picked: tuple[int, ...]
    deficits: Mapping[Tenant, int]


def choose(
    backlog: Mapping[Tenant, Sequence[Waiting]],
    deficits: Mapping[Tenant, int],
    weights: Mapping[Tenant, int],
    budget: int,
) -> Choice[Tenant]:
    """Pick from each tenant's oldest chunks until `budget` items are spent or nothing is left.

    The tenant with the most left over from earlier rounds is served first. A tenant whose backlog
    empties keeps nothing: credit is for waiting work only. The last pick may overdraw the budget,
    so that a chunk larger than any budget still gets its turn.
    """
    queues = {tenant: list(reversed(chunks)) for tenant, chunks in backlog.items() if chunks}
    credit = {tenant: deficits.get(tenant, 0) for tenant in queues}
    picked: list[int] = []
    while queues and budget > 0:
        for tenant in sorted(queues, key=lambda name: -credit[name]):
            queue = queues[tenant]
            credit[tenant] += QUANTUM * max(1, weights.get(tenant, 1))
            while queue and budget > 0 and queue[-1].items <= credit[tenant]:
                chunk = queue.pop()
                credit[tenant] -= chunk.items
                budget -= chunk.items
                picked.append(chunk.id)
            if not queue:
                del queues[tenant]
                del credit[tenant]
            if budget <= 0:
                break
    return Choice(picked=tuple(picked), deficits=credit)
