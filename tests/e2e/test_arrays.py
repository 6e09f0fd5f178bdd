"""An unmodified `openai` SDK runs batches over `.npy` and Parquet files, on real models."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as triton_grpc
from openai.types import Batch

from ops.embedded import Stack
from tests.e2e.helpers import DIGITS, IDENTITY, Http, batch_line, ints, until

pytestmark = pytest.mark.stack

ENDED = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(scope="module")
def client(mine: Http) -> Iterator[openai.OpenAI]:
    key = mine.headers["Authorization"].removeprefix("Bearer ")
    with openai.OpenAI(base_url=f"{mine.url}/v1", api_key=key, max_retries=0) as made:
        yield made


def saved(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def written(columns: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file, **options)
    return file.getvalue()


def start(
    client: openai.OpenAI, name: str, data: bytes, endpoint: str = IDENTITY, **fields: Any
) -> Batch:
    file = client.files.create(file=(name, data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        extra_body=fields,
    )


def finished(client: openai.OpenAI, batch: Batch, seconds: float = 60) -> Batch:
    return until(
        lambda: client.batches.retrieve(batch.id), seconds, lambda found: found.status in ENDED
    )


def run(client: openai.OpenAI, name: str, data: bytes, endpoint: str, **fields: Any) -> Batch:
    batch = finished(client, start(client, name, data, endpoint, **fields))
    assert batch.status == "completed", batch
    return batch


def output(client: openai.OpenAI, batch: Batch) -> bytes:
    assert batch.output_file_id is not None
    return client.files.content(batch.output_file_id).read()


def array(client: openai.OpenAI, batch: Batch) -> Any:
    return np.load(io.BytesIO(output(client, batch)), allow_pickle=False)


def table(client: openai.OpenAI, batch: Batch) -> pa.Table:
    return pq.read_table(io.BytesIO(output(client, batch)))


def errors(client: openai.OpenAI, batch: Batch) -> list[Any]:
    assert batch.error_file_id is not None
    text = client.files.content(batch.error_file_id).text
    return [json.loads(line)["error"] for line in text.splitlines()]


def counts(batch: Batch) -> tuple[int, int, int]:
    assert batch.request_counts is not None
    found = batch.request_counts
    return found.total, found.completed, found.failed


def by_hand(stack: Stack, images: Any) -> dict[str, Any]:
    """What `digits` says of them, asked with NVIDIA's client."""
    with triton_grpc.InferenceServerClient(stack.env["TIDEGATE_TRITON_URL"]) as direct:
        answers: dict[str, list[Any]] = {"label": [], "probabilities": []}
        for at in range(0, len(images), 256):
            given = triton_grpc.InferInput("image", images[at : at + 256].shape, "FP32")
            given.set_data_from_numpy(images[at : at + 256])
            result = direct.infer("digits", [given])
            for name, found in answers.items():
                found.append(result.as_numpy(name))
    return {name: np.concatenate(found) for name, found in answers.items()}


@pytest.fixture(scope="module")
def images() -> Any:
    return np.random.default_rng(7).integers(0, 17, (1000, 64)).astype("<f4")


def test_an_array_comes_back_as_the_model_answers_it_by_hand(
    client: openai.OpenAI, stack: Stack, images: Any
) -> None:
    expected = by_hand(stack, images)
    for name in ("label", "probabilities"):
        batch = run(client, "images.npy", saved(images), DIGITS, output_names=[name])
        assert counts(batch) == (1000, 1000, 0)
        assert batch.error_file_id is None
        found = array(client, batch)
        assert found.dtype == expected[name].dtype
        np.testing.assert_allclose(found, expected[name], rtol=1e-5)
    assert batch.output_file_id is not None
    file = client.files.retrieve(batch.output_file_id)
    assert file.filename.endswith("_output.npy")
    reply = client.files.with_raw_response.content(batch.output_file_id)
    assert reply.headers["Content-Disposition"].endswith('.npy"')
    assert reply.headers["Content-Type"] == "application/octet-stream"


