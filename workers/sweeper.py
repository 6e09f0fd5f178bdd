"""The sweeper: finds what nobody is working on, and moves work along when no event does.

Any number may run; each sweep takes only rows nobody else has locked. Where no GPU worker comes for
a batch that needs none (to be read in, or put together), the sweeper does it: a batch ends by its
deadline though every worker is gone.
"""

from __future__ import annotations

import functools
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import structlog

import config
from errors import Unavailable
from tasks import batches, retention
from tasks.bootstrap import Services, build_leases, build_services
from tasks.leases import Leases
from tasks.webhooks import Sender
from workers import logs
from workers.app import build_app

log = structlog.get_logger(__name__)

PARTITIONS_EVERY = 60.0
PURGE_EVERY = 60.0
RETENTION_EVERY = 60.0


def sweep(services: Services) -> None:
    """One round: leases, hints, deadlines, then the pump of every group with work."""
    try:
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
    finally:
        # Whatever could not be swept, and whichever group can't be pumped: the others go on.
        for group in services.backlog.groups():
            try:
                services.pump.pump(group)
            except Unavailable as error:
                log.warning("not pumped", action="sweep.unpumped", group=group, error=error.message)


def finish(services: Services, leases: Leases, worker: str) -> int:
    """Do what stranded batches need; the number of chunks done."""
    done = 0
    for chunk in services.backlog.stranded():
        # One at a time: a lease begins with the claim, not with its turn.
        for claim in services.chunks.claim([chunk], worker):
            log.info("stranded", action="sweep.stranded", chunk=chunk, job=str(claim.job_id))
            with leases.holding([claim]) as (held,):
                batches.run_control(services, held)
            done += 1
    return done


def _every(seconds: float, stopping: threading.Event, run: Callable[[], object]) -> None:
    """Run again and again until told to stop; whatever happens, go on."""
    while not stopping.is_set():
        try:
            run()
        except Unavailable as error:
            log.warning("not swept", action="sweep.failed", error=error.message)
        except Exception:
            log.exception("not swept", action="sweep.failed")
        stopping.wait(seconds)


def main() -> None:
    """Sweep until SIGTERM or Ctrl-C."""
    logs.configure()
    settings = config.settings()
    build_app(settings)
    services = build_services(settings, pool_size=8)
    stopping = threading.Event()

    def stop(*_: Any) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    log.info("sweeping", action="sweeper.started", every=settings.sweep_interval)
    leases = build_leases(services)
    sender = Sender(
        services.deliveries,
        services.webhooks,
        timeout=settings.webhook_timeout,
        insecure=settings.webhook_insecure,
        every=settings.sweep_interval,
    )
    name = f"sweeper@{socket.gethostname()}"
    # Putting a large batch together takes its time; leases and deadlines don't wait for it.
    threads = [
        threading.Thread(target=_every, args=(seconds, stopping, run))
        for seconds, run in (
            (settings.sweep_interval, functools.partial(sweep, services)),
            (settings.sweep_interval, functools.partial(finish, services, leases, name)),
            (settings.sweep_interval, functools.partial(sender.run, stopping)),
            (settings.sweep_interval, services.deliveries.end_disabled),
            (PARTITIONS_EVERY, services.records.ensure_partitions),
            (PURGE_EVERY, functools.partial(services.deliveries.purge, settings.job_ttl)),
            (RETENTION_EVERY, functools.partial(retention.run, services, stopping.is_set)),
        )
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sender.stop()
    leases.stop()
    services.close()
    log.info("stopped", action="sweeper.stopped")


if __name__ == "__main__":
    main()
