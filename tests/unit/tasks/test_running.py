"""Batches can tell whether somebody waits for what their worker runs, and wait for those first."""

from __future__ import annotations

import threading
import time
from typing import Any

from tasks.running import Running


def running() -> Running:
    silent: Any = None
    return Running(silent, "worker", every=3600)


def test_somebody_waits_while_any_message_is_run() -> None:
    one = running()
    assert not one.any()
    with one.message(b"a"):
        with one.message(b"b"):
            assert one.any()
        assert one.any()
    assert not one.any()


def test_who_lets_them_go_first_goes_on_when_the_last_is_done() -> None:
    one = running()
    ended = threading.Event()

    def batch() -> None:
        one.until_none(60)
        ended.set()

    with one.message(b"a"):
        with one.message(b"b"):
            threading.Thread(target=batch, daemon=True).start()
        time.sleep(0.05)
        assert not ended.is_set()
    assert ended.wait(10)


def test_who_has_waited_long_enough_goes_on() -> None:
    one = running()
    with one.message(b"a"):
        one.until_none(0.01)
        assert one.any()


def test_nobody_waits_for_nobody() -> None:
    one = running()
    with one.message(b"a"):
        pass
    one.until_none(3600)
