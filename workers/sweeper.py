"""The sweeper: finds what nobody is working on, and moves work along when no event does.

Any number may run; each sweep takes only rows nobody else has locked.
"""

from __future__ import annotations

import signal
import threading
from typing import Any

import structlog

import config
from errors import Unavailable
from tasks.bootstrap import Services, build_services
from workers import logs
from workers.app import build_app

log = structlog.get_logger(__name__)

PARTITIONS_EVERY = 3600.0


def sweep(services: Services) -> None:
    """One round: leases, hints, deadlines, then the pump of every group with work."""
    found = services.backlog.sweep()
    if found.leases or found.dead or found.hints or found.expired:
        log.info(
            "swept",
            action="sweep",
            leases=found.leases,
            dead=found.dead,
            hints=found.hints,
            expired=found.expired,
        )
    for group in services.backlog.groups():
        services.pump.pump(group)


def main() -> None:
    """Sweep until SIGTERM or Ctrl-C."""
    logs.configure()
    settings = config.settings()
    build_app(settings)
    services = build_services(settings, pool_size=2)
    stopping = threading.Event()

    def stop(*_: Any) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("sweeping", action="sweeper.started", every=settings.sweep_interval)
    until_partitions = 0.0
    while not stopping.is_set():
        try:
            if until_partitions <= 0:
                services.records.ensure_partitions()
                until_partitions = PARTITIONS_EVERY
            sweep(services)
        except Unavailable as error:
            log.warning("not swept", action="sweep.failed", error=error.message)
        except Exception:
            log.exception("not swept", action="sweep.failed")
        stopping.wait(settings.sweep_interval)
        until_partitions -= settings.sweep_interval
    services.close()
    log.info("stopped", action="sweeper.stopped")


if __name__ == "__main__":
    main()
