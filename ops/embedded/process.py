"""What a process of the stack is, and one that runs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LAUNCH = Path(__file__).with_name("launch.py")
POLL = 0.05
"""Seconds between two looks at something that was asked to happen."""
LOG_TAIL_LINES = 15
LOG_TAIL_BYTES = 16_384


class StackError(Exception):
    """The stack cannot start or stay up. The message says what to do about it."""


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Process:
    """How to run one process, and how to tell that it is ready. Durations are seconds."""

    name: str
    command: Sequence[str | Path]
    env: Mapping[str, str]
    """Its whole environment."""
    ready: Callable[[], None] | None = None
    """Raises while the process is not ready. None: ready when it has ended with 0 (a one-shot)."""
    settle: float = 0.0
    """It must have run this long before it is asked: for one that has nothing to ask."""
    after: tuple[str, ...] = ()
    """Starts when these are ready."""
    tier: int = 0
    """The highest tier stops first."""
    stop_signal: signal.Signals = signal.SIGTERM
    stop_timeout: float = 10.0
    """How long it may take to stop before it is killed."""
    orphan_signal: signal.Signals = signal.SIGKILL
    """What the kernel sends it when the supervisor dies, and with it every other process: not
    the signal to drain on, which might wait for the others."""
    ready_timeout: float = 60.0
    identity: str = "same"
    """Who it runs as, in the words of `launch.py`."""
    prepare: Callable[[], None] = _nothing
    """Called before each start, by the thread that starts it."""
    clean: Callable[[], None] = _nothing
    """Called after each end, to remove what it may have left behind."""

    @property
    def once(self) -> bool:
        return self.ready is None


def launcher(
    identity: str = "same", orphan_signal: signal.Signals = signal.SIGKILL
) -> list[str | Path]:
    """The words to put before a command so that it does not outlive this process."""
    here = str(os.getpid())
    return [sys.executable, "-I", "-S", LAUNCH, here, str(int(orphan_signal)), identity]


class Child:
    """A running `Process`, the leader of its own process group.

    To be started by a thread that lives as long as the stack: the kernel counts the end of the
    thread that started a child as the end of its parent.
    """

    def __init__(self, process: Process, log: Path, cwd: Path):
        self.process = process
        self.log = log
        process.prepare()
        with log.open("ab") as output:
            self._popen = subprocess.Popen(
                [*launcher(process.identity, process.orphan_signal), *process.command],
                env=dict(process.env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started = time.monotonic()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def alive(self) -> bool:
        """Looks without reaping, so that the id, and the group's, cannot become a stranger's."""
        if self._popen.returncode is not None:
            return False
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, look) is None

    def signal(self, number: signal.Signals) -> None:
        """To the process itself; what becomes of the rest of its group is its own business."""
        if self.alive():
            os.kill(self.pid, number)

    def finish(self) -> int:
        """Kill what is left of the group, reap, clean up. Returns the exit status."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._popen.wait(timeout=10)
            self.process.clean()
        return self._popen.returncode

    def tail(self) -> str:
        """The last lines of its log."""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:])
