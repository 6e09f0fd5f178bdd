"""Where a gateway listens, and where its processes count."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest

FOLDER = "PROMETHEUS_MULTIPROC_DIR"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Set first, so that it is put back whatever the configuration does to it.
    monkeypatch.setenv(FOLDER, "")
    monkeypatch.setenv("TIDEGATE_BIND", "0.0.0.0:8080,[::]:8080")
    monkeypatch.delenv("TIDEGATE_METRICS_BIND", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def read(root: Path) -> dict[str, Any]:
    return runpy.run_path(str(root / "web" / "gunicorn.py"))


def test_without_a_listener_for_metrics_there_is_no_folder(root: Path) -> None:
    assert read(root)["bind"] == ["0.0.0.0:8080", "[::]:8080"]
    assert os.environ[FOLDER] == ""


def test_metrics_have_a_listener_and_a_folder_that_a_reload_keeps(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_METRICS_BIND", "127.0.0.1:9090")
    assert read(root)["bind"][-1] == "127.0.0.1:9090"
    folder = os.environ[FOLDER]
    assert Path(folder).is_dir()
    found = read(root)
    assert os.environ[FOLDER] == folder
    found["on_exit"](None)
    assert not Path(folder).exists()


def test_one_that_takes_over_begins_its_own_folder_and_an_operators_is_left_alone(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TIDEGATE_METRICS_BIND", "127.0.0.1:9090")
    monkeypatch.setenv(FOLDER, str(tmp_path / "tidegate-metrics-1-x"))
    read(root)
    assert os.environ[FOLDER] != str(tmp_path / "tidegate-metrics-1-x")
    monkeypatch.setenv(FOLDER, str(tmp_path))
    read(root)["on_exit"](None)
    assert os.environ[FOLDER] == str(tmp_path)
    assert tmp_path.is_dir()


def test_tenants_and_operators_have_different_ports(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDEGATE_METRICS_BIND", "127.0.0.1:8080")
    with pytest.raises(ValueError, match="TIDEGATE_METRICS_BIND"):
        read(root)
