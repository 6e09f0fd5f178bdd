"""An object store that fails by chance, in the ways that S3 does."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime

from errors import Unavailable
from storage.objects import ObjectStore, Stored


class FaultyStore:
    """A store of which every call may fail: before it did anything, after it did everything (the
    answer was lost), or in the middle of what is read. `faults` counts what happened."""

    cooperative = False

    def __init__(self, store: ObjectStore, *, rate: float, seed: int):
        self._store = store
        self._rate = rate
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self.faults: Counter[str] = Counter()

    def _struck(self, what: str) -> bool:
        with self._lock:
            if self._chance.random() >= self._rate:
                return False
            self.faults[what] += 1
            return True

    def _fail(self, what: str) -> None:
        if self._struck(what):
            raise Unavailable(f"SlowDown: {what}")

    def put(self, key: str, data: bytes | Iterable[bytes]) -> int:
        self._fail("put")
        size = self._store.put(key, data)
        self._fail("put, after success")
        return size

    def get(self, key: str) -> bytes:
        return b"".join(self.stream(key))

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        self._fail("read")
        return self._blocks(self._store.stream(key, start, end))

    def _blocks(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            if self._struck("read, cut short"):
                yield block[: len(block) // 2]
                raise Unavailable("the object store ended in the middle of an object")
            yield block

    def size(self, key: str) -> int:
        self._fail("size")
        return self._store.size(key)

    def delete(self, key: str) -> None:
        self._fail("delete")
        self._store.delete(key)
        self._fail("delete, after success")

    def list(self, prefix: str = "", after: str = "") -> Iterator[Stored]:
        for one in self._store.list(prefix, after):
            self._fail("list")
            yield one

    def clean(self, before: datetime) -> int:
        self._fail("clean")
        return self._store.clean(before)

    def ping(self) -> None:
        self._fail("ping")
        self._store.ping()