def test_a_table_comes_back_as_a_table_with_its_names(
    client: openai.OpenAI, stack: Stack, images: Any
) -> None:
    expected = by_hand(stack, images)
    names = [f"image-{n}" for n in range(1000)]
    data = written(
        {"custom_id": names, "image": pa.FixedSizeListArray.from_arrays(images.ravel(), 64)},
        row_group_size=300,
    )
    batch = run(client, "images.parquet", data, DIGITS)
    assert counts(batch) == (1000, 1000, 0)
    found = table(client, batch)
    assert found["custom_id"].to_pylist() == names
    assert found["row"].to_pylist() == list(range(1000))
    assert found["label"].to_pylist() == expected["label"][:, 0].tolist()
    np.testing.assert_allclose(
        np.array(found["probabilities"].to_pylist()), expected["probabilities"], rtol=1e-5
    )
    assert batch.output_file_id is not None
    reply = client.files.with_raw_response.content(batch.output_file_id)
    assert reply.headers["Content-Disposition"].endswith('.parquet"')
    assert reply.headers["Content-Type"] == "application/vnd.apache.parquet"


def test_several_inputs_and_outputs_travel_as_columns(client: openai.OpenAI) -> None:
    texts = [f"text {n} é" for n in range(300)]
    data = written(
        {
            "TEXT": texts,
            "INTS": pa.array([[n, -n] for n in range(300)]),
            "FLOATS": pa.array([n / 2 for n in range(300)], pa.float32()),
        }
    )
    batch = run(client, "in.parquet", data, IDENTITY)
    assert counts(batch) == (300, 300, 0)
    found = table(client, batch)
    assert [text.decode() for (text,) in found["TEXT_OUT"].to_pylist()] == texts
    assert found["INTS_OUT"].to_pylist() == [[n, -n] for n in range(300)]
    assert found["FLOATS_OUT"].to_pylist() == [[n / 2] for n in range(300)]


def test_one_of_several_inputs_and_outputs_is_named(client: openai.OpenAI) -> None:
    x = np.arange(20_000, dtype="<i8").reshape(-1, 2)
    batch = run(client, "x.npy", saved(x), IDENTITY, input_name="INTS", output_names=["INTS_OUT"])
    assert (array(client, batch) == x).all()


def test_a_bad_row_leaves_its_neighbours_alone(client: openai.OpenAI) -> None:
    rows: list[Any] = [[n] for n in range(200)]
    rows[5], rows[190] = None, [1, None]
    batch = run(
        client, "in.parquet", written({"INTS": pa.array(rows, pa.list_(pa.int64()))}), IDENTITY
    )
    assert counts(batch) == (200, 198, 2)
    found = table(client, batch)["INTS_OUT"].to_pylist()
    assert found == [None if n in (5, 190) else [n] for n in range(200)]
    assert [(e["row"], e["rows"], e["code"]) for e in errors(client, batch)] == [
        (5, 1, "bad_tensor"),
        (190, 1, "bad_tensor"),
    ]


def test_ragged_rows_are_no_array_but_a_table_and_lines(client: openai.OpenAI) -> None:
    rows = [[0] * (1 + n % 3) for n in range(30)]
    data = written({"INTS": pa.array(rows)})
    named = {"output_names": ["INTS_OUT"]}
    batch = run(client, "in.parquet", data, IDENTITY, output_format="npy", **named)
    assert counts(batch) == (30, 10, 20)
    assert {error["code"] for error in errors(client, batch)} == {"unsupported"}
    assert "parquet or jsonl" in errors(client, batch)[0]["message"]
    batch = run(client, "in.parquet", data, IDENTITY, **named)
    assert table(client, batch)["INTS_OUT"].to_pylist() == rows
    batch = run(client, "in.parquet", data, IDENTITY, output_format="jsonl", **named)
    lines = [json.loads(line) for line in output(client, batch).splitlines()]
    assert [line["response"]["body"]["outputs"][0]["data"] for line in lines] == rows


