"""What no model would take is refused at the door: a status, a sentence, and nothing was run."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import psutil
import pytest

from config import MIB
from ops.embedded import Stack
from tests.e2e.helpers import DIGITS, IDENTITY, Http, Reply, Witness, ints, receive, tensor

pytestmark = pytest.mark.stack

LENGTH = "Inference-Header-Content-Length"
LIMIT = 64 * MIB
IMAGE = tensor("image", "FP32", [0.0] * 64)
INTS = tensor("INTS", "INT64", [1, 2])


class Row(NamedTuple):
    """A request, and how it is refused: the status, and words of the message."""

    status: int
    words: tuple[str, ...]
    body: object
    path: str = IDENTITY
    headers: Mapping[str, str] = {}


def inputs(*tensors: object, **rest: object) -> dict[str, object]:
    return {"inputs": tensors, **rest}


def changed(given: dict[str, Any], **changes: object) -> dict[str, Any]:
    """A tensor with other fields; None takes a field away."""
    return {name: value for name, value in (given | changes).items() if value is not None}


def binary(document: dict[str, Any], raw: bytes, length: int | None = None) -> dict[str, Any]:
    """Body and headers of a request with binary tensors behind its JSON."""
    text = json.dumps(document).encode()
    stated = len(text) if length is None else length
    return {"body": text + raw, "headers": {LENGTH: str(stated)}}


def in_binary(size: object) -> dict[str, Any]:
    return changed(INTS, data=None, parameters={"binary_data_size": size})


FITS = b"\x01" + bytes(15)
SHARED = {"shared_memory_region": "mine", "shared_memory_byte_size": 16}

TENSORS = {
    "datatype of another size": Row(
        400, ("INTS", "INT32", "INT64"), inputs(changed(INTS, datatype="INT32"))
    ),
    "datatype of the same size": Row(
        400, ("INTS", "UINT64", "INT64"), inputs(changed(INTS, datatype="UINT64"))
    ),
    "unknown datatype": Row(400, ("INTS", "INT65"), inputs(changed(INTS, datatype="INT65"))),
    "no datatype": Row(400, ("datatype",), inputs(changed(INTS, datatype=None))),
    "no name": Row(400, ("name",), inputs(changed(INTS, name=None))),
    "shape": Row(
        400, ("image", "[1, 63]"), inputs(tensor("image", "FP32", [0.0] * 63)), path=DIGITS
    ),
    "rank": Row(400, ("image", "[64]"), inputs(changed(IMAGE, shape=[64])), path=DIGITS),
    "scalar": Row(400, ("INTS", "shape"), inputs(changed(INTS, shape=[]))),
    "missing shape": Row(400, ("INTS", "shape"), inputs(changed(INTS, shape=None))),
    "negative dimension": Row(400, ("INTS", "shape"), inputs(changed(INTS, shape=[1, -2]))),
    "fractional dimension": Row(400, ("INTS", "shape"), inputs(changed(INTS, shape=[1, 2.0]))),
    "dimension that is text": Row(400, ("INTS", "shape"), inputs(changed(INTS, shape=["1", 2]))),
    "shape that is no array": Row(400, ("INTS", "shape"), inputs(changed(INTS, shape=2))),
    "shape larger than any memory": Row(
        400, ("INTS", "shape"), inputs(changed(INTS, shape=[2**40, 2**40]))
    ),
    "fewer elements than the shape": Row(400, ("INTS", "2", "1"), inputs(changed(INTS, data=[1]))),
    "more elements than the shape": Row(
        400, ("INTS", "2", "3"), inputs(changed(INTS, data=[1, 2, 3]))
    ),
    "fewer bytes than the shape": Row(
        400, ("INTS", "16", "8"), **binary(inputs(in_binary(8)), bytes(8))
    ),
    "no batch at all": Row(
        400, ("INTS", "[0, 2]"), inputs(changed(INTS, shape=[0, 2], data=[]))
    ),
    "batch over the model's most": Row(
        400, ("INTS", "65", "64"), inputs(tensor("INTS", "INT64", [0] * 65, [65, 1]))
    ),
    "inputs of different batches": Row(
        400,
        ("FLOATS", "INTS"),
        inputs(INTS, tensor("FLOATS", "FP32", [0.5, 0.5], [2, 1])),
    ),
    "missing input": Row(400, ("image", "missing"), inputs(), path=DIGITS),
    "extra input": Row(400, ("OTHER", "INTS"), inputs(INTS, changed(INTS, name="OTHER"))),
    "the same input twice": Row(400, ("INTS", "once"), inputs(INTS, INTS)),
    "unknown output": Row(
        400, ("OTHER", "INTS_OUT"), inputs(INTS, outputs=[{"name": "OTHER"}])
    ),
    "the same output twice": Row(
        400, ("INTS_OUT", "once"), inputs(INTS, outputs=[{"name": "INTS_OUT"}] * 2)
    ),
    "null data": Row(400, ("INTS",), {"inputs": [INTS | {"data": None}]}),
    "data that is no array": Row(400, ("INTS", "array"), inputs(changed(INTS, data=1))),
    "a null among the data": Row(400, ("INTS", "null"), inputs(changed(INTS, data=[1, None]))),
    "text in place of a number": Row(400, ("INTS", "string"), inputs(changed(INTS, data=[1, "2"]))),
    "a fraction in place of an integer": Row(400, ("INTS",), inputs(changed(INTS, data=[1, 0.5]))),
    "a number out of range": Row(400, ("INTS",), inputs(changed(INTS, data=[1, 2**63]))),
    "a float out of range": Row(
        400, ("FLOATS", "range"), inputs(tensor("FLOATS", "FP32", [1e39]))
    ),
    "a number in place of text": Row(400, ("TEXT",), inputs(tensor("TEXT", "BYTES", [1]))),
    "uneven nesting": Row(
        400, ("INTS", "uneven"), inputs(changed(INTS, shape=[2, 2], data=[[1, 2], [3]]))
    ),
    "neither data nor a size": Row(400, ("INTS", "data"), inputs(changed(INTS, data=None))),
    "data and a size": Row(
        400, ("INTS", "data"), inputs(changed(INTS, parameters={"binary_data_size": 16}))
    ),
    "text whose lengths lie": Row(
        400,
        ("TEXT", "length"),
        **binary(
            inputs(
                changed(
                    tensor("TEXT", "BYTES", [], [1, 1]),
                    data=None,
                    parameters={"binary_data_size": 8},
                )
            ),
            struct.pack("<I", 5) + b"four",
        ),
    ),
}  # fmt: skip

FRAMING = {
    "no body": Row(400, ("body",), b""),
    "no JSON": Row(400, ("JSON",), b"hello"),
    "JSON that ends too early": Row(400, ("JSON",), json.dumps(ints(1)).encode()[:-1]),
    "JSON that is not UTF-8": Row(400, ("JSON",), b'{"inputs": "\xff"}'),
    "JSON nested without end": Row(400, ("JSON",), b"[" * 100_000),
    "a JSON array": Row(400, ("object",), [1]),
    "no inputs": Row(400, ("inputs",), {}),
    "inputs that are no array": Row(400, ("inputs",), {"inputs": INTS}),
    "an input that is no object": Row(400, ("inputs[1]",), inputs(INTS, 1)),
    "an id that is no text": Row(400, ("id",), inputs(INTS, id=1)),
    "a length beyond the body": Row(400, (LENGTH,), **binary(inputs(INTS), b"", length=10_000)),
    "a length that cuts the JSON": Row(400, ("JSON",), **binary(inputs(INTS), b"", length=10)),
    "a negative length": Row(400, (LENGTH,), **binary(inputs(INTS), b"", length=-1)),
    "a length that is no number": Row(400, (LENGTH,), inputs(INTS), headers={LENGTH: "all"}),
    "bytes that belong to no tensor": Row(
        400, ("4 bytes",), **binary(inputs(in_binary(16)), FITS + b"more")
    ),
    "bytes behind JSON tensors": Row(400, ("4 bytes",), **binary(inputs(INTS), b"more")),
    "a size beyond the body": Row(
        400, ("INTS", "binary_data_size"), **binary(inputs(in_binary(17)), FITS)
    ),
    "a negative size": Row(400, ("binary_data_size",), **binary(inputs(in_binary(-16)), FITS)),
    "a size that is no number": Row(
        400, ("binary_data_size",), **binary(inputs(in_binary("16")), FITS)
    ),
    "a size that is a fraction": Row(
        400, ("binary_data_size",), **binary(inputs(in_binary(16.0)), FITS)
    ),
    "raw data of the wrong size": Row(
        400, ("image", "256", "255"), bytes(255), path=DIGITS, headers={LENGTH: "0"}
    ),
    "raw data for three inputs": Row(
        400, ("one input",), bytes(16), headers={LENGTH: "0"}
    ),
    "gzip that is none": Row(400, ("gzip",), b"hello", headers={"Content-Encoding": "gzip"}),
    "gzip that ends too early": Row(
        400,
        ("gzip",),
        gzip.compress(json.dumps(ints(1)).encode())[:-4],
        headers={"Content-Encoding": "gzip"},
    ),
    "deflate that is none": Row(
        400, ("deflate",), b"hello", headers={"Content-Encoding": "deflate"}
    ),
    "an encoding nobody offered": Row(
        400, ("'br'", "gzip"), ints(1), headers={"Content-Encoding": "br"}
    ),
}  # fmt: skip

FEATURES = {
    "classification": Row(
        400,
        ("probabilities", "classification", "not supported"),
        inputs(IMAGE, outputs=[{"name": "probabilities", "parameters": {"classification": 3}}]),
        path=DIGITS,
    ),
    "an input in shared memory": Row(
        400,
        ("INTS", "shared memory"),
        inputs(changed(INTS, data=None, parameters=SHARED)),
    ),
    "an output in shared memory": Row(
        400,
        ("INTS_OUT", "shared memory"),
        inputs(INTS, outputs=[{"name": "INTS_OUT", "parameters": SHARED}]),
    ),
    "a parameter that is an object": Row(400, ("deep",), ints(1, deep={"a": 1})),
    "a reserved parameter": Row(400, ("triton_x",), ints(1, triton_x=1)),
    "a timeout that is text": Row(400, ("timeout",), ints(1, timeout="soon")),
    "a negative timeout": Row(400, ("timeout",), ints(1, timeout=-1)),
    "a priority that is text": Row(400, ("priority",), ints(1, priority="high")),
    **{
        f"the deadline {text}": Row(
            400, ("Tidegate-Deadline",), ints(1), headers={"Tidegate-Deadline": text}
        )
        for text in (
            "soon", "", "0", "-1", "nan", "inf", "1e300",
            "2020-01-01T00:00:00Z", "2100-01-01T00:00:00",
        )
    },
}  # fmt: skip

MODELS = {
    path: Row(404, (word,), ints(1), path=f"/v2/models/{path}/infer")
    for path, word in (
        ("nobody", "nobody"),
        ("nobody/versions/1", "nobody"),
        ("identity/versions/77", "77"),
        ("identity/versions/latest", "latest"),
        (f"identity/versions/{1:022}", "000"),
        ("identity/versions/-1", "-1"),
        ("identity%00", ""),
        ("..%2Fdigits", "not found"),
    )
}


@pytest.fixture(scope="module", autouse=True)
def _known_models(gateway: Http) -> None:
    """So that no row is the first to ask what the models look like."""
    assert gateway.get("/v2/models/identity").status == 200
    assert gateway.get("/v2/models/digits").status == 200


@pytest.fixture
def nothing_runs(witness: Witness) -> Iterator[None]:
    before = witness.testimony()
    yield
    assert witness.testimony() == before


def refusal(reply: Reply) -> str:
    """The message of an error in Triton's shape."""
    told = reply.json()
    assert list(told) == ["error"]
    assert isinstance(told["error"], str)
    for trace in ("Traceback", 'File "', ".py"):
        assert trace not in told["error"]
    message: str = told["error"]
    return message


