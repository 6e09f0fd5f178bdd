"""The object store: inputs, outputs and files, by key.

One small interface, so that a directory (embedded stack) and any S3 are the same to callers.
Keys are made by us, never by a client: `/`-separated, each part `[A-Za-z0-9._-]`.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from errors import Gone, Unavailable

BLOCK = 1 << 20
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


class ObjectStore(Protocol):
    """Safe to share between threads. Every method raises `Unavailable` where the store fails."""

    def put(self, key: str, data: bytes | Iterable[bytes]) -> int:
        """Store `data`; the number of bytes. Readers see all of it or nothing. Writing a key again
        replaces it."""

    def get(self, key: str) -> bytes:
        """All bytes. Raises `Gone` where there is no such key."""

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive; None: to the last) in blocks. Raises `Gone`."""

    def size(self, key: str) -> int:
        """Number of bytes. Raises `Gone`."""

    def delete(self, key: str) -> None:
        """Forget the key; nothing happens where there is none."""

    def ping(self) -> None:
        """Raises `Unavailable` where nothing can be written."""


class DirectoryStore:
    """Objects as files below one folder."""

    def __init__(self, root: Path):
        self._root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"the object folder cannot be made: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise ValueError(f"not an object key: {key!r}")
        return self._root / key

    def put(self, key: str, data: bytes | Iterable[bytes]) -> int:
        path = self._path(key)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        with _translated("write"):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = part.open("xb")
        written = 0
        try:
            with file:
                # Where the bytes come from may fail, too: that is not the store's failure.
                for block in (data,) if isinstance(data, bytes) else data:
                    with _translated("write"):
                        written += file.write(block)
                with _translated("write"):
                    file.flush()
                    # The ledger points here in a moment: this must outlive a power cut as well.
                    os.fsync(file.fileno())
                    part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return written

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        with _translated("read"):
            file = self._path(key).open("rb")
        return _blocks(file, start, end)

    def size(self, key: str) -> int:
        with _translated("read"):
            return self._path(key).stat().st_size

    def delete(self, key: str) -> None:
        with _translated("delete"):
            self._path(key).unlink(missing_ok=True)

    def ping(self) -> None:
        if not os.access(self._root, os.W_OK):
            raise Unavailable("the object store cannot be written")


@contextmanager
def _translated(verb: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise Gone("the object is no longer kept") from None
    except OSError as error:
        raise Unavailable(f"the object store refused a {verb}: {error.strerror}") from error


def _blocks(file: BinaryIO, start: int, end: int | None) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = end - start if end is not None else None
        while left is None or left > 0:
            block = file.read(BLOCK if left is None else min(BLOCK, left))
            if not block:
                return
            if left is not None:
                left -= len(block)
            yield block


def lines(blocks: Iterable[bytes], limit: int) -> Iterator[tuple[int, bytes]]:
    """Split blocks into lines: pairs of the line's first byte's offset and the line without `\\n`.

    A line longer than `limit` bytes comes cut to `limit + 1`, so that the caller can tell and
    memory stays bounded. A last line without an end counts; an empty one after the last `\\n`
    does not.
    """
    offset = 0
    kept: list[bytes] = []
    length = 0
    for block in blocks:
        *ends, rest = block.split(b"\n")
        for end in ends:
            line = b"".join((*kept, end)) if kept else end
            yield offset, line[: limit + 1]
            offset += length + len(end) + 1
            kept, length = [], 0
        if rest:
            if length <= limit:
                kept.append(rest)
            length += len(rest)
    if length:
        yield offset, b"".join(kept)[: limit + 1]
