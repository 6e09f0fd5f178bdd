"""Requests travel alone while the lane is idle, and together while it is busy."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from errors import Overloaded, TidegateError, Unavailable
from inference import frames
from inference.tensors import InferRequest, InferResult, Tensor
from storage.redis_state import Where
from web.coalescer import MAX_WAITING, MAX_WAITING_BYTES, Coalescer
from web.flight import LOOK_AFTER, LOST_LOOKS, NUDGE_AFTER, Promise, Waiting


class Broker:
    """Stands between a coalescer and a worker: holds messages until told to answer them."""

    gateway = "gateway"

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.ttls: list[float] = []
        self.sent: list[dict[str, Any]] = []
        self.expected: dict[bytes, Any] = {}
        self.arrived = threading.Semaphore(0)
        self.down = False

    def put_blob(self, message: bytes, data: bytes, ttl: float) -> None:
        if self.down:
            raise Unavailable("down")
        self.blobs[message.hex()] = data
        self.ttls.append(ttl)

    def expect(self, message: bytes, deliver: Any) -> None:
        self.expected[message] = deliver

    def forget(self, message: bytes) -> None:
        self.expected.pop(message, None)

    def send(self, task: str, queue: str, **kwargs: Any) -> None:
        if self.down:
            raise Unavailable("down")
        self.sent.append({"queue": queue, **kwargs})
        self.arrived.release()

    def next(self) -> dict[str, Any]:
        """The next message, once it has been sent."""
        assert self.arrived.acquire(timeout=5)
        return self.sent[-1]

    def size(self, message: dict[str, Any]) -> int:
        return len(frames.decode_requests(self.blobs[message["message"]]))

    def answer(self, message: dict[str, Any]) -> None:
        requests = frames.decode_requests(self.blobs[message["message"]])
        self.answer_part(message, *range(len(requests)))

    def answer_part(self, message: dict[str, Any], *places: int) -> None:
        """Leave the others to a later reply."""
        requests = frames.decode_requests(self.blobs[message["message"]])
        outcomes = [
            InferResult(r.model, "1", r.inputs, {}, r.id) if place in places else None
            for place, r in enumerate(requests)
        ]
        self.expected[bytes.fromhex(message["message"])](frames.encode_outcomes(outcomes))


@pytest.fixture
def broker() -> Broker:
    return Broker()


class Clock:
    """Seconds, as many as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def coalescer(
    broker: Broker,
    window: int = 1,
    max_items: int = 8,
    max_wait: float = math.inf,
    patience: float = 3600,
    max_flying: int = 64,
    clock: Callable[[], float] = time.monotonic,
) -> Coalescer:
    return Coalescer(
        "g",
        broker,  # type: ignore[arg-type]
        broker,  # type: ignore[arg-type]
        window=window,
        max_items=max_items,
        max_wait=max_wait,
        patience=patience,
        max_flying=max_flying,
        clock=clock,
        send=broker.send,
    )


def submit(to: Coalescer, count: int = 1, timeout: float = 30) -> list[Promise]:
    tensor = Tensor("INTS", "INT64", (1, 1), bytes(8))
    until = to._clock() + timeout
    waiting = [
        Waiting(InferRequest("m", "", (tensor,), (), {}, str(n)), 8, until) for n in range(count)
    ]
    for one in waiting:
        to.submit(one)
    return [one.answer for one in waiting]


def test_an_idle_lane_sends_at_once(broker: Broker) -> None:
    to = coalescer(broker)
    (answer,) = submit(to)
    message = broker.next()
    assert broker.size(message) == 1
    broker.answer(message)
    assert answer.result(5).batch_size == 1


def test_what_arrives_while_the_window_is_full_travels_together(broker: Broker) -> None:
    to = coalescer(broker)
    submit(to)
    first = broker.next()
    answers = submit(to, 5)
    broker.answer(first)
    second = broker.next()
    assert broker.size(second) == 5
    broker.answer(second)
    assert [answer.result(5).outcome.id for answer in answers] == list("01234")  # type: ignore[union-attr]