def test_good_requests_are_seen_by_the_witness(gateway: Http, witness: Witness) -> None:
    models, messages = witness.models(), witness.messages()
    assert gateway.post(DIGITS, inputs(IMAGE)).status == 200
    assert gateway("POST", IDENTITY, **binary(inputs(in_binary(16)), FITS)).status == 200

    assert witness.messages() == messages + 2
    for model in ("digits", "identity"):
        assert witness.models()[model] == (models[model][0] + 1, models[model][1])


def _rows(rows: Mapping[str, Row]) -> Any:
    return pytest.mark.parametrize("row", rows.values(), ids=rows.keys())


def check(gateway: Http, row: Row) -> None:
    reply = gateway("POST", row.path, row.body, row.headers)
    assert reply.status == row.status, reply
    message = refusal(reply)
    for word in row.words:
        assert word in message


@_rows(TENSORS)
@pytest.mark.usefixtures("nothing_runs")
def test_a_tensor_that_does_not_fit_is_refused_by_name(gateway: Http, row: Row) -> None:
    check(gateway, row)


@_rows(FRAMING)
@pytest.mark.usefixtures("nothing_runs")
def test_a_broken_body_is_refused(gateway: Http, row: Row) -> None:
    check(gateway, row)


@_rows(FEATURES)
@pytest.mark.usefixtures("nothing_runs")
def test_what_is_not_offered_is_refused_clearly(gateway: Http, row: Row) -> None:
    check(gateway, row)


