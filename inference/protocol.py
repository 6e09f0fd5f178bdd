"""Our values as the protobuf messages of Triton's gRPC protocol, in both directions.

Both ends use it: the client, and the fake server that the client is tested against. Tensors always
travel raw (`raw_input_contents`), never as typed protobuf fields, which cost a copy per element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tritonclient.grpc import service_pb2 as pb

from inference.tensors import InferRequest, InferResult, Parameter, Tensor


def request_to_message(request: InferRequest) -> Any:
    """A ModelInferRequest."""
    message = pb.ModelInferRequest(
        model_name=request.model,
        model_version=request.version,
        id=request.id,
        inputs=[_describe(pb.ModelInferRequest.InferInputTensor, one) for one in request.inputs],
        outputs=[
            pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in request.outputs
        ],
        raw_input_contents=[bytes(tensor.data) for tensor in request.inputs],
    )
    _set_parameters(message.parameters, request.parameters)
    return message


def message_to_request(message: Any) -> InferRequest:
    """What a ModelInferRequest asks. Raises ValueError if its tensors are not raw."""
    return InferRequest(
        model=message.model_name,
        version=message.model_version,
        inputs=_tensors(message.inputs, message.raw_input_contents),
        outputs=tuple(output.name for output in message.outputs),
        parameters=_parameters(message.parameters),
        id=message.id,
    )


def result_to_message(result: InferResult) -> Any:
    """A ModelInferResponse."""
    message = pb.ModelInferResponse(
        model_name=result.model,
        model_version=result.version,
        id=result.id,
        outputs=[_describe(pb.ModelInferResponse.InferOutputTensor, one) for one in result.outputs],
        raw_output_contents=[bytes(tensor.data) for tensor in result.outputs],
    )
    _set_parameters(message.parameters, result.parameters)
    return message


def message_to_result(message: Any) -> InferResult:
    """What a ModelInferResponse answers. Raises ValueError if its tensors are not raw."""
    return InferResult(
        model=message.model_name,
        version=message.model_version,
        outputs=_tensors(message.outputs, message.raw_output_contents),
        parameters=_parameters(message.parameters),
        id=message.id,
    )


def to_json(message: Any) -> dict[str, Any]:
    """A message as the JSON object that Triton's HTTP endpoints print for it.

    As protobuf's own JSON, except that 64-bit integers are numbers and that plain fields are
    printed at their zero values too; what has presence (messages, oneofs) only where it is set.
    """
    json: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            if field.message_type and field.message_type.GetOptions().map_entry:
                entry = field.message_type.fields_by_name["value"]
                json[field.name] = {
                    str(key): _value_to_json(entry, value[key]) for key in sorted(value)
                }
            else:
                json[field.name] = [_value_to_json(field, item) for item in value]
        elif not field.has_presence or message.HasField(field.name):
            json[field.name] = _value_to_json(field, value)
    return json


def _value_to_json(field: Any, value: Any) -> Any:
    if field.message_type:
        return to_json(value)
    if field.enum_type:
        return field.enum_type.values_by_number[value].name
    return value


def _describe(kind: Any, tensor: Tensor) -> Any:
    return kind(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)


def _tensors(described: Sequence[Any], raw: Sequence[bytes]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(entry.name, entry.datatype, tuple(entry.shape), data)
        for entry, data in zip(described, raw, strict=True)
    )


_INT64_MAX = 2**63 - 1


def _set_parameters(target: Any, parameters: Mapping[str, Parameter]) -> None:
    for name, value in parameters.items():
        match value:
            case bool():
                target[name].bool_param = value
            case int() if value > _INT64_MAX:
                target[name].uint64_param = value
            case int():
                target[name].int64_param = value
            case float():
                target[name].double_param = value
            case str():
                target[name].string_param = value


def _parameters(source: Mapping[str, Any]) -> dict[str, Parameter]:
    return {
        name: getattr(value, choice)
        for name, value in source.items()
        if (choice := value.WhichOneof("parameter_choice")) is not None
    }
