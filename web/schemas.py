"""The bodies of `/v1`, in marshmallow: what is checked is what OpenAPI says."""

from __future__ import annotations

import re
from typing import Any

from marshmallow import EXCLUDE, RAISE, Schema, ValidationError, fields, pre_load, validate

from storage import events
from storage.backlog import MOST_AHEAD
from storage.events import DeliveryState
from storage.lifecycle import ChunkKind, JobKind, JobState, Priority
from tasks.array_order import KINDS

_WINDOW = re.compile(r"([0-9]{1,6})(s|m|h|d)")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MAX_WINDOW = 30 * 86_400
MOST_NAMES = 64
"""Of one JSON object with fields; the largest has seven."""
MOST_REDRIVEN = 1000
"""Dead letters one call runs again."""
PRIORITIES = tuple(priority.name.lower() for priority in Priority)


def parse_window(text: str) -> float:
    """Seconds of a completion window such as `24h`. Raises `ValidationError`."""
    match = _WINDOW.fullmatch(text)
    seconds = int(match[1]) * _UNITS[match[2]] if match else 0
    if not 0 < seconds <= MAX_WINDOW:
        raise ValidationError("a number with s, m, h or d, up to 30d; for example 24h")
    return float(seconds)


class Body(Schema):
    """What is sent to us, or a part of it. While one body is looked at no other request is: what
    has too many names is refused before any of them is looked at."""

    @pre_load
    def _count(self, data: Any, **_: Any) -> Any:
        if isinstance(data, dict) and len(data) > MOST_NAMES:
            raise ValidationError(f"Has more than {MOST_NAMES} names.")
        return data