@_rows(MODELS)
@pytest.mark.usefixtures("nothing_runs")
def test_an_unknown_model_is_not_found(gateway: Http, row: Row) -> None:
    check(gateway, row)


# Bodies without end, and those that end too soon


@pytest.mark.usefixtures("nothing_runs")
def test_chunks_that_are_none_are_refused(gateway: Http) -> None:
    for path in (IDENTITY, "/v1/jobs"):
        headers = {"Transfer_Encoding": "chunked", "Content_Type": "application/json"}
        with begun(gateway, path, **headers) as connection:
            pour(connection, b"five\r\n12345\r\n", 1)
            reply = receive(connection)
        assert (reply.status, reply.headers["Connection"]) == (400, "close"), reply


@pytest.mark.usefixtures("nothing_runs")
def test_a_body_that_does_not_come_is_waited_for_until_the_deadline(gateway: Http) -> None:
    headers = {"Content_Length": "1000", "Tidegate_Deadline": "0.3"}
    with begun(gateway, IDENTITY, **headers) as connection:
        pour(connection, b"{", 1)
        reply = receive(connection)
    assert (reply.status, reply.headers["Connection"]) == (400, "close")
    assert "in time" in refusal(reply)


@pytest.mark.usefixtures("nothing_runs")
def test_a_client_that_goes_away_in_the_middle_is_no_mistake_of_ours(
    stack: Stack, gateway: Http
) -> None:
    log = stack.log("gateway")
    before = log.stat().st_size
    for path, more in (
        (IDENTITY, {}),
        (IDENTITY, {"Prefer": "respond-async"}),
        ("/v1/jobs", {"Content_Type": "application/json"}),
    ):
        with begun(gateway, path, Content_Length="100000", X_Request_ID="gone", **more) as one:
            pour(one, bytes(1000), 1)
            # Closed without a word, it is reset.
            one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Nobody waits for it, but those who come later are served later.
    for _ in range(20):
        assert gateway.post(IDENTITY, [1]).status == 400
    assert b"Traceback" not in log.read_bytes()[before:]
    assert b"request.failed" not in log.read_bytes()[before:]


