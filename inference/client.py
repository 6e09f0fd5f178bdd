"""NVIDIA Triton, by gRPC: the one way a worker gets an answer from a model.

gRPC because its HTTP sibling is not thread-safe, and because only gRPC tells Triton that a caller
left. One channel per process, shared by its threads, made at the first call: a channel made before
a fork hangs after it.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from queue import Empty, SimpleQueue
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
from inference.parts import CALLED_OFF, LATE, Call, Parts
from inference.protocol import message_to_result, request_to_message, to_json
from inference.tensors import InferRequest, InferResult, Outcome

__all__ = ["CancelToken", "Deadline", "ModelServer", "Outcome", "TritonServer", "translate"]

Json = dict[str, Any]
HandOut = Callable[[dict[int, Outcome]], object]
"""Takes a part of the outcomes, by their requests' places."""

RETRY_AFTER: Final = 1.0
"""Seconds a client is told to wait where a model server is away or full."""
MAX_ERROR_BYTES: Final = 1 << 20
"""The longest text of an error that is read; with a longer one the model failed all the same."""
RECONNECT: Final = 1.0
"""Most seconds to wait for a lost connection before the request fails; then others may have it."""
GATHER: Final = 0.02
"""Seconds that outcomes wait for those of other calls, to be handed out together."""
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

    def infer_in_parts(
        self,
        requests: Sequence[InferRequest],
        deadlines: Sequence[Deadline],
        hand_out: HandOut,
        cancelled: Sequence[CancelToken] | None = None,
        *,
        gather: float = GATHER,
    ) -> None:
        """As `infer_many`, but each request has a deadline of its own, and those that are over do
        not wait for the others: `hand_out` is given one part of the outcomes after another, each
        by its request's place, in this thread. A part waits `gather` seconds for more, so that
        what ends together is one part. What `hand_out` raises ends the calls still in progress."""

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
        call = Call(packing.single(request, 0), deadline, cancelled)
        result: InferResult = _value(self._infer(call))
        return result

    def infer_many(
        self,
        requests: Sequence[InferRequest],
        deadline: Deadline,
        cancelled: Sequence[CancelToken] | None = None,
    ) -> list[Outcome]:
        found: dict[int, Outcome] = {}
        deadlines = [deadline] * len(requests)
        self.infer_in_parts(requests, deadlines, found.update, cancelled, gather=math.inf)
        return [found[place] for place in range(len(requests))]

    def infer_in_parts(
        self,
        requests: Sequence[InferRequest],
        deadlines: Sequence[Deadline],
        hand_out: HandOut,
        cancelled: Sequence[CancelToken] | None = None,
        *,
        gather: float = GATHER,
    ) -> None:
        if not requests:
            return
        parts = Parts(requests, deadlines, cancelled)
        latest = max(deadlines, key=lambda one: one.at)
        calls = [parts.call(pack) for pack in self._plan(requests, latest)]
        if len(calls) == 1:
            # Nothing to hand out before this one is over: it needs no queue.
            calls = parts.settle(calls[0], self._infer(calls[0]))
        if calls:
            self._infer_each(calls, parts, hand_out, gather)
        if parts.any:
            hand_out(parts.take())

    def start(
        self, request: InferRequest, deadline: Deadline, cancelled: CancelToken | None = None
    ) -> Callable[[], Outcome]:
        message = _with_timeout(request_to_message(request), deadline)
        sent = self._begin("ModelInfer", message, deadline, cancelled)

        def outcome() -> Outcome:
            answer = sent.result()
            if isinstance(answer, _LOST) and self._reconnect(deadline):
                answer = self._begin("ModelInfer", message, deadline, cancelled).result()
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

    def _infer(self, call: Call) -> Outcome:
        message = _message(call)
        answer = self._exchange("ModelInfer", message, call.deadline, call.token)
        return answer if isinstance(answer, TidegateError) else _read_result(answer)

    def _infer_each(
        self, calls: Sequence[Call], parts: Parts, hand_out: HandOut, gather: float
    ) -> None:
        """Make these calls, and those that are made instead of failed ones, all at once. Hands out
        all parts but the last."""
        arrived: SimpleQueue[Call] = SimpleQueue()
        flying: dict[Call, _Sent] = {}
        until = math.inf
        away = False

        def send(call: Call) -> None:
            flying[call] = sent = self._begin(
                "ModelInfer", _message(call), call.deadline, call.token
            )
            sent.then(functools.partial(arrived.put, call))

        try:
            for call in calls:
                send(call)
            while flying:
                try:
                    pause = min(until - time.monotonic(), parts.next_expiry())
                    call = arrived.get(timeout=None if pause == math.inf else max(0.0, pause))
                except Empty:
                    pass
                else:
                    answer = flying.pop(call).result()
                    # One that stays away is waited for once, not by each of these calls.
                    lost = isinstance(answer, _LOST) and not call.again and not away
                    if lost and self._reconnect(call.deadline):
                        send(replace(call, again=True))
                    else:
                        away = away or lost
                        failed = isinstance(answer, TidegateError)
                        outcome = answer if failed else _read_result(answer)
                        for one in parts.settle(call, outcome):
                            send(one)
                parts.expire()
                if parts.any and until == math.inf:
                    until = time.monotonic() + gather
                if flying and time.monotonic() >= until:
                    hand_out(parts.take())
                    until = math.inf
        finally:
            for sent in flying.values():
                sent.cancel()

    def _probe(self, method: str, message: Any, deadline: Deadline, field: str) -> bool:
        try:
            return bool(getattr(self._call(method, message, deadline), field))
        except (Unavailable, DeadlineExceeded):
            return False

    def _call(self, method: str, message: Any, deadline: Deadline) -> Any:
        return _value(self._exchange(method, message, deadline, None))

    def _exchange(
        self, method: str, message: Any, deadline: Deadline, token: CancelToken | None
    ) -> Any:
        """The response or the error.

        A call that lost its connection is sent once more: the first calls after a restart of the
        server find the old connection. A model may so see a request twice, which "at least once"
        allows.
        """
        answer = self._send(method, message, deadline, token)
        if isinstance(answer, _LOST) and self._reconnect(deadline):
            answer = self._send(method, message, deadline, token)
        return answer

    def _send(
        self, method: str, message: Any, deadline: Deadline, token: CancelToken | None
    ) -> Any:
        if token is None:
            # The blocking form spares a hand-over between threads; nobody can cancel it.
            call = getattr(self._connect(), method)
            return _answer(lambda: call(message, timeout=deadline.require()))
        return self._begin(method, message, deadline, token).result()

    def _begin(
        self, method: str, message: Any, deadline: Deadline, token: CancelToken | None
    ) -> _Sent:
        call = getattr(self._connect(), method)

        def send() -> Any:
            remaining = deadline.require()
            if token is not None:
                token.check()
            return call.future(message, timeout=remaining)

        return _Sent(_answer(send), token)

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


