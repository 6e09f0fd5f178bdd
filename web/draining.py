"""gunicorn's gevent worker, stopping without waiting for clients that only hold a connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import gevent
from gunicorn.workers.ggevent import GeventWorker


class DrainingWorker(GeventWorker):  # type: ignore[misc]
    """On SIGTERM requests in progress end and idle connections close at once.

    gunicorn's own would sit out the keep-alive time of every idle connection: a minute, with the
    clients of this gateway, who keep theirs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._idle: dict[Any, gevent.Timeout] = {}

    @contextmanager
    def timeout_ctx(self) -> Iterator[None]:
        """Around the wait for a connection's next request."""
        waiting = gevent.getcurrent()
        with gevent.Timeout(self.cfg.keepalive if self.alive else 0, False) as timeout:
            self._idle[waiting] = timeout
            try:
                yield
            finally:
                del self._idle[waiting]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM."""
        super().handle_exit(sig, frame)
        for waiting, timeout in list(self._idle.items()):
            # As if the keep-alive time were over: thrown from the loop, where that comes from.
            gevent.get_hub().loop.run_callback(waiting.throw, timeout)
