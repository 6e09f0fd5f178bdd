"""Requests that were fine and did not end well: late ones, and those a model fails at."""

from __future__ import annotations

from functools import partial

import pytest

from tests.e2e.helpers import IDENTITY, Http, Witness, answered_ints, ints, together, until

pytestmark = pytest.mark.stack


@pytest.mark.parametrize(
    ("parameters", "headers"),
    [
        ({}, {"Tidegate-Deadline": "0.2"}),
        ({"timeout": 200_000}, {}),
        ({"timeout": 20_000_000}, {"Tidegate-Deadline": "0.2"}),
    ],
    ids=["by header", "by the protocol's timeout", "the header wins"],
)
def test_a_request_that_takes_longer_than_its_deadline_is_given_up(
    gateway: Http, witness: Witness, parameters: dict[str, int], headers: dict[str, str]
) -> None:
    ended = sum(witness.models()["identity"])
    reply = gateway("POST", IDENTITY, ints(1, delay_ms=20_000, **parameters), headers)

    assert reply.status == 504
    assert list(reply.json()) == ["error"]
    # The model was told, and did not go on for 20 s. (Triton counts what was cancelled as success.)
    until(lambda: sum(witness.models()["identity"]) > ended, 10)


def test_a_request_within_its_deadline_is_answered(gateway: Http) -> None:
    reply = gateway("POST", IDENTITY, ints(1, delay_ms=10), {"Tidegate-Deadline": "20"})

    assert (reply.status, answered_ints(reply.json())) == (200, [1])


def test_what_a_model_fails_at_comes_back_in_its_words(gateway: Http) -> None:
    reply = gateway.post(IDENTITY, ints(1, fail="out of luck"))

    assert (reply.status, reply.json()) == (500, {"error": "out of luck"})


def test_one_request_that_fails_leaves_its_neighbours_alone(gateway: Http) -> None:
    requests = [ints(n) if n % 8 else ints(n, fail=f"no luck at {n}") for n in range(32)]
    replies = together([partial(gateway.post, IDENTITY, request) for request in requests])

    for n, reply in enumerate(replies):
        if n % 8:
            assert (reply.status, answered_ints(reply.json())) == (200, [n])
        else:
            assert (reply.status, reply.json()) == (500, {"error": f"no luck at {n}"})


def test_a_late_request_leaves_its_neighbours_alone(gateway: Http) -> None:
    soon = {"Tidegate-Deadline": "0.2"}
    late, *others = together(
        [
            partial(gateway, "POST", IDENTITY, ints(0, delay_ms=400), soon),
            *(partial(gateway.post, IDENTITY, ints(n)) for n in range(1, 16)),
        ]
    )

    assert late.status == 504
    assert [answered_ints(reply.json()) for reply in others] == [[n] for n in range(1, 16)]


def test_a_request_that_failed_has_a_record_that_says_why(gateway: Http) -> None:
    reply = gateway.post(IDENTITY, ints(1, fail="out of luck"))
    job = gateway.get(f"/v1/jobs/{reply.headers['Tidegate-Job-Id']}").json()

    assert job["status"] == "failed"
    assert job["error"]["message"] == "out of luck"
