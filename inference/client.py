"""NVIDIA Triton, by gRPC: the one way a worker gets an answer from a model.

gRPC because its HTTP sibling is not thread-safe, and because only gRPC tells Triton that a caller
left. One channel per process, shared by its threads, made at the first call: a channel made before
a fork hangs after it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final, Protocol

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from errors import (
    BadRequest,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    ServerLost,
    TidegateError,
    TooLarge,
    Unavailable,
    Unsupported,
)
from inference import packing
from inference.deadline import CancelToken, Deadline
from inference.protocol import message_to_result, request_to_message, to_json
from inference.tensors import InferRequest, InferResult, Outcome

__all__ = ["CancelToken", "Deadline", "ModelServer", "Outcome", "TritonServer", "translate"]

Json = dict[str, Any]

RETRY_AFTER: Final = 1.0
"""Seconds a client is told to wait where a model server is away or full."""
MAX_ERROR_BYTES: Final = 1 << 20
"""The longest text of an error that is read; with a longer one the model failed all the same."""
RECONNECT: Final = 1.0
"""Most seconds to wait for a lost connection before the request fails; then others may have it."""
BATCH_SIZE_TIMEOUT: Final = 1.0
"""Seconds to ask how many rows a model takes at once."""
BATCH_SIZE_TTL: Final = 30.0
"""Seconds to remember how many rows a model takes at once. Wrong only slows: see `infer_many`."""


class ModelServer(Protocol):
    """A server of models. Thread-safe. Every method raises errors of ours and no others:

    ModelNotFound; ModelNotReady where a later try may find it; DeadlineExceeded; Cancelled;
    BadRequest for what the model does not take; ModelFailed for what it failed at. Where `version`
    is "", the server chooses the latest.
    """

    def infer(
        self, request: InferRequest, deadline: Deadline, cancelled: CancelToken | None = None
    ) -> InferResult:
        """Run one request. On the deadline and on `cancelled` the server is told to stop."""

    def infer_many(
        self,
        requests: Sequence[InferRequest],
        deadline: Deadline,
        cancelled: Sequence[CancelToken] | None = None,
    ) -> list[Outcome]:
        """Run requests together; the outcome of each, in their order. Raises nothing itself.
        `cancelled`: a token a request; one that shares its call with others is called off once they
        all are, and its outcome is Cancelled at any rate."""

    def start(
        self, request: InferRequest, deadline: Deadline, cancelled: CancelToken | None = None
    ) -> Callable[[], Outcome]:
        """Send one request, and do something else meanwhile: what is returned waits for its
        outcome. Neither raises."""

    def server_metadata(self, deadline: Deadline) -> Json:
        """`{name, version, extensions}`"""

    def metadata(self, model: str, version: str, deadline: Deadline) -> Json:
        """`{name, versions, platform, inputs, outputs}`"""

    def config(self, model: str, version: str, deadline: Deadline) -> Json:
        """The model's configuration, with its defaults filled in."""

    def statistics(self, model: str, version: str, deadline: Deadline) -> Json:
        """`{model_stats: [...]}`; of all models where `model` is ""."""

    def repository_index(self, deadline: Deadline, *, ready: bool = False) -> list[Json]:
        """`[{name, version?, state?, reason?}]`; only ready ones on request."""

    def live(self, deadline: Deadline) -> bool:
        """Does the server answer? False where it cannot be reached."""

    def ready(self, deadline: Deadline, model: str | None = None, version: str = "") -> bool:
        """Would the server, or this model, take a request now? False where it cannot be reached."""

    def close(self) -> None:
        """Let go of connections; calls in progress end with Cancelled."""


