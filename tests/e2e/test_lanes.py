"""A GPU worker is two processes, one for each lane: what becomes of one when the other ends."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import psycopg2
import pytest

from ops.embedded import Stack
from tests.e2e.helpers import IDENTITY, Http, answered_ints, ended, hanging, ints, until

pytestmark = pytest.mark.stack
PARTS = ("gateway", "worker")
"""What these tests stop."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: what is killed here, nobody else misses."""
    # Short, so that what a dead process held is taken up soon.
    patience = {"TIDEGATE_LEASE": "3", "TIDEGATE_HINT_TIMEOUT": "2"}
    var = tmp_path_factory.mktemp("lanes") / "var"
    with Stack(var, environ=os.environ | patience) as stack:
        stack.start()
        yield stack


@pytest.fixture
def server(own: Stack) -> Http:
    """The gateway of a stack that works, whatever the last test did to it."""
    own.start(only=PARTS)
    gateway = Http.of(own)
    until(lambda: answers(gateway), 30)
    return gateway


def answers(server: Http) -> bool:
    return server.post(IDENTITY, ints(1), Tidegate_Deadline="2").status == 200


def lane(own: Stack, name: str = "worker") -> psutil.Process:
    """The process that runs the batch lane of a worker."""
    (found,) = until(
        lambda: psutil.Process(own.pid(name)).children(), 20, lambda found: len(found) == 1
    )
    return found


def submit(server: Http, value: int, delay_ms: int) -> dict[str, Any]:
    """A job that somebody runs by now."""
    asked = {"model": "identity", "input": ints(value, delay_ms=delay_ms)}
    job: dict[str, Any] = server.post("/v1/jobs", asked).json()
    until(lambda: look(server, job)["status"], 30, lambda status: status == "running")
    return job


def look(server: Http, job: dict[str, Any]) -> dict[str, Any]:
    view: dict[str, Any] = server.get(job["urls"]["self"]).json()
    return view


def chunk(own: Stack, job: dict[str, Any]) -> tuple[str, int]:
    """State and attempts of the one chunk of a job."""
    connection = psycopg2.connect(own.env["TIDEGATE_DATABASE_URL"].replace("+psycopg2", ""))
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT c.state, c.attempts FROM chunks c JOIN jobs j ON j.id = c.job_id"
                " WHERE j.id::text = %s",
                (job["id"],),
            )
            ((state, attempts),) = cursor.fetchall()
            return state, attempts
    finally:
        connection.close()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_each_lane_has_a_process_and_the_one_for_requests_comes_first(
    own: Stack, server: Http
) -> None:
    job = submit(server, 1, delay_ms=100)

    host = os.uname().nodename
    assert ended(server, job["id"])["worker"] == f"default-batch@{host}"
    assert lane(own).nice() > psutil.Process(own.pid("worker")).nice()


def test_a_batch_lane_that_dies_is_started_again_and_nobody_else_notices(
    own: Stack, server: Http
) -> None:
    worker, first = own.pid("worker"), lane(own)
    job = submit(server, 5, delay_ms=1500)
    first.kill()
    until(lambda: gone(first), 10)

    assert answered_ints(server.post(IDENTITY, ints(6)).json()) == [6]
    view = ended(server, job["id"], 40)
    assert (view["status"], view["attempts"]) == ("succeeded", 2)
    assert answered_ints(server.get(job["urls"]["result"]).json()) == [5]
    assert lane(own).pid != first.pid
    assert own.pid("worker") == worker


def test_a_worker_that_is_killed_takes_its_batch_lane_along(own: Stack, server: Http) -> None:
    batches = lane(own)
    # Even one that could not act on a signal.
    batches.suspend()
    # It alone, not its process group, as the kernel does for want of memory.
    os.kill(own.pid("worker"), signal.SIGKILL)
    until(lambda: not own.alive("worker") and gone(batches), 10)


def test_a_worker_that_stops_lets_both_lanes_end_what_they_run(own: Stack, server: Http) -> None:
    batches = lane(own)
    short, long = submit(server, 7, delay_ms=1500), submit(server, 8, delay_ms=45_000)
    own.stop("worker")

    assert gone(batches)
    assert look(server, short)["status"] == "succeeded"
    # Handed back: its lease is not waited for, and nothing is counted against it.
    assert chunk(own, long) == ("queued", 0)
    server.post(long["urls"]["cancel"])


def test_a_worker_that_is_to_quit_takes_its_batch_lane_along_at_once(
    own: Stack, server: Http
) -> None:
    worker, batches = psutil.Process(own.pid("worker")), lane(own)
    job = submit(server, 9, delay_ms=3000)
    worker.send_signal(signal.SIGQUIT)
    until(lambda: not own.alive("worker"), 10)
    until(lambda: gone(batches), 10)
    own.start(only=("worker",))

    view = ended(server, job["id"], 40)
    assert (view["status"], view["attempts"]) == ("succeeded", 2)


def test_a_batch_lane_that_hangs_is_not_waited_for_for_ever(own: Stack, server: Http) -> None:
    batches = lane(own)
    batches.suspend()
    worker = psutil.Process(own.pid("worker"))
    worker.terminate()
    # By itself, not by its supervisor.
    until(lambda: not own.alive("worker"), own.processes["worker"].stop_timeout)

    assert gone(batches)


def test_a_worker_that_hangs_and_wakes_up_goes_on(own: Stack, server: Http) -> None:
    job = submit(server, 10, delay_ms=200)
    with hanging(own, "worker"):
        pass

    assert ended(server, job["id"], 40)["status"] == "succeeded"
    assert answers(server)


@pytest.mark.parametrize("queues", ["default.realtime,default.batch", "default.batch"])
def test_who_names_the_queues_gets_one_process(own: Stack, server: Http, queues: str) -> None:
    name = f"named-{len(queues)}"
    own.add_worker(name, "-Q", queues, "-n", f"{name}@%h")
    own.stop("worker")
    own.start(only=(name,))
    try:
        job = submit(server, 11, delay_ms=100)
        view = ended(server, job["id"])
        assert view["status"] == "succeeded"
        assert view["worker"] == f"{name}@{os.uname().nodename}"
        assert psutil.Process(own.pid(name)).children() == []
        if "realtime" in queues:
            until(lambda: answers(server), 20)
    finally:
        own.stop(name)
