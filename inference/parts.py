"""Requests that run together, and which of them have come to an end: whoever's call is over need
not wait for the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from errors import Cancelled, DeadlineExceeded, ModelNotFound, TidegateError, Unavailable
from inference import packing
from inference.deadline import CancelToken, Deadline
from inference.tensors import InferRequest, Outcome

LATE = "the time for this request is over"
CALLED_OFF = "the request was called off"


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call to a server, and the requests it is for."""

    pack: packing.Pack
    deadline: Deadline
    """The last of theirs."""
    token: CancelToken | None
    again: bool = False
    """Its connection was lost, and it is sent once more."""


class Parts:
    """The outcomes of some requests, handed out part by part. Not thread-safe."""

    def __init__(
        self,
        requests: Sequence[InferRequest],
        deadlines: Sequence[Deadline],
        cancelled: Sequence[CancelToken] | None,
    ):
        self._requests = requests
        self._deadlines = deadlines
        self._cancelled = cancelled
        self._open = set(range(len(requests)))
        self._short: set[int] = set()
        """Of the open ones those whose time is over before their call's is."""
        self._part: dict[int, Outcome] = {}

    def call(self, pack: packing.Pack) -> Call:
        """The call for a pack, whose members count through all requests."""
        places = [member.index for member in pack.members]
        deadline = max((self._deadlines[place] for place in places), key=lambda one: one.at)
        self._short.update(place for place in places if self._deadlines[place].at < deadline.at)
        token = None
        if self._cancelled is not None:
            token = CancelToken.all_of(self._cancelled[place] for place in places)
        return Call(pack, deadline, token)

    def settle(self, call: Call, outcome: Outcome) -> list[Call]:
        """Take note of what a call came to. Returns the calls to make instead, one a member, so
        that a request the model fails at does not fail its neighbours."""
        places = [member.index for member in call.pack.members]
        if isinstance(outcome, TidegateError):
            if call.pack.merged and may_be_one_members_fault(outcome):
                return self._alone(places)
            shares: Sequence[Outcome] = [outcome] * len(places)
        else:
            try:
                shares = packing.split(call.pack, outcome)
            except packing.UnsplittableError:
                return self._alone(places)
        for place, share in zip(places, shares, strict=True):
            self._put(place, share)
        return []

    def _alone(self, places: Sequence[int]) -> list[Call]:
        return [
            self.call(packing.single(self._requests[place], place))
            for place in places
            if place in self._open
        ]

    def _put(self, place: int, outcome: Outcome) -> None:
        """The first outcome counts: the answer of a call may come after a member's time."""
        if place in self._open:
            self._open.discard(place)
            self._short.discard(place)
            self._part[place] = outcome

    def expire(self) -> None:
        """Give up those whose own time is over, though the call they share goes on."""
        for place in [place for place in self._short if self._deadlines[place].expired()]:
            self._put(place, DeadlineExceeded(LATE))

    def next_expiry(self) -> float:
        """Seconds until `expire` has something to do; infinite where it never will."""
        return min((self._deadlines[place].remaining() for place in self._short), default=math.inf)

    @property
    def any(self) -> bool:
        """Is there a part to hand out?"""
        return bool(self._part)

    def take(self) -> dict[int, Outcome]:
        """The outcomes that have not been handed out yet, by their requests' places."""
        part, self._part = self._part, {}
        if self._cancelled is not None:
            for place in part:
                if self._cancelled[place].cancelled:
                    part[place] = Cancelled(CALLED_OFF)
        return part


def may_be_one_members_fault(error: TidegateError) -> bool:
    """Of several that shared a call; the others may do better alone."""
    return not isinstance(error, Unavailable | DeadlineExceeded | Cancelled | ModelNotFound)
