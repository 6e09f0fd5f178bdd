"""Replies to one gateway process: a Redis list, one thread that reads it."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable

import structlog

from errors import Unavailable
from storage.redis_state import RedisState

log = structlog.get_logger(__name__)


class Replies:
    """Who waits for which message. Everything is plain threads; under gevent they are greenlets."""

    def __init__(self, state: RedisState):
        self.gateway = secrets.token_hex(8)
        self._state = state
        self._pending: dict[bytes, Callable[[bytes], None]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def expect(self, message: bytes, deliver: Callable[[bytes], None]) -> None:
        """Call `deliver` with each reply to this message, from the listener's thread, until
        `forget`: the answers to its requests may come in parts."""
        with self._lock:
            self._pending[message] = deliver
            if self._thread is None:
                self._thread = threading.Thread(target=self._listen, name="replies", daemon=True)
                self._thread.start()

    def forget(self, message: bytes) -> None:
        with self._lock:
            self._pending.pop(message, None)

    def _listen(self) -> None:
        while not self._stopped:
            try:
                found = self._state.next_reply(self.gateway)
            except Unavailable:
                # Those who wait have deadlines of their own.
                time.sleep(0.2)
                continue
            if found is None:
                continue
            with self._lock:
                deliver = self._pending.get(found[0])
            if deliver is not None:
                try:
                    deliver(found[1])
                except Exception:
                    log.exception("reply not delivered", action="replies.failed")

    def stop(self) -> None:
        """End the listener, before what it reads from is closed."""
        self._stopped = True
        if self._thread is not None:
            self._thread.join(timeout=2)
