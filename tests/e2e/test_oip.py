"""An unmodified `tritonclient.http` cannot tell the gateway from the Triton behind it."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.http as tc
from tritonclient.utils import InferenceServerException

from ops.embedded import Stack
from tests.e2e.helpers import DIGITS, IDENTITY, Http, Witness, answered_ints, ints, tensor, together

pytestmark = pytest.mark.stack

LENGTH = "Inference-Header-Content-Length"


class Server(NamedTuple):
    """A server, as tritonclient sees it."""

    client: Any
    key: str | None = None

    def call(self, method: str, *args: object, **options: object) -> Any:
        """What the client's method returns; where it raises, the status and the message."""
        try:
            # A new dict each time: the client leaves headers of its own in it.
            return getattr(self.client, method)(*args, headers=self._headers(), **options)
        except InferenceServerException as error:
            return error.status(), error.message()

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


@pytest.fixture(scope="module")
def ours(stack: Stack) -> Iterator[Server]:
    with tc.InferenceServerClient(stack.env["TIDEGATE_URL"].removeprefix("http://")) as client:
        yield Server(client, stack.env["TIDEGATE_API_KEY"])


@pytest.fixture(scope="module")
def theirs(stack: Stack) -> Iterator[Server]:
    url = stack.env["TIDEGATE_TRITON_HTTP_URL"]
    with tc.InferenceServerClient(url.removeprefix("http://")) as client:
        yield Server(client)


# About the server and its models

QUESTIONS: Sequence[tuple[str, ...]] = (
    ("is_server_live",),
    ("is_server_ready",),
    ("get_server_metadata",),
    ("get_inference_statistics",),
    *(
        (method, *model)
        for method in (
            "is_model_ready",
            "get_model_metadata",
            "get_model_config",
            "get_inference_statistics",
        )
        for model in (("digits",), ("digits", "1"), ("identity",), ("identity", "1"))
    ),
    *(
        (method, *model)
        for method in ("is_model_ready", "get_model_metadata", "get_model_config")
        for model in (("nobody",), ("nobody", "1"), ("digits", "77"))
    ),
)


@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_a_question_is_answered_as_triton_answers_it(
    ours: Server, theirs: Server, question: tuple[str, ...]
) -> None:
    assert ours.call(*question) == theirs.call(*question)


def test_models_that_exist_are_ready_and_others_are_not(ours: Server) -> None:
    assert ours.call("is_model_ready", "digits", "1") is True
    assert ours.call("is_model_ready", "digits", "77") is False
    assert ours.call("is_model_ready", "nobody") is False


@pytest.mark.parametrize("model", [("nobody",), ("digits", "77")], ids=" ".join)
def test_statistics_of_an_unknown_model_are_not_found(
    ours: Server, theirs: Server, model: tuple[str, ...]
) -> None:
    status, message = ours.call("get_inference_statistics", *model)
    # Triton says 400 here, and 404 everywhere else.
    assert (status, message) == ("404", theirs.call("get_inference_statistics", *model)[1])


def test_the_index_has_every_model(ours: Server) -> None:
    """What a Triton says whose repository anybody may ask for."""
    index = ours.call("get_model_repository_index")

    assert index == [
        {"name": name, "version": "1", "state": "READY"} for name in ("digits", "identity")
    ]


def test_the_index_can_leave_out_what_is_not_ready(gateway: Http) -> None:
    ready = gateway.post("/v2/repository/index", {"ready": True}).json()

    assert {model["name"] for model in ready} == {"digits", "identity"}


@pytest.mark.parametrize("change", ["load", "unload"])
def test_nobody_loads_or_unloads_a_model_by_http(gateway: Http, triton: Http, change: str) -> None:
    path = f"/v2/repository/models/digits/{change}"

    assert gateway.post(path, {}).status == 404
    assert triton.post(path, {}).status == 403
    assert gateway.get("/v2/models/digits/ready").status == 200


def test_health_needs_no_key(gateway: Http) -> None:
    anybody = Http(gateway.url)

    assert anybody.get("/v2/health/live").status == 200
    assert anybody.get("/v2/health/ready").status == 200


