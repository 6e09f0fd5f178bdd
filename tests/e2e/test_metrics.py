"""What a gateway of several processes counts, and who may see it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import psutil
import pytest

from ops.embedded import Stack, product
from ops.embedded.ports import HOST, free_port
from tests.e2e.helpers import IDENTITY, Http, ints, together, until

pytestmark = pytest.mark.stack


@dataclass(frozen=True)
class Gateway:
    """One of two processes."""

    stack: Stack
    public: Http
    operators: Http

    def number(self, pattern: str) -> float:
        """The sum of what the lines with these words say."""
        reply = self.operators.get("/metrics")
        assert reply.status == 200, reply
        text = reply.body.decode()
        found = re.findall(rf"^tidegate_{pattern} ([0-9.e+-]+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def counted(self, route: str, status: int, method: str = "POST") -> float:
        return self.number(
            rf'http_request_duration_seconds_count{{method="{method}",route="{re.escape(route)}",'
            rf'status="{status}"}}'
        )

    def processes(self) -> list[psutil.Process]:
        return psutil.Process(self.stack.pid("gateway-2")).children()


@pytest.fixture(scope="module")
def gateway_2(stack: Stack) -> Iterator[Gateway]:
    port, metrics = free_port(set()), free_port(set())
    env = {**stack._settings, "TIDEGATE_GATEWAY_WORKERS": "2"}
    stack.add(replace(product.gateway(env, port, metrics), name="gateway-2"))
    stack.start({"gateway-2"})
    own = Gateway(
        stack,
        Http.keyed(f"http://{HOST}:{port}", stack.env["TIDEGATE_API_KEY"]),
        Http(f"http://{HOST}:{metrics}"),
    )
    yield own
    stack.stop("gateway-2")
    del stack.processes["gateway-2"]


INFER = "/v2/models/<model>/infer"


def test_requests_are_counted_by_route_and_status_over_all_processes(gateway_2: Gateway) -> None:
    before = gateway_2.counted(INFER, 200)
    together([partial(gateway_2.public.post, IDENTITY, ints(1))] * 40)
    assert gateway_2.counted(INFER, 200) == before + 40
    assert len(gateway_2.processes()) == 2


def test_refused_requests_are_counted_too(gateway_2: Gateway) -> None:
    stranger = Http(gateway_2.public.url)
    for _ in range(3):
        stranger.post(IDENTITY, ints(1))
        gateway_2.public.post(IDENTITY, {"inputs": 1})
        gateway_2.public.post("/v2/models/nobody/infer", ints(1))
    assert [gateway_2.counted(INFER, status) for status in (401, 400, 404)] == [3, 3, 3]


def test_a_stranger_makes_no_names(gateway_2: Gateway) -> None:
    for n in range(3):
        gateway_2.public.get(f"/such-{n}")
        gateway_2.public(f"METHOD{n}", IDENTITY)
    assert gateway_2.counted("", 404, method="") == 3
    assert gateway_2.counted("", 405, method="") == 3
    text = gateway_2.operators.get("/metrics").body
    assert b"such-" not in text
    assert b"METHOD" not in text


def test_what_is_being_worked_on_is_counted_while_it_is(gateway_2: Gateway) -> None:
    in_flight = partial(gateway_2.number, "http_requests_in_flight")
    # The one that asks.
    until(in_flight, 10, lambda number: number == 1)
    slow = partial(gateway_2.public.post, IDENTITY, ints(1, delay_ms=3000))
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(slow)
        until(in_flight, 10, lambda number: number == 4)
    until(in_flight, 10, lambda number: number == 1)


def test_a_process_that_dies_takes_nothing_along_that_it_counted(gateway_2: Gateway) -> None:
    together([partial(gateway_2.public.post, IDENTITY, ints(1))] * 20)
    before = gateway_2.counted(INFER, 200)
    old = {process.pid for process in gateway_2.processes()}
    for process in gateway_2.processes():
        process.kill()

    def replaced() -> bool:
        return len({process.pid for process in gateway_2.processes()} - old) == 2

    until(replaced, 30)
    until(lambda: _answers(gateway_2), 30)
    assert gateway_2.counted(INFER, 200) == before
    assert gateway_2.number("http_requests_in_flight") == 1


def _answers(gateway: Gateway) -> bool:
    try:
        return gateway.operators.get("/metrics").status == 200
    except OSError:
        return False


@pytest.mark.parametrize(
    "headers",
    [{}, {"Host": "spoofed"}, {"X-Forwarded-Port": "spoofed", "Forwarded": "host=spoofed"}],
    ids=["plainly", "by Host", "by a proxy's word"],
)
def test_tenants_do_not_see_them(gateway_2: Gateway, headers: dict[str, str]) -> None:
    address = gateway_2.operators.url.removeprefix("http://")
    chosen = {name: value.replace("spoofed", address) for name, value in headers.items()}
    assert gateway_2.public("GET", "/metrics", headers=chosen).status == 404


def test_operators_need_no_key_and_tenants_always_do(gateway_2: Gateway) -> None:
    assert gateway_2.operators.get("/metrics").headers["Content-Type"].startswith("text/plain")
    assert gateway_2.operators.get("/v1/jobs").status == 401
