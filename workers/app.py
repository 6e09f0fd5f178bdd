"""The Celery app: its settings, and their reasons."""

from __future__ import annotations

from celery import Celery
from celery.signals import setup_logging

from config import Settings
from tasks import messages
from workers import broker, gpu, logs, transport


def build_app(settings: Settings) -> Celery:
    """A Celery app for one deployment. Tasks are named, not imported, so that a gateway that only
    sends loads no model client."""
    transport.install()
    app = Celery("tidegate", broker=settings.broker)
    # Current in every thread, not only in this one: requests and pumps run in others.
    app.set_default()
    queues = [messages.realtime_queue(settings.group), messages.batch_queue(settings.group)]
    app.conf.update(
        imports=("tasks.realtime", "tasks.chunks"),
        # Nothing but names and numbers travels, and nothing is ever unpickled.
        task_serializer="json",
        event_serializer="json",
        accept_content=["json"],
        # Results live in the ledger or in a gateway's reply list; a backend would be a third.
        result_backend=None,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        # A crash after the claim is found by the lease; the hint may come again, it is fenced.
        task_acks_late=True,
        task_acks_on_failure_or_timeout=True,
        task_reject_on_worker_lost=False,
        task_track_started=False,
        # Senders name a queue by `messages.queue`; `gpu` refuses a -Q that nobody sends to.
        task_queues=[messages.queue(name) for name in queues],
        task_create_missing_queues=True,
        task_default_queue=queues[0],
        # gevent does not come back after a Redis restart; a thread can't be killed, so every call
        # has a deadline of its own.
        worker_pool="threads",
        worker_consumer="workers.consumer:Consumer",
        worker_concurrency=settings.realtime_slots + settings.batch_slots,
        worker_prefetch_multiplier=1,
        # The slots below are fixed per lane; Celery would size one prefetch for both.
        worker_enable_prefetch_count_reduction=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # On RabbitMQ: prefetch by consumer, which is all that quorum queues know.
        worker_detect_quorum_queues=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=settings.monitoring,
        worker_send_task_events=settings.monitoring,
        task_send_sent_event=False,
        # Bounded in a request: the ledger has the work, the sweep sends what was not sent.
        task_publish_retry=True,
        task_publish_retry_policy={
            "max_retries": 1,
            "interval_start": 0,
            "interval_step": 0.1,
            "interval_max": 0.2,
        },
        broker_connection_timeout=broker.CONNECT_TIMEOUT,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        # RabbitMQ closes a channel for what it does not like; a worker comes back from that, too.
        broker_channel_error_retry=True,
        broker_heartbeat=broker.HEARTBEAT,
        broker_transport_options=broker.transport_options(settings),
    )
    # Not in `app.conf`, which monitors may read.
    app.tidegate = settings
    gpu.extend(app)
    return app


@setup_logging.connect
def _logs(**_: object) -> None:
    """Tells Celery that logging is ours."""
    logs.configure()