# Inference


class Case(NamedTuple):
    """Inputs of one model: name, datatype, values."""

    model: str
    inputs: Sequence[tuple[str, str, Any]]


def texts(*rows: Sequence[str | bytes]) -> Any:
    return np.array(rows, dtype=object)


FLOATS = np.array([[0.5, -0.0, 1e-45], [3.4e38, -1.1754944e-38, 1 / 3]], dtype=np.float32)
INTS = np.array([[2**63 - 1, -(2**63)], [0, -1]], dtype=np.int64)
TEXTS = texts(["", "tide", "ü€😀"], ["\0", '"\\\n', "x" * 300])
IMAGES = (np.arange(5 * 64, dtype=np.float32) * 7 % 17).reshape(5, 64)

CASES = {
    "text": Case("identity", [("TEXT", "BYTES", TEXTS)]),
    "floats": Case("identity", [("FLOATS", "FP32", FLOATS)]),
    "integers": Case("identity", [("INTS", "INT64", INTS)]),
    "one element": Case("identity", [("INTS", "INT64", INTS[:1, :1])]),
    "the largest batch": Case("identity", [("INTS", "INT64", np.arange(192).reshape(64, 3))]),
    "a long row": Case("identity", [("FLOATS", "FP32", np.linspace(0, 1, 50_000)[None, :])]),
    "three inputs": Case(
        "identity",
        [("TEXT", "BYTES", TEXTS), ("FLOATS", "FP32", FLOATS), ("INTS", "INT64", INTS)],
    ),
    "images": Case("digits", [("image", "FP32", IMAGES)]),
}


def inputs_of(case: Case, binary: Sequence[bool]) -> list[Any]:
    made = []
    for (name, datatype, values), in_binary in zip(case.inputs, binary, strict=True):
        array = values.astype(np.float32) if datatype == "FP32" else values
        one = tc.InferInput(name, list(array.shape), datatype)
        one.set_data_from_numpy(array, binary_data=in_binary)
        made.append(one)
    return made


def answer(server: Server, model: str, inputs: list[Any], **options: object) -> Any:
    """The response's JSON without its values, and each output's values, type and shape; or the
    status and message of a refusal."""
    result = server.call("infer", model, inputs, **options)
    if isinstance(result, tuple):
        return result
    response = result.get_response()
    arrays = {output["name"]: result.as_numpy(output["name"]) for output in response["outputs"]}
    values = {
        name: array.tolist() if array.dtype == object else array.tobytes()
        for name, array in arrays.items()
    }
    # Where numbers are JSON, both print them so that they read back the same, in other digits.
    head = response | {
        "outputs": [
            {key: value for key, value in output.items() if key != "data"}
            | {"JSON": "data" in output}
            for output in response["outputs"]
        ]
    }
    forms = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
    return head, forms, values


Asked = Callable[[str], list[Any] | None]
OUTPUTS = {
    "identity": lambda case: [f"{name}_OUT" for name, _, _ in case.inputs],
    "digits": lambda case: ["label", "probabilities"],
}


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
@pytest.mark.parametrize(
    "binary_out", [None, True, False], ids=["any out", "binary out", "JSON out"]
)
@pytest.mark.parametrize("binary_in", [True, False], ids=["binary in", "JSON in"])
@pytest.mark.parametrize("name", CASES)
def test_an_inference_is_answered_as_triton_answers_it(
    ours: Server,
    theirs: Server,
    name: str,
    binary_in: bool,
    binary_out: bool | None,
    compression: str | None,
) -> None:
    case = CASES[name]

    def asked(server: Server) -> Any:
        outputs = None
        if binary_out is not None:
            outputs = [
                tc.InferRequestedOutput(output, binary_data=binary_out)
                for output in OUTPUTS[case.model](case)
            ]
        return answer(
            server,
            case.model,
            inputs_of(case, [binary_in] * len(case.inputs)),
            outputs=outputs,
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )

    found = asked(ours)
    assert found == asked(theirs)
    assert found[0]["model_name"] == case.model


