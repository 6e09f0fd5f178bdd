"""Packs through the model, some under way at a time: while it runs one, the next is read and the
last one's answers are written."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from errors import Cancelled, DeadlineExceeded, Retry, TidegateError, Unavailable
from inference import packing
from inference.client import CancelToken
from inference.parts import may_be_one_members_fault
from inference.tensors import InferResult, Outcome
from tasks import attempts
from tasks.bootstrap import WorkerServices
from tasks.formats import Pack
from tasks.leases import Held

AHEAD = 4
"""Most packs under way at a time, and so in memory: enough to keep the model busy while one is read
and one is written."""
AHEAD_ALONE = 32
"""The same of packs that are one item each: the model takes no more, or these can't be merged."""
LESS = 4
"""While somebody waits for what the worker runs, only so small a part of these."""
FIRST = 2
"""Packs under way until the first is answered, and one more with each: of a slow model, not much is
under way when its time is up."""


class Answered(NamedTuple):
    """What became of a pack: one answer for all of it, or an error for each of its members."""

    pack: Pack
    outcome: Outcome


def run(services: WorkerServices, held: Held, packs: Iterator[Pack]) -> Iterator[Answered]:
    """Every pack's outcome, in the order they are read in; one that failed as a whole is run again
    member by member. Raises what is not the fault of what was run: then all of it is to be run
    again. Nothing is under way any more when this ends, however it does."""
    calls = CancelToken()
    held.token.then(calls.cancel)
    waiting: deque[tuple[Pack, Callable[[], Outcome]]] = deque()

    def start(pack: Pack) -> Callable[[], Outcome]:
        request = attempts.behind(services, pack.request)
        return services.server.start(request, held.until, calls)

    def receive() -> Iterator[Answered]:
        pack, wait = waiting.popleft()
        outcome = wait()
        if not _is_shared(pack, outcome):
            yield Answered(pack, _judged(services, held, pack, outcome))
            return
        # One by one, so that an item the model fails at does not fail its neighbours.
        for single, waits in [(single, start(single)) for single in pack.alone()]:
            yield Answered(single, _judged(services, held, single, waits()))

    now = FIRST
    since = time.monotonic()
    try:
        for pack in packs:
            if services.running.any():
                # The interpreter is theirs for as long as it has been ours: so a batch keeps half
                # of its speed, whatever else is asked.
                services.running.until_none(time.monotonic() - since)
            since = time.monotonic()
            if not waiting:
                attempts.allow(services, [held], pack.request.model)
            waiting.append((pack, start(pack)))
            most = AHEAD if len(pack.members) > 1 else AHEAD_ALONE
            if services.running.any():
                most //= LESS
            while len(waiting) >= min(now, most):
                yield from receive()
                now += 1
        while waiting:
            yield from receive()
    finally:
        calls.cancel()


def _judged(services: WorkerServices, held: Held, pack: Pack, outcome: Outcome) -> Outcome:
    """The outcome, where it is one of what was run. Raises it where it is one of this attempt."""
    services.budget.record(pack.request.model, away=isinstance(outcome, Unavailable))
    if isinstance(outcome, InferResult):
        return outcome
    error = held.blame(outcome)
    if error.retry is not Retry.NEVER or isinstance(error, Cancelled | DeadlineExceeded):
        raise error
    return error


def _is_shared(pack: Pack, outcome: Outcome) -> bool:
    """Is it one member's fault, perhaps, that there is no answer for each?"""
    if len(pack.members) == 1:
        return False
    if isinstance(outcome, TidegateError):
        return may_be_one_members_fault(outcome)
    try:
        for tensor in outcome.outputs:
            packing.check_rows(tensor, pack.rows)
    except packing.UnsplittableError:
        return True
    return False
