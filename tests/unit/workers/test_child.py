"""The process that a worker keeps running beside itself, here of a few lines each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.helpers import until
from workers import child
from workers.child import Child

MARK = "import os, sys, signal, time; open(sys.argv[1], 'a').write(f'{os.getpid()}\\n')\n"
WAITS = MARK + "time.sleep(600)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS
FOLLOWS = (
    """
import sys
from workers import child
child.follow(int(sys.argv[2]))
"""
    + WAITS
)

Make = Callable[..., Child]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Where each process that is started writes its id."""
    return tmp_path / "notes"


def started(notes: Path) -> list[int]:
    return [int(word) for word in notes.read_text().split()] if notes.exists() else []


@pytest.fixture
def make(notes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes a child of some lines of Python; it is gone at the end."""
    monkeypatch.setattr(child, "PAUSE", 0.05)
    made: list[Child] = []

    def build(program: str, *arguments: str) -> Child:
        made.append(Child([sys.executable, "-c", program, str(notes), *arguments]))
        made[-1].start()
        return made[-1]

    yield build
    for one in made:
        one.terminate()


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_ends_is_started_again(make: Make, notes: Path) -> None:
    make(MARK + "sys.exit(70)")

    first, second, *_ = until(lambda: started(notes), 20, lambda found: len(found) > 2)
    assert first != second


def test_what_is_killed_is_started_again(make: Make, notes: Path) -> None:
    make(WAITS)
    (first,) = until(lambda: started(notes), 20)
    os.kill(first, signal.SIGKILL)

    until(lambda: started(notes), 20, lambda found: len(found) == 2)


def test_what_can_not_be_started_is_tried_again(tmp_path: Path, notes: Path) -> None:
    program = tmp_path / "program"
    one = Child([str(program)])
    one.start()
    try:
        program.write_text(f"#!{sys.executable}\nopen({str(notes)!r}, 'a').write('1')\n")
        program.chmod(0o700)
        until(lambda: started(notes), 20)
    finally:
        one.terminate()


def test_what_was_told_to_end_ends_and_is_not_started_again(make: Make, notes: Path) -> None:
    one = make(WAITS)
    (pid,) = until(lambda: started(notes), 20)
    one.tell(signal.SIGTERM)
    one.stop()

    assert gone(pid)
    assert started(notes) == [pid]


def test_what_is_between_two_lives_is_not_waited_for(
    make: Make, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "PAUSE", 600.0)
    monkeypatch.setattr(child, "LONGEST", 600.0)
    one = make(MARK)
    (pid,) = until(lambda: started(notes), 20)
    until(lambda: gone(pid), 20)
    one.stop()

    assert started(notes) == [pid]


def test_what_does_not_end_in_time_is_killed(
    make: Make, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "PATIENCE", 0.5)
    one = make(STUBBORN)
    (pid,) = until(lambda: started(notes), 20)
    one.stop()

    assert gone(pid)


def test_what_follows_a_process_stands_back_for_it(make: Make, notes: Path) -> None:
    make(FOLLOWS, str(os.getpid()))
    (pid,) = until(lambda: started(notes), 20)

    assert psutil.Process(pid).nice() == min(19, psutil.Process().nice() + child.NICE)
    weight = Path(f"/proc/{pid}/autogroup")
    if weight.exists() and os.geteuid() == 0:
        assert weight.read_text().split()[-1] == str(child.NICE)


def test_what_follows_a_process_that_is_gone_ends_before_it_begins(notes: Path) -> None:
    orphan = subprocess.run(
        [sys.executable, "-c", FOLLOWS, str(notes), "1"], capture_output=True, text=True, timeout=60
    )

    assert orphan.returncode == 1
    assert "the worker ended" in orphan.stderr
    assert started(notes) == []
