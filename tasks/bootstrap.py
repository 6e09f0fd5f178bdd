"""The composition root: the one place where real adapters are made."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from config import Settings
from inference.client import ModelServer, TritonServer
from storage.backlog import Backlog
from storage.chunks import Chunks
from storage.database import Database
from storage.dead_letters import DeadLetters
from storage.deliveries import Deliveries
from storage.files import Files
from storage.idempotency import Idempotency
from storage.ids import IdMint
from storage.jobs import Jobs
from storage.keys import Keys
from storage.objects import ObjectStore, open_store
from storage.records import Records
from storage.redis_state import RedisState
from storage.retention import Retention
from storage.webhooks import Webhooks
from tasks import haste
from tasks.budget import RetryBudget
from tasks.haste import Haste
from tasks.leases import Leases
from tasks.models import Models
from tasks.pump import Pump
from tasks.running import Running
from tasks.slots import Slots, Watchdog


@dataclass(frozen=True, slots=True)
class Services:
    """What a process works with. Made after fork; `close` ends it."""

    settings: Settings
    database: Database
    jobs: Jobs
    chunks: Chunks
    dead_letters: DeadLetters
    backlog: Backlog
    files: Files
    retention: Retention
    keys: Keys
    idempotency: Idempotency
    records: Records
    webhooks: Webhooks
    deliveries: Deliveries
    objects: ObjectStore
    state: RedisState
    ids: IdMint
    pump: Pump

    def close(self) -> None:
        """Stop and let go of everything, in reverse order."""
        self.pump.stop()
        self.state.close()
        self.database.close()


@dataclass(frozen=True, slots=True)
class WorkerServices(Services):
    """What a GPU worker has besides: its model server, the leases it holds, what it runs."""

    name: str
    group: str
    server: ModelServer
    models: Models
    leases: Leases
    slots: Slots
    watchdog: Watchdog
    budget: RetryBudget
    running: Running
    haste: Haste

    def close(self) -> None:
        self.watchdog.stop()
        self.running.stop()
        self.leases.stop()
        self.server.close()
        Services.close(self)


def build_services(settings: Settings, *, pool_size: int = 8, **overrides: Any) -> Services:
    """The services of a gateway or sweeper; `overrides` replace any of them by field name."""
    database = overrides.pop("database", None) or Database(
        settings.database_url, pool_size=pool_size
    )
    backlog = Backlog(
        database,
        max_attempts=settings.max_attempts,
        credit=settings.pump_credit,
        hint_timeout=settings.hint_timeout,
    )
    state = overrides.pop("state", None) or RedisState(settings.redis_url, settings.namespace)
    made: dict[str, Any] = {
        "jobs": Jobs(database, garbage_age=settings.garbage_age),
        "chunks": Chunks(
            database,
            lease=settings.lease,
            max_attempts=settings.max_attempts,
            file_ttl=settings.file_ttl,
        ),
        "dead_letters": DeadLetters(database),
        "backlog": backlog,
        "files": Files(database, ttl=settings.file_ttl, garbage_age=settings.garbage_age),
        "retention": Retention(
            database,
            result_ttl=settings.result_ttl,
            job_ttl=settings.job_ttl,
            idempotency_ttl=settings.idempotency_ttl,
        ),
        "keys": Keys(database, settings.secret),
        "idempotency": Idempotency(database),
        "records": Records(database),
        "webhooks": Webhooks(database, settings.secret),
        # A try ends within its timeout; then there is time to write down what came of it.
        "deliveries": Deliveries(database, lease=2 * settings.webhook_timeout + 15),
        "objects": open_store(settings.objects_url),
        "state": state,
        "ids": IdMint(settings.secret),
        "pump": Pump(backlog, allowance=functools.partial(haste.allowance, state)),
    }
    return Services(settings=settings, database=database, **made | overrides)


def build_worker_services(
    settings: Settings,
    *,
    name: str,
    gpu: str = "none",
    group: str | None = None,
    **overrides: Any,
) -> WorkerServices:
    """The services of one GPU worker, wired to that GPU's Triton."""
    server = overrides.pop("server", None) or TritonServer(
        settings.triton_address(gpu), max_message_bytes=settings.max_body_bytes * 2
    )
    slots = settings.batch_slots + 4
    base = build_services(settings, pool_size=slots, **overrides)
    return WorkerServices(
        **{field.name: getattr(base, field.name) for field in dataclasses.fields(Services)},
        name=name,
        group=group or settings.group,
        server=server,
        models=Models(server, ttl=settings.catalog_ttl),
        leases=build_leases(base),
        slots=Slots(),
        watchdog=Watchdog(),
        budget=RetryBudget(),
        running=Running(base.state, name),
        haste=Haste(base.state, group or settings.group),
    )


def build_leases(services: Services) -> Leases:
    """The leases of one process that runs chunks."""
    settings = services.settings
    return Leases(
        services.chunks, every=settings.lease / 3, attempt_timeout=settings.attempt_timeout
    )


_installed: list[WorkerServices] = []


def install(services: WorkerServices) -> None:
    """Make these the services that tasks of this process run with."""
    _installed[:] = [services]


def worker_services() -> WorkerServices:
    """This GPU worker's services."""
    if not _installed:
        raise RuntimeError("no services installed: tasks run in a GPU worker")
    return _installed[0]