def test_a_message_holds_no_more_than_its_share(broker: Broker) -> None:
    to = coalescer(broker, max_items=4)
    submit(to)
    first = broker.next()
    submit(to, 6)
    broker.answer(first)
    second = broker.next()
    assert broker.size(second) == 4
    broker.answer(second)
    assert broker.size(broker.next()) == 2


def test_a_request_whose_deadline_passed_while_it_waited_is_not_sent(broker: Broker) -> None:
    to = coalescer(broker)
    submit(to)
    first = broker.next()
    submit(to, timeout=-1)
    (alive,) = submit(to)
    broker.answer(first)
    second = broker.next()
    assert broker.size(second) == 1
    broker.answer(second)
    assert alive.result(5)


def test_a_message_never_answered_gives_its_place_back_at_its_deadline(broker: Broker) -> None:
    to = coalescer(broker)
    submit(to, timeout=0.05)
    broker.next()
    submit(to)
    assert broker.size(broker.next()) == 1


def test_when_the_broker_is_down_everybody_in_the_message_hears_it(broker: Broker) -> None:
    to = coalescer(broker)
    broker.down = True
    (answer,) = submit(to)
    assert isinstance(answer.result(5).outcome, Unavailable)
    broker.down = False
    submit(to)
    assert broker.next()


def test_too_many_waiting_requests_are_refused_at_once(broker: Broker) -> None:
    to = coalescer(broker)
    submit(to)
    broker.next()
    submit(to, MAX_WAITING)
    with pytest.raises(Unavailable):
        submit(to)


def test_whose_turn_would_come_too_late_is_refused_before_anything_is_done(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, max_items=4, max_wait=8.0, clock=clock)
    submit(to)
    message = broker.next()
    to.admit(0.001)
    submit(to, 11, timeout=300)
    clock.now += 1.0
    broker.answer(message)
    # One a second, and eleven are ahead.
    with pytest.raises(Overloaded) as refused:
        to.admit(300)
    assert refused.value.retry_after == 6
    broker.answer(broker.next())
    # Five in that second: the seven ahead take 1.4 s, and with 40 more before it, 9.4 s.
    to.admit(300)
    to.admit(3.0)
    for timeout, held in ((2.0, 0), (300.0, 40)):
        with pytest.raises(Overloaded):
            to.admit(timeout, held)


