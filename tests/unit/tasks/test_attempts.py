"""Durable work goes behind what somebody waits for, at the model as well."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from inference.metadata import ModelSpec
from inference.tensors import InferRequest
from tasks.attempts import behind


def services(levels: int) -> Any:
    spec = ModelSpec("m", "1", "python", (), (), priority_levels=levels)
    return SimpleNamespace(models=SimpleNamespace(spec=lambda model, version: spec))


@pytest.mark.parametrize(
    ("levels", "given", "sent"),
    [
        (3, {"key": "v"}, {"key": "v", "priority": 3}),
        (3, {"priority": 1}, {"priority": 1}),
        (0, {"key": "v"}, {"key": "v"}),
    ],
    ids=["the last level", "what the client said", "a queue without levels"],
)
def test_its_place_in_the_models_queue(
    levels: int, given: dict[str, Any], sent: dict[str, Any]
) -> None:
    request = InferRequest("m", "", (), (), given)
    assert behind(services(levels), request).parameters == sent
    assert request.parameters == given
