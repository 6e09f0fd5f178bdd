"""A Triton whose models are Python functions, behind the real gRPC protocol.

For tests, and for demos on a machine without Triton. What it says and refuses is compared with
the real one by `tests/contracts/test_model_server.py`. On top of what Triton can do, it can be told
to be slow, to fail, to lose a model, to die and to come back.

    with FakeTriton() as fake:
        server = TritonServer(fake.address, 64 * MIB)
        fake.script("identity", [Delay(0.2), Fail(grpc.StatusCode.INTERNAL, "boom")])
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as pb

from errors import BadRequest
from inference.metadata import ModelSpec, check
from inference.protocol import message_to_request, result_to_message, to_json
from inference.tensors import DATATYPES, InferRequest, InferResult, Tensor

VERSION: Final = "1"
"""The one version of every fake model."""

Sleep = Callable[[float], None]
"""Waits so many seconds; ends the run at once if the caller has left."""
Run = Callable[[InferRequest, Sleep], Iterable[Tensor]]


class ModelError(Exception):
    """Raised by a model function to answer with this text, as a Triton model's own error."""


@dataclass(frozen=True, slots=True)
class Fail:
    """One scripted step: answer this status instead of running."""

    code: grpc.StatusCode
    message: str


@dataclass(frozen=True, slots=True)
class Delay:
    """One scripted step: run, but so many seconds later."""

    seconds: float


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A model: its configuration, as in Triton's JSON, and the function that runs a request."""

    name: str
    config: Mapping[str, Any]
    run: Run


@dataclass(slots=True)
class Counts:
    """What happened to a model's requests so far."""

    received: int = 0
    executed: int = 0
    rows: int = 0
    failed: int = 0
    cancelled: int = 0
    """The caller left, or its deadline passed, before the answer."""
    ns: int = 0
    last: int = 0
    """When the last one ran, in Unix milliseconds."""
    batches: dict[int, int] = field(default_factory=dict)