class TritonServer:
    """`ModelServer` by gRPC to the Triton at `address` (host:port)."""

    def __init__(self, address: str, max_message_bytes: int):
        """`max_message_bytes`: the most bytes of one request or one response."""
        self.address = address
        self._max_message_bytes = max_message_bytes
        self._lock = threading.Lock()
        self._pid = 0
        self._channel: Any = None
        self._stub: Any = None
        self._batch_sizes: dict[tuple[str, str], tuple[int, Deadline]] = {}

    def close(self) -> None:
        """Close the channel; calls in progress end with Cancelled. A later call opens a new one."""
        with self._lock:
            channel, self._channel, self._pid = self._channel, None, 0
        if channel is not None:
            channel.close()

    def infer(
        self, request: InferRequest, deadline: Deadline, cancelled: CancelToken | None = None
    ) -> InferResult:
        tokens = None if cancelled is None else [cancelled]
        result: InferResult = _value(self._infer_each([request], deadline, tokens)[0])
        return result

    def infer_many(
        self,
        requests: Sequence[InferRequest],
        deadline: Deadline,
        cancelled: Sequence[CancelToken] | None = None,
    ) -> list[Outcome]:
        outcomes: list[Outcome | None] = [None] * len(requests)
        packs = self._plan(requests, deadline)
        tokens = None
        if cancelled is not None:
            tokens = [
                CancelToken.all_of(cancelled[member.index] for member in pack.members)
                for pack in packs
            ]
        answers = self._infer_each([pack.request for pack in packs], deadline, tokens)
        alone: list[int] = []
        for pack, answer in zip(packs, answers, strict=True):
            indexes = [member.index for member in pack.members]
            try:
                shares: Sequence[Outcome] = packing.split(pack, _value(answer))
            except TidegateError as error:
                if pack.merged and may_be_one_members_fault(error):
                    alone += indexes
                    continue
                shares = [error] * len(indexes)
            except packing.UnsplittableError:
                alone += indexes
                continue
            for index, share in zip(indexes, shares, strict=True):
                outcomes[index] = share
        if alone:
            # One by one, so that a request the model fails at does not fail its neighbours.
            tokens = None if cancelled is None else [cancelled[at] for at in alone]
            again = self._infer_each([requests[at] for at in alone], deadline, tokens)
            for index, share in zip(alone, again, strict=True):
                outcomes[index] = share
        for index, token in enumerate(cancelled or ()):
            if token.cancelled:
                outcomes[index] = Cancelled(_TEXTS[Cancelled])
        assert None not in outcomes
        return [outcome for outcome in outcomes if outcome is not None]

    def start(
        self, request: InferRequest, deadline: Deadline, cancelled: CancelToken | None = None
    ) -> Callable[[], Outcome]:
        message = _with_timeout(request_to_message(request), deadline)
        wait = self._begin("ModelInfer", message, deadline, cancelled)

        def outcome() -> Outcome:
            answer = wait()
            if isinstance(answer, _LOST) and self._reconnect(deadline):
                answer = self._begin("ModelInfer", message, deadline, cancelled)()
            return answer if isinstance(answer, TidegateError) else _read_result(answer)

        return outcome

    def server_metadata(self, deadline: Deadline) -> Json:
        return to_json(self._call("ServerMetadata", pb.ServerMetadataRequest(), deadline))

    def metadata(self, model: str, version: str, deadline: Deadline) -> Json:
        message = pb.ModelMetadataRequest(name=model, version=version)
        json = to_json(self._call("ModelMetadata", message, deadline))
        return {name: value for name, value in json.items() if name != "properties"}

    def config(self, model: str, version: str, deadline: Deadline) -> Json:
        message = pb.ModelConfigRequest(name=model, version=version)
        return to_json(self._call("ModelConfig", message, deadline).config)

    def statistics(self, model: str, version: str, deadline: Deadline) -> Json:
        message = pb.ModelStatisticsRequest(name=model, version=version)
        return to_json(self._call("ModelStatistics", message, deadline))

    def repository_index(self, deadline: Deadline, *, ready: bool = False) -> list[Json]:
        message = pb.RepositoryIndexRequest(ready=ready)
        models = to_json(self._call("RepositoryIndex", message, deadline))["models"]
        # Triton's HTTP leaves out what it does not know, its gRPC says "".
        return [{name: value for name, value in model.items() if value} for model in models]

    def live(self, deadline: Deadline) -> bool:
        return self._probe("ServerLive", pb.ServerLiveRequest(), deadline, "live")

    def ready(self, deadline: Deadline, model: str | None = None, version: str = "") -> bool:
        if model is None:
            return self._probe("ServerReady", pb.ServerReadyRequest(), deadline, "ready")
        message = pb.ModelReadyRequest(name=model, version=version)
        return self._probe("ModelReady", message, deadline, "ready")

    # Packing

    def _plan(self, requests: Sequence[InferRequest], deadline: Deadline) -> list[packing.Pack]:
        """Packs over all models asked for; their members count through all requests."""
        by_model: dict[tuple[str, str], list[int]] = {}
        for index, request in enumerate(requests):
            by_model.setdefault((request.model, request.version), []).append(index)
        packs: list[packing.Pack] = []
        for (model, version), indexes in by_model.items():
            rows = self._batch_size(model, version, deadline) if len(indexes) > 1 else 0
            # Half, because the answer may be larger than the question.
            share = packing.plan(
                [requests[at] for at in indexes], rows, self._max_message_bytes // 2
            )
            for pack in share:
                members = tuple(replace(one, index=indexes[one.index]) for one in pack.members)
                packs.append(replace(pack, members=members))
        return packs

    def _batch_size(self, model: str, version: str, deadline: Deadline) -> int:
        known = self._batch_sizes.get((model, version))
        if known is not None and not known[1].expired():
            return known[0]
        # Nobody can cancel this one.
        soon = Deadline.after(min(BATCH_SIZE_TIMEOUT, deadline.remaining()), deadline.clock)
        try:
            size = int(self.config(model, version, soon)["max_batch_size"])
        except TidegateError:
            # Sent one by one, each request then meets the error itself.
            return 0
        self._batch_sizes[model, version] = (size, Deadline.after(BATCH_SIZE_TTL, deadline.clock))
        return size

    # Calling

    def _infer_each(
        self,
        requests: Sequence[InferRequest],
        deadline: Deadline,
        cancelled: Sequence[CancelToken] | None,
    ) -> list[Outcome]:
        messages = [_with_timeout(request_to_message(one), deadline) for one in requests]
        answers = self._call_each("ModelInfer", messages, deadline, cancelled)
        return [
            answer if isinstance(answer, TidegateError) else _read_result(answer)
            for answer in answers
        ]

    def _probe(self, method: str, message: Any, deadline: Deadline, field: str) -> bool:
        try:
            return bool(getattr(self._call(method, message, deadline), field))
        except (Unavailable, DeadlineExceeded):
            return False

    def _call(self, method: str, message: Any, deadline: Deadline) -> Any:
        return _value(self._call_each(method, [message], deadline, None)[0])

    def _call_each(
        self,
        method: str,
        messages: Sequence[Any],
        deadline: Deadline,
        cancelled: Sequence[CancelToken] | None,
    ) -> list[Any]:
        """The response or the error of each message, all sent at once.

        A call that lost its connection is sent once more: the first calls after a restart of the
        server find the old connection. A model may so see a request twice, which "at least once"
        allows.
        """
        answers = self._send(method, messages, deadline, cancelled)
        lost = [at for at, answer in enumerate(answers) if isinstance(answer, _LOST)]
        if lost and self._reconnect(deadline):
            tokens = None if cancelled is None else [cancelled[at] for at in lost]
            again = self._send(method, [messages[at] for at in lost], deadline, tokens)
            for at, answer in zip(lost, again, strict=True):
                answers[at] = answer
        return answers

    def _send(
        self,
        method: str,
        messages: Sequence[Any],
        deadline: Deadline,
        cancelled: Sequence[CancelToken] | None,
    ) -> list[Any]:
        if len(messages) == 1 and cancelled is None:
            # The blocking form spares a hand-over between threads; nobody can cancel it.
            call = getattr(self._connect(), method)
            return [_answer(lambda: call(messages[0], timeout=deadline.require()))]
        waits = [
            self._begin(method, message, deadline, cancelled[at] if cancelled is not None else None)
            for at, message in enumerate(messages)
        ]
        return [wait() for wait in waits]

    def _begin(
        self, method: str, message: Any, deadline: Deadline, token: CancelToken | None
    ) -> Callable[[], Any]:
        """Send one message; what is returned waits for the response or the error."""
        call = getattr(self._connect(), method)

        def send() -> Any:
            remaining = deadline.require()
            if token is not None:
                token.check()
            return call.future(message, timeout=remaining)

        future = _answer(send)
        if isinstance(future, TidegateError):
            return lambda: future
        calling = ExitStack()
        if token is not None:
            calling.enter_context(token.calling(future.cancel))

        def wait() -> Any:
            with calling:
                return _answer(future.result)

        return wait

    def _connect(self) -> Any:
        with self._lock:
            if self._pid != os.getpid():
                self._channel = grpc.insecure_channel(self.address, self._channel_options())
                self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
                self._pid = os.getpid()
            return self._stub

    def _channel_options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.max_send_message_length", self._max_message_bytes),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            # An error's text travels as metadata, of which gRPC takes 8 to 16 KiB by itself; and a
            # model may say more when it fails.
            ("grpc.max_metadata_size", MAX_ERROR_BYTES),
            ("grpc.absolute_max_metadata_size", MAX_ERROR_BYTES),
            # More often than once a minute, and servers answer with GOAWAY too_many_pings.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            # A restarted Triton is found within a second, not after gRPC's two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.min_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 500),
            # Two clients of one address in a process do not wait for each other's backoff.
            ("grpc.use_local_subchannel_pool", 1),
        ]

    def _reconnect(self, deadline: Deadline) -> bool:
        """Wait a moment for the connection; True when it is there."""
        with self._lock:
            channel = self._channel
        if channel is None:
            return False
        connected = grpc.channel_ready_future(channel)
        try:
            connected.result(timeout=min(RECONNECT, deadline.remaining()))
        except grpc.FutureTimeoutError:
            return False
        finally:
            connected.cancel()
        return True