@pytest.mark.usefixtures("nothing_runs")
def test_a_body_that_inflates_beyond_the_limit_is_refused(gateway: Http) -> None:
    bomb = gzip.compress(bytes(LIMIT + 1))
    assert len(bomb) < MIB
    check(gateway, Row(413, (str(LIMIT),), bomb, headers={"Content-Encoding": "gzip"}))


@contextmanager
def begun(server: Http, path: str, **headers: str) -> Iterator[http.client.HTTPConnection]:
    """A POST of which the headers are sent."""
    with closing(server.connect(timeout=20)) as connection:
        connection.putrequest("POST", path)
        for name, value in {**server.headers, **headers}.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        yield connection


def pour(connection: http.client.HTTPConnection, block: bytes, times: int) -> None:
    try:
        for _ in range(times):
            connection.send(block)
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before the end


@pytest.mark.usefixtures("nothing_runs")
def test_a_body_over_the_limit_is_refused_before_it_is_sent(gateway: Http) -> None:
    with begun(gateway, IDENTITY, Content_Length=str(LIMIT + 1)) as connection:
        reply = receive(connection)

    assert reply.status == 413
    assert reply.headers["Connection"] == "close"
    assert refusal(reply)


@pytest.mark.usefixtures("nothing_runs")
def test_a_large_body_that_nobody_read_ends_its_connection_and_the_answer_says_so(
    gateway: Http,
) -> None:
    anybody = Http(gateway.url)
    for size, ends in ((MIB, "close"), (1000, "keep-alive")):
        with begun(anybody, IDENTITY, Content_Length=str(size)) as connection:
            pour(connection, bytes(size), 1)
            reply = receive(connection)
        assert (reply.status, reply.headers["Connection"]) == (401, ends)


@pytest.mark.usefixtures("nothing_runs")
def test_a_body_over_the_limit_is_refused_where_no_length_was_given(gateway: Http) -> None:
    block = b"%x\r\n%s\r\n" % (MIB, bytes(MIB))
    with begun(gateway, IDENTITY, Transfer_Encoding="chunked") as connection:
        pour(connection, block, LIMIT // MIB + 1)
        pour(connection, b"0\r\n\r\n", 1)
        reply = receive(connection)

    assert reply.status == 413
    assert refusal(reply)


def test_a_large_body_without_a_key_costs_the_gateway_next_to_nothing(
    stack: Stack, gateway: Http
) -> None:
    """While a gateway process reads what it will not use, it answers nobody else."""
    anybody = Http(gateway.url)
    top = psutil.Process(stack.pid("gateway"))
    family = [top, *top.children(recursive=True)]

    def spent() -> float:
        return sum(one.cpu_times().user + one.cpu_times().system for one in family)

    before = spent()
    with begun(anybody, "/v1/files", Content_Length=str(100 * MIB)) as connection:
        pour(connection, bytes(MIB), 100)
        try:
            assert receive(connection).status == 401
        except (ConnectionResetError, BrokenPipeError):
            pass  # refused, and hung up on
    assert anybody.get("/livez").status == 200

    # Seconds of CPU.
    assert spent() - before < 1
