"""One suite for every object store: a directory, S3 as moto serves it, and the S3 that
TIDEGATE_TEST_S3_URL names (an objects URL with keys that may make buckets)."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from errors import DeadlineExceeded, Gone, Unavailable
from storage.objects import BLOCK, ObjectStore, open_store
from storage.s3 import PART
from storage.time_limit import within
from tests.conftest import S3Server

MIB = 1 << 20


ELSEWHERE = os.environ.get("TIDEGATE_TEST_S3_URL", "")


@pytest.fixture(scope="module", params=["directory", "moto", *(["elsewhere"] if ELSEWHERE else [])])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    if request.param == "directory":
        return open_store((tmp_path_factory.mktemp("store") / "objects").as_uri())
    return open_store(request.getfixturevalue("s3").url() if request.param == "moto" else ELSEWHERE)


@pytest.mark.skipif(not ELSEWHERE, reason="TIDEGATE_TEST_S3_URL names no S3 to test, too")
def test_the_s3_of_the_environment_is_tested_too(opened: ObjectStore) -> None:
    opened.ping()


class _Below:
    """The part of a store below one folder of a test's own. Keys go in and come out without it."""

    def __init__(self, store: ObjectStore, folder: str):
        self.store = store
        self.folder = folder

    def __call__(self, key: str) -> str:
        return f"{self.folder}/{key}"

    def listed(self, prefix: str = "", after: str = "") -> list[str]:
        found = self.store.list(self(prefix), self(after) if after else "")
        return [one.key.removeprefix(f"{self.folder}/") for one in found]


@pytest.fixture
def store(opened: ObjectStore) -> ObjectStore:
    return opened


@pytest.fixture
def below(opened: ObjectStore) -> Iterator[_Below]:
    found = _Below(opened, f"t{secrets.token_hex(8)}")
    yield found
    for key in found.listed():
        opened.delete(found(key))


def blocks(size: int, block: int = 300_000) -> Iterator[bytes]:
    """So many bytes that tell where they stand."""
    whole = pattern(size)
    for at in range(0, size, block):
        yield whole[at : at + block]


def pattern(size: int) -> bytes:
    return b"".join(n.to_bytes(4, "big") for n in range(size // 4 + 1))[:size]


# Put and get


def test_what_is_put_is_got(store: ObjectStore, below: _Below) -> None:
    key = below("a/b/c.bin")
    assert store.put(key, b"12345") == 5
    assert (store.get(key), store.size(key)) == (b"12345", 5)


@pytest.mark.parametrize(
    "size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PART - 1, PART, PART + 1, 2 * PART]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_every_size_comes_back_whole(
    store: ObjectStore, below: _Below, size: int, streamed: bool
) -> None:
    key = below("x")
    assert store.put(key, blocks(size) if streamed else pattern(size)) == size
    assert store.size(key) == size
    found = list(store.stream(key))
    assert b"".join(found) == pattern(size)
    assert all(len(block) <= BLOCK for block in found)


def test_empty_blocks_do_not_end_a_stream(store: ObjectStore, below: _Below) -> None:
    assert store.put(below("x"), [b"", b"a", b"", b"", b"b", b""]) == 2
    assert store.get(below("x")) == b"ab"


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [
        (0, None, b"0123456789"),
        (3, 8, b"34567"),
        (8, None, b"89"),
        (0, 1, b"0"),
        (9, 10, b"9"),
        (4, 1000, b"456789"),
        (10, None, b""),
        (10, 20, b""),
        (1000, None, b""),
        (3, 3, b""),
        (5, 3, b""),
    ],
)
def test_a_range_is_streamed_without_the_rest(
    store: ObjectStore, below: _Below, start: int, end: int | None, found: bytes
) -> None:
    store.put(below("x"), [b"0123", b"4567", b"89"])
    assert b"".join(store.stream(below("x"), start, end)) == found


def test_nothing_lies_in_any_range_of_an_empty_object(store: ObjectStore, below: _Below) -> None:
    store.put(below("x"), b"")
    assert list(store.stream(below("x"), 0, 10)) == []
    assert list(store.stream(below("x"))) == []


def test_ranges_join_to_the_whole(store: ObjectStore, below: _Below) -> None:
    size = PART + BLOCK + 17
    store.put(below("x"), blocks(size))
    cuts = [0, 1, BLOCK, BLOCK + 1, PART - 1, PART, PART + 5, size]
    parts = (store.stream(below("x"), a, b) for a, b in pairwise(cuts))
    assert b"".join(block for part in parts for block in part) == pattern(size)


def test_a_key_written_again_has_the_new_bytes(store: ObjectStore, below: _Below) -> None:
    store.put(below("x"), b"a long first version")
    store.put(below("x"), b"short")
    assert store.get(below("x")) == b"short"


def test_a_reader_sees_one_version_of_a_key_many_write(store: ObjectStore, below: _Below) -> None:
    versions = [bytes([n]) * 200_000 for n in range(6)]
    store.put(below("x"), versions[0])
    failures: list[object] = []

    def write(version: bytes) -> None:
        try:
            store.put(below("x"), (version[at : at + 50_000] for at in range(0, 200_000, 50_000)))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(version,)) for version in versions]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert store.get(below("x")) in versions
    for thread in threads:
        thread.join()
    assert failures == []
    assert store.get(below("x")) in versions


