"""`var/tidegate.env`: how to reach a running stack, for shells and programs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from ops.embedded.credentials import write_private

HEAD = "# How to reach the running stack. `set -a; . var/tidegate.env` puts it into a shell.\n"


def write(path: Path, values: Mapping[str, str]) -> None:
    lines = (f"{name}={shlex.quote(value)}\n" for name, value in values.items())
    write_private(path, HEAD + "".join(lines))


def read(path: Path) -> dict[str, str]:
    """What `write` wrote."""
    words = shlex.split(path.read_text(), comments=True)
    return dict(word.split("=", 1) for word in words)
