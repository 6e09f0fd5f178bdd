"""A request's body, received in one piece: the tensors in it are slices of that piece."""

from __future__ import annotations

from typing import Any

import numpy as np
from gunicorn.http.body import Body, LengthReader


class WholeBody(Body):  # type: ignore[misc]
    """gunicorn's body, which otherwise copies what it receives several times over."""

    def __init__(self, reader: Any, sock: Any):
        super().__init__(reader)
        self._sock = sock

    def whole(self) -> memoryview | None:
        """All of a body whose length was announced and of which nothing was read yet; None of
        another. Shorter where the client went away."""
        if not isinstance(self.reader, LengthReader) or self.buf.tell():
            return None
        # Not zeroed: what is announced takes memory only once it comes.
        view = np.empty(self.reader.length, np.uint8).data
        try:
            at = self._early(view)
            while at < len(view) and (size := self._sock.recv_into(view[at:])):
                at += size
                self.reader.length -= size
        except BaseException:
            # Where the next request begins is unknown.
            self.failed = True
            raise
        return view[:at]

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
