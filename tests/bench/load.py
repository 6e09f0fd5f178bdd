"""Load, by `wrk`: a process of its own, in C, so that it is not what is measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LUA = Path(__file__).with_name("load.lua")
TIMEOUT = 35
"""Seconds until wrk counts a request as timed out."""
MARK = "BENCH "
MISSING = "wrk is not installed: apt-get install wrk"


class LoadError(Exception):
    """The load could not be made, or nothing came of it; the message says why."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What came of one load. Times in milliseconds."""

    requests: int
    """Answers, of whatever status."""
    seconds: float
    bytes: int
    """Received."""
    p50: float
    p90: float
    p99: float
    longest: float
    connect: int
    read: int
    write: int
    status: int
    """Answers of 400 and above."""
    timeout: int
    statuses: Mapping[int, int] = field(default_factory=dict)
    """Answers by status, where that was asked for."""

    @classmethod
    def parse(cls, output: str) -> Tally:
        for line in reversed(output.splitlines()):
            if line.startswith(MARK):
                values: dict[str, Any] = json.loads(line.removeprefix(MARK))
                statuses = {int(status): count for status, count in values.pop("statuses").items()}
                return cls(**values, statuses=statuses)
        raise LoadError(f"wrk said nothing of what it did: {output.strip()[-500:]!r}")

    @property
    def errors(self) -> int:
        return self.connect + self.read + self.write + self.status + self.timeout

    @property
    def rate(self) -> float:
        """Answers a second that were none of an error."""
        return max(0, self.requests - self.status) / self.seconds

    def problem(self) -> str:
        """What went wrong, or nothing."""
        kinds = ("connect", "read", "write", "status", "timeout")
        found = [f"{kind} {count}" for kind in kinds if (count := getattr(self, kind))]
        if not found:
            return ""
        bad = [f"{count} × {status}" for status, count in sorted(self.statuses.items())]
        statuses = f" ({', '.join(bad)})" if bad else ""
        return f"{self.requests} answers, errors: {', '.join(found)}{statuses}"


@dataclass(frozen=True, slots=True)
class Shot:
    """What is sent, again and again."""

    url: str
    method: str = "GET"
    body: Path | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


def available() -> bool:
    return shutil.which("wrk") is not None


def fire(
    shot: Shot,
    *,
    connections: int,
    seconds: float,
    rate: float = 0,
    limit: int = 0,
    statuses: bool = False,
) -> Tally:
    """Send from so many connections for so long. `rate`: on a schedule of so many a second, not as
    fast as answers come. `limit`: until so many have been answered."""
    process = begin(
        shot,
        connections=connections,
        seconds=seconds,
        rate=rate,
        limit=limit,
        statuses=statuses,
    )
    return end(process, seconds)


def begin(
    shot: Shot,
    *,
    connections: int,
    seconds: float,
    rate: float = 0,
    limit: int = 0,
    statuses: bool = False,
) -> subprocess.Popen[str]:
    """The same, in the background; `end` gives what came of it."""
    if not available():
        raise LoadError(MISSING)
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s"]
    command += [f"--timeout={TIMEOUT}s", "-s", str(LUA)]
    for name, value in shot.headers.items():
        command += ["-H", f"{name}: {value}"]
    command += [shot.url, "--", shot.method, str(shot.body or "-")]
    command += [f"{rate:g}", str(limit), str(int(statuses))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end(process: subprocess.Popen[str], seconds: float) -> Tally:
    try:
        output, _ = process.communicate(timeout=seconds + TIMEOUT + 30)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        raise LoadError(f"wrk ended with {process.returncode}: {output.strip()[-500:]}")
    return Tally.parse(output)