def test_a_cancelled_batch_keeps_its_answers_at_their_rows(client: openai.OpenAI) -> None:
    x = np.arange(1, 1_000_001, dtype="<i8").reshape(-1, 1)
    batch = start(client, "x.npy", saved(x), input_name="INTS", output_names=["INTS_OUT"])
    until(
        lambda: client.batches.retrieve(batch.id),
        60,
        lambda found: found.request_counts is not None and found.request_counts.completed > 0,
    )
    client.batches.cancel(batch.id)
    batch = finished(client, batch)
    assert batch.status == "cancelled"
    total, completed, failed = counts(batch)
    assert (total, completed + failed) == (1_000_000, 1_000_000)
    assert 0 < completed < total
    found = array(client, batch)[:, 0]
    assert np.count_nonzero(found) == completed
    assert ((found == x[:, 0]) | (found == 0)).all()
    told = errors(client, batch)
    assert sum(error["rows"] for error in told) == failed
    for error in told[:20]:
        assert not found[error["row"] : error["row"] + error["rows"]].any()


@pytest.mark.parametrize(
    ("data", "endpoint", "code", "words"),
    [
        (saved(np.zeros((3, 64), "<f8")), DIGITS, "bad_tensor", "FP64"),
        (saved(np.zeros((3, 63), "<f4")), DIGITS, "bad_tensor", "[63]"),
        (saved(np.zeros((3, 64), ">f4")), DIGITS, "unsupported", "big endian"),
        (saved(np.zeros((3, 64), "<f4"))[:-1], DIGITS, "invalid_file", "bytes"),
        (b"PAR1 and no more", DIGITS, "invalid_file", "footer"),
        (written({"picture": [1.0]}), DIGITS, "bad_tensor", "'picture'"),
    ],
)
def test_a_file_that_is_no_good_fails_validation(
    client: openai.OpenAI, data: bytes, endpoint: str, code: str, words: str
) -> None:
    named = {"output_names": ["label"]}
    batch = finished(client, start(client, "in", data, endpoint, **named))
    assert batch.status == "failed"
    assert batch.errors is not None
    assert batch.errors.data is not None
    (error,) = batch.errors.data
    assert (error.code, error.param) == (code, "input_file_id")
    assert words in str(error.message)


ARRAY = saved(np.zeros((3, 1), "<i8"))
LINE = batch_line("a", ints(1)).encode()


@pytest.mark.parametrize(
    ("data", "endpoint", "fields", "param"),
    [
        (ARRAY, IDENTITY, {}, "input_name"),
        (ARRAY, IDENTITY, {"input_name": "INT"}, "input_name"),
        (ARRAY, IDENTITY, {"input_name": "INTS"}, "output_names"),
        (ARRAY, IDENTITY, {"input_name": "INTS", "output_names": ["X"]}, "output_names"),
        (ARRAY, IDENTITY, {"input_name": "INTS", "output_names": []}, "output_names"),
        (ARRAY, IDENTITY, {"input_name": "INTS", "output_names": ["TEXT_OUT"]}, "output_format"),
        (ARRAY, IDENTITY, {"input_name": 7}, "input_name"),
        (ARRAY, DIGITS, {}, "output_names"),
        (ARRAY, DIGITS, {"output_names": ["label", "label"]}, "output_names"),
        (ARRAY, DIGITS, {"output_format": "csv"}, "output_format"),
        (written({"a": [1]}), DIGITS, {"input_name": "image"}, "input_name"),
        (b"PK\3\4 an .npz", DIGITS, {}, "input_file_id"),
        (b"PARE encrypted", DIGITS, {}, "input_file_id"),
        (LINE, IDENTITY, {"output_format": "npy"}, "output_format"),
        (LINE, IDENTITY, {"input_name": "INTS"}, "input_name"),
        (LINE, IDENTITY, {"output_names": ["INTS_OUT"]}, "output_names"),
    ],
)
def test_what_cannot_be_asked_of_a_file_is_refused_by_the_fields_name(
    client: openai.OpenAI, data: bytes, endpoint: str, fields: dict[str, Any], param: str
) -> None:
    before = [batch.id for batch in client.batches.list(limit=5).data]
    with pytest.raises((openai.BadRequestError, openai.UnprocessableEntityError)) as caught:
        start(client, "in", data, endpoint, **fields)
    assert (caught.value.param or "").startswith(param)
    assert param in str(caught.value) or param == "input_file_id"
    assert [batch.id for batch in client.batches.list(limit=5).data] == before


def test_lines_may_ask_for_lines(client: openai.OpenAI) -> None:
    batch = run(client, "in.jsonl", LINE, IDENTITY, output_format="jsonl")
    assert counts(batch) == (1, 1, 0)
