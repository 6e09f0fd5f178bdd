"""The process in which a GPU worker has its batch lane run.

All threads of a process share one interpreter, and a batch that is read or written uses it a lot.
So the worker keeps its own for those who wait, and starts itself once more for the rest: the same
command with other queues, at a lower priority. What it starts it starts again when it ends, and
takes along when it ends itself.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

NICE = 5
"""How much it stands back where processors are short: it gets a third of what others get there. At
10 requests were no quicker, and one-item jobs fell behind those who submit them."""
PAUSE, LONGEST = 0.5, 5.0
"""Seconds until it is started again: at first, and doubled each time, at most."""
WELL = 10.0
"""Seconds after which its end has nothing to do with the one before."""
PATIENCE = 15.0
"""Seconds it may take to end when told to. It hands back what it runs before that."""
LOOK = 0.1
PR_SET_PDEATHSIG = 1
ONCE = {"--purge", "--discard"}
"""What the worker has done already when it comes to starting another process."""


def follow(parent: int) -> None:
    """Called in the process that was started, before anything else: it ends when its parent does,
    however that comes about, and leaves it the processor."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the worker ended before its batch lane began")
    os.nice(NICE)
    # Where Linux weighs sessions against each other, that counts among the processes of one only.
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICE))


def command(*arguments: str) -> list[str]:
    """That of this process, with `arguments` as the last word about each of them."""
    words = [word for word in sys.orig_argv[1:] if word not in ONCE]
    return [sys.executable, *words, *arguments]


class Child:
    """One process that is kept running until it is told to end."""

    def __init__(self, command: Sequence[str]):
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._told: signal.Signals | None = None
        self._until = 0.0
        # The kernel takes the end of the thread that started a process for that of its parent.
        self._thread = threading.Thread(target=self._run, name="batch-process", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self, number: signal.Signals) -> None:
        """To end, as this signal says. At once, and without a lock: signal handlers call it."""
        if self._told is None:
            self._until = time.monotonic() + PATIENCE
        self._told = number
        if self._process is not None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """Tell it to end, if it was not, and wait until it has."""
        if self._told is None:
            self.tell(signal.SIGTERM)
        self._thread.join(max(0.0, self._until - time.monotonic()))
        self.terminate()

    def terminate(self) -> None:
        self.tell(signal.SIGKILL)
        self._thread.join(5)

    def _ending(self) -> bool:
        return self._told is not None

    def _run(self) -> None:
        pause = PAUSE
        while True:
            began = time.monotonic()
            status = self._run_once()
            if self._ending():
                return
            if time.monotonic() - began > WELL:
                pause = PAUSE
            log.error("batch lane ended", action="worker.batch_ended", status=status, again=pause)
            until = time.monotonic() + pause
            while time.monotonic() < until:
                if self._ending():
                    return
                time.sleep(LOOK)
            pause = min(2 * pause, LONGEST)

    def _run_once(self) -> int | str:
        """Start it and wait for its end; its status, or why there is none."""
        try:
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                # A terminal's Ctrl-C is the worker's to hear and to pass on.
                start_new_session=True,
            )
        except OSError as error:
            return str(error)
        # Whoever told it to end a moment ago did not know this process.
        if (told := self._told) is not None:
            process.send_signal(told)
        return process.wait()
