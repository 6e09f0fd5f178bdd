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
from web.bodies import SMALL, WholeBody

FORGIVEN = SMALL
"""Bytes of a refused body that are read to the end, so that its connection can go on."""
LINGER = 2.0
"""Seconds for the answer to a refused body to reach a client that is still sending."""


class DrainingWorker(GeventWorker):  # type: ignore[misc]
    """On SIGTERM requests in progress end and idle connections close at once.

    gunicorn's own would sit out the keep-alive time of every idle connection: a minute, with the
    clients of this gateway, who keep theirs.
    """

    wsgi: Any

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._idle: dict[Any, gevent.Timeout] = {}

    def load_wsgi(self) -> None:
        super().load_wsgi()
        # Not sooner: gunicorn reads this file before gevent has taken the place of what blocks, and
        # whatever of the product is read by then would block for good.
        from web.line import Line

        self._line = Line
        self.wsgi = _Honest(self.wsgi)

    def timeout_ctx(self) -> _Idle:
        """Around the wait for a connection's next request."""
        return _Idle(self._idle, self.cfg.keepalive if self.alive else 0)

    def handle_request(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """One request, in its turn."""
        req.body = WholeBody(req.body.reader, sock)
        gate.arrived.set(time.monotonic())
        gate.place.set(None)
        try:
            self._in_turn(listener_name, req, sock, addr)
        finally:
            req.body.release()

    def _in_turn(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        line = self._line.of(self.app.callable, req)
        if line is None:
            self._serve(listener_name, req, sock, addr)
            return
        try:
            refused = line.wait()
            if refused is None:
                self._serve(listener_name, req, sock, addr)
            else:
                # One that waits for leave to send its body may send it all the same, or may not.
                close = req.body.unread > FORGIVEN or req._expected_100_continue or not self.alive
                ends = close or req.should_close() or not self.cfg.keepalive
                sock.sendall(line.refusal(refused, close=ends))
                if close:
                    _linger(sock)
                    raise StopIteration
        finally:
            line.leave()

    def _serve(self, listener_name: Any, req: Any, sock: Any, addr: Any) -> None:
        """Its connection ends where most of a body was left unread."""
        try:
            super().handle_request(listener_name, req, sock, addr)
        except StopIteration:
            # The connection ends anyway.
            if req.body.unread > 0:
                _linger(sock)
            raise
        if _ends(req.body):
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


class _Honest:
    """The application; where a connection ends because of what was left of a request's body, the
    answer's headers say so."""

    def __init__(self, app: Any):
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        body, answer = environ["wsgi.input"], start_response.__self__

        def start(*args: Any) -> Any:
            if _ends(body):
                answer.force_close()
            return start_response(*args)

        return self._app(environ, start)


def _ends(body: Any) -> bool:
    """gunicorn would read what is left of a body in pieces of a few KiB, and nobody else would be
    served meanwhile. Where a broken one ends nobody knows."""
    return isinstance(body, WholeBody) and (body.failed or body.unread > FORGIVEN)


def _linger(sock: Any) -> None:
    """Let the answer reach a client that is still sending: closing a socket that receives would
    take the answer along. What comes is thrown away in large pieces, for a moment."""
    with gevent.Timeout(LINGER, False):
        sock.shutdown(socket.SHUT_WR)
        waste = bytearray(1 << 20)
        while sock.recv_into(waste):
            pass
