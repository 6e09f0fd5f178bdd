"""kombu's Redis transport, mended where a Redis that goes away ends a worker that runs tasks."""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES, redis


class Channel(redis.Channel):  # type: ignore[misc]
    """A channel that outlives its connection, since tasks hold it that have yet to be acknowledged.
    In kombu 5.7 that acknowledgement is an AttributeError, which Celery takes for a reason to end;
    here it is what it is, a connection that was lost, which Celery gets over. The message comes
    again, and finds that it was claimed."""

    def _connparams(self, *args: Any, **kwargs: Any) -> Any:
        if self.connection is None or self.connection.client is None:
            raise ConnectionError("the connection this message came by is gone")
        return super()._connparams(*args, **kwargs)


class Transport(redis.Transport):  # type: ignore[misc]
    Channel = Channel


def install() -> None:
    """What kombu makes of `redis://` from now on."""
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = "workers.transport:Transport"
