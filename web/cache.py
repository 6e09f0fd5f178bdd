"""Answers given again, for models that say that the same input has the same answer.

    request ─▶ key ─▶ this process's memory ─▶ the same request in flight? ─▶ Redis ─▶ the model
                          hit                      wait for its answer         hit     keep it

A model is marked in its configuration (`inference.metadata.CACHE`); nothing else comes here. The
key is over everything that the answer depends on, byte for byte, and over the tenant: were answers
shared between tenants, the time an answer takes would tell one what another has asked.

Only answers are kept, never errors. What is kept is one frame an answer, as it lies in Redis, so
that its bytes are all it holds on to.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace
from typing import Protocol
from uuid import UUID

import orjson
import structlog

from errors import DeadlineExceeded, TidegateError
from inference import frames
from inference.metadata import ModelSpec
from inference.tensors import InferRequest, InferResult
from web.answers import PARTS, SharedAnswers
from web.catalog import Catalog
from web.flight import Answer
from web.offload import offload

log = structlog.get_logger(__name__)

OVERHEAD = 512
"""Bytes a kept answer takes besides its frame."""
LARGE = 1 << 20
"""Bytes of input from which on a key is not worked out on the event loop."""
MAX_FOLLOWING_BYTES = 256 << 20
"""Input bytes of requests that wait for another's answer; beyond it each is sent for itself, and
what that may come to is the lane's to say."""
CATALOG_PATIENCE = 1.0
"""Seconds a request waits to hear which version is the latest, before it is run uncached."""

_SEQUENCE = frozenset(("sequence_id", "sequence_start", "sequence_end"))


def cacheable(request: InferRequest) -> bool:
    """Does the answer depend on nothing but the request? Not where it is one of a sequence."""
    return _SEQUENCE.isdisjoint(request.parameters)


def key_of(request: InferRequest, spec: ModelSpec, *, tenant: UUID, group: str) -> bytes:
    """The same for two requests exactly where nothing the answer depends on is different.

    In what form the client sent the tensors and wants them back, in which order the inputs came,
    the request's id, deadline and priority are no part of it. `spec` says which version is meant by
    "the latest".
    """
    inputs = sorted(request.inputs, key=lambda tensor: tensor.name)
    parameters = sorted(request.parameters.items())
    text = orjson.dumps(
        [
            tenant.hex,
            group,
            request.model,
            request.version or spec.version,
            spec.revision,
            [(tensor.name, tensor.datatype, tensor.shape, len(tensor.data)) for tensor in inputs],
            request.outputs,
            [pair for pair in parameters if pair[0] != "priority"],
        ]
    )
    digest = hashlib.sha256(text)
    # Where the array ends is in it, and with the lengths in it so is where each tensor does.
    for tensor in inputs:
        digest.update(tensor.data)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Kept:
    """A frame, and the seconds for which it may still be given."""

    frame: bytes
    left: float


