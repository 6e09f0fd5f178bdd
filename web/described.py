"""What OpenAPI says besides the bodies: the parameters and forms that routes have in common."""

from __future__ import annotations

from typing import Any

from storage.events import DeliveryState
from storage.lifecycle import JobKind, JobState


def header(name: str, text: str) -> dict[str, Any]:
    """A header of a request."""
    return {"in": "header", "name": name, "schema": {"type": "string"}, "description": text}


def query(name: str, text: str, **schema: Any) -> dict[str, Any]:
    """A parameter in the query."""
    schema.setdefault("type", "string")
    return {"in": "query", "name": name, "schema": schema, "description": text}


def page(default: int, most: int) -> list[dict[str, Any]]:
    """Those of a list that comes in pages."""
    size = {"type": "integer", "minimum": 1, "maximum": most, "default": default}
    return [
        query("limit", "How many.", **size),
        query("after", "The `last_id` of the page before."),
    ]


PREFER = header("Prefer", "`wait=n`: seconds to wait for the job's end; `respond-async`: none.")
DEADLINE = header(
    "Tidegate-Deadline",
    "Seconds from now, or a moment in RFC 3339, until which the job must have ended. It goes "
    "before the body's `deadline`.",
)
STORE_DEADLINE = header(
    "Tidegate-Deadline",
    "Seconds from now, or a moment in RFC 3339, until which bytes are read or stored; then 504, or "
    "a body that breaks off.",
)

KIND = query("kind", "Jobs of this kind.", enum=[kind.value for kind in JobKind])
STATUS = query("status", "Jobs in this state.", enum=[state.value for state in JobState])
PURPOSE = query("purpose", "Files of this purpose.")
ORDER = query("order", "By age.", enum=["asc", "desc"], default="desc")
LETTERS = [
    query("job_id", "Letters of this job or batch."),
    query("model", "Letters of this model."),
    query("code", "Letters that died of this `error.code`."),
    query("redriven", "Those that have been run again, or have not.", type="boolean"),
]
STATE = query("state", "Deliveries in this state.", enum=[state.value for state in DeliveryState])

UPLOAD: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["file", "purpose"],
                "properties": {
                    "file": {"type": "string", "contentMediaType": "application/octet-stream"},
                    "purpose": {"type": "string", "enum": ["batch"]},
                    "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                    "expires_after[seconds]": {
                        "type": "integer",
                        "minimum": 3600,
                        "maximum": 2_592_000,
                    },
                },
            }
        }
    },
}
"""The body of an upload."""
