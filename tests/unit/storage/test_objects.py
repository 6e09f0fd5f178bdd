"""What only a directory does (the rest is in the contract), and cutting blocks into lines."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import Unavailable
from storage.objects import DirectoryStore, lines


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "objects")


def files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name != ".parts"
    )


def test_a_folder_goes_with_its_last_object(store: DirectoryStore, tmp_path: Path) -> None:
    for key in ("a/b/c", "a/b/d", "e"):
        store.put(key, b"1")
    store.delete("a/b/c")
    assert files(tmp_path / "objects") == ["a", "a/b", "a/b/d", "e"]
    store.delete("a/b/d")
    assert files(tmp_path / "objects") == ["e"]


def test_a_folder_may_go_while_somebody_writes_to_it(store: DirectoryStore) -> None:
    stop = threading.Event()
    failures: list[Exception] = []

    def churn() -> None:
        while not stop.is_set():
            try:
                store.put("a/b/c/churn", b"")
                store.delete("a/b/c/churn")
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    for n in range(100):
        store.put(f"a/b/c/{n}", b"kept")
        assert store.get(f"a/b/c/{n}") == b"kept"
        store.delete(f"a/b/c/{n}")
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_a_dead_writer_left_is_cleaned_and_what_a_living_one_writes_is_not(
    store: DirectoryStore, tmp_path: Path
) -> None:
    parts = tmp_path / "objects" / ".parts"
    now = datetime.now(UTC)
    (parts / "abandoned").write_bytes(b"half")
    os.utime(parts / "abandoned", ((now - timedelta(hours=2)).timestamp(),) * 2)

    def written() -> Iterator[bytes]:
        yield b"one"
        assert store.clean(now - timedelta(hours=1)) == 1
        assert len(list(parts.iterdir())) == 1
        yield b"two"

    store.put("x", written())
    assert store.get("x") == b"onetwo"
    assert list(parts.iterdir()) == []


def test_parts_and_hidden_files_are_not_listed(store: DirectoryStore, tmp_path: Path) -> None:
    store.put("a/b", b"")
    (tmp_path / "objects" / ".parts" / "part").write_bytes(b"")
    (tmp_path / "objects" / "a" / ".hidden").write_bytes(b"")
    assert [one.key for one in store.list()] == ["a/b"]


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Unavailable, match="cannot be made"):
        DirectoryStore(tmp_path / "file" / "objects")
    store = DirectoryStore(tmp_path / "objects")
    (tmp_path / "objects" / ".parts").rmdir()
    for ask in (store.ping, lambda: store.put("x", b"1")):
        with pytest.raises(Unavailable):
            ask()


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
