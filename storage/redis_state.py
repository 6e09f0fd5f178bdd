"""Every Redis key Tidegate makes, besides the broker's own.

| key | what | ends |
|---|---|---|
| `{ns}:blob:{message}` | tensors of one realtime message | claimed once, or at its deadline |
| `{ns}:running:{message}` | the GPU worker that runs it | soon after the worker fell silent |
| `{ns}:reply:{gateway}` | list of replies for one gateway process | a minute after the last one |
| `{ns}:workers:{group}` | sorted set: GPU worker → end of its presence, Redis time | by score |

A message's deadline is its blob's TTL, so Redis's clock is the only one that judges it. A message
that has neither a blob nor a worker is lost, or was claimed or answered a moment ago.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, auto

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from errors import Unavailable

REPLY_TTL = 60
_ID = 16

_PRESENT = """
local now = redis.call('TIME')
redis.call('ZADD', KEYS[1], now[1] + ARGV[2], ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now[1] - 60)
redis.call('EXPIRE', KEYS[1], 120)
"""
_ALIVE = """
local now = redis.call('TIME')
return redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now[1], '+inf')
"""


@dataclass(frozen=True, slots=True)
class Blob:
    """A claimed message: its bytes, and the seconds left to the latest deadline in it."""

    data: bytes
    remaining: float


class Where(Enum):
    """Where a message is that has no answer yet."""

    WAITING = auto()
    """Nobody has claimed it."""
    RUNNING = auto()
    """A GPU worker says that it runs it."""
    NOWHERE = auto()


class RedisState:
    """Safe to share between threads (and greenlets). Raises `Unavailable` where Redis is away.

    No command is retried: a retried push is a second push.
    """

    def __init__(self, url: str, namespace: str, *, timeout: float = 2.0):
        self._namespace = namespace
        self._redis = redis.Redis.from_url(
            url,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            socket_keepalive=True,
            health_check_interval=10,
            retry=Retry(NoBackoff(), 0),
        )
        self._present = self._redis.register_script(_PRESENT)
        self._alive = self._redis.register_script(_ALIVE)

    def _key(self, *parts: str) -> str:
        return ":".join((self._namespace, *parts))

    def put_blob(self, message: bytes, data: bytes, ttl: float) -> None:
        """Keep a message's tensors for at most `ttl` seconds."""
        with _translated():
            self._redis.set(self._key("blob", message.hex()), data, px=max(1, int(ttl * 1000)))

    def claim_blob(self, message: bytes) -> Blob | None:
        """Take a message's tensors: one caller gets them. None: taken, or its deadline passed."""
        key = self._key("blob", message.hex())
        with _translated():
            pipe = self._redis.pipeline(transaction=True)
            pipe.pttl(key)
            pipe.getdel(key)
            milliseconds, data = pipe.execute()
        if data is None:
            return None
        return Blob(data=data, remaining=milliseconds / 1000)

    def runs(self, worker: str, messages: Sequence[bytes], ttl: float) -> None:
        """A GPU worker says that it runs these messages; good for `ttl` seconds."""
        with _translated():
            pipe = self._redis.pipeline(transaction=False)
            for message in messages:
                pipe.set(self._key("running", message.hex()), worker, px=int(ttl * 1000))
            pipe.execute()

    def whereabouts(self, messages: Sequence[bytes]) -> list[Where]:
        """Where each of these messages is now."""
        with _translated():
            pipe = self._redis.pipeline(transaction=False)
            for message in messages:
                pipe.exists(self._key("blob", message.hex()))
                pipe.exists(self._key("running", message.hex()))
            found = pipe.execute()
        return [
            Where.WAITING if blob else Where.RUNNING if running else Where.NOWHERE
            for blob, running in zip(found[::2], found[1::2], strict=True)
        ]

    def reply(self, gateway: str, message: bytes, data: bytes) -> None:
        """Answer one message of one gateway process."""
        key = self._key("reply", gateway)
        with _translated():
            pipe = self._redis.pipeline(transaction=False)
            pipe.rpush(key, message + data)
            pipe.expire(key, REPLY_TTL)
            pipe.execute()

    def next_reply(self, gateway: str, timeout: float = 1.0) -> tuple[bytes, bytes] | None:
        """The next (message, data) for this gateway process, waiting up to `timeout` seconds."""
        with _translated():
            found = self._redis.blpop([self._key("reply", gateway)], timeout=timeout)
        if found is None:
            return None
        frame = found[1]
        assert isinstance(frame, bytes)
        return frame[:_ID], frame[_ID:]

    def present(self, group: str, worker: str, ttl: int) -> None:
        """A GPU worker says that it is consuming; good for `ttl` seconds."""
        with _translated():
            self._present(keys=[self._key("workers", group)], args=[worker, ttl])

    def absent(self, group: str, worker: str) -> None:
        """A GPU worker says goodbye."""
        with _translated():
            self._redis.zrem(self._key("workers", group), worker)

    def workers(self, group: str) -> list[str]:
        """The GPU workers of a group that are there now."""
        with _translated():
            return [name.decode() for name in self._alive(keys=[self._key("workers", group)])]

    def ping(self) -> None:
        with _translated():
            self._redis.ping()

    def close(self) -> None:
        self._redis.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise Unavailable("Redis is out of reach", retry_after=1) from error
