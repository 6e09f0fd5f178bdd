"""What a gateway knows about models: asked once, shared, and never in anybody's way."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from errors import ModelNotFound, Unavailable
from web.catalog import Catalog

TOLD = {"metadata": {"name": "m", "versions": ["1"]}, "config": {"max_batch_size": 8}}


class Workers:
    """Answers queries when told to."""

    def __init__(self) -> None:
        self.asked = 0
        self.answer: Any = TOLD
        self.open = threading.Event()
        self.open.set()
        self.now = 0.0

    def query(self, _op: str, _model: str, _version: str) -> Any:
        self.asked += 1
        assert self.open.wait(10)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def catalog(self) -> Catalog:
        return Catalog(self.query, ttl=5, clock=lambda: self.now)


@pytest.fixture
def workers() -> Workers:
    return Workers()


def test_an_entry_is_asked_for_once_while_it_is_fresh(workers: Workers) -> None:
    catalog = workers.catalog()
    assert catalog.get("m").spec.max_batch_size == 8
    assert catalog.get("m").spec.max_batch_size == 8
    assert workers.asked == 1


def test_many_who_want_it_at_once_share_one_question_and_its_error(workers: Workers) -> None:
    workers.open.clear()
    workers.answer = ModelNotFound("nobody knows it")
    catalog = workers.catalog()
    heard: list[str] = []

    def ask() -> None:
        try:
            catalog.get("m", timeout=10)
        except ModelNotFound as error:
            heard.append(error.message)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    while not workers.asked:
        threading.Event().wait(0.01)
    threading.Event().wait(0.1)  # let the others arrive; one who is late only asks again
    workers.open.set()
    for thread in threads:
        thread.join()
    assert heard == ["nobody knows it"] * 8
    assert workers.asked < 8


def test_an_old_entry_serves_on_while_a_newer_one_is_asked_for(workers: Workers) -> None:
    catalog = workers.catalog()
    catalog.get("m")
    workers.now = 6
    workers.open.clear()
    assert catalog.get("m", timeout=0).spec.max_batch_size == 8
    workers.open.set()


def test_a_very_old_entry_serves_only_where_nobody_can_be_asked(workers: Workers) -> None:
    catalog = workers.catalog()
    catalog.get("m")
    workers.now = 1000
    workers.answer = TOLD | {"config": {"max_batch_size": 16}}
    assert catalog.get("m").spec.max_batch_size == 16
    workers.now = 2000
    workers.answer = Unavailable("away")
    assert catalog.get("m").spec.max_batch_size == 16


def test_who_cannot_wait_is_told_so_and_the_answer_serves_the_next(workers: Workers) -> None:
    workers.open.clear()
    catalog = workers.catalog()
    with pytest.raises(Unavailable):
        catalog.get("m", timeout=0.01)
    workers.open.set()
    assert catalog.get("m").spec.max_batch_size == 8


def test_a_model_that_went_away_is_forgotten(workers: Workers) -> None:
    catalog = workers.catalog()
    catalog.get("m")
    workers.answer = ModelNotFound("gone")
    catalog.forget("m")
    with pytest.raises(ModelNotFound):
        catalog.get("m")


def test_workers_that_are_away_do_not_make_it_forget(workers: Workers) -> None:
    catalog = workers.catalog()
    catalog.get("m")
    workers.now = 6
    workers.answer = Unavailable("away")
    for _ in range(3):
        assert catalog.get("m").spec.max_batch_size == 8


def test_who_wants_it_current_waits_for_the_answer(workers: Workers) -> None:
    catalog = workers.catalog()
    catalog.get("m")
    workers.now = 6
    workers.answer = TOLD | {"config": {"max_batch_size": 16}}
    assert catalog.current("m").spec.max_batch_size == 16


def test_it_is_asked_for_before_it_is_old(workers: Workers) -> None:
    catalog = workers.catalog()
    catalog.get("m")
    workers.now = 2
    catalog.current("m")
    assert workers.asked == 1
    workers.now = 4
    workers.open.clear()
    workers.answer = TOLD | {"config": {"max_batch_size": 16}}
    assert catalog.current("m", timeout=0).spec.max_batch_size == 8
    workers.open.set()
    while catalog.current("m").spec.max_batch_size == 8:
        threading.Event().wait(0.01)
    assert workers.asked == 2


def test_nobody_gets_an_old_entry_for_a_current_one(workers: Workers) -> None:
    catalog = workers.catalog()
    catalog.get("m")
    workers.now = 6
    workers.answer = Unavailable("nobody is there")
    with pytest.raises(Unavailable):
        catalog.current("m")
    workers.open.clear()
    with pytest.raises(Unavailable):
        catalog.current("m", timeout=0.01)
    workers.open.set()
