"""A stream says what is new, and ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import pytest

from errors import NotFound, Unavailable
from web import streams
from web.streams import Streams, stream


class Script:
    """A job that is as the script says, look by look; the last line holds."""

    def __init__(self, *lines: Any):
        self._lines = list(lines)
        self.waits: list[float] = []
        self.released = False
        self.left = False

    def look(self) -> dict[str, Any]:
        line = self._lines.pop(0) if len(self._lines) > 1 else self._lines[0]
        if isinstance(line, Exception):
            raise line
        return {"status": line} if isinstance(line, str) else line

    # What `stream` needs of a waiter and its watch.

    @contextmanager
    def watch(self, _: object) -> Iterator[Script]:
        try:
            yield self
        finally:
            self.left = True

    def wait(self, timeout: float) -> None:
        self.waits.append(timeout)


def said(script: Script, seen: str = "") -> list[dict[str, str]]:
    """The fields of each event; comments have the name ""."""
    text = b"".join(stream(script, uuid4(), script.look, seen)).decode()  # type: ignore[arg-type]
    assert text.endswith("\n\n")
    return [
        dict(line.split(": ", 1) for line in block.split("\n"))
        for block in text.removesuffix("\n\n").split("\n\n")
    ]


def statuses(found: list[dict[str, str]]) -> list[str]:
    return [json.loads(one["data"])["status"] for one in found if one.get("event") == "status"]


def test_each_change_is_said_once_and_the_end_last() -> None:
    script = Script("queued", "queued", "running", "running", "succeeded")
    found = said(script)

    assert found[0] == {"retry": "2000"}
    assert statuses(found) == ["queued", "running", "succeeded"]
    assert found[-1] == {"event": "end", "data": "{}"}
    assert len({one["id"] for one in found if one.get("event") == "status"}) == 3
    assert script.left


def test_who_comes_back_hears_only_what_is_new() -> None:
    ids = {
        json.loads(one["data"])["status"]: one["id"]
        for one in said(Script("queued", "running", "succeeded"))
        if "id" in one
    }

    assert statuses(said(Script("running", "succeeded"), ids["running"])) == ["succeeded"]
    assert statuses(said(Script("running", "succeeded"), ids["queued"])) == ["running", "succeeded"]
    again = said(Script("succeeded"), ids["succeeded"])
    assert again == [{"retry": "2000"}, {"event": "end", "data": "{}"}]
    assert statuses(said(Script("succeeded"), "anything else")) == ["succeeded"]


def test_while_the_ledger_is_away_the_stream_waits() -> None:
    script = Script("running", Unavailable("away"), Unavailable("away"), "succeeded")

    assert statuses(said(script)) == ["running", "succeeded"]
    assert script.waits[1:] == [streams.AGAIN, streams.AGAIN]


def test_a_job_that_retention_takes_ends_its_stream() -> None:
    found = said(Script("running", NotFound("gone")))

    assert statuses(found) == ["running"]
    assert "end" not in {one.get("event") for one in found}


def test_a_process_that_is_about_to_end_ends_its_streams() -> None:
    script = Script("running")
    script.released = True

    assert statuses(said(script)) == ["running"]


def test_a_silent_stream_says_now_and_then_that_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "PING", 0.0)
    found = said(Script("running", "running", "running", "succeeded"))

    assert sum("" in one for one in found) == 3


def test_a_stream_ends_after_a_while_for_its_client_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "LONGEST", 0.0)

    assert statuses(said(Script("running"))) == ["running"]


def test_places_are_counted_in_all_and_by_tenant() -> None:
    places = Streams(most=3, most_each=2)
    one, other = uuid4(), uuid4()
    leave = [places.enter(one), places.enter(one)]
    with pytest.raises(Unavailable) as caught:
        places.enter(one)
    assert caught.value.retry_after
    places.enter(other)
    with pytest.raises(Unavailable):
        places.enter(other)

    leave[0]()
    leave[0]()
    places.enter(other)
    with pytest.raises(Unavailable):
        places.enter(one)