class FakeTriton:
    """An in-process server on 127.0.0.1. Every method may be called from any thread."""

    def __init__(self, models: Sequence[FakeModel] | None = None, *, threads: int = 32):
        served = (IDENTITY, DIGITS) if models is None else models
        self._models = {model.name: _Loaded(model) for model in served}
        self._threads = threads
        self._lock = threading.Lock()
        self._port = 0
        self._server: Any = None

    def start(self) -> str:
        """Serve, on the port of last time if there was one; returns the address."""
        server = grpc.server(
            ThreadPoolExecutor(self._threads, thread_name_prefix="fake-triton"),
            handlers=(_service(self._handlers()),),
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
            ],
        )
        self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        server.start()
        self._server = server
        return self.address

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def stop(self, grace: float | None = None) -> None:
        """Stop serving; without `grace` seconds as if killed: calls in progress are cut off."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(grace).wait()

    def restart(self) -> None:
        """Killed and started again, on the same port."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def script(self, model: str, steps: Iterable[Fail | Delay]) -> None:
        """What the next requests of a model meet, one step each; then it is itself again."""
        with self._lock:
            self._models[model].steps = deque(steps)

    def counts(self, model: str) -> Counts:
        """A copy of what was counted so far."""
        with self._lock:
            found = self._models[model].counts
            return replace(found, batches=dict(found.batches))

    def unload(self, model: str) -> None:
        """From now on the model is known, but not ready."""
        self._models[model].ready = False

    def load(self, model: str) -> None:
        self._models[model].ready = True

    # The protocol

    def _handlers(self) -> dict[str, tuple[Callable[[Any, Any], Any], Any]]:
        return {
            "ServerLive": (self._server_live, pb.ServerLiveRequest),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest),
            "ServerMetadata": (self._server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": (self._model_metadata, pb.ModelMetadataRequest),
            "ModelConfig": (self._model_config, pb.ModelConfigRequest),
            "ModelStatistics": (self._model_statistics, pb.ModelStatisticsRequest),
            "RepositoryIndex": (self._repository_index, pb.RepositoryIndexRequest),
            "ModelInfer": (self._model_infer, pb.ModelInferRequest),
        }

    def _server_live(self, request: Any, context: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    def _server_ready(self, request: Any, context: Any) -> Any:
        ready = all(model.ready for model in self._models.values())
        return pb.ServerReadyResponse(ready=ready)

    def _model_ready(self, request: Any, context: Any) -> Any:
        _check_version(request.version)
        model = self._models.get(request.name)
        known = model is not None and request.version in ("", VERSION)
        return pb.ModelReadyResponse(ready=bool(known and model is not None and model.ready))

    def _server_metadata(self, request: Any, context: Any) -> Any:
        return pb.ServerMetadataResponse(
            name="triton",
            version="fake",
            extensions=["model_configuration", "binary_tensor_data", "parameters", "statistics"],
        )

    def _model_metadata(self, request: Any, context: Any) -> Any:
        return self._find(request.name, request.version).metadata

    def _model_config(self, request: Any, context: Any) -> Any:
        return pb.ModelConfigResponse(config=self._find(request.name, request.version).config)

    def _model_statistics(self, request: Any, context: Any) -> Any:
        if request.name:
            try:
                chosen = [self._find(request.name, request.version)]
            except _StatusError as status:
                raise _StatusError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"requested model '{request.name}' is not available",
                ) from status
        else:
            chosen = list(self._models.values())
        with self._lock:
            return pb.ModelStatisticsResponse(model_stats=[model.statistics() for model in chosen])

    def _repository_index(self, request: Any, context: Any) -> Any:
        entry = pb.RepositoryIndexResponse.ModelIndex
        return pb.RepositoryIndexResponse(
            models=[
                entry(name=name, version=VERSION, state="READY")
                if model.ready
                else entry(name=name, version=VERSION, state="UNAVAILABLE", reason="unloaded")
                for name, model in sorted(self._models.items())
                if model.ready or not request.ready
            ]
        )

    def _model_infer(self, message: Any, context: Any) -> Any:
        model = self._find(message.model_name, message.model_version)
        self._count(model, received=1)
        left = threading.Event()
        context.add_callback(left.set)

        def sleep(seconds: float) -> None:
            if left.wait(seconds):
                raise _CallerLeftError

        started = time.monotonic_ns()
        try:
            response = self._run(model, message_to_request(message), sleep)
        except _CallerLeftError:
            self._count(model, cancelled=1)
            raise _StatusError(grpc.StatusCode.CANCELLED, "cancelled") from None
        except _StatusError:
            self._count(model, failed=1)
            raise
        rows = (
            int(message.inputs[0].shape[0]) if message.inputs and model.spec.max_batch_size else 1
        )
        self._count(model, executed=1, rows=rows, ns=time.monotonic_ns() - started)
        return response

    def _run(self, model: _Loaded, request: InferRequest, sleep: Sleep) -> Any:
        with self._lock:
            step = model.steps.popleft() if model.steps else None
        match step:
            case Fail(code, text):
                raise _StatusError(code, text)
            case Delay(seconds):
                sleep(seconds)
        try:
            check(request, model.spec)
            outputs = tuple(
                tensor
                for tensor in model.run(request, sleep)
                if not request.outputs or tensor.name in request.outputs
            )
        except BadRequest as error:
            raise _StatusError(grpc.StatusCode.INVALID_ARGUMENT, error.message) from error
        except ModelError as error:
            raise _StatusError(grpc.StatusCode.INTERNAL, str(error)) from error
        result = InferResult(request.model, VERSION, outputs, id=request.id)
        return result_to_message(result)

    def _find(self, name: str, version: str) -> _Loaded:
        _check_version(version)
        model = self._models.get(name)
        unknown = f"Request for unknown model: '{name}'"
        if model is None:
            raise _StatusError(grpc.StatusCode.NOT_FOUND, f"{unknown} is not found")
        if not model.ready:
            raise _StatusError(grpc.StatusCode.NOT_FOUND, f"{unknown} has no available versions")
        if version not in ("", VERSION):
            raise _StatusError(
                grpc.StatusCode.NOT_FOUND, f"{unknown} version {version} is not found"
            )
        return model

    def _count(
        self,
        model: _Loaded,
        *,
        received: int = 0,
        executed: int = 0,
        rows: int = 0,
        failed: int = 0,
        cancelled: int = 0,
        ns: int = 0,
    ) -> None:
        with self._lock:
            counts = model.counts
            counts.received += received
            counts.executed += executed
            counts.rows += rows
            counts.failed += failed
            counts.cancelled += cancelled
            counts.ns += ns
            if executed:
                counts.last = time.time_ns() // 1_000_000
                counts.batches[rows] = counts.batches.get(rows, 0) + 1


