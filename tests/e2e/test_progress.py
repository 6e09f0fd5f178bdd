"""How a job is doing: answers that need not be sent again, places in the queue, event streams."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from ops.embedded import Stack
from tests.e2e.helpers import (
    DIGITS,
    IDENTITY,
    Http,
    batch_line,
    ended,
    ints,
    tensor,
    together,
    until,
    upload,
)

pytestmark = pytest.mark.stack

SLOTS = 4
"""Hints about durable work that one GPU worker runs at a time (TIDEGATE_BATCH_SLOTS)."""
LONG = 60_000
"""Milliseconds that a job takes which is called off in the end."""


def submit(server: Http, delay_ms: int = 0, **fields: object) -> dict[str, Any]:
    asked = {"model": "identity", "input": ints(1, delay_ms=delay_ms)}
    reply = server.post("/v1/jobs", asked | fields)
    assert reply.status == 202, reply
    job: dict[str, Any] = reply.json()
    return job


def started(server: Http, delay_ms: int) -> dict[str, Any]:
    """A job that somebody runs."""
    job = submit(server, delay_ms)
    path = job["urls"]["self"]
    until(lambda: server.get(path).json()["status"], 20, lambda status: status == "running")
    return job


def start_batch(server: Http, *delays_ms: int) -> str:
    file = upload(
        server, *(batch_line(str(n), ints(n, delay_ms=ms)) for n, ms in enumerate(delays_ms))
    )
    asked = {"input_file_id": file["id"], "endpoint": IDENTITY, "completion_window": "1h"}
    made: str = server.post("/v1/batches", asked).json()["id"]
    return made


# Answers that need not be sent again


@pytest.fixture(scope="module")
def paths(mine: Http) -> dict[str, str]:
    """What can be looked at, all of it ended."""
    job = ended(mine, submit(mine)["id"])["urls"]["self"]
    batch = start_batch(mine, 0)
    until(lambda: mine.get(f"/v1/batches/{batch}").json()["status"] == "completed", 30)
    quick = mine.post(IDENTITY, ints(1)).headers["Tidegate-Job-Id"]
    return {"job": job, "batch": f"/v1/batches/{batch}", "record": f"/v1/jobs/{quick}"}


@pytest.mark.parametrize("what", ["job", "batch", "record"])
def test_what_a_client_has_is_not_sent_again(mine: Http, paths: dict[str, str], what: str) -> None:
    path = paths[what]
    first = mine.get(path)
    tag = first.headers["ETag"]
    assert tag.startswith('"')
    # Without leave to keep an answer nobody could make use of a 304.
    assert first.headers["Cache-Control"] == "private, no-cache"

    for names in (tag, "*", f"W/{tag}", f'"other", {tag}', f'"a,b",W/{tag}'):
        again = mine.get(path, If_None_Match=names)
        assert (again.status, again.body) == (304, b""), names
        assert again.headers["ETag"] == tag
        assert again.headers["Cache-Control"] == first.headers["Cache-Control"]
    for names in ('"other"', tag.strip('"')[:-1], f'"{tag}"'):
        again = mine.get(path, If_None_Match=names)
        assert (again.status, again.body) == (200, first.body), names


@pytest.mark.parametrize("what", ["job", "batch", "record"])
def test_its_headers_can_be_had_alone(mine: Http, paths: dict[str, str], what: str) -> None:
    full, head = (mine(method, paths[what]) for method in ("GET", "HEAD"))

    assert (head.status, head.body) == (200, b"")
    for name in ("ETag", "Content-Length", "Content-Type", "Cache-Control"):
        assert head.headers[name] == full.headers[name]
    tag = full.headers["ETag"]
    assert mine("HEAD", paths[what], headers={"If-None-Match": tag}).status == 304


def test_a_job_that_changes_gets_another_tag(mine: Http) -> None:
    job = started(mine, 700)
    running = mine.get(job["urls"]["self"])
    same = mine.get(job["urls"]["self"], If_None_Match=running.headers["ETag"])
    assert (same.status, same.headers["Retry-After"]) == (304, "1")
    ended(mine, job["id"])
    over = mine.get(job["urls"]["self"], If_None_Match=running.headers["ETag"])

    assert (over.status, over.json()["status"]) == (200, "succeeded")
    assert over.headers["Retry-After"] is None


def test_a_tag_opens_nothing_to_somebody_else(stranger: Http, paths: dict[str, str]) -> None:
    for path in paths.values():
        assert stranger.get(path, If_None_Match="*").status == 404


# Places in the queue


def test_a_job_that_waits_knows_its_place_and_one_that_runs_or_ended_has_none(mine: Http) -> None:
    blockers = [started(mine, LONG) for _ in range(SLOTS)]
    later = [submit(mine) for _ in range(3)]
    urgent = submit(mine, priority="critical")

    def place(job: dict[str, Any]) -> int | None:
        found: int | None = mine.get(job["urls"]["self"]).json()["queue_position"]
        return found

    places = [place(job) for job in later]
    assert None not in places
    assert places == sorted(places)  # type: ignore[type-var]
    assert isinstance(place(urgent), int)
    assert [place(job) for job in blockers] == [None] * SLOTS
    listed = mine.get("/v1/jobs?limit=3").json()["data"]
    assert not any("queue_position" in job for job in listed)
    for job in blockers:
        assert mine.post(job["urls"]["cancel"]).status == 202
        assert place(job) is None
    for job in (*later, urgent):
        assert ended(mine, job["id"])["status"] == "succeeded"
        assert place(job) is None


# Event streams


class Event(NamedTuple):
    name: str
    id: str
    data: str

    @property
    def job(self) -> Any:
        return json.loads(self.data)


class Stream:
    """An event stream, read as it comes."""

    def __init__(self, response: http.client.HTTPResponse):
        self.response = response

    def __iter__(self) -> Iterator[Event]:
        """To the end of the stream; raises what `http.client` does where it only breaks off."""
        rest = b""
        while data := self.response.read1():
            *blocks, rest = (rest + data).split(b"\n\n")
            for block in blocks:
                fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
                if "data" in fields:
                    yield Event(fields["event"], fields.get("id", ""), fields["data"])
        assert rest == b""


@contextmanager
def streaming(server: Http, path: str, seen: str = "", timeout: float = 60) -> Iterator[Stream]:
    connection = server.connect(timeout)
    try:
        sent = dict(server.headers) | ({"Last-Event-ID": seen} if seen else {})
        connection.request("GET", path, headers=sent)
        yield Stream(connection.getresponse())
    finally:
        connection.close()


def followed(server: Http, path: str, seen: str = "") -> list[Event]:
    """A stream to its end."""
    with streaming(server, path, seen) as stream:
        assert stream.response.status == 200
        return list(stream)


def statuses(events: list[Event]) -> list[str]:
    return [event.job["status"] for event in events if event.name == "status"]


def test_a_job_is_followed_from_its_start_to_its_end(mine: Http) -> None:
    job = submit(mine, 700)
    with streaming(mine, job["urls"]["events"]) as stream:
        response = stream.response
        assert response.status == 200
        assert response.headers["Content-Type"].partition(";")[0] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        assert response.headers["X-Accel-Buffering"] == "no"
        events = list(stream)

    assert events[-1] == Event("end", "", "{}")
    assert {event.name for event in events[:-1]} == {"status"}
    order = statuses(events)
    assert order == sorted(order, key=["queued", "running", "succeeded"].index)
    assert order[-1] == "succeeded"
    # Each event is the job as it would have been answered, and no two are the same.
    assert len({event.id for event in events[:-1]}) == len(events) - 1
    shown = mine.get(job["urls"]["self"])
    assert events[-2].data == shown.body.decode()
    assert f'"{events[-2].id}"' == shown.headers["ETag"]


def test_a_job_that_has_ended_is_told_at_once(mine: Http, paths: dict[str, str]) -> None:
    for path in (paths["job"], paths["record"]):
        events = followed(mine, f"{path}/events")
        assert [event.name for event in events] == ["status", "end"]
        assert events[0].job == mine.get(path).json()
        # Who has seen that, too, is told that there is no more.
        assert followed(mine, f"{path}/events", events[0].id) == events[1:]


def test_the_items_of_a_batch_are_told_as_they_are_done(mine: Http) -> None:
    batch = start_batch(mine, *[10] * 600)
    events = followed(mine, f"/v1/jobs/{UUID(batch.removeprefix('batch_'))}/events")
    done = [event.job["items"]["completed"] for event in events[:-1]]

    assert done == sorted(done)
    assert done[-1] == 600
    assert statuses(events)[-1] == "succeeded"


def test_a_stream_of_nobodys_job_is_refused_before_it_begins(
    mine: Http, stranger: Http, paths: dict[str, str]
) -> None:
    replies = [
        stranger.get(f"{paths['job']}/events"),
        stranger.get(f"{paths['record']}/events"),
        mine.get("/v1/jobs/nothing/events"),
        mine.get("/v1/jobs/00000000-0000-7000-8000-000000000000/events"),
    ]

    for reply in replies:
        assert reply.status == 404
        assert reply.headers["Content-Type"] == "application/problem+json"
    assert Http(mine.url).get(f"{paths['job']}/events").status == 401


def test_the_headers_of_a_stream_can_be_had_alone(mine: Http, paths: dict[str, str]) -> None:
    for _ in range(3):
        reply = mine("HEAD", f"{paths['job']}/events")
        assert (reply.status, reply.body) == (200, b"")


# Streams, and what dies under them

MOST = 200


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own, whose parts may be stopped."""
    fewer = {"TIDEGATE_MAX_TENANT_STREAMS": str(MOST), "TIDEGATE_LEASE": "3"}
    var = tmp_path_factory.mktemp("events") / "var"
    with Stack(var, environ=os.environ | fewer) as stack:
        stack.start()
        yield stack


