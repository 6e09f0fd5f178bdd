"""Work that would hold up every other request: files and compression, off the event loop."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import ParamSpec, TypeVar

import gevent
from gevent import monkey

from storage.objects import ObjectStore, Stored

P = ParamSpec("P")
T = TypeVar("T")


def offload(run: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`run(…)` in a real thread, where threads have been replaced by greenlets; else right here. It
    sees the caller's context, and with it the store's time limit. What it calls must not touch
    anything that belongs to the event loop: no socket, for one, since a pool would hand it to a
    thread whose loop is another."""
    if not monkey.is_module_patched("threading"):
        return run(*args, **kwargs)
    context = contextvars.copy_context()
    result: T = gevent.get_hub().threadpool.apply(context.run, (run, *args), kwargs)
    return result


def guarded(store: ObjectStore) -> ObjectStore:
    """The store as a gateway uses it: none of its calls holds up the event loop."""
    return store if store.cooperative else _Offloaded(store)


class _Offloaded:
    """A store on a disk, for which an event loop can't wait: every call goes to a thread."""

    cooperative = True

    def __init__(self, store: ObjectStore):
        self._store = store

    def put(self, key: str, data: bytes | Iterable[bytes]) -> int:
        return offload(self._store.put, key, data)

    def get(self, key: str) -> bytes:
        return offload(self._store.get, key)

    def stream(self, key: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        return _blocks(offload(self._store.stream, key, start, end))

    def size(self, key: str) -> int:
        return offload(self._store.size, key)

    def delete(self, key: str) -> None:
        offload(self._store.delete, key)

    def list(self, prefix: str = "", after: str = "") -> Iterator[Stored]:
        return iter(offload(list, self._store.list(prefix, after)))

    def clean(self, before: datetime) -> int:
        return offload(self._store.clean, before)

    def ping(self) -> None:
        offload(self._store.ping)


def _blocks(blocks: Iterator[bytes]) -> Iterator[bytes]:
    while (block := offload(next, blocks, None)) is not None:
        yield block