def test_an_idle_lane_refuses_nobody_whatever_it_was_like(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    (answer,) = submit(to, timeout=300)
    message = broker.next()
    clock.now += 100
    broker.answer(message)
    assert answer.result(5)
    to.admit(0.001)


def test_a_publish_that_failed_but_arrived_is_answered_once_and_the_lane_goes_on(
    broker: Broker,
) -> None:
    to = coalescer(broker)
    send = broker.send

    def arrives_and_fails(*args: Any, **kwargs: Any) -> None:
        send(*args, **kwargs)
        broker.answer(broker.sent[-1])
        raise OSError("the connection broke after the push")

    to._send = arrives_and_fails
    (first,) = submit(to)
    assert isinstance(first.result(5).outcome, InferResult)
    to._send = send
    broker.next()
    (second,) = submit(to)
    broker.answer(broker.next())
    assert isinstance(second.result(5).outcome, InferResult)


def test_a_worker_that_answers_another_number_of_requests_leaves_nobody_waiting(
    broker: Broker,
) -> None:
    to = coalescer(broker)
    (answer,) = submit(to)
    message = broker.next()
    broker.expected[bytes.fromhex(message["message"])](frames.encode_outcomes([]))
    assert isinstance(answer.result(5).outcome, TidegateError)


def test_slow_requests_do_not_hold_up_the_next_ones(broker: Broker) -> None:
    to = coalescer(broker, window=2, patience=0.02)
    for _ in range(2):
        submit(to)
        broker.next()
    (quick,) = submit(to)
    broker.answer(broker.next())
    assert isinstance(quick.result(5).outcome, InferResult)


def test_a_slow_model_has_so_many_messages_in_flight_and_no_more(broker: Broker) -> None:
    to = coalescer(broker, window=1, patience=0.001, max_flying=2)
    submit(to)
    first = broker.next()
    submit(to)
    broker.next()
    submit(to)
    assert not broker.arrived.acquire(timeout=0.1)
    broker.answer(first)
    broker.next()


def test_what_waits_or_flies_is_bounded_in_bytes(broker: Broker) -> None:
    to = coalescer(broker)

    def big() -> Waiting:
        size = MAX_WAITING_BYTES // 2 + 1
        return Waiting(InferRequest("m", "", (), (), {}, ""), size, time.monotonic() + 9)

    to.submit(big())
    message = broker.next()
    with pytest.raises(Unavailable):
        to.submit(big())
    broker.answer(message)
    to.submit(big())
    assert broker.next()


# Messages that are answered in parts


def sent_together(broker: Broker, to: Coalescer, *timeouts: float) -> list[Promise]:
    """Requests of these timeouts that have left in one message."""
    submit(to)
    first = broker.next()
    answers = [one for timeout in timeouts for one in submit(to, timeout=timeout)]
    broker.answer(first)
    assert broker.size(broker.next()) == len(timeouts)
    return answers


def test_who_is_answered_does_not_wait_for_the_rest_of_the_message(broker: Broker) -> None:
    to = coalescer(broker)
    slow, quick, bad = sent_together(broker, to, 30, 30, 30)
    message = broker.sent[-1]
    broker.answer_part(message, 1, 2)
    assert quick.result(5).batch_size == bad.result(5).batch_size == 3
    assert not slow.done()
    assert to.depth == 1
    # It still has its place in the window.
    (next_one,) = submit(to)
    assert broker.sent[-1] is message
    broker.answer_part(message, 0)
    assert isinstance(slow.result(5).outcome, InferResult)
    broker.answer(broker.next())
    assert isinstance(next_one.result(5).outcome, InferResult)
    assert to.depth == 0
    assert to._bytes == 0
    assert broker.expected == {}


def test_a_place_answered_twice_counts_once(broker: Broker) -> None:
    to = coalescer(broker)
    slow, quick = sent_together(broker, to, 30, 30)
    for _ in range(3):
        broker.answer_part(broker.sent[-1], 1)
    assert quick.done()
    assert not slow.done()
    assert to.depth == 1
    broker.answer(broker.sent[-1])
    assert isinstance(slow.result(5).outcome, InferResult)
    assert (to.depth, to._bytes) == (0, 0)


def test_what_is_left_of_a_message_gives_its_place_back_at_its_own_deadline(
    broker: Broker,
) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    sent_together(broker, to, 5, 300)
    broker.answer_part(broker.sent[-1], 1)
    clock.now += 6
    assert to.overdue() == []
    assert (to.depth, to._bytes, broker.expected) == (0, 0, {})


def test_a_lost_message_is_sent_again_for_those_without_an_answer(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    slow, _ = sent_together(broker, to, 30, 60)
    message = broker.sent[-1]
    broker.answer_part(message, 1)
    is_seen(to, message, Where.NOWHERE, looks=LOST_LOOKS)
    again = broker.next()
    # The other one is not run again: its time is over.
    assert again["deadlines"] == [30, 0]
    assert broker.ttls[-1] == 30
    broker.answer(again)
    assert isinstance(slow.result(5).outcome, InferResult)


def test_a_message_lost_twice_is_given_up_for_those_without_an_answer(broker: Broker) -> None:
    to = coalescer(broker)
    slow, quick = sent_together(broker, to, 30, 30)
    message = broker.sent[-1]
    broker.answer_part(message, 1)
    is_seen(to, message, Where.NOWHERE, looks=2 * LOST_LOOKS)
    assert isinstance(quick.result(5).outcome, InferResult)
    assert isinstance(slow.result(5).outcome, Unavailable)
    assert (to.depth, to._bytes) == (0, 0)


# Messages that take long


def is_seen(to: Coalescer, message: dict[str, Any], where: Where, looks: int = 1) -> None:
    for _ in range(looks):
        to.seen(bytes.fromhex(message["message"]), where)


def test_nobody_wonders_about_a_message_before_its_time(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    submit(to)
    name = bytes.fromhex(broker.next()["message"])

    clock.now += LOOK_AFTER - 0.01
    assert to.overdue() == []
    clock.now += 0.01
    assert to.overdue() == [name]
    # Past its deadline nobody cares any more.
    clock.now += 30
    assert to.overdue() == []
    assert broker.expected == {}


def test_a_message_nobody_claims_is_named_once_more(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    (answer,) = submit(to)
    first = broker.next()

    is_seen(to, first, Where.WAITING)
    assert broker.sent == [first]
    clock.now += NUDGE_AFTER
    is_seen(to, first, Where.WAITING, looks=10)
    # The same tensors, the same deadlines: whoever comes first claims it, the other finds nothing.
    assert broker.sent == [first, first]
    assert len(broker.ttls) == 1
    broker.answer(first)
    assert answer.result(5)


def test_a_message_that_could_not_be_named_again_is_named_at_the_next_look(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    submit(to)
    first = broker.next()
    clock.now += NUDGE_AFTER
    broker.down = True
    with pytest.raises(Unavailable):
        is_seen(to, first, Where.WAITING)
    broker.down = False
    is_seen(to, first, Where.WAITING)
    assert len(broker.sent) == 2


def test_a_message_somebody_runs_is_waited_for(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    submit(to)
    first = broker.next()
    clock.now += 20
    is_seen(to, first, Where.RUNNING, looks=40)
    assert broker.sent == [first]


def test_a_lost_message_is_sent_again_with_what_is_left_of_its_deadlines(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    submit(to)
    occupying = broker.next()
    short, long = submit(to, timeout=3) + submit(to, timeout=30)
    broker.answer(occupying)
    first = broker.next()
    del broker.blobs[first["message"]]

    clock.now += 10
    is_seen(to, first, Where.NOWHERE, looks=LOST_LOOKS - 1)
    # Seen in between: it was only on its way from here to there.
    is_seen(to, first, Where.RUNNING)
    is_seen(to, first, Where.NOWHERE, looks=LOST_LOOKS - 1)
    assert broker.sent[-1] == first
    is_seen(to, first, Where.NOWHERE)
    second = broker.next()

    assert second["message"] == first["message"]
    assert broker.ttls[-1] == max(second["deadlines"])
    assert second["deadlines"] == pytest.approx([left - 10 for left in first["deadlines"]])
    # Its worker sees that the time of one of them is over.
    assert [left > 0 for left in second["deadlines"]] == [False, True]
    broker.answer(second)
    assert short.done()
    assert isinstance(long.result(5).outcome, InferResult)


def test_a_message_lost_twice_is_given_up_at_once(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    (answer,) = submit(to)
    first = broker.next()
    is_seen(to, first, Where.NOWHERE, looks=LOST_LOOKS)
    assert not answer.done()
    is_seen(to, first, Where.NOWHERE, looks=LOST_LOOKS)

    outcome = answer.result(5).outcome
    assert isinstance(outcome, Unavailable)
    assert outcome.retry_after
    assert broker.sent == [first, broker.next()]
    # And its place is free.
    submit(to)
    assert broker.next()["message"] != first["message"]


def test_a_message_answered_twice_is_answered_once(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    (answer,) = submit(to)
    first = broker.next()
    late = broker.expected[bytes.fromhex(first["message"])]
    is_seen(to, first, Where.NOWHERE, looks=LOST_LOOKS)
    broker.answer(broker.next())
    late(frames.encode_outcomes([Unavailable("too late to say so")]))
    assert isinstance(answer.result(5).outcome, InferResult)


def test_when_a_lost_message_cannot_be_sent_again_everybody_in_it_hears_it(broker: Broker) -> None:
    to = coalescer(broker)
    (answer,) = submit(to)
    first = broker.next()
    broker.down = True
    is_seen(to, first, Where.NOWHERE, looks=LOST_LOOKS)
    assert isinstance(answer.result(5).outcome, Unavailable)


def test_a_message_sent_again_may_be_named_again(broker: Broker) -> None:
    clock = Clock()
    to = coalescer(broker, clock=clock)
    submit(to)
    first = broker.next()
    is_seen(to, first, Where.NOWHERE, looks=LOST_LOOKS)
    second = broker.next()
    is_seen(to, first, Where.WAITING)
    assert broker.sent == [first, second]
    clock.now += NUDGE_AFTER
    is_seen(to, first, Where.WAITING)
    assert broker.sent == [first, second, second]