class Memory:
    """Answers in this process: those used last, within so many bytes. Not safe to share between
    threads."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic):
        self.most = limit // PARTS
        """Bytes of the largest frame it takes."""
        self.bytes = 0
        self._limit = limit
        self._clock = clock
        self._kept: OrderedDict[bytes, tuple[bytes, float]] = OrderedDict()
        """Frames, and when they end; the one used last is the last."""

    def get(self, key: bytes) -> Kept | None:
        found = self._kept.get(key)
        if found is None:
            return None
        frame, until = found
        left = until - self._clock()
        if left <= 0:
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return Kept(frame, left)

    def put(self, key: bytes, frame: bytes, ttl: float) -> bool:
        """False for one that is too large."""
        if len(frame) > self.most:
            return False
        if key in self._kept:
            self._drop(key)
        self._kept[key] = (frame, self._clock() + ttl)
        self.bytes += len(frame) + OVERHEAD
        while self.bytes > self._limit:
            self._drop(next(iter(self._kept)))
        return True

    def _drop(self, key: bytes) -> None:
        frame, _ = self._kept.pop(key)
        self.bytes -= len(frame) + OVERHEAD


class Lane(Protocol):
    """What runs a request: `web.lane.RealtimeLane`."""

    def infer(self, request: InferRequest, timeout: float) -> Answer: ...


class Tally(Protocol):
    """Who counts: `web.metrics.Metrics`."""

    def cache_asked(self, model: str, outcome: str) -> None: ...
    def cache_stored(self, model: str, size: int) -> None: ...
    def cache_holds(self, size: int) -> None: ...


@dataclass(frozen=True, slots=True)
class _Call:
    request: InferRequest
    spec: ModelSpec
    key: bytes
    size: int
    """Bytes of input."""
    timeout: float
    until: float


class ResponseCache:
    """Of requests with one key that are in flight at one time, one runs (single flight).

    Each waits for the answer within its own deadline. Where the one that runs comes to nothing,
    the others start over, and one of them runs; where that comes to nothing too, each of the rest
    runs for itself: one's trouble is never another's, and many don't try one after the other.
    """

    def __init__(
        self,
        lane: Lane,
        catalog: Catalog,
        shared: SharedAnswers,
        tally: Tally,
        *,
        group: str,
        limit: int,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`limit` is bytes in this process."""
        self._lane = lane
        self._catalog = catalog
        self._shared = shared
        self._tally = tally
        self._group = group
        self._clock = clock
        self._memory = Memory(limit, clock)
        self._flights: dict[bytes, Future[Answer | None]] = {}
        self._following = 0
        self._lock = threading.Lock()

    def infer(
        self,
        request: InferRequest,
        timeout: float,
        *,
        tenant: UUID,
        fresh: bool = False,
        store: bool = True,
    ) -> Answer:
        """As `RealtimeLane.infer`, for a marked model. `fresh`: run it, whatever is kept; `store`
        False: as if there were no cache."""
        until = self._clock() + timeout
        spec = self._spec(request, timeout) if store and cacheable(request) else None
        if spec is None:
            self._tally.cache_asked(request.model, "bypass")
            answer = self._lane.infer(request, self._left(until))
            return replace(answer, cache_status="tidegate; fwd=bypass")
        size = sum(len(tensor.data) for tensor in request.inputs)
        if size < LARGE:
            key = key_of(request, spec, tenant=tenant, group=self._group)
        else:
            key = offload(key_of, request, spec, tenant=tenant, group=self._group)
        call = _Call(request, spec, key, size, timeout, until)
        if fresh:
            return self._run(call, "request")
        for _ in range(2):
            with self._lock:
                kept = self._memory.get(key)
                flight = self._flights.get(key)
                leads = kept is None and flight is None
                if flight is None:
                    flight = Future()
                if leads:
                    self._flights[key] = flight
            if kept is not None:
                return self._hit(call, _result(kept.frame), kept.left, "memory")
            answered = self._lead(call, flight) if leads else self._follow(call, flight)
            if answered is not None:
                return answered
        return self._run(call, "uri-miss")

    def _spec(self, request: InferRequest, timeout: float) -> ModelSpec | None:
        """What the model is like now, and not some seconds ago: "the latest" may be another
        version since. None where that can't be known, or it is not marked any more."""
        try:
            spec = self._catalog.current(
                request.model, request.version, timeout=min(timeout / 2, CATALOG_PATIENCE)
            ).spec
        except TidegateError:
            return None
        return spec if spec.cache_ttl else None

    def _lead(self, call: _Call, flight: Future[Answer | None]) -> Answer:
        answer = None
        try:
            answer = self._look(call) or self._run(call, "uri-miss")
            return answer
        finally:
            # It is kept by now: who comes from here on finds it.
            with self._lock:
                del self._flights[call.key]
            flight.set_result(answer if answer and _is_of(call, answer.outcome) else None)

    def _follow(self, call: _Call, flight: Future[Answer | None]) -> Answer | None:
        """The answer to the same request; None where it came to nothing, or too many wait."""
        with self._lock:
            if self._following + call.size > MAX_FOLLOWING_BYTES:
                return None
            self._following += call.size
        try:
            answer = flight.result(self._left(call.until))
        except FutureTimeout:
            raise DeadlineExceeded(f"no answer within {call.timeout:g} s") from None
        finally:
            with self._lock:
                self._following -= call.size
        if answer is None:
            return None
        assert isinstance(answer.outcome, InferResult)
        self._tally.cache_asked(call.request.model, "hit" if answer.cached else "collapsed")
        return replace(
            answer,
            outcome=replace(answer.outcome, id=call.request.id),
            cached=True,
            cache_status=(
                answer.cache_status if answer.cached else "tidegate; fwd=uri-miss; collapsed"
            ),
        )

    def _look(self, call: _Call) -> Answer | None:
        """What another gateway has kept."""
        blob = self._shared.get(call.key, self._left(call.until) / 2)
        if blob is None:
            return None
        try:
            result = _result(blob.data)
        except TidegateError as error:
            log.warning("kept answer not read", action="cache.unread", error=error.message)
            return None
        self._remember(call.key, blob.data, blob.remaining)
        return self._hit(call, result, blob.remaining, "redis")

    def _hit(self, call: _Call, result: InferResult, left: float, where: str) -> Answer:
        self._tally.cache_asked(call.request.model, "hit")
        return Answer(
            replace(result, id=call.request.id),
            batch_size=0,
            cached=True,
            cache_status=f"tidegate; hit; ttl={int(left)}; detail={where}",
        )

    def _run(self, call: _Call, why: str) -> Answer:
        self._tally.cache_asked(call.request.model, "miss")
        answer = self._lane.infer(call.request, self._left(call.until))
        stored = "; stored" if self._keep(call, answer.outcome) else ""
        return replace(answer, cache_status=f"tidegate; fwd={why}{stored}")

    def _keep(self, call: _Call, outcome: InferResult | TidegateError) -> bool:
        if not isinstance(outcome, InferResult):
            return False
        if not _is_of(call, outcome):
            # A newer version has been loaded a moment ago.
            self._catalog.forget(call.request.model, call.request.version)
            return False
        size = sum(len(tensor.data) for tensor in outcome.outputs)
        if size > max(self._memory.most, self._shared.most):
            return False
        frame = frames.encode_outcomes([replace(outcome, id="")])
        ttl = call.spec.cache_ttl
        kept = self._remember(call.key, frame, ttl)
        shared = self._shared.put(call.key, frame, ttl)
        if kept or shared:
            self._tally.cache_stored(call.request.model, len(frame))
        return kept or shared

    def _remember(self, key: bytes, frame: bytes, ttl: float) -> bool:
        with self._lock:
            kept = self._memory.put(key, frame, ttl)
            held = self._memory.bytes
        self._tally.cache_holds(held)
        return kept

    def _left(self, until: float) -> float:
        return max(0.001, until - self._clock())

    def stop(self) -> None:
        self._shared.stop()


def _is_of(call: _Call, outcome: InferResult | TidegateError) -> bool:
    """It is an answer, and by the version that the key says."""
    version = call.request.version or call.spec.version
    return isinstance(outcome, InferResult) and outcome.version == version


def _result(frame: bytes) -> InferResult:
    """Raises `BadBody`."""
    (found,) = frames.decode_outcomes(frame)
    if isinstance(found, TidegateError):
        raise found
    return found
