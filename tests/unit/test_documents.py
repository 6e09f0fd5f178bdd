"""What is written beside the code says what the code does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from config import Settings
from web import gunicorn

REGISTRY = re.compile(r"https?://[^\s/]*(?:py" r"pi|python" r"hosted|npm" r"js)\.")


def test_the_settings_table_names_every_setting_and_no_other(root: Path) -> None:
    table = (root / "docs/operations.md").read_text().split("## Settings")[1]
    rows = re.findall(r"^\| `TIDEGATE_([A-Z_]+)` \|", table, re.MULTILINE)
    assert sorted(rows) == sorted(name.upper() for name in Settings.__dataclass_fields__)


@pytest.fixture(scope="module")
def compose(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((root / "docker-compose.yml").read_text())
    return found


def test_compose_sets_only_variables_that_are_read(compose: dict[str, Any]) -> None:
    known = {f"TIDEGATE_{name.upper()}" for name in Settings.__dataclass_fields__}
    known |= {"TIDEGATE_BIND", "FLOWER_BASIC_AUTH"}
    for name in ("gateway", "worker", "sweeper", "flower", "migrate"):
        assert set(compose["services"][name]["environment"]) <= known


def test_compose_starts_modules_that_exist(compose: dict[str, Any], root: Path) -> None:
    services = compose["services"]
    assert services["gateway"]["command"][2:] == ["web/gunicorn.py", "web.wsgi:app"]
    for service in services.values():
        command = service.get("command", [])
        if command[:2] == ["python", "-m"]:
            module = root / command[2].replace(".", "/")
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()


def test_compose_gives_a_gateway_the_time_it_takes_to_stop(compose: dict[str, Any]) -> None:
    grace = int(compose["services"]["gateway"]["stop_grace_period"].removesuffix("s"))
    assert grace > gunicorn.graceful_timeout


def test_compose_publishes_ports_on_loopback_only(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_lock_files_hold_hashes_and_no_addresses(root: Path) -> None:
    for lock in (root / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "--hash=sha256:" in text
        assert not REGISTRY.search(text)


def test_links_between_documents_lead_somewhere(root: Path) -> None:
    for document in [root / "README.md", root / "CHANGELOG.md", *(root / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