@pytest.fixture
def server(own: Stack) -> Http:
    return Http.of(own)


def test_two_hundred_streams_leave_others_their_answers(server: Http) -> None:
    job = started(server, LONG)
    path = job["urls"]["events"]
    with ExitStack() as stack:
        streams = [stack.enter_context(streaming(server, path)) for _ in range(MOST)]
        assert {stream.response.status for stream in streams} == {200}
        one_more = server.get(path)
        assert (one_more.status, one_more.json()["code"]) == (503, "unavailable")
        assert int(one_more.headers["Retry-After"]) >= 1

        image = {"inputs": [tensor("image", "FP32", [0.0] * 64)]}
        replies = together([partial(server.post, DIGITS, image) for _ in range(20)])
        assert {reply.status for reply in replies} == {200}
        assert server.get(job["urls"]["self"]).json()["status"] == "running"
        assert server.post(job["urls"]["cancel"]).status == 202
        with ThreadPoolExecutor(MOST) as pool:
            found: list[list[Event]] = list(pool.map(list, streams))

    for events in found:
        assert statuses(events) == ["running", "canceled"]
        assert events[-1].name == "end"
    # Their places are free again.
    assert statuses(followed(server, path)) == ["canceled"]


def test_a_stream_outlives_a_restart_of_postgres(own: Stack, server: Http) -> None:
    job = started(server, 3000)
    with streaming(server, job["urls"]["events"]) as stream, ThreadPoolExecutor(1) as pool:
        events = iter(stream)
        first = next(events)
        rest = pool.submit(list, events)
        own.stop("postgres")
        own.start(only=("postgres",))
        found = rest.result(60)

    assert first.job["status"] == "running"
    assert statuses(found)[-1] == "succeeded"
    assert found[-1].name == "end"


