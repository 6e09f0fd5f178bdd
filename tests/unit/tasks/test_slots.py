"""Slots: alone means alone, and a slot that does not come back ends the process."""

from __future__ import annotations

import threading

from tasks.slots import STUCK, Slots, Watchdog

PATIENCE = 10.0


def test_one_alone_waits_for_the_others_and_newcomers_wait_for_it() -> None:
    slots = Slots()
    order: list[str] = []
    first_in, first_may_end, alone_in, alone_may_end = (threading.Event() for _ in range(4))

    def first() -> None:
        with slots.taken(alone=False):
            order.append("first")
            first_in.set()
            first_may_end.wait(PATIENCE)
            order.append("first ends")

    def alone() -> None:
        with slots.taken(alone=True):
            order.append("alone")
            alone_in.set()
            alone_may_end.wait(PATIENCE)
            order.append("alone ends")

    def last() -> None:
        with slots.taken(alone=False):
            order.append("last")

    threads = [threading.Thread(target=run) for run in (first, alone, last)]
    threads[0].start()
    assert first_in.wait(PATIENCE)
    threads[1].start()
    while not slots._waiting:
        threading.Event().wait(0.001)
    threads[2].start()
    first_may_end.set()
    assert alone_in.wait(PATIENCE)
    alone_may_end.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert order == ["first", "first ends", "alone", "alone ends", "last"]


def test_several_run_side_by_side_and_a_failing_one_gives_its_place_back() -> None:
    slots = Slots()
    try:
        with slots.taken(alone=False), slots.taken(alone=False):
            raise ValueError
    except ValueError:
        pass
    with slots.taken(alone=True):
        assert slots._running == 0


def test_a_slot_that_overruns_ends_the_process_and_one_that_came_back_does_not() -> None:
    now = [0.0]
    ended: list[int] = []
    watchdog = Watchdog(clock=lambda: now[0], end=ended.append)
    with watchdog.watching("quick", 5):
        now[0] = 4.9
        watchdog.look()
    now[0] = 20
    watchdog.look()
    assert ended == []
    with watchdog.watching("slow", 5):
        now[0] = 25.1
        watchdog.look()
    assert ended == [STUCK]
    watchdog.stop()
