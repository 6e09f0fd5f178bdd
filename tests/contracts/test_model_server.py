"""One suite for every model server: the fake, and (marked `stack`) a real Triton.

Both serve the models of ops/models: `identity`, which answers what it was given, and `digits`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient

from errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    TidegateError,
)
from inference.client import ModelServer, TritonServer
from inference.deadline import CancelToken, Deadline
from inference.fake import FakeTriton
from inference.metadata import ModelSpec, TensorSpec, check
from inference.tensors import InferRequest, InferResult, Outcome, Tensor, pack_bytes

INTS = Tensor("INTS", "INT64", (1, 2), np.array([1, -2], dtype="<i8").tobytes())
FLOATS = Tensor("FLOATS", "FP32", (1, 3), np.array([0.5, 1e30, -0.0], dtype="<f4").tobytes())
TEXT = Tensor("TEXT", "BYTES", (1, 3), pack_bytes([b"", "ü".encode(), b"\xff\0"]))


@pytest.fixture(params=["fake", pytest.param("triton", marks=pytest.mark.stack)])
def server(request: pytest.FixtureRequest) -> Iterator[ModelServer]:
    if request.param == "triton":
        client = TritonServer(request.getfixturevalue("triton_address"), 16 << 20)
        yield client
        client.close()
        return
    with FakeTriton() as fake:
        client = TritonServer(fake.address, 16 << 20)
        yield client
        client.close()


def soon() -> Deadline:
    return Deadline.after(20.0)


def identity(*inputs: Tensor, **parameters: bool | int | float | str) -> InferRequest:
    return InferRequest("identity", "", inputs or (INTS,), parameters=parameters)


def image(*rows: int) -> Tensor:
    pixels = np.stack([np.full(64, row, dtype="<f4") for row in rows])
    return Tensor("image", "FP32", pixels.shape, pixels.tobytes())


# Inference


def test_tensors_come_back_as_they_went(server: ModelServer) -> None:
    request = InferRequest("identity", "1", (TEXT, FLOATS, INTS), id="mine")
    result = server.infer(request, soon())
    assert (result.model, result.version, result.id) == ("identity", "1", "mine")
    assert {output.name: output for output in result.outputs} == {
        f"{tensor.name}_OUT": Tensor(
            f"{tensor.name}_OUT", tensor.datatype, tensor.shape, tensor.data
        )
        for tensor in request.inputs
    }


def test_only_the_outputs_asked_for_come_back(server: ModelServer) -> None:
    request = InferRequest("identity", "", (TEXT, INTS), outputs=("INTS_OUT",))
    assert [output.name for output in server.infer(request, soon()).outputs] == ["INTS_OUT"]


def test_rows_are_answered_row_by_row(server: ModelServer) -> None:
    result = server.infer(InferRequest("digits", "", (image(1, 2, 3),)), soon())
    outputs = {output.name: output for output in result.outputs}
    assert outputs["label"].shape == (3, 1)
    assert outputs["probabilities"].shape == (3, 10)
    odds = np.frombuffer(outputs["probabilities"].data, dtype="<f4").reshape(3, 10)
    labels = np.frombuffer(outputs["label"].data, dtype="<i8")
    assert np.allclose(odds.sum(axis=1), 1, atol=1e-5)
    assert odds.argmax(axis=1).tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user", "you"),
        ("flag", True),
        ("number", -5),
        ("big", 2**63 - 1),
        ("fraction", 0.5),
        ("priority", 1),
        ("timeout", 5_000_000),
    ],
)
def test_parameters_of_every_kind_are_taken(
    server: ModelServer, name: str, value: bool | int | float | str
) -> None:
    assert server.infer(identity(**{name: value}), soon()).outputs


@pytest.mark.parametrize(
    "bad",
    [
        identity(Tensor("OTHER", "INT64", (1, 1), bytes(8))),
        identity(INTS, INTS),
        identity(Tensor("INTS", "FP64", (1, 2), bytes(16))),
        identity(Tensor("INTS", "INT64", (2,), bytes(16))),
        identity(Tensor("INTS", "INT64", (1, 2), bytes(15))),
        identity(Tensor("INTS", "INT64", (65, 1), bytes(65 * 8))),
        identity(INTS, Tensor("FLOATS", "FP32", (2, 1), bytes(8))),
        identity(Tensor("TEXT", "BYTES", (1, 2), pack_bytes([b"one"]))),
        identity(Tensor("TEXT", "BYTES", (1, 1), b"\xff\xff\xff\xff?")),
        InferRequest("identity", "", (INTS,), outputs=("OTHER",)),
        InferRequest("digits", "", ()),
        InferRequest("digits", "", (Tensor("image", "FP32", (1, 63), bytes(252)),)),
        InferRequest("identity", "latest", (INTS,)),
    ],
)
def test_what_does_not_fit_the_model_is_a_bad_request(
    server: ModelServer, bad: InferRequest
) -> None:
    with pytest.raises(BadRequest):
        server.infer(bad, soon())


def test_our_own_check_refuses_what_the_server_refuses(server: ModelServer) -> None:
    spec = ModelSpec.parse(
        server.metadata("identity", "", soon()), server.config("identity", "", soon())
    )
    check(identity(TEXT, FLOATS, INTS), spec)
    with pytest.raises(BadRequest):
        check(identity(Tensor("INTS", "INT64", (65, 1), bytes(65 * 8))), spec)


@pytest.mark.parametrize(("model", "version"), [("nobody", ""), ("identity", "77")])
def test_an_unknown_model_or_version_is_not_found(
    server: ModelServer, model: str, version: str
) -> None:
    for call in (server.metadata, server.config, server.statistics):
        with pytest.raises(ModelNotFound):
            call(model, version, soon())
    with pytest.raises(ModelNotFound):
        server.infer(InferRequest(model, version, (INTS,)), soon())
    assert not server.ready(soon(), model, version)


def test_a_model_that_fails_says_why(server: ModelServer) -> None:
    with pytest.raises(ModelFailed, match="out of luck"):
        server.infer(identity(fail="out of luck"), soon())


@pytest.mark.parametrize("size", [17_000, 200_000])
def test_a_model_that_fails_may_say_a_lot(server: ModelServer, size: int) -> None:
    """And whoever travels with what it fails at has an answer."""
    with pytest.raises(ModelFailed) as failed:
        server.infer(identity(fail="z" * size), soon())
    assert len(failed.value.message) < 3000
    outcomes = server.infer_many([identity(), identity(fail="z" * size), identity()], soon())
    assert [type(outcome) for outcome in outcomes] == [InferResult, ModelFailed, InferResult]


# Time


def test_the_deadline_is_kept(server: ModelServer) -> None:
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        server.infer(identity(delay_ms=10_000), Deadline.after(0.3))
    assert 0.25 < time.monotonic() - started < 5.0


def test_cancelled_work_makes_room_for_other_work(server: ModelServer) -> None:
    server.infer(identity(), soon())
    token = CancelToken()
    # More than the model has instances or the fake has threads to spare for.
    with ThreadPoolExecutor(8) as pool:
        slow = [
            pool.submit(server.infer, identity(delay_ms=60_000), Deadline.after(60.0), token)
            for _ in range(8)
        ]
        time.sleep(0.5)
        assert not any(one.done() for one in slow)
        token.cancel()
        assert all(isinstance(one.exception(timeout=5.0), Cancelled) for one in slow)
    started = time.monotonic()
    server.infer(identity(), soon())
    assert time.monotonic() - started < 5.0


# Many


def test_many_answers_are_those_of_one_by_one(server: ModelServer) -> None:
    requests = [
        InferRequest("digits", "", (image(*range(count)),), id=str(count)) for count in (1, 3, 2)
    ]
    requests += [identity(TEXT), identity(INTS), identity(TEXT), identity(INTS, delay_ms=1)]
    together = server.infer_many(requests, soon())
    for outcome, request in zip(together, requests, strict=True):
        alone = server.infer(request, soon())
        assert isinstance(outcome, InferResult)
        assert outcome.id == alone.id
        for ours, theirs in zip(outcome.outputs, alone.outputs, strict=True):
            assert (ours.name, ours.shape) == (theirs.name, theirs.shape)
            if ours.datatype == "FP32":
                # A row may be rounded differently in another batch.
                mine, its = (np.frombuffer(one.data, dtype="<f4") for one in (ours, theirs))
                assert np.allclose(mine, its, atol=1e-5)
            else:
                assert bytes(ours.data) == bytes(theirs.data)


def test_each_of_many_has_its_own_outcome(server: ModelServer) -> None:
    bad = identity(Tensor("INTS", "INT64", (1, 2), bytes(15)))
    unknown = InferRequest("nobody", "", (INTS,))
    outcomes = server.infer_many(
        [identity(), bad, identity(fail="no"), unknown, identity()], soon()
    )
    kinds: list[type[InferResult | TidegateError]] = [type(outcome) for outcome in outcomes]
    assert kinds == [InferResult, BadRequest, ModelFailed, ModelNotFound, InferResult]


def test_what_is_over_does_not_wait_for_what_is_slow(server: ModelServer) -> None:
    server.infer(identity(), soon())
    requests = [identity(delay_ms=1500), identity(), identity(fail="no"), identity()]
    parts: list[dict[int, Outcome]] = []
    server.infer_in_parts(requests, [soon()] * 4, parts.append)
    assert sorted(place for part in parts for place in part) == [0, 1, 2, 3]
    assert list(parts[-1]) == [0]
    kinds = {place: type(outcome) for part in parts for place, outcome in part.items()}
    assert kinds == {0: InferResult, 1: InferResult, 2: ModelFailed, 3: InferResult}


# What the server says of itself


def test_the_server_and_its_models_are_ready(server: ModelServer) -> None:
    assert server.live(soon())
    assert server.ready(soon())
    assert server.ready(soon(), "identity")
    assert server.ready(soon(), "identity", "1")


def test_the_servers_metadata(server: ModelServer) -> None:
    metadata = server.server_metadata(soon())
    assert metadata.keys() == {"name", "version", "extensions"}
    assert metadata["name"] == "triton"
    assert "binary_tensor_data" in metadata["extensions"]


def test_a_models_metadata(server: ModelServer) -> None:
    assert server.metadata("digits", "", soon()) == {
        "name": "digits",
        "versions": ["1"],
        "platform": "python",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 64]}],
        "outputs": [
            {"name": "label", "datatype": "INT64", "shape": [-1, 1]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, 10]},
        ],
    }


def test_a_models_config_has_tritons_fields(server: ModelServer) -> None:
    config = server.config("digits", "1", soon())
    assert config.keys() == {
        "name",
        "platform",
        "backend",
        "runtime",
        "version_policy",
        "max_batch_size",
        "input",
        "output",
        "batch_input",
        "batch_output",
        "optimization",
        "dynamic_batching",
        "instance_group",
        "default_model_filename",
        "cc_model_filenames",
        "metric_tags",
        "parameters",
        "model_warmup",
    }
    assert config["input"] == [
        {
            "name": "image",
            "data_type": "TYPE_FP32",
            "format": "FORMAT_NONE",
            "dims": [64],
            "is_shape_tensor": False,
            "allow_ragged_batch": False,
            "optional": False,
            "is_non_linear_format_io": False,
        }
    ]


def test_a_spec_can_be_read_from_what_the_server_says(server: ModelServer) -> None:
    spec = ModelSpec.parse(
        server.metadata("identity", "", soon()), server.config("identity", "", soon())
    )
    assert spec.version == "1"
    assert spec.max_batch_size == 64
    assert spec.inputs[0] == TensorSpec("TEXT", "BYTES", (-1, -1), optional=True)


def test_statistics_count_what_ran(server: ModelServer) -> None:
    def read() -> tuple[int, int, int]:
        (stats,) = server.statistics("digits", "", soon())["model_stats"]
        return (
            stats["inference_count"],
            stats["execution_count"],
            stats["inference_stats"]["success"]["count"],
        )

    before = read()
    server.infer(InferRequest("digits", "", (image(1, 2, 3),)), soon())
    assert [now - then for now, then in zip(read(), before, strict=True)] == [3, 1, 1]


def test_statistics_have_tritons_fields(server: ModelServer) -> None:
    server.infer(InferRequest("digits", "", (image(1),)), soon())
    every = server.statistics("", "", soon())["model_stats"]
    assert {"digits", "identity"} <= {stats["name"] for stats in every}
    (stats,) = server.statistics("digits", "1", soon())["model_stats"]
    assert stats.keys() == {
        "name",
        "version",
        "last_inference",
        "inference_count",
        "execution_count",
        "inference_stats",
        "response_stats",
        "batch_stats",
        "memory_usage",
    }
    durations = {"compute_input", "compute_infer", "compute_output"}
    assert stats["batch_stats"][0].keys() == {"batch_size", *durations}
    assert stats["inference_stats"].keys() == {
        "success",
        "fail",
        "queue",
        "cache_hit",
        "cache_miss",
        *durations,
    }
    assert stats["inference_stats"]["success"].keys() == {"count", "ns"}
    assert stats["last_inference"] > 0


def test_the_repository_lists_what_is_loaded(server: ModelServer) -> None:
    index = server.repository_index(soon())
    for name in ("digits", "identity"):
        assert {"name": name, "version": "1", "state": "READY"} in index
    assert server.repository_index(soon(), ready=True) == [
        entry for entry in index if entry.get("state") == "READY"
    ]


# Models that come and go


@pytest.mark.stack
@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_that_was_unloaded_is_away_and_not_unknown(
    triton_address: str, version: str
) -> None:
    """What is to be run waits for it."""
    server = TritonServer(triton_address, 16 << 20)
    request = InferRequest("identity", version, (INTS,))
    with InferenceServerClient(triton_address) as triton:
        triton.unload_model("identity")
        try:
            with pytest.raises(ModelNotReady):
                server.infer(request, soon())
            with pytest.raises(ModelNotReady):
                server.metadata("identity", version, soon())
            assert not server.ready(soon(), "identity", version)
            assert server.ready(soon(), "digits")
        finally:
            triton.load_model("identity")
    assert server.infer(request, soon()).outputs
    server.close()
