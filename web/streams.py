"""A job's progress as server-sent events: each is the job as `GET` shows it, under its ETag.

A client that comes back with the last id it saw hears only of what is new. No event is a thing of
its own that could be missed: what counts is the job as it is now.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

from flask import Response, request

from errors import NotFound, Unavailable
from storage.lifecycle import JobState
from web import etags
from web.json import dumps
from web.waiting import JobWaiter

TYPE = "text/event-stream"
PARAMETER: dict[str, Any] = {
    "in": "header",
    "name": "Last-Event-ID",
    "schema": {"type": "string"},
    "description": "The id of the last event seen: it is not sent again.",
}
RESPONSE: dict[str, Any] = {
    "content_type": TYPE,
    "schema": {"type": "string"},
    "description": "`event: status` with the job, each time it has changed; at last `event: end`.",
}
"""Both as OpenAPI says them."""

RETRY = 2000
"""Milliseconds after which a browser asks again when its stream has ended."""
PING = 15.0
"""Seconds of silence, at most: proxies and clients think the quiet dead."""
LOOK = 5.0
"""Seconds between two looks at a job's place in the queue."""
AGAIN = 1.0
"""Seconds between two looks while Postgres is away."""
LONGEST = 300.0
"""Seconds after which a stream ends, for the client to come back: perhaps to another gateway."""

Look = Callable[[], dict[str, Any]]
"""Shows the job as it is now. Raises `NotFound`, `Unavailable`."""


class Streams:
    """The streams of one gateway process: so many at a time, and of one tenant so many."""

    def __init__(self, most: int, most_each: int):
        self._most = most
        self._most_each = most_each
        self._open: dict[object, UUID] = {}
        self._lock = threading.Lock()

    def enter(self, tenant: UUID) -> Callable[[], None]:
        """Take a place: what to call when the stream is over, once or more. Raises
        `Unavailable`."""
        place = object()
        with self._lock:
            if len(self._open) >= self._most:
                raise Unavailable("this gateway serves no more event streams", retry_after=5)
            if sum(holder == tenant for holder in self._open.values()) >= self._most_each:
                raise Unavailable(f"more than {self._most_each} event streams", retry_after=5)
            self._open[place] = tenant
        return lambda: self._leave(place)

    def _leave(self, place: object) -> None:
        with self._lock:
            self._open.pop(place, None)


def respond(
    streams: Streams, waiter: JobWaiter, tenant: UUID, job_id: UUID, look: Look
) -> Response:
    """The stream of one job, from where the client last heard of it. Raises `NotFound` and
    `Unavailable` as long as nothing has been sent."""
    look()
    leave = streams.enter(tenant)
    seen = request.headers.get("Last-Event-ID", "")
    response = Response(
        stream(waiter, job_id, look, seen),
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        content_type=TYPE,
    )
    # Also where the stream was never begun.
    response.call_on_close(leave)
    return response


def stream(waiter: JobWaiter, job_id: UUID, look: Look, seen: str = "") -> Iterator[bytes]:
    """The events; `seen` is the id of the last one the client had."""
    with waiter.watch(job_id) as watch:
        yield b"retry: %d\n\n" % RETRY
        spoken = time.monotonic()
        over_at = spoken + LONGEST
        while True:
            pause = AGAIN
            try:
                job = look()
            except Unavailable:
                # The client knows what we know. It hears more when there is more.
                pass
            except NotFound:
                return  # Retention took it. Who asks again is told so.
            else:
                body = dumps(job)
                if (name := etags.tag(body)) != seen:
                    yield b"event: status\nid: %b\ndata: %b\n\n" % (name.encode(), body)
                    seen, spoken = name, time.monotonic()
                if JobState(job["status"]).terminal:
                    yield b"event: end\ndata: {}\n\n"
                    return
                pause = LOOK if job["status"] == JobState.QUEUED else PING
            if time.monotonic() - spoken >= PING:
                yield b": still here\n\n"
                spoken = time.monotonic()
            now = time.monotonic()
            watch.wait(max(0.0, min(pause, spoken + PING - now, over_at - now)))
            if watch.released or time.monotonic() >= over_at:
                return
