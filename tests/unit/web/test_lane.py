"""A request that is under way no longer takes the place of one that is on its way there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from errors import DeadlineExceeded
from inference.tensors import InferRequest
from web import gate
from web.lane import RealtimeLane


def test_a_request_that_is_under_way_leaves_its_place_to_others() -> None:
    state: Any = SimpleNamespace()
    lane = RealtimeLane(state, group="g", window=1, max_items=1)
    name, submitted = ("m", ""), list[object]()
    there: Any = SimpleNamespace(require=lambda timeout: None)
    slow: Any = SimpleNamespace(depth=0, admit=lambda timeout: None, submit=submitted.append)
    lane._presence, lane._coalescers[name] = there, slow
    place = lane.gate.wait(name, 1)
    gate.place.set(place)
    assert lane.gate._coming[name] == 1
    with pytest.raises(DeadlineExceeded):
        lane.infer(InferRequest("m", "", (), (), {}, ""), 0.01)
    assert len(submitted) == 1
    assert not lane.gate._coming
    gate.place.set(None)
