"""Keys that were good a moment ago: how long, and through what."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest

from errors import TidegateError, Unauthenticated, Unavailable
from web.context import GRACE, KeyCache

TENANT = uuid4()


class Keys:
    """Says what it is told to say."""

    def __init__(self) -> None:
        self.error: TidegateError | None = None
        self.asked = 0
        self.now = 0.0

    def tenant_of(self, _key: str) -> UUID:
        self.asked += 1
        if self.error:
            raise self.error
        return TENANT


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture
def cache(keys: Keys) -> KeyCache:
    return KeyCache(keys, ttl=10, clock=lambda: keys.now)  # type: ignore[arg-type]


def test_a_good_key_is_asked_for_once_while_it_is_trusted(keys: Keys, cache: KeyCache) -> None:
    assert cache.tenant_of("k") == cache.tenant_of("k") == TENANT
    assert keys.asked == 1


def test_a_revoked_key_is_noticed_when_its_trust_ends(keys: Keys, cache: KeyCache) -> None:
    cache.tenant_of("k")
    keys.error = Unauthenticated("revoked")
    assert cache.tenant_of("k") == TENANT
    keys.now = 11
    with pytest.raises(Unauthenticated):
        cache.tenant_of("k")


def test_a_good_key_outlives_postgres_for_a_while_and_no_longer(
    keys: Keys, cache: KeyCache
) -> None:
    cache.tenant_of("k")
    keys.error = Unavailable("away")
    while keys.now + 11 <= GRACE:
        keys.now += 11
        assert cache.tenant_of("k") == TENANT
    keys.now += 11
    with pytest.raises(Unavailable):
        cache.tenant_of("k")


def test_an_unknown_key_does_not(keys: Keys, cache: KeyCache) -> None:
    keys.error = Unavailable("away")
    with pytest.raises(Unavailable):
        cache.tenant_of("k")
