"""Looks into Redis: shared round trips, and never in a request's way."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from errors import Unavailable
from storage.redis_state import Blob
from web.answers import MAX_BYTES, MOST, PARTS, SharedAnswers


class Store:
    """Stands in for Redis: answers when told to."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Blob] = {}
        self.rounds: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Semaphore(0)
        self.down = False

    def answers(self, keys: list[bytes]) -> list[Blob | None]:
        self._wait()
        self.rounds.append(len(keys))
        return [self.kept.get(key) for key in keys]

    def keep_answer(self, key: bytes, data: bytes, ttl: float, _most: int) -> bool:
        self._wait()
        self.kept[key] = Blob(data, ttl)
        return True

    def _wait(self) -> None:
        self.entered.release()
        assert self.open.wait(10)
        if self.down:
            raise Unavailable("down")

    def close(self) -> None:
        pass


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shared(store: Store, clock: Clock) -> Iterator[SharedAnswers]:
    made = SharedAnswers(store, 1 << 30, patience=10, clock=clock)  # type: ignore[arg-type]
    yield made
    store.open.set()
    made.stop()


def wait_for_keys(store: Store, count: int) -> None:
    for _ in range(1000):
        if len(store.kept) == count:
            return
        threading.Event().wait(0.01)
    pytest.fail(f"{len(store.kept)} are kept")


def test_looks_that_come_while_one_is_under_way_go_together(
    store: Store, shared: SharedAnswers
) -> None:
    store.kept = {bytes([n]): Blob(bytes([n]), 60) for n in range(20)}
    store.open.clear()
    with ThreadPoolExecutor(40) as pool:
        first = pool.submit(shared.get, b"?", 10)
        assert store.entered.acquire(timeout=10)
        others = [pool.submit(shared.get, bytes([n]), 10) for n in range(40)]
        while len(shared._asked) < 39:  # the pool has 40 threads, and one of them waits already
            threading.Event().wait(0.01)
        store.open.set()
        assert first.result(10) is None
        found = [other.result(10) for other in others]
    assert [blob.data if blob else None for blob in found] == [
        *(bytes([n]) for n in range(20)),
        *[None] * 20,
    ]
    assert store.rounds[:3] == [1, MOST, MOST]


def test_who_looks_waits_no_longer_than_it_may(store: Store, shared: SharedAnswers) -> None:
    store.open.clear()
    store.kept[b"k"] = Blob(b"late", 60)
    assert shared.get(b"k", 0.05) is None


def test_what_is_given_is_kept_behind_the_answer(store: Store, shared: SharedAnswers) -> None:
    store.open.clear()
    assert shared.put(b"k", b"data", 60)
    assert store.kept == {}
    store.open.set()
    wait_for_keys(store, 1)
    assert store.kept[b"k"] == Blob(b"data", 60)


def test_what_has_ended_before_its_turn_is_not_kept(
    store: Store, shared: SharedAnswers, clock: Clock
) -> None:
    store.open.clear()
    shared.put(b"first", b"", 60)
    assert store.entered.acquire(timeout=10)
    shared.put(b"short", b"", 1)
    shared.put(b"long", b"", 60)
    clock.now += 2
    store.open.set()
    wait_for_keys(store, 2)
    assert set(store.kept) == {b"first", b"long"}
    assert store.kept[b"long"].remaining == 58


def test_what_waits_to_be_kept_is_bounded(store: Store, shared: SharedAnswers) -> None:
    store.open.clear()
    part = bytes(MAX_BYTES // 4)
    shared.put(b"0", b"", 60)
    assert store.entered.acquire(timeout=10)
    assert [shared.put(bytes([n]), part, 60) for n in range(6)] == [True] * 4 + [False] * 2
    store.open.set()
    wait_for_keys(store, 5)
    assert shared.put(b"again", part, 60)


def test_one_that_is_too_large_is_refused() -> None:
    shared = SharedAnswers(Store(), 1600)  # type: ignore[arg-type]
    assert not shared.put(b"k", bytes(1600 // PARTS + 1), 60)
    shared.stop()


def test_after_a_failure_redis_is_left_alone_for_a_moment(
    store: Store, shared: SharedAnswers, clock: Clock
) -> None:
    store.down = True
    assert shared.get(b"k", 10) is None
    store.down = False
    assert shared.get(b"k", 10) is None
    assert not shared.put(b"k", b"data", 60)
    assert store.rounds == []
    clock.now += 2
    assert shared.put(b"k", b"data", 60)
    wait_for_keys(store, 1)
    assert shared.get(b"k", 10) == Blob(b"data", 60)


def test_a_stopped_one_answers_at_once(store: Store, shared: SharedAnswers) -> None:
    shared.get(b"k", 10)
    shared.stop()
    assert shared.get(b"k", 10) is None
    assert not shared.put(b"k", b"", 60)
