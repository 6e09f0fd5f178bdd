"""Job ids sort by time and prove where they come from."""

from __future__ import annotations

from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from storage.ids import IdMint, created_at

TENANT = uuid4()


def test_an_id_is_a_uuid_of_version_7_that_holds_its_time() -> None:
    job_id = IdMint("secret", clock=lambda: 1_700_000_000.123).mint(TENANT)
    assert job_id.version == 7
    assert created_at(job_id).timestamp() == 1_700_000_000.123


def test_ids_sort_by_time() -> None:
    now = [1_700_000_000.0]
    mint = IdMint("secret", clock=lambda: now[0])
    ids = []
    for _ in range(100):
        ids.append(mint.mint(TENANT))
        now[0] += 0.005
    assert ids == sorted(ids)


def test_an_id_is_recognised_for_its_tenant_and_secret_only() -> None:
    job_id = IdMint("secret").mint(TENANT)
    assert IdMint("secret").minted(job_id, TENANT)
    assert not IdMint("secret").minted(job_id, uuid4())
    assert not IdMint("other").minted(job_id, TENANT)


@given(st.integers(0, 127))
def test_an_id_with_one_bit_changed_is_nobodys(bit: int) -> None:
    mint = IdMint("secret")
    assert not mint.minted(UUID(int=mint.mint(TENANT).int ^ 1 << bit), TENANT)
