"""One question to Redis for all messages that take long, and none while there are none."""

from __future__ import annotations

import threading

import pytest

from errors import Unavailable
from storage.redis_state import Where
from web.lookout import Lookout


class Messages:
    """Stands for a coalescer."""

    def __init__(self, *names: bytes):
        self.names = list(names)
        self.found: dict[bytes, Where] = {}
        self.told = threading.Event()

    def overdue(self) -> list[bytes]:
        return self.names

    def seen(self, message: bytes, where: Where) -> None:
        self.found[message] = where
        self.told.set()


class State:
    def __init__(self) -> None:
        self.asked: list[list[bytes]] = []
        self.away = 0

    def whereabouts(self, messages: list[bytes]) -> list[Where]:
        self.asked.append(messages)
        if self.away:
            self.away -= 1
            raise Unavailable("away")
        return [Where.RUNNING if name == b"r" else Where.NOWHERE for name in messages]


def lookout(state: State, *coalescers: Messages) -> Lookout:
    return Lookout(state, lambda: coalescers, every=0.01)  # type: ignore[arg-type, return-value]


def test_all_models_are_asked_about_together() -> None:
    state, one, two = State(), Messages(b"a", b"r"), Messages(b"b")
    lookout(state, one, two).look()
    assert state.asked == [[b"a", b"r", b"b"]]
    assert one.found == {b"a": Where.NOWHERE, b"r": Where.RUNNING}
    assert two.found == {b"b": Where.NOWHERE}


def test_while_answers_come_quickly_nothing_is_asked() -> None:
    state = State()
    lookout(state, Messages(), Messages()).look()
    assert state.asked == []


def test_what_can_not_be_seen_is_not_lost() -> None:
    state, one = State(), Messages(b"a")
    state.away = 1
    with pytest.raises(Unavailable):
        lookout(state, one).look()
    assert one.found == {}


def test_it_goes_on_when_redis_comes_back() -> None:
    state, one = State(), Messages(b"a")
    state.away = 3
    watching = lookout(state, one)
    watching.start()
    watching.start()
    assert one.told.wait(10)
    watching.stop()