# Errors


class _ConnectionLost(ModelNotReady):
    """There was no connection, or it was given up: the server has not seen the call, as far as one
    can tell."""


_LOST = (_ConnectionLost, ServerLost)


def may_be_one_members_fault(error: TidegateError) -> bool:
    """Of several that shared a call; the others may do better alone."""
    return not isinstance(error, Unavailable | DeadlineExceeded | Cancelled | ModelNotFound)


ERRORS: Final[Mapping[grpc.StatusCode, type[TidegateError]]] = {
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNKNOWN: ModelFailed,
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.NOT_FOUND: ModelNotFound,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    # Triton's restricted APIs: this deployment's mistake, and no client can mend it.
    grpc.StatusCode.PERMISSION_DENIED: TidegateError,
    grpc.StatusCode.UNAUTHENTICATED: TidegateError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: ModelFailed,
    grpc.StatusCode.ABORTED: ModelFailed,
    grpc.StatusCode.OUT_OF_RANGE: ModelFailed,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.INTERNAL: ModelFailed,
    grpc.StatusCode.UNAVAILABLE: ModelNotReady,
    grpc.StatusCode.DATA_LOSS: ModelFailed,
}
"""What each gRPC status means to us, unless `PHRASES` knows better."""

PHRASES: Final[Sequence[tuple[grpc.StatusCode, str, type[TidegateError]]]] = (
    # The client's own limits on messages.
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "message larger than max", TooLarge),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "metadata size exceeds", ModelFailed),
    # Triton 2.51: a model that is being loaded or unloaded is "not found".
    (grpc.StatusCode.NOT_FOUND, "has no available versions", ModelNotReady),
    # ... and its statistics call an unknown model an invalid argument.
    (grpc.StatusCode.INVALID_ARGUMENT, "is not available", ModelNotFound),
    # The process of a Python model died or hung, and is started again: whose fault that was, the
    # next attempts show.
    (grpc.StatusCode.INTERNAL, "is not healthy", TidegateError),
    (grpc.StatusCode.INTERNAL, "failed to retrieve the response error", TidegateError),
    # Its queue: the request's `timeout` passed there, or there was no room.
    (grpc.StatusCode.UNAVAILABLE, "timeout expired", DeadlineExceeded),
    (grpc.StatusCode.UNAVAILABLE, "exceeds maximum queue size", Unavailable),
    # gRPC gives a broken connection the status that a server gives a busy model.
    (grpc.StatusCode.UNAVAILABLE, "failed to connect", _ConnectionLost),
    (grpc.StatusCode.UNAVAILABLE, "socket closed", ServerLost),
    (grpc.StatusCode.UNAVAILABLE, "connection reset", ServerLost),
    (grpc.StatusCode.UNAVAILABLE, "broken pipe", ServerLost),
    (grpc.StatusCode.UNAVAILABLE, "goaway", _ConnectionLost),
    (grpc.StatusCode.UNAVAILABLE, "cancelling all calls", ServerLost),
    (grpc.StatusCode.UNAVAILABLE, "ping timeout", _ConnectionLost),
    (grpc.StatusCode.UNAVAILABLE, "keepalive", _ConnectionLost),
    (grpc.StatusCode.UNAVAILABLE, "resolution failed", _ConnectionLost),
)
"""Where the text says more than the status does: status, words in lower case, error."""


