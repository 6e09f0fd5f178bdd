"""Rows of the ledger as the JSON that clients read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from storage import ids
from storage.dead_letters import Redriven
from storage.events import DeliveryState
from storage.files import FileRow
from storage.lifecycle import JobKind, JobState, Priority
from tasks.webhooks import message_id

BATCH_STATUS = {
    JobState.QUEUED: "validating",
    JobState.RUNNING: "in_progress",
    JobState.FINALIZING: "finalizing",
    JobState.CANCELLING: "cancelling",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELED: "cancelled",
    JobState.EXPIRED: "expired",
}


def batch_id(job_id: UUID) -> str:
    return f"batch_{job_id.hex}"


def file_id(value: UUID | None) -> str | None:
    return f"file-{value.hex}" if value else None


def job(row: Any) -> dict[str, Any]:
    """A durable job."""
    state = JobState(row.state)
    path = f"/v1/jobs/{row.id}"
    urls = {"self": path, "cancel": f"{path}/cancel", "result": f"{path}/result"}
    urls["events"] = f"{path}/events"
    if row.kind == JobKind.BATCH:
        urls["batch"] = f"/v1/batches/{batch_id(row.id)}"
    return {
        "id": str(row.id),
        "object": "job",
        "kind": row.kind,
        "model": row.model,
        "version": row.version or None,
        "status": state.value,
        "priority": Priority(row.priority).name.lower(),
        "error": row.error,
        "attempts": row.attempts,
        "worker": row.worker,
        "items": {"total": row.items_total, "completed": row.items_ok, "failed": row.items_failed},
        "created_at": row.created_at,
        "started_at": row.started_at,
        "completed_at": row.finished_at,
        "expires_at": row.deadline_at,
        "metrics": {
            "queue_ms": _milliseconds(row.created_at, row.started_at),
            "total_ms": _milliseconds(row.created_at, row.finished_at),
        },
        "metadata": row.metadata or {},
        "redrive_of": str(row.redrive_of) if row.redrive_of else None,
        "urls": urls,
    }


def letter_id(value: int) -> str:
    return f"dl_{value}"


def dead_letter(row: Any) -> dict[str, Any]:
    """A chunk that was given up. `lines` is the range of the batch's file, blank ones included."""
    path = f"/v1/dead-letters/{letter_id(row.id)}"
    urls = {"self": path, "redrive": f"{path}/redrive", "job": f"/v1/jobs/{row.job_id}"}
    if row.redriven_as:
        urls["redriven_as"] = f"/v1/jobs/{row.redriven_as}"
    return {
        "id": letter_id(row.id),
        "object": "dead_letter",
        "job_id": str(row.job_id),
        "job_kind": row.job_kind,
        "step": row.kind,
        "model": row.model,
        "version": row.version or None,
        "first_line": row.first_line if row.byte_end else None,
        "items": row.item_count,
        "attempts": row.attempts,
        "worker": row.worker,
        "error": row.error,
        "created_at": row.created_at,
        "died_at": row.finished_at,
        "redriven_as": str(row.redriven_as) if row.redriven_as else None,
        "urls": urls,
    }


def redriven(made: Redriven) -> dict[str, Any]:
    """What a bulk redrive made."""
    return {
        "object": "redrive",
        "letters": made.letters,
        "jobs": [str(job_id) for job_id in made.jobs],
        "gone": [letter_id(letter) for letter in made.gone],
        "has_more": made.more,
    }


def record(row: Any) -> dict[str, Any]:
    """A realtime request that has been answered."""
    path = f"/v1/jobs/{row.id}"
    return {
        "id": str(row.id),
        "object": "job",
        "kind": JobKind.REALTIME.value,
        "model": row.model,
        "version": row.version or None,
        "status": row.state,
        "error": row.error,
        "items": {
            "total": 1,
            "completed": int(row.error is None),
            "failed": int(row.error is not None),
        },
        "created_at": row.created_at,
        "completed_at": row.created_at + timedelta(milliseconds=row.duration_ms),
        "metrics": {
            "total_ms": row.duration_ms,
            "batch_size": row.batch_size,
            "cached": row.cached,
        },
        "metadata": {},
        "urls": {"self": path, "events": f"{path}/events"},
    }