def test_a_reader_that_stops_early_costs_nobody_anything(store: ObjectStore, below: _Below) -> None:
    store.put(below("x"), blocks(3 * MIB))
    for _ in range(100):
        reader = store.stream(below("x"))
        next(reader)
        del reader
    assert store.size(below("x")) == 3 * MIB


# What fails


@pytest.mark.parametrize("before", [0, 1, 2 * PART + 1], ids=["at once", "early", "late"])
def test_a_put_whose_bytes_fail_half_way_leaves_nothing(
    store: ObjectStore, below: _Below, before: int
) -> None:
    def broken() -> Iterator[bytes]:
        yield from blocks(before)
        raise ConnectionError("the client left")

    with pytest.raises(ConnectionError, match="the client left"):
        store.put(below("x"), broken())
    with pytest.raises(Gone):
        store.get(below("x"))
    assert below.listed() == []
    assert store.clean(datetime.now(UTC) + timedelta(days=2)) == 0


def test_a_put_whose_bytes_fail_leaves_the_version_before(
    store: ObjectStore, below: _Below
) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise Unavailable("where they come from is away")

    store.put(below("x"), b"whole")
    with pytest.raises(Unavailable, match="where they come from"):
        store.put(below("x"), broken())
    assert store.get(below("x")) == b"whole"


def test_a_missing_object_is_gone_at_once(store: ObjectStore, below: _Below) -> None:
    store.put(below("a/b"), b"1")
    asks: list[Callable[[str], object]] = [
        store.get,
        store.stream,
        store.size,
        lambda key: store.stream(key, 3, 5),
        lambda key: store.stream(key, 5, 5),
    ]
    for key in ("nothing", "a", "a/b/c", "a/bc"):
        for ask in asks:
            with pytest.raises(Gone):
                ask(below(key))


def test_a_deleted_object_is_gone_and_deleting_twice_is_deleting_once(
    store: ObjectStore, below: _Below
) -> None:
    for key in ("x", "y"):
        store.put(below(key), b"1")
    store.delete(below("x"))
    store.delete(below("x"))
    store.delete(below("never/there"))
    with pytest.raises(Gone):
        store.get(below("x"))
    assert below.listed() == ["y"]


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../b",
        "a//b",
        "a/",
        "a b",
        ".hidden",
        "a/.b",
        "ä",
        "a\n",
        "a\0",
    ],
)
def test_a_key_we_would_never_make_is_refused(store: ObjectStore, key: str) -> None:
    asks: list[Callable[[], object]] = [
        lambda: store.put(key, b""),
        lambda: store.get(key),
        lambda: store.stream(key),
        lambda: store.size(key),
        lambda: store.delete(key),
    ]
    for ask in asks:
        with pytest.raises(ValueError, match="not an object key"):
            ask()


@pytest.mark.parametrize("key", ["-", "_", "a..b", "a.", "-a_b.c/D-9_/0..", "x" * 200])
def test_an_odd_key_is_a_key_like_any_other(store: ObjectStore, below: _Below, key: str) -> None:
    store.put(below(key), key.encode())
    assert store.get(below(key)) == key.encode()
    assert below.listed() == [key]


