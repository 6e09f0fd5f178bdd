"""Settings are read once, whole, and refuse what cannot work."""

from __future__ import annotations

import dataclasses

import pytest

import config
from config import ConfigError

NEEDED = {
    "database_url": "postgresql://localhost/x",
    "redis_url": "redis://localhost",
    "objects_url": "file:///tmp/objects",
    "secret": "0123456789abcdef",
}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in config.Settings.__dataclass_fields__:
        monkeypatch.delenv(f"TIDEGATE_{field.upper()}", raising=False)


def test_everything_missing_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        config.load()
    for name in NEEDED:
        assert f"TIDEGATE_{name.upper()}" in str(refused.value)


def test_the_environment_fills_the_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEGATE_LEASE", "12.5")
    monkeypatch.setenv("TIDEGATE_BATCH_SLOTS", "7")
    monkeypatch.setenv("TIDEGATE_MONITORING", "false")
    settings = config.load(**NEEDED)
    assert (settings.lease, settings.batch_slots, settings.monitoring) == (12.5, 7, False)


@pytest.mark.parametrize(
    ("name", "text"),
    [("LEASE", "soon"), ("BATCH_SLOTS", "0"), ("CHUNK_ITEMS", "-1"), ("MONITORING", "perhaps")],
)
def test_a_wrong_value_is_refused_by_name(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"TIDEGATE_{name}", text)
    with pytest.raises(ConfigError, match=f"TIDEGATE_{name}"):
        config.load(**NEEDED)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"secret": "short"}, "TIDEGATE_SECRET"),
        ({"lease": 1.0, "sweep_interval": 1.0}, "TIDEGATE_LEASE"),
        ({"objects_url": "ftp://x"}, "TIDEGATE_OBJECTS_URL"),
        ({"realtime_timeout": 999.0}, "TIDEGATE_REALTIME_TIMEOUT"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(
    change: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        config.load(**(NEEDED | change))


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load(**NEEDED).lease = 1  # type: ignore[misc]


def test_the_triton_of_a_gpu_has_the_gpus_number_in_its_address() -> None:
    settings = config.load(**NEEDED, triton_url="127.0.0.1:80{gpu}1")
    assert settings.triton_address("2") == "127.0.0.1:8021"
    assert settings.triton_address("none") == "127.0.0.1:8001"
