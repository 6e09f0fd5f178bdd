"""Disks that fill up: file systems in memory, with little room."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

MIB = 1 << 20


class Impossible(Exception):
    """Not on this machine; the message says why."""


def _run(*words: str | Path) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise Impossible(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


@contextlib.contextmanager
def small(folder: Path, size: int) -> Iterator[None]:
    """A folder is a file system of so many bytes meanwhile, empty at first."""
    folder.mkdir(exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", folder)
    try:
        yield
    finally:
        _run("umount", "-l", folder)


@contextlib.contextmanager
def cramped(folder: Path, room: int) -> Iterator[None]:
    """What a folder holds is on a file system with so much room for more meanwhile. Nobody may use
    it when it goes there, nor when it comes back."""
    used = sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    away = folder.rename(folder.with_name(f"{folder.name}.away"))
    try:
        with small(folder, used + room):
            # As it is, owners included: servers insist on them.
            _run("cp", "-a", f"{away}/.", folder)
            yield
            shutil.rmtree(away)
            _run("cp", "-a", folder, away)
    finally:
        folder.rmdir()
        away.rename(folder)


@contextlib.contextmanager
def full(folder: Path) -> Iterator[None]:
    """There is no byte of room on a folder's file system meanwhile."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        ballast.unlink()
