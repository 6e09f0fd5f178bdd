"""The directory store, and cutting blocks into lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import Gone
from storage.objects import DirectoryStore, lines


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects")


def test_what_is_put_is_got(store: DirectoryStore) -> None:
    assert store.put("a/b/c.bin", b"12345") == 5
    assert (store.get("a/b/c.bin"), store.size("a/b/c.bin")) == (b"12345", 5)


def test_a_range_is_streamed_without_the_rest(store: DirectoryStore) -> None:
    store.put("x", [b"0123", b"4567", b"89"])
    assert b"".join(store.stream("x", 3, 8)) == b"34567"
    assert b"".join(store.stream("x", 8)) == b"89"


def test_a_put_that_fails_half_way_leaves_nothing(store: DirectoryStore, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.put("x", broken())
    with pytest.raises(Gone):
        store.get("x")
    assert list((tmp_path / "objects").iterdir()) == []


def test_a_missing_object_is_gone(store: DirectoryStore) -> None:
    for ask in (store.get, store.stream, store.size):
        with pytest.raises(Gone):
            ask("nothing")


def test_deleting_twice_is_deleting_once(store: DirectoryStore) -> None:
    store.put("x", b"1")
    store.delete("x")
    store.delete("x")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a b", ".hidden"])
def test_a_key_cannot_leave_the_store(store: DirectoryStore, key: str) -> None:
    with pytest.raises(ValueError, match="not an object key"):
        store.put(key, b"")


@given(st.binary(max_size=200).map(lambda b: b.replace(b"\r", b"\n")), st.lists(st.integers(1, 9)))
def test_lines_do_not_depend_on_where_the_blocks_end(text: bytes, cuts: list[int]) -> None:
    blocks, rest = [], text
    for cut in cuts:
        blocks.append(rest[:cut])
        rest = rest[cut:]
    found = list(lines([*blocks, rest], limit=1000))
    expected = text.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert [line for _, line in found] == expected
    assert all(text[at : at + len(line)] == line for at, line in found)


def test_an_endless_line_is_cut_and_its_neighbours_keep_their_place() -> None:
    text = b"one\n" + b"x" * 50_000 + b"\nthree"
    blocks = [text[at : at + 7] for at in range(0, len(text), 7)]
    found = list(lines(blocks, limit=10))
    assert found == [(0, b"one"), (4, b"x" * 11), (50_005, b"three")]