# Calls that have so much time


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_nothing_is_begun_when_the_time_is_over(store: ObjectStore, below: _Below) -> None:
    store.put(below("x"), b"1")
    asks: list[Callable[[], object]] = [
        lambda: store.put(below("x"), b"2"),
        lambda: store.put(below("y"), b"2"),
        lambda: store.get(below("x")),
        lambda: store.stream(below("x")),
        lambda: store.stream(below("x"), 1, 1),
        lambda: store.size(below("x")),
        lambda: store.delete(below("x")),
        below.listed,
    ]
    for ask in asks:
        with within(0), pytest.raises(DeadlineExceeded):
            ask()
    assert below.listed() == ["x"]
    assert store.get(below("x")) == b"1"


def test_a_call_with_time_enough_is_like_any_other(store: ObjectStore, below: _Below) -> None:
    with within(600):
        store.put(below("x"), blocks(PART + 1))
        assert store.get(below("x")) == pattern(PART + 1)
        assert below.listed() == ["x"]
        store.delete(below("x"))
        with pytest.raises(Gone):
            store.get(below("x"))


def test_a_stream_breaks_off_when_its_time_is_over(store: ObjectStore, below: _Below) -> None:
    clock = Clock()
    store.put(below("x"), blocks(3 * BLOCK))
    with within(5, clock):
        reader = store.stream(below("x"))
    # Whoever reads it has no limit of his own.
    assert next(reader) == pattern(BLOCK)
    clock.now = 5
    with pytest.raises(DeadlineExceeded):
        list(reader)


@pytest.mark.parametrize("size", [BLOCK, 2 * PART])
def test_a_put_whose_time_ends_half_way_leaves_nothing(
    store: ObjectStore, below: _Below, size: int
) -> None:
    clock = Clock()

    def slow() -> Iterator[bytes]:
        yield from blocks(size)
        clock.now = 5
        yield b"late"

    with within(5, clock), pytest.raises(DeadlineExceeded):
        store.put(below("x"), slow())
    assert below.listed() == []
    # What has arrived of it is rubbish like any other.
    store.clean(datetime.now(UTC) + timedelta(days=2))
    assert store.clean(datetime.now(UTC) + timedelta(days=2)) == 0


# Lists


def test_a_list_says_what_there_is_and_since_when(store: ObjectStore, below: _Below) -> None:
    store.put(below("first"), b"1234")
    store.put(below("second/third"), b"")
    first, third = store.list(f"{below.folder}/")
    assert (first.key, first.size) == (below("first"), 4)
    assert (third.key, third.size) == (below("second/third"), 0)
    assert first.modified.utcoffset() is not None
    assert abs(third.modified - first.modified) < timedelta(minutes=5)


KEYS = ["a", "a-b", "a.b/c", "a0", "aa/b", "aa/b-c", "aa/b0/c", "aa-", "b/B", "b/a", "b/a-/x"]


def test_a_list_is_in_the_order_of_its_keys(store: ObjectStore, below: _Below) -> None:
    for key in KEYS:
        store.put(below(key), b"")
    assert below.listed() == sorted(KEYS)
    for at, key in enumerate(sorted(KEYS)):
        assert below.listed(after=key) == sorted(KEYS)[at + 1 :]
    # Behind what is no key, too.
    for after in ("a/", "aa/b/", "b", "aa/b-", "z"):
        assert below.listed(after=after) == sorted(key for key in KEYS if key > after)
    for prefix in ("a", "aa/", "aa/b", "b/a", "c", "a."):
        assert below.listed(prefix) == sorted(key for key in KEYS if key.startswith(prefix))
    assert below.listed("aa", after="aa/b") == ["aa/b-c", "aa/b0/c"]


def test_a_long_list_has_no_gap(store: ObjectStore, below: _Below) -> None:
    keys = [f"{n % 7}/{n:05}" for n in range(1100)]
    for key in keys:
        store.put(below(key), b"")
    assert below.listed() == sorted(keys)


# The server


def test_a_store_that_is_there_answers(store: ObjectStore) -> None:
    store.ping()


def test_a_store_can_be_opened_by_many_at_once(s3: S3Server, tmp_path: Path) -> None:
    for url in (s3.url(), (tmp_path / "objects").as_uri()):
        failures: list[object] = []

        def use(name: str, url: str = url, failures: list[object] = failures) -> None:
            try:
                open_store(url).put(name, b"1")
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=use, args=(f"n{n}",)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(list(open_store(url).list())) == 8
