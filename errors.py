"""Every error Tidegate raises on purpose.

TidegateError
├── BadRequest               the client sent something we will never accept
│   ├── BadBody              the body is not what its headers say (framing, JSON, compression)
│   ├── BadTensor            a tensor does not fit the model; names the tensor
│   ├── BadFile              an uploaded file of arrays can't be read
│   ├── Unsupported          a legal request for something we do not do
│   └── KeyReused            an Idempotency-Key that was used for another request
├── Unauthenticated          no key, or a key we do not know
├── Forbidden                a known key that may not do this
├── NotFound
│   └── ModelNotFound        unknown model or version
├── Conflict                 the object is in a state that forbids this
├── Gone                     it existed, and its retention is over
├── TooLarge                 over a size limit
├── Unavailable              try again later; carries the seconds to wait
│   ├── Overloaded           more is asked for than is done in time
│   └── ModelNotReady        the model server is down, or the model is not loaded
│       └── ServerLost       the model server went away in the middle of a call
├── DeadlineExceeded         the time the client gave is over
├── Overran                  one attempt took longer than an attempt may
├── Cancelled                the client, or the ledger on its behalf, called it off
└── ModelFailed              the model itself answered with an error

An error carries a stable `code` and the parameter it is about. Whether the durable lane tries
again after it is said once, in `RETRIES` below; what it means in HTTP, in `web/error_handlers.py`.
Errors cross the queue as `to_wire()` / `from_wire()`; unknown codes come back as the root.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar


class TidegateError(Exception):
    """The root. `message` is written for the client and never holds a traceback."""

    code: ClassVar[str] = "internal"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None):
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.param, self.retry_after))

    @property
    def retry(self) -> Retry:
        """What the durable lane does after this error, by its nearest ancestor in `RETRIES`."""
        return next(RETRIES[cls] for cls in type(self).__mro__ if cls in RETRIES)

    def to_wire(self) -> dict[str, Any]:
        """This error as a JSON object for the queue and the ledger."""
        # Postgres keeps no NUL in text, and a model may say anything.
        wire: dict[str, Any] = {"code": self.code, "message": self.message.replace("\0", "\ufffd")}
        if self.param is not None:
            wire["param"] = self.param
        if self.retry_after is not None:
            wire["retry_after"] = self.retry_after
        return wire


def _rebuild(
    cls: type[TidegateError], message: str, param: str | None, retry_after: float | None
) -> TidegateError:
    return cls(message, param=param, retry_after=retry_after)


class BadRequest(TidegateError):
    code = "bad_request"


class BadBody(BadRequest):
    code = "bad_body"


class BadTensor(BadRequest):
    code = "bad_tensor"


class BadFile(BadRequest):
    code = "invalid_file"


class Unsupported(BadRequest):
    code = "unsupported"


class KeyReused(BadRequest):
    code = "idempotency_key_reused"


class Unauthenticated(TidegateError):
    code = "unauthenticated"


class Forbidden(TidegateError):
    code = "forbidden"


class NotFound(TidegateError):
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class Conflict(TidegateError):
    code = "conflict"


class Gone(TidegateError):
    code = "gone"


class TooLarge(TidegateError):
    code = "too_large"


class Unavailable(TidegateError):
    code = "unavailable"


class Overloaded(Unavailable):
    code = "overloaded"


class ModelNotReady(Unavailable):
    code = "model_not_ready"


class ServerLost(ModelNotReady):
    code = "model_server_lost"


class DeadlineExceeded(TidegateError):
    code = "deadline_exceeded"


class Overran(TidegateError):
    code = "attempt_overran"


class Cancelled(TidegateError):
    code = "cancelled"


class ModelFailed(TidegateError):
    code = "model_failed"


class Retry(Enum):
    """What the durable lane does about a failed attempt."""

    NEVER = "never"
    """The same would happen again: the item, or the chunk, has failed."""
    COUNTED = "counted"
    """Another attempt may do better, but what was tried may be to blame: so many, and no more."""
    FREE = "free"
    """What was tried is not to blame (something it needs is away): until the deadline."""


RETRIES: dict[type[TidegateError], Retry] = {
    TidegateError: Retry.COUNTED,
    BadRequest: Retry.NEVER,
    Unauthenticated: Retry.NEVER,
    Forbidden: Retry.NEVER,
    NotFound: Retry.NEVER,
    Conflict: Retry.NEVER,
    Gone: Retry.NEVER,
    TooLarge: Retry.NEVER,
    Unavailable: Retry.FREE,
    # Perhaps by the doing of what it ran.
    ServerLost: Retry.COUNTED,
    DeadlineExceeded: Retry.NEVER,
    Overran: Retry.COUNTED,
    Cancelled: Retry.NEVER,
    ModelFailed: Retry.NEVER,
}


def _tree(cls: type[TidegateError]) -> list[type[TidegateError]]:
    return [cls, *(found for child in cls.__subclasses__() for found in _tree(child))]


BY_CODE: dict[str, type[TidegateError]] = {cls.code: cls for cls in _tree(TidegateError)}


def from_wire(wire: dict[str, Any]) -> TidegateError:
    """The error that `to_wire` wrote."""
    cls = BY_CODE.get(str(wire.get("code")), TidegateError)
    return cls(
        str(wire.get("message", "unknown error")),
        param=wire.get("param"),
        retry_after=wire.get("retry_after"),
    )
