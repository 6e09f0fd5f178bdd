"""An unmodified `openai` SDK uploads files, runs batches over them, and reads what came of them."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import Batch, FileObject

from config import MIB
from tests.e2e.helpers import DIGITS, IDENTITY, Http, batch_line, ints, receive, tensor, until

pytestmark = pytest.mark.stack

ENDED = ("completed", "failed", "expired", "cancelled")
CHUNK = 8192
"""Lines of one chunk (TIDEGATE_CHUNK_ITEMS)."""


def sdk(server: Http) -> openai.OpenAI:
    key = server.headers["Authorization"].removeprefix("Bearer ")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


@pytest.fixture(scope="module")
def client(mine: Http) -> Iterator[openai.OpenAI]:
    with sdk(mine) as made:
        yield made


@pytest.fixture
def fresh(new_tenant: Any) -> Iterator[openai.OpenAI]:
    """A client for a tenant that has nothing yet."""
    with sdk(new_tenant()) as made:
        yield made


def upload(client: openai.OpenAI, *lines: str) -> FileObject:
    return client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")


def start(client: openai.OpenAI, file_id: str, endpoint: str = IDENTITY, **fields: Any) -> Batch:
    return client.batches.create(
        input_file_id=file_id,
        endpoint=endpoint,  # type: ignore[arg-type]
        completion_window="24h",
        **fields,
    )


def finished(client: openai.OpenAI, batch: Batch, seconds: float = 30) -> Batch:
    return until(
        lambda: client.batches.retrieve(batch.id), seconds, lambda found: found.status in ENDED
    )


def counts(batch: Batch) -> tuple[int, int, int]:
    """Lines in all, answered, failed."""
    assert batch.request_counts is not None
    found = batch.request_counts
    return found.total, found.completed, found.failed


def lines_of(client: openai.OpenAI, file_id: str | None) -> list[dict[str, Any]]:
    assert file_id is not None
    return [json.loads(text) for text in client.files.content(file_id).text.splitlines()]


# Files


def test_a_file_is_kept_shown_returned_and_deleted(fresh: openai.OpenAI) -> None:
    data = b'{"any": "bytes"}\r\n\n\xff\0' * 1000
    made = fresh.files.create(file=("mine.jsonl", data), purpose="batch")

    assert (made.object, made.purpose, made.status) == ("file", "batch", "processed")
    assert (made.filename, made.bytes) == ("mine.jsonl", len(data))
    assert fresh.files.retrieve(made.id) == made
    assert list(fresh.files.list()) == [made]
    assert fresh.files.content(made.id).read() == data

    deleted = fresh.files.delete(made.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "file")
    assert list(fresh.files.list()) == []
    for call in (fresh.files.retrieve, fresh.files.content, fresh.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(made.id)


def test_a_file_can_be_given_an_end(fresh: openai.OpenAI) -> None:
    made = fresh.files.create(
        file=("mine.jsonl", b"{}"),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )

    assert made.expires_at is not None
    assert abs(made.expires_at - made.created_at - 3600) <= 2


def test_lists_of_files_are_paged_both_ways(fresh: openai.OpenAI) -> None:
    made = [upload(fresh, str(n)).id for n in range(5)]

    assert [file.id for file in fresh.files.list(limit=2)] == made[::-1]
    assert [file.id for file in fresh.files.list(limit=2, order="asc")] == made
    assert [file.id for file in fresh.files.list(limit=5)] == made[::-1]
    assert list(fresh.files.list(purpose="batch_output")) == []


def test_a_file_for_another_purpose_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("in.jsonl", b"{}"), purpose="assistants")

    assert caught.value.param == "purpose"


def test_a_file_over_the_limit_is_refused_before_it_is_sent(mine: Http) -> None:
    with closing(mine.connect(timeout=20)) as connection:
        connection.putrequest("POST", "/v1/files")
        connection.putheader("Authorization", mine.headers["Authorization"])
        connection.putheader("Content-Type", "multipart/form-data; boundary=x")
        connection.putheader("Content-Length", str((8 << 30) + MIB))
        connection.endheaders()
        reply = receive(connection)

    assert reply.status == 413
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_a_large_upload_leaves_others_their_answers(client: openai.OpenAI, mine: Http) -> None:
    data = (b"x" * 99 + b"\n") * MIB
    uploads: list[FileObject] = []
    thread = Thread(
        target=lambda: uploads.append(client.files.create(file=("in", data), purpose="batch"))
    )
    thread.start()
    answered = 0
    while thread.is_alive():
        assert mine.get("/livez").status == 200
        answered += 1
    thread.join()

    assert uploads[0].bytes == len(data)
    assert answered >= 20


# Batches that run


def images(root: Path, count: int) -> Any:
    """The first handwritten digits of the data set the model was made from."""
    with gzip.open(root / "ops/digits/digits.csv.gz", "rt") as file:
        rows = [row[:64] for row, _ in zip(csv.reader(file), range(count), strict=False)]
    return np.array(rows, dtype=np.float32)


def test_every_line_is_answered_once_as_the_model_answers_it(
    client: openai.OpenAI, triton: Http, root: Path
) -> None:
    pixels = images(root, 600)
    file = upload(
        client,
        *(
            batch_line(f"digit {n}", {"inputs": [tensor("image", "FP32", row.tolist())]}, DIGITS)
            for n, row in enumerate(pixels)
        ),
    )
    batch = start(client, file.id, DIGITS, metadata={"team": "tide"})
    assert (batch.object, batch.endpoint, batch.input_file_id) == ("batch", DIGITS, file.id)
    assert (batch.completion_window, batch.metadata) == ("24h", {"team": "tide"})
    assert batch.expires_at is not None
    assert abs(batch.expires_at - batch.created_at - 86_400) <= 1

    seen = [batch]

    def look() -> Batch:
        seen.append(client.batches.retrieve(batch.id))
        return seen[-1]

    done = until(look, 60, lambda found: found.status in ENDED)
    assert done.status == "completed"
    assert counts(done) == (600, 600, 0)
    assert done.error_file_id is None
    moments = (done.created_at, done.in_progress_at, done.finalizing_at, done.completed_at)
    assert list(moments) == sorted(moments)  # type: ignore[type-var]
    # While it ran, nothing ever went back.
    statuses = ["validating", "in_progress", "finalizing", "completed"]
    places = [statuses.index(one.status) for one in seen]
    assert places == sorted(places)
    for number in range(3):
        progress = [counts(one)[number] for one in seen]
        assert progress == sorted(progress)

    answers = {}
    for answer in lines_of(client, done.output_file_id):
        assert answer["custom_id"] not in answers
        assert (answer["response"]["status_code"], answer["error"]) == (200, None)
        answers[answer["custom_id"]] = answer["response"]["body"]
    assert answers.keys() == {f"digit {n}" for n in range(600)}
    for start_at in range(0, 600, 200):
        rows = pixels[start_at : start_at + 200]
        request = {"inputs": [tensor("image", "FP32", rows.ravel().tolist(), [200, 64])]}
        labels, odds = (output["data"] for output in triton.post(DIGITS, request).json()["outputs"])
        for at, label in enumerate(labels):
            ours = {
                output["name"]: output["data"]
                for output in answers[f"digit {start_at + at}"]["outputs"]
            }
            assert ours["label"] == [label]
            assert np.allclose(ours["probabilities"], odds[at * 10 : at * 10 + 10], atol=1e-6)


def test_lines_that_are_wrong_are_named_in_the_error_file(client: openai.OpenAI) -> None:
    wrong_tensor = {"inputs": [tensor("INTS", "INT64", [1, 2], [1, 1])]}
    given = {
        1: batch_line("good", ints(1)),
        2: "garbage",
        3: '["no", "object"]',
        4: batch_line("elsewhere", ints(1), url="/v2/models/digits/infer"),
        5: batch_line("other method", ints(1), method="GET"),
        6: batch_line(None, ints(1)),
        7: batch_line("", ints(1)),
        8: batch_line("good", ints(2)),
        9: batch_line("wrong tensor", wrong_tensor),
        10: batch_line("unknown tensor", {"inputs": [tensor("OTHER", "INT64", [1])]}),
        11: batch_line("no body", None),
        12: "",
        13: batch_line("unlucky", ints(1, fail="out of luck")),
        14: batch_line("also good", ints(14)),
    }
    done = finished(client, start(client, upload(client, *given.values()).id))
    outputs, errors = (lines_of(client, file) for file in (done.output_file_id, done.error_file_id))

    assert done.status == "completed"
    # The empty line counts as none.
    assert counts(done) == (13, 2, 11)
    assert {one["custom_id"]: one["response"]["body"]["outputs"][0]["data"] for one in outputs} == {
        "good": [1],
        "also good": [14],
    }

    refused = {one["error"]["line"]: one for one in errors if one["error"]}
    assert {
        number: (one["custom_id"], one["error"]["code"], one["response"])
        for number, one in refused.items()
    } == {
        2: (None, "invalid_json", None),
        3: (None, "invalid_json", None),
        4: ("elsewhere", "invalid_url", None),
        5: ("other method", "invalid_method", None),
        6: (None, "invalid_custom_id", None),
        7: (None, "invalid_custom_id", None),
        8: ("good", "duplicate_custom_id", None),
        9: ("wrong tensor", "bad_tensor", None),
        10: ("unknown tensor", "bad_tensor", None),
        11: ("no body", "bad_body", None),
    }
    assert "'INTS'" in refused[9]["error"]["message"]
    assert "'OTHER'" in refused[10]["error"]["message"]

    (failed,) = (one for one in errors if one["response"])
    assert (failed["custom_id"], failed["error"]) == ("unlucky", None)
    assert failed["response"]["status_code"] == 500
    assert failed["response"]["body"] == {"error": "out of luck"}
    # Where a line has an answer, its number is in its id, as in everybody's.
    assert failed["id"].endswith("_13")
    assert all(one["id"].endswith(f"_{number}") for number, one in refused.items())


def test_a_batch_of_which_nothing_is_good_completes_with_errors_only(
    client: openai.OpenAI,
) -> None:
    file = upload(client, *(batch_line(f"{n}", ints(n, fail="x")) for n in range(3)))
    done = finished(client, start(client, file.id))

    assert (done.status, done.output_file_id) == ("completed", None)
    assert counts(done) == (3, 0, 3)
    assert len(lines_of(client, done.error_file_id)) == 3


def test_a_batch_of_one_version_runs_it(client: openai.OpenAI) -> None:
    endpoint = "/v2/models/identity/versions/1/infer"
    file = upload(client, batch_line("one", ints(1), url=endpoint))
    done = finished(client, start(client, file.id, endpoint))

    assert counts(done) == (1, 1, 0)
    (answer,) = lines_of(client, done.output_file_id)
    assert answer["response"]["body"]["model_version"] == "1"


def test_the_files_of_a_batch_are_listed_as_its_output(fresh: openai.OpenAI) -> None:
    file = upload(fresh, batch_line("good", ints(1)), batch_line("bad", ints(1, fail="x")))
    done = finished(fresh, start(fresh, file.id))
    produced = list(fresh.files.list(purpose="batch_output"))

    assert {one.id for one in produced} == {done.output_file_id, done.error_file_id}
    for one in produced:
        assert one.bytes == len(fresh.files.content(one.id).read())


def test_a_batch_is_a_job_too(client: openai.OpenAI, mine: Http) -> None:
    done = finished(client, start(client, upload(client, batch_line("one", ints(1))).id))
    jobs = mine.get("/v1/jobs?kind=batch&limit=100").json()["data"]
    (job,) = (one for one in jobs if one["urls"]["batch"] == f"/v1/batches/{done.id}")

    assert job["status"] == "succeeded"
    assert job["items"] == {"total": 1, "completed": 1, "failed": 0}
    assert mine.get(job["urls"]["result"]).status == 409


def test_a_batch_goes_on_where_its_file_is_deleted(client: openai.OpenAI) -> None:
    file = upload(client, *(batch_line(f"{n}", ints(n, delay_ms=300)) for n in range(3)))
    batch = start(client, file.id)
    client.files.delete(file.id)
    done = finished(client, batch)

    assert (done.status, counts(done)) == ("completed", (3, 3, 0))


# Batches that cannot run


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"", "empty_file", None),
        (b"\n \r\n\n", "empty_file", None),
        (b"\x89PNG\r\n\x1a\n\0\xff" * 100, "invalid_json", 1),
        (b"hello\nworld\n", "invalid_json", 1),
        (b"\n[1]\n", "invalid_json", 2),
    ],
    ids=["empty", "blank", "binary", "text", "no objects"],
)
def test_a_file_that_is_no_batch_fails_it_with_the_reason(
    client: openai.OpenAI, data: bytes, code: str, number: int | None
) -> None:
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    done = finished(client, start(client, file.id))

    assert done.status == "failed"
    assert done.failed_at is not None
    assert done.errors is not None
    assert done.errors.data is not None
    (error,) = done.errors.data
    assert (error.code, error.line) == (code, number)
    assert error.message
    assert (done.output_file_id, done.error_file_id) == (None, None)


def test_a_batch_over_an_unknown_file_is_refused(client: openai.OpenAI) -> None:
    for file_id in ("nothing", "file-00", f"file-{'0' * 32}"):
        with pytest.raises(openai.NotFoundError) as caught:
            start(client, file_id)
        assert caught.value.param == "input_file_id"


def test_a_batch_over_a_file_of_another_purpose_is_refused(client: openai.OpenAI) -> None:
    done = finished(client, start(client, upload(client, batch_line("one", ints(1))).id))
    assert done.output_file_id is not None
    with pytest.raises(openai.BadRequestError) as caught:
        start(client, done.output_file_id)

    assert caught.value.param == "input_file_id"


@pytest.mark.parametrize(
    "endpoint", ["/v1/chat/completions", "/v2/models//infer", "/v2/models/identity", ""]
)
def test_a_batch_to_another_endpoint_is_refused(client: openai.OpenAI, endpoint: str) -> None:
    file = upload(client, batch_line("one", ints(1)))
    with pytest.raises(openai.BadRequestError) as caught:
        start(client, file.id, endpoint)

    assert caught.value.param == "endpoint"


def test_a_batch_for_an_unknown_model_is_refused(client: openai.OpenAI) -> None:
    file = upload(client, batch_line("one", ints(1)))
    with pytest.raises(openai.NotFoundError) as caught:
        start(client, file.id, "/v2/models/nobody/infer")

    assert "nobody" in caught.value.message
    assert caught.value.param == "endpoint"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("completion_window", "soon"),
        ("completion_window", "0h"),
        ("completion_window", "31d"),
        ("metadata", {"n": 1}),
        ("priority", "urgent"),
    ],
)
def test_a_batch_asked_for_in_the_wrong_words_is_refused(
    client: openai.OpenAI, field: str, value: object
) -> None:
    file = upload(client, batch_line("one", ints(1)))
    asked: dict[str, Any] = {"input_file_id": file.id, "endpoint": IDENTITY}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**asked, completion_window="24h", extra_body={field: value})

    assert (caught.value.param or "").startswith(field)


@pytest.mark.parametrize("name", ["nothing", "batch_00", f"batch_{'0' * 32}"])
def test_a_batch_nobody_made_is_not_found(client: openai.OpenAI, name: str) -> None:
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(name)


# Calling off


def test_a_batch_called_off_keeps_what_was_answered(client: openai.OpenAI) -> None:
    quick = [batch_line(f"quick {n}", ints(n)) for n in range(CHUNK)]
    slow = [batch_line(f"slow {n}", ints(n, delay_ms=2000)) for n in range(8)]
    batch = start(client, upload(client, *quick, *slow).id)
    until(lambda: counts(client.batches.retrieve(batch.id))[1] == CHUNK, 20)

    called_off = client.batches.cancel(batch.id)
    assert called_off.status in ("cancelling", "cancelled")
    assert called_off.cancelling_at is not None
    done = finished(client, batch)
    assert done.status == "cancelled"
    assert done.cancelled_at is not None
    assert done.cancelled_at >= called_off.cancelling_at
    assert counts(done) == (CHUNK + 8, CHUNK, 8)

    outputs, errors = (lines_of(client, file) for file in (done.output_file_id, done.error_file_id))
    assert {one["custom_id"] for one in outputs} == {f"quick {n}" for n in range(CHUNK)}
    assert len(outputs) == CHUNK
    assert {(one["custom_id"], one["error"]["code"], one["error"]["line"]) for one in errors} == {
        (f"slow {n}", "batch_cancelled", CHUNK + 1 + n) for n in range(8)
    }
    assert client.batches.cancel(batch.id) == done


def test_a_batch_that_has_ended_cannot_be_called_off(client: openai.OpenAI) -> None:
    done = finished(client, start(client, upload(client, batch_line("one", ints(1))).id))
    with pytest.raises(openai.ConflictError, match="completed"):
        client.batches.cancel(done.id)

    assert client.batches.retrieve(done.id) == done


def test_a_batch_whose_window_ends_expires_and_keeps_what_was_answered(
    client: openai.OpenAI,
) -> None:
    quick = [batch_line(f"quick {n}", ints(n)) for n in range(CHUNK)]
    slow = batch_line("slow", ints(0, delay_ms=20_000))
    file = upload(client, *quick, slow)
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint=IDENTITY,  # type: ignore[arg-type]
        completion_window="3s",  # type: ignore[arg-type]
    )
    done = finished(client, batch)

    assert done.status == "expired"
    assert done.expired_at is not None
    assert counts(done) == (CHUNK + 1, CHUNK, 1)
    (error,) = lines_of(client, done.error_file_id)
    assert (error["custom_id"], error["error"]["code"]) == ("slow", "batch_expired")


# Lists, and somebody else's


def test_lists_of_batches_are_paged(fresh: openai.OpenAI) -> None:
    file = upload(fresh, batch_line("one", ints(1)))
    made = [start(fresh, file.id).id for _ in range(5)]

    assert [batch.id for batch in fresh.batches.list(limit=2)] == made[::-1]
    first = fresh.batches.list(limit=2)
    assert (first.has_more, [batch.id for batch in first.data]) == (True, made[:2:-1])
    with pytest.raises(openai.BadRequestError) as caught:
        fresh.batches.list(limit=101)
    assert caught.value.param == "limit"


def test_another_tenant_finds_nothing(client: openai.OpenAI, stranger: Http) -> None:
    file = upload(client, batch_line("one", ints(1)))
    done = finished(client, start(client, file.id))
    assert done.output_file_id is not None
    with sdk(stranger) as other:
        assert list(other.files.list()) == []
        assert list(other.batches.list()) == []
        for name in (file.id, done.output_file_id):
            for call in (other.files.retrieve, other.files.content, other.files.delete):
                with pytest.raises(openai.NotFoundError):
                    call(name)
        for of_batch in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                of_batch(done.id)
        with pytest.raises(openai.NotFoundError):
            start(other, file.id)
    assert client.files.content(file.id).read()


def test_a_key_nobody_gave_opens_nothing(gateway: Http) -> None:
    with (
        sdk(Http.keyed(gateway.url, "tg_live_00000000_" + "0" * 43)) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.batches.list()
