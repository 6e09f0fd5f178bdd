"""Answers in a real Redis: within their bytes, for their time, and nothing left of what is gone."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from ops.embedded import Stack
from storage.redis_state import ANSWER_OVERHEAD, RedisState
from web.answers import PARTS, SharedAnswers

pytestmark = pytest.mark.stack

LONG = 600.0
ROOM = 100 * (1000 + ANSWER_OVERHEAD)
"""For a hundred answers of 1,000 bytes."""


class Shelf:
    """A namespace of the test's own, and what lies in it."""

    def __init__(self, url: str):
        self.namespace = f"test-{secrets.token_hex(6)}"
        self.state = RedisState(url, self.namespace)
        self._redis: Any = redis.Redis.from_url(url)

    def keep(self, name: int, size: int = 1000, ttl: float = LONG, most: int = ROOM) -> bool:
        return self.state.keep_answer(_key(name), bytes(size), ttl, most)

    def has(self, *names: int) -> list[bool]:
        return [blob is not None for blob in self.state.answers([_key(name) for name in names])]

    def held(self) -> int:
        """As Redis counts them."""
        return int(self._redis.hget(f"{self.namespace}:answers:sizes", "") or 0)

    def names(self) -> set[str]:
        return {key.decode() for key in self._redis.scan_iter(f"{self.namespace}:*", count=10_000)}

    def lives(self) -> list[int]:
        return [self._redis.pttl(key) for key in self.names()]

    def consistent(self) -> bool:
        """What is known of the answers is what there is."""
        index = {name.decode() for name in self._redis.zrange(f"{self.namespace}:answers", 0, -1)}
        sizes = self._redis.hgetall(f"{self.namespace}:answers:sizes")
        total = int(sizes.pop(b"", 0))
        there = {key.rpartition(":")[2] for key in self.names() if ":answer:" in key}
        return (
            index == there == {name.decode() for name in sizes}
            and sum(map(int, sizes.values())) == total
        )

    def close(self) -> None:
        self.state.close()
        self._redis.close()


def _key(name: int) -> bytes:
    return name.to_bytes(32, "big")


@pytest.fixture
def shelf(stores: Stack) -> Iterator[Shelf]:
    made = Shelf(stores.env["TIDEGATE_REDIS_URL"])
    yield made
    made.close()


def test_an_answer_comes_back_with_the_time_it_has_left(shelf: Shelf) -> None:
    assert shelf.state.keep_answer(_key(1), b"answer", LONG, ROOM)
    found, missing = shelf.state.answers([_key(1), _key(2)])
    assert missing is None
    assert found
    assert found.data == b"answer"
    assert LONG - 60 < found.remaining <= LONG


def test_answers_together_stay_within_their_bytes_and_those_that_end_first_go(shelf: Shelf) -> None:
    for name in range(150):
        assert shelf.keep(name, ttl=LONG + name)
        assert shelf.held() <= ROOM
    assert shelf.has(*range(150)) == [False] * 50 + [True] * 100
    assert shelf.consistent()


def test_the_same_answer_again_takes_its_place_once(shelf: Shelf) -> None:
    for size in (1000, 10, 3000):
        assert shelf.keep(1, size)
        assert shelf.held() == size + ANSWER_OVERHEAD
    assert shelf.consistent()


def test_one_that_finds_no_room_is_not_kept(shelf: Shelf) -> None:
    assert not shelf.keep(1, size=ROOM)
    assert shelf.has(1) == [False]
    assert shelf.consistent()


def test_many_go_for_one_that_is_large_but_not_all_at_a_time(shelf: Shelf) -> None:
    for name in range(1000):
        shelf.keep(name, size=0, most=1000 * ANSWER_OVERHEAD)
    most = 1000 * ANSWER_OVERHEAD
    tries = [shelf.keep(5000, size=900 * ANSWER_OVERHEAD, most=most) for _ in range(4)]
    assert tries == [False, False, False, True]
    assert shelf.held() <= most
    assert shelf.consistent()


def test_what_is_over_leaves_nothing_behind(shelf: Shelf) -> None:
    for name in range(10):
        shelf.keep(name, ttl=0.05)
    threading.Event().wait(0.1)
    assert shelf.has(*range(10)) == [False] * 10
    # The last one's own notes may outlive it until somebody comes, or they end as well.
    assert shelf.keep(99)
    assert shelf.held() == 1000 + ANSWER_OVERHEAD
    assert shelf.consistent()


def test_every_key_ends(shelf: Shelf) -> None:
    shelf.keep(1, ttl=LONG)
    shelf.keep(2, ttl=5)
    shelf.keep(3, ttl=2 * LONG)
    assert len(shelf.names()) == 5
    assert all(0 < life <= 2 * LONG * 1000 for life in shelf.lives())


def test_a_redis_that_was_emptied_starts_anew(shelf: Shelf) -> None:
    shelf.keep(1)
    for key in shelf.names():
        shelf._redis.delete(key)
    assert shelf.keep(2)
    assert shelf.held() == 1000 + ANSWER_OVERHEAD


def test_many_ask_and_keep_at_one_time(stores: Stack, shelf: Shelf) -> None:
    state = RedisState(stores.env["TIDEGATE_REDIS_URL"], shelf.namespace)
    shared = SharedAnswers(state, PARTS * 2000 * 16, patience=30)
    wrong: list[int] = []

    def work(first: int) -> None:
        for name in range(first, first + 20):
            assert shared.put(_key(name), name.to_bytes(8, "big"), LONG)
            found = shared.get(_key(name), 30)
            # Looks go first: it may not have been kept yet.
            if found is not None and int.from_bytes(found.data, "big") != name:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(first * 20,)) for first in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    while not all(shared.get(_key(name), 30) for name in range(320)):
        threading.Event().wait(0.05)
    shared.stop()
    assert wrong == []
    assert shelf.consistent()
