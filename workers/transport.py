"""kombu's transports, mended: where a Redis that goes away ends a worker that runs tasks, where a
RabbitMQ that hangs holds up who talks to it, and where messages cost more than they are worth."""

from __future__ import annotations

from typing import Any

from kombu import transport
from kombu.transport import TRANSPORT_ALIASES, pyamqp, redis

IO_TIMEOUT = 3.0
"""Seconds RabbitMQ may take to say its next word: a publish ends within a few of these."""


class Channel(redis.Channel):  # type: ignore[misc]
    """A channel that outlives its connection, since tasks hold it that have yet to be acknowledged.
    In kombu 5.7 that acknowledgement is an AttributeError, which Celery takes for a reason to end;
    here it is what it is, a connection that was lost, which Celery gets over."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._reused: Any = None

    def _connparams(self, *args: Any, **kwargs: Any) -> Any:
        if self.connection is None or self.connection.client is None:
            raise ConnectionError("the connection this message came by is gone")
        return super()._connparams(*args, **kwargs)

    def _create_client(self, asynchronous: bool = False) -> Any:
        """One client for all commands: it is but a view of the pool, and making it took longer than
        the commands did."""
        if asynchronous:
            return super()._create_client(asynchronous)
        if self._reused is None or self._reused.connection_pool is not self.pool:
            self._reused = super()._create_client()
        return self._reused


class Transport(redis.Transport):  # type: ignore[misc]
    Channel = Channel


class _Bounded:
    """Connections that wait for no answer for ever.

    py-amqp has a deadline for connecting alone: a declaration, a confirm or a close would wait as
    long as a RabbitMQ hangs. Its read timeout is a socket option, which gevent doesn't see.
    """

    def establish_connection(self) -> Any:
        made = super().establish_connection()  # type: ignore[misc]
        made.transport.sock.settimeout(IO_TIMEOUT)
        return made


class AmqpTransport(_Bounded, pyamqp.Transport):  # type: ignore[misc]
    pass


class AmqpsTransport(_Bounded, pyamqp.SSLTransport):  # type: ignore[misc]
    pass


def install() -> None:
    """What kombu makes of `redis://` and `amqp://` from now on."""
    for scheme, ours in (
        ("redis", Transport),
        ("rediss", Transport),
        ("amqp", AmqpTransport),
        ("amqps", AmqpsTransport),
    ):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{ours.__name__}"
        # What somebody's connection in this process made of it before.
        transport._transport_cache.pop(scheme, None)