class _Sent:
    """A message on its way, which its token calls off."""

    def __init__(self, future: Any, token: CancelToken | None):
        """`future`: or the error that it was not sent for."""
        self._future = future
        self._calling = ExitStack()
        if token is not None and not isinstance(future, TidegateError):
            self._calling.enter_context(token.calling(future.cancel))

    def then(self, callback: Callable[[], object]) -> None:
        """Once `result` has no need to wait: in this thread if it has none now, or in another."""
        if isinstance(self._future, TidegateError):
            callback()
        else:
            self._future.add_done_callback(lambda _: callback())

    def result(self) -> Any:
        """Waits for the response or the error."""
        with self._calling:
            if isinstance(self._future, TidegateError):
                return self._future
            return _answer(self._future.result)

    def cancel(self) -> None:
        """Nobody wants it any more."""
        with self._calling:
            if not isinstance(self._future, TidegateError):
                self._future.cancel()


# Errors


class _ConnectionLost(ModelNotReady):
    """There was no connection, or it was given up: the server has not seen the call, as far as one
    can tell."""


_LOST = (_ConnectionLost, ServerLost)


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
    DeadlineExceeded: LATE,
    Cancelled: CALLED_OFF,
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


def _message(call: Call) -> Any:
    return _with_timeout(request_to_message(call.pack.request), call.deadline)


def _with_timeout(message: Any, deadline: Deadline) -> Any:
    """Triton drops the request from its queue when its time is over, without running it."""
    left = max(1, int(deadline.remaining() * 1e6))
    asked = message.parameters["timeout"].int64_param or left
    message.parameters["timeout"].int64_param = min(asked, left)
    return message
