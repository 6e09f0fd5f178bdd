"""More is asked than can be done in time: who would wait too long hears so at once, and everybody
else gets their answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from ops.embedded import Stack, product
from ops.embedded.ports import free_port
from tests.e2e.helpers import IDENTITY, Http, answered_ints, ints

pytestmark = pytest.mark.stack

SLOW = 150


@pytest.fixture
def narrow(stack: Stack) -> Iterator[Http]:
    """A gateway that has a request at a time travel alone, and eight at most under way, and that
    makes nobody hurry who doesn't say so: on a slow machine they all would take too long."""
    ports = [free_port(set()) for _ in range(2)]
    settings = {
        "TIDEGATE_COALESCE_WINDOW": "1",
        "TIDEGATE_COALESCE_ITEMS": "1",
        "TIDEGATE_MAX_QUEUE_TIME": "300",
    }
    process = product.gateway({**stack._settings, **settings}, *ports)
    stack.add(replace(process, name="narrow"))
    stack.start({"narrow"})
    try:
        yield replace(Http.of(stack), url=f"http://127.0.0.1:{ports[0]}")
    finally:
        stack.stop("narrow")
        del stack.processes["narrow"]


def test_whose_answer_would_come_too_late_is_refused_and_nobody_else_is(narrow: Http) -> None:
    gateway, anybody = narrow, Http(narrow.url)
    with ThreadPoolExecutor(SLOW) as pool:
        slow = [
            pool.submit(gateway.post, IDENTITY, ints(n, delay_ms=200), Tidegate_Deadline="120")
            for n in range(SLOW)
        ]
        hasty = Counter[int]()
        while not all(one.done() for one in slow):
            reply = gateway.post(IDENTITY, ints(7), Tidegate_Deadline="0.5", X_Request_ID="mine")
            hasty[reply.status] += 1
            stranger = anybody.post(IDENTITY, ints(7), Tidegate_Deadline="0.5")
            assert stranger.status == 401, stranger
            if reply.status == 503:
                assert int(reply.headers["Retry-After"]) >= 1
                assert "requests wait for this model" in reply.json()["error"]
                assert reply.headers["X-Request-ID"] == "mine"
                assert reply.headers["X-Content-Type-Options"] == "nosniff"
        answers = [one.result() for one in slow]

    assert {reply.status for reply in answers} == {200}
    assert [answered_ints(reply.json()) for reply in answers] == [[n] for n in range(SLOW)]
    assert hasty[503]
    assert hasty.keys() <= {200, 503, 504}
    assert gateway.post(IDENTITY, ints(8), Tidegate_Deadline="5").status == 200


def test_a_flood_of_hasty_requests_ends_in_answers_and_refusals_alone(gateway: Http) -> None:
    with ThreadPoolExecutor(300) as pool:
        replies = list(
            pool.map(
                lambda n: gateway.post(IDENTITY, ints(n), Tidegate_Deadline="0.4"), range(2000)
            )
        )
    statuses = Counter(reply.status for reply in replies)
    assert statuses.keys() <= {200, 503, 504}
    assert statuses[200]
    assert all(reply.headers["Retry-After"] for reply in replies if reply.status == 503)
