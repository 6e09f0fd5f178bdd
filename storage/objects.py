"""The object store: inputs, outputs and files, by key.

One small interface, so that a directory (embedded stack) and any S3 are the same to callers.
Keys are made by us, never by a client: `/`-separated, each part `[A-Za-z0-9._-]`.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from stat import S_ISDIR
from typing import BinaryIO, Protocol

from config import Bucket, parse_objects
from errors import Gone, Unavailable
from storage import time_limit
from storage.time_limit import Limit

BLOCK = 1 << 20
RESUMES = 5
PAUSE = 0.02
"""Seconds, doubled with every stumble in a row."""
_NOTHING_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")


def check_key(key: str) -> str:
    """The key. Raises `ValueError` for one that we would never make."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"not an object key: {key!r}")
    return key


@dataclass(frozen=True, slots=True)
class Stored:
    """One object of a listing. `modified` is by the store's own clock, and aware."""

    key: str
    size: int
    modified: datetime


class ObjectStore(Protocol):
    """Safe to share between threads. Every method raises `Unavailable` where the store fails, and
    none waits for it without end; `DeadlineExceeded` where the time that `time_limit.within` gives
    it is over, before or in the middle. A put that fails in either way has stored all or nothing:
    the answer may be what was lost."""

    @property
    def cooperative(self) -> bool:
        """Waits on sockets only: under gevent other greenlets run meanwhile, and a connection must
        stay in the thread that made it. False: on a disk, for which no event loop can wait."""

    def put(self, key: str, data: bytes | Iterable[bytes]) -> int:
        """Store `data`; the number of bytes. Readers see all of it or nothing. Writing a key again
        replaces it. What goes wrong in an iterable is raised as it is, and nothing is stored."""

    def get(self, key: str) -> bytes:
        """All bytes. Raises `Gone` where there is no such key."""

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Bytes `start` to `end` (exclusive; None: to the last) in blocks; what lies behind the
        last byte is not there. Raises `Gone`, at once; `Unavailable`, in the middle too: what ends
        without an error is whole."""

    def size(self, key: str) -> int:
        """Number of bytes. Raises `Gone`."""

    def delete(self, key: str) -> None:
        """Forget the key; nothing happens where there is none."""

    def list(self, prefix: str = "", after: str = "") -> Iterator[Stored]:
        """Every object whose key starts with `prefix` and comes behind `after`, by key."""

    def clean(self, before: datetime) -> int:
        """Let go of what writers that died left half written, where its last sign of life is older
        than `before` by the store's clock; how much. Nobody has ever seen it."""

    def ping(self) -> None:
        """Raises `Unavailable` where the store can't be used."""


def open_store(url: str) -> ObjectStore:
    """The store of an objects URL. One that is away is waited for by each call, not by this one."""
    where = parse_objects(url)
    if isinstance(where, Bucket):
        # Loaded where it is used: it takes longer than everything else here.
        from storage.s3 import S3Store

        return S3Store(where)
    return DirectoryStore(where)


