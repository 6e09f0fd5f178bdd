"""The realtime lane while parts of it die, hang or forget: every client hears something by its
deadline, and a message that is lost is run again, once."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import psutil
import pytest
import redis

from ops.embedded import Stack
from tasks import messages
from tests.e2e.helpers import IDENTITY, Http, Reply, Witness, answered_ints, ints, until

pytestmark = pytest.mark.stack

SLACK = 10
"""Seconds a client of a busy machine may hear its answer later than it was given."""
CLIENTS = 12
QUEUE = f"tidegate:{messages.realtime_queue('default')}"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: what is killed here, nobody else misses."""
    var: Path = tmp_path_factory.mktemp("lost") / "var"
    with Stack(var, environ=os.environ) as stack:
        stack.start()
        stack.add_worker("worker-1", "--gpu", "1")
        yield stack


@pytest.fixture(scope="module")
def client(own: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(own.env["TIDEGATE_REDIS_URL"], socket_timeout=30) as client:
        yield client


@pytest.fixture(autouse=True)
def server(own: Stack, client: redis.Redis) -> Http:
    """The gateway of a stack that works, and does nothing; one worker unless the test has two."""
    own.start(only=("redis", "gateway", "worker"))
    gateway = Http.of(own)
    until(lambda: infer(gateway, 2).status, 30, lambda status: status == 200)
    until(lambda: not client.keys("tidegate:running:*"), 20)
    return gateway


@pytest.fixture
def second_worker(own: Stack, client: redis.Redis) -> Iterator[str]:
    """The name of another worker's process."""
    own.start(only=("worker-1",))

    def there() -> int:
        return client.zcount("tidegate:workers:default", time.time(), "+inf")

    until(there, 20, lambda found: found == 2)
    yield "worker-1"
    own.stop("worker-1")


@pytest.fixture
def witness(own: Stack, client: redis.Redis) -> Witness:
    return Witness(Http(own.env["TIDEGATE_TRITON_HTTP_URL"]), client)


@pytest.fixture
def ran(witness: Witness) -> Callable[[], int]:
    """How many requests the model `identity` has ended, one way or the other."""
    return lambda: sum(witness.models()["identity"])


def infer(server: Http, deadline: float, *values: int, **parameters: object) -> Reply:
    asked = ints(*(values or (1,)), **parameters)
    return server("POST", IDENTITY, asked, {"Tidegate-Deadline": str(deadline)})


@contextmanager
def asking(server: Http, deadline: float, **parameters: object) -> Iterator[Future[Reply]]:
    """A request that somebody waits for meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(partial(infer, server, deadline, 7, **parameters))


def ended(reply: Reply) -> bool:
    return reply.status == 200 and reply.json()["status"] != "running"


def runner(client: redis.Redis) -> str:
    """The process that runs the one request there is, by what its worker says."""

    def names() -> set[Any]:
        return {client.get(key) for key in client.keys("tidegate:running:*")} - {None}

    (name,) = until(names, 20, lambda found: len(found) == 1)
    return "worker-1" if b"gpu1" in name else "worker"


@dataclass
class Load:
    """Clients that ask again and again, and what each of them heard, after how long."""

    server: Http
    deadline: float
    heard: list[tuple[int, float]] = field(default_factory=list)
    cut: list[tuple[float, Exception]] = field(default_factory=list)
    """Requests that ended without an answer: when they were sent."""
    records: dict[str, int] = field(default_factory=dict)
    """The ids of those that have one, and what was answered."""
    _lock: Lock = field(default_factory=Lock)

    def _ask(self, over: Event, number: int) -> None:
        while not over.is_set():
            sent = time.monotonic()
            try:
                reply = infer(self.server, self.deadline, number, delay_ms=number % 4 * 50)
            except (OSError, http.client.HTTPException) as error:
                with self._lock:
                    self.cut.append((sent, error))
                over.wait(0.05)
                continue
            assert reply.status != 200 or answered_ints(reply.json()) == [number]
            with self._lock:
                self.heard.append((reply.status, time.monotonic() - sent))
                if "Tidegate-Job-Id" in reply.headers:
                    self.records[reply.headers["Tidegate-Job-Id"]] = reply.status
            if reply.status != 200:
                over.wait(0.05)

    @contextmanager
    def running(self) -> Iterator[None]:
        over = Event()
        with ThreadPoolExecutor(CLIENTS) as pool:
            asked = [pool.submit(self._ask, over, number) for number in range(CLIENTS)]
            try:
                self.goes_well()
                yield
                self.goes_well()
            finally:
                over.set()
            for one in asked:
                one.result()

    def goes_well(self) -> None:
        """Until there are answers again."""
        before = len(self.heard)
        until(
            lambda: sum(status == 200 for status, _ in list(self.heard)[before:]),
            40,
            lambda count: count > 2 * CLIENTS,
        )

    def ended_clearly(self) -> None:
        """Nobody was left waiting, and nobody heard anything but an answer or "not now"."""
        assert self.cut == []
        assert set(self.statuses()) <= {200, 503, 504}
        assert max(took for _, took in self.heard) < self.deadline + SLACK
        expected = {200: "succeeded", 503: "failed", 504: "expired"}
        for status in self.statuses():
            ids = [name for name, answered in self.records.items() if answered == status]
            for path in (f"/v1/jobs/{name}" for name in ids[-5:]):
                job = until(partial(self.server.get, path), 10, ended).json()
                assert job["status"] == expected[status]

    def statuses(self) -> Counter[int]:
        return Counter(status for status, _ in self.heard)


def test_what_a_killed_worker_ran_another_one_runs_again(
    own: Stack, server: Http, client: redis.Redis, ran: Callable[[], int], second_worker: str
) -> None:
    before = ran()
    with asking(server, 40, delay_ms=4000) as answer:
        own.kill(runner(client))
        reply = answer.result()
    assert (reply.status, answered_ints(reply.json())) == (200, [7])
    # Once for the worker that died, and once more.
    until(ran, 10, lambda count: count == before + 2)


def test_what_a_killed_worker_took_a_moment_ago_the_restarted_one_runs(
    own: Stack, server: Http, witness: Witness, ran: Callable[[], int]
) -> None:
    before, taken = ran(), witness.messages()
    with asking(server, 40, delay_ms=3000) as answer:
        # Before the worker has said that it runs anything.
        until(lambda: witness.messages() > taken, 10)
        own.kill("worker")
        own.start(only=("worker",))
        reply = answer.result()
    assert (reply.status, answered_ints(reply.json())) == (200, [7])
    assert before + 1 <= ran() <= before + 2


def test_a_request_that_outlives_two_workers_is_given_up_before_its_deadline(
    own: Stack, server: Http, client: redis.Redis, ran: Callable[[], int], second_worker: str
) -> None:
    before, sent = ran(), time.monotonic()
    with asking(server, 200, delay_ms=60_000) as answer:
        first = runner(client)
        own.kill(first)
        client.delete(*client.keys("tidegate:running:*"))
        own.kill(runner(client))
        own.start(only=(first,))
        reply = answer.result()
    assert reply.status == 503
    assert int(reply.headers["Retry-After"]) >= 1
    assert "twice" in reply.json()["error"]
    assert time.monotonic() - sent < 100
    assert ran() <= before + 2
    path = f"/v1/jobs/{reply.headers['Tidegate-Job-Id']}"
    job = until(partial(server.get, path), 10, ended).json()
    assert (job["status"], job["error"]["code"]) == ("failed", "unavailable")


def test_a_message_that_the_broker_lost_is_sent_again(
    server: Http, client: redis.Redis, ran: Callable[[], int]
) -> None:
    def steal() -> Any:
        """Takes a message from the queue and loses it, as a worker killed at that moment does."""
        while True:
            found: Any = client.brpop([QUEUE], timeout=20)
            assert found, "no message came"
            if json.loads(found[1])["headers"]["task"] == messages.REALTIME:
                return found
            client.lpush(QUEUE, found[1])

    with ThreadPoolExecutor(1) as pool:
        stolen = pool.submit(steal)
        while not stolen.done():
            # The worker asks anew every second, and whoever has waited longest is served first.
            time.sleep(1.5)
            before = ran()
            assert infer(server, 30).status == 200
            assert ran() == before + 1


def test_a_redis_that_forgets_everything_under_load_leaves_nobody_waiting(
    server: Http, client: redis.Redis
) -> None:
    load = Load(server, deadline=15)
    with load.running():
        for _ in range(3):
            client.flushall()
            load.goes_well()
    load.ended_clearly()


def test_a_request_that_runs_while_redis_forgets_everything_is_run_once(
    server: Http, client: redis.Redis, ran: Callable[[], int]
) -> None:
    before = ran()
    with asking(server, 40, delay_ms=6000) as answer:
        runner(client)
        client.flushall()
        assert answer.result().status == 200
    assert ran() == before + 1


def test_a_restart_of_redis_under_load_leaves_nobody_waiting(own: Stack, server: Http) -> None:
    load, worker = Load(server, deadline=15), own.pid("worker")
    with load.running():
        own.stop("redis")
        time.sleep(2)
        own.start(only=("redis",))
        load.goes_well()
        own.kill("redis")
        own.start(only=("redis",))
    load.ended_clearly()
    # Not even a task that ran, and could not be acknowledged, ends it.
    assert own.pid("worker") == worker


def test_a_redis_that_hangs_under_load_leaves_nobody_waiting(own: Stack, server: Http) -> None:
    load = Load(server, deadline=8)
    process = psutil.Process(own.pid("redis"))
    with load.running():
        process.send_signal(signal.SIGSTOP)
        time.sleep(6)
        process.send_signal(signal.SIGCONT)
    load.ended_clearly()


def test_workers_killed_under_load_leave_nobody_waiting(
    own: Stack, server: Http, second_worker: str
) -> None:
    load = Load(server, deadline=20)
    with load.running():
        for name in ("worker", second_worker, "worker"):
            own.kill(name)
            own.start(only=(name,))
            load.goes_well()
    load.ended_clearly()


def test_a_gateway_that_stops_under_load_answers_what_it_has_taken(
    own: Stack, server: Http
) -> None:
    load = Load(server, deadline=15)
    with load.running():
        stopping = time.monotonic()
        own.stop("gateway")
        own.start(only=("gateway",))
    assert set(load.statuses()) <= {200, 503}
    # What was sent a good while before is answered; a connection made at the very end is not taken.
    assert [error for sent, error in load.cut if sent < stopping - 1] == []


def test_a_request_that_is_late_is_written_down_as_expired(server: Http) -> None:
    reply = infer(server, 0.3, delay_ms=3000)
    assert reply.status == 504
    path = f"/v1/jobs/{reply.headers['Tidegate-Job-Id']}"
    job = until(partial(server.get, path), 10, ended).json()
    assert (job["status"], job["error"]["code"]) == ("expired", "deadline_exceeded")
    assert job["id"] in [one["id"] for one in server.get("/v1/jobs?status=expired").json()["data"]]


def test_a_slow_request_makes_nobody_late_who_travels_with_it(server: Http) -> None:
    """Three messages in flight make the next requests gather; whether all of these travel together
    is up to the machine, so it is tried until the slow one had company. It is of another shape than
    the others, so that Triton does not run them as one batch."""
    quick, company = 6, 0
    with ThreadPoolExecutor(quick + 4) as pool:
        for _ in range(5):
            ahead = [pool.submit(infer, server, 30, n, delay_ms=400) for n in range(3)]
            time.sleep(0.1)
            slow = pool.submit(infer, server, 60, 99, 9, delay_ms=12_000)
            beside = [pool.submit(infer, server, 8, n) for n in range(quick)]
            heard = [one.result() for one in [*ahead, *beside]]
            assert [reply.status for reply in heard] == [200] * len(heard)
            assert [answered_ints(one.json()) for one in heard[3:]] == [[n] for n in range(quick)]
            assert not slow.done()
            assert (slow.result().status, answered_ints(slow.result().json())) == (200, [99, 9])
            path = f"/v1/jobs/{slow.result().headers['Tidegate-Job-Id']}"
            job = until(partial(server.get, path), 10, ended).json()
            company = job["metrics"]["batch_size"] - 1
            if company:
                break
    assert company
