"""`make demo` shows what it says, on a running stack and on one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ops.embedded import Stack

pytestmark = pytest.mark.stack


def demo(root: Path, var: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ops.demo", "--var", str(var)],
        cwd=root,
        env={"PATH": os.environ["PATH"], "TIDEGATE_PORT": "0", "TIDEGATE_FLOWER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_demo_on_a_running_stack_leaves_it_running(stack: Stack, root: Path) -> None:
    ran = demo(root, stack.var)
    assert ran.returncode == 0, ran.stderr
    assert f"Using the stack at {stack.env['TIDEGATE_URL']}" in ran.stdout
    assert stack.alive("gateway")


def test_the_demo_starts_what_it_needs_and_stops_it(root: Path, tmp_path: Path) -> None:
    var = tmp_path / "var"
    ran = demo(root, var)
    assert ran.returncode == 0, ran.stderr
    accuracy = re.search(r"([\d.]+)% right on the 600 images the model was not trained", ran.stdout)
    assert accuracy
    assert float(accuracy[1]) >= 95
    assert "1797/1797 items" in ran.stdout
    assert not (var / "tidegate.env").exists()
    left = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any(str(var) in word for word in process.info["cmdline"] or ())
    ]
    assert left == []


def test_the_demo_that_cannot_start_says_why(root: Path, stack: Stack, tmp_path: Path) -> None:
    taken = str(stack.ports.gateway)
    ran = subprocess.run(
        [sys.executable, "-m", "ops.demo", "--var", str(tmp_path / "var")],
        cwd=root,
        env={"PATH": os.environ["PATH"], "TIDEGATE_PORT": taken},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert f"port {taken} for gateway is taken" in ran.stderr