def test_binary_and_json_mix_in_one_request(ours: Server, theirs: Server) -> None:
    case = CASES["three inputs"]

    def asked(server: Server) -> Any:
        return answer(
            server,
            "identity",
            inputs_of(case, [True, False, True]),
            outputs=[
                tc.InferRequestedOutput("INTS_OUT", binary_data=False),
                tc.InferRequestedOutput("TEXT_OUT", binary_data=True),
                tc.InferRequestedOutput("FLOATS_OUT", binary_data=False),
            ],
        )

    found = asked(ours)
    assert found == asked(theirs)
    in_json = {output["name"]: output["JSON"] for output in found[0]["outputs"]}
    assert in_json == {"INTS_OUT": True, "TEXT_OUT": False, "FLOATS_OUT": True}


@pytest.mark.parametrize("wanted", [["FLOATS_OUT"], ["INTS_OUT", "TEXT_OUT"]], ids=" ".join)
def test_only_the_outputs_asked_for_come_back(
    ours: Server, theirs: Server, wanted: list[str]
) -> None:
    case = CASES["three inputs"]

    def asked(server: Server) -> Any:
        outputs = [tc.InferRequestedOutput(name) for name in wanted]
        return answer(server, "identity", inputs_of(case, [True] * 3), outputs=outputs)

    found = asked(ours)
    assert found == asked(theirs)
    assert {output["name"] for output in found[0]["outputs"]} == set(wanted)


@pytest.mark.parametrize("version", ["", "1"])
@pytest.mark.parametrize("request_id", ["", "mine-1", 'ü " id'])
def test_the_request_id_comes_back_whatever_the_version(
    ours: Server, theirs: Server, version: str, request_id: str
) -> None:
    def asked(server: Server) -> Any:
        inputs = inputs_of(CASES["images"], [True])
        return answer(server, "digits", inputs, model_version=version, request_id=request_id)

    found = asked(ours)
    assert found == asked(theirs)
    assert found[0].get("id", "") == request_id
    assert found[0]["model_version"] == "1"


def test_bytes_that_are_no_text_come_back_in_binary(ours: Server, theirs: Server) -> None:
    case = Case("identity", [("TEXT", "BYTES", texts([b"\xff\0\x80", b""]))])
    found = answer(ours, "identity", inputs_of(case, [True]))

    assert found == answer(theirs, "identity", inputs_of(case, [True]))
    assert found[2] == {"TEXT_OUT": [[b"\xff\0\x80", b""]]}


def test_numbers_that_are_not_finite_come_back_in_binary(ours: Server, theirs: Server) -> None:
    odd = np.array([[np.nan, np.inf, -np.inf]], dtype=np.float32)
    case = Case("identity", [("FLOATS", "FP32", odd)])
    found = answer(ours, "identity", inputs_of(case, [True]))

    assert found == answer(theirs, "identity", inputs_of(case, [True]))
    assert found[2] == {"FLOATS_OUT": odd.tobytes()}


def test_an_answer_in_json_is_json_even_where_a_number_is_not_finite(ours: Server) -> None:
    odd = np.array([[np.nan, 1.5]], dtype=np.float32)
    result = ours.call(
        "infer",
        "identity",
        inputs_of(Case("identity", [("FLOATS", "FP32", odd)]), [True]),
        outputs=[tc.InferRequestedOutput("FLOATS_OUT", binary_data=False)],
    )

    # Triton prints NaN, which is not JSON.
    assert result.get_output("FLOATS_OUT")["data"] == [None, 1.5]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "JSON"])
