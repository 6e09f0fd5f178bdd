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
    room: int = 0
    """What it takes of the broker, in parts of a message; 0 where that doesn't matter."""


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
    room: int = 1 << 60,
) -> Choice[Tenant]:
    """Pick from each tenant's oldest chunks until `budget` items are spent, the `room` is full or
    nothing is left.

    The tenant with the most left over from earlier rounds is served first. A tenant whose backlog
    empties keeps nothing: credit is for waiting work only. The last pick may overdraw the budget,
    so that a chunk larger than any budget still gets its turn.
    """
    queues = {tenant: list(reversed(chunks)) for tenant, chunks in backlog.items() if chunks}
    credit = {tenant: deficits.get(tenant, 0) for tenant in queues}
    picked: list[int] = []
    while queues and budget > 0 and room > 0:
        able = [tenant for tenant in queues if queues[tenant][-1].items <= credit[tenant]]
        if not able:
            # A round is over when nobody can pay for more, not when a budget ran out: a call that
            # picks little takes up the round where the last one left it.
            for tenant in queues:
                credit[tenant] += QUANTUM * max(1, weights.get(tenant, 1))
            continue
        tenant = max(able, key=lambda name: credit[name])
        while (
            queues[tenant]
            and budget > 0
            and room > 0
            and queues[tenant][-1].items <= credit[tenant]
        ):
            chunk = queues[tenant].pop()
            room -= chunk.room
            credit[tenant] -= chunk.items
            budget -= chunk.items
            picked.append(chunk.id)
        if not queues[tenant]:
            del queues[tenant], credit[tenant]
    return Choice(picked=tuple(picked), deficits=credit)
