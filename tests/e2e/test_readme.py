"""The README's examples run, and print what the README says they print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ops.embedded import Stack

pytestmark = pytest.mark.stack

EXAMPLE = re.compile(
    r"<!-- run: (?P<kind>sh|python) -->\n```\w+\n(?P<code>.*?)```\n\n```text\n(?P<printed>.*?)```",
    re.DOTALL,
)
README = Path(__file__).resolve().parents[2] / "README.md"
EXAMPLES = [match.groupdict() for match in EXAMPLE.finditer(README.read_text())]


def test_the_readme_has_its_examples() -> None:
    assert [example["kind"] for example in EXAMPLES] == ["sh", "sh", *["python"] * 3]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: str(example["kind"]))
def test_an_example_prints_what_the_readme_says(
    example: dict[str, str], stack: Stack, root: Path
) -> None:
    if example["kind"] == "sh" and shutil.which("curl") is None:
        assert not os.environ.get("CI"), ".ci/run installs curl"
        pytest.skip("curl is not installed")
    code = example["code"].replace("var/tidegate.env", str(stack.var / "tidegate.env"))
    command = ["sh", "-euc", code] if example["kind"] == "sh" else [sys.executable, "-c", code]
    ran = subprocess.run(
        command,
        cwd=root,
        env={"PATH": os.environ["PATH"]} | ({} if example["kind"] == "sh" else stack.env),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == example["printed"].strip()