_TEXTS: Final[Mapping[type[TidegateError], str]] = {
    _ConnectionLost: "the model server cannot be reached",
    ServerLost: "the model server went away while it ran this",
    DeadlineExceeded: "the time for this request is over",
    Cancelled: "the request was called off",
}
"""Where gRPC's words would mean nothing to a client of ours."""


def translate(status: grpc.StatusCode, details: str) -> TidegateError:
    """Our error for a failed call."""
    lower = details.lower()
    kind = next(
        (kind for code, words, kind in PHRASES if code is status and words in lower),
        ERRORS[status],
    )
    message = _TEXTS.get(kind) or _clean(details) or str(status.value[1])
    return kind(message, retry_after=RETRY_AFTER if issubclass(kind, Unavailable) else None)


def _clean(details: str) -> str:
    """Triton's text without what only its operator may see: the traceback of a Python model."""
    text = details.partition("\n\nAt:\n")[0]
    if text.startswith("[request id: "):
        text = text.partition("] ")[2]
    return text.strip()[:2000]


def _answer(result: Callable[[], Any]) -> Any:
    try:
        return result()
    except TidegateError as error:
        return error
    except grpc.FutureCancelledError:
        return Cancelled(_TEXTS[Cancelled])
    except grpc.RpcError as error:
        return translate(error.code(), error.details() or "")
    except ValueError:
        return _closed()


def _closed() -> TidegateError:
    """For the ValueError by which gRPC says that the channel was closed under the call."""
    return Cancelled("the connection to the model server was closed")


def _read_result(message: Any) -> Outcome:
    try:
        return message_to_result(message)
    except ValueError:
        return ModelFailed("the model server answered without the data of its outputs")


def _value(answer: Any) -> Any:
    if isinstance(answer, TidegateError):
        raise answer
    return answer


def _with_timeout(message: Any, deadline: Deadline) -> Any:
    """Triton drops the request from its queue when its time is over, without running it."""
    left = max(1, int(deadline.remaining() * 1e6))
    asked = message.parameters["timeout"].int64_param or left
    message.parameters["timeout"].int64_param = min(asked, left)
    return message
