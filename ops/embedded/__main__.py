"""`python -m ops.embedded up`: the stack in the foreground, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from ops.embedded.ports import Ports
from ops.embedded.process import StackError
from ops.embedded.stack import ROOT, Interrupted, Stack

ECHO = 1.0
"""Seconds within which a second signal is the same wish: a terminal, or a kill of the group,
signals `make`, which passes it on, and us."""


class Wishes:
    """When we were asked to stop. Handlers only note it; the loops look."""

    def __init__(self) -> None:
        self._times: list[float] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: self._times.append(time.monotonic()))

    def stop(self) -> bool:
        return bool(self._times)

    def hurry(self) -> bool:
        return self.stop() and self._times[-1] - self._times[0] > ECHO


def say(line: str) -> None:
    print(line, flush=True)


def up(var: Path) -> int:
    """Run the stack until a signal. Returns the exit status."""
    wishes = Wishes()
    began = time.monotonic()
    try:
        with_ports = Ports.from_environ(os.environ)
        stack = Stack(var, with_ports, tell=say)
    except StackError as error:
        print(f"tidegate: {error}", file=sys.stderr)
        return 1
    status = 0
    try:
        say(f"Starting Tidegate on {stack.var}")
        stack.start(interrupted=wishes.stop)
        say(welcome(stack, time.monotonic() - began))
        stack.watch(wishes.stop)
    except Interrupted:
        pass
    except StackError as error:
        print(f"tidegate: {error}", file=sys.stderr, flush=True)
        status = 1
    finally:
        if wishes.stop():
            say("Stopping (again to hurry)")
        stack.stop(hurry=wishes.hurry)
    return status


def welcome(stack: Stack, took: float) -> str:
    env = stack.env
    return (
        f"Ready in {took:.1f} s. Ctrl-C stops everything.\n"
        f"  Gateway   {env['TIDEGATE_URL']}\n"
        f"  Flower    {env['TIDEGATE_FLOWER_URL']}  (user {env['TIDEGATE_FLOWER_USER']})\n"
        f"  Keys      {stack.var / 'tidegate.env'}\n"
        f"  Logs      {stack.var / 'logs'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ops.embedded", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("up", help="start everything and stay in the foreground")
    command.add_argument(
        "--var", type=Path, default=ROOT / "var", help="folder of all state (default: %(default)s)"
    )
    return up(parser.parse_args().var)


if __name__ == "__main__":
    sys.exit(main())