class _StatusError(Exception):
    """Ends a call with this gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


class _CallerLeftError(Exception):
    """Nobody waits for the answer any more."""


class _Loaded:
    """A model being served: its messages, its script, its counts."""

    def __init__(self, model: FakeModel):
        self.run = model.run
        self.ready = True
        self.steps: deque[Fail | Delay] = deque()
        self.counts = Counts()
        config = _DEFAULTS | {"name": model.name} | dict(model.config)
        self.config = pb.ModelConfigResponse(config=config).config
        self.config.instance_group[0].name = f"{model.name}_0"
        self.metadata = pb.ModelMetadataResponse(
            name=model.name,
            versions=[VERSION],
            platform="python",
            inputs=self._declare(self.config.input),
            outputs=self._declare(self.config.output),
        )
        self.spec = ModelSpec.parse(to_json(self.metadata), to_json(self.config))

    def statistics(self) -> Any:
        counts = self.counts

        def duration(count: int, ns: int = 0) -> Any:
            return pb.StatisticDuration(count=count, ns=ns)

        return pb.ModelStatistics(
            name=self.config.name,
            version=VERSION,
            last_inference=counts.last,
            inference_count=counts.rows,
            execution_count=counts.executed,
            inference_stats=pb.InferStatistics(
                success=duration(counts.executed, counts.ns),
                fail=duration(counts.failed + counts.cancelled),
                queue=duration(counts.executed),
                compute_input=duration(counts.executed),
                compute_infer=duration(counts.executed, counts.ns),
                compute_output=duration(counts.executed),
                cache_hit=duration(0),
                cache_miss=duration(0),
            ),
            batch_stats=[
                pb.InferBatchStatistics(
                    batch_size=size,
                    compute_input=duration(count),
                    compute_infer=duration(count),
                    compute_output=duration(count),
                )
                for size, count in sorted(counts.batches.items())
            ],
        )

    def _declare(self, tensors: Iterable[Any]) -> list[Any]:
        batch = [-1] if self.config.max_batch_size else []
        return [
            pb.ModelMetadataResponse.TensorMetadata(
                name=one.name,
                datatype=_DATATYPE[to_json(one)["data_type"]],
                shape=[*batch, *one.dims],
            )
            for one in tensors
        ]


_DATATYPE: Final = {"TYPE_STRING": "BYTES"} | {f"TYPE_{name}": name for name in DATATYPES}

_DEFAULTS: Final[dict[str, Any]] = {
    "backend": "python",
    "version_policy": {"latest": {"num_versions": 1}},
    "optimization": {
        "priority": "PRIORITY_DEFAULT",
        "input_pinned_memory": {"enable": True},
        "output_pinned_memory": {"enable": True},
    },
    "instance_group": [{"kind": "KIND_CPU", "count": 1}],
    "default_model_filename": "model.py",
}
"""What Triton fills in for a Python model that says nothing else."""


def _check_version(version: str) -> None:
    if version and not version.isdecimal():
        raise _StatusError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"failed to get model version from specified version string '{version}' "
            "(details: stol), version should be an integral value > 0",
        )


def _service(handlers: Mapping[str, tuple[Callable[[Any, Any], Any], Any]]) -> Any:
    # A table of functions instead of the generated base class: mypy cannot see into that.
    return grpc.method_handlers_generic_handler(
        "inference.GRPCInferenceService",
        {
            name: grpc.unary_unary_rpc_method_handler(
                _with_status(behaviour),
                request_deserializer=message.FromString,
                response_serializer=lambda response: response.SerializeToString(),
            )
            for name, (behaviour, message) in handlers.items()
        },
    )


def _with_status(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def handle(request: Any, context: Any) -> Any:
        try:
            return behaviour(request, context)
        except _StatusError as status:
            return context.abort(status.code, status.message)

    return handle


# The two models of every deployment (ops/models), as functions


def _run_identity(request: InferRequest, sleep: Sleep) -> Iterable[Tensor]:
    """Every input back; parameter `delay_ms` waits first, `fail` fails with its text."""
    sleep(float(request.parameters.get("delay_ms", 0)) / 1000)
    if "fail" in request.parameters:
        raise ModelError(str(request.parameters["fail"]))
    return [replace(tensor, name=f"{tensor.name}_OUT") for tensor in request.inputs]


def _run_digits(request: InferRequest, sleep: Sleep) -> Iterable[Tensor]:
    """Shaped like the trained one; its answers mean nothing, and are always the same."""
    (image,) = request.inputs
    rows = image.shape[0]
    pixels = np.frombuffer(image.data, dtype="<f4").reshape(rows, 64)
    weights = (np.arange(640, dtype="<f4").reshape(64, 10) * 7 % 11 - 5) / 100
    # Row by row: a matrix product may round a row differently in another company.
    scores = np.stack([row @ weights for row in pixels])
    odds = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = (odds / odds.sum(axis=1, keepdims=True)).astype("<f4")
    labels = probabilities.argmax(axis=1).astype("<i8")
    return [
        Tensor("label", "INT64", (rows, 1), labels.tobytes()),
        Tensor("probabilities", "FP32", (rows, 10), probabilities.tobytes()),
    ]


IDENTITY: Final = FakeModel(
    "identity",
    {
        "max_batch_size": 64,
        "input": [
            {"name": "TEXT", "data_type": "TYPE_STRING", "dims": [-1], "optional": True},
            {"name": "FLOATS", "data_type": "TYPE_FP32", "dims": [-1], "optional": True},
            {"name": "INTS", "data_type": "TYPE_INT64", "dims": [-1], "optional": True},
        ],
        "output": [
            {"name": "TEXT_OUT", "data_type": "TYPE_STRING", "dims": [-1]},
            {"name": "FLOATS_OUT", "data_type": "TYPE_FP32", "dims": [-1]},
            {"name": "INTS_OUT", "data_type": "TYPE_INT64", "dims": [-1]},
        ],
        "dynamic_batching": {},
    },
    _run_identity,
)

DIGITS: Final = FakeModel(
    "digits",
    {
        "max_batch_size": 256,
        "input": [{"name": "image", "data_type": "TYPE_FP32", "dims": [64]}],
        "output": [
            {"name": "label", "data_type": "TYPE_INT64", "dims": [1]},
            {"name": "probabilities", "data_type": "TYPE_FP32", "dims": [10]},
        ],
        "dynamic_batching": {"max_queue_delay_microseconds": 500},
    },
    _run_digits,
)
