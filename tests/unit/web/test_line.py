"""Which requests stand in line, and what those are told for whom it is too long."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from errors import Overloaded
from web import gate
from web.line import HOLD, Line

PATH = "/v2/models/m/infer"


class Lane:
    """Refuses as many as it is told to; notes what it was asked."""

    def __init__(self) -> None:
        self.refusals = SimpleNamespace(wait=lambda most: self.did.append(f"paced {most:g}"))
        self.gate = self
        self.refused_at: str | None = None
        self.did: list[str] = []

    def admit(self, name: object, timeout: float, *, last: bool = False) -> None:
        self.did.append("first look" if last else "second look")
        if self.did[-1] == self.refused_at:
            raise Overloaded("too many", retry_after=7)

    def wait(self, name: object, timeout: float) -> Lane:
        self.did.append(f"held for {timeout:g} at most")
        return self

    def leave(self) -> None:
        self.did.append("left")


class App:
    def __init__(self, cached: bool = False) -> None:
        self.lane = Lane()
        self.refused: list[str] = []
        self.asked: list[tuple[str, str]] = []
        self.extensions = {
            "tidegate": SimpleNamespace(
                lane=self.lane,
                keys=SimpleNamespace(fresh={"known": "tenant"}.get),
                metrics=SimpleNamespace(refused=self.refused.append),
                catalog=SimpleNamespace(is_cached=self._is_cached),
                services=SimpleNamespace(
                    settings=SimpleNamespace(realtime_timeout=30.0, max_realtime_timeout=300.0)
                ),
            )
        }
        self._cached = cached

    def _is_cached(self, model: str, version: str) -> bool:
        self.asked.append((model, version))
        return self._cached


def request(method: str = "POST", path: str = PATH, **headers: str) -> Any:
    headers = {"authorization": "Bearer known", **headers}
    named = [(name.upper().replace("_", "-"), value) for name, value in headers.items()]
    return SimpleNamespace(method=method, path=path, headers=named)


@pytest.mark.parametrize(
    "asked",
    [
        request(method="GET"),
        request(path="/v1/jobs"),
        request(path="/v2/models/m"),
        request(path="/v2/models/m/versions/x/infer"),
        request(path=f"/v2/models/m/versions/{1:019}/infer"),
        request(authorization="Bearer unknown"),
        request(authorization=""),
        request(prefer="respond-async"),
        request(tidegate_deadline="soon"),
    ],
    ids=[
        "not an infer",
        "a job",
        "metadata",
        "no version",
        "too long a version",
        "an unknown key",
        "no key",
        "for the durable lane",
        "a mistake",
    ],
)
def test_what_is_no_realtime_request_stands_in_no_line(asked: Any) -> None:
    assert Line.of(App(), asked) is None


def test_models_whose_answers_may_be_kept_have_no_line() -> None:
    assert Line.of(App(cached=True), request()) is None


def test_a_version_is_one_version_however_it_is_written() -> None:
    app = App()
    for path in (PATH, "/v2/models/m/versions/007/infer", "/v2/models/m/versions/0/infer"):
        assert Line.of(app, request(path=path))
    assert app.asked == [("m", ""), ("m", "7"), ("m", "0")]


def test_whose_turn_comes_goes_on() -> None:
    app = App()
    line = Line.of(app, request(tidegate_deadline="2.5"))
    assert line
    assert line.wait() is None
    line.leave()
    assert app.lane.did == ["first look", "held for 2.5 at most", "second look", "left"]


def test_the_path_is_read_as_the_application_reads_it() -> None:
    app = App()
    assert Line.of(app, request(path="/v2/m%6fdels/%6D/infer", authorization="", x_api_key="known"))
    assert app.asked == [("m", "")]


def test_whose_body_may_say_how_long_it_may_take_is_not_held_for_long() -> None:
    app = App()
    line = Line.of(app, request())
    assert line
    line.wait()
    assert f"held for {HOLD:g} at most" in app.lane.did


def test_the_place_is_known_to_whoever_works_on_the_request() -> None:
    app = App()
    line = Line.of(app, request())
    assert line
    line.wait()
    assert gate.place.get() is app.lane  # type: ignore[comparison-overlap]


@pytest.mark.parametrize("at", ["first look", "second look"])
def test_for_whom_it_is_too_long_hears_so_in_a_whole_answer(at: str) -> None:
    app = App()
    app.lane.refused_at = at
    line = Line.of(app, request(tidegate_deadline="30", x_request_id="mine"))
    assert line
    error = line.wait()
    assert error is not None
    answer = line.refusal(error, close=False)
    assert b"\r\nConnection: close\r\n" in line.refusal(error, close=True)
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 503 Service Unavailable"
    assert {
        "Retry-After: 7",
        f"Content-Length: {len(body)}",
        "X-Request-ID: mine",
        "X-Content-Type-Options: nosniff",
    } <= set(lines)
    assert "Connection" not in head.decode()
    assert json.loads(body) == {"error": "too many"}
    assert app.refused == ["m"]
    # Those behind it are let in before it is told.
    assert app.lane.did[-2:] == (["left", "paced 30"] if at == "second look" else [at, "paced 30"])