@pytest.mark.parametrize(
    ("name", "datatype", "values"),
    [
        ("FLOATS", "FP32", np.zeros((1, 0), dtype=np.float32)),
        ("INTS", "INT64", np.zeros((2, 0), dtype=np.int64)),
        ("TEXT", "BYTES", np.zeros((1, 0), dtype=object)),
    ],
    ids=["floats", "integers", "text"],
)
def test_a_row_of_no_elements_is_answered_as_triton_answers_it(
    ours: Server, theirs: Server, name: str, datatype: str, values: Any, binary: bool
) -> None:
    case = Case("identity", [(name, datatype, values)])
    expected = answer(theirs, "identity", inputs_of(case, [binary]))
    assert expected[1] == {f"{name}_OUT": (expected[1][f"{name}_OUT"][0], values.shape)}

    assert answer(ours, "identity", inputs_of(case, [binary])) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"priority": 1},
        {"timeout": 20_000_000},
        {"sequence_id": 5, "sequence_start": True},
        {"parameters": {"text": "x", "yes": True, "number": 3, "fraction": 0.5}},
    ],
    ids=lambda options: " ".join(options),
)
def test_parameters_are_taken(ours: Server, theirs: Server, options: dict[str, Any]) -> None:
    case = CASES["integers"]
    found = answer(ours, "identity", inputs_of(case, [True]), **options)

    assert found == answer(theirs, "identity", inputs_of(case, [True]), **options)
    assert found[2] == {"INTS_OUT": INTS.tobytes()}


@pytest.mark.parametrize(
    ("model", "options"),
    [("nobody", {}), ("identity", {"model_version": "77"})],
    ids=["unknown model", "unknown version"],
)
def test_an_unknown_model_is_refused_as_triton_refuses_it(
    ours: Server, theirs: Server, model: str, options: dict[str, Any]
) -> None:
    inputs = inputs_of(CASES["integers"], [True])
    found = answer(ours, model, inputs, **options)

    assert found == answer(theirs, model, inputs, **options)
    assert found[0] == "404"


# On the wire


def test_a_body_of_raw_data_alone_is_answered_as_triton_answers_it(
    gateway: Http, triton: Http
) -> None:
    image = IMAGES[3].tobytes()
    ours, theirs = (
        server("POST", DIGITS, image, headers={LENGTH: "0"}) for server in (gateway, triton)
    )

    assert (ours.status, ours.body) == (theirs.status, theirs.body)
    assert ours.status == 200
    for header in (LENGTH, "Content-Type"):
        assert ours.headers[header] == theirs.headers[header] is not None


@pytest.mark.parametrize(
    ("encoding", "squeeze", "inflate"),
    [("gzip", gzip.compress, gzip.decompress), ("deflate", zlib.compress, zlib.decompress)],
    ids=["gzip", "deflate"],
)
def test_bodies_are_compressed_when_asked(
    gateway: Http,
    encoding: str,
    squeeze: Callable[[bytes], bytes],
    inflate: Callable[[bytes], bytes],
) -> None:
    request = json.dumps(ints(*range(500))).encode()
    plain = gateway("POST", IDENTITY, request)
    squeezed = gateway(
        "POST",
        IDENTITY,
        squeeze(request),
        headers={"Content-Encoding": encoding, "Accept-Encoding": encoding},
    )

    assert "Content-Encoding" not in plain.headers
    assert squeezed.headers["Content-Encoding"] == encoding
    assert len(squeezed.body) < len(plain.body)
    assert inflate(squeezed.body) == plain.body


def test_a_request_goes_through_the_queue_to_triton_and_leaves_a_record(
    gateway: Http, witness: Witness
) -> None:
    (before, _), messages = witness.models()["digits"], witness.messages()
    reply = gateway.post(DIGITS, {"inputs": [tensor("image", "FP32", IMAGES[0].tolist())]})
    after, _ = witness.models()["digits"]
    job = gateway.get(f"/v1/jobs/{reply.headers['Tidegate-Job-Id']}").json()

    assert (reply.status, after, witness.messages()) == (200, before + 1, messages + 1)
    assert (job["kind"], job["model"], job["version"]) == ("realtime", "digits", "1")
    assert job["status"] == "succeeded"


def test_requests_of_one_moment_travel_together_and_come_back_apart(gateway: Http) -> None:
    replies = together(
        [partial(gateway.post, IDENTITY, ints(value, -value)) for value in range(48)]
    )

    assert [answered_ints(reply.json()) for reply in replies] == [[n, -n] for n in range(48)]
    ids = {reply.headers["Tidegate-Job-Id"] for reply in replies}
    assert len(ids) == 48
    sizes = [gateway.get(f"/v1/jobs/{job}").json()["metrics"]["batch_size"] for job in ids]
    assert max(sizes) > 1
