"""What everything runs on: the embedded stack as shipped, and contenders beside it."""

from __future__ import annotations

import contextlib
import http.client
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import redis

from ops.embedded import Stack
from ops.embedded.stack import ROOT
from tests.bench.load import LoadError

Tell = Callable[[str], None]
PEERS = ROOT / ".venv-peers"


class Ground:
    """One stack in a folder of its own. To be used from one thread, which outlives it."""

    def __init__(self, stack: Stack, folder: Path):
        """On a stack that runs. `folder`: for files of its own."""
        self.stack = stack
        self.folder = folder
        self._connection: Any = None
        folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    @contextlib.contextmanager
    def made(cls, folder: Path, tell: Tell, **settings: str) -> Iterator[Ground]:
        """With a stack of its own. `settings`: TIDEGATE_* for what can't be measured as shipped."""
        ours = {name: text for name, text in os.environ.items() if "TIDEGATE" not in name}
        tell(f"starting the stack in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        with Stack(folder / "var", environ={**ours, **settings}) as stack:
            stack.start()
            with contextlib.closing(cls(stack, folder)) as made:
                yield made

    @property
    def env(self) -> Mapping[str, str]:
        return self.stack.env

    @property
    def key(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.env['TIDEGATE_API_KEY']}"}

    # Its stores

    def redis(self, database: int = 0) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url(database), socket_timeout=30)

    def redis_url(self, database: int) -> str:
        return f"{self.env['TIDEGATE_REDIS_URL'].rpartition('/')[0]}/{database}"

    def sql(self, text: str, *values: object) -> list[Any]:
        """One statement in Postgres, and its rows. On one connection: making one costs Postgres
        more than most statements, and its CPU time is what is measured."""
        if self._connection is None:
            url = self.env["TIDEGATE_DATABASE_URL"].replace("+psycopg2", "")
            self._connection = psycopg2.connect(url)
            self._connection.autocommit = True
        with self._connection.cursor() as cursor:
            cursor.execute(text, values or None)
            return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # Requests

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        """One request to the gateway."""
        sent = self.key | dict(headers or {})
        status, answer, _ = request(self.env["TIDEGATE_URL"] + path, method, body, sent)
        return status, answer

    def until(self, condition: Callable[[], Any], seconds: float, what: str) -> Any:
        """The first value that is true."""
        end = time.monotonic() + seconds
        while not (value := condition()):
            if time.monotonic() > end:
                raise LoadError(f"not within {seconds:.0f} s: {what}")
            time.sleep(0.05)
        return value


def request(
    url: str, method: str, body: Any, headers: Mapping[str, str]
) -> tuple[int, bytes, Mapping[str, str]]:
    """Status, body and headers of an answer."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    with contextlib.closing(connection):
        where = f"{parts.path}?{parts.query}" if parts.query else parts.path
        connection.request(method, where, body, dict(headers))
        reply = connection.getresponse()
        return reply.status, reply.read(), dict(reply.getheaders())


@contextlib.contextmanager
def started(stack: Stack, names: Sequence[str]) -> Iterator[None]:
    """These processes run meanwhile."""
    try:
        stack.start(only=names)
        yield
    finally:
        for name in reversed(names):
            if name in stack.processes:
                stack.stop(name)