class _CountedFirst:
    """A field that looks at how many elements it was given before it looks at each."""

    validators: list[Any]

    def _deserialize(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        for check in self.validators:
            if isinstance(check, validate.Length) and isinstance(value, dict | list):
                check(value)
        return super()._deserialize(value, *args, **kwargs)  # type: ignore[misc]


class _Pairs(_CountedFirst, fields.Dict):
    pass


class _Listed(_CountedFirst, fields.List[Any]):
    pass


def _text(most: int, **options: Any) -> fields.String:
    return fields.String(
        validate=[
            validate.Length(max=most),
            validate.ContainsNoneOf("\0", error="Must not hold a NUL character."),
        ],
        **options,
    )


def _metadata() -> fields.Field[Any]:
    return _Pairs(
        keys=_text(64),
        values=_text(512),
        validate=validate.Length(max=16),
        allow_none=True,
        metadata={"description": "Up to 16 pairs of yours; keys to 64, values to 512 characters."},
    )


def _deadline() -> fields.Float:
    return fields.Float(
        validate=validate.Range(min=0, min_inclusive=False, max=MAX_WINDOW),
        metadata={"description": "Seconds until the job must have ended; then it expires."},
    )


class JobSubmit(Body):
    """One inference to run in the background."""

    class Meta:
        unknown = RAISE

    model = fields.String(required=True, validate=validate.Length(min=1, max=255))
    version = fields.String(load_default="", validate=validate.Regexp(r"[0-9]{0,18}\Z"))
    input = fields.Dict(
        required=True,
        metadata={"description": "An Open Inference Protocol infer request, as JSON."},
    )
    priority = fields.String(load_default="normal", validate=validate.OneOf(PRIORITIES))
    deadline = _deadline()
    metadata = _metadata()


class Redrive(Body):
    """How to run a dead letter again."""

    class Meta:
        unknown = RAISE

    deadline = _deadline()


class Letters(Body):
    """Which dead letters."""

    class Meta:
        unknown = RAISE

    job_id = _text(255)
    model = _text(255)
    code = _text(255, metadata={"description": "The `error.code` they died of."})


class RedriveMany(Redrive):
    """Which dead letters to run again; an empty filter is all of them."""

    filter = fields.Nested(Letters, required=True)
    limit = fields.Integer(
        load_default=MOST_REDRIVEN, strict=True, validate=validate.Range(min=1, max=MOST_REDRIVEN)
    )


class OutputExpiry(Body):
    """When a batch's output files go."""

    anchor = fields.String(required=True, validate=validate.Equal("created_at"))
    seconds = fields.Integer(
        required=True, strict=True, validate=validate.Range(min=3600, max=2_592_000)
    )


class BatchCreate(Body):
    """A batch over a file's lines or rows. The SDK may send newer fields: they are ignored."""

    class Meta:
        unknown = EXCLUDE

    input_file_id = fields.String(required=True)
    endpoint = fields.String(
        required=True,
        metadata={"description": "/v2/models/{model}[/versions/{n}]/infer"},
    )
    completion_window = fields.String(
        required=True, validate=parse_window, metadata={"description": "24h, 30m, …"}
    )
    output_expires_after = fields.Nested(OutputExpiry)
    priority = fields.String(load_default="normal", validate=validate.OneOf(PRIORITIES))
    metadata = _metadata()
    output_format = fields.String(
        validate=validate.OneOf(KINDS),
        metadata={"description": "Of the output file; as the input where it doesn't say."},
    )
    input_name = _text(
        255, metadata={"description": "The input that a .npy file is, where there are several."}
    )
    output_names = _Listed(
        _text(255),
        validate=validate.Length(min=1, max=64),
        metadata={"description": "Outputs to keep, of .npy and Parquet input; else all."},
    )


class _Page(Schema):
    """A part of a list."""

    object = fields.Constant("list")
    first_id = fields.String(allow_none=True)
    last_id = fields.String(allow_none=True)
    has_more = fields.Boolean()


class Items(Schema):
    total = fields.Integer()
    completed = fields.Integer()
    failed = fields.Integer()


class Job(Schema):
    """A job."""

    id = fields.UUID()
    object = fields.Constant("job")
    kind = fields.String(validate=validate.OneOf([kind.value for kind in JobKind]))
    model = fields.String()
    version = fields.String(allow_none=True)
    status = fields.String(validate=validate.OneOf([state.value for state in JobState]))
    priority = fields.String(validate=validate.OneOf(PRIORITIES))
    error = fields.Dict(allow_none=True)
    attempts = fields.Integer()
    queue_position = fields.Integer(
        allow_none=True,
        metadata={
            "description": "While it waits: about how many pieces of work come before it, counted "
            f"up to {MOST_AHEAD}. Not in lists."
        },
    )
    worker = fields.String(allow_none=True)
    items = fields.Nested(Items)
    created_at = fields.DateTime()
    started_at = fields.DateTime(allow_none=True)
    completed_at = fields.DateTime(allow_none=True)
    expires_at = fields.DateTime()
    metrics = fields.Dict()
    metadata = fields.Dict()
    redrive_of = fields.UUID(
        allow_none=True, metadata={"description": "The job whose dead letters this one runs again."}
    )
    urls = fields.Dict()


class DeadLetter(Schema):
    """A part of a job that was given up."""

    id = fields.String()
    object = fields.Constant("dead_letter")
    job_id = fields.UUID()
    job_kind = fields.String(validate=validate.OneOf([kind.value for kind in JobKind]))
    step = fields.String(
        validate=validate.OneOf([kind.value for kind in ChunkKind]),
        metadata={"description": "Reading the file in, running items, or putting answers together"},
    )
    model = fields.String()
    version = fields.String(allow_none=True)
    first_line = fields.Integer(allow_none=True)
    items = fields.Integer()
    attempts = fields.Integer()
    worker = fields.String(allow_none=True)
    error = fields.Dict()
    created_at = fields.DateTime()
    died_at = fields.DateTime()
    redriven_as = fields.UUID(allow_none=True)
    urls = fields.Dict()


class DeadLetterPage(_Page):
    """Dead letters, newest first; `after=last_id` gives the next ones."""

    data = fields.List(fields.Nested(DeadLetter))


class Redriven(Schema):
    """What a bulk redrive made."""

    object = fields.Constant("redrive")
    letters = fields.Integer()
    jobs = fields.List(fields.UUID())
    gone = fields.List(
        fields.String(), metadata={"description": "Letters whose input is not kept any more."}
    )
    has_more = fields.Boolean()


class JobPage(_Page):
    """Jobs, newest first; `after=last_id` gives the next ones."""

    data = fields.List(fields.Nested(Job))


class File(Schema):
    """A file, as OpenAI describes it."""

    id = fields.String()
    object = fields.Constant("file")
    bytes = fields.Integer()
    created_at = fields.Integer()
    expires_at = fields.Integer(allow_none=True)
    filename = fields.String()
    purpose = fields.String()
    status = fields.String()
    status_details = fields.String(allow_none=True)


class FilePage(_Page):
    """Files; `after=last_id` gives the next ones."""

    data = fields.List(fields.Nested(File))


class Deleted(Schema):
    """What is no more."""

    id = fields.String()
    object = fields.String()
    deleted = fields.Boolean()


class Batch(Schema):
    """A batch, as OpenAI describes it."""

    id = fields.String()
    object = fields.Constant("batch")
    endpoint = fields.String()
    model = fields.String()
    errors = fields.Dict(allow_none=True)
    input_file_id = fields.String()
    completion_window = fields.String()
    status = fields.String()
    output_file_id = fields.String(allow_none=True)
    error_file_id = fields.String(allow_none=True)
    created_at = fields.Integer()
    in_progress_at = fields.Integer(allow_none=True)
    expires_at = fields.Integer()
    finalizing_at = fields.Integer(allow_none=True)
    completed_at = fields.Integer(allow_none=True)
    failed_at = fields.Integer(allow_none=True)
    expired_at = fields.Integer(allow_none=True)
    cancelling_at = fields.Integer(allow_none=True)
    cancelled_at = fields.Integer(allow_none=True)
    request_counts = fields.Nested(Items)
    metadata = fields.Dict()


class BatchPage(_Page):
    """Batches, newest first; `after=last_id` gives the next ones."""

    data = fields.List(fields.Nested(Batch))


def _event_types(**options: Any) -> fields.Field[Any]:
    kinds = fields.String(validate=validate.OneOf(events.TYPES))
    return _Listed(kinds, validate=validate.Length(min=1, max=64), **options)


def _name(**options: Any) -> fields.String:
    return fields.String(
        validate=[
            validate.Length(min=1, max=255),
            validate.ContainsNoneOf("\0", error="Must not hold a NUL character."),
        ],
        **options,
    )


class WebhookCreate(Body):
    """Where to tell of what ends. The SDK may send fields newer than this: they are ignored."""

    class Meta:
        unknown = EXCLUDE

    name = _name(required=True)
    url = fields.String(required=True, metadata={"description": "https, on a public host"})
    event_types = _event_types(required=True)


class WebhookUpdate(Body):
    """What is to change; the rest stays."""

    class Meta:
        unknown = EXCLUDE

    name = _name()
    url = fields.String(metadata={"description": "https, on a public host"})
    event_types = _event_types()
    enabled = fields.Boolean(metadata={"description": "Deliver there at all."})


class WebhookRotate(Body):
    class Meta:
        unknown = EXCLUDE

    keep_old_secret_active_for_24_hours = fields.Boolean(load_default=False)


class WebhookTest(Body):
    class Meta:
        unknown = EXCLUDE

    event_type = fields.String(required=True, validate=validate.OneOf(events.TYPES))


class Webhook(Schema):
    """A webhook endpoint, as OpenAI describes it, and whether it is enabled."""

    id = fields.String()
    object = fields.Constant("webhook_endpoint")
    name = fields.String()
    url = fields.String()
    event_types = fields.List(fields.String())
    signing_secret_hint = fields.String()
    created_at = fields.Integer()
    updated_at = fields.Integer()
    enabled = fields.Boolean()
    disabled_at = fields.Integer(allow_none=True)
    disabled_reason = fields.String(allow_none=True)


class WebhookPage(_Page):
    """Endpoints, newest first; `after=last_id` gives the next ones."""

    data = fields.List(fields.Nested(Webhook))


class EventTypes(Schema):
    """The events there are."""

    object = fields.Constant("list")
    data = fields.List(fields.String())


class WebhookTested(Schema):
    """What a test was answered."""

    object = fields.Constant("webhook_endpoint.test")
    webhook_endpoint_id = fields.String()
    event_type = fields.String()
    status_code = fields.Integer()
    success = fields.Boolean()


class WebhookWithSecret(Webhook):
    """The same, with the secret: shown when it is made, and never again."""

    signing_secret = fields.String()


class DeliveryAttempt(Schema):
    """One try: a status, or an error."""

    attempt = fields.Integer()
    status_code = fields.Integer(allow_none=True)
    error = fields.String(allow_none=True)
    response = fields.String(allow_none=True)
    duration_ms = fields.Integer()
    ended_at = fields.Integer()


class Delivery(Schema):
    """An event on its way to an endpoint. `id` is the `webhook-id` header."""

    id = fields.String()
    object = fields.Constant("webhook_delivery")
    webhook_endpoint_id = fields.String()
    event_type = fields.String()
    event = fields.Dict()
    state = fields.String(validate=validate.OneOf([state.value for state in DeliveryState]))
    error = fields.String(allow_none=True)
    created_at = fields.Integer()
    finished_at = fields.Integer(allow_none=True)
    next_attempt_at = fields.Integer(allow_none=True)
    attempt_count = fields.Integer()
    attempts = fields.List(fields.Nested(DeliveryAttempt))


class DeliveryPage(_Page):
    """Deliveries, newest first; `after=last_id` gives the next ones."""

    data = fields.List(fields.Nested(Delivery))
