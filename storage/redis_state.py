"""Every Redis key Tidegate makes, besides the broker's own.

| key | what | ends |
|---|---|---|
| `{ns}:blob:{message}` | tensors of one realtime message | claimed once, or at its deadline |
| `{ns}:running:{message}` | the GPU worker that runs it | soon after the worker fell silent |
| `{ns}:hurry:{group}` | realtime messages wait for a GPU worker | soon after the last one did |
| `{ns}:reply:{gateway}` | list of replies for one gateway process | a minute after the last one |
| `{ns}:workers:{group}` | sorted set: GPU worker → end of its presence, Redis time | by score |
| `{ns}:answer:{key}` | an answer that may be given again | its model's TTL, or to make room |
| `{ns}:answers` | sorted set: key of an answer → its end, ms of Redis time | with the last |
| `{ns}:answers:sizes` | hash: key of an answer → its bytes; "" → their sum | with the last |

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
ANSWER_OVERHEAD = 512
"""Bytes an answer takes besides its own, in its name and in what is known of it."""
# Redis holds the messages, too, and evicts nothing: what is kept here makes room for itself. Those
# that end soonest go first, so many at a time that nobody else waits for long.
_KEEP_ANSWER = """
local now = redis.call('TIME')
now = now[1] * 1000 + math.floor(now[2] / 1000)
local index, sizes, prefix, name = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local data, ttl, most = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local size = #data + tonumber(ARGV[6])
local function drop(gone)
  redis.call('DEL', prefix .. gone)
  redis.call('ZREM', index, gone)
  local had = redis.call('HGET', sizes, gone)
  if had then
    redis.call('HDEL', sizes, gone)
    redis.call('HINCRBY', sizes, '', -had)
  end
end
local function full()
  return tonumber(redis.call('HGET', sizes, '') or 0) + size > most
end
drop(name)
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', index, '-inf', now, 'LIMIT', 0, 256)) do
  drop(gone)
end
for _, gone in ipairs(redis.call('ZRANGE', index, 0, 255)) do
  if not full() then break end
  drop(gone)
end
if full() then return 0 end
redis.call('SET', prefix .. name, data, 'PX', ttl)
redis.call('ZADD', index, now + ttl, name)
redis.call('HSET', sizes, name, size)
redis.call('HINCRBY', sizes, '', size)
for _, key in ipairs(KEYS) do
  if redis.call('PTTL', key) < ttl then redis.call('PEXPIRE', key, ttl) end
end
return 1
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
        self._keep_answer = self._redis.register_script(_KEEP_ANSWER)

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

    def hurry(self, group: str, ttl: float) -> None:
        """A GPU worker says that a realtime message had to wait; good for `ttl` seconds."""
        with _translated():
            self._redis.set(self._key("hurry", group), b"", px=int(ttl * 1000))

    def hurried(self, group: str) -> bool:
        """Do realtime messages of a group have to wait?"""
        with _translated():
            return bool(self._redis.exists(self._key("hurry", group)))

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

    def answers(self, keys: Sequence[bytes]) -> list[Blob | None]:
        """The answers kept under these keys; `remaining` is how long each may still be given."""
        with _translated():
            pipe = self._redis.pipeline(transaction=True)
            for key in keys:
                name = self._key("answer", key.hex())
                pipe.pttl(name)
                pipe.get(name)
            found = pipe.execute()
        return [
            Blob(data, milliseconds / 1000) if data is not None and milliseconds > 0 else None
            for milliseconds, data in zip(found[::2], found[1::2], strict=True)
        ]

    def keep_answer(self, key: bytes, data: bytes, ttl: float, most: int) -> bool:
        """Keep an answer for `ttl` seconds, all answers together within `most` bytes. False where
        there was no room."""
        with _translated():
            kept = self._keep_answer(
                keys=[self._key("answers"), self._key("answers", "sizes")],
                args=[
                    self._key("answer", ""),
                    key.hex(),
                    data,
                    max(1, int(ttl * 1000)),
                    most,
                    ANSWER_OVERHEAD,
                ],
            )
        return bool(kept)

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