def test_who_comes_back_after_a_gateways_death_hears_only_what_is_new(
    own: Stack, server: Http
) -> None:
    job = started(server, 5000)
    path = job["urls"]["events"]
    with streaming(server, path) as stream:
        seen = next(iter(stream))
        own.kill("gateway")
        # Whoever reads it can tell this from an end.
        with pytest.raises((http.client.IncompleteRead, OSError)):
            list(stream)
    own.start(only=("gateway",))
    events = followed(server, path, seen.id)

    assert seen.job["status"] == "running"
    assert statuses(events)[-1] == "succeeded"
    assert seen.id not in {event.id for event in events}
    assert ended(server, job["id"])["status"] == "succeeded"


def test_streams_end_cleanly_when_their_gateway_stops(own: Stack, server: Http) -> None:
    job = started(server, LONG)
    with ExitStack() as stack, ThreadPoolExecutor(20) as pool:
        streams = [stack.enter_context(streaming(server, job["urls"]["events"])) for _ in range(20)]
        found = [pool.submit(list, stream) for stream in streams]
        own.stop("gateway")
        events = [one.result(30) for one in found]
    assert not own.alive("gateway")
    own.start(only=("gateway",))

    assert {tuple(statuses(one)) for one in events} == {("running",)}
    assert server.post(job["urls"]["cancel"]).status == 202
    again = followed(server, job["urls"]["events"], events[0][-1].id)
    assert statuses(again) == ["canceled"]


def test_clients_that_leave_give_their_places_back(server: Http) -> None:
    """Not at once: nobody hears a client leave before there is something to say to it."""
    left, job = started(server, LONG), started(server, LONG)
    for _ in range(MOST):
        with streaming(server, left["urls"]["events"]) as stream:
            assert stream.response.status in (200, 503)
    assert server.post(left["urls"]["cancel"]).status == 202

    def one_more() -> int:
        with streaming(server, job["urls"]["events"]) as stream:
            return stream.response.status

    until(one_more, 30, lambda status: status == 200)
    assert server.post(job["urls"]["cancel"]).status == 202
