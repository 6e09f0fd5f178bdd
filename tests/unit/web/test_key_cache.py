"""Keys that were good a moment ago: how long, and through what."""

from __future__ import annotations

import threading
import time
from uuid import UUID, uuid4

import pytest

from errors import TidegateError, Unauthenticated, Unavailable
from web.context import GRACE, KeyCache

TENANT = uuid4()


class Keys:
    """Says what it is told to say; waits with it while it is told to hang."""

    def __init__(self) -> None:
        self.error: TidegateError | None = None
        self.asked = 0
        self.now = 0.0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def tenant_of(self, _key: str) -> UUID:
        self.asked += 1
        assert self.goes_on.wait(20)
        if self.error:
            raise self.error
        return TENANT


@pytest.fixture
def keys() -> Keys:
    return Keys()


@pytest.fixture
def cache(keys: Keys) -> KeyCache:
    """Of much patience: who waits waits for an answer."""
    return KeyCache(keys, ttl=10, patience=20, clock=lambda: keys.now)  # type: ignore[arg-type]


@pytest.fixture
def hasty(keys: Keys) -> KeyCache:
    return KeyCache(keys, ttl=10, patience=0.01, clock=lambda: keys.now)  # type: ignore[arg-type]


def settled(cache: KeyCache) -> None:
    """Wait until nothing is asked."""
    until = time.monotonic() + 10
    while cache._asking:
        assert time.monotonic() < until
        time.sleep(0.001)


def test_a_good_key_is_asked_for_once_while_it_is_young(keys: Keys, cache: KeyCache) -> None:
    assert cache.tenant_of("k") == cache.tenant_of("k") == TENANT
    keys.now = 4.9
    assert cache.tenant_of("k") == TENANT
    assert keys.asked == 1


def test_an_older_one_is_asked_for_by_nobody_who_waits(keys: Keys, cache: KeyCache) -> None:
    cache.tenant_of("k")
    keys.goes_on.clear()
    keys.now = 6
    assert [cache.tenant_of("k") for _ in range(3)] == [TENANT] * 3
    keys.goes_on.set()
    settled(cache)
    assert keys.asked == 2
    # As good as new.
    keys.now = 10.9
    cache.tenant_of("k")
    assert keys.asked == 2


def test_a_revoked_key_is_noticed_by_the_first_request_past_half_its_time(
    keys: Keys, cache: KeyCache
) -> None:
    cache.tenant_of("k")
    keys.error = Unauthenticated("revoked")
    assert cache.tenant_of("k") == TENANT
    keys.now = 6
    assert cache.tenant_of("k") == TENANT
    settled(cache)
    with pytest.raises(Unauthenticated):
        cache.tenant_of("k")


def test_a_revoked_key_works_no_more_when_its_time_is_over(keys: Keys, cache: KeyCache) -> None:
    cache.tenant_of("k")
    keys.error = Unauthenticated("revoked")
    keys.now = 10
    for _ in range(2):
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
        settled(cache)
    keys.now += 11
    with pytest.raises(Unavailable):
        cache.tenant_of("k")


def test_a_postgres_that_hangs_is_waited_for_a_moment_and_asked_once(
    keys: Keys, hasty: KeyCache
) -> None:
    hasty.tenant_of("k")
    keys.goes_on.clear()
    keys.now = 11
    assert [hasty.tenant_of("k") for _ in range(3)] == [TENANT] * 3
    assert keys.asked == 2
    # What it says at last counts.
    keys.error = Unauthenticated("revoked")
    keys.goes_on.set()
    settled(hasty)
    with pytest.raises(Unauthenticated):
        hasty.tenant_of("k")


def test_after_a_vain_question_the_next_one_holds_up_nobody(keys: Keys, cache: KeyCache) -> None:
    cache.tenant_of("k")
    keys.error = Unavailable("away")
    keys.now = 11
    assert cache.tenant_of("k") == TENANT
    settled(cache)
    keys.goes_on.clear()
    keys.now = 17
    assert cache.tenant_of("k") == TENANT
    keys.goes_on.set()
    settled(cache)
    assert keys.asked == 3


def test_an_error_nobody_thought_of_ends_the_question_too(keys: Keys, cache: KeyCache) -> None:
    cache.tenant_of("k")
    keys.error = ValueError("a defect")  # type: ignore[assignment]
    keys.now = 11
    assert cache.tenant_of("k") == TENANT
    settled(cache)
    keys.error = None
    assert cache.tenant_of("k") == TENANT


def test_an_unknown_key_does_not_outlive_postgres(keys: Keys, cache: KeyCache) -> None:
    keys.error = Unavailable("away")
    with pytest.raises(Unavailable):
        cache.tenant_of("k")
