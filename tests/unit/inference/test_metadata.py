"""What a model declares, and which requests fit it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from errors import BadTensor
from inference.metadata import ModelSpec, TensorSpec, check
from inference.tensors import InferRequest, Tensor
from tests.unit.inference.strategies import ints, texts

METADATA: dict[str, Any] = {
    "name": "pair",
    "versions": ["2", "10", "9"],
    "platform": "python",
    "inputs": [
        {"name": "INTS", "datatype": "INT64", "shape": [-1, 2]},
        {"name": "TEXT", "datatype": "BYTES", "shape": [-1, -1]},
    ],
    "outputs": [{"name": "SUM", "datatype": "INT64", "shape": [-1, 1]}],
}
CONFIG: dict[str, Any] = {
    "max_batch_size": 4,
    "input": [{"name": "INTS", "optional": False}, {"name": "TEXT", "optional": True}],
    "output": [{"name": "SUM"}],
}
SPEC = ModelSpec.parse(METADATA, CONFIG)
GOOD = InferRequest("pair", "", (ints([[1, 2]]), texts([["a"]])), ("SUM",))


def request(*inputs: Tensor, outputs: tuple[str, ...] = ()) -> InferRequest:
    return InferRequest("pair", "", inputs, outputs)


def test_a_spec_is_read_from_what_triton_says() -> None:
    spec = ModelSpec.parse(METADATA, CONFIG)
    assert spec == ModelSpec(
        name="pair",
        version="10",
        platform="python",
        inputs=(
            TensorSpec("INTS", "INT64", (-1, 2)),
            TensorSpec("TEXT", "BYTES", (-1, -1), optional=True),
        ),
        outputs=(TensorSpec("SUM", "INT64", (-1, 1)),),
        max_batch_size=4,
    )


def test_a_spec_knows_models_that_keep_state_or_answer_many_times() -> None:
    spec = ModelSpec.parse(
        METADATA,
        CONFIG | {"sequence_batching": {}, "model_transaction_policy": {"decoupled": True}},
    )
    assert spec.sequence
    assert spec.decoupled


def test_a_spec_of_little_is_a_spec() -> None:
    assert ModelSpec.parse({"name": "m"}, {}) == ModelSpec("m", "", "", (), ())


@pytest.mark.parametrize(
    "good",
    [
        GOOD,
        request(ints([[1, 2]])),  # TEXT is optional
        request(ints([[1, 2]] * 4)),  # as many rows as the model takes
        request(texts([["a", "b", "c"]]), ints([[1, 2]])),  # any order, any variable size
    ],
)
def test_a_request_that_fits_is_let_through(good: InferRequest) -> None:
    check(good, SPEC)


@pytest.mark.parametrize(
    ("bad", "names", "says"),
    [
        (request(), "INTS", "missing"),
        (request(texts([["a"]])), "INTS", "missing"),
        (request(ints([[1, 2]]), ints([[1]], "Z")), "Z", "not an input"),
        (request(ints([[1, 2]]), ints([[1, 2]])), "INTS", "more than once"),
        (request(replace(ints([[1, 2]]), datatype="FP64")), "INTS", "the model takes INT64"),
        (request(ints([1, 2])), "INTS", r"takes \[-1, 2\]"),
        (request(ints([[[1, 2]]])), "INTS", r"has shape \[1, 1, 2\]"),
        (request(ints([[1, 2, 3]])), "INTS", r"has shape \[1, 3\]"),
        (request(ints([[1, 2]] * 5)), "INTS", "5 rows.*at most 4"),
        (request(ints([[1, 2]]), texts([["a"], ["b"]])), "TEXT", "2 rows where 'INTS' has 1"),
        (request(Tensor("INTS", "INT64", (0, 2), b"")), "INTS", "no rows"),
        (request(Tensor("INTS", "INT64", (-1, 2), bytes(16))), "INTS", "outside 0"),
        (request(Tensor("INTS", "INT64", (2**40, 2), b"")), "INTS", "outside 0"),
        (request(Tensor("INTS", "INT64", (1, 2), bytes(15))), "INTS", "16 bytes, not 15"),
        (
            request(ints([[1, 2]]), Tensor("TEXT", "BYTES", (1, 2), b"\1\0\0\0a")),
            "TEXT",
            "2 elements, not 1",
        ),
        (
            request(ints([[1, 2]]), Tensor("TEXT", "BYTES", (1, 1), b"\xff\xff\xff\xffa")),
            "TEXT",
            "past the end",
        ),
        (request(ints([[1, 2]]), outputs=("SUM", "MAX")), "MAX", "not an output"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_by_the_tensor(
    bad: InferRequest, names: str, says: str
) -> None:
    with pytest.raises(BadTensor, match=says) as caught:
        check(bad, SPEC)
    assert caught.value.param == names
    assert repr(names) in caught.value.message


def test_a_model_without_batching_takes_the_shape_it_declares() -> None:
    spec = ModelSpec("m", "1", "", (TensorSpec("X", "UINT8", (2, -1)),), ())
    check(InferRequest("m", "", (Tensor("X", "UINT8", (2, 3), bytes(6)),)), spec)
    with pytest.raises(BadTensor, match="takes"):
        check(InferRequest("m", "", (Tensor("X", "UINT8", (1, 2, 3), bytes(6)),)), spec)


def marked(value: object, **config: Any) -> ModelSpec:
    parameters = {"tidegate.cache": {"string_value": value}, "other": {"string_value": "x"}}
    return ModelSpec.parse(METADATA, CONFIG | {"parameters": parameters} | config)


@pytest.mark.parametrize(
    ("value", "ttl"),
    [("ttl=60", 60), (" ttl = 0.5 ", 0.5), ("ttl=86400", 86400), ("ttl=0", 0)],
)
def test_a_model_may_say_that_its_answers_may_be_given_again(value: str, ttl: float) -> None:
    assert marked(value).cache_ttl == ttl


@pytest.mark.parametrize(
    "value", ["", "60", "ttl=", "ttl=-1", "ttl=1e3", "ttl=86401", "ttl=60s", "TTL=60", None]
)
def test_a_mark_that_cannot_be_read_is_none(value: object) -> None:
    assert marked(value).cache_ttl == 0


@pytest.mark.parametrize(
    "config",
    [{"sequence_batching": {}}, {"model_transaction_policy": {"decoupled": True}}],
    ids=["sequence", "decoupled"],
)
def test_what_keeps_state_or_answers_many_times_is_never_given_again(
    config: dict[str, Any],
) -> None:
    assert marked("ttl=60", **config).cache_ttl == 0


def test_another_configuration_is_another_revision_of_a_marked_model() -> None:
    same = [marked("ttl=60").revision, marked("ttl=60", instance_group=[{"count": 2}]).revision]
    others = [marked("ttl=61").revision, marked("ttl=60", max_batch_size=5).revision]
    assert len({*same, *others}) == 3
    assert SPEC.revision == ""


@pytest.mark.parametrize(
    ("config", "levels"),
    [({}, 0), ({"dynamic_batching": {}}, 0), ({"dynamic_batching": {"priority_levels": "4"}}, 4)],
    ids=["no batcher", "one level", "four"],
)
def test_the_levels_of_its_queue_are_the_dynamic_batchers(
    config: dict[str, Any], levels: int
) -> None:
    assert ModelSpec.parse(METADATA, CONFIG | config).priority_levels == levels
