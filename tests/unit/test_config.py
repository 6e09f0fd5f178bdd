"""Settings are read once, whole, and refuse what cannot work."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

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
        ({"metrics_bind": "9090"}, "TIDEGATE_METRICS_BIND"),
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


def test_a_bucket_is_read_from_its_url() -> None:
    found = config.parse_objects(
        "s3://AK%2FIA:se%2Bcr%40et%25@s3.example.com:9000/my.bucket-1?region=eu-1&secure=false"
    )
    assert found == config.Bucket(
        "s3.example.com:9000", "my.bucket-1", "AK/IA", "se+cr@et%", "eu-1", False
    )
    assert config.parse_objects("s3://a:b@host/bucket") == config.Bucket(
        "host", "bucket", "a", "b", "us-east-1", True
    )
    assert config.parse_objects("s3://a:b@[::1]:9000/bucket") == config.Bucket(
        "[::1]:9000", "bucket", "a", "b"
    )
    assert config.parse_objects("file:///a/b") == Path("/a/b")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "file:///absolute/folder or s3://"),
        ("file://relative", "file:///absolute/folder or s3://"),
        ("http://key:hunter2@host/bucket", "file:///absolute/folder or s3://"),
        ("s3://host/bucket", "both keys"),
        ("s3://key@host/bucket", "both keys"),
        ("s3://key:hunter2@/bucket", "needs a host"),
        ("s3://key:hunter2/more@host/bucket", "%2F"),
        ("s3://key:hunter2@host:port/bucket", "needs a host"),
        ("s3://key:hunter2@host", "name of one bucket"),
        ("s3://key:hunter2@host/bucket/folder", "name of one bucket"),
        ("s3://key:hunter2@host/BUCKET", "name of one bucket"),
        ("s3://key:hunter2@host/a..b", "name of one bucket"),
        ("s3://key:hunter2@host/127.0.0.1", "name of one bucket"),
        ("s3://key:hunter2@host/bucket?secure=no", "true or false"),
        ("s3://key:hunter2@host/bucket?region=", "region"),
        ("s3://key:hunter2@host/bucket?regoin=x", "regoin"),
    ],
)
def test_an_objects_url_that_leads_nowhere_is_refused_without_repeating_it(
    url: str, why: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)) as refused:
        config.load(**(NEEDED | {"objects_url": url}))
    assert "TIDEGATE_OBJECTS_URL" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_no_secret_is_in_what_settings_print() -> None:
    secrets = {
        "database_url": "postgresql://u:hunter2@localhost/x",
        "redis_url": "redis://:hunter2@localhost",
        "objects_url": "s3://hunter2:hunter2@host/bucket",
        "secret": "hunter2hunter2hunter2",
        "broker_url": "redis://:hunter2@localhost",
    }
    assert "hunter2" not in repr(config.load(**secrets))
    assert "hunter2" not in repr(config.parse_objects(secrets["objects_url"]))


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.load(**NEEDED).lease = 1  # type: ignore[misc]


def test_the_triton_of_a_gpu_has_the_gpus_number_in_its_address() -> None:
    settings = config.load(**NEEDED, triton_url="127.0.0.1:80{gpu}1")
    assert settings.triton_address("2") == "127.0.0.1:8021"
    assert settings.triton_address("none") == "127.0.0.1:8001"
