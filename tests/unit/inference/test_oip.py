"""The REST codec: what clients send, what they get, and what is refused."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import orjson
import pytest
import tritonclient.http as triton
from hypothesis import given
from hypothesis import strategies as st

from errors import BadBody, BadRequest, BadTensor, TooLarge, Unsupported
from inference.metadata import ModelSpec, TensorSpec
from inference.oip import ResponseFormat, compress, inflate, parse_infer, render_infer
from inference.tensors import InferRequest, InferResult, Tensor, pack_bytes
from tests.unit.inference.strategies import ints, parameters, results, texts

KIB = 1024


def parse(
    body: bytes | dict[str, Any],
    header_length: int | None = None,
    spec: ModelSpec | None = None,
) -> tuple[InferRequest, ResponseFormat]:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    return parse_infer(raw, header_length, model="m", version="1", spec=spec)


def x(**fields: Any) -> dict[str, Any]:
    """A JSON input, good unless `fields` say otherwise."""
    return {"name": "X", "datatype": "INT8", "shape": [2], "data": [1, 2]} | fields


def with_binary(head: dict[str, Any], *tail: bytes) -> tuple[bytes, int]:
    text = orjson.dumps(head)
    return b"".join((text, *tail)), len(text)


def binary_x(size: Any, **fields: Any) -> dict[str, Any]:
    entry = x(parameters={"binary_data_size": size}, **fields)
    return {name: value for name, value in entry.items() if name != "data" or "data" in fields}


# What clients send


def test_a_json_body_becomes_a_request() -> None:
    request, fmt = parse(
        {
            "id": "mine",
            "parameters": {"priority": 1, "user": "you", "binary_data_output": False},
            "inputs": [x(), x(name="Y", datatype="BYTES", shape=[1, 1], data=[["ü"]])],
            "outputs": [{"name": "A"}, {"name": "B", "parameters": {"binary_data": True}}],
        }
    )
    assert request == InferRequest(
        model="m",
        version="1",
        inputs=(
            Tensor("X", "INT8", (2,), b"\1\2"),
            Tensor("Y", "BYTES", (1, 1), pack_bytes(["ü".encode()])),
        ),
        outputs=("A", "B"),
        parameters={"priority": 1, "user": "you"},
        id="mine",
    )
    assert not fmt.is_binary("A")
    assert fmt.is_binary("B")


def test_binary_and_json_inputs_may_be_mixed() -> None:
    head = {"inputs": [binary_x(2, name="A"), x(name="B"), binary_x(2, name="C")]}
    request, fmt = parse(*with_binary(head, b"\1\2", b"\3\4"))
    assert [bytes(tensor.data) for tensor in request.inputs] == [b"\1\2", b"\1\2", b"\3\4"]
    assert not fmt.binary


def test_binary_inputs_are_slices_of_the_body() -> None:
    body, length = with_binary({"inputs": [binary_x(2)]}, b"\1\2")
    request, _ = parse(body, length)
    data = request.inputs[0].data
    assert isinstance(data, memoryview)
    assert data.obj is body


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("asked", [True, False])
def test_what_the_triton_client_sends_is_what_arrives(binary: bool, asked: bool) -> None:
    floats = np.array([[1.5, -2.0]], dtype=np.float32)
    words = np.array([["a", "ü"]], dtype=np.object_)
    inputs = [
        triton.InferInput("FLOATS", [1, 2], "FP32").set_data_from_numpy(floats, binary),
        triton.InferInput("TEXT", [1, 2], "BYTES").set_data_from_numpy(words, binary),
    ]
    outputs = [triton.InferRequestedOutput("TEXT_OUT", binary_data=False)] if asked else None
    body, length = triton.InferenceServerClient.generate_request_body(
        inputs, outputs=outputs, request_id="7", priority=2, timeout=1000
    )
    request, fmt = parse(bytes(body), length)
    assert request == InferRequest(
        "m",
        "1",
        (Tensor("FLOATS", "FP32", (1, 2), floats.tobytes()), texts([["a", "ü"]])),
        outputs=("TEXT_OUT",) if asked else (),
        parameters={"priority": 2, "timeout": 1000},
        id="7",
    )
    assert fmt.is_binary("TEXT_OUT") is not asked


# A body without JSON

ONE_INPUT = ModelSpec("m", "1", "", (TensorSpec("X", "FP32", (-1, -1, 2)),), (), 8)


def one_input(datatype: str, shape: tuple[int, ...], max_batch_size: int = 0) -> ModelSpec:
    return ModelSpec("m", "1", "", (TensorSpec("X", datatype, shape),), (), max_batch_size)


@pytest.mark.parametrize(
    ("spec", "body", "shape"),
    [
        (one_input("FP32", (-1, -1, 2), 8), bytes(24), (1, 3, 2)),  # a batch of one
        (one_input("FP32", (-1, 4), 8), bytes(16), (1, 4)),
        (one_input("INT8", (-1,)), bytes(5), (5,)),
        (one_input("INT8", (5,)), bytes(5), (5,)),
    ],
)
def test_a_raw_body_takes_its_shape_from_the_model(
    spec: ModelSpec, body: bytes, shape: tuple[int, ...]
) -> None:
    request, fmt = parse(body, 0, spec)
    (tensor,) = request.inputs
    assert (tensor.name, tensor.shape, tensor.data) == ("X", shape, body)
    assert fmt.binary


def test_a_raw_body_for_a_bytes_input_is_its_one_element() -> None:
    request, _ = parse(b"any bytes", 0, one_input("BYTES", (-1, 1), 8))
    assert request.inputs == (Tensor("X", "BYTES", (1, 1), pack_bytes([b"any bytes"])),)


@pytest.mark.parametrize(
    ("spec", "body"),
    [
        (None, b""),
        (replace(ONE_INPUT, inputs=ONE_INPUT.inputs * 2), b""),
        (one_input("INT16", (-1,)), b"odd"),
        (one_input("INT8", (4,)), b"five!"),
        (one_input("INT8", (-1, -1)), b"any?"),  # two unknowns
        (one_input("INT8", (-1, 2)), b"odd"),
        (one_input("BYTES", (2,)), b"one element"),
    ],
)
def test_a_raw_body_that_leaves_a_doubt_is_refused(spec: ModelSpec | None, body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(body, 0, spec)


# Refusals


@pytest.mark.parametrize(
    ("body", "header_length", "says"),
    [
        (b"", None, "body has 0 bytes"),
        (b"{}", 3, "is 3; the body has 2"),
        (b"{}", -1, "is -1"),
        (b"{", None, "not JSON"),
        (b'{"inputs":[NaN]}', None, "not JSON"),
        (b"[" * 100_000, None, "not JSON"),
        (b"\xff\xfe", None, "not JSON"),
        (b"[]", None, "must be a JSON object"),
        (b"{}", None, "inputs must be an array"),
        (b'{"inputs":{}}', None, "inputs must be an array"),
        (b'{"inputs":[5]}', None, r"inputs\[0\] must be a JSON object"),
        (b'{"inputs":[{}]}', None, "name must be a string"),
        (b'{"inputs":[],"id":7}', None, "id must be a string"),
        (b'{"inputs":[],"outputs":7}', None, "outputs must be an array"),
        (b'{"inputs":[],"outputs":["A"]}', None, r"outputs\[0\] must be a JSON object"),
        (b'{"inputs":[],"parameters":[]}', None, "parameters must be a JSON object"),
        (b'{"inputs":[],"parameters":{"a":[1]}}', None, "a must be a number"),
        (b'{"inputs":[],"parameters":{"a":null}}', None, "a must be a number"),
        (b'{"inputs":[],"parameters":{"priority":"1"}}', None, "priority must be"),
        (b'{"inputs":[],"parameters":{"timeout":-1}}', None, "timeout must be"),
        (b'{"inputs":[],"parameters":{"sequence_id":1.5}}', None, "sequence_id must be"),
        (b'{"inputs":[],"parameters":{"sequence_end":0}}', None, "sequence_end must be"),
        (b'{"inputs":[],"parameters":{"triton_x":1}}', None, "reserved"),
        (b'{"inputs":[],"parameters":{"binary_data_output":1}}', None, "binary_data_output must"),
        (b'{"inputs":[]}tail', 13, "4 bytes that belong to no input"),
    ],
)
def test_a_body_that_is_not_an_infer_request_is_refused(
    body: bytes, header_length: int | None, says: str
) -> None:
    with pytest.raises(BadBody, match=says):
        parse(body, header_length)


@pytest.mark.parametrize(
    ("entry", "tail", "says"),
    [
        (x(datatype="FP128"), b"", "unknown datatype"),
        (x(shape=[-2]), b"", "outside 0"),
        (x(shape=[2**31]), b"", "outside 0"),
        (x(shape=[2**31 - 1] * 3), b"", "too many elements"),
        (x(shape=[2.0]), b"", "array of integers"),
        (x(shape="2"), b"", "array of integers"),
        (x(shape=None), b"", "array of integers"),
        (x(data=None), b"", "must be an array"),
        (x(data=[1]), b"", "has 2 elements, data has 1"),
        ({"name": "X", "datatype": "INT8", "data": [1]}, b"", "shape is missing"),
        ({"name": "X", "datatype": "INT8", "shape": [1]}, b"", "either data or"),
        (binary_x(2, data=[1, 2]), b"\1\2", "either data or"),
        (binary_x(3), b"\1\2", "is 3; the body has 2 bytes left"),
        (binary_x(1), b"\1", "take 2 bytes, not 1"),
        (binary_x(4, datatype="BYTES", shape=[1]), b"\1\0\0\0", "past the end"),
        (binary_x(5, datatype="BYTES"), b"\1\0\0\0a", "has 2 elements, not 1"),
    ],
)
def test_a_broken_tensor_is_refused_by_its_name(
    entry: dict[str, Any], tail: bytes, says: str
) -> None:
    with pytest.raises(BadTensor, match=says) as caught:
        parse(*with_binary({"inputs": [entry]}, tail))
    assert caught.value.param == "X"
    assert "'X'" in caught.value.message


@pytest.mark.parametrize("size", [-1, 2.0, "2", True, None])
def test_a_binary_size_that_is_no_size_is_refused(size: object) -> None:
    with pytest.raises(BadBody, match="binary_data_size must be"):
        parse(*with_binary({"inputs": [binary_x(size)]}, b"\1\2"))


def test_binary_inputs_need_the_header() -> None:
    with pytest.raises(BadTensor, match="0 bytes left"):
        parse({"inputs": [binary_x(2)]})


def test_names_come_once() -> None:
    with pytest.raises(BadTensor, match="'X' is in inputs more than once"):
        parse({"inputs": [x(), x()]})
    with pytest.raises(BadTensor, match="'A' is in outputs more than once"):
        parse({"inputs": [x()], "outputs": [{"name": "A"}, {"name": "A"}]})


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": [x(parameters={"shared_memory_region": "r"})]},
        {"inputs": [], "outputs": [{"name": "A", "parameters": {"shared_memory_offset": 0}}]},
        {"inputs": [], "outputs": [{"name": "A", "parameters": {"classification": 3}}]},
        {"inputs": [x(datatype="FP16", data=[1.0, 2.0])]},
    ],
)
def test_what_we_do_not_do_is_said_so(body: dict[str, Any]) -> None:
    with pytest.raises(Unsupported):
        parse(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "inputs",
                    "outputs",
                    "name",
                    "datatype",
                    "shape",
                    "data",
                    "id",
                    "parameters",
                    "binary_data",
                    "binary_data_size",
                ]
            ),
            inner,
            max_size=6,
        )
    ),
    max_leaves=25,
)


@given(json_values, st.binary(max_size=6), st.none() | st.integers(-2, 60))
def test_any_json_is_parsed_or_refused(
    value: object, tail: bytes, header_length: int | None
) -> None:
    try:
        parse(json.dumps(value).encode() + tail, header_length, ONE_INPUT)
    except BadRequest:
        pass


@given(st.binary(max_size=60), st.none() | st.integers(-2, 60))
def test_any_bytes_are_parsed_or_refused(body: bytes, header_length: int | None) -> None:
    try:
        parse(body, header_length)
    except BadRequest:
        pass


# Answers

RESULT = InferResult("m", "3", (ints([[1, 2]], "A"), texts([["ü"]], "B")), id="mine")


def test_an_answer_in_json_has_no_header() -> None:
    body, length = render_infer(RESULT, ResponseFormat())
    assert length is None
    assert orjson.loads(body) == {
        "id": "mine",
        "model_name": "m",
        "model_version": "3",
        "outputs": [
            {"name": "A", "datatype": "INT64", "shape": [1, 2], "data": [1, 2]},
            {"name": "B", "datatype": "BYTES", "shape": [1, 1], "data": ["ü"]},
        ],
    }


def test_an_answer_in_binary_says_where_its_json_ends() -> None:
    body, length = render_infer(RESULT, ResponseFormat(binary=True, overrides={"B": False}))
    assert length is not None
    assert orjson.loads(body[:length])["outputs"] == [
        {
            "name": "A",
            "datatype": "INT64",
            "shape": [1, 2],
            "parameters": {"binary_data_size": 16},
        },
        {"name": "B", "datatype": "BYTES", "shape": [1, 1], "data": ["ü"]},
    ]
    assert body[length:] == bytes(RESULT.outputs[0].data)


def test_no_id_is_no_id_and_parameters_are_told() -> None:
    body, _ = render_infer(replace(RESULT, id="", parameters={"n": 1}), ResponseFormat())
    head = orjson.loads(body)
    assert "id" not in head
    assert head["parameters"] == {"n": 1}


def test_an_answer_in_json_is_json_whatever_the_numbers() -> None:
    data = np.array([np.nan, np.inf, 0.1], dtype="<f4").tobytes()
    body, _ = render_infer(
        InferResult("m", "1", (Tensor("A", "FP32", (3,), data),)), ResponseFormat()
    )
    assert orjson.loads(body)["outputs"][0]["data"] == [None, None, 0.1]


def test_numbers_at_any_offset_of_a_frame_are_printed() -> None:
    data = memoryview(b"?" + np.array([1, 2], dtype="<i8").tobytes())[1:]
    body, _ = render_infer(
        InferResult("m", "1", (Tensor("A", "INT64", (2,), data),)), ResponseFormat()
    )
    assert orjson.loads(body)["outputs"][0]["data"] == [1, 2]


@given(results, parameters)
def test_any_result_can_be_answered_in_binary(
    result: InferResult, extra: dict[str, bool | int | float | str]
) -> None:
    body, length = render_infer(replace(result, parameters=extra), ResponseFormat(binary=True))
    tail = b"".join(bytes(tensor.data) for tensor in result.outputs)
    assert body[len(body) if length is None else length :] == tail


@pytest.mark.parametrize("binary", [True, False])
def test_the_triton_client_reads_our_answers(binary: bool) -> None:
    body, length = render_infer(RESULT, ResponseFormat(binary=binary))
    answer = triton.InferenceServerClient.parse_response_body(body, header_length=length)
    assert answer.as_numpy("A").tolist() == [[1, 2]]
    words = answer.as_numpy("B").tolist()
    assert words in ([["ü"]], [["ü".encode()]])


# Compression


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
@given(body=st.binary(max_size=200))
def test_compression_is_undone(encoding: str, body: bytes) -> None:
    assert inflate(compress(body, encoding), encoding, limit=200) == body


def test_what_others_call_deflate_and_gzip_is_read() -> None:
    raw = zlib.compressobj(wbits=-15)
    assert inflate(raw.compress(b"body") + raw.flush(), "deflate", KIB) == b"body"
    assert inflate(gzip.compress(b"bo") + gzip.compress(b"dy"), " X-GZIP ", KIB) == b"body"
    assert inflate(b"body", None, KIB) == inflate(b"body", "", KIB) == b"body"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_a_body_may_be_as_long_as_the_limit_and_no_longer(encoding: str) -> None:
    body = bytes(KIB)
    assert inflate(compress(body, encoding), encoding, KIB) == body
    with pytest.raises(TooLarge):
        inflate(compress(body + b"\0", encoding), encoding, KIB)


def test_a_bomb_is_cut_off_at_the_limit() -> None:
    bomb = gzip.compress(bytes(64 * KIB * KIB))
    many = gzip.compress(bytes(KIB)) * 1000
    for body in (bomb, many):
        with pytest.raises(TooLarge):
            inflate(body, "gzip", 4 * KIB)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_broken_stream_is_a_bad_body(encoding: str) -> None:
    good = compress(b"body" * 50, encoding)
    for broken in (b"", b"plain text", good[:-3], good[:5], good + b"more"):
        with pytest.raises(BadBody):
            inflate(broken, encoding, KIB)


def test_another_encoding_is_unsupported() -> None:
    for encoding in ("br", "gzip, deflate", "zstd"):
        with pytest.raises(Unsupported):
            inflate(b"", encoding, KIB)
        with pytest.raises(Unsupported):
            compress(b"", encoding)
