"""Deficit round robin: nobody waits for ever, nobody takes more than a share."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from storage.fairness import QUANTUM, Waiting, choose

backlogs = st.dictionaries(
    st.sampled_from("abcdef"),
    st.lists(st.integers(1, 2 * QUANTUM), min_size=1, max_size=20),
    max_size=6,
).map(
    lambda sizes: {
        tenant: [Waiting(hash((tenant, n)) & 0xFFFFFFFF, size) for n, size in enumerate(costs)]
        for tenant, costs in sizes.items()
    }
)


@given(backlogs, st.integers(0, 10_000))
def test_the_budget_is_overdrawn_by_at_most_the_last_pick(
    backlog: dict[str, list[Waiting]], budget: int
) -> None:
    items = {chunk.id: chunk.items for chunks in backlog.values() for chunk in chunks}
    picked = choose(backlog, {}, {}, budget).picked
    assert sum(items[chunk] for chunk in picked[:-1]) < max(budget, 1)


@given(backlogs, st.integers(1, 10_000))
def test_work_is_left_only_when_the_budget_is_spent(
    backlog: dict[str, list[Waiting]], budget: int
) -> None:
    items = {chunk.id: chunk.items for chunks in backlog.values() for chunk in chunks}
    picked = choose(backlog, {}, {}, budget).picked
    assert len(picked) == len(items) or sum(items[chunk] for chunk in picked) >= budget


@given(backlogs, st.integers(1, 10_000))
def test_a_tenants_chunks_keep_their_order(backlog: dict[str, list[Waiting]], budget: int) -> None:
    picked = choose(backlog, {}, {}, budget).picked
    for chunks in backlog.values():
        mine = [chunk.id for chunk in chunks]
        assert [chunk for chunk in picked if chunk in mine] == mine[
            : sum(chunk in picked for chunk in mine)
        ]


def served(weights: dict[str, int], rounds: int, size: int = 64) -> Counter[str]:
    """Items each tenant gets of an endless backlog, in rounds of one small budget each."""
    got: Counter[str] = Counter()
    deficits: dict[str, int] = {}
    for _ in range(rounds):
        backlog = {
            tenant: [Waiting(n * 10 + place, size) for n in range(100)]
            for place, tenant in enumerate(weights)
        }
        choice = choose(backlog, deficits, weights, 256)
        deficits = dict(choice.deficits)
        for chunk in choice.picked:
            got[list(weights)[chunk % 10]] += size
    return got


def test_equal_tenants_get_equal_shares_over_time() -> None:
    got = served({"a": 1, "b": 1, "c": 1}, rounds=300)
    assert max(got.values()) - min(got.values()) <= 2 * QUANTUM


def test_a_heavier_tenant_gets_its_multiple() -> None:
    got = served({"a": 3, "b": 1}, rounds=400)
    assert 2.7 < got["a"] / got["b"] < 3.3
