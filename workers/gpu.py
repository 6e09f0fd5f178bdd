"""One GPU worker: what `celery -A workers worker --gpu N [--group NAME]` adds to Celery.

The worker is pinned to its GPU and that GPU's Triton, named after it, and reads its group's two
lanes: requests itself, and batch work by a second process that it starts (see `child`). Told by -Q
which lanes to read, it reads these itself, each on a broker channel of its own: the prefetch of a
channel is the number of slots of its lane, on any broker, so batch work can't take a realtime slot.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from typing import Any

import click
import structlog
from celery import Celery, bootsteps
from celery.signals import (
    celeryd_init,
    worker_init,
    worker_ready,
    worker_shutdown,
    worker_shutting_down,
)
from kombu import Consumer
from kombu.common import ignore_errors

from config import Settings
from errors import TidegateError, Unavailable
from inference.client import Deadline
from tasks import bootstrap, messages
from tasks.slots import STUCK
from workers import child, memory

log = structlog.get_logger(__name__)

PRESENCE_EVERY = 1.0
PRESENCE_TTL = 8
"""Seconds: a gateway stops sending to a group this long after its last worker fell silent."""
SWITCH = 0.0005
"""Seconds after which a thread that computes lets another one compute."""
STALLED = 60
"""Looks, `PRESENCE_EVERY` seconds apart, that find the event loop where the last one found it."""
DRAIN = 10.0
"""Seconds in which a worker that was told to stop ends what it runs; then it gives it back."""


def extend(app: Celery) -> None:
    """Give an app's `worker` command `--gpu` and `--group`, and its workers their lanes."""
    app.user_options["worker"].add(
        click.Option(
            ("--gpu",),
            default="none",
            show_default=True,
            callback=_gpu,
            help="The GPU to pin this worker to, by number or UUID; 'none' on a machine without.",
        )
    )
    app.user_options["worker"].add(
        click.Option(("--group",), help="Worker group whose queues to read [TIDEGATE_GROUP].")
    )
    app.user_options["worker"].add(
        click.Option(("--child-of",), type=int, hidden=True, expose_value=False, callback=_child_of)
    )
    app.steps["worker"].add(BatchProcess)
    app.steps["consumer"].add(BatchLane)
    app.steps["consumer"].add(Presence)


def _gpu(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"none|\d{1,3}|(GPU|MIG)-[0-9A-Za-z/-]+", value):
        raise click.BadParameter("a GPU number (0, 1, …), a GPU-… or MIG-… UUID, or 'none'")
    return value


def _child_of(_context: click.Context, _parameter: click.Parameter, value: int | None) -> None:
    if value is not None:
        child.follow(value)


@celeryd_init.connect
def _note_queues(instance: Any, options: dict[str, Any], **_: Any) -> None:
    """Was there a -Q? Later one can't tell."""
    instance.named_queues = bool(options.get("queues"))


@worker_init.connect
def _pin(sender: Any, **_: Any) -> None:
    """Before anything of the worker is made: its GPU, name, queues and services."""
    app: Celery = sender.app
    gpu: str = sender.options.get("gpu") or "none"
    settings: Settings = app.tidegate
    group: str = sender.options.get("group") or settings.group
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if gpu == "none" else gpu
    host = socket.gethostname()
    if sender.hostname == f"celery@{host}":
        sender.hostname = f"{group}-gpu{gpu}@{host}" if gpu != "none" else f"{group}@{host}"
    queues = app.amqp.queues
    apart = not getattr(sender, "named_queues", False)
    chosen = [messages.realtime_queue(group)] if apart else list(queues.consume_from)
    for name in chosen:
        if not messages.is_queue(name):
            raise SystemExit(
                f"{name} is no queue that anybody sends to: -Q takes GROUP.realtime and"
                " GROUP.batch, --group a name of letters, digits, _ and -"
            )
        queues.add(messages.queue(name))
    queues.select(chosen)
    sender.batch_queues = [messages.queue(name) for name in chosen if messages.is_batch(name)]
    sender.takes_realtime = messages.realtime_queue(group) in chosen
    queues.deselect([queue.name for queue in sender.batch_queues])
    if sender.takes_realtime:
        # A request needs the interpreter for moments, again and again; a batch that is being read
        # or written beside it would hold it for 5 ms each time.
        sys.setswitchinterval(SWITCH)
    sender.batch_process = _batch_process(sender.hostname, group) if apart else None
    bootstrap.install(
        bootstrap.build_worker_services(settings, name=sender.hostname, gpu=gpu, group=group)
    )
    log.info("worker pinned", action="worker.pinned", gpu=gpu, group=group, node=sender.hostname)


def _batch_process(hostname: str, group: str) -> child.Child:
    name, _, host = hostname.partition("@")
    return child.Child(
        child.command(
            *("-Q", messages.batch_queue(group)),
            *("-n", f"{name}-batch@{host}"),
            # What is the worker's alone, or done by now.
            *("--pidfile", "", "--statedb", "", "--uid", "", "--gid", ""),
            *("--child-of", str(os.getpid())),
        )
    )


