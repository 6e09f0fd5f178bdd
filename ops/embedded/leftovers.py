"""Which processes a stack started, on disk, so that its successor can end the ones that stayed.

Normally none do: the kernel ends them with their supervisor. This is for the one that hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from ops.embedded.credentials import write_private
from ops.embedded.process import POLL

PATIENCE = 10.0
"""Seconds they get to end by themselves: the kernel has already sent them a signal."""


def birth(pid: int) -> int | None:
    """When a process began, in clock ticks since boot: with its id, its identity. None: gone."""
    try:
        # The name, in parentheses, may itself hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def record(path: Path, pids: Iterable[int]) -> None:
    write_private(path, json.dumps({str(pid): birth(pid) for pid in pids}) + "\n")


def end(path: Path, patience: float = PATIENCE) -> list[int]:
    """End what is recorded at `path` and still runs. Returns the ids that had to be killed."""
    try:
        known = {int(pid): born for pid, born in json.loads(path.read_text()).items()}
    except (OSError, ValueError):
        return []

    def running() -> list[int]:
        return [pid for pid, born in known.items() if born is not None and birth(pid) == born]

    deadline = time.monotonic() + patience
    while running() and time.monotonic() < deadline:
        time.sleep(POLL)
    killed = running()
    for pid in killed:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    path.unlink(missing_ok=True)
    return killed
