"""gunicorn's gevent worker, that neither waits for clients who only hold a connection when it stops
nor reads, piece by piece, bodies that nobody wants; those that are wanted it reads in one piece.
Where more is asked than can be done it holds requests back, and refuses what would be too late,
before it costs anything."""

from __future__ import annotations

import socket
import time
from types import FrameType, TracebackType
from typing import Any

import gevent
from gunicorn.workers.ggevent import GeventWorker

from web import gate
from web.bodies import WholeBody

FORGIVEN = 64 * 1024
"""Bytes of a refused body that are read to the end, so that its connection can go on."""
LINGER = 2.0
"""Seconds for the answer to a refused body to reach a client that is still sending."""


class DrainingWorker(GeventWorker):  # type: ignore[misc]
    """On SIGTERM requests in progress end and idle connections close at once.

    gunicorn's own would sit out the keep-alive time of every idle connection: a minute, with the
    clients of this gateway, who keep theirs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._idle: dict[Any, gevent.Timeout] = {}

    def load_wsgi(self) -> None:
        super().load_wsgi()
        # Not sooner: gunicorn reads this file before gevent has taken the place of what blocks, and
        # whatever of the product is read by then would block for good.
        from web.line import Line

        self._line = Line

    def timeout_ctx(self) -> _Idle:
        """Around the wait for a connection's next request."""
        return _Idle(self._idle, self.cfg.keepalive if self.alive else 0)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """One request, in its turn."""
        req.body = WholeBody(req.body.reader, sock)
        gate.arrived.set(time.monotonic())
        line = self._line.of(self.app.callable, req)
        if line is None:
            self._serve(listener_name, req, sock, addr)
            return
        try:
            refused = line.wait()
            if refused is None:
                self._serve(listener_name, req, sock, addr)
            else:
                self._refuse(refused, req, sock)
        finally:
            line.leave()

    def _serve(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """Its connection ends where most of a body was left unread."""
        try:
            super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            # The connection ends anyway.
            if _unread(req) > 0:
                _linger(sock)
            raise
        if _unread(req) > FORGIVEN:
            # gunicorn would read the rest in pieces of a few KiB, and nobody else would be served
            # meanwhile.
            _linger(sock)
            raise StopIteration

    def _refuse(self, answer: bytes, req: Any, sock: Any) -> None:
        """As the application would, at a fifth of the price."""
        sock.sendall(answer)
        # One that waits for leave to send its body may send it all the same, or may not.
        if _unread(req) > FORGIVEN or req._expected_100_continue or not self.alive:
            _linger(sock)
            raise StopIteration

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM."""
        super().handle_exit(sig, frame)
        gevent.get_hub().loop.run_callback(self._drain)

    def _drain(self) -> None:
        if self.app.callable is not None:
            # Those who wait for a job hear now that it goes on without them. In a greenlet: it
            # takes a lock, and the loop itself must not wait.
            gevent.spawn(self.app.callable.extensions["tidegate"].waiter.release)
        for waiting, timeout in list(self._idle.items()):
            # As if the keep-alive time were over. In the loop, and only while it is still idle: a
            # request that has come in is answered.
            if self._idle.get(waiting) is timeout:
                waiting.throw(timeout)


class _Idle:
    """A connection without a request, for so many seconds; then the wait is over, quietly."""

    __slots__ = ("_idle", "_timeout", "_waiting")

    def __init__(self, idle: dict[Any, gevent.Timeout], seconds: float):
        self._idle = idle
        self._timeout = gevent.Timeout(seconds, False)

    def __enter__(self) -> None:
        self._waiting = gevent.getcurrent()
        self._timeout.start()
        self._idle[self._waiting] = self._timeout

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> bool:
        del self._idle[self._waiting]
        self._timeout.close()
        return error is self._timeout


def _unread(req: Any) -> int:
    """Bytes of the body that nobody read: of a chunked one, any number."""
    reader = req.body.reader
    if hasattr(reader, "length"):
        return int(reader.length)
    return FORGIVEN + 1 if getattr(reader, "parser", None) is not None else 0


def _linger(sock: Any) -> None:
    """Let the answer reach a client that is still sending: closing a socket that receives would
    take the answer along. What comes is thrown away in large pieces, for a moment."""
    with gevent.Timeout(LINGER, False):
        sock.shutdown(socket.SHUT_WR)
        waste = bytearray(1 << 20)
        while sock.recv_into(waste):
            pass