def lost_record(job_id: UUID, *, over: bool) -> dict[str, Any]:
    """A realtime request whose id we gave, and whose record is not there (yet)."""
    error = {
        "code": "record_lost",
        "message": "the gateway died before it wrote down how this request ended",
    }
    return {
        "id": str(job_id),
        "object": "job",
        "kind": JobKind.REALTIME.value,
        "status": "failed" if over else "running",
        "error": error if over else None,
        "created_at": ids.created_at(job_id),
        "metadata": {},
        "urls": {"self": f"/v1/jobs/{job_id}", "events": f"/v1/jobs/{job_id}/events"},
    }


def batch(row: Any) -> dict[str, Any]:
    """A batch as the openai SDK reads it."""
    state = JobState(row.state)
    ended = _seconds(row.finished_at)
    return {
        "id": batch_id(row.id),
        "object": "batch",
        "endpoint": row.endpoint,
        "model": row.model,
        "errors": {"object": "list", "data": row.errors} if row.errors else _failure(row, state),
        "input_file_id": file_id(row.input_file_id),
        "completion_window": row.completion_window,
        "status": BATCH_STATUS[state],
        "output_file_id": file_id(row.output_file_id),
        "error_file_id": file_id(row.error_file_id),
        "created_at": _seconds(row.created_at),
        "in_progress_at": _seconds(row.running_at),
        "expires_at": _seconds(row.deadline_at),
        "finalizing_at": _seconds(row.finalizing_at),
        "completed_at": ended if state is JobState.SUCCEEDED else None,
        "failed_at": ended if state is JobState.FAILED else None,
        "expired_at": ended if state is JobState.EXPIRED else None,
        "cancelling_at": _seconds(row.cancelling_at),
        "cancelled_at": ended if state is JobState.CANCELED else None,
        "request_counts": {
            "total": row.items_total,
            "completed": row.items_ok,
            "failed": row.items_failed,
        },
        "metadata": row.metadata or {},
    }


def _failure(row: Any, state: JobState) -> dict[str, Any] | None:
    if state is not JobState.FAILED or not row.error:
        return None
    error = {"code": row.error.get("code"), "message": row.error.get("message")}
    return {"object": "list", "data": [error | {"line": None, "param": None}]}


def file(row: FileRow) -> dict[str, Any]:
    """A file as the openai SDK reads it."""
    return {
        "id": file_id(row.id),
        "object": "file",
        "bytes": row.bytes,
        "created_at": _seconds(row.created_at),
        "expires_at": _seconds(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
        "status_details": None,
    }


def webhook_id(value: UUID) -> str:
    return f"we_{value.hex}"


def webhook(row: Any, secret: str) -> dict[str, Any]:
    """An endpoint as the openai SDK reads it; of its secret a hint."""
    return {
        "id": webhook_id(row.id),
        "object": "webhook_endpoint",
        "name": row.name,
        "url": row.url,
        "event_types": row.events,
        "signing_secret_hint": f"whsec_...{secret.rstrip('=')[-4:]}",
        "created_at": _seconds(row.created_at),
        "updated_at": _seconds(row.updated_at),
        "enabled": row.disabled_at is None,
        "disabled_at": _seconds(row.disabled_at),
        "disabled_reason": row.disabled_why,
    }


def delivery(row: Any, attempts: Sequence[Any]) -> dict[str, Any]:
    """An event on its way, and what came of each try."""
    pending = row.state == DeliveryState.PENDING
    return {
        "id": message_id(row.id),
        "object": "webhook_delivery",
        "webhook_endpoint_id": webhook_id(row.webhook_id),
        "event_type": row.event,
        "event": row.payload,
        "state": row.state,
        "error": row.error,
        "created_at": _seconds(row.created_at),
        "finished_at": _seconds(row.finished_at),
        "next_attempt_at": (
            _seconds(max(row.not_before, row.created_at))
            if pending and row.lease_until is None
            else None
        ),
        "attempt_count": row.attempts,
        "attempts": [
            {
                "attempt": one.attempt,
                "status_code": one.status,
                "error": one.error,
                "response": one.response,
                "duration_ms": one.duration_ms,
                "ended_at": _seconds(one.created_at),
            }
            for one in attempts
        ],
    }


def page(rows: Sequence[Any], limit: int, view: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """A cursor page from up to `limit + 1` rows: the extra one says that there are more."""
    data = [view(row) for row in rows[:limit]]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(rows) > limit,
    }


def _seconds(moment: datetime | None) -> int | None:
    return int(moment.timestamp()) if moment else None


def _milliseconds(start: datetime | None, end: datetime | None) -> int | None:
    return round((end - start).total_seconds() * 1000) if start and end else None
