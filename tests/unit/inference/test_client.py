"""The Triton client against a fake server: deadlines, cancellation, packing, restarts, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    ModelFailed,
    ModelNotFound,
    ModelNotReady,
    Retry,
    TidegateError,
    TooLarge,
    Unavailable,
)
from inference.client import ERRORS, TritonServer, translate
from inference.deadline import CancelToken, Deadline
from inference.fake import IDENTITY, Delay, Fail, FakeModel, FakeTriton, Sleep
from inference.tensors import InferRequest, InferResult, Outcome, Tensor
from tests.unit.inference.strategies import identity, ints

MIB = 1024 * 1024
GOOD = identity(ints([[1, 2]]))
SLOW = identity(ints([[1, 2]]), parameters={"delay_ms": 20_000})
FAILING = identity(ints([[1, 2]]), parameters={"fail": "boom"})


def soon() -> Deadline:
    return Deadline.after(10.0)


def answered(outcomes: Sequence[Outcome]) -> list[InferResult]:
    """The outcomes, all of which are results."""
    results = [outcome for outcome in outcomes if isinstance(outcome, InferResult)]
    assert len(results) == len(outcomes), outcomes
    return results


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    patience = Deadline.after(5.0)
    while not condition():
        assert not patience.expired()
        time.sleep(0.002)


def once(condition: Callable[[], bool], action: Callable[[], object]) -> None:
    """Do something in another thread as soon as something else has happened."""

    def wait() -> None:
        until(condition)
        action()

    threading.Thread(target=wait).start()


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with FakeTriton() as running:
        yield running


@pytest.fixture
def server(fake: FakeTriton) -> Iterator[TritonServer]:
    client = TritonServer(fake.address, MIB)
    yield client
    client.close()


def first_row_only(request: InferRequest, sleep: Sleep) -> Iterable[Tensor]:
    """Answers one row whatever was asked: a model that batches in name only."""
    return [Tensor("INTS_OUT", "INT64", (1, 1), bytes(request.inputs[0].data)[:8])]


# One request


def test_nothing_is_connected_before_the_first_call(fake: FakeTriton) -> None:
    client = TritonServer(fake.address, MIB)
    assert client._channel is None
    assert client.infer(GOOD, soon()).version == "1"
    client.close()


def test_a_closed_client_connects_again(server: TritonServer) -> None:
    server.infer(GOOD, soon())
    server.close()
    server.infer(GOOD, soon())


def test_threads_share_one_client(server: TritonServer) -> None:
    requests = [identity(ints([[number]]), id=str(number)) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda request: server.infer(request, soon()), requests))
    assert [(result.id, result.outputs[0].data) for result in results] == [
        (request.id, request.inputs[0].data) for request in requests
    ]


def test_a_request_whose_time_is_over_is_not_sent(fake: FakeTriton, server: TritonServer) -> None:
    with pytest.raises(DeadlineExceeded):
        server.infer(GOOD, Deadline.after(0.0))
    assert fake.counts("identity").executed == 0


@pytest.mark.parametrize("token", [None, CancelToken()])
def test_the_deadline_ends_the_call_and_the_work(
    fake: FakeTriton, server: TritonServer, token: CancelToken | None
) -> None:
    with pytest.raises(DeadlineExceeded):
        server.infer(SLOW, Deadline.after(0.3), token)
    until(lambda: fake.counts("identity").cancelled == 1)


def test_cancel_ends_the_call_and_the_work(fake: FakeTriton, server: TritonServer) -> None:
    token = CancelToken()
    once(lambda: fake.counts("identity").received == 1, token.cancel)
    with pytest.raises(Cancelled):
        server.infer(SLOW, soon(), token)
    until(lambda: fake.counts("identity").cancelled == 1)


def test_what_was_cancelled_before_is_not_sent(fake: FakeTriton, server: TritonServer) -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        server.infer(GOOD, soon(), token)
    assert fake.counts("identity").executed == 0


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [(None, 8_000_000, 10_000_000), (2_000, 2_000, 2_000), (99_000_000, 8_000_000, 10_000_000)],
)
def test_triton_is_told_the_time_left_in_microseconds(
    asked: int | None, least: int, most: int
) -> None:
    told: list[object] = []

    def listen(request: InferRequest, sleep: Sleep) -> Iterable[Tensor]:
        told.append(request.parameters["timeout"])
        return request.inputs

    with FakeTriton([FakeModel("identity", IDENTITY.config, listen)]) as fake:
        client = TritonServer(fake.address, MIB)
        parameters = {} if asked is None else {"timeout": asked}
        client.infer(identity(ints([[1]]), parameters=parameters), soon())
        client.close()
    assert isinstance(told[0], int)
    assert least <= told[0] <= most


def test_a_message_over_the_limit_is_too_large(server: TritonServer) -> None:
    with pytest.raises(TooLarge):
        server.infer(identity(Tensor("INTS", "INT64", (1, MIB // 8), bytes(MIB))), soon())


# Many requests


def test_many_requests_travel_as_one(fake: FakeTriton, server: TritonServer) -> None:
    requests = [identity(ints([[number, 1]]), id=str(number)) for number in range(50)]
    outcomes = server.infer_many(requests, soon())
    assert [(one.id, bytes(one.outputs[0].data)) for one in answered(outcomes)] == [
        (one.id, one.inputs[0].data) for one in requests
    ]
    counts = fake.counts("identity")
    assert (counts.executed, counts.rows) == (1, 50)


def test_many_requests_may_be_of_many_models(server: TritonServer) -> None:
    digit = InferRequest("digits", "", (Tensor("image", "FP32", (1, 64), bytes(256)),))
    outcomes = server.infer_many([GOOD, digit, GOOD, digit], soon())
    assert [one.model for one in answered(outcomes)] == [
        "identity",
        "digits",
        "identity",
        "digits",
    ]


def test_no_requests_are_no_outcomes(server: TritonServer) -> None:
    assert server.infer_many([], soon()) == []


def test_one_bad_request_does_not_fail_its_neighbours(
    fake: FakeTriton, server: TritonServer
) -> None:
    bad = identity(Tensor("INTS", "INT64", (1, 2), b"too short"))
    unknown = InferRequest("nobody", "", GOOD.inputs)
    outcomes = server.infer_many([GOOD, bad, GOOD, unknown, FAILING, GOOD], soon())
    kinds = [type(one) for one in outcomes]
    assert kinds == [InferResult, BadRequest, InferResult, ModelNotFound, ModelFailed, InferResult]


def test_a_pack_that_is_refused_for_now_is_not_tried_one_by_one(
    fake: FakeTriton, server: TritonServer
) -> None:
    fake.script("identity", [Fail(grpc.StatusCode.UNAVAILABLE, "busy")])
    outcomes = server.infer_many([GOOD] * 5, soon())
    assert {type(one) for one in outcomes} == {ModelNotReady}
    assert fake.counts("identity").executed == 0


def test_a_model_that_mixes_rows_up_is_asked_one_by_one() -> None:
    with FakeTriton([FakeModel("identity", IDENTITY.config, first_row_only)]) as fake:
        client = TritonServer(fake.address, MIB)
        outcomes = client.infer_many([identity(ints([[number]])) for number in range(4)], soon())
        client.close()
    assert [one.outputs[0] for one in answered(outcomes)] == [
        ints([[number]], "INTS_OUT") for number in range(4)
    ]


def test_cancel_ends_all_of_many(fake: FakeTriton, server: TritonServer) -> None:
    token = CancelToken()
    once(lambda: fake.counts("identity").received == 2, token.cancel)
    outcomes = server.infer_many([SLOW, SLOW], soon(), [token, token])
    assert [type(one) for one in outcomes] == [Cancelled, Cancelled]
    until(lambda: fake.counts("identity").cancelled == 2)


def test_cancel_of_one_leaves_the_call_it_shares_with_others(
    fake: FakeTriton, server: TritonServer
) -> None:
    kept, gone = CancelToken(), CancelToken()
    fake.script("identity", [Delay(0.5)])
    before = fake.counts("identity").received
    once(lambda: fake.counts("identity").received == before + 1, gone.cancel)
    first, second = server.infer_many([GOOD, GOOD], soon(), [kept, gone])
    assert (type(first), type(second)) == (InferResult, Cancelled)
    assert fake.counts("identity").cancelled == 0


def test_cancel_of_one_ends_its_own_call(fake: FakeTriton, server: TritonServer) -> None:
    kept, gone = CancelToken(), CancelToken()
    once(lambda: fake.counts("identity").received == 2, gone.cancel)
    first, second = server.infer_many([GOOD, SLOW], soon(), [kept, gone])
    assert (type(first), type(second)) == (InferResult, Cancelled)
    until(lambda: fake.counts("identity").cancelled == 1)


def test_what_was_called_off_before_is_never_sent(fake: FakeTriton, server: TritonServer) -> None:
    kept, gone = CancelToken(), CancelToken()
    gone.cancel()
    first, second = server.infer_many([GOOD, SLOW], soon(), [kept, gone])
    assert (type(first), type(second)) == (InferResult, Cancelled)
    assert fake.counts("identity").received == 1


# Many requests, answered part by part


def held_up(seconds: float) -> InferRequest:
    return identity(ints([[1, 2]]), parameters={"delay_ms": int(seconds * 1000)})


class Parts:
    """Takes parts, and says when the first is there."""

    def __init__(self) -> None:
        self.all: list[dict[int, Outcome]] = []
        self.first = threading.Event()

    def __call__(self, part: dict[int, Outcome]) -> None:
        self.all.append(part)
        self.first.set()

    @property
    def kinds(self) -> list[dict[int, type[Outcome]]]:
        return [{place: type(one) for place, one in sorted(part.items())} for part in self.all]


def test_who_is_done_is_handed_out_before_who_is_slow(server: TritonServer) -> None:
    parts, token = Parts(), CancelToken()
    once(parts.first.is_set, token.cancel)
    tokens = [CancelToken(), token, CancelToken()]
    server.infer_in_parts([GOOD, SLOW, GOOD], [soon()] * 3, parts, tokens)
    # It is the first part that ends the slow one.
    assert parts.kinds == [{0: InferResult, 2: InferResult}, {1: Cancelled}]


def test_what_ends_together_is_one_part(server: TritonServer) -> None:
    parts = Parts()
    requests = [GOOD, held_up(0.05), FAILING, GOOD]
    server.infer_in_parts(requests, [soon()] * 4, parts, gather=10)
    assert parts.kinds == [{0: InferResult, 1: InferResult, 2: ModelFailed, 3: InferResult}]


def test_one_pack_is_one_part(fake: FakeTriton, server: TritonServer) -> None:
    parts = Parts()
    server.infer_in_parts([GOOD] * 5, [soon()] * 5, parts)
    assert parts.kinds == [dict.fromkeys(range(5), InferResult)]
    assert fake.counts("identity").executed == 1


def test_those_run_again_alone_are_handed_out_as_they_end(
    fake: FakeTriton, server: TritonServer
) -> None:
    parts = Parts()
    # The pack fails, and of its members the first to arrive takes long.
    fake.script("identity", [Fail(grpc.StatusCode.INTERNAL, "boom"), Delay(1.5)])
    server.infer_in_parts([GOOD] * 4, [soon()] * 4, parts)
    assert len(parts.all[-1]) == 1
    assert sorted(place for part in parts.all for place in part) == [0, 1, 2, 3]
    assert {kind for part in parts.kinds for kind in part.values()} == {InferResult}


def test_each_has_a_deadline_of_its_own(fake: FakeTriton, server: TritonServer) -> None:
    parts = Parts()
    fake.script("identity", [Delay(1.5)] * 2)
    deadlines = [Deadline.after(10.0), Deadline.after(0.2), Deadline.after(0.2)]
    server.infer_in_parts([GOOD, GOOD, SLOW], deadlines, parts)
    # The first two share a call, which goes on for the first one.
    late = {place: kind for part in parts.kinds[:-1] for place, kind in part.items()}
    assert late == {1: DeadlineExceeded, 2: DeadlineExceeded}
    assert parts.kinds[-1] == {0: InferResult}
    assert fake.counts("identity").executed == 1


def test_calls_cut_off_by_a_restart_are_sent_again(fake: FakeTriton, server: TritonServer) -> None:
    parts = Parts()
    fake.script("identity", [Delay(20.0)] * 2)
    once(lambda: fake.counts("identity").received == 2, fake.restart)
    server.infer_in_parts([GOOD, held_up(0.01), GOOD], [soon()] * 3, parts)
    assert {kind for part in parts.kinds for kind in part.values()} == {InferResult}
    # gRPC looks at the connection a moment longer, and complains where it is closed meanwhile.
    server.infer(held_up(0.5), soon())


def test_a_server_that_stays_away_is_waited_for_once(
    fake: FakeTriton, server: TritonServer
) -> None:
    fake.stop()
    started = time.monotonic()
    outcomes = server.infer_many([held_up(n / 1000) for n in range(1, 41)], Deadline.after(60.0))
    assert {type(one) for one in outcomes} <= {ModelNotReady, *ModelNotReady.__subclasses__()}
    assert time.monotonic() - started < 15.0


def test_who_does_not_want_the_rest_ends_it(fake: FakeTriton, server: TritonServer) -> None:
    def refuse(part: dict[int, Outcome]) -> None:
        raise ZeroDivisionError(list(part))

    with pytest.raises(ZeroDivisionError):
        server.infer_in_parts([GOOD, SLOW], [soon()] * 2, refuse)
    until(lambda: fake.counts("identity").cancelled == 1)


def test_closing_ends_all_of_many(fake: FakeTriton, server: TritonServer) -> None:
    once(lambda: fake.counts("identity").received == 2, server.close)
    outcomes = server.infer_many([SLOW, SLOW], soon())
    assert [type(one) for one in outcomes] == [Cancelled, Cancelled]


# A server that goes and comes


def test_the_first_call_after_a_restart_succeeds(fake: FakeTriton, server: TritonServer) -> None:
    server.infer(GOOD, soon())
    for _ in range(3):
        fake.restart()
        server.infer(GOOD, soon())


def test_a_call_cut_off_by_a_restart_is_sent_again(fake: FakeTriton, server: TritonServer) -> None:
    fake.script("identity", [Delay(20.0)])
    once(lambda: fake.counts("identity").received == 1, fake.restart)
    assert server.infer(GOOD, soon()).outputs


def test_a_server_that_stays_away_is_not_ready_and_soon_said_so(
    fake: FakeTriton, server: TritonServer
) -> None:
    fake.stop()
    started = time.monotonic()
    with pytest.raises(ModelNotReady) as caught:
        server.infer(GOOD, Deadline.after(60.0))
    assert time.monotonic() - started < 5.0
    assert caught.value.retry_after
    assert not server.live(soon())
    assert not server.ready(soon())
    assert not server.ready(soon(), "identity")


def test_a_busy_model_is_not_a_lost_connection(fake: FakeTriton, server: TritonServer) -> None:
    fake.script("identity", [Fail(grpc.StatusCode.UNAVAILABLE, "busy")])
    with pytest.raises(ModelNotReady, match="busy"):
        server.infer(GOOD, soon())
    assert fake.counts("identity").failed == 1


# Errors


def test_every_status_of_grpc_has_an_error_of_ours() -> None:
    assert ERRORS.keys() == set(grpc.StatusCode) - {grpc.StatusCode.OK}
    for status in ERRORS:
        error = translate(status, "why")
        assert isinstance(error, TidegateError)
        assert isinstance(error, Unavailable) == (error.retry_after is not None)


@pytest.mark.parametrize(
    ("status", "details", "kind"),
    [  # as Triton 2.51 and gRPC 1.85 say them
        ("NOT_FOUND", "Request for unknown model: 'm' is not found", ModelNotFound),
        ("NOT_FOUND", "Request for unknown model: 'm' version 7 is not found", ModelNotFound),
        ("NOT_FOUND", "Request for unknown model: 'm' has no available versions", ModelNotReady),
        ("UNAVAILABLE", "Request for unknown model: 'm' version 1 is not at ready state",
         ModelNotReady),
        ("INVALID_ARGUMENT", "requested model 'm' is not available", ModelNotFound),
        ("INVALID_ARGUMENT", "requested model version is not available for model 'm'",
         ModelNotFound),
        ("INVALID_ARGUMENT", "unexpected inference input 'Z' for model 'm'", BadRequest),
        ("UNAVAILABLE", "Request timeout expired", DeadlineExceeded),
        ("UNAVAILABLE", "Exceeds maximum queue size", Unavailable),
        ("UNAVAILABLE", "Stream removed (Socket closed)", ModelNotReady),
        ("RESOURCE_EXHAUSTED", "CLIENT: Received message larger than max (9 vs. 4)", TooLarge),
        ("RESOURCE_EXHAUSTED", "no memory", Unavailable),
        ("INTERNAL", "boom", ModelFailed),
    ],
)  # fmt: skip
def test_triton_means_what_it_says(status: str, details: str, kind: type[TidegateError]) -> None:
    assert isinstance(translate(grpc.StatusCode[status], details), kind)


@pytest.mark.parametrize(
    "details",
    ["Stub process 'identity_0_2' is not healthy.", "Failed to retrieve the response error."],
)
def test_a_model_whose_process_died_did_not_refuse_its_input(details: str) -> None:
    assert translate(grpc.StatusCode.INTERNAL, details).retry is Retry.COUNTED


def test_a_models_traceback_stays_with_its_operator() -> None:
    details = (
        "Failed to process ..., message: ValueError: boom\n\nAt:\n  /models/m.py(20): execute\n"
    )
    message = translate(grpc.StatusCode.INTERNAL, details).message
    assert message == "Failed to process ..., message: ValueError: boom"


def test_an_error_does_not_repeat_the_clients_id() -> None:
    details = "[request id: mine] input byte size mismatch"
    assert translate(grpc.StatusCode.INVALID_ARGUMENT, details).message.startswith("input byte")
