"""Our values as protobuf messages and back, and messages as Triton's JSON."""

from __future__ import annotations

import pytest
from hypothesis import given
from tritonclient.grpc import service_pb2 as pb

from inference.protocol import (
    message_to_request,
    message_to_result,
    request_to_message,
    result_to_message,
    to_json,
)
from inference.tensors import InferRequest, InferResult
from tests.unit.inference.strategies import requests, results


@given(requests)
def test_requests_survive_the_wire(request: InferRequest) -> None:
    wire = request_to_message(request).SerializeToString()
    assert message_to_request(pb.ModelInferRequest.FromString(wire)) == request


@given(results)
def test_results_survive_the_wire(result: InferResult) -> None:
    wire = result_to_message(result).SerializeToString()
    assert message_to_result(pb.ModelInferResponse.FromString(wire)) == result


def test_outputs_without_raw_data_are_an_error() -> None:
    message = pb.ModelInferResponse(outputs=[{"name": "A", "datatype": "INT8", "shape": [1]}])
    with pytest.raises(ValueError, match="shorter"):
        message_to_result(message)


def test_a_config_is_printed_as_triton_prints_it() -> None:
    config = pb.ModelConfigResponse().config
    config.name = "m"
    config.dynamic_batching.priority_queue_policy[2].default_timeout_microseconds = 5_000_000_000
    json = to_json(config)
    assert json["max_batch_size"] == 0  # plain fields at zero too
    assert json["input"] == []
    assert json["parameters"] == {}
    assert "optimization" not in json  # messages only where set
    assert "ensemble_scheduling" not in json  # of a oneof, what was chosen
    policy = json["dynamic_batching"]["priority_queue_policy"]
    assert policy == {
        "2": {
            "timeout_action": "REJECT",  # enums by name
            "default_timeout_microseconds": 5_000_000_000,  # 64-bit integers as numbers
            "allow_timeout_override": False,
            "max_queue_size": 0,
        }
    }
