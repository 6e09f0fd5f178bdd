"""Answers given again: to whom, for how long, and how often the model runs."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from uuid import UUID

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from errors import DeadlineExceeded, ModelFailed, TidegateError, Unavailable
from inference import oip
from inference.metadata import ModelSpec
from inference.tensors import InferRequest, InferResult, Tensor
from storage.redis_state import Blob
from tests.unit.inference import strategies
from web.answers import SharedAnswers
from web.cache import OVERHEAD, Memory, ResponseCache, cacheable, key_of
from web.catalog import Catalog
from web.flight import Answer

TENANT, OTHER = UUID(int=1), UUID(int=2)


def described(version: str = "1", mark: str = "ttl=60", **config: Any) -> dict[str, Any]:
    parameters = {"tidegate.cache": {"string_value": mark}}
    return {
        "metadata": {"name": "m", "versions": [version]},
        "config": {"parameters": parameters, **config},
    }


def spec_of(told: dict[str, Any]) -> ModelSpec:
    return ModelSpec.parse(told["metadata"], told["config"])


SPEC = spec_of(described())


def key(request: InferRequest, spec: ModelSpec = SPEC, tenant: UUID = TENANT) -> bytes:
    return key_of(request, spec, tenant=tenant, group="g")


# What a request is


def essence(request: InferRequest) -> object:
    """What an answer depends on, and nothing else; equal where answers may be shared."""
    parameters = {
        name: (type(value), value)
        for name, value in request.parameters.items()
        if name != "priority"
    }
    inputs = sorted((t.name, t.datatype, t.shape, bytes(t.data)) for t in request.inputs)
    version = request.version or SPEC.version
    return request.model, version, inputs, request.outputs, parameters


named_apart = strategies.requests.filter(
    lambda request: len({tensor.name for tensor in request.inputs}) == len(request.inputs)
)
close = st.sampled_from(["a", "b"])
alike = st.builds(
    InferRequest,
    model=close,
    version=st.sampled_from(["", "1", "11"]),
    inputs=st.lists(
        st.builds(
            Tensor,
            name=close,
            datatype=st.sampled_from(["UINT8", "BOOL"]),
            shape=st.sampled_from([(1,), (2,), (1, 1), (1, 2), (2, 1)]),
            data=st.sampled_from([b"\0", b"\1", b"\0\0", b"\0\1"]),
        ),
        max_size=2,
        unique_by=lambda tensor: tensor.name,
    ).map(tuple),
    outputs=st.lists(close, max_size=2).map(tuple),
    parameters=st.dictionaries(close | st.just("priority"), st.sampled_from([1, True, "1", 1.0])),
    id=close,
)
"""Requests that are often the same, and else differ in little."""


@given(one=alike, other=alike)
def test_requests_share_a_key_exactly_where_answers_may_be_shared(
    one: InferRequest, other: InferRequest
) -> None:
    assert (key(one) == key(other)) == (essence(one) == essence(other))


def test_where_one_input_ends_is_part_of_the_key() -> None:
    def split(one: bytes, other: bytes) -> InferRequest:
        # As they would be if somebody forgot to check them.
        return strategies.identity(
            Tensor("a", "BYTES", (1,), one), Tensor("b", "BYTES", (1,), other)
        )

    assert key(split(b"ab", b"c")) != key(split(b"a", b"bc"))


@given(request=named_apart, data=st.data())
def test_any_byte_of_any_input_makes_another_key(
    request: InferRequest, data: st.DataObject
) -> None:
    filled = [place for place, tensor in enumerate(request.inputs) if len(tensor.data)]
    if not filled:
        return
    place = data.draw(st.sampled_from(filled))
    raw = bytearray(request.inputs[place].data)
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    inputs = list(request.inputs)
    inputs[place] = replace(inputs[place], data=bytes(raw))
    assert key(replace(request, inputs=tuple(inputs))) != key(request)


@given(request=named_apart)
def test_a_key_is_of_one_tenant_group_version_and_configuration(request: InferRequest) -> None:
    latest = replace(request, version="")
    newer = spec_of(described(version="2"))
    keys = {
        key(latest),
        key(latest, tenant=OTHER),
        key_of(latest, SPEC, tenant=TENANT, group="h"),
        key(latest, newer),
        key(latest, spec_of(described(max_batch_size=8))),
    }
    assert len(keys) == 5
    assert key(replace(request, version="1"), newer) != key(latest, newer)
    assert key(replace(request, version="1")) == key(latest)


def test_where_instances_run_makes_no_other_key() -> None:
    request = strategies.identity(strategies.ints([[1]]))
    placed = [spec_of(described(instance_group=[{"gpus": [gpu]}])) for gpu in (0, 1)]
    assert key(request, placed[0]) == key(request, placed[1])


@given(
    values=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    text=st.lists(st.text(max_size=5), min_size=1, max_size=3),
)
def test_json_and_binary_of_the_same_tensors_share_a_key(
    values: list[int], text: list[str]
) -> None:
    whole = strategies.ints([values])
    words = strategies.texts([text])
    head = [{"name": t.name, "datatype": t.datatype, "shape": t.shape} for t in (whole, words)]
    in_json = [head[1] | {"data": text}, head[0] | {"data": values}]
    in_binary = [
        entry | {"parameters": {"binary_data_size": len(tensor.data)}}
        for entry, tensor in zip(head, (whole, words), strict=True)
    ]
    document = orjson.dumps({"id": "x", "inputs": in_json, "parameters": {"priority": 1}})
    start = orjson.dumps({"inputs": in_binary, "parameters": {"binary_data_output": True}})
    binary = start + bytes(whole.data) + bytes(words.data)
    one, _ = oip.parse_infer(document, None, model="m", version="")
    other, _ = oip.parse_infer(binary, len(start), model="m", version="1")
    assert key(one) == key(other)


@pytest.mark.parametrize("name", ["sequence_id", "sequence_start", "sequence_end"])
def test_a_request_of_a_sequence_is_not_cacheable(name: str) -> None:
    request = strategies.identity(strategies.ints([[1]]))
    assert cacheable(request)
    assert not cacheable(replace(request, parameters={name: 0}))


# What is kept


class Clock:
    """Seconds, as many as the test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5000)), max_size=60),
    limit=st.integers(1, 40_000),
)
def test_memory_is_never_over_its_limit(sizes: list[tuple[int, int]], limit: int) -> None:
    memory = Memory(limit, Clock())
    for name, size in sizes:
        stored = memory.put(bytes([name]), bytes(size), 60)
        assert stored == (size <= limit // 16)
        kept = [memory.get(bytes([n])) for n in range(10)]
        assert memory.bytes == sum(len(one.frame) + OVERHEAD for one in kept if one)
        assert memory.bytes <= limit


def test_what_was_used_last_stays(clock: Clock) -> None:
    memory = Memory(16 * OVERHEAD, clock)
    for name in range(16):
        assert memory.put(bytes([name]), b"", 60)
    assert memory.get(bytes([0]))
    memory.put(b"new", b"", 60)
    assert memory.get(bytes([0]))
    assert memory.get(bytes([1])) is None
    assert memory.get(b"new")


def test_an_answer_is_kept_for_its_time_and_not_longer(clock: Clock) -> None:
    memory = Memory(1 << 20, clock)
    memory.put(b"k", b"frame", 60)
    clock.now += 59
    kept = memory.get(b"k")
    assert kept
    assert (kept.frame, kept.left) == (b"frame", 1)
    clock.now += 1
    assert memory.get(b"k") is None
    assert memory.bytes == 0


# Who runs, and who waits


class Model:
    """Stands in for the lane and the workers behind it: holds requests until told to answer."""

    def __init__(self) -> None:
        self.told: Any = described()
        self.version = "1"
        self.ran: list[InferRequest] = []
        self.errors: dict[str, TidegateError] = {}
        """By the id of the request that gets it."""
        self.raised: dict[str, TidegateError] = {}
        self.arrived = threading.Semaphore(0)
        self.open = threading.Event()
        self.open.set()
        self.permits: threading.Semaphore | None = None
        """How many requests may be answered, where that is counted."""
        self.counts: Counter[str] = Counter()

    def query(self, _op: str, _model: str, _version: str) -> Any:
        if isinstance(self.told, TidegateError):
            raise self.told
        return self.told

    def infer(self, request: InferRequest, timeout: float) -> Answer:
        self.ran.append(request)
        self.arrived.release()
        if self.permits:
            assert self.permits.acquire(timeout=10)
        if not self.open.wait(min(timeout, 10)) or request.id in self.raised:
            raise self.raised.get(request.id, DeadlineExceeded("too late"))
        return Answer(
            self.errors.get(request.id)
            or InferResult(request.model, self.version, request.inputs, {}, request.id),
            batch_size=3,
        )

    def cache_asked(self, _model: str, outcome: str) -> None:
        self.counts[outcome] += 1

    def cache_stored(self, _model: str, size: int) -> None:
        self.counts["bytes"] += size

    def cache_holds(self, size: int) -> None:
        self.counts["held"] = size


class Store:
    """Stands in for Redis."""

    def __init__(self) -> None:
        self.kept: dict[bytes, Blob] = {}
        self.down = False
        self.looks = 0
        self.changed = threading.Event()

    def answers(self, keys: list[bytes]) -> list[Blob | None]:
        self.looks += 1
        if self.down:
            raise Unavailable("down")
        return [self.kept.get(key) for key in keys]

    def keep_answer(self, key: bytes, data: bytes, ttl: float, _most: int) -> bool:
        if self.down:
            raise Unavailable("down")
        self.kept[key] = Blob(data, ttl)
        self.changed.set()
        return True

    def close(self) -> None:
        pass


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def store() -> Store:
    return Store()


Make = Callable[..., ResponseCache]


@pytest.fixture
def make(model: Model, store: Store, clock: Clock) -> Iterator[Make]:
    """Makes gateways' caches, of one model and one Redis."""
    made: list[ResponseCache] = []

    def make(limit: int = 1 << 20) -> ResponseCache:
        cache = ResponseCache(
            model,
            Catalog(model.query, ttl=5, clock=clock),
            SharedAnswers(store, 1 << 20, patience=10, clock=clock),  # type: ignore[arg-type]
            model,
            group="g",
            limit=limit,
            clock=clock,
        )
        made.append(cache)
        return cache

    yield make
    model.open.set()
    for cache in made:
        cache.stop()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def asked(*values: int, **fields: Any) -> InferRequest:
    return InferRequest("m", "", (strategies.ints([list(values)]),), **fields)


def infer(cache: ResponseCache, request: InferRequest, timeout: float = 30, **how: Any) -> Answer:
    return cache.infer(request, timeout, tenant=how.pop("tenant", TENANT), **how)


def result(answer: Answer) -> InferResult:
    assert isinstance(answer.outcome, InferResult)
    return answer.outcome


def wait_for(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("it never came to that")


def follow(cache: ResponseCache, pool: ThreadPoolExecutor, *requests: Any) -> list[Future[Answer]]:
    """Requests that wait for the one that runs, once they do."""
    before = cache._following
    sizes = [sum(len(tensor.data) for tensor in request.inputs) for request, _ in requests]
    futures = [pool.submit(infer, cache, *request) for request in requests]
    wait_for(lambda: cache._following == before + sum(sizes))
    return futures


def test_the_same_request_is_answered_again_without_the_model(make: Make, model: Model) -> None:
    cache = make()
    first = infer(cache, asked(1, id="a"))
    again = infer(cache, asked(1, id="b"))

    assert len(model.ran) == 1
    assert (first.cached, first.cache_status) == (False, "tidegate; fwd=uri-miss; stored")
    assert (again.cached, again.cache_status) == (True, "tidegate; hit; ttl=60; detail=memory")
    assert (first.batch_size, again.batch_size) == (3, 0)
    assert (result(first).id, result(again).id) == ("a", "b")
    assert bytes(result(again).outputs[0].data) == bytes(result(first).outputs[0].data)
    assert (model.counts["miss"], model.counts["hit"]) == (1, 1)
    assert model.counts["bytes"] == model.counts["held"] - OVERHEAD > 0


def test_another_request_or_tenant_is_run(make: Make, model: Model) -> None:
    cache = make()
    infer(cache, asked(1))
    infer(cache, asked(2))
    infer(cache, asked(1), tenant=OTHER)
    assert len(model.ran) == 3


def test_an_answer_is_given_for_its_time_in_memory_and_from_redis(
    make: Make, model: Model, store: Store, clock: Clock
) -> None:
    cache = make()
    infer(cache, asked(1))
    assert store.changed.wait(10)
    store.kept.clear()
    clock.now += 59
    assert infer(cache, asked(1)).cached
    clock.now += 2
    assert not infer(cache, asked(1)).cached
    assert len(model.ran) == 2


def test_what_one_gateway_has_kept_another_gives_no_longer_than_it_may(
    make: Make, model: Model, store: Store, clock: Clock
) -> None:
    one, other = make(), make()
    infer(one, asked(1, id="the first one's"))
    assert store.changed.wait(10)
    (name,) = store.kept
    assert b"the first one's" not in store.kept[name].data
    store.kept[name] = Blob(store.kept[name].data, 7)

    assert infer(other, asked(1, id="x")).cache_status == "tidegate; hit; ttl=7; detail=redis"
    store.kept.clear()
    assert infer(other, asked(1)).cache_status == "tidegate; hit; ttl=7; detail=memory"
    clock.now += 8
    assert not infer(other, asked(1)).cached
    assert len(model.ran) == 2


def test_errors_are_never_kept(make: Make, model: Model, store: Store) -> None:
    cache = make()
    model.errors["a"] = ModelFailed("no luck")
    assert infer(cache, asked(1, id="a")).outcome is model.errors["a"]
    model.raised["b"] = Unavailable("away")
    with pytest.raises(Unavailable):
        infer(cache, asked(1, id="b"))
    assert not infer(cache, asked(1, id="c")).cached
    assert len(model.ran) == 3


def test_a_redis_that_is_away_costs_hits_and_no_request(
    make: Make, model: Model, store: Store, clock: Clock
) -> None:
    store.down = True
    cache = make()
    assert infer(cache, asked(1)).cache_status == "tidegate; fwd=uri-miss; stored"
    assert infer(cache, asked(1)).cached
    infer(cache, asked(2))
    assert store.looks == 1, "it is left alone for a moment"
    store.down = False
    clock.now += 2
    infer(cache, asked(3))
    assert store.looks == 2
    assert store.changed.wait(10)


def test_what_cannot_be_read_is_a_miss(make: Make, model: Model, store: Store) -> None:
    cache = make()
    store.kept[key(asked(1))] = Blob(b"nonsense", 60)
    assert not infer(cache, asked(1)).cached
    assert result(infer(cache, asked(1))).version == "1"


def test_an_answer_that_is_too_large_is_given_and_not_kept(make: Make, model: Model) -> None:
    cache = make()
    answer = infer(cache, asked(*range(9000)))
    assert answer.cache_status == "tidegate; fwd=uri-miss"
    assert not infer(cache, asked(*range(9000))).cached
    assert model.counts["bytes"] == 0


def test_of_the_same_requests_at_one_time_one_runs(
    make: Make, model: Model, pool: ThreadPoolExecutor
) -> None:
    cache = make()
    model.open.clear()
    leader = pool.submit(infer, cache, asked(1, id="leader"))
    assert model.arrived.acquire(timeout=10)
    others = follow(cache, pool, *((asked(1, id=str(n)), 30) for n in range(20)))
    model.open.set()

    assert not leader.result(10).cached
    for n, other in enumerate(others):
        answer = other.result(10)
        assert (answer.cached, answer.batch_size) == (True, 3)
        assert answer.cache_status == "tidegate; fwd=uri-miss; collapsed"
        assert result(answer).id == str(n)
    assert len(model.ran) == 1
    assert model.counts["collapsed"] == 20
    assert cache._following == 0


@pytest.mark.parametrize("raised", [True, False], ids=["raised", "answered"])
def test_those_who_waited_for_one_that_failed_start_over_and_one_of_them_runs(
    make: Make, model: Model, pool: ThreadPoolExecutor, raised: bool
) -> None:
    cache = make()
    model.open.clear()
    (model.raised if raised else model.errors)["leader"] = ModelFailed("no luck")
    leader = pool.submit(infer, cache, asked(1, id="leader"))
    assert model.arrived.acquire(timeout=10)
    others = follow(cache, pool, *((asked(1), 30) for _ in range(10)))
    model.open.set()

    assert leader.exception(10) if raised else leader.result(10).outcome
    for other in others:
        assert result(other.result(10)).version == "1"
    assert len(model.ran) == 2


def test_where_two_come_to_nothing_each_of_the_rest_runs_for_itself(
    make: Make, model: Model, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = make()
    followed: list[object] = []
    follow_flight = cache._follow

    def noted(call: Any, flight: Any) -> Any:
        followed.append(flight)
        return follow_flight(call, flight)

    monkeypatch.setattr(cache, "_follow", noted)
    model.permits = threading.Semaphore(0)
    model.errors["bad"] = ModelFailed("no luck")
    leader = pool.submit(infer, cache, asked(1, id="bad"))
    assert model.arrived.acquire(timeout=10)
    others = follow(cache, pool, *((asked(1, id="bad"), 30) for _ in range(5)))
    model.permits.release()
    assert isinstance(leader.result(10).outcome, ModelFailed)
    wait_for(lambda: len(model.ran) == 2)
    # All four have left the first flight, and wait for the second.
    wait_for(lambda: len(followed) == 5 + 4 and cache._following == 4 * 8)
    model.permits.release()

    # The four that are left, none of which has been answered.
    wait_for(lambda: len(model.ran) == 6)
    wait_for(lambda: sum(other.done() for other in others) == 1)
    model.permits.release(4)
    assert all(isinstance(other.result(10).outcome, ModelFailed) for other in others)
    assert len(model.ran) == 6


def test_each_waits_as_long_as_it_may_and_no_longer(
    make: Make, model: Model, pool: ThreadPoolExecutor
) -> None:
    cache = make()
    model.open.clear()
    leader = pool.submit(infer, cache, asked(1))
    assert model.arrived.acquire(timeout=10)
    patient, hasty = follow(cache, pool, (asked(1), 30), (asked(1), 0.2))

    assert isinstance(hasty.exception(10), DeadlineExceeded)
    assert not leader.done()
    assert not patient.done()
    model.open.set()
    assert not leader.result(10).cached
    assert patient.result(10).cached


def test_one_whose_time_is_over_takes_nobody_along(
    make: Make, model: Model, pool: ThreadPoolExecutor
) -> None:
    cache = make()
    model.open.clear()
    leader = pool.submit(infer, cache, asked(1), 0.5)
    assert model.arrived.acquire(timeout=10)
    (patient,) = follow(cache, pool, (asked(1), 30))

    assert isinstance(leader.exception(10), DeadlineExceeded)
    assert model.arrived.acquire(timeout=10), "it runs for itself"
    model.open.set()
    assert result(patient.result(10)).version == "1"


# Which version


def test_the_latest_is_asked_for_again_before_an_old_answer_is_given(
    make: Make, model: Model, clock: Clock
) -> None:
    cache = make()
    infer(cache, asked(1))
    model.told, model.version = described(version="2"), "2"
    clock.now += 6
    assert result(infer(cache, asked(1))).version == "2"
    assert len(model.ran) == 2
    assert infer(cache, asked(1)).cached


def test_an_answer_of_a_newer_version_is_not_kept_as_the_old_one(
    make: Make, model: Model, store: Store, pool: ThreadPoolExecutor
) -> None:
    cache = make()
    model.open.clear()
    leader = pool.submit(infer, cache, asked(1))
    assert model.arrived.acquire(timeout=10)
    (pinned,) = follow(cache, pool, (asked(1, id="pinned"), 30))
    model.told, model.version = described(version="2"), "2"
    model.open.set()

    assert result(leader.result(10)).version == "2"
    pinned.result(10)
    assert {one.id for one in model.ran} == {"", "pinned"}
    # It has heard of it, and asked what there is now.
    assert result(infer(cache, asked(1))).version == "2"
    assert infer(cache, asked(1)).cached


def test_another_configuration_makes_kept_answers_unreachable(
    make: Make, model: Model, clock: Clock
) -> None:
    cache = make()
    infer(cache, asked(1))
    model.told = described(max_batch_size=4)
    clock.now += 6
    assert not infer(cache, asked(1)).cached


# Who is left out


@pytest.mark.parametrize(
    "how",
    [{"store": False}, {"request": asked(1, parameters={"sequence_id": 1})}],
    ids=["no-store", "a sequence"],
)
def test_what_is_not_to_be_kept_neither_asks_nor_stores(
    make: Make, model: Model, store: Store, how: dict[str, Any]
) -> None:
    cache = make()
    request = how.pop("request", asked(1))
    for _ in range(2):
        assert infer(cache, request, **how).cache_status == "tidegate; fwd=bypass"
    assert len(model.ran) == 2
    assert (store.looks, model.counts["bypass"], model.counts["bytes"]) == (0, 2, 0)


def test_who_wants_it_fresh_gets_it_fresh_and_it_is_kept(make: Make, model: Model) -> None:
    cache = make()
    infer(cache, asked(1))
    answer = infer(cache, asked(1), fresh=True)
    assert (answer.cached, answer.cache_status) == (False, "tidegate; fwd=request; stored")
    assert infer(cache, asked(1)).cached
    assert len(model.ran) == 2


@pytest.mark.parametrize("told", [described(mark=""), Unavailable("nobody is there")])
def test_a_model_of_which_nothing_is_known_or_that_is_not_marked_is_run_each_time(
    make: Make, model: Model, told: Any
) -> None:
    model.told = told
    cache = make()
    for _ in range(2):
        assert infer(cache, asked(1)).cache_status == "tidegate; fwd=bypass"
    assert len(model.ran) == 2