@worker_shutting_down.connect
def _drain(**_: Any) -> None:
    """On SIGTERM nothing new is taken; what still runs after a while is handed back."""
    timer = threading.Timer(DRAIN, bootstrap.worker_services().leases.drain)
    timer.daemon = True
    timer.start()


@worker_shutdown.connect
def _close(sender: Any, **_: Any) -> None:
    """After the last task ended."""
    services = bootstrap.worker_services()
    try:
        services.state.absent(services.group, services.name)
    except Unavailable:
        pass  # the presence ends by itself
    services.close()


@worker_ready.connect
def _settle(**_: Any) -> None:
    memory.settle()


class BatchProcess(bootsteps.StartStopStep):  # type: ignore[misc]
    """Has the batch lane run by a process of its own, which ends when and as this worker does."""

    def include_if(self, worker: Any) -> bool:
        return worker.batch_process is not None

    def create(self, worker: Any) -> child.Child:
        """What Celery starts with the worker and stops, or kills, with it."""
        made: child.Child = worker.batch_process
        worker_shutting_down.connect(self._pass_on)
        return made

    def _pass_on(self, how: str, **_: Any) -> None:
        """Beside this worker, not after it."""
        self.obj.tell(signal.SIGKILL if how == "Cold" else signal.SIGTERM)


class BatchLane(bootsteps.StartStopStep):  # type: ignore[misc]
    """Consumes the group's batch queue on its own channel, `batch_slots` messages at a time."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **options: Any):
        settings: Settings = c.app.tidegate
        self._slots = settings.batch_slots
        self._consumer: Consumer | None = None
        c.initial_prefetch_count = settings.realtime_slots
        super().__init__(c, **options)

    def start(self, c: Any) -> None:
        if c.connection.transport.driver_type == "amqp":
            messages.DEAD(c.connection.default_channel).declare()
        queues = c.controller.batch_queues
        if not queues:
            return
        self._consumer = Consumer(
            c.connection.channel(),
            queues=queues,
            accept=c.app.conf.accept_content,
            on_decode_error=c.on_decode_error,
        )
        self._consumer.on_message = c.create_task_handler()
        self._consumer.qos(prefetch_count=self._slots)
        self._consumer.consume()

    def stop(self, c: Any) -> None:
        """Take no more; what runs goes on."""
        if self._consumer is not None:
            ignore_errors(c, self._consumer.cancel)

    def shutdown(self, c: Any) -> None:
        if self._consumer is not None:
            self.stop(c)
            ignore_errors(c, self._consumer.close)
            self._consumer = None


class Presence(bootsteps.StartStopStep):  # type: ignore[misc]
    """Tells gateways that this worker is there, while its event loop turns and its Triton lives.

    The loop stamps the time; a thread announces it only while the stamp is fresh: a worker whose
    loop hangs falls silent, and one slow Redis command never holds up the loop. One that hangs for
    good ends itself, so that its supervisor starts another.
    """

    requires = (BatchLane,)

    def __init__(self, c: Any, **options: Any):
        self._stamp = time.monotonic()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._announces = False
        self._reads_batch = False
        super().__init__(c, **options)

    def start(self, c: Any) -> None:
        # Gateways would count on a worker that reads batch work only.
        self._announces = bool(c.controller.takes_realtime)
        self._reads_batch = bool(c.controller.batch_queues)
        self._stopping.clear()
        self._stamp = time.monotonic()
        c.timer.call_repeatedly(1.0, self._tick)
        self._thread = threading.Thread(target=self._announce, name="presence", daemon=True)
        self._thread.start()

    def _tick(self) -> None:
        self._stamp = time.monotonic()

    def _ask_again(self, services: bootstrap.WorkerServices) -> None:
        """Hints that went out while nobody read them may be gone by now."""
        try:
            services.backlog.rehint(services.group)
        except Unavailable as error:
            log.warning("not told again", action="worker.unhinted", error=error.message)
        services.pump.kick(services.group)

    def _announce(self) -> None:
        services = bootstrap.worker_services()
        if self._reads_batch:
            self._ask_again(services)
        stamp, looks = self._stamp, 0
        while True:
            # Looks, not seconds: a process that was stopped for an hour has not hung.
            stamp, looks = self._stamp, looks + 1 if self._stamp == stamp else 0
            if looks >= STALLED:
                log.critical("the event loop hangs; ending", action="worker.stalled")
                os._exit(STUCK)
            if self._announces and time.monotonic() - self._stamp < PRESENCE_TTL:
                try:
                    if services.server.live(Deadline.after(1)):
                        services.state.present(services.group, services.name, PRESENCE_TTL)
                except TidegateError as error:
                    log.warning("not announced", action="worker.silent", error=error.message)
                except Exception:
                    log.exception("not announced", action="worker.silent")
            if self._stopping.wait(PRESENCE_EVERY):
                return

    def stop(self, c: Any) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    shutdown = stop
