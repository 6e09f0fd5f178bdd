"""The Postgres connection pool: where SQLAlchemy's errors become ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc

from errors import Unavailable

CONNECT_TIMEOUT = 3
_SESSION = " ".join(
    f"-c {name}={value}"
    for name, value in {
        "timezone": "UTC",
        "statement_timeout": 5000,
        "lock_timeout": 3000,
        "idle_in_transaction_session_timeout": 10_000,
    }.items()
)
_CONTENDED = {"40P01", "55P03", "57014"}
"""Of SQLSTATE: a deadlock, a lock that took too long, a statement that did."""
Row = sa.Row[*tuple[Any, ...]]
"""A row of whatever columns."""


class Contended(Unavailable):
    """Postgres is there, but gave this transaction up: somebody else was in its way. Nothing of it
    has happened."""


class Database:
    """A pool of connections. Make it after fork; safe to share between threads.

    Times in every statement are the database's `now()`, never a process's clock.
    """

    def __init__(self, url: str, *, pool_size: int = 8):
        self._engine = sa.create_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=3,
            pool_pre_ping=True,
            # What a statement carries is the client's: it belongs in no log.
            hide_parameters=True,
            connect_args={
                "connect_timeout": CONNECT_TIMEOUT,
                "options": _SESSION,
                "application_name": "tidegate",
                "keepalives_idle": 10,
                "keepalives_interval": 5,
                "keepalives_count": 3,
                "tcp_user_timeout": 10_000,
            },
        )

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """One transaction: committed on leaving, rolled back on any error.

        Keep Triton, object store and Redis calls outside: a lock held across one is a lock held
        for as long as they like. Raises `Unavailable` where Postgres is out of reach, `Contended`
        where others kept it too busy.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except (exc.OperationalError, exc.InterfaceError, exc.TimeoutError) as error:
            if getattr(getattr(error, "orig", None), "pgcode", None) in _CONTENDED:
                raise Contended("the database is busy", retry_after=1) from error
            raise Unavailable("the database is out of reach", retry_after=1) from error

    def now(self) -> datetime:
        """The moment by the database's clock, the only one that all processes share."""
        with self.transaction() as connection:
            found: datetime = connection.execute(sa.select(sa.func.now())).scalar_one()
            return found

    def ping(self) -> None:
        with self.transaction() as connection:
            connection.execute(sa.select(1))

    def close(self) -> None:
        self._engine.dispose()