class DirectoryStore:
    """Objects as files below one folder. No call to a disk can be given up: time is looked at
    before each, and between the blocks of an object."""

    cooperative = False

    def __init__(self, root: Path):
        self._root = root
        # Where they lie until they are whole: never listed, and easily found when abandoned.
        self._parts = root / ".parts"
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unavailable(f"the object folder cannot be made: {error.strerror}") from error

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def put(self, key: str, data: bytes | Iterable[bytes]) -> int:
        path = self._path(key)
        limit = time_limit.current()
        limit.left()
        part = self._parts / secrets.token_hex(16)
        written = 0
        try:
            with _translated("write"):
                file = part.open("xb")
            with file:
                # Where the bytes come from may fail, too: that is not the store's failure.
                for block in (data,) if isinstance(data, bytes) else data:
                    limit.left()
                    with _translated("write"):
                        written += file.write(block)
                with _translated("write"):
                    file.flush()
                    # The ledger points here in a moment: this must outlive a power cut as well.
                    os.fsync(file.fileno())
            with _translated("write"):
                _move(part, path)
        finally:
            part.unlink(missing_ok=True)
        return written

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        path, limit = self._path(key), time_limit.current()
        limit.left()
        with _translated("read"), _gone():
            file = path.open("rb")
        return _blocks(file, start, end, limit)

    def size(self, key: str) -> int:
        path = self._path(key)
        time_limit.current().left()
        with _translated("read"), _gone():
            status = path.stat()
            if S_ISDIR(status.st_mode):
                raise IsADirectoryError
            return status.st_size

    def delete(self, key: str) -> None:
        path = self._path(key)
        time_limit.current().left()
        with _translated("delete"), suppress(*_NOTHING_THERE):
            path.unlink()
        # Folders are no objects: those that hold nothing any more would pile up.
        for folder in path.relative_to(self._root).parents[:-1]:
            try:
                (self._root / folder).rmdir()
            except OSError:
                break

    def list(self, prefix: str = "", after: str = "") -> Iterator[Stored]:
        with _translated("list"):
            yield from self._walk("", prefix, after)

    def _walk(self, folder: str, prefix: str, after: str) -> Iterator[Stored]:
        time_limit.current().left()
        try:
            with os.scandir(self._root / folder) as found:
                # A folder stands where its keys do: `a-b` comes before `a/b`, and both before `a0`.
                entries = sorted(
                    (f"{folder}{one.name}{'/' if one.is_dir() else ''}", one) for one in found
                )
        except FileNotFoundError:
            return  # Emptied meanwhile.
        for name, entry in entries:
            if entry.name.startswith("."):
                continue
            if not name.endswith("/"):
                if name.startswith(prefix) and name > after:
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue
                    modified = datetime.fromtimestamp(status.st_mtime, tz=UTC)
                    yield Stored(name, status.st_size, modified)
            elif (name.startswith(prefix) or prefix.startswith(name)) and (
                name > after or after.startswith(name)
            ):
                yield from self._walk(name, prefix, after)

    def clean(self, before: datetime) -> int:
        cleaned = 0
        with _translated("clean-up"):
            for part in self._parts.iterdir():
                try:
                    # A writer that lives has written to it lately.
                    if part.stat().st_mtime < before.timestamp():
                        part.unlink()
                        cleaned += 1
                except FileNotFoundError:
                    continue
        return cleaned

    def ping(self) -> None:
        if not os.access(self._parts, os.W_OK):
            raise Unavailable("the object store cannot be written")


def _move(part: Path, path: Path) -> None:
    for tries in reversed(range(100)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.replace(path)
            break
        except (FileNotFoundError, FileExistsError):
            # Somebody deleted the folder's last object, and with it the folder, just now.
            if not tries or not part.exists():
                raise
    with suppress(FileNotFoundError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _translated(verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"the object store refused a {verb}: {error.strerror}") from error


@contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except _NOTHING_THERE:
        raise Gone("the object is no longer kept") from None


def _blocks(file: BinaryIO, start: int, end: int | None, limit: Limit) -> Iterator[bytes]:
    with file:
        file.seek(start)
        left = end - start if end is not None else None
        while left is None or left > 0:
            limit.left()
            with _translated("read"):
                block = file.read(BLOCK if left is None else min(BLOCK, left))
            if not block:
                return
            if left is not None:
                left -= len(block)
            yield block


def steadily(
    store: ObjectStore, key: str, start: int = 0, end: int | None = None
) -> Iterator[bytes]:
    """`stream`, which goes on where it broke off when the store stumbles: what reads thousands of
    objects would else never get to the end of them. For keys that are written once."""
    stumbled = 0
    while True:
        try:
            for block in store.stream(key, start, end):
                yield block
                start += len(block)
                stumbled = 0
            return
        except Unavailable:
            stumbled += 1
            if stumbled > RESUMES:
                raise
            time.sleep(min(PAUSE * 2**stumbled, time_limit.current().left()))


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
