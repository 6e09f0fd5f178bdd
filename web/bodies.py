"""A request's body, received in one piece: the tensors in it are slices of that piece."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gevent
import numpy as np
from gunicorn.http.body import Body, LengthReader
from gunicorn.http.errors import ParseException

from errors import BadBody, Overloaded

SMALL = 64 * 1024
"""Bytes of a body that nobody counts."""


class Memory:
    """What the bodies that one process has received, or is receiving, take together."""

    def __init__(self, most: int):
        self._most = most
        self._taken = 0

    def take(self, size: int) -> None:
        """Raises `Overloaded` where others have taken too much for that."""
        # Greenlets don't interrupt each other here.
        if self._taken and self._taken + size > self._most:
            raise Overloaded("the gateway is receiving all it has memory for", retry_after=1)
        self._taken += size

    def give(self, size: int) -> None:
        """No longer needed."""
        self._taken -= size


MEMORY = Memory(512 << 20)


class WholeBody(Body):  # type: ignore[misc]
    """gunicorn's body, which otherwise copies what it receives several times over, and has no word
    for a client who sends what is no body: here that is `BadBody`."""

    def __init__(self, reader: Any, sock: Any, memory: Memory = MEMORY):
        super().__init__(reader)
        self._sock = sock
        self._memory = memory
        self._came = self._taken = 0
        self._until: float | None = None

    @property
    def unread(self) -> int:
        """Bytes of it that nobody read: of a chunked one, any number."""
        if hasattr(self.reader, "length"):
            return int(self.reader.length)
        return SMALL + 1 if getattr(self.reader, "parser", None) is not None else 0

    def within(self, seconds: float) -> None:
        """It is to be held in memory, and to be there in so many seconds: what is read from here on
        raises `BadBody` where it is not, and `Overloaded` where too much is held already."""
        self._until = time.monotonic() + seconds

    def whole(self) -> memoryview | None:
        """All of a body whose length was announced and of which nothing was read yet; None of
        another. Shorter where the client went away. See `within`."""
        if not isinstance(self.reader, LengthReader) or self.buf.tell():
            return None
        length = self.reader.length
        if length > SMALL:
            self._take(length)
        # Not zeroed: what is announced takes memory only once it comes.
        view = np.empty(length, np.uint8).data
        at = self._early(view)
        if at < length:
            with self._receiving():
                while at < length and (size := self._sock.recv_into(view[at:])):
                    at += size
                    self.reader.length -= size
        return view[:at]

    def release(self) -> None:
        """The request is over."""
        self._memory.give(self._taken)
        self._taken = 0

    def _early(self, view: memoryview) -> int:
        """What came along with the head of the request."""
        unreader = self.reader.unreader
        early = unreader.take_buffered()
        if len(early) > len(view):
            unreader.unread(early[len(view) :])
            early = early[: len(view)]
        view[: len(early)] = early
        self.reader.length -= len(early)
        return len(early)

    def _read_reader(self, size: int) -> bytes:
        with self._receiving():
            data: bytes = self.reader.read(size)
        # A body without a length shows only now what it takes.
        self._came += len(data)
        if self._until is not None and self._came > max(SMALL, self._taken):
            self._take(self._came - self._taken)
        return data

    def _take(self, size: int) -> None:
        self._memory.take(size)
        self._taken += size

    @contextmanager
    def _receiving(self) -> Iterator[None]:
        left = None if self._until is None else max(0.001, self._until - time.monotonic())
        late = gevent.Timeout(left)
        try:
            with late:
                yield
        except BaseException as error:
            # Where the next request begins is unknown.
            self.failed = True
            if error is late:
                raise BadBody("the body was not there in time") from None
            if isinstance(error, (OSError, ParseException)):
                raise BadBody("the body could not be received to its end") from error
            raise
