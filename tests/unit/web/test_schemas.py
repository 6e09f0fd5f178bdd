"""Bodies of fields: what is wrong in a large one is said without looking at all of it."""

from __future__ import annotations

from typing import Any

import pytest
from marshmallow import Schema, ValidationError

from storage import events
from web import schemas

MANY = 100_000
JOB = {"model": "m", "input": {}}
BATCH = {"input_file_id": "f", "endpoint": "e", "completion_window": "1h"}
WEBHOOK = {"name": "n", "url": "u"}


def wrong(schema: Schema, body: dict[str, Any]) -> Any:
    with pytest.raises(ValidationError) as caught:
        schema.load(body)
    return caught.value.messages


@pytest.mark.parametrize(
    ("schema", "body"),
    [(schemas.JobSubmit(), JOB), (schemas.BatchCreate(), BATCH)],
)
def test_pairs_are_counted_before_they_are_looked_at(schema: Schema, body: dict[str, Any]) -> None:
    metadata = {f"key {n}": n for n in range(MANY)}
    assert wrong(schema, body | {"metadata": metadata}) == {
        "metadata": ["Longer than maximum length 16."]
    }


@pytest.mark.parametrize("schema", [schemas.WebhookCreate(), schemas.WebhookUpdate()])
def test_elements_are_counted_before_they_are_looked_at(schema: Schema) -> None:
    for kind in ("nothing of ours", events.TYPES[0]):
        assert wrong(schema, WEBHOOK | {"event_types": [kind] * MANY}) == {
            "event_types": ["Length must be between 1 and 64."]
        }


@pytest.mark.parametrize("schema", schemas.Body.__subclasses__())
def test_names_are_counted_before_they_are_looked_at(schema: type[schemas.Body]) -> None:
    body = {f"field {n}": 1 for n in range(MANY)}
    assert wrong(schema(), body) == {"_schema": ["Has more than 64 names."]}


def test_so_are_the_names_of_what_is_inside() -> None:
    body = {"filter": {f"field {n}": 1 for n in range(MANY)}}
    assert wrong(schemas.RedriveMany(), body) == {
        "filter": {"_schema": ["Has more than 64 names."]}
    }


def test_tensors_are_not_looked_at_here() -> None:
    tensors = {f"name {n}": n for n in range(MANY)}
    assert schemas.JobSubmit().load(JOB | {"input": tensors})["input"] == tensors


@pytest.mark.parametrize("name", ["job_id", "model", "code"])
def test_no_filter_holds_a_nul(name: str) -> None:
    assert wrong(schemas.Letters(), {name: "\0"}) == {name: ["Must not hold a NUL character."]}
