"""Moves work from the ledger to the broker. Any process may run one; none is special."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from errors import Unavailable
from storage.backlog import Backlog
from storage.work import Hint
from tasks import messages

log = structlog.get_logger(__name__)


def publish(hint: Hint) -> None:
    """Tell the group's workers that these chunks may be claimed."""
    messages.send(
        messages.CHUNKS, messages.batch_queue(hint.group), ids=list(hint.ids), alone=hint.alone
    )


class Pump:
    """Runs `pump()` when kicked. Kicks that come during a run become one more run, so a thousand
    submits cost a few runs. A kick is only haste: the sweeper runs the same on a short period."""

    def __init__(
        self,
        backlog: Backlog,
        publish: Callable[[Hint], None] = publish,
        allowance: Callable[[str], int | None] = lambda group: None,
    ):
        """`allowance`: how many hints' worth of a group may be about; None: as many as it likes."""
        self._backlog = backlog
        self._publish = publish
        self._allowance = allowance
        self._wanted: set[str] = set()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread: threading.Thread | None = None

    def pump(self, group: str) -> int:
        """Release what the group's credit allows and publish it; the number of chunks. Less of it
        while realtime messages wait."""
        hints = self._backlog.release(group, self._most(group))
        for hint in hints:
            try:
                self._publish(hint)
            except Unavailable as error:
                # The chunks are `released` and silent now: the sweep finds them.
                log.warning("hint lost", action="pump.unpublished", error=error.message)
                break
        return sum(len(hint.ids) for hint in hints)

    def _most(self, group: str) -> int | None:
        """Who can't be asked does not wait: batches must not depend on it."""
        try:
            return self._allowance(group)
        except Unavailable as error:
            log.warning("not asked", action="pump.unasked", error=error.message)
        except Exception:
            log.exception("not asked", action="pump.unasked")
        return None

    def kick(self, group: str) -> None:
        """Ask for a run soon; returns at once."""
        with self._changed:
            self._wanted.add(group)
            if self._thread is None and not self._stopped:
                self._thread = threading.Thread(target=self._run, name="pump", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._wanted and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return
                group = self._wanted.pop()
            try:
                self.pump(group)
            except Unavailable as error:
                log.warning("pump failed", action="pump.failed", error=error.message)
            except Exception:
                log.exception("pump failed", action="pump.failed")

    def stop(self) -> None:
        """End the thread; what it would have released waits for the sweeper."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout=5)
